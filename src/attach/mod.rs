//! Kernel nbd devices: connect, reconnect, recover, grow, disconnect, and the userspace proxy fallback.
//!
//! A device is made in userspace and then belongs to the kernel: it works on when this process is gone. What this
//! module keeps is a record of each device, on disk before the device exists, and a watch over its sockets. Nothing is
//! ever asked of a socket that the kernel has: whether it lives is read from `/proc/net/tcp`, by the inode in the
//! record, which works just as well for the sockets that an earlier process made.
//!
//! - `netlink`, `kernel`: the driver's messages, encoded and sent
//! - `system`, `modules`: what the node has
//! - `session`: userspace sessions and how they become sockets; `proxy`: where the kernel has no TLS
//! - `record`: what outlives the process
//! - `foreign`: servers that are not Hawser's
//! - `connect`, `disconnect`, `watch`, `recover`: the operations

mod backend;
mod connect;
mod disconnect;
mod error;
mod foreign;
mod kernel;
mod modules;
mod netlink;
mod proxy;
mod record;
mod recover;
mod session;
mod system;
mod watch;

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

pub use self::error::{AttachError, ErrorKind};
pub use self::foreign::Foreign;
pub use self::kernel::KernelError;
pub use self::recover::{Fate, Recovered};

use self::backend::Backend;
use self::proxy::Proxies;
use self::record::{Record, Records};
use self::system::System;
use self::watch::Watch;
use crate::patience::Patience;
use crate::tls::Secret;
use crate::verify;
use crate::volumes::{AttachmentId, NodeVolumes, VolumeId};

/// Where the Secrets of foreign volumes are kept, in memory as `/run` is.
const KEPT_SECRETS: &str = "/run/hawser/foreign";

/// How this node makes devices.
#[derive(Debug, Clone)]
pub struct Config {
    /// A directory for the records of this node's devices, which belongs to one process at a time. It must outlive the
    /// process, and need not outlive the machine's boot.
    pub state: PathBuf,
    /// Whether a node without TLS in its kernel may carry data through a proxy in this process.
    pub proxy_allowed: bool,
}

/// What a StorageClass may choose about a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Sockets, 1 to 16; one where the server does not offer CAN_MULTI_CONN.
    pub connections: u8,
    /// In whole seconds: how long the server may take over a request before its socket is given up, and so also how
    /// long the requests on a dead socket wait for their second try.
    pub timeout: Duration,
    /// In whole seconds: how long requests wait for a server before they fail with EIO.
    pub dead_timeout: Duration,
    /// What a finding of the verification means.
    pub policy: verify::Policy,
}

impl Default for Options {
    /// Four connections, since encryption is one core's work for each; a timeout that a busy disk keeps and a dead
    /// server reaches soon; and patience for the reboot of a storage host.
    fn default() -> Self {
        Self {
            connections: 4,
            timeout: Duration::from_secs(10),
            dead_timeout: Duration::from_secs(600),
            policy: verify::Policy::Strict,
        }
    }
}

/// A device to make.
#[derive(Debug, Clone)]
pub struct Request {
    pub volume: VolumeId,
    pub attachment: AttachmentId,
    pub secret: Secret,
    pub read_only: bool,
    pub options: Options,
    /// Where the volume is, if its server is not Hawser's; [`NodeVolumes`] knows nothing of it then.
    pub foreign: Option<Foreign>,
    /// That of whoever asks for it: how long a server that is away may be waited for.
    pub patience: Patience,
}

/// A kernel device of a volume.
#[derive(Debug, Clone)]
pub struct Device {
    pub index: u32,
    /// `/dev/nbdN`.
    pub path: PathBuf,
    pub size_bytes: u64,
    pub read_only: bool,
    pub transport: Transport,
    /// What was found when the device was made, where it was made just now and the policy is not off.
    pub report: Option<Arc<verify::Report>>,
}

/// Who encrypts a device's data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// The kernel: no process carries data.
    KernelTls,
    /// This process.
    Proxy,
}

/// How the connections of a device are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Links {
    pub volume: VolumeId,
    pub transport: Transport,
    pub up: usize,
    /// Those that died, and have no others in their places yet.
    pub down: usize,
    /// Whether the device was given up: its requests fail.
    pub failed: bool,
}

/// Owns the kernel devices of this node. Cheap to clone.
///
/// Every operation finishes what it began, or undoes it, also when its future is dropped; operations on one volume
/// wait for each other.
#[derive(Clone)]
pub struct Attacher(Arc<Inner>);

struct Inner {
    config: Config,
    volumes: Arc<dyn NodeVolumes>,
    system: System,
    records: Records,
    secrets: foreign::Secrets,
    proxies: Proxies,
    locks: Mutex<HashMap<VolumeId, Arc<tokio::sync::Mutex<()>>>>,
    watches: Mutex<HashMap<VolumeId, Watch>>,
    /// Told when any server is elsewhere.
    moves: Notify,
    /// Ends the watches, and what listens for them, with the last clone.
    stopped: CancellationToken,
    listening: tokio::sync::OnceCell<()>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.stopped.cancel();
    }
}

impl Attacher {
    /// Opens the records. Call [`Attacher::recover`] next, to look after the devices that are there already.
    pub fn new(config: Config, volumes: Arc<dyn NodeVolumes>) -> Result<Self, AttachError> {
        Self::on(System::default(), config, volumes)
    }

    fn on(
        system: System,
        config: Config,
        volumes: Arc<dyn NodeVolumes>,
    ) -> Result<Self, AttachError> {
        let records = Records::open(&config.state).map_err(AttachError::system(
            "open the records of this node's devices",
        ))?;
        Ok(Self(Arc::new(Inner {
            config,
            volumes,
            system,
            records,
            secrets: foreign::Secrets::new(KEPT_SECRETS.into()),
            proxies: Proxies::default(),
            locks: Mutex::default(),
            watches: Mutex::default(),
            moves: Notify::new(),
            stopped: CancellationToken::new(),
            listening: tokio::sync::OnceCell::new(),
        })))
    }

    /// Makes the volume's device, or finds the one that this attachment has already.
    ///
    /// A device of another attachment of the volume is an error, unless nothing can ever come of it any more.
    pub async fn attach(&self, request: Request) -> Result<Device, AttachError> {
        let inner = self.0.clone();
        finish(async move { inner.attach(request).await }).await
    }

    /// The volume's device on this node.
    pub async fn find(&self, volume: &VolumeId) -> Result<Option<Device>, AttachError> {
        let (inner, volume) = (self.0.clone(), volume.clone());
        blocking(move || {
            let Some((index, backend)) = inner.device_of(&volume)? else {
                return Ok(None);
            };
            inner.describe(index, &backend).map(Some)
        })
        .await
    }

    /// Disconnects the volume's device and waits until nothing of it is left; no device is a success.
    ///
    /// Fails while the device is mounted, or something is stacked on it.
    pub async fn detach(&self, volume: &VolumeId) -> Result<(), AttachError> {
        let (inner, volume) = (self.0.clone(), volume.clone());
        finish(async move { inner.detach(&volume).await }).await
    }

    /// Gives the device the size that its server now offers, which must be `size_bytes` at least; returns it. A device
    /// that is large enough already is left as it is.
    pub async fn grow(&self, volume: &VolumeId, size_bytes: u64) -> Result<u64, AttachError> {
        let (inner, volume) = (self.0.clone(), volume.clone());
        finish(async move { inner.grow(&volume, size_bytes).await }).await
    }

    /// Shows this Secret to a foreign server from now on, when a connection of the volume's device must be replaced. Of
    /// a volume that is not attached, or not foreign, nothing is kept.
    pub async fn renew_secret(&self, volume: &VolumeId, secret: Secret) -> Result<(), AttachError> {
        let (inner, volume) = (self.0.clone(), volume.clone());
        finish(async move {
            let _lock = inner.lock(&volume).await;
            let inner = inner.clone();
            blocking(move || match inner.record_of(&volume)? {
                Some(record) if record.foreign.is_some() => inner.secrets.keep(&volume, &secret),
                _ => Ok(()),
            })
            .await
        })
        .await
    }

    /// How the connections of all devices are. Blocks.
    pub fn links(&self) -> Result<Vec<Links>, AttachError> {
        self.0.links()
    }

    /// Says that the volume's server is to be found elsewhere now. Sockets that live stay as they are.
    pub fn server_moved(&self, volume: &VolumeId) {
        self.0.moved(volume);
    }

    /// Finds the devices that an earlier process made and looks after them again. Repeating it changes nothing.
    pub async fn recover(&self) -> Result<Vec<Recovered>, AttachError> {
        let inner = self.0.clone();
        finish(async move { inner.recover().await }).await
    }
}

impl Inner {
    /// One operation at a time for each volume.
    async fn lock(&self, volume: &VolumeId) -> tokio::sync::OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
            locks.retain(|_, lock| Arc::strong_count(lock) > 1);
            locks.entry(volume.clone()).or_default().clone()
        };
        lock.lock_owned().await
    }

    fn device_of(&self, volume: &VolumeId) -> Result<Option<(u32, Backend)>, AttachError> {
        let devices = self
            .system
            .devices()
            .map_err(AttachError::system("list the nbd devices"))?;
        Ok(devices
            .into_iter()
            .find(|(_, backend)| backend.volume == *volume))
    }

    fn record_of(&self, volume: &VolumeId) -> Result<Option<Record>, AttachError> {
        self.records
            .find(volume)
            .map_err(AttachError::system("read a device's record"))
    }

    fn save(&self, record: &Record) -> Result<(), AttachError> {
        self.records
            .save(record)
            .map_err(AttachError::system("write a device's record"))
    }

    fn forget(&self, volume: &VolumeId) -> Result<(), AttachError> {
        self.secrets
            .forget(volume)
            .map_err(AttachError::system("remove a volume's Secret"))?;
        self.records
            .remove(volume)
            .map_err(AttachError::system("remove a device's record"))
    }

    /// The record of a device that is there.
    fn record_for(&self, index: u32, backend: &Backend) -> Result<Record, AttachError> {
        self.record_of(&backend.volume)?
            .filter(|record| record.attachment == backend.attachment)
            .ok_or_else(|| AttachError::Unrecorded {
                volume: backend.volume.clone(),
                device: self.system.path(index),
            })
    }

    fn describe(&self, index: u32, backend: &Backend) -> Result<Device, AttachError> {
        let record = self.record_for(index, backend)?;
        Ok(Device {
            index,
            path: self.system.path(index),
            size_bytes: self
                .system
                .size_bytes(index)
                .map_err(AttachError::system("read the device's size"))?,
            read_only: record.read_only,
            transport: record.transport,
            report: None,
        })
    }

    /// Those of the device's sockets that live.
    fn live_sockets(&self, record: &Record) -> Result<Vec<u64>, AttachError> {
        let live = self.living(record.transport)?;
        let sockets = record.sockets.iter().copied();
        Ok(sockets.filter(|inode| live.contains(inode)).collect())
    }

    /// All sockets that live, of devices and of others.
    fn living(&self, transport: Transport) -> Result<HashSet<u64>, AttachError> {
        match transport {
            Transport::KernelTls => self
                .system
                .established_sockets()
                .map_err(AttachError::system("list the TCP sockets")),
            Transport::Proxy => Ok(self.proxies.running()),
        }
    }

    fn links(&self) -> Result<Vec<Links>, AttachError> {
        let records = self
            .records
            .all()
            .map_err(AttachError::system("list the devices' records"))?;
        if records.is_empty() {
            return Ok(Vec::new());
        }
        let (of_kernel, of_proxies) = (
            self.living(Transport::KernelTls)?,
            self.living(Transport::Proxy)?,
        );
        let links = |record: Record| {
            let live = match record.transport {
                Transport::KernelTls => &of_kernel,
                Transport::Proxy => &of_proxies,
            };
            let up = record.sockets.iter().filter(|one| live.contains(one));
            let up = up.count();
            Links {
                down: usize::from(record.connections).saturating_sub(up),
                failed: record.failed.is_some(),
                transport: record.transport,
                volume: record.volume,
                up,
            }
        };
        Ok(records.into_iter().map(links).collect())
    }
}

/// What this node has for devices, which may load kernel modules: who would encrypt their data. Blocks.
pub fn survey(proxy_allowed: bool) -> Result<Transport, AttachError> {
    modules::driver()?;
    modules::transport(&System::default(), proxy_allowed)
}

/// How many nbd devices the kernel can have at one time, as far as it says: the driver's minor numbers, divided by what
/// each device may have partitions.
#[must_use]
pub fn most_devices() -> u32 {
    let partitions = std::fs::read_to_string("/sys/module/nbd/parameters/max_part");
    system::most_devices(partitions.ok().as_deref())
}

/// Runs what may block on a thread that may be blocked.
async fn blocking<T, F>(work: F) -> Result<T, AttachError>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T, AttachError> + Send + 'static,
{
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or(Err(AttachError::Interrupted))
}

/// Runs an operation to its end, whatever becomes of the future that waits for it.
async fn finish<T: Send + 'static>(
    operation: impl Future<Output = Result<T, AttachError>> + Send + 'static,
) -> Result<T, AttachError> {
    tokio::spawn(operation)
        .await
        .unwrap_or(Err(AttachError::Interrupted))
}
