//! Other people's servers, as Debian ships them, with an export named `disk` each.

use std::collections::HashMap;
use std::fs::{self, File};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hawser::tls::{Authority, Leaf, Side};
use rustix::process::{Pid, Signal};
use tempfile::TempDir;

use crate::machine::PATIENCE;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    QemuNbd,
    Nbdkit,
    NbdServer,
}

/// One server, which keeps its port, its certificates and its data whenever it is started again.
pub(crate) struct Peer {
    kind: Kind,
    folder: TempDir,
    port: u16,
    secrets: HashMap<String, String>,
    process: Option<Process>,
    /// What replaces or follows the usual arguments.
    changes: Vec<(&'static str, &'static str)>,
}

enum Process {
    Child(Child),
    /// nbd-server has one process for each connection, all in one group.
    Group(Pid),
}

impl Peer {
    pub(crate) fn start(kind: Kind, size: u64) -> Result<Self> {
        Self::changed(kind, size, &[])
    }

    /// `changes` are texts of the command line or configuration, and what stands in their places.
    pub(crate) fn changed(
        kind: Kind,
        size: u64,
        changes: &[(&'static str, &'static str)],
    ) -> Result<Self> {
        let folder = TempDir::with_prefix_in("peer", "/run")?;
        let authority = Authority::temporary()?;
        let mut secrets = HashMap::new();
        for (side, name, prefix) in [
            (Side::Server, "localhost", "server"),
            (Side::Client, "node.example", "client"),
        ] {
            let secret = authority.issue(&Leaf::new(side, vec![name.to_owned()]))?;
            let write =
                |name: String, part: &str| fs::write(folder.path().join(name), &secret[part]);
            write(format!("{prefix}-cert.pem"), "tls.crt")?;
            write(format!("{prefix}-key.pem"), "tls.key")?;
            write("ca-cert.pem".into(), "ca.crt")?;
            secrets = secret
                .into_iter()
                .map(|(key, value)| Ok((key, String::from_utf8(value)?)))
                .collect::<Result<_>>()?;
        }
        File::create(folder.path().join("data"))?.set_len(size)?;
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let mut peer = Self {
            kind,
            folder,
            port,
            secrets,
            process: None,
            changes: changes.to_vec(),
        };
        peer.start_again()?;
        Ok(peer)
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    pub(crate) fn uri(&self) -> String {
        format!("nbds://localhost:{}/disk", self.port)
    }

    /// A client's Secret.
    pub(crate) fn secrets(&self) -> HashMap<String, String> {
        self.secrets.clone()
    }

    fn changed_text(&self, text: &str) -> String {
        let folder = self.folder.path().display().to_string();
        let mut text = text
            .replace("DIR", &folder)
            .replace("PORT", &self.port.to_string());
        for (from, to) in &self.changes {
            text = text.replace(from, to);
        }
        text
    }

    pub(crate) fn start_again(&mut self) -> Result<()> {
        let spawn = |program: &str, arguments: &str| {
            let log = File::options()
                .create(true)
                .append(true)
                .open(self.folder.path().join("log"))?;
            Command::new(program)
                .args(self.changed_text(arguments).split_whitespace())
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(log)
                .spawn()
                .context("starting a server")
        };
        let process = match self.kind {
            Kind::QemuNbd => Process::Child(spawn(
                "qemu-nbd",
                "--object tls-creds-x509,id=t,endpoint=server,verify-peer=on,dir=DIR --tls-creds t --format raw \
                 --persistent --shared 0 --bind 127.0.0.1 --port PORT --export-name disk DIR/data",
            )?),
            Kind::Nbdkit => Process::Child(spawn(
                "nbdkit",
                "--foreground --tls=require --tls-verify-peer --tls-certificates=DIR --ipaddr=127.0.0.1 --port=PORT \
                 file DIR/data",
            )?),
            Kind::NbdServer => {
                let configuration = "\
                    [generic]\n listenaddr = 127.0.0.1\n port = PORT\n force_tls = true\n \
                    tlsprio = NORMAL:-VERS-TLS-ALL:+VERS-TLS1.3\n certfile = DIR/server-cert.pem\n \
                    keyfile = DIR/server-key.pem\n cacertfile = DIR/ca-cert.pem\n\
                    [disk]\n exportname = DIR/data\n flush = true\n fua = true\n";
                let configuration = self.changed_text(configuration);
                fs::write(self.folder.path().join("configuration"), configuration)?;
                let file = self.folder.path().join("pid");
                let _ = fs::remove_file(&file);
                let mut launcher = spawn("nbd-server", "-C DIR/configuration -p DIR/pid")?;
                ensure!(launcher.wait()?.success(), "nbd-server did not start");
                // Written by the process that stays, when the one that was started is gone.
                let started = Instant::now();
                loop {
                    let pid = fs::read_to_string(&file).unwrap_or_default();
                    if let Some(pid) = pid.trim().parse().ok().and_then(Pid::from_raw) {
                        break Process::Group(pid);
                    }
                    ensure!(started.elapsed() < PATIENCE, "nbd-server did not start");
                    thread::sleep(Duration::from_millis(20));
                }
            }
        };
        self.process = Some(process);
        let started = Instant::now();
        while TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            ensure!(
                started.elapsed() < PATIENCE,
                "{:?} does not listen: {}",
                self.kind,
                fs::read_to_string(self.folder.path().join("log"))?
            );
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// As `kill -9`, of all its processes.
    pub(crate) fn kill(&mut self) -> Result<()> {
        match self.process.take() {
            Some(Process::Child(mut child)) => {
                child.kill()?;
                child.wait()?;
            }
            Some(Process::Group(group)) => {
                rustix::process::kill_process_group(group, Signal::KILL)?;
            }
            None => {}
        }
        // Whoever is left would still answer.
        let started = Instant::now();
        while TcpStream::connect(("127.0.0.1", self.port)).is_ok() {
            ensure!(started.elapsed() < PATIENCE, "{:?} does not die", self.kind);
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}
