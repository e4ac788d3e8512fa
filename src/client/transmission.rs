//! Transmission in userspace, one request at a time: for verification.

use super::secure::Secure;
use super::{ClientError, Reason, Step, Target};
use crate::nbd::client::Transmission;
use crate::nbd::codec::{Malformed, wire_length};
use crate::nbd::reply::{Chunk, Extent, MAX_DESCRIPTORS, ReplyHeader};
use crate::nbd::request::RawRequest;
use crate::nbd::{Command, CommandFlags, Cookie, Errno};

/// Bytes of a reply beyond what was asked for: headers of chunks, and sentences for people.
const OVERHEAD: u32 = 64 << 10;

/// A session in transmission.
#[derive(Debug)]
pub struct Transmitting {
    target: Target,
    secure: Secure,
    transmission: Transmission,
    cookie: u64,
}

/// The whole answer to one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// `data` is there for a READ that succeeded.
    Simple { errno: Errno, data: Vec<u8> },
    /// All chunks, the last one marked as such.
    Structured(Vec<OwnedChunk>),
}

/// A [`Chunk`] that outlives its buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OwnedChunk {
    None,
    Data { offset: u64, data: Vec<u8> },
    Hole { offset: u64, length: u32 },
    BlockStatus { context: u32, extents: Vec<Extent> },
    Error { errno: Errno, message: String },
}

impl Reply {
    /// The first error in it, or [`Errno::OK`].
    #[must_use]
    pub fn errno(&self) -> Errno {
        match self {
            Self::Simple { errno, .. } => *errno,
            Self::Structured(chunks) => chunks
                .iter()
                .find_map(|chunk| match chunk {
                    OwnedChunk::Error { errno, .. } => Some(*errno),
                    _ => None,
                })
                .unwrap_or(Errno::OK),
        }
    }
}

impl Transmitting {
    pub(super) fn new(target: Target, secure: Secure, transmission: Transmission) -> Self {
        Self {
            target,
            secure,
            transmission,
            // Not small numbers, so that a server that invents cookies is found out.
            cookie: 0x6861_7773_6572_0000,
        }
    }

    /// What negotiation settled.
    #[must_use]
    pub fn transmission(&self) -> &Transmission {
        &self.transmission
    }

    pub fn read(&mut self, offset: u64, length: u32) -> Result<Reply, ClientError> {
        self.request(Command::READ, CommandFlags(0), offset, length)
    }

    pub fn block_status(&mut self, offset: u64, length: u32) -> Result<Reply, ClientError> {
        self.request(Command::BLOCK_STATUS, CommandFlags(0), offset, length)
    }

    /// Sends any request that has no payload, and reads the whole reply. Nothing is checked against the export.
    pub fn request(
        &mut self,
        command: Command,
        flags: CommandFlags,
        offset: u64,
        length: u32,
    ) -> Result<Reply, ClientError> {
        self.cookie += 1;
        let request = RawRequest {
            flags,
            command,
            cookie: Cookie(self.cookie),
            offset,
            length,
        };
        self.exchange(&request)
            .map_err(self.target.failed(Step::Command(command)))
    }

    /// Ends the session as the protocol wants it; there is no reply to wait for.
    pub fn disconnect(mut self) {
        let request = RawRequest {
            flags: CommandFlags(0),
            command: Command::DISC,
            cookie: Cookie(0),
            offset: 0,
            length: 0,
        };
        if self.secure.write_all(&request.encode()).is_ok() {
            self.secure.close();
        }
    }

    fn exchange(&mut self, request: &RawRequest) -> Result<Reply, Reason> {
        self.secure.write_all(&request.encode())?;
        let limit = match request.command {
            Command::READ => request.length,
            // Each extent but the last takes a byte of the request at least.
            Command::BLOCK_STATUS => 8 * request.length.min(wire_length(MAX_DESCRIPTORS)),
            _ => 0,
        }
        .saturating_add(OVERHEAD);
        let mut left = limit;
        let mut chunks = Vec::new();
        loop {
            let (header, size) = self.header()?;
            left = left.checked_sub(size).ok_or(Reason::TooLong { limit })?;
            match header {
                ReplyHeader::Simple { cookie, errno } => {
                    check(cookie == request.cookie, "a cookie that no request has")?;
                    check(
                        chunks.is_empty(),
                        "a simple reply amid the chunks of another",
                    )?;
                    let carries = request.command == Command::READ && errno == Errno::OK;
                    let data = self.take(if carries { request.length } else { 0 })?;
                    return Ok(Reply::Simple { errno, data });
                }
                ReplyHeader::Chunk {
                    cookie,
                    kind,
                    done,
                    length,
                } => {
                    check(cookie == request.cookie, "a cookie that no request has")?;
                    left = left.checked_sub(length).ok_or(Reason::TooLong { limit })?;
                    let payload = self.take(length)?;
                    chunks.push(Chunk::parse(kind, &payload)?.into());
                    if done {
                        return Ok(Reply::Structured(chunks));
                    }
                }
            }
        }
    }

    /// A reply's header, and how long it is.
    fn header(&mut self) -> Result<(ReplyHeader, u32), Reason> {
        let mut magic = [0; 4];
        self.secure.read_exact(&mut magic)?;
        let mut header = magic.to_vec();
        header.resize(ReplyHeader::length(magic)?, 0);
        self.secure.read_exact(&mut header[4..])?;
        Ok((ReplyHeader::parse(&header)?, wire_length(header.len())))
    }

    /// `length` bytes; memory follows what really comes, not what was claimed.
    fn take(&mut self, length: u32) -> Result<Vec<u8>, Reason> {
        const PIECE: usize = 64 << 10;
        let length = length as usize;
        let mut bytes = Vec::new();
        while bytes.len() < length {
            let start = bytes.len();
            bytes.resize(length.min(start + PIECE), 0);
            self.secure.read_exact(&mut bytes[start..])?;
        }
        Ok(bytes)
    }
}

fn check(holds: bool, otherwise: &'static str) -> Result<(), Malformed> {
    if holds {
        return Ok(());
    }
    Err(Malformed::new("reply", otherwise))
}

impl From<Chunk<'_>> for OwnedChunk {
    fn from(chunk: Chunk<'_>) -> Self {
        match chunk {
            Chunk::None => Self::None,
            Chunk::Data { offset, data } => Self::Data {
                offset,
                data: data.to_owned(),
            },
            Chunk::Hole { offset, length } => Self::Hole { offset, length },
            Chunk::BlockStatus { context, extents } => Self::BlockStatus { context, extents },
            Chunk::Error { errno, message, .. } => Self::Error {
                errno,
                message: message.to_owned(),
            },
        }
    }
}
