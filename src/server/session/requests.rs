//! A session's requests, from the first byte to the reply or to the workers.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{BACKLOG, Ending, REQUESTS, Receiving, Requests, STAGED};
use crate::nbd::reply;
use crate::nbd::request::{Range, RawRequest, Request, Rules};
use crate::nbd::{Cookie, Errno};
use crate::server::budget::Permit;
use crate::server::client::Client;
use crate::server::command::{EXTENTS, Pending, Reply, WORTHWHILE, count, is_zero};
use crate::server::exports::Order;
use crate::server::service::BLOCK_SIZES;

/// READs and WRITEs up to this size are tried at once, without a worker. Above it, the worker's memory and the two
/// wake-ups cost little beside the bytes. The node plugin's devices ask for no more.
const SHORT: u32 = 1 << 20;

impl Requests {
    /// Whether there is room for another request, or for the rest of this one.
    pub(super) fn are_wanted(&self) -> bool {
        match self.receiving {
            Receiving::Waiting { .. } | Receiving::Over(_) => false,
            Receiving::Write { .. } | Receiving::Payload { .. } | Receiving::Discard { .. } => true,
            Receiving::Header { .. } => {
                self.outgoing.together() < STAGED
                    && !self.outgoing.is_amid_reply()
                    && self.in_flight + self.outgoing.len() < REQUESTS
                    && self.outgoing.bytes() < BACKLOG
            }
        }
    }

    /// Whether everything that was begun has been answered.
    pub(super) fn are_settled(&self) -> bool {
        self.in_flight == 0 && self.outgoing.is_empty()
    }

    /// Gives back the memory that is not in use.
    pub(super) fn shrink(&mut self) {
        self.spare = Vec::new();
        self.outgoing.shrink();
    }

    /// Takes in what the workers have done.
    pub(super) fn collect(&mut self) {
        for reply in self.inbox.take() {
            self.in_flight -= 1;
            self.outgoing.push(reply);
        }
    }

    /// Starts the request that waits for memory, if there is some now: sending replies gave it back.
    pub(super) fn resume(&mut self) -> bool {
        let Receiving::Waiting { cookie, request } = self.receiving else {
            return false;
        };
        self.grant(cookie, request);
        !matches!(self.receiving, Receiving::Waiting { .. })
    }

    /// Takes plaintext as long as more is wanted; how much.
    pub(super) fn take(&mut self, plaintext: &[u8]) -> Result<usize, Ending> {
        let mut left = plaintext;
        while !left.is_empty() && self.are_wanted() {
            let taken = self.advance(left)?;
            left = &left[taken..];
        }
        Ok(plaintext.len() - left.len())
    }

    /// Takes some of the plaintext.
    fn advance(&mut self, plaintext: &[u8]) -> Result<usize, Ending> {
        match &mut self.receiving {
            Receiving::Header { bytes, have } => {
                let taken = plaintext.len().min(bytes.len() - *have);
                bytes[*have..*have + taken].copy_from_slice(&plaintext[..taken]);
                *have += taken;
                if *have == bytes.len() {
                    let bytes = *bytes;
                    self.accept(&bytes)?;
                }
                Ok(taken)
            }
            Receiving::Write { cookie, range, fua } => {
                let (cookie, range, fua) = (*cookie, *range, *fua);
                self.check_client()?;
                let whole = plaintext.get(..range.length as usize);
                if let Some(data) = whole.filter(|data| self.write_now(cookie, range, fua, data)) {
                    self.receiving = Receiving::START;
                    return Ok(data.len());
                }
                self.grant(cookie, Request::Write { range, fua });
                Ok(0)
            }
            Receiving::Payload { range, data, .. } => {
                let taken = plaintext.len().min(range.length as usize - data.len());
                data.extend_from_slice(&plaintext[..taken]);
                if data.len() == range.length as usize {
                    self.check_client()?;
                    self.write();
                }
                Ok(taken)
            }
            Receiving::Discard { left, .. } => {
                let taken = plaintext.len().min(*left);
                *left -= taken;
                if *left == 0 {
                    self.refuse();
                }
                Ok(taken)
            }
            Receiving::Waiting { .. } | Receiving::Over(_) => Ok(0),
        }
    }

    /// Nothing is changed any more for a client that asks for it again elsewhere.
    fn check_client(&mut self) -> Result<(), Ending> {
        if self.client.as_mut().is_some_and(Client::has_left) {
            return Err(Ending::GivenUp);
        }
        Ok(())
    }

    /// Checks a request, once and for all.
    fn accept(&mut self, bytes: &[u8]) -> Result<(), Ending> {
        let raw = RawRequest::parse(bytes)?;
        if raw.is_unbearable() {
            return Err(Ending::Unbearable(raw.length));
        }
        let rules = Rules {
            size: self.service.store.size(),
            read_only: self.presence.export.read_only,
            structured: self.style.structured,
            contexts: !self.style.contexts.is_empty(),
            minimum_block: BLOCK_SIZES.minimum,
            maximum_payload: BLOCK_SIZES.maximum_payload,
        };
        let checked = match raw.check(&rules) {
            Ok(Request::Disconnect) => {
                self.receiving = Receiving::Over(Ending::Disconnected);
                return Ok(());
            }
            _ if self.order == Order::Finish => Err(Errno::ESHUTDOWN),
            checked => checked,
        };
        match checked {
            Ok(request) => self.begin(raw.cookie, request),
            Err(errno) => {
                self.receiving = Receiving::Discard {
                    cookie: raw.cookie,
                    errno,
                    left: raw.payload() as usize,
                };
                if raw.payload() == 0 {
                    self.refuse();
                }
            }
        }
        Ok(())
    }

    /// Answers a request that was not accepted, after its payload.
    fn refuse(&mut self) {
        if let Receiving::Discard { cookie, errno, .. } =
            std::mem::replace(&mut self.receiving, Receiving::START)
        {
            let failed = &self.presence.export.counters.failed;
            failed.fetch_add(1, Ordering::Relaxed);
            let message = match errno {
                Errno::ESHUTDOWN => "the server is shutting down",
                Errno::EPERM => "the export is read-only",
                Errno::ENOSPC => "the request goes beyond the end of the export",
                _ => "the request is not valid here",
            };
            let reply = Reply::status(&self.style, cookie, Err((errno, message)));
            self.outgoing.push(reply);
        }
    }

    /// Carries out a request at once, or waits for its payload, or for memory.
    fn begin(&mut self, cookie: Cookie, request: Request) {
        self.receiving = Receiving::START;
        match request {
            Request::Read { range, whole } if self.read_now(cookie, range, whole) => {}
            Request::Write { range, fua } if range.length > 0 => {
                self.receiving = Receiving::Write { cookie, range, fua };
            }
            _ => self.grant(cookie, request),
        }
    }

    /// Gives a request its memory and starts it, or has it wait.
    fn grant(&mut self, cookie: Cookie, request: Request) {
        let needed = match request {
            Request::Read { range, .. } | Request::Write { range, .. } => range.length as usize,
            Request::BlockStatus { one: false, .. } => 8 * EXTENTS,
            _ => 0,
        };
        let Some(permit) = self.account.take(needed) else {
            self.receiving = Receiving::Waiting { cookie, request };
            return;
        };
        self.receiving = Receiving::START;
        match request {
            Request::Write { range, .. } => {
                let mut data = std::mem::take(&mut self.spare);
                data.reserve_exact(needed);
                self.receiving = Receiving::Payload {
                    cookie,
                    request,
                    range,
                    data,
                    permit,
                };
                if range.length == 0 {
                    self.write();
                }
            }
            _ => self.hand_out(cookie, request, Vec::new(), permit),
        }
    }

    /// Answers a READ from the page cache, in one chunk, whether or not DF asks for that (`whole`).
    fn read_now(&mut self, cookie: Cookie, range: Range, whole: bool) -> bool {
        let length = range.length as usize;
        if range.length > SHORT || length == 0 {
            return false;
        }
        let header = if self.style.structured {
            reply::OFFSET_LENGTH
        } else {
            reply::SIMPLE_LENGTH
        };
        // It is read to where it will be encrypted.
        let mut room = self.outgoing.room(header, length);
        if !self.service.store.read_now(range.offset, &mut room.data) {
            return false;
        }
        let counters = &self.presence.export.counters;
        count(&counters.reads, &counters.read_bytes, range.length);
        if !self.style.structured {
            let simple = reply::simple(cookie, Errno::OK);
            room.header.copy_from_slice(&simple);
        } else if !whole && range.length >= WORTHWHILE && room.data.iter().all(|data| is_zero(data))
        {
            let hole = reply::offset_hole(cookie, true, range.offset, range.length);
            self.outgoing.push(Reply {
                bytes: hole,
                _permit: None,
            });
            return true;
        } else {
            let chunk = reply::offset_data(cookie, true, range.offset, range.length);
            room.header.copy_from_slice(&chunk);
        }
        self.outgoing.stage(header + length);
        true
    }

    /// Carries out a WRITE whose payload is complete, if that takes no worker; whether it did.
    fn write_now(&mut self, cookie: Cookie, range: Range, fua: bool, data: &[u8]) -> bool {
        if fua || range.length > SHORT {
            return false;
        }
        let store = &self.service.store;
        if store
            .write_now(range.offset, data, &mut self.looked)
            .is_none()
        {
            return false;
        }
        let counters = &self.presence.export.counters;
        count(&counters.writes, &counters.written_bytes, range.length);
        self.outgoing
            .push(Reply::status(&self.style, cookie, Ok(())));
        true
    }

    /// Carries out a WRITE whose payload was put together.
    fn write(&mut self) {
        let complete = std::mem::replace(&mut self.receiving, Receiving::START);
        let Receiving::Payload {
            cookie,
            request,
            range,
            mut data,
            permit,
        } = complete
        else {
            return;
        };
        let fua = matches!(request, Request::Write { fua: true, .. });
        if self.write_now(cookie, range, fua, &data) {
            data.clear();
            self.spare = data;
            return;
        }
        self.hand_out(cookie, request, data, permit);
    }

    /// Gives a request to the workers.
    fn hand_out(&mut self, cookie: Cookie, request: Request, data: Vec<u8>, permit: Permit) {
        self.in_flight += 1;
        let pending = Pending {
            cookie,
            style: self.style.clone(),
            inbox: Arc::clone(&self.inbox),
            presence: Arc::clone(&self.presence),
            asker: self.client.as_ref().map(Client::asker),
            permit: Some(permit),
            answered: false,
        };
        let service = Arc::clone(&self.service);
        if let Request::Flush = request {
            // It waits in line with others, not for a worker of its own.
            return pending.perform(&service, request, data);
        }
        self.service
            .workers
            .submit(move || pending.perform(&service, request, data));
    }
}
