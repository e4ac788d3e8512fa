//! How full a file system is, and how large a device.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::path::Path;

use super::FilesystemError;

/// What statvfs(2) says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    pub total_bytes: u64,
    /// Bytes that an ordinary user can still write.
    pub available_bytes: u64,
    pub used_bytes: u64,
    /// 0 where the file system does not count inodes, as btrfs.
    pub total_inodes: u64,
    pub free_inodes: u64,
}

/// How full the file system is that `path` is on.
pub fn usage(path: &Path) -> Result<Usage, FilesystemError> {
    let found = rustix::fs::statvfs(path)
        .map_err(|error| FilesystemError::io("find the usage of", path)(error.into()))?;
    let bytes = |blocks: u64| blocks.saturating_mul(found.f_frsize);
    Ok(Usage {
        total_bytes: bytes(found.f_blocks),
        available_bytes: bytes(found.f_bavail),
        used_bytes: bytes(found.f_blocks.saturating_sub(found.f_bfree)),
        total_inodes: found.f_files,
        free_inodes: found.f_ffree,
    })
}

/// Bytes of a block device.
pub fn device_size(device: &Path) -> Result<u64, FilesystemError> {
    File::open(device)
        .and_then(|mut file| file.seek(SeekFrom::End(0)))
        .map_err(FilesystemError::io("find the size of", device))
}
