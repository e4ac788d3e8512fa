//! What an export is to both sides: its name, its size, what it can do, and the meta contexts known to us.

use std::fmt;

use super::codec::text;
use super::{MAX_STRING, TransmissionFlags};

/// The name of an export: UTF-8 without NUL, at most 4096 bytes; the empty name is the default export.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ExportName(String);

/// A text that no export can have as its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an export's name has at most 4096 bytes of UTF-8 without NUL")]
pub struct InvalidExportName;

impl ExportName {
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<&str> for ExportName {
    type Error = InvalidExportName;

    fn try_from(name: &str) -> Result<Self, InvalidExportName> {
        Self::try_from(name.as_bytes())
    }
}

impl TryFrom<&[u8]> for ExportName {
    type Error = InvalidExportName;

    fn try_from(name: &[u8]) -> Result<Self, InvalidExportName> {
        if name.len() > MAX_STRING {
            return Err(InvalidExportName);
        }
        Ok(Self(
            text("export name", name)
                .map_err(|_| InvalidExportName)?
                .to_owned(),
        ))
    }
}

impl fmt::Display for ExportName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ExportName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// What INFO_BLOCK_SIZE says, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSizes {
    pub minimum: u32,
    pub preferred: u32,
    pub maximum_payload: u32,
}

impl BlockSizes {
    /// Whether the three keep the rules of "Block size constraints".
    #[must_use]
    pub fn is_valid(self) -> bool {
        self.minimum.is_power_of_two()
            && self.minimum <= 1 << 16
            && self.preferred.is_power_of_two()
            && self.preferred >= self.minimum.max(512)
            && (self.maximum_payload == u32::MAX
                || self.maximum_payload >= self.preferred
                    && self.maximum_payload.is_multiple_of(self.minimum))
    }
}

/// What a server says of an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportInfo {
    /// Bytes.
    pub size: u64,
    /// Without SEND_DF: that depends on the session, and the state machine adds it.
    pub flags: TransmissionFlags,
    pub block_sizes: Option<BlockSizes>,
    pub description: Option<String>,
}

/// The meta contexts this implementation knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MetaContext {
    BaseAllocation,
}

impl MetaContext {
    pub const ALL: [Self; 1] = [Self::BaseAllocation];

    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::BaseAllocation => "base:allocation",
        }
    }

    /// The contexts a query selects. In LIST a bare namespace is a wildcard; in SET it selects nothing.
    pub(super) fn selected_by(query: &str, wildcard: bool) -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(move |context| {
            query == context.name()
                || wildcard
                    && query.strip_suffix(':').is_some_and(|namespace| {
                        context
                            .name()
                            .split_once(':')
                            .is_some_and(|(own, _)| own == namespace)
                    })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn c9_names_are_bounded() {
        assert!(ExportName::try_from("x".repeat(4096).as_str()).is_ok());
        assert!(ExportName::try_from("x".repeat(4097).as_str()).is_err());
        assert!(ExportName::try_from("a\0b").is_err());
        assert!(ExportName::try_from(&b"\xff\xfe"[..]).is_err());
        assert!(ExportName::try_from("").is_ok());
    }

    #[test]
    fn c38_block_sizes_keep_the_rules() {
        let sizes = |minimum, preferred, maximum_payload| {
            BlockSizes {
                minimum,
                preferred,
                maximum_payload,
            }
            .is_valid()
        };
        assert!(sizes(1, 4096, 1 << 25));
        assert!(sizes(512, 512, u32::MAX));
        for bad in [
            (0, 4096, 1 << 25),
            (3, 4096, 1 << 25),
            (1 << 17, 1 << 17, 1 << 25),
        ] {
            assert!(!sizes(bad.0, bad.1, bad.2), "{bad:?}");
        }
        assert!(!sizes(1, 256, 1 << 25), "preferred below 512");
        assert!(!sizes(512, 4096, 1000), "maximum below preferred");
        assert!(
            !sizes(512, 4096, 4097),
            "maximum not a multiple of the minimum"
        );
    }
}
