//! Grows a mounted file system to the size of its device.

use std::path::Path;
use std::time::Duration;

use super::probe::Probe;
use super::tool::Tool;
use super::{FilesystemError, Kind};

const LIMIT: Duration = Duration::from_secs(30 * 60);

const fn tool(name: &'static str, package: &'static str) -> Tool {
    Tool {
        name,
        package,
        limit: LIMIT,
    }
}

/// Grows the file system that is mounted at `point` from `device`. One that fills its device already stays as it is.
pub async fn grow(device: &Path, kind: Kind, point: &Path) -> Result<(), FilesystemError> {
    let (tool, arguments) = match kind {
        // It finds by itself that the file system is mounted, and has the kernel grow it.
        Kind::Ext4 => (tool("resize2fs", "e2fsprogs"), vec![device]),
        Kind::Xfs => (tool("xfs_growfs", "xfsprogs"), vec![Path::new("-d"), point]),
        Kind::Btrfs => (
            tool("btrfs", "btrfs-progs"),
            vec![
                Path::new("filesystem"),
                Path::new("resize"),
                Path::new("max"),
                point,
            ],
        ),
    };
    tool.succeed(device, arguments).await?;
    Ok(())
}

impl Probe {
    /// Whether the file system may be smaller than the device, by more than its last, incomplete block.
    #[must_use]
    pub fn has_room_to_grow(&self, kind: Kind) -> bool {
        match extent(&self.head, kind) {
            Some((bytes, block)) => bytes.saturating_add(block) <= self.size_bytes,
            None => true,
        }
    }
}

/// Bytes of the file system, and of one block, according to the superblock in the first bytes of a device.
fn extent(head: &[u8], kind: Kind) -> Option<(u64, u64)> {
    let array = |offset: usize| head.get(offset..offset + 4)?.try_into().ok();
    let little = |offset| array(offset).map(u32::from_le_bytes).map(u64::from);
    let big = |offset| array(offset).map(u32::from_be_bytes).map(u64::from);
    match kind {
        // struct ext4_super_block at 1024: s_blocks_count_lo, s_log_block_size, s_blocks_count_hi.
        Kind::Ext4 => {
            let blocks = little(1024 + 0x4)? | little(1024 + 0x150)? << 32;
            let block = 1024_u64.checked_shl(u32::try_from(little(1024 + 0x18)?).ok()?)?;
            Some((blocks.checked_mul(block)?, block))
        }
        // struct xfs_dsb: sb_blocksize, sb_dblocks, big-endian.
        Kind::Xfs => {
            let (block, blocks) = (big(4)?, big(8)? << 32 | big(12)?);
            Some((blocks.checked_mul(block)?, block))
        }
        // struct btrfs_super_block at 64 KiB: dev_item.total_bytes, sectorsize. The device's own size counts,
        // not that of the file system.
        Kind::Btrfs => {
            let bytes = little(0x1_0000 + 0xd1)? | little(0x1_0000 + 0xd5)? << 32;
            Some((bytes, little(0x1_0000 + 0x90)?))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filesystem::{Before, format, probe};

    #[tokio::test]
    async fn the_superblock_tells_whether_the_device_has_grown() {
        for kind in Kind::ALL {
            let file = tempfile::NamedTempFile::new().unwrap();
            file.as_file().set_len(kind.minimum_size()).unwrap();
            format(file.path(), kind, Before::Empty).await.unwrap();
            let made = probe(file.path()).await.unwrap();
            let (bytes, _) = extent(&made.head, kind).unwrap();
            assert_eq!(bytes, kind.minimum_size(), "{kind}");
            assert!(!made.has_room_to_grow(kind), "{kind}");
            file.as_file().set_len(2 * kind.minimum_size()).unwrap();
            assert!(
                probe(file.path()).await.unwrap().has_room_to_grow(kind),
                "{kind}"
            );
        }
        assert_eq!(extent(&[0; 100], Kind::Ext4), None);
    }
}
