//! Transmission as verification needs it: any request, also several at a time, and every reply read to its end.

use super::failure::Failure;
use super::link::Link;
pub(super) use crate::client::{OwnedChunk, Reply};
use crate::client::{Reason, Step};
use crate::nbd::codec::{Malformed, wire_length};
use crate::nbd::reply::{Chunk, MAX_DESCRIPTORS, ReplyHeader};
use crate::nbd::request::RawRequest;
use crate::nbd::{Command, CommandFlags, Cookie, Errno, ExportInfo};

/// Bytes of a reply beyond what was asked for: headers of chunks, and sentences for people.
const OVERHEAD: u32 = 64 << 10;

/// A session in transmission.
#[derive(Debug)]
pub(super) struct Transmission {
    link: Link,
    /// What GO said.
    pub(super) info: ExportInfo,
    cookie: u64,
}

impl Transmission {
    pub(super) fn new(link: Link, info: ExportInfo) -> Self {
        Self {
            link,
            info,
            // Not small numbers, so that a server that invents cookies is found out.
            cookie: 0x6861_7773_6572_0000,
        }
    }

    pub(super) fn link(&mut self) -> &mut Link {
        &mut self.link
    }

    pub(super) fn read(&mut self, offset: u64, length: u32) -> Result<Reply, Failure> {
        self.request(Command::READ, CommandFlags(0), offset, length)
    }

    pub(super) fn block_status(&mut self, offset: u64, length: u32) -> Result<Reply, Failure> {
        self.request(Command::BLOCK_STATUS, CommandFlags(0), offset, length)
    }

    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> Result<Reply, Failure> {
        self.write_with(CommandFlags(0), offset, data)
    }

    pub(super) fn write_with(
        &mut self,
        flags: CommandFlags,
        offset: u64,
        data: &[u8],
    ) -> Result<Reply, Failure> {
        let length = wire_length(data.len());
        let request = self.next(Command::WRITE, flags, offset, length);
        self.send(&request, data)?;
        self.reply(&request)
    }

    /// Sends any request that has no payload, and reads the whole reply. Nothing is checked against the export.
    pub(super) fn request(
        &mut self,
        command: Command,
        flags: CommandFlags,
        offset: u64,
        length: u32,
    ) -> Result<Reply, Failure> {
        let request = self.next(command, flags, offset, length);
        self.send(&request, &[])?;
        self.reply(&request)
    }

    /// A request with a cookie of its own.
    pub(super) fn next(
        &mut self,
        command: Command,
        flags: CommandFlags,
        offset: u64,
        length: u32,
    ) -> RawRequest {
        self.cookie += 1;
        RawRequest {
            flags,
            command,
            cookie: Cookie(self.cookie),
            offset,
            length,
        }
    }

    pub(super) fn send(&mut self, request: &RawRequest, payload: &[u8]) -> Result<(), Failure> {
        let failed = Failure::at::<Reason>(Step::Command(request.command));
        self.link.write_all(&request.encode()).map_err(&failed)?;
        self.link.write_all(payload).map_err(&failed)
    }

    /// The whole reply to `request`, which was sent and is the only one that was not answered.
    pub(super) fn reply(&mut self, request: &RawRequest) -> Result<Reply, Failure> {
        let (cookie, reply) = self.any_reply(std::slice::from_ref(request))?;
        if cookie == request.cookie {
            return Ok(reply);
        }
        let step = Step::Command(request.command);
        let problem = Malformed::new("reply", "a cookie that no request has");
        Err(Failure::new(step, problem))
    }

    /// A whole reply to one of several requests, whose chunks are not mixed with another's.
    pub(super) fn any_reply(
        &mut self,
        requests: &[RawRequest],
    ) -> Result<(Cookie, Reply), Failure> {
        let command = requests
            .first()
            .map_or(Command::READ, |first| first.command);
        self.read_reply(requests)
            .map_err(Failure::at(Step::Command(command)))
    }

    /// Says goodbye as the protocol wants it; there is no reply to wait for.
    pub(super) fn disconnect(mut self) {
        let request = self.next(Command::DISC, CommandFlags(0), 0, 0);
        if self.send(&request, &[]).is_ok() {
            self.link.close();
        }
    }

    fn read_reply(&mut self, requests: &[RawRequest]) -> Result<(Cookie, Reply), Reason> {
        let mut chunks = Vec::new();
        let mut asked: Option<RawRequest> = None;
        let mut left = 0;
        loop {
            let (header, size) = self.header()?;
            let (ReplyHeader::Simple { cookie, .. } | ReplyHeader::Chunk { cookie, .. }) = header;
            let request = match asked {
                Some(request) => request,
                None => {
                    let known = requests.iter().find(|request| request.cookie == cookie);
                    let request =
                        *known.ok_or(Malformed::new("reply", "a cookie that no request has"))?;
                    left = limit(&request);
                    asked = Some(request);
                    request
                }
            };
            check(cookie == request.cookie, "a cookie that no request has")?;
            let limit = limit(&request);
            left = left.checked_sub(size).ok_or(Reason::TooLong { limit })?;
            match header {
                ReplyHeader::Simple { errno, .. } => {
                    check(
                        chunks.is_empty(),
                        "a simple reply amid the chunks of another",
                    )?;
                    let carries = request.command == Command::READ && errno == Errno::OK;
                    let data = self.link.take(if carries { request.length } else { 0 })?;
                    return Ok((cookie, Reply::Simple { errno, data }));
                }
                ReplyHeader::Chunk {
                    kind, done, length, ..
                } => {
                    left = left.checked_sub(length).ok_or(Reason::TooLong { limit })?;
                    let payload = self.link.take(length)?;
                    chunks.push(OwnedChunk::from(Chunk::parse(kind, &payload)?));
                    if done {
                        return Ok((cookie, Reply::Structured(chunks)));
                    }
                }
            }
        }
    }

    /// A reply's header, and how long it is.
    fn header(&mut self) -> Result<(ReplyHeader, u32), Reason> {
        let mut magic = [0; 4];
        self.link.read_exact(&mut magic)?;
        let mut header = magic.to_vec();
        header.resize(ReplyHeader::length(magic)?, 0);
        self.link.read_exact(&mut header[4..])?;
        Ok((ReplyHeader::parse(&header)?, wire_length(header.len())))
    }
}

/// How long the reply to a request can be.
fn limit(request: &RawRequest) -> u32 {
    match request.command {
        Command::READ => request.length,
        // Each extent but the last takes a byte of the request at least; some contexts.
        Command::BLOCK_STATUS => 8 * request.length.min(wire_length(MAX_DESCRIPTORS)),
        _ => 0,
    }
    .saturating_add(OVERHEAD)
}

fn check(holds: bool, otherwise: &'static str) -> Result<(), Malformed> {
    if holds {
        return Ok(());
    }
    Err(Malformed::new("reply", otherwise))
}
