//! csi-sanity, the conformance suite of CSI, on `hawser standalone`: all of it, for all that is declared, with volumes on
//! kernel devices.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal};
use tempfile::TempDir;

use crate::Scenario;

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
    let home = TempDir::with_prefix("sanity")?;
    let path = |name: &str| home.path().join(name);
    let mut driver = Driver::start(&home)?;

    let mut suite = Command::new(csi_sanity()?);
    suite
        .arg(format!("--csi.endpoint={}", driver.endpoint))
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
    let log = driver.stop()?;
    ensure!(
        output.status.success(),
        "csi-sanity: {}\n{log}",
        output.status
    );
    ensure!(text.contains(SPECS), "csi-sanity did not say {SPECS:?}");
    for reason in skipped(&fs::read_to_string(path("report.xml"))?) {
        ensure!(
            UNDECLARED.iter().any(|part| reason.contains(part)),
            "csi-sanity skipped a spec: {reason}"
        );
    }
    ensure!(!log.contains("hunter2"), "a secret is in the log");
    let problem = log
        .lines()
        .find(|line| line.contains(" ERROR ") || line.contains(" WARN "));
    ensure!(
        problem.is_none(),
        "in the log: {}",
        problem.unwrap_or_default()
    );
    nothing_is_left(home.path())
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

/// No volume, no record, no published directory.
fn nothing_is_left(home: &Path) -> Result<()> {
    for folder in [
        "pool/volumes",
        "state/node/volumes",
        "state/node/devices",
        "mount",
        "staging",
    ] {
        let Ok(entries) = fs::read_dir(home.join(folder)) else {
            continue;
        };
        let left: Vec<_> = entries
            .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
            .filter(|name| !name.starts_with('.') && name != "lock")
            .collect();
        ensure!(left.is_empty(), "left in {folder}: {left:?}");
    }
    Ok(())
}

/// A running `hawser standalone`.
struct Driver {
    child: Child,
    endpoint: String,
    log: PathBuf,
}

impl Driver {
    fn start(home: &TempDir) -> Result<Self> {
        let path = |name: &str| home.path().join(name);
        for folder in ["state", "secrets", "pool"] {
            fs::create_dir(path(folder))?;
        }
        let endpoint = format!("unix://{}", path("csi.sock").display());
        let log = path("log");
        let mut child = Command::new(env!("CARGO_BIN_EXE_hawser"))
            .args(["standalone", "--node-id", "node-a", "--stop-servers"])
            // The suite attaches as many as a node may have, and one more.
            .args(["--max-volumes-per-node", "3"])
            .arg("--state")
            .arg(path("state"))
            .arg("--secrets")
            .arg(path("secrets"))
            .arg("--pool")
            .arg(path("pool"))
            .args(["--endpoint", &endpoint])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(fs::File::create(&log)?)
            .spawn()?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("its output")?).read_line(&mut line)?;
        ensure!(
            line.contains(&endpoint),
            "hawser standalone does not serve: {line}{}",
            fs::read_to_string(&log)?
        );
        Ok(Self {
            child,
            endpoint,
            log,
        })
    }

    /// Ends it in good order, and returns its log.
    fn stop(&mut self) -> Result<String> {
        let pid = Pid::from_child(&self.child);
        rustix::process::kill_process(pid, Signal::TERM)?;
        let begun = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            ensure!(
                begun.elapsed() < Duration::from_secs(60),
                "hawser standalone does not end"
            );
            std::thread::sleep(Duration::from_millis(20));
        };
        let log = fs::read_to_string(&self.log)?;
        ensure!(status.success(), "hawser standalone: {status}\n{log}");
        Ok(log)
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
