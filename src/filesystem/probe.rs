//! What is on a device.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

use rustix::fs::{Mode, OFlags};

use super::FilesystemError;
use super::tool::{Tool, said};

/// Bytes at each end of a device that must be readable, and zero if the device is to count as empty. Superblocks,
/// partition tables and the metadata of LVM, LUKS, MD and ZFS are all within them.
pub(super) const ENDS: u64 = 1 << 20;

/// How long the ends may take: less than the two minutes that the kubelet waits for a call.
const READ_LIMIT: Duration = Duration::from_secs(90);

const BLKID: Tool = Tool {
    name: "blkid",
    package: "util-linux",
    limit: Duration::from_secs(90),
};

/// A device that was read.
#[derive(Debug)]
pub struct Probe {
    pub size_bytes: u64,
    pub content: Content,
    /// The device's first bytes, [`ENDS`] of them or all.
    pub(super) head: Vec<u8>,
}

/// What is on a device, as far as can be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// Both ends were read and are zero, and nothing is recognised.
    Empty,
    /// One file system, by blkid's name for it.
    Filesystem(String),
    /// Anything else, in words.
    Other(String),
}

/// Reads both ends of a device and lets blkid look at it.
pub async fn probe(device: &Path) -> Result<Probe, FilesystemError> {
    let path = device.to_owned();
    let reading = tokio::task::spawn_blocking(move || read_ends(&path));
    let ends = match tokio::time::timeout(READ_LIMIT, reading).await {
        Ok(Ok(ends)) => ends?,
        Ok(Err(broken)) => {
            return Err(FilesystemError::io("read", device)(io::Error::other(
                broken,
            )));
        }
        Err(_) => {
            return Err(FilesystemError::Timeout {
                doing: "reading",
                subject: device.to_owned(),
                limit: READ_LIMIT,
            });
        }
    };
    // Without blkid's cache (-p), and never only part of the answer (no -s).
    let arguments = [
        Path::new("-p"),
        Path::new("-o"),
        Path::new("export"),
        device,
    ];
    let output = BLKID.run(device, arguments).await?;
    Ok(Probe {
        size_bytes: ends.size_bytes,
        content: classify(device, &output, ends.is_zero)?,
        head: ends.head,
    })
}

struct Ends {
    size_bytes: u64,
    head: Vec<u8>,
    is_zero: bool,
}

fn read_ends(device: &Path) -> Result<Ends, FilesystemError> {
    let mut file = File::open(device).map_err(FilesystemError::io("open", device))?;
    let size_bytes = file
        .seek(SeekFrom::End(0))
        .map_err(FilesystemError::io("find the size of", device))?;
    if size_bytes == 0 {
        return Err(FilesystemError::NoDevice {
            device: device.to_owned(),
        });
    }
    let read = |offset: u64| {
        let length = ENDS.min(size_bytes - offset);
        let mut bytes = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
        file.read_exact_at(&mut bytes, offset)
            .map(|()| bytes)
            .map_err(|source| FilesystemError::Unreadable {
                device: device.to_owned(),
                offset,
                source,
            })
    };
    let head = read(0)?;
    let tail = read(size_bytes.saturating_sub(ENDS))?;
    Ok(Ends {
        size_bytes,
        is_zero: head.iter().chain(&tail).all(|&byte| byte == 0),
        head,
    })
}

/// blkid(8) exits with 0 when it recognises something, with 2 when it does not *or cannot read*, and with 8 when
/// it recognises several things. What is neither recognised nor zero is somebody's data.
fn classify(device: &Path, output: &Output, is_zero: bool) -> Result<Content, FilesystemError> {
    let text = String::from_utf8_lossy(&output.stdout);
    let value = |key: &str| {
        text.lines()
            .filter_map(|line| line.split_once('='))
            .find_map(|(name, value)| (name == key).then(|| value.to_owned()))
    };
    match output.status.code() {
        Some(0) => Ok(
            match (value("USAGE").as_deref(), value("TYPE"), value("PTTYPE")) {
                (_, None, Some(table)) => Content::Other(format!("a partition table ({table})")),
                (Some("filesystem") | None, Some(kind), None) => Content::Filesystem(kind),
                (_, Some(kind), _) => Content::Other(kind),
                (_, None, None) => Content::Other("something that blkid recognises".into()),
            },
        ),
        Some(2) if is_zero => Ok(Content::Empty),
        Some(2) => Ok(Content::Other("data that is not recognised".into())),
        Some(8) => Ok(Content::Other(
            "signatures that contradict each other".into(),
        )),
        _ => Err(BLKID.failed(device, output.status, &said(output))),
    }
}

/// Whether somebody holds the device for himself: it is mounted, in whatever namespace, or being formatted or checked.
pub fn is_in_use(device: &Path) -> Result<bool, FilesystemError> {
    match rustix::fs::open(
        device,
        OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC,
        Mode::empty(),
    ) {
        Ok(_) => Ok(false),
        Err(rustix::io::Errno::BUSY) => Ok(true),
        Err(error) => Err(FilesystemError::io("open", device)(error.into())),
    }
}

/// Makes what was written to a device durable.
pub(super) async fn sync(device: &Path, limit: Duration) -> Result<(), FilesystemError> {
    let path: PathBuf = device.to_owned();
    let syncing = tokio::task::spawn_blocking(move || File::open(path)?.sync_all());
    match tokio::time::timeout(limit, syncing).await {
        Ok(Ok(result)) => result.map_err(FilesystemError::io("flush", device)),
        Ok(Err(broken)) => Err(FilesystemError::io("flush", device)(io::Error::other(
            broken,
        ))),
        Err(_) => Err(FilesystemError::Timeout {
            doing: "flushing",
            subject: device.to_owned(),
            limit,
        }),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::ExitStatus;

    use super::*;

    fn blkid(code: i32, stdout: &str) -> Output {
        Output {
            status: ExitStatus::from_raw(code << 8),
            stdout: stdout.into(),
            stderr: b"it said so".to_vec(),
        }
    }

    fn sparse(size: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(size).unwrap();
        file
    }

    #[test]
    fn only_zero_and_unrecognised_is_empty() {
        let device = Path::new("/dev/x");
        let filesystem = "DEVNAME=/dev/x\nUUID=1\nTYPE=ext4\nUSAGE=filesystem\n";
        let cases = [
            (blkid(2, ""), true, Content::Empty),
            (
                blkid(2, ""),
                false,
                Content::Other("data that is not recognised".into()),
            ),
            (
                blkid(0, filesystem),
                false,
                Content::Filesystem("ext4".into()),
            ),
            (
                blkid(0, filesystem),
                true,
                Content::Filesystem("ext4".into()),
            ),
            (
                blkid(0, "PTTYPE=gpt\n"),
                false,
                Content::Other("a partition table (gpt)".into()),
            ),
            (
                blkid(0, "TYPE=LVM2_member\nUSAGE=raid\n"),
                false,
                Content::Other("LVM2_member".into()),
            ),
            (
                blkid(0, "TYPE=vfat\nUSAGE=filesystem\nPTTYPE=dos\n"),
                false,
                Content::Other("vfat".into()),
            ),
            (
                blkid(0, ""),
                true,
                Content::Other("something that blkid recognises".into()),
            ),
            (
                blkid(8, ""),
                true,
                Content::Other("signatures that contradict each other".into()),
            ),
        ];
        for (output, is_zero, expected) in cases {
            assert_eq!(
                classify(device, &output, is_zero).unwrap(),
                expected,
                "{output:?}"
            );
        }
        for output in [blkid(4, ""), blkid(1, ""), blkid(127, "")] {
            let error = classify(device, &output, true).unwrap_err();
            assert!(error.to_string().contains("it said so"), "{error}");
        }
    }

    #[tokio::test]
    async fn a_byte_at_either_end_makes_a_device_not_empty() {
        let file = sparse(8 << 20);
        assert_eq!(probe(file.path()).await.unwrap().content, Content::Empty);
        for offset in [0, (1 << 20) - 1, 7 << 20, (8 << 20) - 1] {
            let file = sparse(8 << 20);
            file.as_file().write_all_at(&[1], offset).unwrap();
            let probe = probe(file.path()).await.unwrap();
            assert!(matches!(probe.content, Content::Other(_)), "{offset}");
        }
        let tiny = sparse(512);
        assert_eq!(probe(tiny.path()).await.unwrap().size_bytes, 512);
    }

    #[tokio::test]
    async fn what_cannot_be_read_is_an_error_and_never_empty() {
        let nothing = sparse(0);
        let error = probe(nothing.path()).await.unwrap_err();
        assert!(matches!(error, FilesystemError::NoDevice { .. }), "{error}");
        // A directory can be opened and has a size, but every read of it fails, as on a device whose server is gone.
        let directory = tempfile::tempdir().unwrap();
        let error = probe(directory.path()).await.unwrap_err();
        assert!(
            matches!(
                error,
                FilesystemError::Unreadable { .. } | FilesystemError::Io { .. }
            ),
            "{error}"
        );
        assert!(probe(Path::new("/nonexistent")).await.is_err());
    }
}
