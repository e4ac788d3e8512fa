//! What this node was asked to do with a volume, on disk so that it outlives a restart and a reboot.
//!
//! A record says what was asked, never what is: that is for the kernel to say. It is written before the first step of
//! staging and removed after the last of unstaging, so a device or a mount of ours without a record is a leftover of a
//! lost state directory only.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::attach::Foreign;
use crate::filesystem::Kind;
use crate::storage;
use crate::volumes::{AccessMode, AttachmentId, Content, VolumeId};

/// Bytes of a record: paths and flags have limits, so a larger file is not one of ours.
const SIZE_LIMIT: u64 = 1 << 20;

/// A volume that is staged here, or was to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Staged {
    pub(super) volume: VolumeId,
    /// Where the volume is, if its server is not Hawser's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) foreign: Option<Foreign>,
    pub(super) attachment: AttachmentId,
    pub(super) path: PathBuf,
    pub(super) content: Content,
    /// The file system; none on a raw block volume.
    pub(super) kind: Option<Kind>,
    pub(super) flags: Vec<String>,
    pub(super) mode: AccessMode,
    pub(super) read_only: bool,
    pub(super) targets: Vec<Target>,
}

/// Where a staged volume is published.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Target {
    pub(super) path: PathBuf,
    pub(super) kind: Option<Kind>,
    pub(super) flags: Vec<String>,
    pub(super) group: Option<u32>,
    pub(super) mode: AccessMode,
    pub(super) read_only: bool,
}

impl Staged {
    /// Whether both ask for the same, wherever it is published.
    pub(super) fn is_same_stage(&self, other: &Self) -> bool {
        let stage = |staged: &Self| Self {
            targets: Vec::new(),
            ..staged.clone()
        };
        stage(self) == stage(other)
    }

    pub(super) fn target(&self, path: &Path) -> Option<&Target> {
        self.targets.iter().find(|target| target.path == path)
    }
}

/// The records of this node.
pub(super) struct Records {
    directory: PathBuf,
}

/// A record could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("volume {volume}: {doing} its record {path}")]
pub(in crate::csi) struct RecordError {
    volume: VolumeId,
    doing: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

impl Records {
    pub(super) fn new(directory: PathBuf) -> Self {
        Self { directory }
    }

    fn name(volume: &VolumeId) -> String {
        format!("{volume}.json")
    }

    fn failed(
        &self,
        volume: &VolumeId,
        doing: &'static str,
    ) -> impl FnOnce(io::Error) -> RecordError {
        let (volume, path) = (volume.clone(), self.directory.join(Self::name(volume)));
        move |source| RecordError {
            volume,
            doing,
            path,
            source,
        }
    }

    /// The record of a volume. One that cannot be understood is set aside, loudly: the kernel knows what is mounted.
    pub(super) fn load(&self, volume: &VolumeId) -> Result<Option<Staged>, RecordError> {
        let path = self.directory.join(Self::name(volume));
        let text = match fs::metadata(&path).and_then(|found| {
            if found.len() > SIZE_LIMIT {
                return Err(io::Error::other("it is too large"));
            }
            fs::read(&path)
        }) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(self.failed(volume, "read")(error)),
        };
        match serde_json::from_slice::<Staged>(&text) {
            Ok(staged) if staged.volume == *volume => Ok(Some(staged)),
            Ok(staged) => self.set_aside(volume, &format!("it is of volume {}", staged.volume)),
            Err(error) => self.set_aside(volume, &error.to_string()),
        }
    }

    fn set_aside(&self, volume: &VolumeId, problem: &str) -> Result<Option<Staged>, RecordError> {
        let path = self.directory.join(Self::name(volume));
        let aside = path.with_extension("json.unreadable");
        tracing::error!(%volume, problem, kept = %aside.display(), "a node record is damaged");
        fs::rename(&path, &aside).map_err(self.failed(volume, "set aside"))?;
        Ok(None)
    }

    pub(super) fn save(&self, staged: &Staged) -> Result<(), RecordError> {
        let volume = &staged.volume;
        let write = || {
            fs::create_dir_all(&self.directory)?;
            let text = serde_json::to_vec_pretty(staged)?;
            storage::replace(&self.directory.join(Self::name(volume)), &text)
        };
        write().map_err(self.failed(volume, "write"))
    }

    /// Removes a record. That the removal is not made durable does no harm: a record that comes back describes what
    /// the kernel does not have.
    pub(super) fn remove(&self, volume: &VolumeId) -> Result<(), RecordError> {
        match fs::remove_file(self.directory.join(Self::name(volume))) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(self.failed(volume, "remove")(error))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_comes_back_and_a_damaged_one_is_set_aside() {
        let directory = tempfile::tempdir().unwrap();
        let records = Records::new(directory.path().join("node"));
        let volume = VolumeId::from_bytes([1; 16]);
        assert_eq!(records.load(&volume).unwrap(), None);
        records.remove(&volume).unwrap();
        let staged = Staged {
            volume: volume.clone(),
            foreign: None,
            attachment: AttachmentId::from_bytes([2; 16]),
            path: "/staging".into(),
            content: Content::Filesystem,
            kind: Some(Kind::Xfs),
            flags: vec!["noatime".into()],
            mode: AccessMode::SingleNodeWriter,
            read_only: false,
            targets: Vec::new(),
        };
        records.save(&staged).unwrap();
        assert_eq!(records.load(&volume).unwrap(), Some(staged));
        let path = directory.path().join("node").join(Records::name(&volume));
        let text = fs::read(&path).unwrap();
        for length in 0..text.len() {
            fs::write(&path, &text[..length]).unwrap();
            assert_eq!(records.load(&volume).unwrap(), None, "{length}");
        }
        assert!(path.with_extension("json.unreadable").exists());
    }
}
