//! The three servers, the certificates and the file that they share, and what is read off them from outside.

use std::cell::RefCell;
use std::fmt;
use std::fs::{self, File, Permissions};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hawser::tls::{Authority, Leaf, Side};
use tempfile::TempDir;

pub(crate) const EXPORT: &str = "disk";

/// Whom fio runs as where this runs as root, because libnbd looks for root's certificates in the system's folder.
const NOBODY: u32 = 65534;

/// qemu-nbd may first look for primes, for key exchanges that nobody will ask for.
const PATIENCE: Duration = Duration::from_secs(120);

/// Prints the processor time of each process whose number it is sent. A process has a clock, which no safe function of
/// Rust reads; /proc rounds it to 10 ms.
const CLOCK: &str = "import sys, time\n\
    for pid in sys.stdin: print(time.clock_gettime(~int(pid) << 3 | 2), flush=True)\n";

/// What is forced on every session of a run, by switching off all else in the client's TLS library.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cipher {
    Aes256Gcm,
    ChaCha20Poly1305,
}

impl Cipher {
    pub(crate) fn named(name: &str) -> Result<Self> {
        match name {
            "aes" => Ok(Self::Aes256Gcm),
            "chacha" => Ok(Self::ChaCha20Poly1305),
            _ => bail!("a cipher is aes or chacha"),
        }
    }

    /// RFC 8446, B.4.
    pub(crate) fn number(self) -> u16 {
        match self {
            Self::Aes256Gcm => 0x1302,
            Self::ChaCha20Poly1305 => 0x1303,
        }
    }

    fn others(self) -> [&'static str; 4] {
        let other = match self {
            Self::Aes256Gcm => "CHACHA20-POLY1305",
            Self::ChaCha20Poly1305 => "AES-256-GCM",
        };
        [other, "AES-128-GCM", "AES-128-CCM", "AES-256-CCM"]
    }
}

impl fmt::Display for Cipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Aes256Gcm => "AES-256-GCM",
            Self::ChaCha20Poly1305 => "ChaCha20-Poly1305",
        })
    }
}

/// What the servers and clients share.
pub(crate) struct Site {
    directory: TempDir,
    /// Another `hawser` to compare with.
    pub(crate) before: Option<PathBuf>,
    clock: RefCell<(ChildStdin, BufReader<ChildStdout>)>,
}

impl Site {
    /// Makes the certificates, and a file of `size` bytes under `parent`.
    pub(crate) fn new(parent: &Path, size: u64, before: Option<PathBuf>) -> Result<Self> {
        let directory = tempfile::tempdir_in(parent)?;
        let mut clock = Command::new("/usr/bin/python3")
            .args(["-c", CLOCK])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("/usr/bin/python3: run `tests/support/install bench`")?;
        let (Some(ask), Some(answer)) = (clock.stdin.take(), clock.stdout.take()) else {
            bail!("no pipes to the clock");
        };
        let site = Self {
            directory,
            before,
            clock: RefCell::new((ask, BufReader::new(answer))),
        };
        let everyone = Permissions::from_mode(0o755);
        fs::set_permissions(site.directory.path(), everyone)?;
        // Two of ours do not serve the same file.
        let other = site.before.as_ref().map(|_| "other");
        for name in ["data", "source"].into_iter().chain(other) {
            let mut file = File::create(site.path(name))?;
            let mut state = 0x9e37_79b9_7f4a_7c15_u64;
            let mut block = vec![0; 1 << 20];
            for _ in 0..size >> 20 {
                for word in block.chunks_exact_mut(8) {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    word.copy_from_slice(&state.to_ne_bytes());
                }
                file.write_all(&block)?;
            }
        }
        // Where libnbd looks when it is not told, below $HOME.
        let pki = site.pki();
        fs::create_dir_all(&pki)?;
        let authority = Authority::temporary()?;
        for (side, name, prefix) in [
            (Side::Server, "localhost", "server"),
            (Side::Client, "bench.client.example", "client"),
        ] {
            let secret = authority.issue(&Leaf::new(side, vec![name.to_owned()]))?;
            fs::write(pki.join(format!("{prefix}-cert.pem")), &secret["tls.crt"])?;
            fs::write(pki.join(format!("{prefix}-key.pem")), &secret["tls.key"])?;
            fs::write(pki.join("ca-cert.pem"), &secret["ca.crt"])?;
        }
        if is_root() {
            for folder in [site.path(".pki"), pki.clone()] {
                chown(folder, Some(NOBODY), Some(NOBODY))?;
            }
            for file in fs::read_dir(&pki)? {
                chown(file?.path(), Some(NOBODY), Some(NOBODY))?;
            }
        }
        for cipher in [Cipher::Aes256Gcm, Cipher::ChaCha20Poly1305] {
            let lines = cipher
                .others()
                .map(|other| format!("tls-disabled-cipher = {other}\n"));
            let text = format!("[overrides]\n{}", lines.concat());
            fs::write(site.priorities(cipher), text)?;
        }
        Ok(site)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn pki(&self) -> PathBuf {
        self.path(".pki/libnbd")
    }

    fn priorities(&self, cipher: Cipher) -> PathBuf {
        self.path(&format!("priorities-{:04x}", cipher.number()))
    }

    /// A client that can use no other cipher.
    pub(crate) fn client(&self, program: &str, cipher: Cipher) -> Command {
        self.confined(Command::new(program), cipher)
    }

    /// The same for a client that must find its certificates by itself.
    pub(crate) fn unprivileged(&self, program: &str, cipher: Cipher) -> Command {
        if !is_root() {
            return self.client(program, cipher);
        }
        let mut command = Command::new("setpriv");
        let id = NOBODY.to_string();
        command.args([&format!("--reuid={id}"), &format!("--regid={id}")]);
        command.args(["--clear-groups", program]);
        self.confined(command, cipher)
    }

    fn confined(&self, mut command: Command, cipher: Cipher) -> Command {
        command
            .env("HOME", self.directory.path())
            .env("GNUTLS_SYSTEM_PRIORITY_FILE", self.priorities(cipher))
            .current_dir(self.directory.path())
            .stdin(Stdio::null());
        command
    }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Hawser,
    /// [`Site::before`].
    Before,
    Nbdkit,
    Qemu,
}

/// A server process; killed when dropped.
pub(crate) struct Server {
    pub(crate) kind: Kind,
    pub(crate) tls: bool,
    port: u16,
    process: Child,
}

impl Server {
    pub(crate) fn start(site: &Site, kind: Kind, tls: bool) -> Result<Self> {
        let port = free_port()?;
        let mut command = match kind {
            Kind::Hawser => {
                let binary = std::env::var_os("HAWSER_BENCH_BINARY");
                let binary = binary.unwrap_or_else(|| env!("CARGO_BIN_EXE_hawser").into());
                hawser(site, binary.as_ref(), "data", port)
            }
            Kind::Before => {
                let binary = site.before.as_deref().context("which?")?;
                hawser(site, binary, "other", port)
            }
            Kind::Nbdkit => nbdkit(site, port, tls),
            Kind::Qemu => qemu(site, port, tls),
        };
        let log = File::create(site.path(&format!("log-{port}")))?;
        let process = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .with_context(|| format!("{command:?}: run `tests/support/install bench`"))?;
        let mut server = Self {
            kind,
            tls,
            port,
            process,
        };
        let deadline = Instant::now() + PATIENCE;
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            if server.process.try_wait()?.is_some() || Instant::now() > deadline {
                let log = fs::read_to_string(site.path(&format!("log-{port}")))?;
                bail!("{command:?} does not listen: {log}");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(server)
    }

    pub(crate) fn uri(&self) -> String {
        uri(self.tls, self.port)
    }

    /// Seconds of processor time that the process has used, with all its threads.
    pub(crate) fn processor_time(&self, site: &Site) -> Result<f64> {
        let mut clock = site.clock.borrow_mut();
        writeln!(clock.0, "{}", self.process.id())?;
        let mut line = String::new();
        clock.1.read_line(&mut line)?;
        line.trim().parse().context("a process's clock")
    }

    /// Forgets how much memory was resident at most; returns how much is now, in bytes.
    pub(crate) fn reset_peak(&self) -> Result<u64> {
        fs::write(format!("/proc/{}/clear_refs", self.process.id()), "5")?;
        self.status("VmRSS:")
    }

    /// Bytes that were resident at most since then.
    pub(crate) fn peak(&self) -> Result<u64> {
        self.status("VmHWM:")
    }

    fn status(&self, field: &str) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.id()))?;
        let line = status.lines().find(|line| line.starts_with(field));
        let kib = line.and_then(|line| line.split_whitespace().nth(1));
        Ok(kib.context("a field of /proc/PID/status")?.parse::<u64>()? << 10)
    }

    /// The cipher suite that this server agrees on with a client that was told to use `cipher`, read off the wire: the
    /// ServerHello is not encrypted.
    pub(crate) fn negotiated_cipher(&self, site: &Site, cipher: Cipher) -> Result<u16> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let port = listener.local_addr()?.port();
        let server = self.port;
        let relay = std::thread::spawn(move || relay(&listener, server));
        let uri = format!(
            "{}?tls-certificates={}",
            uri(true, port),
            site.pki().display()
        );
        let output = site
            .client("nbdinfo", cipher)
            .args(["--size", &uri])
            .output()
            .context("nbdinfo")?;
        ensure!(output.status.success(), "nbdinfo: {output:?}");
        let Ok(Ok(said)) = relay.join() else {
            bail!("the relay failed");
        };
        // The greeting, the reply to STARTTLS, and a record with a ServerHello.
        let record = said.get(18 + 20..).context("what the server said")?;
        ensure!(record.starts_with(&[0x16, 0x03]), "no handshake record");
        let session = 5 + 4 + 2 + 32;
        let suite = session + 1 + usize::from(record[session]);
        Ok(u16::from_be_bytes([record[suite], record[suite + 1]]))
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.kind {
            Kind::Hawser => "hawser",
            Kind::Before => "before",
            Kind::Nbdkit => "nbdkit",
            Kind::Qemu => "qemu-nbd",
        })?;
        f.write_str(if self.tls { "" } else { " plain" })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn hawser(site: &Site, binary: &Path, file: &str, port: u16) -> Command {
    let mut command = Command::new(binary);
    command.args([
        "serve",
        "--export",
        EXPORT,
        "--client",
        "bench.client.example",
    ]);
    command.args(["--listen", &format!("127.0.0.1:{port}"), "--file"]);
    command.arg(site.path(file));
    command.arg("--certificates").arg(site.pki());
    command
}

fn nbdkit(site: &Site, port: u16, tls: bool) -> Command {
    let mut command = Command::new("nbdkit");
    command.args(["--foreground", "--ipaddr=127.0.0.1"]);
    command.arg(format!("--port={port}"));
    if tls {
        command.args(["--tls=require", "--tls-verify-peer"]);
        command.arg(format!("--tls-certificates={}", site.pki().display()));
    }
    command.arg("file").arg(site.path("data"));
    command
}

fn qemu(site: &Site, port: u16, tls: bool) -> Command {
    let mut command = Command::new("qemu-nbd");
    command.args([
        "--persistent",
        "--shared=0",
        "--format=raw",
        "--bind=127.0.0.1",
    ]);
    command.args([
        &format!("--port={port}"),
        &format!("--export-name={EXPORT}"),
    ]);
    if tls {
        let pki = site.pki();
        command.arg("--object").arg(format!(
            "tls-creds-x509,id=tls,endpoint=server,verify-peer=on,dir={}",
            pki.display()
        ));
        command.arg("--tls-creds=tls");
    }
    command.arg(site.path("data"));
    command
}

fn uri(tls: bool, port: u16) -> String {
    let scheme = if tls { "nbds" } else { "nbd" };
    format!("{scheme}://localhost:{port}/{EXPORT}")
}

fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// Passes one connection on, and returns what the server said.
fn relay(listener: &TcpListener, server: u16) -> std::io::Result<Vec<u8>> {
    let (client, _) = listener.accept()?;
    let server = TcpStream::connect(("127.0.0.1", server))?;
    let (mut from, mut to) = (client.try_clone()?, server.try_clone()?);
    let upstream = std::thread::spawn(move || {
        let _ = std::io::copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Write);
    });
    let mut said = Vec::new();
    let mut buffer = [0; 16 << 10];
    loop {
        match (&server).read(&mut buffer) {
            Ok(0) | Err(_) => break,
            Ok(read) => {
                said.extend_from_slice(&buffer[..read]);
                (&client).write_all(&buffer[..read])?;
            }
        }
    }
    let _ = client.shutdown(Shutdown::Both);
    let _ = upstream.join();
    Ok(said)
}
