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
    let pieces = if whole {
        vec![Extent {
            length: range.length,
            flags: 0,
        }]
    } else {
        pieces(store, range)?
    };
    let data = pieces.iter().filter(|piece| piece.flags == 0);
    let data: usize = data.map(|piece| piece.length as usize).sum();
    let mut bytes = Vec::with_capacity(data + pieces.len() * (reply::OFFSET_LENGTH + 4));
    let mut offset = range.offset;
    for (index, piece) in pieces.iter().enumerate() {
        let done = index + 1 == pieces.len();
        let length = piece.length;
        if piece.flags == 0 {
            bytes.extend_from_slice(&reply::offset_data(cookie, done, offset, length));
            store.read(Range { offset, length }, &mut bytes)?;
        } else {
            bytes.extend_from_slice(&reply::offset_hole(cookie, done, offset, length));
        }
        offset += u64::from(length);
    }
    Ok(bytes)
}

/// Data and holes of a range that is read: few, and only holes worth a chunk of their own.
fn pieces(store: &Store, range: Range) -> Result<Vec<Extent>, Trouble> {
    let mut pieces: Vec<Extent> = Vec::new();
    for mut extent in store.extents(range, PIECES)? {
        if extent.length < WORTHWHILE {
            extent.flags = 0;
        }
        push_merged(&mut pieces, extent);
    }
    let covered: u64 = pieces.iter().map(|piece| u64::from(piece.length)).sum();
    if let Ok(length @ 1..) = u32::try_from(u64::from(range.length) - covered) {
        push_merged(&mut pieces, Extent { length, flags: 0 });
    }
    Ok(pieces)
}

fn push_merged(extents: &mut Vec<Extent>, extent: Extent) {
    match extents.last_mut() {
        Some(last) if last.flags == extent.flags => last.length += extent.length,
        _ => extents.push(extent),
    }
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
