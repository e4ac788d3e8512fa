//! A `hawser serve` process that serves one file by hand, and what a client needs to reach it.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hawser::tls::{Authority, Leaf, Side};
use tempfile::TempDir;

pub(crate) const EXPORT: &str = "disk";

/// What a client is given: far above what any of them takes here.
const PATIENCE: Duration = Duration::from_secs(120);

const CLIENT: &str = "peer.client.example";

pub(crate) struct Bench {
    directory: TempDir,
    server: Child,
    port: u16,
}

impl Bench {
    /// Serves a file of this content as [`EXPORT`], with more options for the server.
    pub(crate) fn serve(content: &[u8], options: &[&str]) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        fs::write(directory.path().join("data"), content)?;
        Self::start(directory, options)
    }

    /// Serves a file of `size` bytes, none of them written.
    pub(crate) fn serve_sparse(size: u64, options: &[&str]) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        File::create(directory.path().join("data"))?.set_len(size)?;
        Self::start(directory, options)
    }

    fn start(directory: TempDir, options: &[&str]) -> Result<Self> {
        let authority = Authority::temporary()?;
        let pki = directory.path().join("pki");
        fs::create_dir(&pki)?;
        for (side, names) in [(Side::Server, ["localhost"]), (Side::Client, [CLIENT])] {
            let secret = authority.issue(&Leaf::new(side, names.map(str::to_owned).to_vec()))?;
            let prefix = match side {
                Side::Server => "server",
                Side::Client => "client",
            };
            // The names that libnbd and QEMU look for, which the server takes too.
            fs::write(pki.join(format!("{prefix}-cert.pem")), &secret["tls.crt"])?;
            fs::write(pki.join(format!("{prefix}-key.pem")), &secret["tls.key"])?;
            fs::write(pki.join("ca-cert.pem"), &secret["ca.crt"])?;
        }
        let mut server = Command::new(env!("CARGO_BIN_EXE_hawser"))
            .arg("serve")
            .arg("--file")
            .arg(directory.path().join("data"))
            .args([
                "--export",
                EXPORT,
                "--client",
                CLIENT,
                "--listen",
                "127.0.0.1:0",
            ])
            .arg("--certificates")
            .arg(&pki)
            .args(options)
            .stdout(Stdio::piped())
            .stderr(File::create(directory.path().join("log"))?)
            .spawn()?;
        let mut line = String::new();
        if let Some(stdout) = server.stdout.take() {
            BufReader::new(stdout).read_line(&mut line)?;
        }
        let mut bench = Self {
            directory,
            server,
            port: 0,
        };
        let port = line.trim().strip_prefix("listening on 127.0.0.1:");
        bench.port = port.with_context(|| bench.log())?.parse()?;
        Ok(bench)
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// A folder with the certificates under libnbd's and QEMU's names.
    pub(crate) fn pki(&self) -> PathBuf {
        self.path("pki")
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn uri(&self) -> String {
        format!(
            "nbds://localhost:{}/{EXPORT}?tls-certificates={}",
            self.port,
            self.pki().display()
        )
    }

    /// What the file holds now.
    pub(crate) fn content(&self) -> Result<Vec<u8>> {
        fs::read(self.path("data")).context("the backing file")
    }

    /// What the server has logged so far.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// Runs a client to its end, and returns what it printed on standard output.
    pub(crate) fn client(&self, command: &mut Command) -> Result<String> {
        let (status, stdout, stderr) = self.attempt(command)?;
        ensure!(
            status.success(),
            "{command:?}: {status}\n{stdout}{stderr}\nthe server's log:\n{}",
            self.log()
        );
        Ok(stdout)
    }

    /// Runs a client that may fail, and returns its exit status and what it printed.
    pub(crate) fn attempt(
        &self,
        command: &mut Command,
    ) -> Result<(std::process::ExitStatus, String, String)> {
        let (out, err) = (self.path("client-out"), self.path("client-err"));
        let mut client = command
            // Some look for certificates and configuration there.
            .env("HOME", self.directory.path())
            .stdin(Stdio::null())
            .stdout(File::create(&out)?)
            .stderr(File::create(&err)?)
            .spawn()
            .with_context(|| format!("{command:?}: run `tests/support/install peers`"))?;
        let started = Instant::now();
        let status = loop {
            if let Some(status) = client.try_wait()? {
                break status;
            }
            if started.elapsed() > PATIENCE {
                client.kill()?;
                client.wait()?;
                bail!(
                    "{command:?} still ran after {} s\n{}\nthe server's log:\n{}",
                    PATIENCE.as_secs(),
                    fs::read_to_string(&err)?,
                    self.log()
                );
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let text = |path| fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        Ok((status, text(&out)?, text(&err)?))
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// Bytes that are neither constant nor periodic in any block size.
pub(crate) fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

#[test]
fn noise_differs_between_blocks_and_seeds() {
    let bytes = noise(8192, 1);
    assert_ne!(bytes[..4096], bytes[4096..]);
    assert_ne!(bytes, noise(8192, 2));
}
