//! Carrying out one request on the store, and its reply.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::budget::Permit;
use super::client::Asker;
use super::exports::Presence;
use super::service::Service;
use super::session::Inbox;
use super::store::{Store, Trouble};
use crate::nbd::reply::{self, Extent};
use crate::nbd::request::{Range, Request};
use crate::nbd::{Cookie, Errno, MetaContext};

/// Extents in one BLOCK_STATUS reply: 32 KiB, and at most twice as many system calls.
pub(super) const EXTENTS: usize = 4096;

/// Pieces of one sparse READ: beyond it, holes are sent as zeroes.
const PIECES: usize = 64;

/// A hole that saves less than this is cheaper to send as zeroes.
pub(super) const WORTHWHILE: u32 = 4096;

/// What a reply looks like in this session.
#[derive(Debug, Clone)]
pub(super) struct Style {
    pub(super) structured: bool,
    pub(super) contexts: Arc<[(u32, MetaContext)]>,
}

/// A reply, ready to be sent, and the memory it holds until then.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) bytes: Vec<u8>,
    /// Given back when the reply has been sent and is dropped.
    pub(super) _permit: Option<Permit>,
}

impl Reply {
    /// Success without content, or an error.
    pub(super) fn status(style: &Style, cookie: Cookie, result: Result<(), (Errno, &str)>) -> Self {
        let bytes = match (style.structured, result) {
            (false, Ok(())) => reply::simple(cookie, Errno::OK).to_vec(),
            (false, Err((errno, _))) => reply::simple(cookie, errno).to_vec(),
            (true, Ok(())) => reply::none(cookie),
            (true, Err((errno, message))) => reply::error(cookie, errno, message),
        };
        Self {
            bytes,
            _permit: None,
        }
    }
}

/// A request that is being carried out. It is answered exactly once, also if whoever carries it out fails.
pub(super) struct Pending {
    pub(super) cookie: Cookie,
    pub(super) style: Style,
    pub(super) inbox: Arc<Inbox>,
    /// Keeps the session there until this request is over.
    pub(super) presence: Arc<Presence>,
    /// Where what is not begun when the client leaves is not to be begun any more.
    pub(super) asker: Option<Asker>,
    pub(super) permit: Option<Permit>,
    pub(super) answered: bool,
}

impl Pending {
    /// Carries out the request where it may block; `data` is WRITE's payload.
    pub(super) fn perform(mut self, service: &Arc<Service>, request: Request, data: Vec<u8>) {
        let store = &service.store;
        if request.changes() && self.asker.as_ref().is_some_and(Asker::has_left) {
            let unheard = self.failure(Errno::ESHUTDOWN, "the client has left");
            return self.deliver(unheard);
        }
        let counters = &self.presence.export.counters;
        match request {
            Request::Read { range, whole } => {
                let bytes = read(store, &self.style, self.cookie, range, whole);
                count(&counters.reads, &counters.read_bytes, range.length);
                self.answer(store, bytes);
            }
            Request::Write { range, fua } => {
                let written = store.write(range.offset, &data);
                drop(data);
                count(&counters.writes, &counters.written_bytes, range.length);
                self.settle(service, written, fua);
            }
            Request::Flush => self.settle(service, Ok(()), true),
            Request::Trim { range, fua } => self.settle(service, store.trim(range), fua),
            Request::WriteZeroes {
                range,
                fua,
                no_hole,
                fast,
            } => self.settle(service, store.zero(range, no_hole, fast), fua),
            Request::Cache { range } => self.settle(service, store.cache(range), false),
            Request::BlockStatus { range, one } => {
                let bytes = block_status(store, &self.style, self.cookie, range, one);
                self.answer(store, bytes);
            }
            // Never handed out: the session ends with it.
            Request::Disconnect => self.answered = true,
        }
    }

    /// Answers a request that has no content, when what it wrote is durable if that was asked for.
    fn settle(self, service: &Arc<Service>, result: Result<(), Trouble>, durable: bool) {
        if result.is_err() || !durable {
            return self.finish(&service.store, result);
        }
        let store = Arc::clone(&service.store);
        service
            .commits
            .request(move |result| self.finish(&store, result));
    }

    fn finish(self, store: &Store, result: Result<(), Trouble>) {
        let bytes = result.map(|()| Reply::status(&self.style, self.cookie, Ok(())).bytes);
        self.answer(store, bytes);
    }

    fn answer(mut self, store: &Store, bytes: Result<Vec<u8>, Trouble>) {
        let bytes = bytes.unwrap_or_else(|trouble| {
            store.report(trouble);
            self.failure(trouble.errno(), &trouble.to_string())
        });
        self.deliver(bytes);
    }

    fn failure(&self, errno: Errno, message: &str) -> Vec<u8> {
        let failed = &self.presence.export.counters.failed;
        failed.fetch_add(1, Ordering::Relaxed);
        Reply::status(&self.style, self.cookie, Err((errno, message))).bytes
    }

    fn deliver(&mut self, bytes: Vec<u8>) {
        self.answered = true;
        self.inbox.deliver(Reply {
            bytes,
            _permit: self.permit.take(),
        });
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if !self.answered {
            let bytes = self.failure(Errno::EIO, "the server failed to carry out the request");
            self.deliver(bytes);
        }
    }
}

/// Counts a request that moved that many bytes.
pub(super) fn count(requests: &AtomicU64, bytes: &AtomicU64, length: u32) {
    requests.fetch_add(1, Ordering::Relaxed);
    bytes.fetch_add(length.into(), Ordering::Relaxed);
}

fn read(
    store: &Store,
    style: &Style,
    cookie: Cookie,
    range: Range,
    whole: bool,
) -> Result<Vec<u8>, Trouble> {
    if !style.structured {
        let mut bytes = Vec::with_capacity(reply::SIMPLE_LENGTH + range.length as usize);
        bytes.extend_from_slice(&reply::simple(cookie, Errno::OK));
        store.read(range, &mut bytes)?;
        return Ok(bytes);
    }
    if range.length == 0 {
        return Ok(reply::none(cookie));
    }
    let mut bytes = Vec::with_capacity(reply::OFFSET_LENGTH + range.length as usize);
    let chunk = reply::offset_data(cookie, true, range.offset, range.length);
    bytes.extend_from_slice(&chunk);
    store.read(range, &mut bytes)?;
    if !whole {
        leave_out_zeroes(&mut bytes, cookie, range);
    }
    Ok(bytes)
}

/// Makes holes of zeroes in a READ's only chunk, where they are worth a chunk of their own.
///
/// To look at what was read costs less than to ask the file system, which on tmpfs goes through all pages up to the next
/// hole, however far that is.
fn leave_out_zeroes(bytes: &mut Vec<u8>, cookie: Cookie, range: Range) {
    let pieces = pieces(&bytes[reply::OFFSET_LENGTH..]);
    if pieces.iter().all(|piece| piece.flags == 0) {
        return;
    }
    // A hole is longer than its chunk and the next one's header, so nothing is overwritten that is still needed.
    let (mut from, mut to) = (reply::OFFSET_LENGTH, 0);
    let mut offset = range.offset;
    for (index, piece) in pieces.iter().enumerate() {
        let done = index + 1 == pieces.len();
        let length = piece.length as usize;
        if piece.flags == 0 {
            let chunk = reply::offset_data(cookie, done, offset, piece.length);
            let data = to + chunk.len();
            bytes.copy_within(from..from + length, data);
            bytes[to..data].copy_from_slice(&chunk);
            to = data + length;
        } else {
            let chunk = reply::offset_hole(cookie, done, offset, piece.length);
            bytes[to..to + chunk.len()].copy_from_slice(&chunk);
            to += chunk.len();
        }
        from += length;
        offset += u64::from(piece.length);
    }
    bytes.truncate(to);
}

/// Data and zeroes of what was read: few pieces, and only zeroes worth a chunk of their own.
fn pieces(data: &[u8]) -> Vec<Extent> {
    let mut pieces: Vec<Extent> = Vec::new();
    for block in data.chunks(WORTHWHILE as usize) {
        let zero = block.len() == WORTHWHILE as usize && pieces.len() < PIECES && is_zero(block);
        let flags = if zero { Extent::HOLE | Extent::ZERO } else { 0 };
        // A block is that long at most.
        let length = u32::try_from(block.len()).unwrap_or(WORTHWHILE);
        match pieces.last_mut() {
            Some(last) if last.flags == flags => last.length += length,
            _ => pieces.push(Extent { length, flags }),
        }
    }
    pieces
}

/// Whether all bytes are zero. That is known early where they are not.
pub(super) fn is_zero(data: &[u8]) -> bool {
    data.chunks(512)
        .all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
}

fn block_status(
    store: &Store,
    style: &Style,
    cookie: Cookie,
    range: Range,
    one: bool,
) -> Result<Vec<u8>, Trouble> {
    let mut bytes = Vec::new();
    for (index, (id, context)) in style.contexts.iter().enumerate() {
        let extents = match context {
            MetaContext::BaseAllocation => store.extents(range, if one { 1 } else { EXTENTS })?,
        };
        let done = index + 1 == style.contexts.len();
        bytes.extend_from_slice(&reply::block_status(cookie, done, *id, &extents));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::nbd::reply::{Chunk, ReplyHeader};

    proptest! {
        #[test]
        fn zeroes_are_left_out_and_nothing_else(
            runs in prop::collection::vec((any::<bool>(), prop_oneof![1_usize..9000, Just(4096), Just(65536)]), 1..140),
        ) {
            let data: Vec<u8> = runs
                .iter()
                .flat_map(|(zero, length)| std::iter::repeat_n(if *zero { 0 } else { 7 }, *length))
                .collect();
            let (cookie, offset) = (Cookie(5), 1 << 40);
            let range = Range { offset, length: u32::try_from(data.len()).unwrap() };
            let mut bytes = reply::offset_data(cookie, true, offset, range.length).to_vec();
            bytes.extend_from_slice(&data);
            leave_out_zeroes(&mut bytes, cookie, range);
            let (mut left, mut got, mut chunks, mut ended) = (&bytes[..], Vec::new(), 0, false);
            while !left.is_empty() {
                prop_assert!(!ended);
                let (header, behind) = left.split_at(reply::CHUNK_LENGTH);
                let ReplyHeader::Chunk { cookie: Cookie(5), kind, done, length } = ReplyHeader::parse(header).unwrap()
                else {
                    panic!("no chunk");
                };
                let (payload, behind) = behind.split_at(length as usize);
                let at = range.offset + got.len() as u64;
                match Chunk::parse(kind, payload).unwrap() {
                    Chunk::Data { offset, data } if offset == at => got.extend_from_slice(data),
                    Chunk::Hole { offset, length } if offset == at => {
                        prop_assert!(length >= WORTHWHILE);
                        got.resize(got.len() + length as usize, 0);
                    }
                    other => panic!("{other:?} at {at}"),
                }
                (left, ended, chunks) = (behind, done, chunks + 1);
            }
            prop_assert!(ended);
            prop_assert!(chunks <= PIECES + 1);
            prop_assert!(got == data);
            let sum = bytes.len();
            prop_assert!(sum <= data.len() + reply::OFFSET_LENGTH);
            if chunks == 1 && data.iter().any(|byte| *byte != 0) {
                prop_assert_eq!(sum, data.len() + reply::OFFSET_LENGTH);
            }
        }
    }

    #[test]
    fn a_single_byte_makes_a_range_no_hole() {
        let mut data = vec![0; 5000];
        assert!(is_zero(&data));
        for place in [0, 511, 512, 4999] {
            data[place] = 1;
            assert!(!is_zero(&data), "{place}");
            data[place] = 0;
        }
    }
}
