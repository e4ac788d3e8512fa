//! `volume.json`: everything that is known of a volume, beside its data.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::volumes::{Attachment, Volume, VolumeId};

use super::{StorageError, durable};

/// Changes when a reader of the old form could misread the new one.
const VERSION: u32 = 1;

/// Bytes of a record that is read: far above what options of 4 KiB and some hundred attachments take.
const LIMIT: u64 = 4 << 20;

pub(super) const NAME: &str = "volume.json";

/// A volume as it is on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    version: u32,
    #[serde(flatten)]
    pub volume: Volume,
    /// Attachments that are no longer allowed, and that the server may not have been told of yet.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub revoking: Vec<Attachment>,
}

impl Record {
    #[must_use]
    pub fn new(volume: Volume) -> Self {
        Self {
            version: VERSION,
            volume,
            revoking: Vec::new(),
        }
    }

    pub(super) fn write(&self, directory: &Path) -> Result<(), StorageError> {
        let failed = StorageError::io("write", &directory.join(NAME));
        let written = serde_json::to_vec_pretty(self)
            .map_err(std::io::Error::other)
            .and_then(|json| durable::rewrite(&directory.join(NAME), &json));
        written.map_err(failed)
    }

    /// Reads the record of `id`. `Damaged` says what is wrong with it.
    pub(super) fn read(directory: &Path, id: &VolumeId) -> Result<Self, StorageError> {
        let path = directory.join(NAME);
        let damaged = |problem: String| StorageError::Damaged {
            volume: id.clone(),
            problem: format!("{}: {problem}", path.display()),
        };
        let length = std::fs::metadata(&path)
            .map_err(|error| damaged(error.to_string()))?
            .len();
        if length > LIMIT {
            return Err(damaged(format!(
                "it has {length} bytes, and {LIMIT} are the most"
            )));
        }
        let json = std::fs::read(&path).map_err(|error| damaged(error.to_string()))?;
        let record: Self =
            serde_json::from_slice(&json).map_err(|error| damaged(error.to_string()))?;
        if record.version != VERSION {
            return Err(damaged(format!(
                "it has version {}, and this program reads version {VERSION}",
                record.version
            )));
        }
        if record.volume.id != *id {
            return Err(damaged(format!("it describes {}", record.volume.id)));
        }
        Ok(record)
    }
}
