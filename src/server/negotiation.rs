//! One connection from the greeting to transmission, without ever waiting for it.
//!
//! Before TLS exactly the bytes that the state machine wants are read from the socket, so what was sent behind
//! STARTTLS can only ever be taken for TLS (C25), and is not even waited for: bytes that are there before STARTTLS
//! was answered end the connection (C26).

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustls::server::UnbufferedServerConnection;

use super::exports::{NotNow, Presence};
use super::service::Service;
use super::transport::{Channel, ChannelError, Received, Sink};
use crate::nbd::server::{Exports, Fault, Handshake, Plain, PlainStep, Secured, Session, Step};
use crate::nbd::{ExportInfo, ExportName};
use crate::tls::certificate_names;

/// From the connection to the client's proven identity: some round trips, and time for a slow client to sign.
const UNTIL_PROVEN: Duration = Duration::from_secs(10);

/// From the connection to transmission, for a client that asks around first.
const UNTIL_TRANSMISSION: Duration = Duration::from_secs(30);

/// How long a peer that was refused may take to see it.
const PARTING: Duration = Duration::from_secs(2);

/// Ciphertext read at a time: options are small.
const INCOMING: usize = 4 << 10;

/// A connection that has not come to transmission.
pub(super) struct Negotiation {
    pub(super) peer: SocketAddr,
    began: Instant,
    /// `None` only while a step is taken.
    stage: Option<Stage>,
}

enum Stage {
    Plain {
        socket: TcpStream,
        machine: Plain,
        received: Vec<u8>,
        sending: Vec<u8>,
        then: Then,
    },
    Tls {
        channel: Channel,
        handshake: Handshake,
    },
    Secured {
        channel: Channel,
        machine: Secured,
        identity: String,
        received: Vec<u8>,
        closing: bool,
    },
    /// Over, but for what the peer may still be sending: a socket that is closed on unread bytes resets the
    /// connection, and then the peer might never see why.
    Parting { socket: TcpStream, since: Instant },
}

/// What follows when a plaintext reply has been sent.
enum Then {
    Receive,
    Upgrade(Handshake),
    Close,
}

/// What a step came to.
pub(super) enum Progress {
    /// Something has to happen on the socket first.
    Waiting,
    /// Transmission begins; the reply that says so may still have to be sent.
    Transmission(Box<Established>),
    /// There will be no session; the peer is being told so.
    Refused(Refused),
    /// There is no session, and nothing more to do.
    Over,
}

/// A client that may use an export.
pub(super) struct Established {
    pub(super) channel: Channel,
    pub(super) presence: Arc<Presence>,
    pub(super) session: Session,
    pub(super) identity: String,
    pub(super) peer: SocketAddr,
}

/// Why a connection ended without a session.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refused {
    #[error("the client ended the negotiation")]
    Left,
    #[error("the client broke the protocol: {0}")]
    Fault(#[from] Fault),
    #[error("the client sent bytes behind STARTTLS before it was answered")]
    Injected,
    #[error("no TLS session: {0}")]
    Tls(ChannelError),
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    #[error("not ready within {} s", .0.as_secs())]
    Deadline(Duration),
    #[error("gave way to a newer connection, while {0} were negotiating")]
    Crowded(usize),
    #[error("export {name:?}: {reason}")]
    NotNow { name: ExportName, reason: NotNow },
    #[error("the negotiation failed in a way it never should: this is a bug")]
    Bug,
}

impl Refused {
    /// The word it is counted under.
    pub(super) fn reason(&self) -> &'static str {
        match self {
            Self::Left => "left",
            Self::Fault(_) => "protocol",
            Self::Injected => "injection",
            Self::Tls(_) => "tls",
            Self::Io(_) => "connection",
            Self::Deadline(_) => "deadline",
            Self::Crowded(_) => "crowded",
            Self::NotNow { .. } => "not-allowed",
            Self::Bug => "bug",
        }
    }
}

impl Negotiation {
    /// Greets the client. The socket must not block.
    pub(super) fn new(socket: TcpStream, peer: SocketAddr, service: &Service) -> Self {
        let (machine, greeting) = Plain::new(service.limits);
        let stage = Stage::Plain {
            socket,
            machine,
            received: Vec::new(),
            sending: greeting,
            then: Then::Receive,
        };
        Self {
            peer,
            began: Instant::now(),
            stage: Some(stage),
        }
    }

    /// Whether the client has shown a certificate that is accepted.
    pub(super) fn is_proven(&self) -> bool {
        matches!(self.stage, Some(Stage::Secured { .. }))
    }

    /// Whether it has been refused already.
    pub(super) fn is_parting(&self) -> bool {
        matches!(self.stage, Some(Stage::Parting { .. }))
    }

    /// When it must have come further.
    pub(super) fn deadline(&self) -> Instant {
        match self.stage {
            Some(Stage::Parting { since, .. }) => since + PARTING,
            _ => self.began + self.allowed(),
        }
    }

    /// How long it may take in all.
    pub(super) fn allowed(&self) -> Duration {
        if self.is_proven() {
            UNTIL_TRANSMISSION
        } else {
            UNTIL_PROVEN
        }
    }

    /// What it waits for.
    pub(super) fn interest(&self) -> PollFlags {
        let sending = match &self.stage {
            Some(Stage::Plain { sending, .. }) => !sending.is_empty(),
            Some(Stage::Tls { channel, .. } | Stage::Secured { channel, .. }) => {
                channel.is_sending()
            }
            Some(Stage::Parting { .. }) | None => false,
        };
        // Nothing is read from a client that does not take its answers.
        if sending {
            PollFlags::OUT
        } else {
            PollFlags::IN
        }
    }

    pub(super) fn socket(&self) -> Option<BorrowedFd<'_>> {
        match self.stage.as_ref()? {
            Stage::Plain { socket, .. } | Stage::Parting { socket, .. } => Some(socket.as_fd()),
            Stage::Tls { channel, .. } | Stage::Secured { channel, .. } => Some(channel.as_fd()),
        }
    }

    /// Goes on as far as possible.
    pub(super) fn advance(&mut self, service: &Service) -> Progress {
        loop {
            let Some(stage) = self.stage.take() else {
                return Progress::Over;
            };
            let step = match stage {
                Stage::Plain {
                    socket,
                    machine,
                    received,
                    sending,
                    then,
                } => plain(service, socket, machine, received, sending, then),
                Stage::Tls { channel, handshake } => tls(service, channel, handshake),
                Stage::Secured {
                    channel,
                    machine,
                    identity,
                    received,
                    closing,
                } => self.secured(service, channel, machine, identity, received, closing),
                Stage::Parting { socket, since } => return self.part(socket, since),
            };
            match step {
                Ok(Moved::On(stage)) => self.stage = Some(stage),
                Ok(Moved::Waits(stage)) => {
                    self.stage = Some(stage);
                    return Progress::Waiting;
                }
                Ok(Moved::Out(established)) => return Progress::Transmission(established),
                Ok(Moved::Parts(socket, refused)) => {
                    let _ = socket.shutdown(Shutdown::Write);
                    let since = Instant::now();
                    self.stage = Some(Stage::Parting { socket, since });
                    return Progress::Refused(refused);
                }
                Err(refused) => return Progress::Refused(refused),
            }
        }
    }

    /// Throws away what the peer still sends, until it is done.
    fn part(&mut self, mut socket: TcpStream, since: Instant) -> Progress {
        let mut unread = [0; INCOMING];
        // A peer that never ends is not read from for ever; its deadline comes.
        for _ in 0..16 {
            match would_block(socket.read(&mut unread)) {
                Ok(Some(1..)) => {}
                Ok(None) => break,
                Ok(Some(0)) | Err(_) => return Progress::Over,
            }
        }
        self.stage = Some(Stage::Parting { socket, since });
        Progress::Waiting
    }

    fn secured(
        &self,
        service: &Service,
        mut channel: Channel,
        mut machine: Secured,
        identity: String,
        mut received: Vec<u8>,
        closing: bool,
    ) -> Result<Moved, Refused> {
        channel.send().map_err(Refused::Tls)?;
        if channel.is_sending() || closing {
            if closing && !channel.is_sending() {
                return Ok(Moved::Parts(channel.into_socket(), Refused::Left));
            }
            return Ok(Moved::Waits(Stage::Secured {
                channel,
                machine,
                identity,
                received,
                closing,
            }));
        }
        if service.draining.load(Ordering::Acquire) {
            machine.shut_down();
        }
        let mut message = Message {
            wanted: machine.wanted(),
            received: &mut received,
        };
        let came = channel.receive(&mut message).map_err(Refused::Tls)?;
        if received.len() < machine.wanted() {
            if came == Received::End {
                return Err(Refused::Left);
            }
            return Ok(Moved::Waits(Stage::Secured {
                channel,
                machine,
                identity,
                received,
                closing,
            }));
        }
        let exports = Visible {
            service,
            peer: self.peer,
            identity: &identity,
        };
        let step = machine.receive(&received, &exports)?;
        received.clear();
        let mut closing = false;
        match step {
            Step::Continue => {}
            Step::Reply(reply) => say(&mut channel, &reply)?,
            Step::Close(reply) => {
                say(&mut channel, &reply)?;
                channel.close();
                closing = true;
            }
            Step::Transmit { reply, session } => {
                let presence = service.exports.enter(&session.export).map_err(|reason| {
                    let name = session.export.clone();
                    Refused::NotNow { name, reason }
                })?;
                say(&mut channel, &reply)?;
                return Ok(Moved::Out(Box::new(Established {
                    channel,
                    presence,
                    session,
                    identity,
                    peer: self.peer,
                })));
            }
        }
        Ok(Moved::On(Stage::Secured {
            channel,
            machine,
            identity,
            received,
            closing,
        }))
    }
}

/// Where a step leads.
enum Moved {
    On(Stage),
    Waits(Stage),
    Out(Box<Established>),
    Parts(TcpStream, Refused),
}

fn plain(
    service: &Service,
    mut socket: TcpStream,
    mut machine: Plain,
    mut received: Vec<u8>,
    mut sending: Vec<u8>,
    then: Then,
) -> Result<Moved, Refused> {
    while !sending.is_empty() {
        match would_block(socket.write(&sending))? {
            Some(0) => return Err(Refused::Left),
            Some(sent) => drop(sending.drain(..sent)),
            None => {
                return Ok(Moved::Waits(Stage::Plain {
                    socket,
                    machine,
                    received,
                    sending,
                    then,
                }));
            }
        }
    }
    match then {
        Then::Receive => {}
        Then::Close => return Ok(Moved::Parts(socket, Refused::Left)),
        Then::Upgrade(handshake) => {
            let tls = UnbufferedServerConnection::new(service.tls.config())
                .map_err(|error| Refused::Tls(ChannelError::Tls(error)))?;
            let channel = Channel::new(socket, tls, INCOMING);
            return Ok(Moved::On(Stage::Tls { channel, handshake }));
        }
    }
    if service.draining.load(Ordering::Acquire) {
        machine.shut_down();
    }
    let wanted = machine.wanted();
    while received.len() < wanted {
        let mut piece = vec![0; wanted - received.len()];
        match would_block(socket.read(&mut piece))? {
            Some(0) => return Err(Refused::Left),
            Some(read) => received.extend_from_slice(&piece[..read]),
            None => {
                return Ok(Moved::Waits(Stage::Plain {
                    socket,
                    machine,
                    received,
                    sending,
                    then: Then::Receive,
                }));
            }
        }
    }
    let (machine, sending, then) = match machine.receive(&received)? {
        PlainStep::Continue(machine) => (machine, Vec::new(), Then::Receive),
        PlainStep::Reply(machine, reply) => (machine, reply, Then::Receive),
        PlainStep::StartTls { ack, handshake } => {
            if would_block(socket.peek(&mut [0]))?.is_some_and(|there| there > 0) {
                return Err(Refused::Injected);
            }
            // The machine that comes here is a new one, and is never asked anything.
            (Plain::new(service.limits).0, ack, Then::Upgrade(handshake))
        }
        PlainStep::Close(reply) => (Plain::new(service.limits).0, reply, Then::Close),
    };
    Ok(Moved::On(Stage::Plain {
        socket,
        machine,
        received: Vec::new(),
        sending,
        then,
    }))
}

fn tls(service: &Service, mut channel: Channel, handshake: Handshake) -> Result<Moved, Refused> {
    let received = match channel.receive(&mut HandshakeOnly::default()) {
        Ok(received) => received,
        Err(error) => return Ok(Moved::Parts(channel.into_socket(), Refused::Tls(error))),
    };
    channel.send().map_err(Refused::Tls)?;
    if channel.tls().is_handshaking() {
        if received == Received::End {
            let closed = io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the client closed the connection during the TLS handshake",
            );
            return Err(Refused::Tls(closed.into()));
        }
        return Ok(Moved::Waits(Stage::Tls { channel, handshake }));
    }
    let identity = channel
        .tls()
        .peer_certificates()
        .and_then(|chain| chain.first())
        .map(certificate_names)
        .unwrap_or_default()
        .join(", ");
    Ok(Moved::On(Stage::Secured {
        channel,
        machine: Secured::new(handshake, service.limits),
        identity,
        received: Vec::new(),
        closing: false,
    }))
}

/// Encrypts a reply; options are answered one at a time, so there is always room.
fn say(channel: &mut Channel, mut reply: &[u8]) -> Result<(), Refused> {
    while !reply.is_empty() {
        let taken = channel.encrypt(reply).map_err(Refused::Tls)?;
        if taken == 0 {
            let full = io::Error::from(io::ErrorKind::WriteZero);
            return Err(Refused::Tls(full.into()));
        }
        reply = &reply[taken..];
    }
    Ok(())
}

/// Takes exactly what the state machine wants.
struct Message<'a> {
    wanted: usize,
    received: &'a mut Vec<u8>,
}

impl Sink for Message<'_> {
    type Error = ChannelError;

    fn wants(&self) -> bool {
        self.received.len() < self.wanted
    }

    fn take(&mut self, plaintext: &[u8]) -> Result<usize, ChannelError> {
        let taken = plaintext.len().min(self.wanted - self.received.len());
        self.received.extend_from_slice(&plaintext[..taken]);
        Ok(taken)
    }
}

/// Leaves what comes after the handshake where it is.
#[derive(Default)]
struct HandshakeOnly {
    over: bool,
}

impl Sink for HandshakeOnly {
    type Error = ChannelError;

    fn wants(&self) -> bool {
        !self.over
    }

    fn take(&mut self, _: &[u8]) -> Result<usize, ChannelError> {
        self.over = true;
        Ok(0)
    }
}

fn would_block(result: io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Ok(count) => Ok(Some(count)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}

/// The exports that an authenticated client may know of. Who is here has a certificate for this volume.
struct Visible<'a> {
    service: &'a Service,
    peer: SocketAddr,
    identity: &'a str,
}

impl Exports for Visible<'_> {
    fn find(&self, name: &ExportName) -> Option<ExportInfo> {
        let found = self.service.exports.find(name);
        if found.is_none() {
            let (peer, identity) = (self.peer, self.identity);
            tracing::info!(%peer, ?identity, export = ?name, "asked for an export that is not allowed");
        }
        found.map(|export| self.service.info(&export))
    }

    fn names(&self) -> Vec<ExportName> {
        if !self.service.listed {
            return Vec::new();
        }
        let all = self.service.exports.all();
        all.into_iter()
            .map(|(export, _)| export.name.clone())
            .collect()
    }
}
