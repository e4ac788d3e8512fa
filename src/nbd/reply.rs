//! Replies in transmission: simple ones, and the chunks of structured ones; both ways.

use super::codec::{Malformed, Put, Reader, text, wire_length};
use super::{ChunkType, Cookie, Errno, MAX_PAYLOAD, MAX_STRING, magic};

/// Bytes of a simple reply's header.
pub const SIMPLE_LENGTH: usize = 16;

/// Bytes of a chunk's header.
pub const CHUNK_LENGTH: usize = 20;

/// Bytes before the data of an OFFSET_DATA chunk; one of OFFSET_HOLE has no more than four besides.
pub const OFFSET_LENGTH: usize = CHUNK_LENGTH + 8;

/// Descriptors that one BLOCK_STATUS chunk may carry ("BLOCK_STATUS": the client may drop the connection above it).
pub const MAX_DESCRIPTORS: usize = 1 << 20;

/// The longest payload of any chunk a server may send: data and its offset, or a full BLOCK_STATUS.
pub const MAX_CHUNK: u32 = MAX_PAYLOAD + 8;

/// A simple reply's header; READ's data follows it.
#[must_use]
pub fn simple(cookie: Cookie, errno: Errno) -> [u8; SIMPLE_LENGTH] {
    let mut out = [0; SIMPLE_LENGTH];
    out[..4].copy_from_slice(&magic::SIMPLE_REPLY.to_be_bytes());
    out[4..8].copy_from_slice(&errno.0.to_be_bytes());
    out[8..].copy_from_slice(&cookie.0.to_be_bytes());
    out
}

/// The header of a chunk with `length` bytes of payload; `done` marks the last one of a reply (C58).
#[must_use]
pub fn chunk_header(
    cookie: Cookie,
    kind: ChunkType,
    done: bool,
    length: u32,
) -> [u8; CHUNK_LENGTH] {
    let mut out = [0; CHUNK_LENGTH];
    out[..4].copy_from_slice(&magic::STRUCTURED_REPLY.to_be_bytes());
    out[4..6].copy_from_slice(&u16::from(done).to_be_bytes());
    out[6..8].copy_from_slice(&kind.0.to_be_bytes());
    out[8..16].copy_from_slice(&cookie.0.to_be_bytes());
    out[16..].copy_from_slice(&length.to_be_bytes());
    out
}

fn chunk(cookie: Cookie, kind: ChunkType, done: bool, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(CHUNK_LENGTH + payload.len());
    out.extend_from_slice(&chunk_header(
        cookie,
        kind,
        done,
        wire_length(payload.len()),
    ));
    out.extend_from_slice(payload);
    out
}

/// A chunk without content: success, where nothing else ends the reply.
#[must_use]
pub fn none(cookie: Cookie) -> Vec<u8> {
    chunk(cookie, ChunkType::NONE, true, &[])
}

/// The header of a data chunk, up to and with the offset: `length` bytes of data follow. `length` is not 0.
#[must_use]
pub fn offset_data(cookie: Cookie, done: bool, offset: u64, length: u32) -> [u8; OFFSET_LENGTH] {
    let mut out = [0; OFFSET_LENGTH];
    let header = chunk_header(
        cookie,
        ChunkType::OFFSET_DATA,
        done,
        length.saturating_add(8),
    );
    out[..CHUNK_LENGTH].copy_from_slice(&header);
    out[CHUNK_LENGTH..].copy_from_slice(&offset.to_be_bytes());
    out
}

/// A chunk that says that `length` bytes read as zeroes. `length` is not 0.
#[must_use]
pub fn offset_hole(cookie: Cookie, done: bool, offset: u64, length: u32) -> Vec<u8> {
    let mut payload = Vec::with_capacity(12);
    payload.put_u64(offset);
    payload.put_u32(length);
    chunk(cookie, ChunkType::OFFSET_HOLE, done, &payload)
}

/// The answer of one meta context.
#[must_use]
pub fn block_status(cookie: Cookie, done: bool, context: u32, extents: &[Extent]) -> Vec<u8> {
    let mut payload = Vec::with_capacity(4 + 8 * extents.len());
    payload.put_u32(context);
    for extent in extents {
        payload.put_u32(extent.length);
        payload.put_u32(extent.flags);
    }
    chunk(cookie, ChunkType::BLOCK_STATUS, done, &payload)
}

/// An error that ends a structured reply, with a sentence for people.
#[must_use]
pub fn error(cookie: Cookie, errno: Errno, message: &str) -> Vec<u8> {
    let message = &message[..message.floor_char_boundary(MAX_STRING)];
    let mut payload = Vec::with_capacity(6 + message.len());
    payload.put_u32(errno.0);
    payload.put_u16(u16::try_from(message.len()).unwrap_or(0));
    payload.extend_from_slice(message.as_bytes());
    chunk(cookie, ChunkType::ERROR, true, &payload)
}

/// A run of bytes with the same status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Bytes; never 0.
    pub length: u32,
    /// For `base:allocation`: [`Extent::HOLE`] and [`Extent::ZERO`].
    pub flags: u32,
}

impl Extent {
    pub const HOLE: u32 = 1;
    pub const ZERO: u32 = 2;
}

/// The header of any reply, as a client reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyHeader {
    Simple {
        cookie: Cookie,
        errno: Errno,
    },
    /// `length` bytes of payload follow.
    Chunk {
        cookie: Cookie,
        kind: ChunkType,
        done: bool,
        length: u32,
    },
}

impl ReplyHeader {
    /// How long the header is that begins with this magic: 16 or 20 bytes.
    pub fn length(magic: [u8; 4]) -> Result<usize, Malformed> {
        match u32::from_be_bytes(magic) {
            magic::SIMPLE_REPLY => Ok(SIMPLE_LENGTH),
            magic::STRUCTURED_REPLY => Ok(CHUNK_LENGTH),
            _ => Err(Malformed::new("reply", "wrong magic")),
        }
    }

    pub fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new("reply", bytes);
        let header = match reader.u32()? {
            magic::SIMPLE_REPLY => {
                let errno = Errno(reader.u32()?);
                Self::Simple {
                    cookie: Cookie(reader.u64()?),
                    errno,
                }
            }
            magic::STRUCTURED_REPLY => {
                let flags = reader.u16()?;
                let kind = ChunkType(reader.u16()?);
                let cookie = Cookie(reader.u64()?);
                let length = reader.u32()?;
                if length > MAX_CHUNK {
                    return Err(Malformed::new(
                        "reply",
                        "a chunk longer than the largest payload",
                    ));
                }
                Self::Chunk {
                    cookie,
                    kind,
                    done: flags & 1 != 0,
                    length,
                }
            }
            _ => return Err(Malformed::new("reply", "wrong magic")),
        };
        reader.finish()?;
        Ok(header)
    }
}

/// The payload of a chunk, as a client reads it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Chunk<'a> {
    None,
    Data {
        offset: u64,
        data: &'a [u8],
    },
    Hole {
        offset: u64,
        length: u32,
    },
    BlockStatus {
        context: u32,
        extents: Vec<Extent>,
    },
    Error {
        errno: Errno,
        message: &'a str,
        offset: Option<u64>,
    },
}

impl<'a> Chunk<'a> {
    /// Reads a payload. An unknown kind of error is an error with the errno it carries; any other unknown kind
    /// means that the connection must end (C59).
    pub fn parse(kind: ChunkType, payload: &'a [u8]) -> Result<Self, Malformed> {
        let what = "chunk";
        let mut reader = Reader::new(what, payload);
        let parsed = match kind {
            ChunkType::NONE => Self::None,
            ChunkType::OFFSET_DATA => {
                let offset = reader.u64()?;
                let data = reader.rest();
                if data.is_empty() {
                    return Err(Malformed::new(what, "a data chunk without data"));
                }
                Self::Data { offset, data }
            }
            ChunkType::OFFSET_HOLE => {
                let (offset, length) = (reader.u64()?, reader.u32()?);
                if length == 0 {
                    return Err(Malformed::new(what, "a hole of no length"));
                }
                Self::Hole { offset, length }
            }
            ChunkType::BLOCK_STATUS => {
                let context = reader.u32()?;
                let count = reader.remaining() / 8;
                if !reader.remaining().is_multiple_of(8) || count == 0 || count > MAX_DESCRIPTORS {
                    return Err(Malformed::new(what, "a wrong number of extents"));
                }
                let extents = (0..count)
                    .map(|_| {
                        Ok(Extent {
                            length: reader.u32()?,
                            flags: reader.u32()?,
                        })
                    })
                    .collect::<Result<_, Malformed>>()?;
                Self::BlockStatus { context, extents }
            }
            kind if kind.is_error() => {
                let errno = Errno(reader.u32()?);
                let length = usize::from(reader.u16()?);
                let message = text(what, reader.take(length)?)?;
                let offset = match kind {
                    ChunkType::ERROR_OFFSET => Some(reader.u64()?),
                    ChunkType::ERROR => None,
                    _ => {
                        reader.rest();
                        None
                    }
                };
                Self::Error {
                    errno,
                    message,
                    offset,
                }
            }
            _ => return Err(Malformed::new(what, "an unknown kind")),
        };
        reader.finish()?;
        Ok(parsed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COOKIE: Cookie = Cookie(0x1122_3344_5566_7788);

    /// Takes a whole chunk apart again.
    fn parts(bytes: &[u8]) -> (ChunkType, bool, Chunk<'_>) {
        let header = ReplyHeader::parse(&bytes[..CHUNK_LENGTH]).unwrap();
        let ReplyHeader::Chunk {
            cookie,
            kind,
            done,
            length,
        } = header
        else {
            panic!("not a chunk: {header:?}")
        };
        assert_eq!(cookie, COOKIE, "C46");
        assert_eq!(length as usize, bytes.len() - CHUNK_LENGTH);
        (
            kind,
            done,
            Chunk::parse(kind, &bytes[CHUNK_LENGTH..]).unwrap(),
        )
    }

    #[test]
    fn c46_simple_replies_carry_the_cookie_verbatim() {
        let bytes = simple(COOKIE, Errno::EIO);
        let header = ReplyHeader::Simple {
            cookie: COOKIE,
            errno: Errno::EIO,
        };
        assert_eq!(ReplyHeader::parse(&bytes), Ok(header));
        assert_eq!(ReplyHeader::length([0x67, 0x44, 0x66, 0x98]), Ok(16));
        assert!(ReplyHeader::length([0; 4]).is_err());
    }

    #[test]
    fn c58_chunks_survive_the_wire() {
        assert_eq!(parts(&none(COOKIE)), (ChunkType::NONE, true, Chunk::None));
        let mut data = offset_data(COOKIE, false, 512, 3).to_vec();
        data.extend_from_slice(b"abc");
        let chunk = Chunk::Data {
            offset: 512,
            data: b"abc",
        };
        assert_eq!(parts(&data), (ChunkType::OFFSET_DATA, false, chunk));
        let hole = offset_hole(COOKIE, true, 4096, 8192);
        let chunk = Chunk::Hole {
            offset: 4096,
            length: 8192,
        };
        assert_eq!(parts(&hole), (ChunkType::OFFSET_HOLE, true, chunk));
        let extents = vec![
            Extent {
                length: 1,
                flags: 0,
            },
            Extent {
                length: 2,
                flags: 3,
            },
        ];
        let status = block_status(COOKIE, true, 9, &extents);
        let chunk = Chunk::BlockStatus {
            context: 9,
            extents,
        };
        assert_eq!(parts(&status), (ChunkType::BLOCK_STATUS, true, chunk));
        let long = "ü".repeat(3000);
        let (kind, done, chunk) = (ChunkType::ERROR, true, error(COOKIE, Errno::EINVAL, &long));
        let (k, d, parsed) = parts(&chunk);
        assert_eq!((k, d), (kind, done));
        let Chunk::Error {
            errno: Errno::EINVAL,
            message,
            offset: None,
        } = parsed
        else {
            panic!("{parsed:?}")
        };
        assert_eq!(message.len(), 4096, "C58: a message has at most 4096 bytes");
    }

    #[test]
    fn c58_c59_malformed_chunks_are_refused() {
        for (kind, payload) in [
            (ChunkType::NONE, &[0_u8; 1][..]),
            (ChunkType::OFFSET_DATA, &[0; 8]),
            (ChunkType::OFFSET_HOLE, &[0; 12]),
            (ChunkType::OFFSET_HOLE, &[1; 13]),
            (ChunkType::BLOCK_STATUS, &[0; 4]),
            (ChunkType::BLOCK_STATUS, &[0; 11]),
            (ChunkType::ERROR, &[0, 0, 0, 5, 0, 9]),
            (ChunkType::ERROR_OFFSET, &[0, 0, 0, 5, 0, 0]),
            (ChunkType(6), &[0; 12]),
            (ChunkType(0x7fff), &[]),
        ] {
            assert!(Chunk::parse(kind, payload).is_err(), "{kind:?} {payload:?}");
        }
        let unknown = Chunk::parse(ChunkType(0x80ff), &[0, 0, 0, 5, 0, 0, 1, 2, 3]).unwrap();
        assert_eq!(
            unknown,
            Chunk::Error {
                errno: Errno::EIO,
                message: "",
                offset: None
            }
        );
        let mut huge = chunk_header(COOKIE, ChunkType::OFFSET_DATA, true, MAX_CHUNK + 1);
        assert!(ReplyHeader::parse(&huge).is_err(), "C50");
        huge = chunk_header(COOKIE, ChunkType::OFFSET_DATA, true, MAX_CHUNK);
        assert!(ReplyHeader::parse(&huge).is_ok());
    }
}
