//! The driver as it is installed into the cluster.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::disk::Staging;
use super::kubectl::{Kubectl, PATIENCE};
use super::node::Node;
use super::process::output;
use super::report::step;
use super::tools::Tools;
use super::until;

pub(crate) const NAMESPACE: &str = "hawser-system";

/// The one that keeps the volumes; the other one can then lose its power without taking them along.
pub(crate) const STORAGE_NODE: &str = "node1";

/// The image, as `tests/support/image` makes it.
const ARCHIVE: &str = "hawser.tar";
const REGISTRY: &str = "hawser.test";
const TAG: &str = "e2e";
const PREVIOUS_TAG: &str = "e2e-previous";

/// A version of the chart, and the tag that its image is given.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Chart {
    path: &'static str,
    tag: &'static str,
}

/// The one of this checkout.
pub(crate) const CURRENT: Chart = Chart {
    path: "charts/hawser",
    tag: TAG,
};

/// The one before, as it was packaged.
pub(crate) const PREVIOUS: Chart = Chart {
    path: "tests/cluster/previous/hawser-0.1.0.tgz",
    tag: PREVIOUS_TAG,
};

/// The directory that the chart's own pool has on the nodes.
const POOL: &str = "/var/lib/hawser/pool";

fn checkout() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// What the image is made of.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Image {
    /// The whole Dockerfile: what users run.
    Whole,
    /// The executable that cargo has built with this test, with what the Dockerfile puts beside it.
    Quick,
}

impl Image {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Whole => "image, the whole Dockerfile",
            Self::Quick => "image, of the executable that this test was built with",
        }
    }
}

/// Builds the image into a folder of archives.
pub(crate) fn build_image(image: Image, images: &Path) -> Result<()> {
    let mut build = Command::new(checkout().join("tests/support/image"));
    build
        .arg(images.join(ARCHIVE))
        .arg(format!("{REGISTRY}/hawser:{TAG}"));
    if matches!(image, Image::Quick) {
        build.arg(env!("CARGO_BIN_EXE_hawser"));
    }
    output(&mut build).map(drop)
}

/// Sees to it that all parts run the executable that is in the image.
fn runs_what_was_built(kubectl: &Kubectl) -> Result<()> {
    let built = Tools::find()?.images().join(format!("{ARCHIVE}.hawser"));
    let built = fs::read_to_string(built)?;
    for part in [
        "deployment/hawser-controller",
        "daemonset/hawser-node",
        "daemonset/hawser-agent",
    ] {
        let sum = ["exec", part, "--", "sha256sum", "/proc/1/exe"];
        let runs = kubectl.in_namespace(NAMESPACE).run(&sum)?;
        let runs = runs.split_whitespace().next().unwrap_or_default();
        ensure!(
            runs == built.trim(),
            "{part} runs {runs}, the image has {built}"
        );
    }
    Ok(())
}

/// Imports it, under the names of both versions: no executable of the previous one is kept.
pub(crate) fn import_image(staging: &Staging, images: &Path) -> Result<()> {
    staging.import(&images.join(ARCHIVE))?;
    let name = |tag: &str| format!("{REGISTRY}/hawser:{tag}");
    staging.tag(&name(TAG), &name(PREVIOUS_TAG))
}

/// helm install, as the README says it; returns when all parts are ready.
pub(crate) fn install(kubectl: &Kubectl, nodes: &[Node], chart: Chart) -> Result<()> {
    let storage = "hawser.dev/storage=true";
    kubectl.run(&["label", "node", "--overwrite", STORAGE_NODE, storage])?;
    step("helm install", || {
        helm(kubectl, &["install", "--create-namespace"], chart)
    })?;
    step("the driver is ready", || ready(kubectl, nodes))?;
    step("it is what was built", || runs_what_was_built(kubectl))
}

/// helm upgrade; returns when all parts are of that version.
pub(crate) fn upgrade(kubectl: &Kubectl, nodes: &[Node], chart: Chart) -> Result<()> {
    step("helm upgrade", || helm(kubectl, &["upgrade"], chart))?;
    step("the driver is ready again", || ready(kubectl, nodes))?;
    step("it is what was built", || runs_what_was_built(kubectl))
}

/// helm uninstall, and what it printed whether it went well or not.
pub(crate) fn uninstall(kubectl: &Kubectl) -> Result<(bool, String)> {
    let result = kubectl
        .in_namespace(NAMESPACE)
        .helm()
        .args(["uninstall", "hawser", "--wait", "--timeout=4m"])
        .output()?;
    let printed = [result.stdout, result.stderr].concat();
    Ok((
        result.status.success(),
        String::from_utf8_lossy(&printed).into_owned(),
    ))
}

fn helm(kubectl: &Kubectl, command: &[&str], chart: Chart) -> Result<()> {
    output(
        kubectl
            .in_namespace(NAMESPACE)
            .helm()
            .args(command)
            .args(["hawser", chart.path])
            .args(["--set", &format!("image.registry={REGISTRY}")])
            .args(["--set", &format!("image.tag={}", chart.tag)])
            .args([
                "--set",
                r"image.pullPolicy=Never,log.level=info\,hawser=debug",
            ])
            .current_dir(checkout()),
    )
    .map(drop)
}

pub(crate) fn ready(kubectl: &Kubectl, nodes: &[Node]) -> Result<()> {
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
    let before = ours.objects("pod", selector)?;
    ensure!(!before.is_empty(), "no pods with {selector}");
    ours.run(&["delete", "pods", "--selector", selector])?;
    ours.until_pods_ready(selector, before.len()).map(drop)
}

/// What is left of a volume on the node that kept it.
pub(crate) fn backing(nodes: &[Node], volume: &str) -> Result<String> {
    let node = nodes
        .iter()
        .find(|node| node.name == STORAGE_NODE)
        .context("the storage node is a node")?;
    node.shell(&format!(
        "ls -A {POOL}/volumes | grep -F '{volume}' || true"
    ))
}

/// Waits until a node has no nbd device of these volumes.
pub(crate) fn until_no_device(node: &Node, volumes: &[String]) -> Result<()> {
    if volumes.is_empty() {
        return Ok(());
    }
    let pattern = volumes.join("\\|");
    until(
        &format!("{} has no device of {volumes:?}", node.name),
        PATIENCE,
        || {
            let left = node.shell(&format!(
                "grep -l -s '{pattern}' /sys/block/nbd*/backend || true"
            ))?;
            Ok(left.is_empty().then_some(()))
        },
    )
}
