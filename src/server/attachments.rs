//! Who may connect, durably: `attachments.json`, and the exports that follow from it.
//!
//! A server that comes back while its controller is away lets in whom it let in before. What is not known to be
//! durable is not answered; what was revoked is refused from the moment on when the revocation arrives, whatever
//! becomes of writing it down.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::exports::{Exports, Order};
use crate::nbd::ExportName;
use crate::storage;
use crate::volumes::{AttachmentId, VolumeId};

/// Attachments of one volume: far more than nodes that could read it at one time.
const MOST: usize = 1024;

/// The attachments of a volume.
#[derive(Debug)]
pub(super) struct Attachments {
    volume: VolumeId,
    path: PathBuf,
    exports: Arc<Exports>,
    /// What the file holds.
    recorded: Mutex<Record>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    attachments: BTreeMap<AttachmentId, Rights>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Rights {
    read_only: bool,
}

/// Why the attachments could not be changed, or are not known.
#[derive(Debug, thiserror::Error)]
pub(super) enum AttachmentsError {
    #[error("{path}: {doing}", path = .path.display())]
    Io {
        path: PathBuf,
        doing: &'static str,
        source: io::Error,
    },
    #[error(
        "{path} does not hold attachments: remove it, and every attachment must be allowed again",
        path = .path.display()
    )]
    Corrupt {
        path: PathBuf,
        source: serde_json::Error,
    },
    #[error("attachment {0} is allowed already, but not with the same rights")]
    OtherRights(AttachmentId),
    #[error("{0} attachments are allowed already, the limit")]
    TooMany(usize),
}

impl Attachments {
    /// Reads what was recorded, and lets it in.
    pub(super) fn load(
        directory: &Path,
        volume: VolumeId,
        exports: Arc<Exports>,
    ) -> Result<Self, AttachmentsError> {
        let path = directory.join("attachments.json");
        let record: Record = match std::fs::read(&path) {
            Ok(bytes) => {
                serde_json::from_slice(&bytes).map_err(|source| AttachmentsError::Corrupt {
                    path: path.clone(),
                    source,
                })?
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Record::default(),
            Err(source) => {
                let doing = "read the attachments";
                return Err(AttachmentsError::Io {
                    path,
                    doing,
                    source,
                });
            }
        };
        let attachments = Self {
            volume,
            path,
            exports,
            recorded: Mutex::new(record),
        };
        for (id, rights) in &attachments.recorded().attachments {
            attachments
                .exports
                .allow(attachments.export(id), rights.read_only);
        }
        Ok(attachments)
    }

    /// The export of an attachment.
    pub(super) fn export(&self, id: &AttachmentId) -> ExportName {
        // Both names are short and plain, so this is one always.
        ExportName::try_from(format!("{}/{id}", self.volume).as_str()).unwrap_or_default()
    }

    /// Lets an attachment in from now on, also after a restart.
    pub(super) fn allow(&self, id: &AttachmentId, read_only: bool) -> Result<(), AttachmentsError> {
        let mut recorded = self.recorded();
        let rights = Rights { read_only };
        match recorded.attachments.get(id) {
            Some(known) if *known == rights => {}
            Some(_) => return Err(AttachmentsError::OtherRights(id.clone())),
            None => {
                let count = recorded.attachments.len();
                if count >= MOST {
                    return Err(AttachmentsError::TooMany(count));
                }
                let mut next = recorded.clone();
                next.attachments.insert(id.clone(), rights);
                self.write(&next)?;
                *recorded = next;
            }
        }
        self.exports.allow(self.export(id), read_only);
        Ok(())
    }

    /// Refuses an attachment from now on, and has its sessions end: how many there were. They are gone when
    /// [`Exports::vacated`] returns.
    pub(super) fn revoke(&self, id: &AttachmentId) -> Result<usize, AttachmentsError> {
        let export = self.export(id);
        let mut recorded = self.recorded();
        self.exports.forbid(&export);
        if recorded.attachments.contains_key(id) {
            let mut next = recorded.clone();
            next.attachments.remove(id);
            self.write(&next)?;
            *recorded = next;
        }
        drop(recorded);
        Ok(self.exports.order(Some(&export), Order::Close))
    }

    fn recorded(&self) -> MutexGuard<'_, Record> {
        self.recorded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, record: &Record) -> Result<(), AttachmentsError> {
        let written = serde_json::to_vec_pretty(record)
            .map_err(io::Error::from)
            .and_then(|bytes| storage::rewrite(&self.path, &bytes));
        written.map_err(|source| AttachmentsError::Io {
            path: self.path.clone(),
            doing: "write the attachments",
            source,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(byte: u8) -> AttachmentId {
        AttachmentId::from_bytes([byte; 16])
    }

    fn load(directory: &Path) -> (Attachments, Arc<Exports>) {
        let exports = Arc::new(Exports::default());
        let volume = VolumeId::from_bytes([1; 16]);
        let attachments = Attachments::load(directory, volume, Arc::clone(&exports)).unwrap();
        (attachments, exports)
    }

    #[test]
    fn what_was_allowed_and_revoked_survives() {
        let directory = tempfile::tempdir().unwrap();
        let (attachments, exports) = load(directory.path());
        attachments.allow(&id(1), false).unwrap();
        attachments.allow(&id(2), true).unwrap();
        attachments.allow(&id(2), true).unwrap();
        assert!(exports.enter(&attachments.export(&id(1))).is_ok());
        let error = attachments.allow(&id(2), false).unwrap_err();
        assert!(matches!(error, AttachmentsError::OtherRights(_)), "{error}");
        attachments.revoke(&id(1)).unwrap();
        attachments.revoke(&id(1)).unwrap();
        attachments.revoke(&id(9)).unwrap();

        let (attachments, exports) = load(directory.path());
        assert!(exports.find(&attachments.export(&id(1))).is_none());
        let kept = exports.find(&attachments.export(&id(2))).unwrap();
        assert!(kept.read_only);
    }

    #[test]
    fn a_revocation_that_cannot_be_recorded_fails_and_holds_all_the_same() {
        let directory = tempfile::tempdir().unwrap();
        let (attachments, exports) = load(directory.path());
        attachments.allow(&id(1), false).unwrap();
        // Where the new contents should go there is a directory now.
        let obstacle = directory.path().join("attachments.json.spare");
        std::fs::remove_file(&obstacle).unwrap();
        std::fs::create_dir(&obstacle).unwrap();
        let error = attachments.revoke(&id(1)).unwrap_err();
        assert!(
            error.to_string().contains("write the attachments"),
            "{error}"
        );
        assert!(exports.find(&attachments.export(&id(1))).is_none());
        assert!(attachments.allow(&id(3), false).is_err());
        assert!(exports.find(&attachments.export(&id(3))).is_none());
        std::fs::remove_dir(&obstacle).unwrap();
        attachments.revoke(&id(1)).unwrap();
        let (attachments, exports) = load(directory.path());
        assert!(exports.find(&attachments.export(&id(1))).is_none());
    }

    #[tokio::test]
    async fn a_session_is_there_until_its_last_request_is_over() {
        let directory = tempfile::tempdir().unwrap();
        let (attachments, exports) = load(directory.path());
        attachments.allow(&id(1), false).unwrap();
        let export = attachments.export(&id(1));
        let session = exports.enter(&export).unwrap();
        let request = Arc::clone(&session);
        assert_eq!(attachments.revoke(&id(1)).unwrap(), 1);
        assert_eq!(session.order(), Order::Close);
        assert!(session.wake.take());
        assert!(exports.enter(&export).is_err());
        drop(session);
        let vacated = exports.vacated(Some(&export));
        tokio::pin!(vacated);
        let patience = std::time::Duration::from_millis(20);
        assert!(
            tokio::time::timeout(patience, &mut vacated).await.is_err(),
            "its write is still being carried out"
        );
        std::thread::spawn(move || drop(request));
        vacated.await;
    }
}
