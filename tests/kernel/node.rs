//! A node and the volume it uses: a real server process with its certificates, and the attach path over them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hawser::attach::{AttachError, Attacher, Config, Options, Request};
use hawser::patience::Patience;
use hawser::proto::control::control_client::ControlClient;
use hawser::proto::control::{AllowRequest, GrowRequest, RevokeRequest};
use hawser::proto::socket;
use hawser::tls::{self, Authority, Secret, Side};
use hawser::volumes::{AttachmentId, Format, NodeVolumes, Volume, VolumeId, VolumesError};
use rustix::process::{Pid, Signal};

/// What everything waits for at most: far above what any of it takes in a slow machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Timeouts that a scenario can wait out.
pub(crate) fn options(connections: u8) -> Options {
    Options {
        connections,
        timeout: Duration::from_secs(3),
        dead_timeout: Duration::from_secs(120),
        ..Options::default()
    }
}

/// Runs a scenario's steps.
pub(crate) fn block_on(steps: impl Future<Output = Result<()>>) -> Result<()> {
    let log = tracing_subscriber::fmt()
        .with_env_filter("info")
        .with_ansi(false)
        .with_writer(std::io::stderr);
    log.init();
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?
        .block_on(steps)
}

/// Looks again and again until it is so.
pub(crate) async fn until(what: &str, mut so: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !so()? {
        ensure!(Instant::now() < deadline, "never came true: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// One volume: its data, its certificates, and its server while that runs.
pub(crate) struct Served {
    pub(crate) volume: VolumeId,
    directory: PathBuf,
    authority: Authority,
    server: Mutex<Option<Child>>,
}

impl Served {
    /// A volume of that size, served.
    pub(crate) fn new(number: u8, size_bytes: u64) -> Result<Arc<Self>> {
        let served = Self::not_served(number, size_bytes)?;
        served.start()?;
        Ok(served)
    }

    pub(crate) fn not_served(number: u8, size_bytes: u64) -> Result<Arc<Self>> {
        let volume = VolumeId::from_bytes([number; 16]);
        // Each scenario is a process of its own.
        let directory = format!("/run/volumes.{}/{volume}", std::process::id());
        let directory = PathBuf::from(directory);
        fs::create_dir_all(&directory)?;
        File::create(directory.join("data"))?.set_len(size_bytes)?;
        let served = Self::seen_by_another_process(volume, directory)?;
        let parts = served.authority.issue_server(&served.volume, &[])?;
        tls::write_secret(&served.certificates(), &parts)?;
        served.send_clients_to(([127, 0, 0, 1], 1).into())?;
        Ok(served)
    }

    /// The volume that another process of the scenario made and serves.
    pub(crate) fn seen_by_another_process(
        volume: VolumeId,
        directory: PathBuf,
    ) -> Result<Arc<Self>> {
        Ok(Arc::new(Self {
            volume,
            authority: Authority::open(&directory.join("authority"))?,
            directory,
            server: Mutex::default(),
        }))
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.directory.join("data")
    }

    pub(crate) fn epoch(&self) -> PathBuf {
        self.directory.join("epoch.json")
    }

    pub(crate) fn certificates(&self) -> PathBuf {
        self.directory.join("certificates")
    }

    /// Starts the server, on another port each time; returns its address, where clients now are sent.
    pub(crate) fn start(&self) -> Result<SocketAddr> {
        let mut child = Command::new(env!("CARGO_BIN_EXE_hawser"))
            .args(["serve", "--listen", "127.0.0.1:0"])
            .args(["--volume", self.volume.as_str()])
            .arg("--directory")
            .arg(&self.directory)
            .arg("--certificates")
            .arg(self.certificates())
            .arg("--control")
            .arg(self.directory.join("control"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        let stdout = child.stdout.take().context("the server's output")?;
        BufReader::new(stdout).read_line(&mut line)?;
        let address = line.trim().strip_prefix("listening on ");
        let address = address.with_context(|| format!("the server said {line:?}"))?;
        let address = address.parse()?;
        *self.server.lock().unwrap() = Some(child);
        self.send_clients_to(address)?;
        Ok(address)
    }

    /// As `kill -9` or a crash.
    pub(crate) fn kill(&self) -> Result<()> {
        let child = self.server.lock().unwrap().take();
        let mut child = child.context("no server runs")?;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// Has the server stand still, or go on.
    pub(crate) fn hold(&self, still: bool) -> Result<()> {
        let server = self.server.lock().unwrap();
        let process = Pid::from_child(server.as_ref().context("no server runs")?);
        let signal = if still { Signal::STOP } else { Signal::CONT };
        Ok(rustix::process::kill_process(process, signal)?)
    }

    /// Sends clients elsewhere than to the server itself.
    pub(crate) fn send_clients_to(&self, address: SocketAddr) -> Result<()> {
        let path = self.directory.join("endpoint");
        Ok(hawser::storage::replace(
            &path,
            address.to_string().as_bytes(),
        )?)
    }

    /// Where clients are sent.
    pub(crate) fn address(&self) -> Result<SocketAddr> {
        Ok(fs::read_to_string(self.directory.join("endpoint"))?.parse()?)
    }

    /// Allows one more attachment.
    pub(crate) async fn allow(&self, number: u8, read_only: bool) -> Result<AttachmentId> {
        let attachment = AttachmentId::from_bytes([number; 16]);
        let request = AllowRequest {
            attachment: attachment.to_string(),
            read_only,
        };
        let channel = socket::connect(&self.directory.join("control")).await?;
        ControlClient::new(channel).allow(request).await?;
        Ok(attachment)
    }

    pub(crate) async fn revoke(&self, attachment: &AttachmentId) -> Result<()> {
        let request = RevokeRequest {
            attachment: attachment.to_string(),
        };
        let channel = socket::connect(&self.directory.join("control")).await?;
        ControlClient::new(channel).revoke(request).await?;
        Ok(())
    }

    pub(crate) async fn grow(&self, size_bytes: u64) -> Result<()> {
        File::options()
            .write(true)
            .open(self.data())?
            .set_len(size_bytes)?;
        let channel = socket::connect(&self.directory.join("control")).await?;
        ControlClient::new(channel)
            .grow(GrowRequest { size_bytes })
            .await?;
        Ok(())
    }

    pub(crate) fn request(
        &self,
        attachment: &AttachmentId,
        read_only: bool,
        options: Options,
    ) -> Result<Request> {
        let parts = self.authority.issue_client(&self.volume)?;
        Ok(Request {
            volume: self.volume.clone(),
            attachment: attachment.clone(),
            secret: Secret::from_map("the test's Secret", &parts, Side::Client)?,
            read_only,
            options,
            foreign: None,
            patience: Patience::of_caller(),
        })
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

#[tonic::async_trait]
impl NodeVolumes for Served {
    async fn find(&self, id: &VolumeId) -> Result<Volume, VolumesError> {
        Err(VolumesError::NotFound(id.to_string()))
    }

    async fn endpoint(&self, id: &VolumeId) -> Result<SocketAddr, VolumesError> {
        if *id != self.volume {
            return Err(VolumesError::NotFound(id.to_string()));
        }
        self.address()
            .map_err(|error| VolumesError::Invalid(error.to_string()))
    }

    async fn client_secret(
        &self,
        id: &VolumeId,
    ) -> Result<BTreeMap<String, Vec<u8>>, VolumesError> {
        self.authority
            .issue_client(id)
            .map_err(|error| VolumesError::Invalid(error.to_string()))
    }

    async fn set_format(&self, id: &VolumeId, _: Format) -> Result<(), VolumesError> {
        Err(VolumesError::NotFound(id.to_string()))
    }
}

/// Where the records of this machine's devices are.
pub(crate) const RECORDS: &str = "/run/devices";

/// The node part of Hawser, as a process that has just started.
pub(crate) async fn node(served: &Arc<Served>, proxy_allowed: bool) -> Result<Attacher> {
    let config = Config {
        state: RECORDS.into(),
        proxy_allowed,
    };
    // The one before may still be ending.
    let deadline = Instant::now() + PATIENCE;
    loop {
        match Attacher::new(config.clone(), served.clone()) {
            Err(AttachError::System { .. }) if Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            attacher => return Ok(attacher?),
        }
    }
}

/// The node part in a process of its own, for scenarios that kill it.
pub(crate) struct NodeProcess(Child);

/// In the environment of that process: the volume and its directory.
const NODE_PROCESS: [&str; 2] = ["HAWSER_TEST_VOLUME", "HAWSER_TEST_DIRECTORY"];

impl NodeProcess {
    /// Starts this scenario once more, which then finds that it is the node; returns when it has the device.
    pub(crate) fn start(served: &Served, scenario: &str) -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args([crate::inside::ONE, scenario])
            .env(NODE_PROCESS[0], served.volume.as_str())
            .env(NODE_PROCESS[1], &served.directory)
            .stdout(Stdio::piped())
            .spawn()?;
        let stdout = child.stdout.take().context("the node's output")?;
        let mut lines = BufReader::new(stdout).lines();
        let ready = lines.any(|line| line.is_ok_and(|line| line == "ready"));
        ensure!(ready, "the node ended: {}", child.wait()?);
        Ok(Self(child))
    }

    /// The volume, if this process is the node.
    pub(crate) fn volume() -> Result<Option<Arc<Served>>> {
        let [Some(volume), Some(directory)] = NODE_PROCESS.map(std::env::var_os) else {
            return Ok(None);
        };
        let volume = volume.to_string_lossy().parse()?;
        Served::seen_by_another_process(volume, directory.into()).map(Some)
    }

    /// Says that the device is there, and waits to be killed.
    pub(crate) async fn be_ready() -> Result<()> {
        println!("ready");
        std::future::pending().await
    }

    pub(crate) fn kill(mut self) -> Result<()> {
        self.0.kill()?;
        self.0.wait()?;
        Ok(())
    }
}

/// Fails unless nothing is left of any device (K30).
pub(crate) fn nothing_left() -> Result<()> {
    for entry in fs::read_dir("/sys/block")? {
        let device = entry?.path();
        if !device.to_string_lossy().contains("nbd") {
            continue;
        }
        let shown = |name| fs::read_to_string(device.join(name)).unwrap_or_default();
        ensure!(
            !device.join("pid").exists(),
            "{} has a pid",
            device.display()
        );
        ensure!(
            !device.join("backend").exists(),
            "{} has a backend",
            device.display()
        );
        ensure!(
            shown("size").trim() == "0",
            "{} has a size",
            device.display()
        );
        ensure!(
            shown("inflight")
                .split_whitespace()
                .all(|count| count == "0"),
            "{} has requests in flight",
            device.display()
        );
    }
    for entry in fs::read_dir(RECORDS)? {
        let name = entry?.file_name();
        if name != "lock" {
            bail!("a record is left: {}", name.display());
        }
    }
    Ok(())
}
