//! The driver in a real cluster: API server, controller manager, scheduler, kubelets, containerd, the real sidecars and
//! real kernel devices, as ordinary processes on one machine.
//!
//! Scenarios that leave the driver and the nodes alone run side by side; each has a namespace of its own.
//!
//! The control plane runs in a network namespace of the test's own, each node in a user-mode Linux. Everything is in a
//! PID namespace too, so that nothing outlives the test however it ends. What all parts said is in `target/e2e-logs`.
//!
//! ```text
//! cargo test --test cluster -- [--list] [--quick] [PART-OF-A-NAME...]
//! cargo test --test cluster -- [--quick] --shell
//! cargo test --test cluster -- [--quick] --latency
//! ```
//! The image is the whole Dockerfile's, a release; with `--quick` it is of the executable that cargo built with the test.
//! `--shell` brings the cluster up with the driver in it, and starts a shell with `KUBECONFIG` set. `--latency` prints
//! what lies between a claim and its running pod.
#![allow(
    clippy::unwrap_used,
    reason = "a helper of a scenario that fails fails the scenario"
)]

mod control;
mod disk;
mod driver;
mod host;
#[path = "../support/kernels.rs"]
mod kernels;
mod kubectl;
mod latency;
mod network;
mod node;
mod process;
mod reader;
mod report;
mod scenarios;
#[path = "../bench/spread.rs"]
#[allow(dead_code, reason = "other reports use more of it")]
mod spread;
mod testbed;
mod tools;
mod workload;

use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Two, so that pods can move.
pub(crate) const NODES: usize = 2;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let result = match arguments.first().map(String::as_str) {
        Some(host::INSIDE) => testbed::main(&arguments[1..]),
        _ => host::main(&arguments),
    };
    result.unwrap_or_else(|error| {
        eprintln!("cluster: {error:#}");
        ExitCode::FAILURE
    })
}

/// Waits for something to come, and fails with what was waited for.
pub(crate) fn until<T>(
    what: &str,
    patience: Duration,
    mut look: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let started = Instant::now();
    loop {
        match look() {
            Ok(Some(found)) => return Ok(found),
            Ok(None) if started.elapsed() < patience => {}
            // The API server may be away for a moment.
            Err(_) if started.elapsed() < patience => {}
            Ok(None) => bail!("after {} s, not yet: {what}", patience.as_secs()),
            Err(error) => {
                return Err(
                    error.context(format!("after {} s, not yet: {what}", patience.as_secs()))
                );
            }
        }
        thread::sleep(Duration::from_millis(200));
    }
}
