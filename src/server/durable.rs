//! Small records that are either the old ones or the new ones, whenever the machine stops, and that can be replaced
//! on a full disk.
//!
//! A revocation must not fail because volumes have used up the pool. So each record has a spare of its own length
//! beside it: the new contents go into the blocks that the spare has already, and then the two change places.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

/// Records are padded with newlines to a multiple of this, so that they seldom need more room than they have.
const BLOCK: usize = 4096;

/// Replaces the contents of a text file, up to trailing newlines. When this returns `Ok`, the new contents survive a
/// loss of power; when it fails, the old ones do.
pub(super) fn replace(path: &Path, contents: &[u8]) -> io::Result<()> {
    let spare = beside(path, ".spare");
    let used = std::fs::metadata(path).map_or(0, |metadata| metadata.len());
    let used = usize::try_from(used).unwrap_or(0);
    let mut padded = contents.to_vec();
    padded.resize(contents.len().max(used).next_multiple_of(BLOCK), b'\n');
    if exchange(path, &spare, &padded)? {
        return sync_directory(path);
    }
    let fresh = beside(path, ".new");
    write(&File::create(&fresh)?, &padded)?;
    std::fs::rename(&fresh, path)?;
    sync_directory(path)?;
    // Without it the next time is like this one, and needs room.
    if let Err(error) = File::create(&spare).and_then(|file| write(&file, &padded)) {
        let _ = std::fs::remove_file(&spare);
        tracing::warn!(file = %spare.display(), "no room set aside for a record: {error}");
    }
    Ok(())
}

/// Whether it could be done in the spare's room.
fn exchange(path: &Path, spare: &Path, contents: &[u8]) -> io::Result<bool> {
    let file = match File::options().write(true).open(spare) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    write(&file, contents)?;
    // A spare that was made for longer contents has old ones behind the new.
    file.set_len(contents.len() as u64)?;
    file.sync_all()?;
    match renameat_with(CWD, spare, CWD, path, RenameFlags::EXCHANGE) {
        Ok(()) => Ok(true),
        Err(Errno::NOENT | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

fn write(mut file: &File, contents: &[u8]) -> io::Result<()> {
    file.write_all(contents)?;
    file.sync_all()
}

fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_contents_are_there_whatever_was_before() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("record");
        for length in [10, 5, 5000, 3, 4096, 4097, 0, 9000, 1] {
            replace(&path, &vec![b'x'; length]).unwrap();
            let read = std::fs::read_to_string(&path).unwrap();
            assert_eq!(read.trim_end().len(), length);
        }
        let names = std::fs::read_dir(directory.path()).unwrap();
        let mut names: Vec<_> = names.map(|entry| entry.unwrap().file_name()).collect();
        names.sort_unstable();
        assert_eq!(names, ["record", "record.spare"]);
    }

    #[test]
    fn an_interrupted_write_leaves_the_old_contents() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("record");
        replace(&path, b"first").unwrap();
        // Killed while it wrote the spare, or before it made one.
        std::fs::write(directory.path().join("record.spare"), b"sec").unwrap();
        assert!(std::fs::read(&path).unwrap().starts_with(b"first\n"));
        replace(&path, b"third").unwrap();
        assert!(std::fs::read(&path).unwrap().starts_with(b"third\n"));
        std::fs::remove_file(directory.path().join("record.spare")).unwrap();
        replace(&path, b"fourth").unwrap();
        assert!(std::fs::read(&path).unwrap().starts_with(b"fourth\n"));
    }
}
