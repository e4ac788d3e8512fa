//! What the battery finds in the servers that Debian ships, check by check. `docs/peers.md` explains each finding.
//!
//! A golden's first line is the version that it holds for; each of the others is a finding.

use std::net::SocketAddr;
use std::process::Command;
use std::time::{Duration, Instant};

use hawser::verify::{Report, Selection};
use rustix::process::{Pid, Signal, kill_process};

use crate::peers::{Bench, EXPORT, Peer, examine, free_address};

fn version(command: &str, option: &str) -> String {
    let output = Command::new(command).arg(option).output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8(said).unwrap();
    let number = said
        .split_whitespace()
        .find(|word| word.starts_with(|c: char| c.is_ascii_digit()) && word.contains('.'));
    format!("{command} {}", number.unwrap())
}

/// The content of the file itself.
fn recorded(version: &str, report: &Report) -> String {
    let mut lines = format!("{version}\n");
    for finding in report.findings() {
        lines += &format!("{} {}\n", finding.check.severity, finding.check.id);
    }
    lines
}

fn assert_golden(bench: &Bench, address: SocketAddr, version: &str, name: &str, golden: &str) {
    let selection = Selection {
        write: true,
        intrusive: true,
        ..Selection::default()
    };
    let report = examine(&bench.server(address), &selection);
    assert_eq!(report.not_run().count(), 0, "{report}");
    let now = recorded(version, &report);
    assert_eq!(
        now, golden,
        "tests/verify/goldens/{name} is not what this server does. If the version is another one, look into each \
         difference, tell of it in docs/peers.md, and record:\n{now}\n{report}"
    );
}

fn nbdkit(mode: &str, golden: &str) {
    let bench = Bench::new();
    let address = free_address();
    let mut command = Command::new("nbdkit");
    command
        .args([
            "--foreground",
            &format!("--tls={mode}"),
            "--tls-verify-peer",
        ])
        .args(["--ipaddr=127.0.0.1", &format!("--port={}", address.port())])
        .arg(format!("--tls-certificates={}", bench.text("")))
        .args(["file", &bench.text("data")]);
    let _peer = Peer::start(&mut command, address);
    let version = version("nbdkit", "--version");
    assert_golden(&bench, address, &version, &format!("nbdkit-{mode}"), golden);
}

#[test]
fn nbdkit_that_requires_tls() {
    nbdkit("require", include_str!("goldens/nbdkit-require"));
}

#[test]
fn nbdkit_that_offers_tls() {
    nbdkit("on", include_str!("goldens/nbdkit-on"));
}

#[test]
fn qemu_nbd() {
    let bench = Bench::new();
    let address = free_address();
    let credentials = format!(
        "tls-creds-x509,id=t,endpoint=server,verify-peer=on,dir={}",
        bench.text("")
    );
    let mut command = Command::new("qemu-nbd");
    command
        .args(["--object", &credentials, "--tls-creds=t"])
        .args(["--format=raw", "--persistent", "--shared=0"])
        .args(["--bind=127.0.0.1", &format!("--port={}", address.port())])
        .args(["--export-name", EXPORT, &bench.text("data")]);
    let _peer = Peer::start(&mut command, address);
    let version = version("qemu-nbd", "--version");
    let golden = include_str!("goldens/qemu-nbd");
    assert_golden(&bench, address, &version, "qemu-nbd", golden);
}

/// A server that left its parent.
struct Daemon(Pid);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = kill_process(self.0, Signal::TERM);
    }
}

fn nbd_server(global: bool, name: &str, golden: &str) {
    let bench = Bench::new();
    let address = free_address();
    let force = "force_tls = true\n";
    let configuration = format!(
        "[generic]\nlistenaddr = 127.0.0.1\nport = {}\nallowlist = true\ncacertfile = {}\ncertfile = {}\nkeyfile = {}\n\
         {}[{EXPORT}]\nexportname = {}\n{}",
        address.port(),
        bench.text("ca-cert.pem"),
        bench.text("server-cert.pem"),
        bench.text("server-key.pem"),
        if global { force } else { "" },
        bench.text("data"),
        if global { "" } else { force },
    );
    std::fs::write(bench.path("configuration"), configuration).unwrap();
    let status = Command::new("nbd-server")
        .args(["-C", &bench.text("configuration"), "-p", &bench.text("pid")])
        .status()
        .unwrap();
    assert!(status.success());
    let deadline = Instant::now() + Duration::from_secs(60);
    let pid = loop {
        let pid = std::fs::read_to_string(bench.path("pid")).unwrap_or_default();
        match pid.trim().parse().ok().and_then(Pid::from_raw) {
            Some(pid) => break pid,
            None => assert!(Instant::now() < deadline, "nbd-server has no pid"),
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    let _daemon = Daemon(pid);
    let version = version("nbd-server", "-V");
    assert_golden(&bench, address, &version, name, golden);
}

#[test]
fn nbd_server_that_forces_tls() {
    let golden = include_str!("goldens/nbd-server-forced");
    nbd_server(true, "nbd-server-forced", golden);
}

#[test]
fn nbd_server_that_forces_tls_for_the_export() {
    let golden = include_str!("goldens/nbd-server-export");
    nbd_server(false, "nbd-server-export", golden);
}
