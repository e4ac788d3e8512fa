//! The driver's own life: upgraded and uninstalled while volumes are in use.

use anyhow::{Result, ensure};

use super::{Scenario, When};
use crate::driver::{self, CURRENT, NAMESPACE, PREVIOUS};
use crate::kubectl::PATIENCE;
use crate::report::step;
use crate::testbed::Testbed;
use crate::until;
use crate::workload::{self, Usage};

pub(crate) const BEGIN: &[Scenario] = &[Scenario::new(
    "release::upgraded_while_in_use",
    When::First,
    upgraded_while_in_use,
)];

pub(crate) const END: &[Scenario] = &[
    Scenario::new(
        "release::manifests_are_accepted",
        When::SideBySide,
        manifests_are_accepted,
    ),
    Scenario::new(
        "release::uninstalled_while_in_use",
        When::Alone,
        uninstalled_while_in_use,
    ),
    Scenario::new("release::nothing_is_left", When::Alone, nothing_is_left),
];

fn upgraded_while_in_use(testbed: &Testbed) -> Result<()> {
    testbed.install_once(|| driver::install(&testbed.kubectl, &testbed.nodes, PREVIOUS))?;
    testbed.load()?;
    testbed.io_goes_on()?;
    driver::upgrade(&testbed.kubectl, &testbed.nodes, CURRENT)?;
    testbed.io_goes_on()
}

/// What those apply who do not use Helm.
fn manifests_are_accepted(testbed: &Testbed) -> Result<()> {
    // Their namespace is there only once the driver was installed.
    testbed.namespace("manifests")?;
    for file in ["deploy/crds.yaml", "deploy/hawser.yaml"] {
        step(&format!("the API server would take {file}"), || {
            let ours = testbed.kubectl.in_namespace(NAMESPACE);
            ours.run(&[
                "apply",
                "--server-side",
                "--force-conflicts",
                "--dry-run=server",
                "-f",
                &format!("{}/{file}", env!("CARGO_MANIFEST_DIR")),
            ])
        })?;
    }
    testbed.kubectl.delete("namespace", "manifests")
}

fn uninstalled_while_in_use(testbed: &Testbed) -> Result<()> {
    let load = testbed.load()?;
    testbed.io_goes_on()?;
    let volume = workload::volume_id(&load, "data")?;
    let ours = testbed.kubectl.in_namespace(NAMESPACE);
    step("helm uninstall is refused, and says why", || {
        let (done, said) = driver::uninstall(&testbed.kubectl)?;
        ensure!(!done, "helm uninstall went on: {said}");
        let claimed = load.object("pvc", "data")?.unwrap_or_default();
        let name = claimed["spec"]["volumeName"].as_str().unwrap_or_default();
        for words in [name, "node2", "Delete the pods that use"] {
            ensure!(
                said.contains(words),
                "helm says nothing of {words:?}: {said}"
            );
        }
        Ok(())
    })?;
    driver::ready(&testbed.kubectl, &testbed.nodes)?;
    testbed.io_goes_on()?;

    let written = workload::write_something(&load, "load", Usage::FileSystem)?;
    load.delete("pod", "load")?;
    step(
        "helm uninstall goes on when the volume is not in use",
        || {
            until("nothing is attached", PATIENCE, || {
                let volumes = ours.objects("nbdvolume", "")?;
                let mut attached = volumes.iter().map(|volume| &volume["spec"]["attachments"]);
                let is_used = attached.any(|all| all.as_array().is_some_and(|all| !all.is_empty()));
                // What Kubernetes notes of it goes a moment later.
                let noted = ours.objects("volumeattachment", "")?;
                Ok((!is_used && noted.is_empty()).then_some(()))
            })?;
            let (done, said) = driver::uninstall(&testbed.kubectl)?;
            ensure!(done, "helm uninstall failed: {said}");
            Ok(())
        },
    )?;
    step("the volume is still there", || {
        ensure!(
            ours.object("nbdvolume", &volume)?.is_some(),
            "the NbdVolume is gone"
        );
        ensure!(
            driver::backing(&testbed.nodes, &volume)?.contains(&volume),
            "its data is gone"
        );
        Ok(())
    })?;
    driver::install(&testbed.kubectl, &testbed.nodes, CURRENT)?;
    load.apply(&workload::pod("after", "node2", "data", Usage::FileSystem))?;
    step("a pod has it again", || load.until_pod_ready("after"))?;
    let read = workload::digest(&load, "after", Usage::FileSystem)?;
    ensure!(read == written, "the pod reads something else");
    testbed.end_load()
}

/// Of all that the whole run has made; where a scenario failed, this is what it left.
fn nothing_is_left(testbed: &Testbed) -> Result<()> {
    testbed.end_load()?;
    let ours = testbed.kubectl.in_namespace(NAMESPACE);
    step("nothing is left of any volume", || {
        until("there is no volume", PATIENCE, || {
            let left = ours.run(&[
                "get",
                "nbdvolumes,statefulsets,secrets,pods",
                "--selector=hawser.dev/volume",
                "-o",
                "name",
            ])?;
            let volumes = ours.objects("nbdvolume", "")?;
            Ok((left.trim().is_empty() && volumes.is_empty()).then_some(()))
        })?;
        let left = driver::backing(&testbed.nodes, "vol-")?;
        ensure!(left.is_empty(), "on the storage node is left: {left}");
        for node in &testbed.nodes {
            let devices = node.shell("ls -d /sys/block/nbd*/pid 2>/dev/null || true")?;
            ensure!(devices.is_empty(), "{} still uses {devices}", node.name);
        }
        Ok(())
    })
}
