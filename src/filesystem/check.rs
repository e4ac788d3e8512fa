//! Checks a file system before it is mounted.

use std::path::Path;
use std::time::Duration;

use super::tool::{Tool, said};
use super::{FilesystemError, Kind};

/// A full check of a large file system; mostly it is a look at the superblock and the replay of a journal.
const E2FSCK: Tool = Tool {
    name: "e2fsck",
    package: "e2fsprogs",
    limit: Duration::from_secs(2 * 3600),
};

/// Checks and repairs what can be repaired without asking. The caller has the device for itself: nobody, on no node,
/// has it mounted.
///
/// xfs and btrfs check themselves when they are mounted, and their tools are not meant to run before it.
pub async fn check(device: &Path, kind: Kind) -> Result<(), FilesystemError> {
    if kind != Kind::Ext4 {
        return Ok(());
    }
    let output = E2FSCK.run(device, [Path::new("-p"), device]).await?;
    match output.status.code() {
        Some(0) => Ok(()),
        // fsck(8): 1 is "errors corrected".
        Some(1) => {
            tracing::warn!(device = %device.display(), output = said(&output), "file system repaired");
            Ok(())
        }
        // 4 is "errors left uncorrected".
        Some(code) if code & 4 != 0 => Err(FilesystemError::Damaged {
            kind,
            device: device.to_owned(),
            output: said(&output),
        }),
        _ => Err(E2FSCK.failed(device, output.status, &said(&output))),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::filesystem::{Before, format};

    #[tokio::test]
    async fn a_sound_file_system_passes_and_a_broken_one_does_not() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(16 << 20).unwrap();
        format(file.path(), Kind::Ext4, Before::Empty)
            .await
            .unwrap();
        check(file.path(), Kind::Ext4).await.unwrap();
        // The superblock; preening does not look for a copy of it.
        file.as_file().write_all_at(&[0; 1024], 1024).unwrap();
        let error = check(file.path(), Kind::Ext4).await.unwrap_err();
        assert!(
            matches!(
                error,
                FilesystemError::Damaged { .. } | FilesystemError::Tool { .. }
            ),
            "{error}"
        );
    }
}
