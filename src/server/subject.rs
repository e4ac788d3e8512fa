//! What a server serves: a volume of a pool, or a file by hand.

use std::fs::File;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use tracing::error;

use super::attachments::Attachments;
use super::budget::Budget;
use super::commit::Commits;
use super::control;
use super::epoch::Epoch;
use super::exports::Exports;
use super::service::{Refusals, Service};
use super::store::Store;
use super::workers::Workers;
use crate::nbd::server::Limits;
use crate::nbd::{ExportName, MAX_PAYLOAD};
use crate::tls::ServerTls;
use crate::volumes::VolumeId;

/// Memory of one session's requests: the largest request there may be, and some small ones.
const PER_SESSION: usize = MAX_PAYLOAD as usize + (1 << 20);

/// How long the volume's owner may hold the lock: while no server is alive, it writes down what the next one allows.
const LET_GO: Duration = Duration::from_secs(2);
const ASK_AGAIN: Duration = Duration::from_millis(20);

/// What the two ways to serve have different.
pub(super) struct Subject {
    pub(super) store: Arc<Store>,
    pub(super) exports: Arc<Exports>,
    /// What INFO_DESCRIPTION says.
    pub(super) description: Option<String>,
    pub(super) volume: Option<OpenVolume>,
}

/// A volume that is open, and locked until the process ends.
pub(super) struct OpenVolume {
    pub(super) id: VolumeId,
    pub(super) attachments: Arc<Attachments>,
    pub(super) epoch: Arc<Mutex<Epoch>>,
    /// The control socket, and where it is.
    pub(super) control: UnixListener,
    pub(super) control_path: PathBuf,
    _lock: File,
}

impl Subject {
    /// A file or device as it is.
    pub(super) fn file(file: &Path, name: &ExportName, read_only: bool) -> anyhow::Result<Self> {
        let store = Store::open(file, read_only)?;
        store.lock(read_only)?;
        let exports = Arc::new(Exports::default());
        exports.allow(name.clone(), read_only);
        Ok(Self {
            store: Arc::new(store),
            exports,
            description: None,
            volume: None,
        })
    }

    /// A volume, with all that is recorded of it. From here on it counts as open.
    pub(super) fn volume(id: &VolumeId, directory: &Path, control: &Path) -> anyhow::Result<Self> {
        let lock = lock(&directory.join("lock"))?;
        let store = Store::open(&directory.join("data"), false)?;
        let exports = Arc::new(Exports::default());
        let attachments = Attachments::load(directory, id.clone(), Arc::clone(&exports))?;
        let socket = control::bind(control)
            .with_context(|| format!("{}: make the control socket", control.display()))?;
        // Last: a server that could not serve must not leave an epoch open.
        let epoch = Epoch::open(directory)?;
        Ok(Self {
            store: Arc::new(store),
            exports,
            description: Some(format!("hawser volume={id} epoch={}", epoch.number())),
            volume: Some(OpenVolume {
                id: id.clone(),
                attachments: Arc::new(attachments),
                epoch: Arc::new(Mutex::new(epoch)),
                control: socket,
                control_path: control.to_owned(),
                _lock: lock,
            }),
        })
    }

    /// What serves it, with `pool` bytes for the requests in flight.
    pub(super) fn service(&self, tls: ServerTls, pool: usize) -> Service {
        let volume = self.volume.as_ref();
        let epoch = volume.map(|volume| Arc::clone(&volume.epoch));
        let on_loss = move || {
            error!("the system lost writes that were acknowledged: this volume's epoch ends here");
            let Some(epoch) = &epoch else {
                return;
            };
            let mut epoch = epoch.lock().unwrap_or_else(PoisonError::into_inner);
            if let Err(problem) = epoch.lose() {
                error!("{problem}");
            }
        };
        let workers = Workers::default();
        let store = Arc::clone(&self.store);
        Service {
            store: Arc::clone(&store),
            commits: Arc::new(Commits::new(store, workers.clone(), on_loss)),
            workers,
            budget: Arc::new(Budget::new(pool, PER_SESSION)),
            exports: Arc::clone(&self.exports),
            tls,
            description: self.description.clone(),
            listed: volume.is_none(),
            limits: Limits::default(),
            draining: AtomicBool::new(false),
            negotiating: AtomicUsize::new(0),
            refused: Refusals::default(),
            started: Instant::now(),
        }
    }
}

/// Takes the volume for this process: the kernel gives it back when the process ends, however that comes.
fn lock(path: &Path) -> anyhow::Result<File> {
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .with_context(|| format!("{}: open the lock", path.display()))?;
    let deadline = Instant::now() + LET_GO;
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => std::thread::sleep(ASK_AGAIN),
            Err(Errno::WOULDBLOCK) => {
                bail!("{}: another server serves this volume", path.display())
            }
            Err(errno) => return Err(errno).with_context(|| format!("{}: lock", path.display())),
        }
    }
}
