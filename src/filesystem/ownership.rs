//! Gives a volume to a group: CSI's VOLUME_MOUNT_GROUP, what Kubernetes calls fsGroup.
//!
//! ext4, xfs and btrfs have no mount option for it, so the files themselves change, as the kubelet does it for drivers
//! without this capability: everything belongs to the group, which may read and write it, and what is made in a
//! directory belongs to the group again (set-group-ID). The root comes last: when it is right, all of it is, and the
//! next time one look is enough.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, Stat, chownat, fchmod, fchown, fstat, openat, statat,
};
use rustix::io::Errno;

use super::FilesystemError;

/// For files: read and write; what may be executed by its owner, by the group too.
const FILE: Mode = Mode::RGRP.union(Mode::WGRP);
const DIRECTORY: Mode = Mode::RWXG.union(Mode::SGID);

/// Directories within each other that are descended into. PATH_MAX allows 2048.
const DEPTH: usize = 4096;

/// Makes everything at and below `root` belong to `group`, unless the root says that it does already.
///
/// Other processes may be at work there, and may have put anything there: no symbolic link is followed, and nothing but
/// directories and regular files is opened.
pub fn give_to_group(root: &Path, group: u32) -> Result<(), FilesystemError> {
    let failed =
        |error: Errno| FilesystemError::io("change the group of the files in", root)(error.into());
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::open(root, flags, Mode::empty()).map_err(failed)?;
    let found = fstat(&directory).map_err(failed)?;
    let mode = Mode::from_raw_mode(found.st_mode);
    if found.st_gid == group && mode.contains(DIRECTORY) {
        return Ok(());
    }
    let group = Gid::from_raw(group);
    give_content(&directory, group, DEPTH).map_err(failed)?;
    give(directory.as_fd(), &found, group).map_err(failed)
}

fn give_content(directory: &OwnedFd, group: Gid, depth: usize) -> Result<(), Errno> {
    if depth == 0 {
        return Err(Errno::NAMETOOLONG);
    }
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        match give_entry(directory, name, group, depth) {
            // Removed by somebody else meanwhile.
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn give_entry(directory: &OwnedFd, name: &CStr, group: Gid, depth: usize) -> Result<(), Errno> {
    let found = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let kind = FileType::from_raw_mode(found.st_mode);
    if !matches!(kind, FileType::Directory | FileType::RegularFile) {
        // Opening a device or a pipe does things. Their group changes, and that of the link, not of what it names.
        return chownat(
            directory,
            name,
            None,
            Some(group),
            AtFlags::SYMLINK_NOFOLLOW,
        );
    }
    let flags =
        OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = openat(directory, name, flags, Mode::empty())?;
    let found = fstat(&file)?;
    if FileType::from_raw_mode(found.st_mode) == FileType::Directory {
        give_content(&file, group, depth - 1)?;
    }
    give(file.as_fd(), &found, group)
}

/// The group first: changing it takes the set-ID bits away.
fn give(file: BorrowedFd<'_>, found: &Stat, group: Gid) -> Result<(), Errno> {
    let mode = Mode::from_raw_mode(found.st_mode);
    let wanted = match FileType::from_raw_mode(found.st_mode) {
        FileType::Directory => mode | DIRECTORY,
        FileType::RegularFile if mode.contains(Mode::XUSR) => mode | FILE | Mode::XGRP,
        FileType::RegularFile => mode | FILE,
        _ => return Ok(()),
    };
    fchown(file, None, Some(group))?;
    fchmod(file, wanted)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;

    #[test]
    fn all_of_it_belongs_to_the_group_and_links_are_not_followed() {
        let outside = tempfile::tempdir().unwrap();
        let victim = outside.path().join("victim");
        fs::write(&victim, "").unwrap();
        fs::set_permissions(&victim, fs::Permissions::from_mode(0o600)).unwrap();
        let root = tempfile::tempdir().unwrap();
        let deep = root.path().join("a/b");
        fs::create_dir_all(&deep).unwrap();
        for (name, mode) in [("data", 0o600), ("program", 0o700)] {
            fs::write(deep.join(name), "").unwrap();
            fs::set_permissions(deep.join(name), fs::Permissions::from_mode(mode)).unwrap();
        }
        symlink(&victim, deep.join("link")).unwrap();
        symlink("nowhere", deep.join("dangling")).unwrap();

        // Our own group: the only one that is allowed to whoever runs this.
        let group = fs::metadata(&victim).unwrap().gid();
        give_to_group(root.path(), group).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
        assert_eq!(mode(&deep.join("data")), 0o660);
        assert_eq!(mode(&deep.join("program")), 0o770);
        for directory in [root.path(), &root.path().join("a"), &deep] {
            assert_eq!(mode(directory) & 0o2070, 0o2070, "{}", directory.display());
        }
        assert_eq!(mode(&victim), 0o600);
    }

    #[test]
    fn a_root_that_is_right_is_not_descended_into() {
        let root = tempfile::tempdir().unwrap();
        let group = fs::metadata(root.path()).unwrap().gid();
        give_to_group(root.path(), group).unwrap();
        let later = root.path().join("later");
        fs::write(&later, "").unwrap();
        fs::set_permissions(&later, fs::Permissions::from_mode(0o600)).unwrap();
        give_to_group(root.path(), group).unwrap();
        assert_eq!(fs::metadata(&later).unwrap().mode() & 0o777, 0o600);
    }
}
