//! Transmission: one thread, one client, many requests at a time.
//!
//! The thread owns the socket and everything that is encrypted. What may block goes to the workers, and its replies
//! come back through an [`Inbox`], in the order in which they are ready. A session that cannot send, or that has used
//! up its memory, stops reading: the client feels that, and nobody else does.

use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno as OsErrno;

use super::budget::{Account, Permit};
use super::client::Client;
use super::command::{Reply, Style};
use super::exports::{Order, Presence};
use super::outgoing::Outgoing;
use super::pace::{self, Pace};
use super::service::Service;
use super::transport::{Channel, ChannelError, Received, Sink, Transport};
use super::wake::Wake;
use crate::nbd::codec::Malformed;
use crate::nbd::request::{Range, RawRequest, Request};
use crate::nbd::server::Session as Negotiated;
use crate::nbd::{Cookie, Errno};

/// Ciphertext read at a time: eight full records and their headers, as much as is encrypted at a time.
const INCOMING: usize = 8 * (16 << 10) + 512;

/// Requests that are being carried out or whose replies wait. The kernel has 128 in flight on a connection.
const REQUESTS: usize = 256;

/// Bytes of replies that are put together before they are sent. More would have the client wait for the first,
/// and leave the processor's second cache.
const STAGED: usize = 64 << 10;

/// Bytes of long replies that are put together at a time.
const AT_ONCE: usize = 128 << 10;

/// Bytes of replies that wait before no more requests are read.
const BACKLOG: usize = 1 << 20;

/// How long a peer may leave a message half sent, or not take what it is sent, before it is given up: well above
/// what a network's hiccup takes, and the end of memory held by a peer that stopped.
const PATIENCE: Duration = Duration::from_secs(60);

/// The same when the peer keeps memory that others wait for.
const IN_THE_WAY: Duration = Duration::from_secs(10);

/// How often a session that its peer keeps waiting looks whether it is in the way, and how long one is idle before it
/// gives back its memory.
const LOOK: Duration = Duration::from_secs(2);

/// How long a session that knows ESHUTDOWN is kept open to say it, once nothing is in flight (C60).
const FAREWELL: Duration = Duration::from_millis(300);

mod requests;

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
    #[error("the client gave up the connection; what it asked for last was not begun")]
    GivenUp,
    #[error("the attachment was revoked, or the server had to stop")]
    Ordered,
    #[error("the server is shutting down")]
    Drained,
    #[error("the client broke the protocol: {0}")]
    Broken(#[from] Malformed),
    #[error("the client sent a WRITE of {0} bytes, far beyond the limit")]
    Unbearable(u32),
    #[error("the client did nothing for {} s in the middle of a message", .0.as_secs())]
    Stalled(Duration),
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error("poll: {0}")]
    Poll(OsErrno),
}

/// A session in transmission.
pub(super) struct Session {
    transport: Transport,
    requests: Requests,
    pace: Pace,
    received_at: Instant,
    /// Since when the peer has taken nothing of what waits to be sent.
    unsent_since: Option<Instant>,
    /// The socket takes no more of it now.
    blocked: bool,
    /// Nothing happened for so long that the buffers were given back.
    resting: bool,
}

/// The requests of a session and their replies, on this side of the encryption.
struct Requests {
    service: Arc<Service>,
    presence: Arc<Presence>,
    inbox: Arc<Inbox>,
    account: Arc<Account>,
    /// A client that asks again for what it gave up.
    client: Option<Client>,
    style: Style,
    receiving: Receiving,
    outgoing: Outgoing,
    in_flight: usize,
    /// Memory for the next WRITE's payload.
    spare: Vec<u8>,
    order: Order,
    /// The file was looked at since the last bytes came.
    looked: bool,
}

/// How far the next request has come.
enum Receiving {
    Header {
        bytes: [u8; RawRequest::LENGTH],
        have: usize,
    },
    /// It is good, and waits for memory.
    Waiting { cookie: Cookie, request: Request },
    /// A good WRITE, of whose payload nothing was taken, nor memory for it.
    Write {
        cookie: Cookie,
        range: Range,
        fua: bool,
    },
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
        channel: Channel,
        presence: Arc<Presence>,
        negotiated: &Negotiated,
    ) -> Result<Self, Ending> {
        let (transport, staged) = channel.into_transport(INCOMING)?;
        // The kernel negotiates no structured replies.
        let client = if negotiated.structured {
            None
        } else {
            let socket = transport.as_fd().try_clone_to_owned();
            Some(Client::new(socket.map_err(ChannelError::Io)?))
        };
        let inbox = Arc::new(Inbox {
            replies: Mutex::default(),
            wake: Arc::clone(&presence.wake),
        });
        let account = service.budget.account(Arc::clone(&presence.wake));
        let style = Style {
            structured: negotiated.structured,
            contexts: negotiated.contexts.clone().into(),
        };
        Ok(Self {
            transport,
            requests: Requests {
                service,
                presence,
                inbox,
                account,
                client,
                style,
                receiving: Receiving::START,
                outgoing: Outgoing::behind(staged),
                in_flight: 0,
                spare: Vec::new(),
                order: Order::Serve,
                looked: false,
            },
            pace: Pace::default(),
            received_at: Instant::now(),
            unsent_since: None,
            blocked: false,
            resting: false,
        })
    }

    /// Serves until the session is over. Requests in flight may outlive it, if the client does not wait for them.
    pub(super) fn run(mut self) -> Ending {
        match self.serve() {
            Ok(ending) => ending,
            Err(ending) => {
                self.transport.give_up(self.requests.outgoing.staged(0));
                ending
            }
        }
    }

    fn serve(&mut self) -> Result<Ending, Ending> {
        loop {
            self.requests.collect();
            self.obey()?;
            self.receive()?;
            self.transmit()?;
            if self.requests.resume() {
                continue;
            }
            let settled = self.requests.are_settled() && !self.blocked;
            if settled && matches!(self.requests.receiving, Receiving::Over(_)) {
                return Ok(self.say_goodbye());
            }
            self.wait(settled)?;
        }
    }

    /// Does what the server wants of its sessions.
    fn obey(&mut self) -> Result<(), Ending> {
        let order = self.requests.presence.order();
        if order == self.requests.order {
            return Ok(());
        }
        self.requests.order = order;
        match order {
            Order::Serve => {}
            Order::Close => return Err(Ending::Ordered),
            // The kernel makes I/O errors of ESHUTDOWN (K19), while a request that gets no answer is sent again to
            // the next server. Only who negotiated more than the kernel can is told (C60).
            Order::Finish if self.requests.style.structured => self.received_at = Instant::now(),
            Order::Finish => self.requests.receiving = Receiving::Over(Ending::Drained),
        }
        Ok(())
    }

    /// Reads and starts requests, until there are none or until there is no room.
    fn receive(&mut self) -> Result<(), Ending> {
        // A request may have waited for memory since.
        self.requests.looked = false;
        let mut sink = Counting {
            requests: &mut self.requests,
            taken: 0,
        };
        let received = self.transport.receive(&mut sink)?;
        if sink.taken > 0 {
            self.received_at = Instant::now();
        }
        if received == Received::End {
            self.requests.receiving = Receiving::Over(Ending::Gone);
        }
        Ok(())
    }

    /// Encrypts and sends replies.
    fn transmit(&mut self) -> Result<(), Ending> {
        let outgoing = &mut self.requests.outgoing;
        let mut sent = false;
        loop {
            let progress = self.transport.transmit(outgoing.staged(AT_ONCE))?;
            sent |= progress.sent;
            self.blocked = progress.blocked;
            if progress.blocked {
                if sent || self.unsent_since.is_none() {
                    self.unsent_since = Some(Instant::now());
                }
                return Ok(());
            }
            if outgoing.is_empty() {
                self.unsent_since = None;
                return Ok(());
            }
        }
    }

    /// Sleeps until there is something to do.
    fn wait(&mut self, settled: bool) -> Result<(), Ending> {
        let reading = self.requests.are_wanted();
        if reading && self.transport.has_buffered() {
            return Ok(());
        }
        let low_water = self.low_water(reading)?;
        let mut interest = PollFlags::empty();
        if reading {
            interest |= PollFlags::IN;
        }
        if self.blocked {
            interest |= PollFlags::OUT;
        }
        let idle = settled && self.requests.receiving.is_between_messages() && low_water == 1;
        let mut timeout = self.patience(reading)?;
        if low_water > 1 {
            timeout = Some(pace::MOMENT.min(timeout.unwrap_or(pace::MOMENT)));
        }
        if idle && !self.resting && timeout.is_none() {
            timeout = Some(LOOK);
        }
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let mut fds = [
            PollFd::new(&self.transport, interest),
            PollFd::new(&*self.requests.presence.wake, PollFlags::IN),
        ];
        let ready = match poll(&mut fds, timeout.as_ref()) {
            Err(OsErrno::INTR) => return Ok(()),
            ready => ready.map_err(Ending::Poll)?,
        };
        let woken = !fds[1].revents().is_empty();
        // Without interest in either, a peer that is gone would be reported for ever.
        if interest.is_empty() && fds[0].revents().intersects(PollFlags::ERR | PollFlags::HUP) {
            return Err(Ending::Gone);
        }
        if ready == 0 && low_water > 1 {
            self.pace.vain(self.transport.unread()?);
        }
        if woken {
            self.requests.presence.wake.take();
        }
        if !reading {
            // It was not the peer that kept us waiting.
            self.received_at = Instant::now();
        }
        if idle && ready == 0 && !self.resting {
            self.transport.shrink();
            self.requests.shrink();
            crate::sys::memory::give_back();
        }
        self.resting = idle && ready == 0;
        Ok(())
    }

    /// Bytes to wait for now.
    fn low_water(&mut self, reading: bool) -> Result<usize, Ending> {
        if !reading || self.blocked {
            self.transport.set_low_water(1)?;
            return Ok(1);
        }
        if self.pace.is_silence_due() {
            let heard = self.listen()?;
            self.pace.heard(heard);
        }
        let low_water = self.pace.low_water();
        self.transport.set_low_water(low_water)?;
        Ok(low_water)
    }

    /// Is silent for a moment; how many bytes came.
    fn listen(&mut self) -> Result<usize, Ending> {
        let step = Timespec::try_from(pace::STEP).ok();
        let began = Instant::now();
        let mut heard = self.transport.unread()?;
        loop {
            let mut fds = [PollFd::new(&*self.requests.presence.wake, PollFlags::IN)];
            // Who wakes the session meanwhile finds it awake, and is found by the poll(2) that follows.
            let woken = match poll(&mut fds, step.as_ref()) {
                Err(OsErrno::INTR) => false,
                ready => ready.map_err(Ending::Poll)? > 0,
            };
            let before = std::mem::replace(&mut heard, self.transport.unread()?);
            if woken || heard == before || began.elapsed() >= pace::SILENCE {
                return Ok(heard);
            }
        }
    }

    /// How long to sleep at most, or that the peer was waited for long enough.
    fn patience(&mut self, reading: bool) -> Result<Option<Duration>, Ending> {
        let mut sleep = None;
        if self.requests.order == Order::Finish && self.requests.in_flight == 0 {
            let left = FAREWELL.saturating_sub(self.received_at.elapsed());
            if left.is_zero() {
                self.requests.receiving = Receiving::Over(Ending::Drained);
            }
            sleep = Some(left);
        }
        let half = reading && !self.requests.receiving.is_between_messages();
        let waits_since = [self.unsent_since, half.then_some(self.received_at)];
        if let Some(since) = waits_since.into_iter().flatten().min() {
            let patience = if self.requests.account.is_in_the_way() {
                IN_THE_WAY
            } else {
                PATIENCE
            };
            if since.elapsed() >= patience {
                return Err(Ending::Stalled(patience));
            }
            sleep = Some(sleep.map_or(LOOK, |sleep: Duration| sleep.min(LOOK)));
        }
        Ok(sleep)
    }

    fn say_goodbye(&mut self) -> Ending {
        self.transport.close(self.requests.outgoing.staged(0));
        match std::mem::replace(&mut self.requests.receiving, Receiving::START) {
            Receiving::Over(ending) => ending,
            _ => Ending::Gone,
        }
    }
}

/// Notices whether the peer has sent anything.
struct Counting<'a> {
    requests: &'a mut Requests,
    taken: usize,
}

impl Sink for Counting<'_> {
    type Error = Ending;

    fn wants(&self) -> bool {
        self.requests.are_wanted()
    }

    fn arrived(&mut self) {
        self.requests.looked = false;
    }

    fn take(&mut self, plaintext: &[u8]) -> Result<usize, Ending> {
        let taken = self.requests.take(plaintext)?;
        self.taken += taken;
        Ok(taken)
    }
}
