//! What goes wrong in a cluster, each time under I/O that is verified.

use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::Scenario;
use crate::driver::{self, NAMESPACE};
use crate::kubectl::{self, Kubectl};
use crate::step;
use crate::testbed::Testbed;
use crate::workload::{self, CLASS, Usage, until_rounds};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario::new(
        "failures::pods_of_the_driver_deleted",
        pods_of_the_driver_deleted,
    ),
    Scenario::new("failures::api_server_away", api_server_away),
    Scenario::new("failures::upgrade_in_use", upgrade_in_use),
    Scenario::new("failures::node_loses_power", node_loses_power),
    Scenario::new("failures::node_cut_off", node_cut_off),
];

const NODE: &str = "app.kubernetes.io/component=node";
const CONTROLLER: &str = "app.kubernetes.io/component=controller";
const AGENT: &str = "app.kubernetes.io/component=agent";

/// A pod under load on the node that does not keep the volume.
fn loaded(kubectl: &Kubectl) -> Result<()> {
    kubectl.apply(&workload::claim("data", CLASS, Usage::FileSystem))?;
    kubectl.apply(&workload::loaded_pod("load", "node2", "data"))?;
    step("a pod works on its volume", || {
        kubectl.until_pod_ready("load")?;
        until_rounds(kubectl, "load", 1)
    })
}

fn pods_of_the_driver_deleted(testbed: &mut Testbed) -> Result<()> {
    let kubectl = testbed.namespace("pods-deleted")?;
    loaded(&kubectl)?;
    let server = format!(
        "hawser.dev/volume={}",
        workload::volume_id(&kubectl, "data")?
    );
    for (what, selector) in [
        ("the node parts", NODE),
        ("the controllers", CONTROLLER),
        ("the agents", AGENT),
        ("the volume's server", &server),
    ] {
        step(&format!("{what} are deleted and come back"), || {
            driver::replace_pods(&kubectl, selector)
        })?;
        step("I/O goes on", || until_rounds(&kubectl, "load", 2))?;
    }
    step("a node part is killed where it stands", || {
        // As the kernel does when memory is short.
        let node = testbed.node("node2")?;
        node.shell("pkill -KILL -f '^/usr/bin/hawser node '")?;
        kubectl
            .in_namespace(NAMESPACE)
            .until_pods_ready(NODE, crate::NODES)
    })?;
    step("I/O goes on", || until_rounds(&kubectl, "load", 2))?;
    testbed.delete_namespace(&kubectl)
}

fn api_server_away(testbed: &mut Testbed) -> Result<()> {
    let kubectl = testbed.namespace("no-api")?;
    loaded(&kubectl)?;
    let server = format!(
        "hawser.dev/volume={}",
        workload::volume_id(&kubectl, "data")?
    );
    testbed.plane.stop_api_server();
    step(
        "a minute without an API server, in which the volume's server is killed",
        || {
            thread::sleep(Duration::from_secs(20));
            testbed
                .node(driver::STORAGE_NODE)?
                .shell("pkill -KILL -f '^/usr/bin/hawser serve '")?;
            thread::sleep(Duration::from_secs(40));
            testbed.plane.start_api_server()
        },
    )?;
    step("I/O goes on", || until_rounds(&kubectl, "load", 2))?;
    step("the volume's server is ready", || {
        kubectl.in_namespace(NAMESPACE).until_pods_ready(&server, 1)
    })?;
    testbed.delete_namespace(&kubectl)
}

fn upgrade_in_use(testbed: &mut Testbed) -> Result<()> {
    let kubectl = testbed.namespace("upgrade")?;
    loaded(&kubectl)?;
    driver::upgrade(&testbed.kubectl, &mut testbed.nodes)?;
    step("I/O goes on", || until_rounds(&kubectl, "load", 2))?;
    testbed.delete_namespace(&kubectl)
}

fn node_loses_power(testbed: &mut Testbed) -> Result<()> {
    let kubectl = testbed.namespace("power")?;
    kubectl.apply(&workload::claim("data", CLASS, Usage::FileSystem))?;
    kubectl.apply(&workload::pod("first", "node2", "data", Usage::FileSystem))?;
    step("a pod has its volume", || kubectl.until_pod_ready("first"))?;
    let written = workload::write_something(&kubectl, "first", Usage::FileSystem)?;
    testbed.node("node2")?.power_off();
    step("the cluster notices", || not_ready(&kubectl))?;
    out_of_service(&kubectl)?;
    let read = workload::digest(&kubectl, "second", Usage::FileSystem)?;
    ensure!(read == written, "the second pod reads something else");
    step("the node comes back", || {
        testbed.node("node2")?.power_on()?;
        back_in_service(&kubectl)?;
        driver::until_devices(testbed.node("node2")?, 0)
    })?;
    testbed.delete_namespace(&kubectl)
}

fn node_cut_off(testbed: &mut Testbed) -> Result<()> {
    let kubectl = testbed.namespace("cut-off")?;
    kubectl.apply(&workload::claim("data", CLASS, Usage::FileSystem))?;
    kubectl.apply(&workload::pod("first", "node2", "data", Usage::FileSystem))?;
    step("a pod has its volume", || kubectl.until_pod_ready("first"))?;
    workload::write_something(&kubectl, "first", Usage::FileSystem)?;
    let node = testbed.node("node2")?;
    // It goes on writing to the file's blocks, for as long as it has the volume.
    node.shell(
        "mount=$(grep -o '/var/lib/kubelet/pods/[^ ]*csi[^ ]*/mount' /proc/mounts | head -n 1)
        (while sleep 0.5; do dd if=/dev/zero of=$mount/file bs=1M count=4 conv=notrunc,fsync; done) >/run/writer 2>&1 &",
    )?;
    node.connect(false)?;
    step("the cluster notices", || not_ready(&kubectl))?;
    out_of_service(&kubectl)?;
    let written = workload::write_something(&kubectl, "second", Usage::FileSystem)?;
    testbed.node("node2")?.connect(true)?;
    step("the node is joined again", || {
        back_in_service(&kubectl)?;
        // Time for a writer that nobody stops.
        thread::sleep(Duration::from_secs(10));
        driver::until_devices(testbed.node("node2")?, 0)
    })?;
    step("nothing that it wrote is there", || {
        kubectl.delete("pod", "second")?;
        driver::until_devices(testbed.node("node1")?, 0)?;
        // Mounted anew, so that nothing is read from another node's memory.
        kubectl.apply(&workload::pod("third", "node1", "data", Usage::FileSystem))?;
        kubectl.until_pod_ready("third")?;
        let read = workload::digest(&kubectl, "third", Usage::FileSystem)?;
        ensure!(
            read == written,
            "the node that was cut off wrote to a volume that another one has"
        );
        Ok(())
    })?;
    testbed.delete_namespace(&kubectl)
}

const OUT_OF_SERVICE: &str = "node.kubernetes.io/out-of-service=nodeshutdown:NoExecute";

/// A person says that the node is really down, and its pod moves.
fn out_of_service(kubectl: &Kubectl) -> Result<()> {
    kubectl.run(&["taint", "nodes", "node2", OUT_OF_SERVICE])?;
    kubectl.apply(&workload::pod("second", "node1", "data", Usage::FileSystem))?;
    step("a pod on the other node has the volume", || {
        kubectl.until_gone("pod", "first")?;
        kubectl.until_pod_ready("second")
    })
    .map(drop)
}

fn not_ready(kubectl: &Kubectl) -> Result<()> {
    kubectl
        .until("node", "node2", "is not ready", |node| {
            !kubectl::is_ready(node)
        })
        .map(drop)
}

fn back_in_service(kubectl: &Kubectl) -> Result<()> {
    kubectl.until("node", "node2", "is ready", kubectl::is_ready)?;
    kubectl.run(&["taint", "nodes", "node2", &format!("{OUT_OF_SERVICE}-")])?;
    kubectl
        .in_namespace(NAMESPACE)
        .until_pods_ready(NODE, crate::NODES)
        .map(drop)
}
