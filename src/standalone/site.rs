//! One volume's place on this machine: its directories, its lock, and what its next server will allow.

use std::fs::{self, DirBuilder};
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use tokio::sync::Semaphore;

use crate::control::ControlError;
use crate::storage::{Pool, StorageError, Vacancy};
use crate::tls::Side;
use crate::volumes::VolumeId;

use super::process;
use super::secrets::{Secrets, SecretsError};

/// What all volumes of this machine have in common.
pub(super) struct Ground {
    pub(super) pool: Pool,
    pub(super) secrets: Secrets,
    /// Where each server's socket and log are, in a directory of its volume's name.
    pub(super) servers: PathBuf,
    /// The program that serves, and the address and port it is told to listen on.
    pub(super) program: PathBuf,
    pub(super) listen: SocketAddr,
    /// Limits how many servers start at one time.
    pub(super) starting: Semaphore,
}

/// Why a volume has no running server.
#[derive(Debug, thiserror::Error)]
pub(super) enum ServerError {
    #[error(transparent)]
    Storage(#[from] StorageError),
    #[error(transparent)]
    Secrets(#[from] SecretsError),
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error("cannot {doing} {}", .path.display())]
    Io {
        doing: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "another process{} holds {} and does not answer on the control socket",
        .holder.map(|id| format!(" ({id})")).unwrap_or_default(), .lock.display()
    )]
    Held { lock: PathBuf, holder: Option<i32> },
    #[error("the server ended ({how}){}", .said.as_ref().map(|said| format!(", saying: {said}")).unwrap_or_default())]
    Ended { how: String, said: Option<String> },
    #[error("the server did not answer in time after its start")]
    Silent,
    #[error("this process is shutting down")]
    ShuttingDown,
}

impl ServerError {
    pub(super) fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::Io {
            doing,
            path,
            source,
        }
    }
}

/// One volume's place. Cheap to clone.
#[derive(Clone)]
pub(super) struct Site {
    pub(super) volume: VolumeId,
    pub(super) ground: Arc<Ground>,
}

impl Site {
    /// The volume's directory in the pool.
    pub(super) fn data(&self) -> PathBuf {
        self.ground.pool.directory(&self.volume)
    }

    /// The directory of the server's socket and log.
    pub(super) fn directory(&self) -> PathBuf {
        self.ground.servers.join(self.volume.as_str())
    }

    pub(super) fn socket(&self) -> PathBuf {
        self.directory().join("control")
    }

    pub(super) fn log(&self) -> PathBuf {
        self.directory().join("log")
    }

    /// The command that serves this volume.
    pub(super) fn command(&self) -> Command {
        let ground = &self.ground;
        let mut command = Command::new(&ground.program);
        command
            .arg("serve")
            .args(["--volume", self.volume.as_str()])
            .arg("--directory")
            .arg(self.data())
            .arg("--certificates")
            .arg(ground.secrets.directory(&self.volume, Side::Server))
            .args(["--listen", &ground.listen.to_string()])
            .arg("--control")
            .arg(self.socket());
        command
    }

    /// Whether that process was started to serve this volume.
    pub(super) fn is_served_by(&self, process: i32) -> bool {
        let command = fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
        let words: Vec<&[u8]> = command.split(|byte| *byte == 0).collect();
        [b"serve".as_slice(), self.volume.as_str().as_bytes()]
            .iter()
            .all(|word| words.contains(word))
    }

    /// Refuses to have a server started that would fail, or answer with what was never written.
    pub(super) fn prepare(&self) -> Result<(), ServerError> {
        let directory = self.directory();
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&directory)
            .map_err(ServerError::io("create", &directory))?;
        self.ground.pool.check(&self.volume)?;
        self.ground.secrets.load(&self.volume, Side::Server)?;
        self.settle_allowed()
    }

    /// Makes the next server allow what the record does, and nothing else; `Held` while a server is alive.
    pub(super) fn settle_allowed(&self) -> Result<(), ServerError> {
        let vacancy = self.vacate()?;
        let record = self.ground.pool.find(&self.volume)?;
        let attachments = record.volume.attachments.iter();
        vacancy
            .allow_only(attachments.map(|one| (&one.id, one.read_only)))
            .map_err(ServerError::io("write attachments.json in", &self.data()))
    }

    /// Succeeds when no server is alive.
    pub(super) fn vacate(&self) -> Result<Vacancy, ServerError> {
        let directory = self.data();
        let vacancy = Vacancy::of(&directory).map_err(ServerError::io("lock", &directory))?;
        vacancy.map_err(|held| ServerError::Held {
            holder: process::lock_holder(&held.file),
            lock: held.lock,
        })
    }

    /// Does what may block where that may be done.
    pub(super) async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<T, ServerError> + Send + 'static,
    ) -> Result<T, ServerError> {
        let site = self.clone();
        tokio::task::spawn_blocking(move || work(&site))
            .await
            .map_err(|_| ServerError::ShuttingDown)?
    }
}
