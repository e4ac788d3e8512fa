//! The epoch of a volume: it goes up when writes that were acknowledged may be gone.
//!
//! A write-back volume's newest writes live in the storage host's page cache. They are lost when the host stops
//! while the volume is open, or when the kernel could not write them out. A node that reconnects compares the epoch
//! in INFO_DESCRIPTION and must not go on as if nothing had happened when it is another one.

use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::storage;

/// Where the kernel says which boot this is.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    epoch: u64,
    /// The boot in which the volume was opened last; empty once writes are known to be lost.
    boot_id: String,
    /// Whether everything was durable when the volume was closed.
    clean: bool,
}

/// The epoch of a volume that is open.
#[derive(Debug)]
pub(super) struct Epoch {
    path: PathBuf,
    record: Record,
}

/// Why the epoch is not known, so that the volume must not be served.
#[derive(Debug, thiserror::Error)]
pub(super) enum EpochError {
    #[error("{path}: {doing}", path = .path.display())]
    Io {
        path: PathBuf,
        doing: &'static str,
        source: io::Error,
    },
    #[error(
        "{path} does not hold an epoch: remove it, and the volume begins another one, at which nodes that have it \
         attached give up their devices",
        path = .path.display()
    )]
    Corrupt {
        path: PathBuf,
        source: serde_json::Error,
    },
}

impl Epoch {
    /// Opens the volume in this boot of the machine.
    pub(super) fn open(directory: &Path) -> Result<Self, EpochError> {
        let boot_id = std::fs::read_to_string(BOOT_ID).map_err(|source| EpochError::Io {
            path: BOOT_ID.into(),
            doing: "read which boot this is",
            source,
        })?;
        Self::open_in(directory, boot_id.trim())
    }

    /// Settles the epoch and records, durably, that the volume is open.
    fn open_in(directory: &Path, boot_id: &str) -> Result<Self, EpochError> {
        let path = directory.join("epoch.json");
        let epoch = match std::fs::read(&path) {
            Ok(bytes) => {
                let last: Record =
                    serde_json::from_slice(&bytes).map_err(|source| EpochError::Corrupt {
                        path: path.clone(),
                        source,
                    })?;
                let kept = last.clean || last.boot_id == boot_id;
                if kept { last.epoch } else { last.epoch + 1 }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => first(),
            Err(source) => {
                let doing = "read the epoch";
                return Err(EpochError::Io {
                    path,
                    doing,
                    source,
                });
            }
        };
        let record = Record {
            epoch,
            boot_id: boot_id.to_owned(),
            clean: false,
        };
        let opened = Self { path, record };
        opened.write()?;
        Ok(opened)
    }

    pub(super) fn number(&self) -> u64 {
        self.record.epoch
    }

    /// Records that writes are lost: the next epoch is another one, whatever happens until then.
    pub(super) fn lose(&mut self) -> Result<(), EpochError> {
        self.record.boot_id = String::new();
        self.write()
    }

    /// Records that everything is durable. Only to be called when it is.
    pub(super) fn close(&mut self) -> Result<(), EpochError> {
        if self.record.boot_id.is_empty() {
            return Ok(());
        }
        self.record.clean = true;
        self.write()
    }

    fn write(&self) -> Result<(), EpochError> {
        let written = serde_json::to_vec(&self.record)
            .map_err(io::Error::from)
            .and_then(|bytes| storage::rewrite(&self.path, &bytes));
        written.map_err(|source| EpochError::Io {
            path: self.path.clone(),
            doing: "write the epoch",
            source,
        })
    }
}

/// An epoch that no earlier one of the volume can have been: where the record was lost, a node that is attached must not
/// take what comes after for what was before.
fn first() -> u64 {
    SystemTime::UNIX_EPOCH
        .elapsed()
        .map_or(1, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_epoch_goes_up_exactly_when_writes_may_be_lost() {
        let directory = tempfile::tempdir().unwrap();
        let open = |boot| Epoch::open_in(directory.path(), boot).unwrap();
        let first = open("a").number();
        assert!(first > 1 << 30, "not one that a lost record may have had");
        assert_eq!(
            open("a").number(),
            first,
            "killed, but the page cache is there"
        );
        assert_eq!(
            open("b").number(),
            first + 1,
            "the machine went down with the volume open"
        );
        open("b").close().unwrap();
        assert_eq!(
            open("c").number(),
            first + 1,
            "closed before the machine went down"
        );
        open("c").lose().unwrap();
        assert_eq!(open("c").number(), first + 2, "the kernel lost writes");
        let mut lost = open("c");
        lost.lose().unwrap();
        lost.close().unwrap();
        assert_eq!(
            open("c").number(),
            first + 3,
            "closing does not bring lost writes back"
        );
    }

    #[test]
    fn an_epoch_that_cannot_be_read_is_not_guessed() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("epoch.json"), b"{\"epoch\":").unwrap();
        let error = Epoch::open_in(directory.path(), "a").unwrap_err();
        assert!(
            error.to_string().contains("does not hold an epoch"),
            "{error}"
        );
    }
}
