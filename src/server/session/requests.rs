//! A session's requests, from the first byte to the reply or to the workers.

use std::io::IoSlice;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Ending, Receiving, Session};
use crate::nbd::reply;
use crate::nbd::request::{Range, RawRequest, Request, Rules};
use crate::nbd::{Cookie, Errno};
use crate::server::budget::Permit;
use crate::server::channel::ChannelError;
use crate::server::command::{EXTENTS, Pending, Reply, count};
use crate::server::exports::Order;
use crate::server::service::BLOCK_SIZES;

/// READs and WRITEs up to this size are tried at once, without a worker.
const SHORT: u32 = 64 << 10;

impl Session {
    /// Takes some of the plaintext.
    pub(super) fn advance(&mut self) -> Result<(), Ending> {
        let plaintext = self.channel.plaintext();
        match &mut self.receiving {
            Receiving::Header { bytes, have } => {
                let taken = plaintext.len().min(bytes.len() - *have);
                bytes[*have..*have + taken].copy_from_slice(&plaintext[..taken]);
                *have += taken;
                let complete = (*have == bytes.len()).then_some(*bytes);
                self.channel.consume(taken);
                if let Some(bytes) = complete {
                    self.accept(&bytes)?;
                }
            }
            Receiving::Payload { range, data, .. } => {
                let taken = plaintext.len().min(range.length as usize - data.len());
                data.extend_from_slice(&plaintext[..taken]);
                let complete = data.len() == range.length as usize;
                self.channel.consume(taken);
                if complete {
                    self.write();
                }
            }
            Receiving::Discard { left, .. } => {
                let taken = plaintext.len().min(*left);
                *left -= taken;
                let complete = *left == 0;
                self.channel.consume(taken);
                if complete {
                    self.refuse();
                }
            }
            Receiving::Waiting { .. } | Receiving::Over(_) => {}
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
            Ok(request) => self.begin(raw.cookie, request)?,
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

    /// Starts a request, or has it wait for memory.
    pub(super) fn begin(&mut self, cookie: Cookie, request: Request) -> Result<(), ChannelError> {
        let needed = match request {
            Request::Read { range, .. } | Request::Write { range, .. } => range.length as usize,
            Request::BlockStatus { one: false, .. } => 8 * EXTENTS,
            _ => 0,
        };
        let Some(permit) = self.account.take(needed) else {
            self.receiving = Receiving::Waiting { cookie, request };
            return Ok(());
        };
        self.receiving = Receiving::START;
        match request {
            Request::Write { range, .. } => {
                self.receiving = Receiving::Payload {
                    cookie,
                    request,
                    range,
                    data: Vec::with_capacity(needed),
                    permit,
                };
                if range.length == 0 {
                    self.write();
                }
            }
            Request::Read { range, .. } if self.read_now(cookie, range)? => {}
            _ => self.hand_out(cookie, request, Vec::new(), permit),
        }
        Ok(())
    }

    /// Answers a short READ from the page cache, in one chunk, whether or not DF asks for that.
    fn read_now(&mut self, cookie: Cookie, range: Range) -> Result<bool, ChannelError> {
        let length = range.length as usize;
        if range.length > SHORT || length == 0 {
            return Ok(false);
        }
        if self.scratch.len() < length {
            self.scratch.resize(length, 0);
        }
        let data = &mut self.scratch[..length];
        if !self.service.store.read_now(range.offset, data) {
            return Ok(false);
        }
        let counters = &self.presence.export.counters;
        count(&counters.reads, &counters.read_bytes, range.length);
        let header = if self.style.structured {
            reply::offset_data(cookie, true, range.offset, range.length).to_vec()
        } else {
            reply::simple(cookie, Errno::OK).to_vec()
        };
        let mut encrypted = 0;
        if self.outgoing.is_empty() {
            let whole = [IoSlice::new(&header), IoSlice::new(data)];
            encrypted = self.channel.encrypt(&whole)?;
        }
        let header_left = header.get(encrypted..).unwrap_or_default().to_vec();
        let data_left = &data[encrypted.saturating_sub(header.len())..];
        if !data_left.is_empty() {
            self.outgoing.push(Reply {
                parts: vec![header_left, data_left.to_vec()],
                _permit: None,
            });
        }
        Ok(true)
    }

    /// Carries out a WRITE whose payload is complete.
    fn write(&mut self) {
        let complete = std::mem::replace(&mut self.receiving, Receiving::START);
        let Receiving::Payload {
            cookie,
            request,
            range,
            data,
            permit,
        } = complete
        else {
            return;
        };
        let fua = matches!(request, Request::Write { fua: true, .. });
        let store = &self.service.store;
        if !fua && range.length <= SHORT && store.write_now(range.offset, &data).is_some() {
            let counters = &self.presence.export.counters;
            count(&counters.writes, &counters.written_bytes, range.length);
            self.outgoing
                .push(Reply::status(&self.style, cookie, Ok(())));
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
