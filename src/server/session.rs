//! Transmission: one thread, one client, many requests at a time.
//!
//! The thread owns the socket and everything that is encrypted. What may block goes to the workers, and its replies
//! come back through an [`Inbox`], in the order in which they are ready. A session that cannot send, or that has used
//! up its memory, stops reading: the client feels that, and nobody else does.

use std::io::IoSlice;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno as OsErrno;

use super::budget::{Account, Permit};
use super::channel::{Channel, ChannelError, Received};
use super::command::{EXTENTS, Pending, Reply, Style, count};
use super::exports::{Order, Presence};
use super::outgoing::Outgoing;
use super::service::{BLOCK_SIZES, Service};
use super::wake::Wake;
use crate::nbd::codec::Malformed;
use crate::nbd::reply;
use crate::nbd::request::{Range, RawRequest, Request, Rules};
use crate::nbd::server::Session as Negotiated;
use crate::nbd::{Cookie, Errno};

/// Ciphertext read at a time: four full records and their headers.
const INCOMING: usize = 4 * (16 << 10) + 256;

/// Requests that are being carried out or whose replies wait. The kernel has 128 in flight on a connection.
const REQUESTS: usize = 256;

/// Bytes of replies that wait before no more requests are read.
const BACKLOG: usize = 1 << 20;

/// READs and WRITEs up to this size are tried at once, without a worker.
const SHORT: u32 = 64 << 10;

/// How long a peer may leave a message half sent, or not take what it is sent, before it is given up: well above
/// what a network's hiccup takes, and the end of memory held by a peer that stopped.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long a session that knows ESHUTDOWN is kept open to say it, once nothing is in flight (C60).
const FAREWELL: Duration = Duration::from_millis(300);

/// Where workers put what they have done.
#[derive(Debug)]
pub(super) struct Inbox {
    replies: Mutex<Vec<Reply>>,
    wake: Arc<Wake>,
}

impl Inbox {
    pub(super) fn deliver(&self, reply: Reply) {
        let mut replies = self.replies.lock().unwrap_or_else(PoisonError::into_inner);
        replies.push(reply);
        if replies.len() == 1 {
            self.wake.wake();
        }
    }

    fn take(&self) -> Vec<Reply> {
        std::mem::take(&mut *self.replies.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum Ending {
    #[error("the client disconnected")]
    Disconnected,
    #[error("the client went away")]
    Gone,
    #[error("the attachment was revoked, or the server had to stop")]
    Ordered,
    #[error("the server is shutting down")]
    Drained,
    #[error("the client broke the protocol: {0}")]
    Broken(#[from] Malformed),
    #[error("the client sent a WRITE of {0} bytes, far beyond the limit")]
    Unbearable(u32),
    #[error("the client did nothing for {} s in the middle of a message", PATIENCE.as_secs())]
    Stalled,
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error("poll: {0}")]
    Poll(OsErrno),
}

/// A session in transmission.
pub(super) struct Session {
    service: Arc<Service>,
    channel: Channel,
    presence: Arc<Presence>,
    inbox: Arc<Inbox>,
    account: Arc<Account>,
    style: Style,
    receiving: Receiving,
    outgoing: Outgoing,
    in_flight: usize,
    /// For READs that need no worker.
    scratch: Vec<u8>,
    order: Order,
    received_at: Instant,
    /// Since when the peer has taken nothing of what waits to be sent.
    unsent_since: Option<Instant>,
}

/// How far the next request has come.
enum Receiving {
    Header {
        bytes: [u8; RawRequest::LENGTH],
        have: usize,
    },
    /// It is good, and waits for memory.
    Waiting { cookie: Cookie, request: Request },
    /// WRITE's payload.
    Payload {
        cookie: Cookie,
        request: Request,
        range: Range,
        data: Vec<u8>,
        permit: Permit,
    },
    /// The payload of a request that was refused.
    Discard {
        cookie: Cookie,
        errno: Errno,
        left: usize,
    },
    /// There will be no more requests.
    Over(Ending),
}

impl Receiving {
    const START: Self = Self::Header {
        bytes: [0; RawRequest::LENGTH],
        have: 0,
    };

    /// Whether the client has to send something before anything can go on.
    fn is_between_messages(&self) -> bool {
        matches!(self, Self::Header { have: 0, .. } | Self::Over(_))
    }
}

impl Session {
    pub(super) fn new(
        service: Arc<Service>,
        mut channel: Channel,
        presence: Arc<Presence>,
        negotiated: &Negotiated,
    ) -> Self {
        channel.widen(INCOMING);
        let inbox = Arc::new(Inbox {
            replies: Mutex::default(),
            wake: Arc::clone(&presence.wake),
        });
        let account = service.budget.account(Arc::clone(&presence.wake));
        let style = Style {
            structured: negotiated.structured,
            contexts: negotiated.contexts.clone().into(),
        };
        Self {
            service,
            channel,
            presence,
            inbox,
            account,
            style,
            receiving: Receiving::START,
            outgoing: Outgoing::default(),
            in_flight: 0,
            scratch: Vec::new(),
            order: Order::Serve,
            received_at: Instant::now(),
            unsent_since: None,
        }
    }

    /// Serves until the session is over. Requests in flight may outlive it, if the client does not wait for them.
    pub(super) fn run(mut self) -> Ending {
        match self.serve() {
            Ok(ending) | Err(ending) => ending,
        }
    }

    fn serve(&mut self) -> Result<Ending, Ending> {
        loop {
            self.collect();
            self.obey()?;
            self.receive()?;
            self.transmit()?;
            if self.resume()? {
                continue;
            }
            let settled =
                self.in_flight == 0 && self.outgoing.is_empty() && !self.channel.is_sending();
            if settled && matches!(self.receiving, Receiving::Over(_)) {
                return Ok(self.say_goodbye());
            }
            self.wait()?;
        }
    }

    /// Takes in what the workers have done.
    fn collect(&mut self) {
        for reply in self.inbox.take() {
            self.in_flight -= 1;
            self.outgoing.push(reply);
        }
    }

    /// Does what the server wants of its sessions.
    fn obey(&mut self) -> Result<(), Ending> {
        let order = self.presence.order();
        if order == self.order {
            return Ok(());
        }
        self.order = order;
        match order {
            Order::Serve => {}
            Order::Close => return Err(Ending::Ordered),
            // The kernel makes I/O errors of ESHUTDOWN (K19), while a request that gets no answer is sent again to
            // the next server. Only who negotiated more than the kernel can is told (C60).
            Order::Finish if self.style.structured => self.received_at = Instant::now(),
            Order::Finish => self.receiving = Receiving::Over(Ending::Drained),
        }
        Ok(())
    }

    /// Reads and starts requests, until there are none or until there is no room.
    fn receive(&mut self) -> Result<(), Ending> {
        while self.wants_requests() {
            match self.channel.receive()? {
                Received::Plaintext => {}
                Received::Nothing => break,
                Received::End => {
                    self.receiving = Receiving::Over(Ending::Gone);
                    break;
                }
            }
            self.received_at = Instant::now();
            self.advance()?;
        }
        Ok(())
    }

    /// Starts the request that waits for memory, if there is some now: sending replies gave it back.
    fn resume(&mut self) -> Result<bool, ChannelError> {
        let Receiving::Waiting { cookie, request } = self.receiving else {
            return Ok(false);
        };
        self.begin(cookie, request)?;
        Ok(!matches!(self.receiving, Receiving::Waiting { .. }))
    }

    /// Whether there is room for another request, or for the rest of this one.
    fn wants_requests(&self) -> bool {
        match self.receiving {
            Receiving::Waiting { .. } | Receiving::Over(_) => false,
            Receiving::Payload { .. } | Receiving::Discard { .. } => true,
            Receiving::Header { .. } => {
                self.in_flight + self.outgoing.len() < REQUESTS && self.outgoing.bytes() < BACKLOG
            }
        }
    }

    /// Takes some of the plaintext.
    fn advance(&mut self) -> Result<(), Ending> {
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
    fn begin(&mut self, cookie: Cookie, request: Request) -> Result<(), ChannelError> {
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

    /// Encrypts and sends replies.
    fn transmit(&mut self) -> Result<(), Ending> {
        loop {
            let channel = &mut self.channel;
            self.outgoing
                .drain(|slices: &[IoSlice<'_>]| channel.encrypt(slices))?;
            let sent = self.channel.send()?;
            if self.outgoing.is_empty() && !self.channel.is_sending() {
                self.unsent_since = None;
                return Ok(());
            }
            if sent || self.unsent_since.is_none() {
                self.unsent_since = Some(Instant::now());
            }
            if self.channel.is_sending() {
                return Ok(());
            }
        }
    }

    /// Sleeps until there is something to do.
    fn wait(&mut self) -> Result<(), Ending> {
        let reading = self.wants_requests();
        if reading && self.channel.has_buffered() {
            return Ok(());
        }
        let mut interest = PollFlags::empty();
        if reading {
            interest |= PollFlags::IN;
        }
        if self.channel.is_sending() {
            interest |= PollFlags::OUT;
        }
        let timeout = self.patience(reading)?;
        let mut fds = [
            PollFd::new(&self.channel, interest),
            PollFd::new(&*self.presence.wake, PollFlags::IN),
        ];
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(OsErrno::INTR) => {}
            Err(errno) => return Err(Ending::Poll(errno)),
        }
        let woken = !fds[1].revents().is_empty();
        // Without interest in either, a peer that is gone would be reported for ever.
        if interest.is_empty() && fds[0].revents().intersects(PollFlags::ERR | PollFlags::HUP) {
            return Err(Ending::Gone);
        }
        if woken {
            self.presence.wake.take();
        }
        if !reading {
            // It was not the peer that kept us waiting.
            self.received_at = Instant::now();
        }
        Ok(())
    }

    /// How long to sleep at most, or that the peer was waited for long enough.
    fn patience(&mut self, reading: bool) -> Result<Option<Timespec>, Ending> {
        let mut until = None;
        let mut consider = |since: Instant, patience: Duration| {
            let left = (since + patience).saturating_duration_since(Instant::now());
            until = Some(until.map_or(left, |until: Duration| until.min(left)));
            left.is_zero()
        };
        if self.order == Order::Finish
            && self.in_flight == 0
            && consider(self.received_at, FAREWELL)
        {
            self.receiving = Receiving::Over(Ending::Drained);
        }
        if let Some(since) = self.unsent_since
            && consider(since, PATIENCE)
        {
            return Err(Ending::Stalled);
        }
        let half = reading && !self.receiving.is_between_messages();
        if half && consider(self.received_at, PATIENCE) {
            return Err(Ending::Stalled);
        }
        Ok(until.and_then(|until| Timespec::try_from(until).ok()))
    }

    fn say_goodbye(&mut self) -> Ending {
        self.channel.close();
        let _ = self.channel.send();
        match std::mem::replace(&mut self.receiving, Receiving::START) {
            Receiving::Over(ending) => ending,
            _ => Ending::Gone,
        }
    }
}
