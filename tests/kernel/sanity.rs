//! csi-sanity, the conformance suite of CSI, on `hawser standalone`: all of it, for all that is declared, with volumes on
//! kernel devices.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::Scenario;
use crate::driver::Driver;

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario::new("sanity::mount", || run("mount", None, Secrets::None)).within_seconds(600),
    Scenario::new("sanity::block", || run("block", None, Secrets::None)).within_seconds(600),
    Scenario::new("sanity::xfs_and_secrets", || {
        run("mount", Some("xfs"), Secrets::Unrelated)
    })
    .within_seconds(600),
    Scenario::new("sanity::btrfs", || {
        run("mount", Some("btrfs"), Secrets::None)
    })
    .within_seconds(600),
];

/// The specs of csi-sanity 5.6.0 that ask for something we declare, all of which have to pass. One more is pending in
/// csi-sanity itself.
const SPECS: &str = "58 Passed | 0 Failed | 1 Pending";

/// The others skip themselves, for what we do not declare. Not one of them for another reason.
const UNDECLARED: [&str; 9] = [
    "Snapshot",
    "SNAPSHOT",
    "Cloning",
    "Modify volume",
    "Modify Volume",
    "ControllerModifyVolume",
    "Health",
    "GroupControllerService",
    // PUBLISH_READONLY.
    "ControllerPublishVolume.readonly field",
];

/// What an orchestrator may send along with every call.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Secrets {
    None,
    /// A map that is not ours: the certificates come from the installation all the same.
    Unrelated,
}

/// Calls to which csi-sanity can give secrets.
const CALLS: [&str; 8] = [
    "CreateVolume",
    "DeleteVolume",
    "ControllerPublishVolume",
    "ControllerUnpublishVolume",
    "ControllerValidateVolumeCapabilities",
    "NodeStageVolume",
    "NodePublishVolume",
    "ControllerExpandVolume",
];

fn run(access: &str, fs_type: Option<&str>, secrets: Secrets) -> Result<()> {
    // The suite attaches as many as a node may have, and one more.
    let driver = Driver::start(&["--max-volumes-per-node", "3"])?;
    let path = |name: &str| driver.path(name);

    let mut suite = Command::new(csi_sanity()?);
    suite
        .arg(format!("--csi.endpoint={}", driver.endpoint()))
        .arg(format!("--csi.mountdir={}", path("mount").display()))
        .arg(format!("--csi.stagingdir={}", path("staging").display()))
        .arg(format!("--csi.testvolumeaccesstype={access}"))
        // XFS wants 300 MiB at least.
        .args([
            "--csi.testvolumesize=402653184",
            "--csi.testvolumeexpandsize=536870912",
        ])
        .arg("--csi.testnodevolumeattachlimit")
        .arg("--ginkgo.no-color")
        .arg(format!(
            "--ginkgo.junit-report={}",
            path("report.xml").display()
        ));
    if let Some(fs_type) = fs_type {
        let file = path("parameters.yaml");
        fs::write(&file, format!("csi.storage.k8s.io/fstype: {fs_type}\n"))?;
        suite.arg(format!("--csi.testvolumeparameters={}", file.display()));
    }
    if secrets == Secrets::Unrelated {
        let file = path("secrets.yaml");
        let lines = CALLS.map(|call| format!("{call}Secret:\n  password: hunter2\n"));
        fs::write(&file, lines.concat())?;
        suite.arg(format!("--csi.secrets={}", file.display()));
    }
    let output = suite.output().context("csi-sanity")?;
    let text = String::from_utf8_lossy(&output.stdout);
    println!("{text}{}", String::from_utf8_lossy(&output.stderr));
    let report = fs::read_to_string(path("report.xml"));
    let log = driver.log()?;
    ensure!(
        output.status.success(),
        "csi-sanity: {}\n{log}",
        output.status
    );
    ensure!(text.contains(SPECS), "csi-sanity did not say {SPECS:?}");
    for reason in skipped(&report?) {
        ensure!(
            UNDECLARED.iter().any(|part| reason.contains(part)),
            "csi-sanity skipped a spec: {reason}"
        );
    }
    ensure!(!log.contains("hunter2"), "a secret is in the log");
    driver.end_well()
}

/// Where `tests/support/install` puts it.
fn csi_sanity() -> Result<PathBuf> {
    let cache = std::env::var_os("HAWSER_CACHE").context("HAWSER_CACHE is not set")?;
    Ok(PathBuf::from(cache).join("bin/csi-sanity"))
}

/// Why specs were skipped, from a JUnit report.
fn skipped(report: &str) -> Vec<&str> {
    let messages = report.split("<skipped message=\"").skip(1);
    messages
        .filter_map(|rest| rest.split('"').next())
        .filter(|message| !message.contains("pending"))
        .collect()
}
