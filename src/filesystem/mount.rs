//! Mounts, binds and unmounts.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount_bind, mount_remount};

use super::mountinfo::{MountPoint, mounted_at};
use super::tool::Tool;
use super::{FilesystemError, Kind};

/// Replaying the journal of a large file system over a slow network.
const LIMIT: Duration = Duration::from_secs(30 * 60);

/// Writing back what the page cache holds; the server may be restarting meanwhile.
const UNMOUNT_LIMIT: Duration = Duration::from_secs(30 * 60);

/// Mounts on top of each other at one place that are taken off before giving up.
const STACKED: usize = 32;

/// mount(8) knows which options are the kernel's flags and which are the file system's own.
const MOUNT: Tool = Tool {
    name: "mount",
    package: "mount",
    limit: LIMIT,
};

/// Mounts the file system of a device, with the user's `options` after ours.
pub async fn mount(
    device: &Path,
    kind: Kind,
    point: &Path,
    options: &[String],
    read_only: bool,
) -> Result<(), FilesystemError> {
    let mut all = vec![if read_only { "ro" } else { "rw" }];
    if kind == Kind::Xfs {
        // A clone has its original's UUID, and both may be on one node; that one device is not mounted twice is
        // ensured elsewhere.
        all.push("nouuid");
    }
    all.extend(options.iter().map(String::as_str));
    let all = all.join(",");
    let arguments = [
        // No helper of the kind mount.<type>: the kernel mounts all of ours.
        Path::new("-i"),
        Path::new("-t"),
        Path::new(kind.as_str()),
        Path::new("-o"),
        Path::new(&all),
        device,
        point,
    ];
    MOUNT.succeed(device, arguments).await?;
    Ok(())
}

/// Makes `source`, a directory or a device, appear at `target`, which exists; repeated, it finds that it does.
pub fn bind(source: &Path, target: &Path, read_only: bool) -> Result<(), FilesystemError> {
    let mounted = match mounted_at(target)? {
        Some(mounted) => mounted,
        None => {
            mount_bind(source, target)
                .map_err(|error| FilesystemError::io("mount at", target)(error.into()))?;
            mounted_at(target)?.ok_or_else(|| {
                FilesystemError::io("mount at", target)(std::io::ErrorKind::NotFound.into())
            })?
        }
    };
    if !read_only || mounted.is_read_only() {
        return Ok(());
    }
    // A bind mount takes its options from its source; read-only is a second step (mount(2), "Remounting").
    let flags = MountFlags::BIND | MountFlags::RDONLY | kept_flags(&mounted);
    mount_remount(target, flags, "")
        .map_err(|error| FilesystemError::io("make read-only", target)(error.into()))
}

/// The flags that a remount would clear if they were not named again.
fn kept_flags(mounted: &MountPoint) -> MountFlags {
    let flag = |option: &str| match option {
        "nosuid" => MountFlags::NOSUID,
        "nodev" => MountFlags::NODEV,
        "noexec" => MountFlags::NOEXEC,
        "noatime" => MountFlags::NOATIME,
        "nodiratime" => MountFlags::NODIRATIME,
        "relatime" => MountFlags::RELATIME,
        _ => MountFlags::empty(),
    };
    mounted.options.iter().map(|option| flag(option)).collect()
}

/// Unmounts whatever is mounted at `point`; where nothing is, does nothing. Never lazily: when it returns, what was
/// written through the mount is on its way no more.
pub async fn unmount(point: &Path) -> Result<(), FilesystemError> {
    let path: PathBuf = point.to_owned();
    let unmounting = tokio::task::spawn_blocking(move || unmount_all(&path));
    match tokio::time::timeout(UNMOUNT_LIMIT, unmounting).await {
        Ok(Ok(result)) => result,
        Ok(Err(broken)) => Err(FilesystemError::io("unmount", point)(
            std::io::Error::other(broken),
        )),
        Err(_) => Err(FilesystemError::Timeout {
            doing: "unmounting",
            subject: point.to_owned(),
            limit: UNMOUNT_LIMIT,
        }),
    }
}

fn unmount_all(point: &Path) -> Result<(), FilesystemError> {
    for _ in 0..STACKED {
        if mounted_at(point)?.is_none() {
            return Ok(());
        }
        match rustix::mount::unmount(point, UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::BUSY) => {
                return Err(FilesystemError::Busy {
                    path: point.to_owned(),
                });
            }
            // Somebody else was faster; the next look tells.
            Err(Errno::INVAL | Errno::NOENT) => {}
            Err(error) => return Err(FilesystemError::io("unmount", point)(error.into())),
        }
    }
    Err(FilesystemError::Busy {
        path: point.to_owned(),
    })
}
