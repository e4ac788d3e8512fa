//! Secrets as directories, in the layout in which Kubernetes mounts them: the files are links through `..data`, a link
//! that is replaced in one step, so that no reader ever sees a new certificate with an old key.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::error::CertificateError;
use super::secret::Side;

/// The link whose replacement is the update.
const DATA: &str = "..data";

fn failed(path: &Path) -> impl FnOnce(io::Error) -> CertificateError {
    let path = path.to_owned();
    move |source| CertificateError::File { path, source }
}

/// Where a directory's files are at this moment.
fn snapshot(directory: &Path) -> PathBuf {
    fs::read_link(directory.join(DATA))
        .map_or_else(|_| directory.to_owned(), |target| directory.join(target))
}

/// Reads the parts that are there, unchecked, each at most one byte longer than `limit`.
pub fn read_secret(
    directory: &Path,
    side: Side,
    limit: usize,
) -> Result<BTreeMap<String, Vec<u8>>, CertificateError> {
    fs::metadata(directory).map_err(failed(directory))?;
    let snapshot = snapshot(directory);
    let mut parts = BTreeMap::new();
    for (name, alias) in side.parts() {
        for file in [name, alias] {
            let path = snapshot.join(file);
            match File::open(&path) {
                Ok(open) => {
                    let mut bytes = Vec::new();
                    open.take(limit as u64 + 1)
                        .read_to_end(&mut bytes)
                        .map_err(failed(&path))?;
                    parts.insert(name.to_owned(), bytes);
                    break;
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(failed(&path)(error)),
            }
        }
    }
    Ok(parts)
}

/// A value that changes whenever the files of a Secret do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stamp(Vec<Option<FileStamp>>);

/// Device, inode, length, time of the last change.
type FileStamp = (u64, u64, u64, Option<SystemTime>);

impl Stamp {
    pub(super) fn of(directory: &Path, side: Side) -> Self {
        let stamps = side.parts().into_iter().flat_map(|(name, alias)| {
            [name, alias].map(|file| {
                let metadata = fs::metadata(directory.join(file)).ok()?;
                Some((
                    metadata.dev(),
                    metadata.ino(),
                    metadata.len(),
                    metadata.modified().ok(),
                ))
            })
        });
        Self(stamps.collect())
    }
}

/// Writes a Secret's parts so that a reader, or a crash at any point, sees all of the old or all of the new ones.
/// The directory has mode 0700, the files 0600.
pub fn write_secret(
    directory: &Path,
    parts: &BTreeMap<String, Vec<u8>>,
) -> Result<(), CertificateError> {
    let private = |path: &Path| {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(failed(path))
    };
    private(directory)?;
    let nanoseconds = SystemTime::UNIX_EPOCH
        .elapsed()
        .map_or(0, |since| since.as_nanos());
    let version = format!("..{}-{nanoseconds}", std::process::id());
    let fresh = directory.join(&version);
    private(&fresh)?;
    for (name, bytes) in parts {
        let path = fresh.join(name);
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(failed(&path))?;
        file.write_all(bytes).map_err(failed(&path))?;
        file.sync_all().map_err(failed(&path))?;
    }
    sync(&fresh)?;
    let next = directory.join("..data_tmp");
    remove(&next)?;
    symlink(&version, &next).map_err(failed(&next))?;
    let data = directory.join(DATA);
    fs::rename(&next, &data).map_err(failed(&data))?;
    for name in parts.keys() {
        let link = directory.join(name);
        if fs::symlink_metadata(&link).is_err() {
            symlink(Path::new(DATA).join(name), &link).map_err(failed(&link))?;
        }
    }
    sync(directory)?;
    remove_others(directory, &version)
}

/// Removes what earlier writes left, whole or half.
fn remove_others(directory: &Path, version: &str) -> Result<(), CertificateError> {
    for entry in fs::read_dir(directory).map_err(failed(directory))? {
        let entry = entry.map_err(failed(directory))?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if is_directory && name.starts_with("..") && name != version {
            fs::remove_dir_all(entry.path()).map_err(failed(&entry.path()))?;
        }
    }
    Ok(())
}

fn remove(path: &Path) -> Result<(), CertificateError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(path)(error)),
        _ => Ok(()),
    }
}

fn sync(directory: &Path) -> Result<(), CertificateError> {
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(failed(directory))
}
