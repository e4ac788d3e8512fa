//! Giving a volume's files to the user that serves them.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Gid, Uid, chownat};

use super::record;

/// Gives a volume's directory, and what is in it, to a user and the group of the same number: all but the record, which
/// is its owner's own. Links are never followed: what is in the directory may be the server's doing.
pub fn give(directory: &Path, user: u32) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if !is_record(path.file_name().unwrap_or_default()) {
            give_one(&path, user)?;
        }
    }
    give_one(directory, user)
}

fn is_record(name: &OsStr) -> bool {
    name.to_string_lossy().contains(record::NAME)
}

fn give_one(path: &Path, user: u32) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        // A server removes its socket, and swaps its records, whenever it likes.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        found => {
            let found = found?;
            if found.uid() == user && found.gid() == user {
                return Ok(());
            }
        }
    }
    let (uid, gid) = (Uid::from_raw(user), Gid::from_raw(user));
    match chownat(CWD, path, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW) {
        Err(rustix::io::Errno::NOENT) => Ok(()),
        given => given.map_err(io::Error::from),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn all_but_the_record_is_given_and_no_link_is_followed() {
        let home = tempfile::tempdir().unwrap();
        let (volume, other) = (home.path().join("volume"), home.path().join("other"));
        fs::create_dir(&volume).unwrap();
        fs::write(&other, "").unwrap();
        for name in ["data", "lock", "volume.json", "volume.json.spare"] {
            fs::write(volume.join(name), "").unwrap();
        }
        symlink(&other, volume.join("control")).unwrap();
        let owner = |path: &Path| fs::symlink_metadata(path).unwrap().uid();
        let ours = owner(&other);
        give(&volume, ours).unwrap();
        // Giving files away takes root, as the agent is.
        if !rustix::process::geteuid().is_root() {
            assert!(give(&volume, ours + 1).is_err());
            return;
        }
        give(&volume, 65532).unwrap();
        give(&volume, 65532).unwrap();
        for (name, given) in [
            ("", true),
            ("data", true),
            ("lock", true),
            ("control", true),
            ("volume.json", false),
            ("volume.json.spare", false),
        ] {
            assert_eq!(owner(&volume.join(name)) == 65532, given, "{name}");
        }
        assert_eq!(owner(&other), ours);
    }
}
