//! READ in all its shapes, and what goes with it: cookies, structured replies, and payloads of every size.

use super::prelude::*;
use crate::nbd::request::RawRequest;
use crate::nbd::{Cookie, MAX_PAYLOAD};

const SIMPLE: &str = "Simple reply message";
const STRUCTURED: &str = "Structured reply chunk message";
const SIZES: &str = "Size constraints";
const READ: &str = "Request types, NBD_CMD_READ";

/// C46.
pub(super) const COOKIES: Check = Check {
    id: "cookies-come-back",
    title: "Replies carry the cookies of their requests, also when two have the same",
    group: Group::Transmission,
    section: SIMPLE,
    severity: Severity::Data,
    why: "The client would take one request's data for another's.",
    rules: &[46],
    question: cookies,
    ..Check::USUAL
};

/// C58.
pub(super) const COVERED: Check = Check {
    id: "structured-read-covers",
    title: "The chunks of a structured READ cover the request, each byte once",
    group: Group::Transmission,
    section: STRUCTURED,
    severity: Severity::Data,
    why: "The client's buffer keeps what was in it before, or gets one of two contents.",
    rules: &[47, 58],
    question: covered,
    ..Check::USUAL
};

/// C58.
pub(super) const IN_ONE_PIECE: Check = Check {
    id: "df-read-in-one-piece",
    title: "READ with DF is answered in one piece",
    group: Group::Transmission,
    section: READ,
    severity: Severity::Interoperability,
    why: "Clients ask for one piece because they cannot put several together.",
    rules: &[58],
    question: in_one_piece,
    ..Check::USUAL
};

/// C47.
pub(super) const ERRORS_STRUCTURED: Check = Check {
    id: "structured-read-errors",
    title: "With structured replies, READ that fails is answered with chunks too",
    group: Group::Transmission,
    section: STRUCTURED,
    severity: Severity::Interoperability,
    why: "Clients that were promised chunks drop the connection at anything else.",
    rules: &[47],
    question: errors_structured,
    ..Check::USUAL
};

/// C50.
pub(super) const LARGE: Check = Check {
    id: "large-read-answered",
    title: "READ of 32 MiB, or of what the server says it takes, is answered",
    group: Group::Transmission,
    section: SIZES,
    severity: Severity::Interoperability,
    why: "Linux sends requests of up to 32 MiB, and an error is an I/O error of the device.",
    rules: &[50],
    question: large,
    ..Check::USUAL
};

/// C51.
pub(super) const NOTHING: Check = Check {
    id: "empty-read-survived",
    title: "READ of no bytes does not end the session",
    group: Group::Transmission,
    section: READ,
    severity: Severity::Style,
    why: "A client that asks for nothing loses its session.",
    rules: &[51],
    question: nothing,
    ..Check::USUAL
};

/// Sends several READs at a time, and matches the replies.
fn cookies(subject: &Subject<'_>) -> Result<String, Stop> {
    let mut session = subject.transmitting()?;
    let length = a_block(&session.info)?;
    let requests = [0, u64::MAX, 0x0123_4567_89ab_cdef, u64::MAX].map(|cookie| RawRequest {
        cookie: Cookie(cookie),
        ..session.next(Command::READ, CommandFlags(0), 0, length)
    });
    for request in &requests {
        session.send(request, &[]).map_err(broke)?;
    }
    let mut waiting = requests.to_vec();
    while !waiting.is_empty() {
        let (cookie, _) = session.any_reply(&waiting).map_err(broke)?;
        let answered = waiting.iter().position(|request| request.cookie == cookie);
        waiting.swap_remove(answered.unwrap_or(0));
    }
    session.disconnect();
    Ok("four requests at a time, two with one cookie".into())
}

/// Where a chunk's content lies; `None` for one that has none.
fn extent(chunk: &OwnedChunk) -> Option<(u64, u64)> {
    match chunk {
        OwnedChunk::Data { offset, data } => Some((*offset, data.len() as u64)),
        OwnedChunk::Hole { offset, length } => Some((*offset, u64::from(*length))),
        _ => None,
    }
}

/// The content of a structured reply, which lies inside the request, and each byte of it once.
fn whole(reply: &Reply, offset: u64, length: u32) -> Result<usize, Stop> {
    let Reply::Structured(chunks) = reply else {
        return Err(Stop::Finding(format!(
            "READ was answered with {}",
            shape(reply)
        )));
    };
    require(reply.errno() == Errno::OK, || {
        format!("READ of {length} bytes at {offset} got {}", reply.errno())
    })?;
    let mut parts: Vec<_> = chunks.iter().filter_map(extent).collect();
    parts.sort_unstable();
    let mut end = offset;
    for (start, bytes) in &parts {
        require(*start == end, || {
            format!("a chunk begins at {start}, and the one before it ends at {end}")
        })?;
        end += bytes;
    }
    require(end == offset + u64::from(length), || {
        format!("the chunks of READ of {length} bytes at {offset} end at {end}")
    })?;
    Ok(parts.len())
}

/// As many bytes of the export as the server takes in one request, at most `limit`.
fn most(session: &Transmission, limit: u32) -> u64 {
    let payload = session
        .info
        .block_sizes
        .map_or(limit, |sizes| sizes.maximum_payload.min(limit));
    u64::from(payload).min(session.info.size)
}

fn covered(subject: &Subject<'_>) -> Result<String, Stop> {
    let mut session = subject.structured()?;
    let block = a_block(&session.info)?;
    let size = session.info.size;
    let most = most(&session, 1 << 20) / u64::from(block) * u64::from(block);
    let last = (size - most) / u64::from(block) * u64::from(block);
    let length = u32::try_from(most).unwrap_or(block);
    let mut count = 0;
    for offset in [0, last] {
        let reply = session.read(offset, length).map_err(broke)?;
        count += whole(&reply, offset, length)?;
    }
    session.disconnect();
    Ok(format!("2 requests, {count} chunks"))
}

fn in_one_piece(subject: &Subject<'_>) -> Result<String, Stop> {
    let mut session = subject.structured()?;
    if !session.info.flags.contains(TransmissionFlags::SEND_DF) {
        return Err(Stop::Inapplicable("the server does not offer DF".into()));
    }
    let block = a_block(&session.info)?;
    let most = most(&session, 64 << 10) / u64::from(block) * u64::from(block);
    let length = u32::try_from(most).unwrap_or(block);
    let reply = session
        .request(Command::READ, CommandFlags::DF, 0, length)
        .map_err(broke)?;
    let pieces = whole(&reply, 0, length)?;
    require(pieces == 1, || {
        format!("READ of {length} bytes with DF came in {pieces} pieces")
    })?;
    session.disconnect();
    Ok(format!("{length} bytes in one piece"))
}

fn errors_structured(subject: &Subject<'_>) -> Result<String, Stop> {
    let mut session = subject.structured()?;
    let length = a_block(&session.info)?;
    let beyond = session
        .info
        .size
        .checked_next_multiple_of(u64::from(length))
        .unwrap_or(1 << 63);
    let reply = session.read(beyond, length).map_err(broke)?;
    require(matches!(reply, Reply::Structured(_)), || {
        format!("READ beyond the end was answered with {}", shape(&reply))
    })?;
    session.disconnect();
    Ok(shape(&reply))
}

fn large(subject: &Subject<'_>) -> Result<String, Stop> {
    let mut session = subject.transmitting()?;
    let block = u64::from(a_block(&session.info)?);
    let length = most(&session, MAX_PAYLOAD) / block * block;
    let length = u32::try_from(length).unwrap_or(0);
    content_or(&mut session, 0, length, broke_or_slow)?;
    session.disconnect();
    Ok(format!("{length} bytes"))
}

fn nothing(subject: &Subject<'_>) -> Result<String, Stop> {
    let mut session = subject.transmitting()?;
    let length = a_block(&session.info)?;
    let reply = session.read(0, 0).map_err(broke)?;
    require_read(&mut session, length)?;
    session.disconnect();
    Ok(shape(&reply))
}
