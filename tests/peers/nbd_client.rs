//! nbd-client's own negotiation. What it does with a kernel is shown by the kernel tests.

use std::process::Command;

use anyhow::{Result, ensure};

use crate::bench::{Bench, EXPORT};

fn nbd_client(bench: &Bench) -> Command {
    let mut command = Command::new("nbd-client");
    let pki = bench.pki();
    command
        .args([
            "localhost",
            &bench.port().to_string(),
            "/dev/nbd0",
            "-name",
            EXPORT,
        ])
        .args(["-tlshostname", "localhost"])
        .arg("-certfile")
        .arg(pki.join("client-cert.pem"))
        .arg("-keyfile")
        .arg(pki.join("client-key.pem"))
        .arg("-cacertfile")
        .arg(pki.join("ca-cert.pem"));
    command
}

/// nbd-client 3.24 offers TLS 1.2 and nothing newer: it is what `--tls12` is for.
#[test]
fn nbd_client_negotiates_an_export() -> Result<()> {
    let bench = Bench::serve_sparse(8 << 20, &["--tls12"])?;
    let (_, printed, error) = bench.attempt(&mut nbd_client(&bench))?;
    // It says the size when GO was answered; whether it can go on then is a matter of this machine's kernel.
    ensure!(
        printed.contains("size = 8MB"),
        "{printed}{error}\n{}",
        bench.log()
    );
    ensure!(bench.log().contains("TLSv1_2"), "{}", bench.log());
    Ok(())
}

#[test]
fn nbd_client_is_refused_where_tls_1_2_is_not_allowed() -> Result<()> {
    let bench = Bench::serve_sparse(8 << 20, &[])?;
    let (status, printed, error) = bench.attempt(&mut nbd_client(&bench))?;
    ensure!(
        !status.success() && !printed.contains("size ="),
        "{status}: {printed}{error}"
    );
    Ok(())
}

#[test]
fn c15_nbd_client_lists_nothing_in_plaintext() -> Result<()> {
    let bench = Bench::serve_sparse(8 << 20, &["--tls12"])?;
    let port = bench.port().to_string();
    let (status, printed, error) =
        bench.attempt(Command::new("nbd-client").args(["-l", "localhost", &port]))?;
    ensure!(
        !status.success() && !printed.contains(EXPORT),
        "{status}: {printed}"
    );
    ensure!(error.contains("STARTTLS"), "{error}");
    Ok(())
}
