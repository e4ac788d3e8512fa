//! What clients say during negotiation: the option's header and each option's payload, both ways.

use super::codec::{Malformed, Put, Reader, wire_length};
use super::{ExportName, InfoType, OptionCode, magic};

/// The header before each option's payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionHeader {
    pub code: OptionCode,
    /// Bytes of payload that follow; as the peer claims it, not yet believed.
    pub length: u32,
}

impl OptionHeader {
    /// Bytes on the wire: magic, option, length.
    pub const LENGTH: usize = 16;

    /// Reads a header; a wrong magic means that the two sides are out of step, so the connection must end (C5).
    pub fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new("option header", bytes);
        if reader.u64()? != magic::IHAVEOPT {
            return Err(Malformed::new("option header", "no IHAVEOPT magic"));
        }
        let header = Self {
            code: OptionCode(reader.u32()?),
            length: reader.u32()?,
        };
        reader.finish()?;
        Ok(header)
    }

    /// An option with its payload, ready to send.
    #[must_use]
    pub fn encode(code: OptionCode, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(Self::LENGTH + payload.len());
        bytes.put_u64(magic::IHAVEOPT);
        bytes.put_u32(code.0);
        bytes.put_u32(wire_length(payload.len()));
        bytes.extend_from_slice(payload);
        bytes
    }
}

/// The payload of INFO and GO.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GoRequest {
    pub export: ExportName,
    pub information: Vec<InfoType>,
}

impl GoRequest {
    /// Reads the payload: the name fits it and the requests are exactly the rest (C10).
    pub fn parse(payload: &[u8]) -> Result<Self, Malformed> {
        let what = "INFO or GO option";
        let mut reader = Reader::new(what, payload);
        let export = ExportName::try_from(reader.string()?)
            .map_err(|_| Malformed::new(what, "not an export's name"))?;
        let count = usize::from(reader.u16()?);
        if reader.remaining() != 2 * count {
            return Err(Malformed::new(
                what,
                "the number of requests does not match the length",
            ));
        }
        let information = (0..count)
            .map(|_| reader.u16().map(InfoType))
            .collect::<Result<_, _>>()?;
        reader.finish()?;
        Ok(Self {
            export,
            information,
        })
    }

    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut payload = Vec::new();
        payload.put_string(self.export.as_str());
        payload.put_u16(u16::try_from(self.information.len()).unwrap_or(u16::MAX));
        for kind in self.information.iter().take(usize::from(u16::MAX)) {
            payload.put_u16(kind.0);
        }
        payload
    }
}

/// The payload of LIST_META_CONTEXT and SET_META_CONTEXT.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetaContextQuery {
    pub export: ExportName,
    pub queries: Vec<String>,
}

impl MetaContextQuery {
    /// Reads the payload; each query is `namespace:leaf`, and its length stays inside the option (C43).
    pub fn parse(payload: &[u8]) -> Result<Self, Malformed> {
        let what = "meta context option";
        let mut reader = Reader::new(what, payload);
        let export = ExportName::try_from(reader.string()?)
            .map_err(|_| Malformed::new(what, "not an export's name"))?;
        let count = reader.u32()?;
        // A query takes four bytes at least: this bounds the loop by what was really sent.
        if u64::from(count) * 4 > reader.remaining() as u64 {
            return Err(Malformed::new(
                what,
                "more queries than the option has room for",
            ));
        }
        let mut queries = Vec::new();
        for _ in 0..count {
            let query = reader.string()?;
            if !query.contains(':') {
                return Err(Malformed::new(what, "a query without namespace"));
            }
            queries.push(query.to_owned());
        }
        reader.finish()?;
        Ok(Self { export, queries })
    }

    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut payload = Vec::new();
        payload.put_string(self.export.as_str());
        payload.put_u32(wire_length(self.queries.len()));
        for query in &self.queries {
            payload.put_string(query);
        }
        payload
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> ExportName {
        ExportName::try_from(text).unwrap()
    }

    #[test]
    fn headers_survive_the_wire_and_c5_wrong_magic_is_refused() {
        let bytes = OptionHeader::encode(OptionCode::LIST, b"xy");
        let header = OptionHeader::parse(&bytes[..OptionHeader::LENGTH]).unwrap();
        assert_eq!(
            header,
            OptionHeader {
                code: OptionCode::LIST,
                length: 2
            }
        );
        let mut wrong = bytes[..OptionHeader::LENGTH].to_vec();
        wrong[0] ^= 1;
        assert!(OptionHeader::parse(&wrong).is_err());
    }

    #[test]
    fn c10_go_is_refused_when_its_parts_do_not_fit() {
        let good = GoRequest {
            export: name("vol/att"),
            information: vec![InfoType::BLOCK_SIZE, InfoType(77)],
        };
        let payload = good.encode();
        assert_eq!(GoRequest::parse(&payload), Ok(good));
        for end in 0..payload.len() {
            assert!(GoRequest::parse(&payload[..end]).is_err(), "cut at {end}");
        }
        for length in [0xffff_ffff_u32, 0x8000_0000, 8, 10, 4097] {
            let mut wrong = payload.clone();
            wrong[..4].copy_from_slice(&length.to_be_bytes());
            assert!(GoRequest::parse(&wrong).is_err(), "name length {length}");
        }
    }

    #[test]
    fn c43_queries_stay_inside_the_option() {
        let good = MetaContextQuery {
            export: name(""),
            queries: vec!["base:allocation".into(), "x:".into()],
        };
        let payload = good.encode();
        assert_eq!(MetaContextQuery::parse(&payload), Ok(good));
        for end in 0..payload.len() {
            assert!(
                MetaContextQuery::parse(&payload[..end]).is_err(),
                "cut at {end}"
            );
        }
        let mut many = payload.clone();
        many[4..8].copy_from_slice(&u32::MAX.to_be_bytes());
        assert!(MetaContextQuery::parse(&many).is_err(), "4 Gi queries");
        let bare = MetaContextQuery {
            export: name(""),
            queries: vec!["base".into()],
        };
        assert!(MetaContextQuery::parse(&bare.encode()).is_err(), "no colon");
    }
}
