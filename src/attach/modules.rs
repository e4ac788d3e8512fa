//! Kernel modules: whether nbd and tls are there, and the one attempt to load them.
//!
//! Loading is a courtesy. In a container there may be no modprobe, or no modules that match the kernel; what counts is
//! what the kernel offers afterwards.

use std::process::{Command, Stdio};

use super::Transport;
use super::error::AttachError;
use super::kernel::Driver;
use super::system::System;

/// Opens the driver, whose module is loaded if it is not yet.
pub(super) fn driver() -> Result<Driver, AttachError> {
    if let Some(driver) = Driver::open()? {
        return Ok(driver);
    }
    let problem = load("nbd");
    match Driver::open()? {
        Some(driver) => Ok(driver),
        None => Err(AttachError::NoDriver { problem }),
    }
}

/// How this node carries data: TLS in the kernel, or else through the proxy if that is allowed.
pub(super) fn transport(system: &System, proxy_allowed: bool) -> Result<Transport, AttachError> {
    if system.has_kernel_tls() {
        return Ok(Transport::KernelTls);
    }
    let problem = load("tls");
    if system.has_kernel_tls() {
        return Ok(Transport::KernelTls);
    }
    if !proxy_allowed {
        return Err(AttachError::NoKernelTls { problem });
    }
    tracing::warn!(
        "the kernel module tls is not loaded on this node, and loading it failed ({problem}): data goes through a \
         proxy in this process, slower, and I/O pauses whenever the process restarts; load it with `modprobe tls`"
    );
    Ok(Transport::Proxy)
}

/// Says what became of it, for people.
fn load(module: &str) -> String {
    let output = Command::new("modprobe")
        .arg(module)
        .stdin(Stdio::null())
        .output();
    match output {
        Ok(output) if output.status.success() => "modprobe succeeded without effect".into(),
        Ok(output) => {
            let words = String::from_utf8_lossy(&output.stderr);
            words
                .lines()
                .last()
                .map_or_else(|| output.status.to_string(), str::to_owned)
        }
        Err(error) => format!("modprobe: {error}"),
    }
}
