//! The machine's half: makes the devices, runs fio on them, and tells the host line by line.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hawser::attach::{Attacher, Config, Device, Options, Request, Transport};
use hawser::patience::Patience;
use hawser::tls::{Secret, Side, read_secret, server_identity};
use hawser::verify::Policy;
use hawser::volumes::{AttachmentId, Format, NodeVolumes, Volume, VolumeId, VolumesError};
use serde::{Deserialize, Serialize};

use super::cases::{self, Case};
use super::{Mode, control};

/// The first argument inside.
pub(crate) const INSIDE: &str = "--inside";
/// Begins a line that is not for people.
pub(crate) const MARK: char = '\u{1}';
/// The whole of the line that comes before a run.
pub(crate) const BEGINS: &str = "begins";

pub(crate) const HAWSER: &str = "hawser";
pub(crate) const NBD_CLIENT: &str = "nbd-client";

/// Far from those that the kernel gives out by itself.
const ITS_DEVICE: &str = "/dev/nbd12";

/// How long a device may take to come or go.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the host tells the machine.
#[derive(Serialize, Deserialize)]
pub(crate) struct Task {
    pub(crate) server: SocketAddr,
    /// The machine's own address.
    pub(crate) address: IpAddr,
    pub(crate) volume: VolumeId,
    /// One for each of the two devices.
    pub(crate) attachments: [AttachmentId; 2],
    /// The folder with the client's certificate.
    pub(crate) secret: PathBuf,
    /// What switches off all other ciphers in nbd-client's TLS library.
    pub(crate) priorities: PathBuf,
    pub(crate) repetitions: usize,
    pub(crate) seconds: f64,
    pub(crate) only: String,
    pub(crate) mode: Mode,
}

pub(crate) fn main(arguments: &[String]) -> Result<()> {
    let task: Task = serde_json::from_str(arguments.first().context("a task")?)?;
    run(
        "ip",
        &[
            "address",
            "add",
            &format!("{}/24", task.address),
            "dev",
            "vec0",
        ],
    )?;
    run("ip", &["link", "set", "vec0", "up"])?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    match task.mode {
        Mode::Devices => runtime.block_on(devices(&task)),
        Mode::Settings => runtime.block_on(settings(&task)),
        Mode::Control => runtime.block_on(control::measure(task.repetitions)),
    }
}

fn chosen(task: &Task) -> Vec<Case> {
    let mut cases = cases::all();
    cases.retain(|case| case.to_string().contains(&task.only));
    cases
}

/// Hawser's device and nbd-client's.
async fn devices(task: &Task) -> Result<()> {
    for connections in [1, 4] {
        let attacher = attacher(task)?;
        let device = attach(&attacher, task, connections).await?;
        let other = nbd_client(task, connections)?;
        for case in chosen(task) {
            for repetition in 0..task.repetitions {
                let mut turns = [(device.path.as_path(), HAWSER), (other, NBD_CLIENT)];
                turns.rotate_left(repetition % 2);
                for (path, subject) in turns {
                    measure(task, &case, path, subject, connections)?;
                }
            }
        }
        run("nbd-client", &["-d", ITS_DEVICE])?;
        attacher.detach(&task.volume).await?;
    }
    Ok(())
}

/// One setting of Hawser's device after the other, beside the device as it is made.
async fn settings(task: &Task) -> Result<()> {
    const QUEUE: [(&str, &[&str]); 4] = [
        ("scheduler", &["mq-deadline"]),
        ("max_sectors_kb", &["128", "512", "1280", "4096"]),
        ("read_ahead_kb", &["128", "512", "4096"]),
        ("nr_requests", &["32"]),
    ];
    for connections in [4, 1, 2, 8] {
        let attacher = attacher(task)?;
        let device = attach(&attacher, task, connections).await?;
        let name = device.path.file_name().context("the device's name")?;
        let queue = Path::new("/sys/block").join(name).join("queue");
        let mut turns = vec![None];
        if connections == 4 {
            let all = |(setting, values): (_, &'static [_])| {
                values.iter().map(move |value| (setting, *value))
            };
            turns.extend(QUEUE.into_iter().flat_map(all).map(Some));
        }
        for case in chosen(task) {
            for repetition in 0..task.repetitions {
                // Each has its turn early and late.
                let mut turns = turns.clone();
                let first = repetition * turns.len() / task.repetitions;
                turns.rotate_left(first);
                for turn in turns {
                    let Some((setting, value)) = turn else {
                        measure(task, &case, &device.path, HAWSER, connections)?;
                        continue;
                    };
                    let path = queue.join(setting);
                    let usual = fs::read_to_string(&path)?;
                    fs::write(&path, value).with_context(|| format!("{setting}: {value}"))?;
                    let subject = format!("{setting} {value}");
                    measure(task, &case, &device.path, &subject, connections)?;
                    fs::write(&path, current(&usual))?;
                }
            }
        }
        attacher.detach(&task.volume).await?;
    }
    Ok(())
}

/// The value in force: the one in brackets, where the kernel shows all there are.
fn current(shown: &str) -> &str {
    let bracketed = shown
        .split_once('[')
        .and_then(|(_, rest)| rest.split_once(']'));
    bracketed.map_or(shown.trim(), |(value, _)| value)
}

fn measure(task: &Task, case: &Case, device: &Path, subject: &str, connections: u8) -> Result<()> {
    tell(BEGINS)?;
    let sample = case.run(device, subject, connections, task.seconds)?;
    tell(&serde_json::to_string(&sample)?)
}

fn tell(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{MARK}{text}")?;
    out.flush().context("telling the host")
}

/// The node part as it is in the product; what it asks Kubernetes for is known here.
fn attacher(task: &Task) -> Result<Attacher> {
    let config = Config {
        state: "/run/devices".into(),
        proxy_allowed: false,
    };
    let deadline = Instant::now() + PATIENCE;
    loop {
        // The one before may still be ending.
        match Attacher::new(config.clone(), Arc::new(Known(task.server))) {
            Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(20)),
            attacher => return Ok(attacher?),
        }
    }
}

async fn attach(attacher: &Attacher, task: &Task, connections: u8) -> Result<Device> {
    let parts = read_secret(&task.secret, Side::Client, 64 << 10)?;
    let request = Request {
        volume: task.volume.clone(),
        attachment: task.attachments[0].clone(),
        secret: Secret::from_map("the client's Secret", &parts, Side::Client)?,
        read_only: false,
        options: Options {
            connections,
            // A machine that is starved must not be measured reconnecting.
            timeout: Duration::from_secs(60),
            policy: Policy::Off,
            ..Options::default()
        },
        foreign: None,
        patience: Patience::of_caller(),
    };
    let device = attacher.attach(request).await?;
    ensure!(
        device.transport == Transport::KernelTls,
        "not the kernel's TLS"
    );
    Ok(device)
}

/// A device whose data goes through nbd-client's processes, one for each connection.
fn nbd_client(task: &Task, connections: u8) -> Result<&'static Path> {
    let file = |name: &str| task.secret.join(name).display().to_string();
    let export = format!("{}/{}", task.volume, task.attachments[1]);
    let output = Command::new("nbd-client")
        .args([
            &task.server.ip().to_string(),
            &task.server.port().to_string(),
        ])
        .args([ITS_DEVICE, "-name", &export])
        .args([
            "-connections",
            &connections.to_string(),
            "-block-size",
            "4096",
        ])
        .args(["-tlshostname", &server_identity(&task.volume)])
        .args(["-certfile", &file("tls.crt"), "-keyfile", &file("tls.key")])
        .args(["-cacertfile", &file("ca.crt")])
        .env("GNUTLS_SYSTEM_PRIORITY_FILE", &task.priorities)
        .output()
        .context("nbd-client")?;
    let deadline = Instant::now() + PATIENCE;
    let size = Path::new("/sys/block/nbd12/size");
    while fs::read_to_string(size)?.trim() == "0" {
        ensure!(
            output.status.success() && Instant::now() < deadline,
            "nbd-client made no device: {output:?}"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(Path::new(ITS_DEVICE))
}

fn run(program: &str, arguments: &[&str]) -> Result<()> {
    let output = Command::new(program).args(arguments).output()?;
    ensure!(
        output.status.success(),
        "{program} {arguments:?}: {output:?}"
    );
    Ok(())
}

/// Where the volume's server is.
struct Known(SocketAddr);

#[tonic::async_trait]
impl NodeVolumes for Known {
    async fn find(&self, id: &VolumeId) -> Result<Volume, VolumesError> {
        Err(VolumesError::NotFound(id.to_string()))
    }

    async fn endpoint(&self, _: &VolumeId) -> Result<SocketAddr, VolumesError> {
        Ok(self.0)
    }

    async fn client_secret(
        &self,
        id: &VolumeId,
    ) -> Result<BTreeMap<String, Vec<u8>>, VolumesError> {
        Err(VolumesError::NotFound(id.to_string()))
    }

    async fn set_format(&self, id: &VolumeId, _: Format) -> Result<(), VolumesError> {
        Err(VolumesError::NotFound(id.to_string()))
    }
}
