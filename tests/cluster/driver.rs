//! The driver as it is installed into the cluster.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::kubectl::{Kubectl, PATIENCE};
use super::node::Node;
use super::process::output;
use super::{step, until};

pub(crate) const NAMESPACE: &str = "hawser-system";

/// The one that keeps the volumes; the other one can then lose its power without taking them along.
pub(crate) const STORAGE_NODE: &str = "node1";

/// Archive, as `tests/support/image` makes it, and names of the image.
const REGISTRY: &str = "hawser.test";
const TAG: &str = "e2e";
pub(crate) const NEXT_TAG: &str = "e2e-next";

/// The pool's directory on the nodes.
pub(crate) const POOL: &str = "/pools/default";

fn checkout() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Builds the image, with the executable that cargo has built with this test in it.
pub(crate) fn build_image(images: &Path) -> Result<()> {
    let archive = images.join("hawser.tar");
    output(
        Command::new(checkout().join("tests/support/image"))
            .arg(archive)
            .arg(format!("{REGISTRY}/hawser:{TAG}"))
            .arg(env!("CARGO_BIN_EXE_hawser")),
    )
    .map(drop)
}

/// helm install, as the README says it; returns when all parts are ready.
pub(crate) fn install(kubectl: &Kubectl, nodes: &mut [Node]) -> Result<()> {
    kubectl.run(&["label", "node", STORAGE_NODE, "hawser.dev/storage=true"])?;
    step("helm install", || {
        helm(kubectl, &["install", "--create-namespace"], TAG)
    })?;
    step("the driver is ready", || ready(kubectl, nodes))
}

/// helm upgrade to an image of another name; returns when all parts are of it.
pub(crate) fn upgrade(kubectl: &Kubectl, nodes: &mut [Node]) -> Result<()> {
    for node in nodes.iter_mut() {
        node.shell(&format!(
            "ctr -n k8s.io images tag --force {REGISTRY}/hawser:{TAG} {REGISTRY}/hawser:{NEXT_TAG}"
        ))?;
    }
    step("helm upgrade", || helm(kubectl, &["upgrade"], NEXT_TAG))?;
    step("the driver is ready again", || ready(kubectl, nodes))
}

fn helm(kubectl: &Kubectl, command: &[&str], tag: &str) -> Result<()> {
    output(
        kubectl
            .in_namespace(NAMESPACE)
            .helm()
            .args(command)
            .args(["hawser", "charts/hawser"])
            .args(["--set", &format!("image.registry={REGISTRY}")])
            .args(["--set", &format!("image.tag={tag}")])
            .args([
                "--set",
                r"image.pullPolicy=Never,log.level=info\,hawser=debug",
            ])
            .args([
                "--set",
                &format!("pools[0].name=default,pools[0].directory={POOL}"),
            ])
            .args([
                "--set-string",
                r"pools[0].nodeSelector.hawser\.dev/storage=true",
            ])
            .current_dir(checkout()),
    )
    .map(drop)
}

fn ready(kubectl: &Kubectl, nodes: &[Node]) -> Result<()> {
    let ours = kubectl.in_namespace(NAMESPACE);
    for workload in [
        "daemonset/hawser-node",
        "daemonset/hawser-agent",
        "deployment/hawser-controller",
    ] {
        ours.run(&["rollout", "status", workload, "--timeout=300s"])?;
    }
    for node in nodes {
        kubectl.until("csinode", &node.name, "has the driver", |node| {
            node["spec"]["drivers"].as_array().is_some_and(|drivers| {
                drivers
                    .iter()
                    .any(|driver| driver["name"] == "csi.hawser.dev")
            })
        })?;
    }
    Ok(())
}

/// Deletes all pods of a part, as an eviction or a crash would, and waits for their successors.
pub(crate) fn replace_pods(kubectl: &Kubectl, selector: &str) -> Result<()> {
    let ours = kubectl.in_namespace(NAMESPACE);
    let before = ours.objects("pods", selector)?;
    ensure!(!before.is_empty(), "no pods with {selector}");
    ours.run(&["delete", "pods", "--selector", selector])?;
    ours.until_pods_ready(selector, before.len()).map(drop)
}

/// What is left of a volume on the node that kept it.
pub(crate) fn backing(nodes: &mut [Node], volume: &str) -> Result<String> {
    let node = nodes
        .iter_mut()
        .find(|node| node.name == STORAGE_NODE)
        .context("the storage node is a node")?;
    node.shell(&format!(
        "ls -A {POOL}/volumes | grep -F '{volume}' || true"
    ))
}

/// Fails unless a node has as many nbd devices in use as said.
pub(crate) fn until_devices(node: &mut Node, count: usize) -> Result<()> {
    until(
        &format!("{} uses {count} devices", node.name),
        PATIENCE,
        || {
            let devices = node.shell("ls -d /sys/block/nbd*/pid 2>/dev/null || true")?;
            Ok((devices.lines().count() == count).then_some(()))
        },
    )
}
