//! Makes a file system.

use std::path::Path;
use std::time::Duration;

use super::probe::sync;
use super::tool::Tool;
use super::{FilesystemError, Kind};

/// mkfs writes megabytes, not the whole device; on a slow network that is minutes, not hours.
const LIMIT: Duration = Duration::from_secs(30 * 60);

/// What was on the device before, which the caller has made sure of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Before {
    /// Nothing: mkfs itself looks once more, and refuses when it finds something.
    Empty,
    /// An mkfs that was broken off, never mounted: it may be overwritten.
    Unfinished,
}

fn tool(kind: Kind) -> Tool {
    let (name, package) = match kind {
        Kind::Ext4 => ("mkfs.ext4", "e2fsprogs"),
        Kind::Xfs => ("mkfs.xfs", "xfsprogs"),
        Kind::Btrfs => ("mkfs.btrfs", "btrfs-progs"),
    };
    Tool {
        name,
        package,
        limit: LIMIT,
    }
}

/// None discards the device first: it is new and thin already, and a discard of terabytes takes long.
fn options(kind: Kind, before: Before) -> Vec<&'static str> {
    let mut options = match kind {
        // No blocks reserved for root, as on a data disk. The inode tables and the journal are zeroed by the kernel
        // as they come into use, instead of being sent over the network now; the journal's checksums tell its own
        // blocks from older ones. After an error the file system turns read-only rather than going on.
        Kind::Ext4 => vec![
            "-q",
            "-m",
            "0",
            "-e",
            "remount-ro",
            "-E",
            "nodiscard,lazy_itable_init=1,lazy_journal_init=1",
        ],
        Kind::Xfs => vec!["-q", "-K"],
        Kind::Btrfs => vec!["-q", "-K"],
    };
    if before == Before::Unfinished {
        options.push(match kind {
            Kind::Ext4 => "-F",
            Kind::Xfs | Kind::Btrfs => "-f",
        });
    }
    options
}

/// Makes a file system, and returns when it is durable.
pub async fn format(device: &Path, kind: Kind, before: Before) -> Result<(), FilesystemError> {
    let options = options(kind, before);
    let arguments = options.iter().map(Path::new).chain([device]);
    tool(kind).succeed(device, arguments).await?;
    sync(device, LIMIT).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filesystem::{Content, probe};

    /// A device as far as mkfs cares.
    fn sparse(size: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(size).unwrap();
        file
    }

    #[tokio::test]
    async fn each_kind_is_made_on_its_smallest_device_and_recognised() {
        for kind in Kind::ALL {
            let file = sparse(kind.minimum_size());
            format(file.path(), kind, Before::Empty).await.unwrap();
            let probe = probe(file.path()).await.unwrap();
            assert_eq!(probe.content, Content::Filesystem(kind.to_string()));
        }
    }

    #[tokio::test]
    async fn an_unfinished_one_may_be_made_again() {
        for kind in Kind::ALL {
            let file = sparse(kind.minimum_size());
            format(file.path(), kind, Before::Empty).await.unwrap();
            format(file.path(), kind, Before::Unfinished).await.unwrap();
        }
    }

    #[tokio::test]
    async fn xfs_and_btrfs_refuse_what_is_not_empty_on_their_own() {
        // mke2fs asks only where it has a terminal; the probe before it is what protects.
        for kind in [Kind::Xfs, Kind::Btrfs] {
            let file = sparse(kind.minimum_size());
            format(file.path(), Kind::Ext4, Before::Empty)
                .await
                .unwrap();
            let error = format(file.path(), kind, Before::Empty).await.unwrap_err();
            assert!(matches!(error, FilesystemError::Tool { .. }), "{error}");
        }
    }
}
