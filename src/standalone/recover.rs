//! Coming up and going down: an installation is opened on what an earlier life of this program left, whatever it was
//! doing when it ended.
//!
//! The pool has completed or undone its own interrupted calls when it is open. What belongs to volumes that are not in
//! it is removed here; what belongs to volumes that are in it is completed by looking after their servers.

use std::collections::HashMap;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex as StdMutex};
use std::time::Duration;

use tokio::sync::{Mutex, Semaphore};
use tokio::task::JoinSet;
use tokio_util::task::TaskTracker;

use crate::daemon::chain;
use crate::proto::socket::LONGEST_PATH;
use crate::storage::{self, Pool, StorageError};
use crate::volumes::VolumeId;

use super::foreign::Foreign;
use super::installation::{Inner, Installation, Settings};
use super::secrets::{Secrets, SecretsError};
use super::server::Server;
use super::site::{Ground, Site};

/// Servers that start at one time, for each processor: a start is mostly work for one.
const STARTING: usize = 2;

/// How often certificates are looked at. They are renewed days before they end.
const RENEWAL: Duration = Duration::from_secs(60 * 60);

/// How long calls that are under way at the end may take to finish.
const CALLS: Duration = Duration::from_secs(30);

/// The file that says which pool a state directory belongs to.
const POOL: &str = "pool";

/// Why an installation cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("state directory {} belongs to another running process; stop that one first", .0.display())]
    Busy(PathBuf),
    #[error(
        "state directory {} belongs to another pool than the one in {}: is the pool mounted? \
         If this is meant, remove {}", .state.display(), .pool.display(), .state.join(POOL).display()
    )]
    OtherPool { state: PathBuf, pool: PathBuf },
    #[error(
        "state directory {} is too long a path by {excess} bytes: sockets below it have to fit into \
         {LONGEST_PATH} bytes", .state.display()
    )]
    TooLong { state: PathBuf, excess: usize },
    #[error(transparent)]
    Storage(#[from] StorageError),
    #[error(transparent)]
    Secrets(#[from] SecretsError),
    #[error("cannot {doing} {}", .path.display())]
    Io {
        doing: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl OpenError {
    fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::Io {
            doing,
            path,
            source,
        }
    }
}

impl Installation {
    /// Opens what is there, or makes it; completes or undoes what was interrupted; looks after all servers from then
    /// on. Blocks, and must be called within a tokio runtime.
    pub fn open(settings: Settings) -> Result<Self, OpenError> {
        let servers = settings.state.join("servers");
        check_length(&settings.state, &servers)?;
        make_directory(&servers)?;
        let lock = lock(&settings.state)?;
        check_pool(&settings.state, &settings.pool)?;
        let pool = Pool::open(&settings.pool, settings.overcommit)?;
        storage::rewrite(&settings.state.join(POOL), pool.identity().as_bytes())
            .map_err(OpenError::io("write", &settings.state.join(POOL)))?;
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let ground = Arc::new(Ground {
            secrets: Secrets::open(&settings.secrets)?,
            pool,
            servers,
            program: settings.program,
            listen: settings.listen,
            starting: Semaphore::new(STARTING * processors),
        });
        let installation = Self(Arc::new(Inner {
            ground,
            foreign: Foreign::new(settings.state.join("foreign")),
            nodes: settings.nodes,
            volumes_per_node: settings.volumes_per_node,
            servers: StdMutex::new(HashMap::new()),
            turns: StdMutex::default(),
            admitting: Mutex::new(()),
            calls: TaskTracker::new(),
            _lock: lock,
        }));
        installation.0.clear_leftovers()?;
        installation.0.renew();
        for record in installation.0.ground.pool.list(None, usize::MAX) {
            installation.0.server(&record.volume.id);
        }
        Ok(installation)
    }

    /// Renews certificates for as long as it runs: it never returns.
    pub async fn renew_certificates(&self) {
        loop {
            tokio::time::sleep(RENEWAL).await;
            let inner = Arc::clone(&self.0);
            let _ = tokio::task::spawn_blocking(move || inner.renew()).await;
        }
    }

    /// Waits for the calls that are under way. Servers go on without us, unless `stop_servers` says otherwise.
    pub async fn close(&self, stop_servers: bool) {
        self.0.calls.close();
        if tokio::time::timeout(CALLS, self.0.calls.wait())
            .await
            .is_err()
        {
            tracing::warn!("calls that did not end in time are completed at the next start");
        }
        if !stop_servers {
            return;
        }
        let mut stopping = JoinSet::new();
        for server in self.0.all_servers() {
            stopping.spawn(async move { server.stop().await });
        }
        while let Some(stopped) = stopping.join_next().await {
            if let Ok(Err(error)) = stopped {
                tracing::error!(error = chain(&error), "a server could not be stopped");
            }
        }
    }
}

impl Inner {
    /// Removes what volumes have left that are not there any more.
    fn clear_leftovers(self: &Arc<Self>) -> Result<(), OpenError> {
        let pool = &self.ground.pool;
        for id in self.ground.secrets.volumes()? {
            if !pool.holds(&id) {
                tracing::info!(volume = %id, "removing the Secrets of a volume that is not there");
                self.ground.secrets.remove(&id)?;
            }
        }
        let servers = &self.ground.servers;
        for entry in fs::read_dir(servers).map_err(OpenError::io("read", servers))? {
            let name = entry.map_err(OpenError::io("read", servers))?.file_name();
            let Ok(id) = name.to_string_lossy().parse::<VolumeId>() else {
                continue;
            };
            if !pool.holds(&id) {
                let inner = Arc::clone(self);
                self.calls
                    .spawn(async move { inner.clear_orphan(id).await });
            }
        }
        Ok(())
    }

    /// Ends a server whose volume is gone, and removes what it left.
    async fn clear_orphan(&self, id: VolumeId) {
        let Ok(_turn) = self.turn(&id).await else {
            return;
        };
        // The name may have been used anew before its turn came.
        if self.ground.pool.holds(&id) {
            return;
        }
        let site = Site {
            volume: id.clone(),
            ground: Arc::clone(&self.ground),
        };
        tracing::info!(volume = %id, "removing the server of a volume that is not there");
        let ended = Server::end_orphan(&site)
            .await
            .map_err(|error| chain(&error));
        let cleared = match ended {
            Ok(()) => self.clear(&id).await.map_err(|error| chain(&error)),
            Err(error) => Err(error),
        };
        if let Err(error) = cleared {
            tracing::error!(volume = %id, error, "what it left stays until the next start");
        }
    }

    /// Issues what is missing, ended or about to end; what is wrong is reported and stays.
    fn renew(&self) {
        for record in self.ground.pool.list(None, usize::MAX) {
            if let Err(error) = self.ground.secrets.ensure(&record.volume.id) {
                tracing::error!(error = chain(&error), "a volume's Secret is not right");
            }
        }
    }
}

fn make_directory(path: &Path) -> Result<(), OpenError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(OpenError::io("create", path))
}

/// The longest path of a socket, and one byte more while it is being made, must fit.
fn check_length(state: &Path, servers: &Path) -> Result<(), OpenError> {
    let volume = VolumeId::from_bytes([0; 16]);
    let longest = servers.join(volume.as_str()).join(".control");
    match longest.as_os_str().len().checked_sub(LONGEST_PATH) {
        None | Some(0) => Ok(()),
        Some(excess) => Err(OpenError::TooLong {
            state: state.to_owned(),
            excess,
        }),
    }
}

fn lock(state: &Path) -> Result<File, OpenError> {
    let path = state.join("lock");
    storage::own(&path)
        .map_err(OpenError::io("lock", &path))?
        .ok_or_else(|| OpenError::Busy(state.to_owned()))
}

/// An empty directory where the pool should be mounted would make every server and Secret a leftover.
fn check_pool(state: &Path, pool: &Path) -> Result<(), OpenError> {
    let path = state.join(POOL);
    let known = match fs::read_to_string(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        known => known.map_err(OpenError::io("read", &path))?,
    };
    if Pool::identity_of(pool)?.as_deref() == Some(known.trim()) {
        return Ok(());
    }
    Err(OpenError::OtherPool {
        state: state.to_owned(),
        pool: pool.to_owned(),
    })
}
