//! What goes wrong with nodes: those that use volumes, and the one that keeps them.

use anyhow::{Result, ensure};

use super::failures::NODE;
use super::{Scenario, When};
use crate::driver::{self, NAMESPACE, STORAGE_NODE};
use crate::kubectl::{self, Kubectl, PATIENCE};
use crate::report::step;
use crate::testbed::Testbed;
use crate::until;
use crate::workload::{self, CLASS, Usage};

pub(crate) const SCENARIOS: &[Scenario] = &[
    // The first still has the pod under load; the others take its node away.
    Scenario::new(
        "nodes::storage_node_loses_power",
        When::Alone,
        storage_node_loses_power,
    ),
    Scenario::new("nodes::loses_power", When::Alone, loses_power),
    Scenario::new("nodes::cut_off", When::Alone, cut_off),
    Scenario::new(
        "nodes::all_lose_power_at_once",
        When::Alone,
        all_lose_power_at_once,
    ),
];

/// Writes that were not flushed may be gone, so the device that was attached fails rather than goes on; what was flushed
/// is there for the next pod.
fn storage_node_loses_power(testbed: &Testbed) -> Result<()> {
    let load = testbed.load()?;
    testbed.io_goes_on()?;
    let written = workload::write_something(&load, "load", Usage::FileSystem)?;
    let node = testbed.node(STORAGE_NODE)?;
    node.power_off();
    node.power_on()?;
    step("the pod under load sees its I/O fail", || {
        until("it does", PATIENCE, || {
            let printed = workload::load_printed(&load, &testbed.logs)?;
            Ok(printed.contains("FAILED").then_some(()))
        })
    })?;
    load.delete("pod", "load")?;
    load.apply(&workload::pod("after", "node2", "data", Usage::FileSystem))?;
    step("the next pod has the volume", || {
        load.until_pod_ready("after")
    })?;
    let read = workload::digest(&load, "after", Usage::FileSystem)?;
    ensure!(read == written, "the next pod reads something else");
    driver::ready(&testbed.kubectl, &testbed.nodes)?;
    testbed.end_load()
}

fn loses_power(testbed: &Testbed) -> Result<()> {
    testbed.end_load()?;
    let kubectl = testbed.namespace("power")?;
    kubectl.apply(&workload::claim("data", CLASS, Usage::FileSystem))?;
    kubectl.apply(&workload::pod("first", "node2", "data", Usage::FileSystem))?;
    step("a pod has its volume", || kubectl.until_pod_ready("first"))?;
    let written = workload::write_something(&kubectl, "first", Usage::FileSystem)?;
    let volumes = workload::volume_ids(&kubectl)?;
    testbed.node("node2")?.power_off();
    step("the cluster notices", || not_ready(&kubectl))?;
    out_of_service(&kubectl)?;
    let read = workload::digest(&kubectl, "second", Usage::FileSystem)?;
    ensure!(read == written, "the second pod reads something else");
    step("the node comes back", || {
        testbed.node("node2")?.power_on()?;
        back_in_service(&kubectl)?;
        driver::until_no_device(testbed.node("node2")?, &volumes)
    })?;
    testbed.delete_namespace(&kubectl)
}

fn cut_off(testbed: &Testbed) -> Result<()> {
    testbed.end_load()?;
    let kubectl = testbed.namespace("cut-off")?;
    kubectl.apply(&workload::claim("data", CLASS, Usage::FileSystem))?;
    kubectl.apply(&workload::pod("first", "node2", "data", Usage::FileSystem))?;
    step("a pod has its volume", || kubectl.until_pod_ready("first"))?;
    workload::write_something(&kubectl, "first", Usage::FileSystem)?;
    let volumes = workload::volume_ids(&kubectl)?;
    let node = testbed.node("node2")?;
    // It goes on writing to the file's blocks, for as long as it has the volume.
    node.shell(
        "mount=$(grep -o '/var/lib/kubelet/pods/[^ ]*csi[^ ]*/mount' /proc/mounts)
        [ -d $mount ] || exit 1
        (while sleep 0.5; do dd if=/dev/zero of=$mount/file bs=1M count=4 conv=notrunc,fsync; done) >/run/writer 2>&1 &",
    )?;
    node.connect(false)?;
    step("the cluster notices", || not_ready(&kubectl))?;
    out_of_service(&kubectl)?;
    let written = workload::write_something(&kubectl, "second", Usage::FileSystem)?;
    testbed.node("node2")?.connect(true)?;
    step("the node is joined again", || {
        back_in_service(&kubectl)?;
        // The writer goes on until its device is given up.
        driver::until_no_device(testbed.node("node2")?, &volumes)
    })?;
    step("nothing that it wrote is there", || {
        kubectl.delete("pod", "second")?;
        driver::until_no_device(testbed.node("node1")?, &volumes)?;
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

fn all_lose_power_at_once(testbed: &Testbed) -> Result<()> {
    testbed.end_load()?;
    let kubectl = testbed.namespace("dark")?;
    kubectl.apply(&workload::claim("data", CLASS, Usage::FileSystem))?;
    kubectl.apply(&workload::pod("pod", "node2", "data", Usage::FileSystem))?;
    step("a pod has its volume", || kubectl.until_pod_ready("pod"))?;
    let written = workload::write_something(&kubectl, "pod", Usage::FileSystem)?;
    for node in &testbed.nodes {
        node.power_off();
    }
    for node in &testbed.nodes {
        node.power_on()?;
    }
    step("the pod is started again, and reads what it wrote", || {
        until("it does", PATIENCE, || {
            let pod = kubectl.object("pod", "pod")?.unwrap_or_default();
            let status = &pod["status"]["containerStatuses"][0];
            let is_another = status["restartCount"].as_u64() > Some(0);
            Ok((is_another && kubectl::is_ready(&pod)).then_some(()))
        })?;
        let read = workload::digest(&kubectl, "pod", Usage::FileSystem)?;
        ensure!(read == written, "it reads something else");
        workload::write_something(&kubectl, "pod", Usage::FileSystem)
    })?;
    driver::ready(&testbed.kubectl, &testbed.nodes)?;
    testbed.delete_namespace(&kubectl)
}
