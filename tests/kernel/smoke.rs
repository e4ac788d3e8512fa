//! The machine itself: everything later scenarios take for granted.

use std::fs;
use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::Scenario;

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario::new("smoke::nbd_and_tls_are_loaded", nbd_and_tls_are_loaded),
    Scenario::new("smoke::the_cipher_can_be_loaded", the_cipher_can_be_loaded),
    Scenario::new("smoke::the_loopback_carries_tcp", the_loopback_carries_tcp).within_seconds(10),
    Scenario::new(
        "smoke::the_host_cannot_be_written_to",
        the_host_cannot_be_written_to,
    ),
    Scenario::new("smoke::the_binary_runs", the_binary_runs),
    Scenario::new("smoke::tls_can_be_missing", tls_can_be_missing).without(&["tls"]),
    Scenario::new(
        "smoke::the_cipher_can_be_missing",
        the_cipher_can_be_missing,
    )
    .without(&["chacha20poly1305"]),
];

fn nbd_and_tls_are_loaded() -> Result<()> {
    ensure!(Path::new("/dev/nbd0").exists(), "/dev/nbd0 is missing");
    ensure!(
        Path::new("/sys/block/nbd15").exists(),
        "nbd has not made its 16 devices"
    );
    let protocols = fs::read_to_string("/proc/sys/net/ipv4/tcp_available_ulp")?;
    ensure!(
        protocols.split_whitespace().any(|name| name == "tls"),
        "protocols over TCP: {protocols}"
    );
    Ok(())
}

fn the_cipher_can_be_loaded() -> Result<()> {
    let status = Command::new("modprobe")
        .arg("chacha20poly1305")
        .status()
        .context("modprobe")?;
    ensure!(status.success(), "modprobe chacha20poly1305: {status}");
    Ok(())
}

fn the_loopback_carries_tcp() -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut client = TcpStream::connect(listener.local_addr()?)?;
    drop(listener.accept()?);
    let read = client.read(&mut [0])?;
    ensure!(read == 0, "a closed connection brought {read} bytes");
    Ok(())
}

fn the_host_cannot_be_written_to() -> Result<()> {
    for folder in ["/usr", "/etc", env!("CARGO_MANIFEST_DIR")] {
        let path = Path::new(folder).join("written-by-a-test-kernel");
        ensure!(
            fs::write(&path, "").is_err(),
            "{} could be written",
            path.display()
        );
    }
    Ok(())
}

fn the_binary_runs() -> Result<()> {
    let output = Command::new(env!("CARGO_BIN_EXE_hawser"))
        .arg("--version")
        .output()?;
    let version = String::from_utf8(output.stdout)?;
    ensure!(
        version.trim() == concat!("hawser ", env!("CARGO_PKG_VERSION")),
        "printed {version:?}"
    );
    Ok(())
}

fn tls_can_be_missing() -> Result<()> {
    let status = Command::new("modprobe").args(["--quiet", "tls"]).status()?;
    ensure!(
        !status.success(),
        "tls could be loaded on a machine that must not have it"
    );
    let protocols = fs::read_to_string("/proc/sys/net/ipv4/tcp_available_ulp")?;
    ensure!(
        !protocols.contains("tls"),
        "protocols over TCP: {protocols}"
    );
    Ok(())
}

fn the_cipher_can_be_missing() -> Result<()> {
    let status = Command::new("modprobe")
        .args(["--quiet", "chacha20poly1305"])
        .status()?;
    ensure!(
        !status.success(),
        "the cipher could be loaded on a machine that must not have it"
    );
    Ok(())
}
