//! The file systems that Hawser makes.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A file system that Hawser makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    #[default]
    Ext4,
    Xfs,
    Btrfs,
}

/// A text that names no file system that Hawser makes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("file system {0:?} is none of ext4, xfs, btrfs")]
pub struct UnknownKind(String);

impl Kind {
    pub const ALL: [Self; 3] = [Self::Ext4, Self::Xfs, Self::Btrfs];

    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
        }
    }

    /// Bytes of the smallest device that is worth formatting. mkfs.xfs (xfsprogs 5.19) refuses less than 300 MiB, and
    /// mkfs.btrfs (btrfs-progs 6) less than about 109 MiB; ext4 would do with less than it is given here.
    #[must_use]
    pub const fn minimum_size(self) -> u64 {
        match self {
            Self::Ext4 => 16 << 20,
            Self::Xfs => 300 << 20,
            Self::Btrfs => 128 << 20,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Kind {
    type Err = UnknownKind;

    fn from_str(text: &str) -> Result<Self, UnknownKind> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.as_str() == text)
            .ok_or_else(|| UnknownKind(text.chars().take(64).collect()))
    }
}
