//! Whether a device is to be formatted: the one decision here that can destroy data.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use tonic::{Code, Status};

use crate::csi::foreign::Formatting;
use crate::csi::status::{precondition, status};
use crate::filesystem::Content::{Empty, Filesystem, Other};
use crate::filesystem::{Before, Content, Kind};
use crate::storage;
use crate::volumes::{Format, Volume, VolumeId};

/// Whether a device is to be formatted, and over what: only when the record *and* the device agree that nothing is
/// there. `None` means that the file system is there already.
pub(super) fn decide(
    volume: &Volume,
    kind: Kind,
    found: &Content,
    may_write: bool,
) -> Result<Option<Before>, Status> {
    let id = &volume.id;
    let before = match (&volume.format, found) {
        (Format::Done { .. }, Filesystem(found)) if found == kind.as_str() => return Ok(None),
        (Format::Done { .. }, found) => {
            return Err(precondition(format!(
                "volume {id} was formatted with {kind}, but its device shows {}; it is not formatted again, and \
                 needs a look by hand",
                describe(found)
            )));
        }
        (Format::Never, Empty) => Before::Empty,
        (Format::Never, found @ (Filesystem(_) | Other(_))) => {
            return Err(precondition(format!(
                "volume {id} was never formatted, but its device shows {}; it is not formatted over that",
                describe(found)
            )));
        }
        // mkfs was broken off, and nothing was ever mounted.
        (Format::Started { .. }, _) => Before::Unfinished,
    };
    if may_write {
        return Ok(Some(before));
    }
    Err(precondition(format!(
        "volume {id} is not formatted yet, and cannot be through a read-only attachment; publish it for writing once"
    )))
}

/// The same of a foreign volume. Its server tells nobody who else formats or has formatted it, and another node's record
/// is not known here: so what is there is never formatted over, not even what looks like our own broken mkfs.
pub(super) fn decide_foreign(
    volume: &Volume,
    kind: Kind,
    found: &Content,
    may_write: bool,
    formatting: Formatting,
) -> Result<Option<Before>, Status> {
    let name = &volume.name;
    let problem = match (found, &volume.format) {
        // A broken mkfs leaves a file system that cannot be mounted, or none at all.
        (Filesystem(found), _) if found == kind.as_str() => return Ok(None),
        (Filesystem(found), _) if found.parse::<Kind>().is_ok() => {
            format!("it holds {found}, not {kind}; ask for {found} as the volume's file system")
        }
        (found @ (Filesystem(_) | Other(_)), _) => format!(
            "it shows {}; it is not formatted over that: make a {kind} file system there, or zero it, at the server",
            describe(found)
        ),
        (Empty, Format::Done { fs }) => format!(
            "it is empty, but this node has seen {fs} there: its server may have lost data. It is not formatted again; \
             if that is meant, give the volume another handle"
        ),
        (Empty, _) if !may_write => {
            "it is empty, and cannot be formatted through a read-only attachment".to_owned()
        }
        (Empty, _) if formatting == Formatting::Never => format!(
            "it is empty, and the volume does not ask for a file system to be made: make {kind} there at the server, or \
             set format: {} in the volume's attributes",
            Formatting::IfEmpty
        ),
        (Empty, _) => return Ok(Some(Before::Empty)),
    };
    Err(precondition(format!("volume {name}: {problem}")))
}

fn describe(content: &Content) -> String {
    match content {
        Empty => "nothing".into(),
        Filesystem(kind) => format!("a {kind} file system"),
        Other(other) => other.clone(),
    }
}

/// What this node knows of the file systems on foreign volumes, durably: nobody else keeps that.
pub(super) struct Formats {
    directory: PathBuf,
}

impl Formats {
    pub(super) fn new(directory: PathBuf) -> Self {
        Self { directory }
    }

    fn path(&self, volume: &VolumeId) -> PathBuf {
        self.directory.join(format!("{volume}.json"))
    }

    /// A record that cannot be read is an error: what it said may have been that nothing is to be formatted.
    pub(super) fn load(&self, volume: &VolumeId) -> Result<Format, Status> {
        let path = self.path(volume);
        let text = match fs::read(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Format::Never),
            text => text.map_err(failed("read", &path))?,
        };
        serde_json::from_slice(&text)
            .map_err(|error| failed("understand", &path)(io::Error::other(error)))
    }

    pub(super) fn save(&self, volume: &VolumeId, format: &Format) -> Result<(), Status> {
        if self.load(volume)? == *format {
            return Ok(());
        }
        let path = self.path(volume);
        let text = serde_json::to_vec(format)
            .map_err(|error| failed("write", &path)(io::Error::other(error)))?;
        fs::create_dir_all(&self.directory)
            .and_then(|()| storage::replace(&path, &text))
            .map_err(failed("write", &path))
    }
}

fn failed(doing: &str, path: &Path) -> impl FnOnce(io::Error) -> Status {
    let text = format!("cannot {doing} {}", path.display());
    move |error| status(Code::Internal, format!("{text}: {error}"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::volumes::{self, VolumeOptions};

    #[test]
    fn a_foreign_volume_is_formatted_only_if_all_agree() {
        let ext4 = || Filesystem("ext4".into());
        let done = || Format::Done { fs: "ext4".into() };
        let started = || Format::Started { fs: "ext4".into() };
        let other = || Other("data that is not recognised".into());
        for (found, format, may_write, formatting, outcome) in [
            (Empty, Format::Never, true, Formatting::IfEmpty, Ok(true)),
            (Empty, started(), true, Formatting::IfEmpty, Ok(true)),
            (
                Empty,
                Format::Never,
                true,
                Formatting::Never,
                Err("format: if-empty"),
            ),
            (
                Empty,
                Format::Never,
                false,
                Formatting::IfEmpty,
                Err("read-only"),
            ),
            (
                Empty,
                done(),
                true,
                Formatting::IfEmpty,
                Err("may have lost data"),
            ),
            (ext4(), Format::Never, true, Formatting::Never, Ok(false)),
            (ext4(), started(), true, Formatting::IfEmpty, Ok(false)),
            (ext4(), done(), false, Formatting::Never, Ok(false)),
            (
                Filesystem("xfs".into()),
                done(),
                true,
                Formatting::IfEmpty,
                Err("ask for xfs"),
            ),
            (
                Filesystem("ntfs".into()),
                done(),
                true,
                Formatting::IfEmpty,
                Err("not formatted over"),
            ),
            (
                other(),
                Format::Never,
                true,
                Formatting::IfEmpty,
                Err("not formatted over"),
            ),
            (
                other(),
                started(),
                true,
                Formatting::IfEmpty,
                Err("not formatted over"),
            ),
        ] {
            let case = format!("{found:?} {format:?} {may_write} {formatting}");
            let volume = Volume {
                id: VolumeId::foreign("disk"),
                name: "disk".into(),
                size_bytes: 0,
                options: VolumeOptions {
                    content: volumes::Content::Filesystem,
                    context: BTreeMap::new(),
                },
                format,
                attachments: Vec::new(),
            };
            let decided = decide_foreign(&volume, Kind::Ext4, &found, may_write, formatting);
            match (decided, outcome) {
                (Ok(before), Ok(formats)) => assert_eq!(before.is_some(), formats, "{case}"),
                (Err(refused), Err(part)) => {
                    let message = refused.message();
                    assert!(
                        message.contains(part) && message.contains("disk"),
                        "{case}: {message}"
                    );
                }
                (decided, _) => panic!("{case}: {decided:?}"),
            }
        }
    }

    #[test]
    fn a_damaged_record_is_not_taken_for_none() {
        let directory = tempfile::tempdir().unwrap();
        let formats = Formats::new(directory.path().join("foreign"));
        let volume = VolumeId::foreign("disk");
        assert_eq!(formats.load(&volume).unwrap(), Format::Never);
        let done = Format::Done { fs: "xfs".into() };
        formats.save(&volume, &done).unwrap();
        assert_eq!(formats.load(&volume).unwrap(), done);
        fs::write(formats.path(&volume), "{").unwrap();
        assert!(formats.load(&volume).is_err());
        assert!(formats.save(&volume, &Format::Never).is_err());
    }
}
