//! A network of the benchmark's own: loopback alone, with congestion control as Linux has it.
//!
//! A machine may be set to another one, such as BBR, with which fewer small requests come at once.

use std::fs;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};

/// In the environment of the process that has a network to itself: the network it came from.
const ALONE: &str = "HAWSER_BENCH_ALONE";

const CONGESTION_CONTROL: &str = "/proc/sys/net/ipv4/tcp_congestion_control";

/// Linux' own, and what it has besides. A machine need not allow the first in other networks than its own.
const USUAL: [&str; 2] = ["cubic", "reno"];

/// Starts this program once more with a network of its own, as any user; the status it ended with. Nothing where that was
/// done already.
pub(crate) fn alone() -> Result<Option<ExitCode>> {
    let here = fs::read_link("/proc/self/ns/net")?;
    if let Some(outside) = std::env::var_os(ALONE) {
        // Its settings are about to be changed.
        ensure!(here.as_os_str() != outside, "this is the machine's network");
        prepare()?;
        return Ok(None);
    }
    let mut command = Command::new("unshare");
    command.arg("--net");
    if !rustix::process::geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    let status = command
        .arg(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .env(ALONE, here)
        .status()
        .context("unshare: install util-linux")?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(Some(ExitCode::from(code.unwrap_or(1))))
}

fn prepare() -> Result<()> {
    ip("link set lo up")?;
    let found = USUAL
        .into_iter()
        .find(|name| fs::write(CONGESTION_CONTROL, name).is_ok());
    ensure!(found.is_some(), "the kernel has none of {USUAL:?}");
    Ok(())
}

pub(crate) fn ip(arguments: &str) -> Result<()> {
    let status = Command::new("ip")
        .args(arguments.split(' '))
        .status()
        .context("ip: install iproute2")?;
    ensure!(status.success(), "ip {arguments}: {status}");
    Ok(())
}

/// The congestion control that is in use here.
pub(crate) fn congestion_control() -> Result<String> {
    let name = fs::read_to_string(CONGESTION_CONTROL).context(CONGESTION_CONTROL)?;
    Ok(name.trim().to_owned())
}
