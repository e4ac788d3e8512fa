//! Pools and backing stores: where volume data lives on a storage host.
//!
//! A [`Pool`] is a directory with one subdirectory for each volume. It owns what is on disk there: the sparse backing
//! file and `volume.json` beside it, from which the whole installation can be read back when everything else is lost.
//! It counts what it has promised, and refuses to promise more than it may. Calls block; each leaves the pool as it
//! was or as asked, also when the process is killed in the middle.

mod durable;
mod lock;
mod overcommit;
mod owner;
mod pool;
mod record;
pub mod size;
#[cfg(test)]
mod tests;
mod vacancy;

use std::io;
use std::path::{Path, PathBuf};

pub use self::durable::{replace, rewrite};
pub use self::lock::own;
pub use self::overcommit::Overcommit;
pub use self::owner::give;
pub use self::pool::Pool;
pub use self::record::Record;
pub use self::size::SizeError;
pub use self::vacancy::{Held, Vacancy};

use crate::volumes::{VolumeId, VolumesError};

/// Why the pool did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    #[error("pool {} belongs to another running process; stop that one first", .0.display())]
    Busy(PathBuf),
    #[error("volume {0} does not exist")]
    NotFound(VolumeId),
    #[error("volume {0} exists already")]
    Exists(VolumeId),
    #[error("volume {0} is being created or deleted")]
    InFlight(VolumeId),
    #[error(transparent)]
    Size(#[from] SizeError),
    #[error("volume {volume} of {size} bytes is larger than the pool's file system allows")]
    TooLarge { volume: VolumeId, size: u64 },
    #[error(
        "volume {volume} needs {wanted} bytes, but the pool has {available} bytes left to promise; \
         delete volumes, enlarge the pool, or allow more over-commitment"
    )]
    NoRoom {
        volume: VolumeId,
        wanted: u64,
        available: u64,
    },
    #[error("the disk under {} is full: cannot {doing}", .path.display())]
    Full { doing: &'static str, path: PathBuf },
    #[error("volume {volume} is damaged: {problem}; nothing was changed")]
    Damaged { volume: VolumeId, problem: String },
    #[error("pool {} is damaged: {problem}", .path.display())]
    DamagedPool { path: PathBuf, problem: String },
    #[error("cannot {doing} {}", .path.display())]
    Io {
        doing: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl StorageError {
    /// A full disk is told apart, because the remedy is another one.
    fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::Full { doing, path },
            _ => Self::Io {
                doing,
                path,
                source,
            },
        }
    }
}

impl From<StorageError> for VolumesError {
    fn from(error: StorageError) -> Self {
        match error {
            StorageError::NotFound(volume) => Self::NotFound(volume.to_string()),
            StorageError::Size(SizeError::Limit { .. }) => Self::Invalid(error.to_string()),
            StorageError::Size(_) | StorageError::TooLarge { .. } => {
                Self::OutOfRange(error.to_string())
            }
            StorageError::NoRoom { .. } | StorageError::Full { .. } => {
                Self::NoRoom(error.to_string())
            }
            StorageError::Exists(ref volume) | StorageError::InFlight(ref volume) => {
                Self::Unavailable {
                    volume: volume.to_string(),
                    doing: error.to_string(),
                    source: None,
                }
            }
            StorageError::Busy(_)
            | StorageError::Damaged { .. }
            | StorageError::DamagedPool { .. }
            | StorageError::Io { .. } => Self::Internal {
                doing: error.to_string(),
                source: std::error::Error::source(&error).map(|source| source.to_string().into()),
            },
        }
    }
}
