//! Writing so that a crash at any point leaves the old or the new, and so that what was answered stays.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::{CWD, OFlags, RenameFlags, renameat_with};
use rustix::io::Errno;

/// Puts `bytes` in place of the file at `path`, in one step and durably. The file has mode 0600.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidFilename.into());
    };
    let fresh = directory.join(format!(".{}.new", name.display()));
    let written = write(&fresh, bytes).and_then(|()| fs::rename(&fresh, path));
    if let Err(error) = written {
        // What is half written takes room on a disk that may be full.
        let _ = fs::remove_file(&fresh);
        return Err(error);
    }
    sync(directory)
}

/// Does what [`replace`] does, without taking room on a disk that may be full: what was replaced is kept beside the
/// file, as `NAME.spare`, and overwritten the next time.
///
/// A volume on a full disk must still be detached, and a detachment is written down first. It takes room where the file
/// grows into another block, or where the file system never overwrites.
pub fn rewrite(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let Some(directory) = path.parent() else {
        return Err(io::ErrorKind::InvalidFilename.into());
    };
    let mut spare = path.as_os_str().to_owned();
    spare.push(".spare");
    let spare = Path::new(&spare);
    write(spare, bytes)?;
    match renameat_with(CWD, spare, CWD, path, RenameFlags::EXCHANGE) {
        Ok(()) => return sync(directory),
        // There is nothing to exchange it with, or the file system cannot.
        Err(Errno::NOENT | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {}
        Err(errno) => return Err(errno.into()),
    }
    fs::rename(spare, path)?;
    sync(directory)?;
    // Kept for the next time; without it, that takes room.
    let _ = write(spare, bytes);
    Ok(())
}

/// Overwrites before it cuts off: blocks that are there are used again.
fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        // A volume's directory may belong to its server: whoever writes there must not be led elsewhere.
        .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
        .open(path)?;
    file.write_all(bytes)?;
    file.set_len(bytes.len() as u64)?;
    file.sync_all()
}

/// Makes the entries of a directory durable: names made, renamed and removed.
pub(super) fn sync(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn rewriting_uses_the_same_two_files_again() {
        let home = tempfile::TempDir::new().unwrap();
        let path = home.path().join("record");
        let mut inodes = Vec::new();
        for length in [10, 5, 5000, 3, 4096, 4097, 0, 9000, 1] {
            rewrite(&path, &vec![b'x'; length]).unwrap();
            assert_eq!(fs::read(&path).unwrap(), vec![b'x'; length]);
            inodes.push(fs::metadata(&path).unwrap().ino());
        }
        assert!(inodes.windows(3).all(|three| three[0] == three[2]));
        let mut names: Vec<_> = fs::read_dir(home.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort_unstable();
        assert_eq!(names, ["record", "record.spare"]);
    }

    #[test]
    fn an_interrupted_rewriting_leaves_the_old_contents() {
        let home = tempfile::TempDir::new().unwrap();
        let (path, spare) = (home.path().join("record"), home.path().join("record.spare"));
        rewrite(&path, b"first").unwrap();
        // Killed while it wrote the spare, or before it made one.
        fs::write(&spare, b"sec").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"first");
        rewrite(&path, b"third").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"third");
        fs::remove_file(&spare).unwrap();
        rewrite(&path, b"fourth").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"fourth");
    }
}
