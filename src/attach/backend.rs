//! The backend identifier: the only reliable link between a device's number and a volume (K10).

use std::fmt;
use std::str::FromStr;

use crate::volumes::{AttachmentId, VolumeId};

const PREFIX: &str = "hawser:";

/// `hawser:<volume id>/<attachment id>`, as `/sys/block/nbdN/backend` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Backend {
    pub(super) volume: VolumeId,
    pub(super) attachment: AttachmentId,
}

/// A device that is not Hawser's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NotOurs;

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}/{}", self.volume, self.attachment)
    }
}

impl FromStr for Backend {
    type Err = NotOurs;

    fn from_str(text: &str) -> Result<Self, NotOurs> {
        let names = text.strip_prefix(PREFIX).ok_or(NotOurs)?;
        let (volume, attachment) = names.split_once('/').ok_or(NotOurs)?;
        Ok(Self {
            volume: volume.parse().map_err(|_| NotOurs)?,
            attachment: attachment.parse().map_err(|_| NotOurs)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn k10_only_our_own_identifiers_are_read() {
        let backend = Backend {
            volume: VolumeId::from_bytes([1; 16]),
            attachment: AttachmentId::from_bytes([2; 16]),
        };
        let text = backend.to_string();
        assert_eq!(
            text,
            "hawser:vol-01010101010101010101010101010101/att-02020202020202020202020202020202"
        );
        assert_eq!(text.parse(), Ok(backend));
        for other in ["", "hawser:", "rbd:pool/image", &text[7..], &text[..60]] {
            assert_eq!(other.parse::<Backend>(), Err(NotOurs), "{other}");
        }
    }
}
