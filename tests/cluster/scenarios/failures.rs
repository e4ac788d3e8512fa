//! What goes wrong with the driver and the cluster's own parts, each time under I/O that is verified.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{Scenario, When};
use crate::driver::{self, NAMESPACE, STORAGE_NODE};
use crate::kubectl::{Kubectl, PATIENCE};
use crate::report::step;
use crate::testbed::Testbed;
use crate::until;
use crate::workload::{self, CLASS, Usage};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario::new(
        "failures::pods_of_the_driver_deleted",
        When::Alone,
        pods_of_the_driver_deleted,
    ),
    Scenario::new(
        "failures::leading_controller_killed",
        When::Alone,
        leading_controller_killed,
    ),
    Scenario::new(
        "failures::kubelet_restarted",
        When::Alone,
        kubelet_restarted,
    ),
    Scenario::new(
        "failures::storage_label_taken",
        When::Alone,
        storage_label_taken,
    ),
    Scenario::new("failures::api_server_away", When::Alone, api_server_away),
];

pub(super) const NODE: &str = "app.kubernetes.io/component=node";
const CONTROLLER: &str = "app.kubernetes.io/component=controller";
const AGENT: &str = "app.kubernetes.io/component=agent";

fn server_of_load(kubectl: &Kubectl) -> Result<String> {
    let volume = workload::volume_id(kubectl, "data")?;
    Ok(format!("hawser.dev/volume={volume}"))
}

fn pods_of_the_driver_deleted(testbed: &Testbed) -> Result<()> {
    let kubectl = testbed.load()?;
    let server = server_of_load(&kubectl)?;
    for (what, selector) in [
        ("the node parts", NODE),
        ("the controllers", CONTROLLER),
        ("the agents", AGENT),
        ("the volume's server", &server),
    ] {
        step(&format!("{what} are deleted and come back"), || {
            driver::replace_pods(&kubectl, selector)
        })?;
        testbed.io_goes_on()?;
    }
    step("a node part is killed where it stands", || {
        // As the kernel does when memory is short.
        let node = testbed.node("node2")?;
        node.shell("pkill -KILL -f '^/usr/bin/hawser node '")?;
        kubectl
            .in_namespace(NAMESPACE)
            .until_pods_ready(NODE, crate::NODES)
    })?;
    testbed.io_goes_on()
}

const CLAIMS: usize = 10;

/// Its process first, then the pod of the one that leads after it, while volumes are asked for.
fn leading_controller_killed(testbed: &Testbed) -> Result<()> {
    let kubectl = testbed.namespace("leader")?;
    let ours = kubectl.in_namespace(NAMESPACE);
    let leader = |other_than: &str| {
        until("a controller leads", PATIENCE, || {
            let lease = ours
                .object("lease", "hawser-controller")?
                .unwrap_or_default();
            let holder = lease["spec"]["holderIdentity"].as_str().unwrap_or_default();
            Ok((!holder.is_empty() && holder != other_than).then(|| holder.to_owned()))
        })
    };
    let pod_of = |holder: &str| {
        let (pod, _) = holder
            .rsplit_once('_')
            .context("the Lease's holder is no pod's")?;
        ours.object("pod", pod)?.context("the leader's pod is gone")
    };
    kubectl.apply(&workload::class("at-once", "pool: default"))?;
    let claim = |index: usize| workload::claim(&format!("data-{index}"), "at-once", Usage::Block);
    let claims = |indexes: std::ops::Range<usize>| indexes.map(claim).collect::<String>();
    let first = leader("")?;
    let pod = pod_of(&first)?;
    kubectl.apply(&claims(0..CLAIMS / 2))?;
    let node = testbed.node(pod["spec"]["nodeName"].as_str().unwrap_or_default())?;
    node.shell("pkill -KILL -f '^/usr/bin/hawser controller '")?;
    kubectl.apply(&claims(CLAIMS / 2..CLAIMS))?;
    let second = step("another controller leads", || leader(&first))?;
    let pod = pod_of(&second)?;
    ours.delete("pod", pod["metadata"]["name"].as_str().unwrap_or_default())?;
    step("all claims are bound", || {
        until("they are", PATIENCE, || {
            let claims = kubectl.objects("pvc", "")?;
            let is_bound = |claim: &&Value| claim["status"]["phase"] == "Bound";
            Ok((claims.iter().filter(is_bound).count() == CLAIMS).then_some(()))
        })
    })?;
    testbed.delete_namespace(&kubectl)?;
    kubectl.run(&["delete", "storageclass", "at-once"])?;
    step("two controllers are ready", || {
        ours.until_pods_ready(CONTROLLER, 2)
    })?;
    testbed.io_goes_on()
}

fn kubelet_restarted(testbed: &Testbed) -> Result<()> {
    testbed.load()?;
    let kubectl = testbed.namespace("kubelet")?;
    kubectl.apply(&workload::claim("data", CLASS, Usage::FileSystem))?;
    kubectl.apply(&workload::pod("first", "node2", "data", Usage::FileSystem))?;
    step("a pod has its volume", || kubectl.until_pod_ready("first"))?;
    let written = workload::write_something(&kubectl, "first", Usage::FileSystem)?;
    let node = testbed.node("node2")?;
    let registered = || {
        let script = "cat /var/log/pods/*_hawser-node-*/hawser/*.log | grep -c 'the kubelet registered this plugin' || true";
        Ok::<_, anyhow::Error>(node.shell(script)?.trim().parse::<usize>()?)
    };
    let before = registered()?;
    step(
        "the kubelet is killed, and registers the driver anew",
        || {
            // What looks after it starts it again.
            node.shell("pkill -KILL -x kubelet")?;
            until("the driver is registered", PATIENCE, || {
                Ok((registered()? > before).then_some(()))
            })
        },
    )?;
    testbed.io_goes_on()?;
    kubectl.delete("pod", "first")?;
    kubectl.apply(&workload::pod("second", "node1", "data", Usage::FileSystem))?;
    step("its pod moves to the other node", || {
        kubectl.until_pod_ready("second")
    })?;
    let read = workload::digest(&kubectl, "second", Usage::FileSystem)?;
    ensure!(read == written, "the second pod reads something else");
    testbed.delete_namespace(&kubectl)
}

/// The agent goes with it. What is there is served on, and the objects say what does not work any more.
fn storage_label_taken(testbed: &Testbed) -> Result<()> {
    let load = testbed.load()?;
    let ours = load.in_namespace(NAMESPACE);
    let volume = workload::volume_id(&load, "data")?;
    let healthy = |wanted: &'static str| move |pool: &Value| pool["status"]["healthy"] == wanted;
    let agent = |wanted: &'static str| {
        move |volume: &Value| {
            let conditions = volume["status"]["conditions"].as_array();
            let mut conditions = conditions.into_iter().flatten();
            conditions.any(|one| one["type"] == "AgentReady" && one["status"] == wanted)
        }
    };
    load.run(&["label", "node", STORAGE_NODE, "hawser.dev/storage-"])?;
    step("the pool's and the volume's objects say so", || {
        ours.until_pods_ready(AGENT, 0)?;
        let pool = ours.until("nbdpool", "default", "has no healthy node", healthy("0/1"))?;
        let message = pool["status"]["message"].as_str().unwrap_or_default();
        ensure!(message.contains(STORAGE_NODE), "the pool says {message:?}");
        ours.until("nbdvolume", &volume, "misses its agent", agent("False"))
    })?;
    testbed.io_goes_on()?;
    load.run(&["label", "node", STORAGE_NODE, "hawser.dev/storage=true"])?;
    step("all is well when it is put back", || {
        ours.until_pods_ready(AGENT, 1)?;
        ours.until("nbdpool", "default", "is healthy", healthy("1/1"))?;
        ours.until("nbdvolume", &volume, "has its agent", agent("True"))
    })?;
    testbed.io_goes_on()
}

fn api_server_away(testbed: &Testbed) -> Result<()> {
    let kubectl = testbed.load()?;
    let server = server_of_load(&kubectl)?;
    step(
        "a minute without an API server, in which the volume's server is killed",
        || {
            testbed.plane.lock().unwrap().stop_api_server();
            thread::sleep(Duration::from_secs(20));
            testbed
                .node(STORAGE_NODE)?
                .shell("pkill -KILL -f '^/usr/bin/hawser serve '")?;
            testbed.io_goes_on()?;
            thread::sleep(Duration::from_secs(35));
            testbed.plane.lock().unwrap().start_api_server()
        },
    )?;
    testbed.io_goes_on()?;
    step("the volume's server is ready", || {
        kubectl.in_namespace(NAMESPACE).until_pods_ready(&server, 1)
    })
    .map(drop)
}
