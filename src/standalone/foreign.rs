//! Which nodes use volumes on servers that are not Hawser's: a record and nothing else, since nobody asks those servers.
//!
//! `<state>/foreign/<id>.json`, for as long as a node uses the volume.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::storage;
use crate::volumes::{Attachment, VolumeId, VolumesError};

/// Bytes of a record: a volume has some dozen attachments at most.
const LIMIT: u64 = 1 << 20;

pub(super) struct Foreign {
    directory: PathBuf,
}

#[derive(Serialize, Deserialize)]
struct Used {
    handle: String,
    attachments: Vec<Attachment>,
}

impl Foreign {
    pub(super) fn new(directory: PathBuf) -> Self {
        Self { directory }
    }

    fn path(&self, handle: &str) -> PathBuf {
        let id = VolumeId::foreign(handle);
        self.directory.join(format!("{id}.json"))
    }

    /// Who uses the volume.
    pub(super) fn find(&self, handle: &str) -> Result<Vec<Attachment>, VolumesError> {
        Ok(read(&self.path(handle))?.map_or_else(Vec::new, |used| used.attachments))
    }

    /// Records, durably, who uses the volume from now on.
    pub(super) fn set(
        &self,
        handle: &str,
        attachments: Vec<Attachment>,
    ) -> Result<(), VolumesError> {
        let path = self.path(handle);
        let failed = failed("write", &path);
        if attachments.is_empty() {
            return match fs::remove_file(&path) {
                Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
                removed => removed
                    .and_then(|()| fs::File::open(&self.directory)?.sync_all())
                    .map_err(failed),
            };
        }
        let used = Used {
            handle: handle.to_owned(),
            attachments,
        };
        serde_json::to_vec(&used)
            .map_err(io::Error::other)
            .and_then(|bytes| {
                fs::create_dir_all(&self.directory)?;
                storage::replace(&path, &bytes)
            })
            .map_err(failed)
    }

    /// How many foreign volumes that node uses.
    pub(super) fn attached_to(&self, node: &str) -> Result<usize, VolumesError> {
        let entries = match fs::read_dir(&self.directory) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(0),
            entries => entries.map_err(failed("read", &self.directory))?,
        };
        let mut count = 0;
        for entry in entries {
            let path = entry.map_err(failed("read", &self.directory))?.path();
            // Names that begin with a dot are those of files that were not finished.
            let is_record = path
                .extension()
                .is_some_and(|extension| extension == "json");
            if is_record && let Some(used) = read(&path)? {
                count += usize::from(used.attachments.iter().any(|one| one.node == node));
            }
        }
        Ok(count)
    }
}

fn read(path: &Path) -> Result<Option<Used>, VolumesError> {
    let bytes = fs::metadata(path).and_then(|found| match found.len() {
        0..=LIMIT => fs::read(path),
        length => Err(io::Error::other(format!("it has {length} bytes"))),
    });
    match bytes {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        bytes => bytes
            .and_then(|bytes| serde_json::from_slice(&bytes).map_err(io::Error::other))
            .map(Some)
            .map_err(failed("read", path)),
    }
}

fn failed(doing: &str, path: &Path) -> impl FnOnce(io::Error) -> VolumesError + use<> {
    let doing = format!("cannot {doing} {}", path.display());
    move |error| VolumesError::Internal {
        doing,
        source: Some(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volumes::{AccessMode, AttachmentId};

    #[test]
    fn who_uses_what_outlives_the_process() {
        let directory = tempfile::tempdir().unwrap();
        let open = || Foreign::new(directory.path().join("foreign"));
        let attachment = |node: &str| Attachment {
            id: AttachmentId::unrecorded("disk", node),
            node: node.to_owned(),
            read_only: true,
            mode: AccessMode::MultiNodeReaderOnly,
        };
        assert_eq!(open().attached_to("a").unwrap(), 0);
        let both = vec![attachment("a"), attachment("b")];
        open().set("disk", both.clone()).unwrap();
        open().set("other/disk", vec![attachment("a")]).unwrap();
        assert_eq!(open().find("disk").unwrap(), both);
        assert_eq!(open().attached_to("a").unwrap(), 2);
        assert_eq!(open().attached_to("b").unwrap(), 1);
        open().set("disk", Vec::new()).unwrap();
        open().set("disk", Vec::new()).unwrap();
        assert_eq!(open().find("disk").unwrap(), []);
        fs::write(open().path("disk"), "{").unwrap();
        assert!(open().find("disk").is_err());
    }
}
