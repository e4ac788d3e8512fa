//! What can go wrong between a device and a mounted file system.

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

/// Why a file system could not be probed, made, checked, mounted or grown.
#[derive(Debug, thiserror::Error)]
pub enum FilesystemError {
    #[error("{tool} is not installed here; it is in the package {package}")]
    ToolMissing {
        tool: &'static str,
        package: &'static str,
    },
    #[error("{tool} on {subject} failed ({exit}): {output}")]
    Tool {
        tool: &'static str,
        subject: PathBuf,
        exit: ExitStatus,
        /// What it wrote to its standard error, or else its output; its end, if that was long.
        output: String,
    },
    #[error("{doing} {subject} did not end within {} s", limit.as_secs())]
    Timeout {
        doing: &'static str,
        subject: PathBuf,
        limit: Duration,
    },
    #[error(
        "{device} cannot be read at byte {offset}; it is not touched, for it must not be taken for an empty device"
    )]
    Unreadable {
        device: PathBuf,
        offset: u64,
        #[source]
        source: io::Error,
    },
    #[error("{device} has a size of 0 bytes: it is not connected")]
    NoDevice { device: PathBuf },
    #[error(
        "the {kind} file system on {device} has errors that e2fsck does not repair by itself; unpublish the volume, \
         and repair it by hand: {output}"
    )]
    Damaged {
        kind: super::Kind,
        device: PathBuf,
        output: String,
    },
    #[error("{path} is in use")]
    Busy { path: PathBuf },
    #[error("{doing} {path}")]
    Io {
        doing: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl FilesystemError {
    /// For `map_err`: an I/O error while `doing` something with `path`.
    pub(super) fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            doing,
            path: path.to_owned(),
            source,
        }
    }
}
