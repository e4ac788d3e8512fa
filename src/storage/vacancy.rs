//! A volume without a server: who owns it may then decide what the next one allows.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use serde_json::json;

use super::durable::rewrite;
use crate::volumes::AttachmentId;

/// The files of a server's in its volume's directory, as docs/design/contracts.md has them.
const LOCK: &str = "lock";
const ATTACHMENTS: &str = "attachments.json";

/// Proof that no server of the volume is alive, for as long as it is held.
///
/// It is unlocked by name, not only closed: a process that is being started at this moment has a copy of every open
/// file until it executes its program, and would hold the lock for that long.
#[derive(Debug)]
pub struct Vacancy {
    lock: File,
    directory: PathBuf,
}

/// Some process has the volume's lock, a server most likely.
#[derive(Debug)]
pub struct Held {
    pub lock: PathBuf,
    pub file: File,
}

impl Drop for Vacancy {
    fn drop(&mut self) {
        let _ = self.lock.unlock();
    }
}

impl Vacancy {
    /// Takes the lock of the volume in that directory, unless somebody has it.
    pub fn of(directory: &Path) -> io::Result<Result<Self, Held>> {
        let lock = directory.join(LOCK);
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
            .open(&lock)?;
        match file.try_lock() {
            Ok(()) => Ok(Ok(Self {
                lock: file,
                directory: directory.to_owned(),
            })),
            Err(TryLockError::WouldBlock) => Ok(Err(Held { lock, file })),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    /// Makes the next server allow these attachments, each for reading only or not, and no others.
    pub fn allow_only<'a>(
        &self,
        attachments: impl IntoIterator<Item = (&'a AttachmentId, bool)>,
    ) -> io::Result<()> {
        let allowed: BTreeMap<_, _> = attachments
            .into_iter()
            .map(|(id, read_only)| (id, json!({ "read_only": read_only })))
            .collect();
        let json = json!({ "attachments": allowed }).to_string();
        rewrite(&self.directory.join(ATTACHMENTS), json.as_bytes())
    }
}
