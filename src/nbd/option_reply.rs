//! What servers answer to options: the reply's header and each reply's payload, both ways.

use super::codec::{Malformed, Put, Reader, text, wire_length};
use super::{BlockSizes, InfoType, MAX_STRING, OptionCode, ReplyCode, TransmissionFlags, magic};

/// The header before each reply's payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionReplyHeader {
    /// The option that is answered.
    pub option: OptionCode,
    pub code: ReplyCode,
    /// Bytes of payload that follow.
    pub length: u32,
}

impl OptionReplyHeader {
    /// Bytes on the wire: magic, option, reply, length.
    pub const LENGTH: usize = 20;

    pub fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new("option reply", bytes);
        if reader.u64()? != magic::OPTION_REPLY {
            return Err(Malformed::new("option reply", "wrong magic"));
        }
        let option = OptionCode(reader.u32()?);
        let code = ReplyCode(reader.u32()?);
        let length = reader.u32()?;
        reader.finish()?;
        Ok(Self {
            option,
            code,
            length,
        })
    }
}

/// Appends one whole reply.
pub fn put_reply(out: &mut Vec<u8>, option: OptionCode, code: ReplyCode, payload: &[u8]) {
    out.put_u64(magic::OPTION_REPLY);
    out.put_u32(option.0);
    out.put_u32(code.0);
    out.put_u32(wire_length(payload.len()));
    out.extend_from_slice(payload);
}

/// One whole reply; an error's payload is a sentence for people.
#[must_use]
pub fn reply(option: OptionCode, code: ReplyCode, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(OptionReplyHeader::LENGTH + payload.len());
    put_reply(&mut out, option, code, payload);
    out
}

/// The payload of an INFO reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Information {
    Export {
        size: u64,
        flags: TransmissionFlags,
    },
    Name(String),
    Description(String),
    BlockSize(BlockSizes),
    /// A kind we do not know; the specification wants it ignored.
    Unknown(InfoType),
}

impl Information {
    pub fn parse(payload: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new("INFO reply", payload);
        let kind = InfoType(reader.u16()?);
        let information = match kind {
            InfoType::EXPORT => {
                let (size, flags) = (reader.u64()?, TransmissionFlags(reader.u16()?));
                Self::Export { size, flags }
            }
            InfoType::NAME => Self::Name(string("INFO reply", reader.rest())?),
            InfoType::DESCRIPTION => Self::Description(string("INFO reply", reader.rest())?),
            InfoType::BLOCK_SIZE => Self::BlockSize(BlockSizes {
                minimum: reader.u32()?,
                preferred: reader.u32()?,
                maximum_payload: reader.u32()?,
            }),
            unknown => {
                reader.rest();
                Self::Unknown(unknown)
            }
        };
        reader.finish()?;
        Ok(information)
    }

    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut payload = Vec::new();
        match self {
            Self::Export { size, flags } => {
                payload.put_u16(InfoType::EXPORT.0);
                payload.put_u64(*size);
                payload.put_u16(flags.0);
            }
            Self::Name(name) => {
                payload.put_u16(InfoType::NAME.0);
                payload.extend_from_slice(name.as_bytes());
            }
            Self::Description(description) => {
                payload.put_u16(InfoType::DESCRIPTION.0);
                payload.extend_from_slice(description.as_bytes());
            }
            Self::BlockSize(sizes) => {
                payload.put_u16(InfoType::BLOCK_SIZE.0);
                payload.put_u32(sizes.minimum);
                payload.put_u32(sizes.preferred);
                payload.put_u32(sizes.maximum_payload);
            }
            Self::Unknown(kind) => payload.put_u16(kind.0),
        }
        payload
    }
}

/// The payload of a META_CONTEXT reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetaContextReply {
    /// Opaque, and valid for this connection only; 0 in answers to LIST_META_CONTEXT.
    pub id: u32,
    pub name: String,
}

impl MetaContextReply {
    pub fn parse(payload: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new("META_CONTEXT reply", payload);
        Ok(Self {
            id: reader.u32()?,
            name: string("META_CONTEXT reply", reader.rest())?,
        })
    }

    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut payload = Vec::new();
        payload.put_u32(self.id);
        payload.extend_from_slice(self.name.as_bytes());
        payload
    }
}

/// The payload of a SERVER reply: an export's name, then text for people.
pub fn parse_server(payload: &[u8]) -> Result<String, Malformed> {
    let mut reader = Reader::new("SERVER reply", payload);
    Ok(reader.string()?.to_owned())
}

/// A string that takes up the whole rest of a payload.
fn string(what: &'static str, bytes: &[u8]) -> Result<String, Malformed> {
    if bytes.len() > MAX_STRING {
        return Err(Malformed::new(what, "a string longer than 4096 bytes"));
    }
    Ok(text(what, bytes)?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn information_survives_the_wire_and_every_cut_is_noticed() {
        let flags = TransmissionFlags::HAS_FLAGS;
        let sizes = BlockSizes {
            minimum: 1,
            preferred: 4096,
            maximum_payload: 1 << 25,
        };
        for (information, length) in [
            (
                Information::Export {
                    size: u64::MAX,
                    flags,
                },
                12,
            ),
            (Information::BlockSize(sizes), 14),
        ] {
            let payload = information.encode();
            assert_eq!(payload.len(), length);
            assert_eq!(Information::parse(&payload), Ok(information));
            for end in 0..payload.len() {
                assert!(Information::parse(&payload[..end]).is_err(), "cut at {end}");
            }
        }
        for information in [
            Information::Name("a/b".into()),
            Information::Description("d".into()),
        ] {
            assert_eq!(Information::parse(&information.encode()), Ok(information));
        }
        assert_eq!(
            Information::parse(&[0, 99, 1, 2]),
            Ok(Information::Unknown(InfoType(99)))
        );
    }

    #[test]
    fn replies_survive_the_wire() {
        let context = MetaContextReply {
            id: 7,
            name: "base:allocation".into(),
        };
        assert_eq!(MetaContextReply::parse(&context.encode()), Ok(context));
        let bytes = reply(OptionCode::GO, ReplyCode::ERR_UNKNOWN, b"no");
        let header = OptionReplyHeader::parse(&bytes[..OptionReplyHeader::LENGTH]).unwrap();
        let expected = OptionReplyHeader {
            option: OptionCode::GO,
            code: ReplyCode::ERR_UNKNOWN,
            length: 2,
        };
        assert_eq!(header, expected);
        assert!(
            MetaContextReply::parse(&[0; 4101]).is_err(),
            "a name over 4096 bytes"
        );
    }
}
