//! Which of this machine's mounts are a volume's.

use std::fs::Metadata;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::host::Host;
use crate::attach::Device;
use crate::filesystem::{FilesystemError, MountPoint};

/// Where kernel nbd devices are.
const NBD_PREFIX: &str = "/dev/nbd";

/// One look at the mounts, for the volume on `device`.
pub(super) struct Mounts {
    all: Vec<MountPoint>,
    device: Option<Known>,
}

struct Known {
    path: PathBuf,
    number: Option<(u32, u32)>,
}

impl Mounts {
    pub(super) fn look(host: &dyn Host, device: Option<&Device>) -> Result<Self, FilesystemError> {
        Ok(Self {
            all: host.mount_points()?,
            device: device.map(|device| Known {
                path: device.path.clone(),
                number: std::fs::metadata(&device.path).ok().and_then(number),
            }),
        })
    }

    /// What is mounted at `path` itself, and on top.
    pub(super) fn at(&self, path: &Path) -> Option<&MountPoint> {
        self.all.iter().rev().find(|mount| mount.point == path)
    }

    /// What is mounted at `path`, if it is the volume.
    pub(super) fn ours_at(&self, path: &Path) -> Option<&MountPoint> {
        self.at(path).filter(|mount| self.is_ours(mount))
    }

    /// All places where the volume is mounted.
    pub(super) fn ours(&self) -> impl Iterator<Item = &MountPoint> {
        self.all.iter().filter(|mount| self.is_ours(mount))
    }

    /// Whether a mount is of the volume: its file system, or its device itself, bound to a file.
    ///
    /// Where the device is gone, what is still mounted of some nbd device cannot be told apart; whoever asks then does
    /// so about a place that was recorded as the volume's.
    fn is_ours(&self, mount: &MountPoint) -> bool {
        let bound = (mount.kind == "devtmpfs" || mount.kind == "tmpfs")
            .then(|| Path::new("/dev").join(mount.root.strip_prefix("/").unwrap_or(&mount.root)));
        match &self.device {
            // btrfs has a device number of its own, so the source counts as well.
            Some(device) => {
                mount.source == device.path
                    || Some(mount.device) == device.number
                    || bound.is_some_and(|bound| bound == device.path)
            }
            None => [Some(mount.source.clone()), bound]
                .iter()
                .flatten()
                .any(|path| path.to_string_lossy().starts_with(NBD_PREFIX)),
        }
    }
}

/// Major and minor number of a block device.
fn number(found: Metadata) -> Option<(u32, u32)> {
    found.file_type().is_block_device().then(|| {
        let number = found.rdev();
        (rustix::fs::major(number), rustix::fs::minor(number))
    })
}

/// `path` as the kernel would report it: its directory without symbolic links. The last component is the mount
/// point itself and is not followed.
pub(super) fn resolve(path: &Path) -> PathBuf {
    let resolved = match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => std::fs::canonicalize(parent).map(|parent| parent.join(name)),
        _ => Ok(path.to_owned()),
    };
    // Where the directory does not exist, nothing can be mounted either.
    resolved.unwrap_or_else(|_| path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mounts(device: Option<&str>) -> Mounts {
        let mount = |device, root: &str, point: &str, kind: &str, source: &str| MountPoint {
            device,
            root: root.into(),
            point: point.into(),
            options: vec!["rw".into()],
            kind: kind.into(),
            source: source.into(),
            super_options: vec!["rw".into()],
        };
        Mounts {
            all: vec![
                mount((0, 5), "/", "/dev", "devtmpfs", "udev"),
                mount((43, 0), "/", "/staging", "ext4", "/dev/nbd0"),
                mount((43, 0), "/sub", "/pod/sub", "ext4", "/dev/nbd0"),
                mount((0, 41), "/", "/btrfs", "btrfs", "/dev/nbd1"),
                mount((0, 5), "/nbd2", "/block", "devtmpfs", "udev"),
                mount((0, 7), "/", "/over", "tmpfs", "tmpfs"),
                mount((43, 0), "/", "/over", "ext4", "/dev/nbd0"),
                mount((8, 1), "/", "/disk", "ext4", "/dev/sda1"),
            ],
            device: device.map(|path| Known {
                path: path.into(),
                number: None,
            }),
        }
    }

    fn points(mounts: &Mounts) -> Vec<&str> {
        mounts.ours().filter_map(|m| m.point.to_str()).collect()
    }

    #[test]
    fn a_volume_is_known_by_source_and_by_bound_device() {
        let first = mounts(Some("/dev/nbd0"));
        assert_eq!(points(&first), ["/staging", "/pod/sub", "/over"]);
        assert!(first.ours_at(Path::new("/staging")).is_some());
        assert!(first.ours_at(Path::new("/btrfs")).is_none());
        assert_eq!(points(&mounts(Some("/dev/nbd1"))), ["/btrfs"]);
        assert_eq!(points(&mounts(Some("/dev/nbd2"))), ["/block"]);
        assert_eq!(points(&mounts(Some("/dev/nbd20"))), [""; 0]);
    }

    #[test]
    fn of_a_device_that_is_gone_only_nbd_mounts_are_taken() {
        let gone = mounts(None);
        assert!(gone.ours_at(Path::new("/disk")).is_none());
        assert!(gone.ours_at(Path::new("/dev")).is_none());
        assert!(gone.ours_at(Path::new("/block")).is_some());
    }
}
