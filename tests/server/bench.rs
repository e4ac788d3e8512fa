//! A real `hawser serve` process, with certificates, a backing file and a directory of its own.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use hawser::proto::control::control_client::ControlClient;
use hawser::tls::{self, Authority, Leaf, Profile, Secret, Side};
use hawser::volumes::{AttachmentId, VolumeId};
use hyper_util::rt::TokioIo;
use rustls::crypto::aws_lc_rs;
use rustls::{ClientConfig, RootCertStore, SupportedProtocolVersion};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tempfile::TempDir;
use tonic::transport::{Channel, Endpoint};

/// What everything waits for at most: far above what any of it takes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// The name of the export in servers that are started by hand.
pub(crate) const EXPORT: &str = "disk";

/// What a server needs, on disk.
pub(crate) struct Bench {
    pub(crate) directory: TempDir,
    pub(crate) authority: Authority,
    pub(crate) volume: VolumeId,
}

impl Bench {
    /// A backing file of that size, without content.
    pub(crate) fn new(size: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let bench = Self {
            directory,
            authority: Authority::temporary().unwrap(),
            volume: VolumeId::from_bytes([0x5a; 16]),
        };
        let volume = bench.volume_directory();
        std::fs::create_dir(&volume).unwrap();
        File::create(bench.data()).unwrap().set_len(size).unwrap();
        let secret = bench
            .authority
            .issue_server(&bench.volume, &["localhost".to_owned()])
            .unwrap();
        tls::write_secret(&bench.certificates(), &secret).unwrap();
        bench
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn volume_directory(&self) -> PathBuf {
        self.path("volume")
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.volume_directory().join("data")
    }

    pub(crate) fn certificates(&self) -> PathBuf {
        self.path("certificates")
    }

    pub(crate) fn control_socket(&self) -> PathBuf {
        self.path("control")
    }

    /// A client of this volume.
    pub(crate) fn client(&self) -> Arc<ClientConfig> {
        config(&self.authority.issue_client(&self.volume).unwrap())
    }

    /// A client with a certificate that says something else.
    pub(crate) fn client_with(&self, change: impl FnOnce(&mut Leaf)) -> Arc<ClientConfig> {
        let mut leaf = Leaf::new(Side::Client, vec![tls::client_identity(&self.volume)]);
        change(&mut leaf);
        let secret = self.authority.issue(&leaf).unwrap();
        unchecked_config(&secret, rustls::DEFAULT_VERSIONS)
    }

    /// Serves the file by hand.
    pub(crate) fn serve_file(&self, more: &[&str]) -> Server {
        let client = tls::client_identity(&self.volume);
        let mut command = self.command();
        command
            .arg("--file")
            .arg(self.data())
            .args(["--export", EXPORT, "--client", &client])
            .args(more);
        Server::start(command)
    }

    /// Serves a file of that size by hand, on a file system that is mounted for the server alone.
    pub(crate) fn serve_file_on(&self, kind: &str, options: &str, size: u64) -> Server {
        let (command, mounted) = self.mounted(kind, options, size);
        self.serve_through(command, &mounted.join("data"))
    }

    /// Serves the volume, likewise.
    pub(crate) fn serve_volume_on(&self, kind: &str, options: &str, size: u64) -> Server {
        let (mut command, mounted) = self.mounted(kind, options, size);
        let serve = self.command();
        command
            .arg(serve.get_program())
            .args(serve.get_args())
            .args(["--volume", self.volume.as_str()])
            .arg("--directory")
            .arg(mounted)
            .arg("--control")
            .arg(self.control_socket());
        Server::start(command)
    }

    /// A command that runs what is appended to it where `data` is on a file system of its own, and where that is.
    fn mounted(&self, kind: &str, options: &str, size: u64) -> (Command, PathBuf) {
        let mounted = self.path("mounted");
        std::fs::create_dir(&mounted).unwrap();
        let script = format!(
            "mount -t {kind} -o 'mode=700,{options}' none '{0}' && truncate -s {size} '{0}/data' && exec \"$@\"",
            mounted.display()
        );
        let mut command = Command::new("unshare");
        command.args(["--map-root-user", "--mount", "sh", "-c", &script, "sh"]);
        (command, mounted)
    }

    /// Serves the file by hand, in a process that may write no file longer than `limit` bytes.
    pub(crate) fn serve_file_with_limit(&self, limit: u64) -> Server {
        let mut command = Command::new("prlimit");
        command.arg(format!("--fsize={limit}"));
        self.serve_through(command, &self.data())
    }

    fn serve_through(&self, mut command: Command, data: &Path) -> Server {
        let client = tls::client_identity(&self.volume);
        let serve = self.command();
        command
            .arg(serve.get_program())
            .args(serve.get_args())
            .arg("--file")
            .arg(data)
            .args(["--export", EXPORT, "--client", &client]);
        Server::start(command)
    }

    /// Serves the volume, with a control socket.
    pub(crate) fn serve_volume(&self, more: &[&str]) -> Server {
        let mut command = self.command();
        command
            .args(["--volume", self.volume.as_str()])
            .arg("--directory")
            .arg(self.volume_directory())
            .arg("--control")
            .arg(self.control_socket())
            .args(more);
        Server::start(command)
    }

    /// `hawser serve` with certificates, on a free port.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hawser"));
        command
            .args(["serve", "--listen", "127.0.0.1:0", "--certificates"])
            .arg(self.certificates());
        command
    }

    /// The export of an attachment.
    pub(crate) fn export(&self, attachment: &AttachmentId) -> String {
        format!("{}/{attachment}", self.volume)
    }

    /// A client of the control socket.
    pub(crate) async fn control(&self) -> ControlClient<Channel> {
        let path = self.control_socket();
        let connect = tower::service_fn(move |_| {
            let path = path.clone();
            async move {
                let stream = tokio::net::UnixStream::connect(path).await?;
                Ok::<_, std::io::Error>(TokioIo::new(stream))
            }
        });
        let channel = Endpoint::from_static("http://control")
            .connect_with_connector(connect)
            .await
            .unwrap();
        ControlClient::new(channel)
    }
}

/// An attachment id.
pub(crate) fn attachment(byte: u8) -> AttachmentId {
    AttachmentId::from_bytes([byte; 16])
}

/// The configuration of a client with this Secret, which stays in userspace.
pub(crate) fn config(secret: &BTreeMap<String, Vec<u8>>) -> Arc<ClientConfig> {
    let secret = Secret::from_map("the test", secret, Side::Client).unwrap();
    tls::client_config(&secret, Profile::Probe).unwrap()
}

/// The configuration of a client that does not look at its own Secret first.
pub(crate) fn unchecked_config(
    secret: &BTreeMap<String, Vec<u8>>,
    versions: &[&'static SupportedProtocolVersion],
) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    for root in CertificateDer::pem_slice_iter(&secret[tls::AUTHORITIES]) {
        roots.add(root.unwrap()).unwrap();
    }
    let chain = CertificateDer::pem_slice_iter(&secret[tls::CERTIFICATE]);
    let chain = chain.collect::<Result<_, _>>().unwrap();
    let key = PrivateKeyDer::from_pem_slice(&secret[tls::KEY]).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key)
        .unwrap();
    Arc::new(config)
}

/// A server process; killed when dropped.
pub(crate) struct Server {
    child: Child,
    pub(crate) address: SocketAddr,
    log: Receiver<String>,
}

impl Server {
    pub(crate) fn start(mut command: Command) -> Self {
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, log) = mpsc::channel();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        let mut line = String::new();
        let stdout = child.stdout.take().unwrap();
        BufReader::new(stdout).read_line(&mut line).unwrap();
        let Some(address) = line.trim().strip_prefix("listening on ") else {
            let status = child.wait().unwrap();
            let log: Vec<_> = log.iter().collect();
            panic!("the server did not start ({status}): {log:#?}");
        };
        Self {
            address: address.parse().unwrap(),
            child,
            log,
        }
    }

    pub(crate) fn process(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: &str) {
        let status = Command::new("kill")
            .args([signal, &self.process().to_string()])
            .status()
            .unwrap();
        assert!(status.success());
    }

    /// Waits for the end of the process.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the server does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for a line of the log that contains `text`, and returns it.
    pub(crate) fn logged(&self, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        let mut seen = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.log.recv_timeout(left) {
                Ok(line) if line.contains(text) => return line,
                Ok(line) => seen.push(line),
                Err(_) => panic!("no {text:?} in the log: {seen:#?}"),
            }
        }
    }

    /// The log until now.
    pub(crate) fn log(&self) -> Vec<String> {
        self.log.try_iter().collect()
    }

    /// Bytes of resident memory, now and at most so far.
    pub(crate) fn memory(&self) -> (u64, u64) {
        let status = format!("/proc/{}/status", self.process());
        let status = std::fs::read_to_string(Path::new(&status)).unwrap();
        let field = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
            kib << 10
        };
        (field("VmRSS:"), field("VmHWM:"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
