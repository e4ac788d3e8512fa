//! A TLS connection on a socket that never blocks.
//!
//! rustls keeps no buffers here: records are decrypted where they were received and encrypted into the buffer that is
//! sent, so a byte is moved as seldom as rustls allows. Nothing is decrypted before what was decrypted last has been
//! taken: a session that stops reading holds no more than one record of plaintext.

use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};

use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{
    ConnectionState, EncodeError, EncryptError, InsufficientSizeError, UnbufferedStatus,
};
use rustls::version::TLS13;

use super::buffer::Buffer;
use super::records::RecordChannel;
use super::staged::Staged;
use super::wire::{Filled, Wire};
use super::{ChannelError, OUTGOING, Progress, Received, Sink, Transport};
use crate::tls::records::{CONTENT, HEAD, Records, TAIL};

/// What a record may be longer than its plaintext: at most 29 bytes in the suites that are offered.
const RECORD_OVERHEAD: usize = 32;

/// What rustls may put before the first record: an answer to a KeyUpdate, and one of its own.
const AHEAD: usize = 256;

/// Bytes of ciphertext that may wait to become a message: rustls lets no handshake message be longer.
const LONGEST: usize = 64 << 10;

/// A connection inside TLS, or on its way there.
pub(in crate::server) struct Channel {
    wire: Wire,
    tls: UnbufferedServerConnection,
    /// Plaintext that was not taken.
    rest: Buffer,
    outgoing: Buffer,
    /// The peer said that it will send nothing more.
    closed: bool,
}

impl Channel {
    /// `incoming` bytes are read from the socket at a time.
    pub(in crate::server) fn new(
        socket: TcpStream,
        tls: UnbufferedServerConnection,
        incoming: usize,
    ) -> Self {
        Self {
            wire: Wire::new(socket, incoming),
            tls,
            rest: Buffer::default(),
            outgoing: Buffer::default(),
            closed: false,
        }
    }

    /// What a session sends and receives with from now on, reading `incoming` bytes at a time, and what is to be sent first.
    pub(in crate::server) fn into_transport(
        mut self,
        incoming: usize,
    ) -> Result<(Transport, Staged), ChannelError> {
        self.wire.widen(incoming);
        // What rustls still has to say is said with its keys.
        self.writing(|_, _| Ok(0))?;
        if self.tls.protocol_version() != Some(TLS13.version) {
            return Ok((Transport::Rustls(Box::new(self)), Staged::default()));
        }
        let tls = Records::take_over(self.tls).map_err(ChannelError::Tls)?;
        let channel = RecordChannel::new(self.wire, tls, self.rest, self.closed);
        let staged = Staged::behind(self.outgoing);
        Ok((Transport::Records(Box::new(channel)), staged))
    }

    /// Gives back the memory that is not in use.
    pub(super) fn shrink(&mut self) {
        let buffers = [&mut self.wire.incoming, &mut self.rest, &mut self.outgoing];
        buffers.into_iter().for_each(Buffer::shrink);
    }

    pub(in crate::server) fn tls(&self) -> &UnbufferedServerConnection {
        &self.tls
    }

    /// Looks for plaintext, first in what is here already, and hands it to `sink`. Also drives the handshake.
    pub(in crate::server) fn receive<S: Sink>(
        &mut self,
        sink: &mut S,
    ) -> Result<Received, S::Error> {
        let mut drained = false;
        loop {
            if !sink.wants() {
                return Ok(Received::Enough);
            }
            if !self.rest.is_empty() {
                let taken = sink.take(self.rest.filled())?;
                self.rest.consume(taken);
                continue;
            }
            if !self.wire.searched {
                self.search(sink)?;
                continue;
            }
            // What follows is not for rustls, which would not take it.
            if self.closed {
                return Ok(Received::End);
            }
            if drained {
                return Ok(Received::Nothing);
            }
            match self.wire.fill().map_err(ChannelError::Io)? {
                Filled::Some { drained: all } => {
                    drained = all;
                    sink.arrived();
                }
                Filled::Nothing => return Ok(Received::Nothing),
                Filled::End => return Ok(Received::End),
                Filled::Full => {
                    let longer = 2 * self.wire.wide();
                    if longer > LONGEST {
                        return Err(ChannelError::Endless.into());
                    }
                    self.wire.widen(longer);
                }
            }
        }
    }

    /// Has rustls take the next message out of what was received.
    fn search<S: Sink>(&mut self, sink: &mut S) -> Result<(), S::Error> {
        let UnbufferedStatus { mut discard, state } = self
            .tls
            .process_tls_records(self.wire.incoming.filled_mut());
        match state {
            Ok(ConnectionState::ReadTraffic(mut traffic)) => {
                while let Some(record) = traffic.next_record() {
                    let record = record.map_err(ChannelError::Tls)?;
                    discard += record.discard;
                    let taken = if self.rest.is_empty() {
                        sink.take(record.payload)?
                    } else {
                        0
                    };
                    self.rest.append(&record.payload[taken..]);
                }
            }
            Ok(ConnectionState::EncodeTlsData(mut message)) => {
                encode(&mut message, &mut self.outgoing)?;
            }
            // It is in the buffer, and will be sent before anything else.
            Ok(ConnectionState::TransmitTlsData(message)) => message.done(),
            Ok(ConnectionState::PeerClosed | ConnectionState::Closed) => {
                self.closed = true;
                self.wire.searched = true;
            }
            Ok(ConnectionState::BlockedHandshake | ConnectionState::WriteTraffic(_)) => {
                self.wire.searched = true;
            }
            Ok(other) => {
                let unexpected = rustls::Error::General(format!("{other:?}"));
                return Err(ChannelError::Tls(unexpected).into());
            }
            Err(error) => {
                // The alert tells the peer why, if it still listens.
                let status = self
                    .tls
                    .process_tls_records(self.wire.incoming.filled_mut());
                if let Ok(ConnectionState::EncodeTlsData(mut alert)) = status.state {
                    encode(&mut alert, &mut self.outgoing)?;
                }
                let _ = self.send();
                return Err(ChannelError::Tls(error).into());
            }
        }
        self.wire.incoming.consume(discard);
        Ok(())
    }

    /// Whether [`Channel::receive`] has something to say without the socket.
    pub(super) fn has_buffered(&self) -> bool {
        !self.wire.searched || self.closed || !self.rest.is_empty()
    }

    /// Encrypts a part of the plaintext, from its beginning: how much, and 0 when enough waits to be sent.
    pub(in crate::server) fn encrypt(&mut self, plaintext: &[u8]) -> Result<usize, ChannelError> {
        if self.outgoing.len() >= OUTGOING || plaintext.is_empty() {
            return Ok(0);
        }
        let most = (OUTGOING - self.outgoing.len()).next_multiple_of(CONTENT);
        // A short end is not left for a record and a packet of its own.
        let plaintext = match plaintext.len() {
            all if all < most + CONTENT => plaintext,
            _ => &plaintext[..most],
        };
        let needed = plaintext.len() + plaintext.len().div_ceil(CONTENT) * RECORD_OVERHEAD + AHEAD;
        let used = self.writing(|traffic, outgoing| {
            match traffic.encrypt(plaintext, outgoing.reserve(needed)) {
                Err(EncryptError::InsufficientSize(InsufficientSizeError { required_size })) => {
                    traffic.encrypt(plaintext, outgoing.reserve(required_size))
                }
                encrypted => encrypted,
            }
        })?;
        Ok(if used { plaintext.len() } else { 0 })
    }

    /// Says that nothing more will be sent; [`Channel::send`] sends it.
    pub(in crate::server) fn close(&mut self) {
        // A peer that cannot be told sees the connection end.
        let _ =
            self.writing(|traffic, outgoing| traffic.queue_close_notify(outgoing.reserve(AHEAD)));
    }

    /// Has rustls write into the buffer that is sent next; `false` where it is not yet, or no more, able to.
    fn writing(
        &mut self,
        mut write: impl FnMut(&mut Traffic<'_>, &mut Buffer) -> Result<usize, EncryptError>,
    ) -> Result<bool, ChannelError> {
        loop {
            // Only what rustls knows to be incomplete, for else it would decrypt another record. But that it must see: a
            // part of a handshake message is in it, which rustls remembers by its place.
            let known = if self.wire.searched {
                self.wire.incoming.filled_mut()
            } else {
                &mut []
            };
            let UnbufferedStatus { discard, state } = self.tls.process_tls_records(known);
            let written = match state.map_err(ChannelError::Tls)? {
                ConnectionState::EncodeTlsData(mut message) => {
                    encode(&mut message, &mut self.outgoing)?;
                    None
                }
                ConnectionState::TransmitTlsData(message) => {
                    message.done();
                    None
                }
                ConnectionState::PeerClosed => {
                    self.closed = true;
                    None
                }
                ConnectionState::WriteTraffic(mut traffic) => {
                    match write(&mut traffic, &mut self.outgoing) {
                        Ok(written) => {
                            self.outgoing.fill(written);
                            Some(true)
                        }
                        Err(_) => return Err(ChannelError::Exhausted),
                    }
                }
                _ => Some(false),
            };
            self.wire.incoming.consume(discard);
            if let Some(written) = written {
                return Ok(written);
            }
        }
    }

    /// Sends what it can without waiting; whether anything was sent.
    pub(in crate::server) fn send(&mut self) -> Result<bool, ChannelError> {
        let mut sent = false;
        while !self.outgoing.is_empty() {
            match self.wire.write(self.outgoing.filled())? {
                0 => break,
                written => self.outgoing.consume(written),
            }
            sent = true;
        }
        Ok(sent)
    }

    /// Encrypts and sends what is staged, as much as it can without waiting.
    pub(super) fn transmit(&mut self, staged: &mut Staged) -> Result<Progress, ChannelError> {
        let mut progress = Progress::default();
        loop {
            let before = staged.len();
            while let Some((_, record)) = staged.unsealed() {
                let content = &record[HEAD..record.len() - TAIL];
                if self.encrypt(content)? == 0 {
                    break;
                }
                staged.seal();
                staged.sent(staged.sealed().len());
            }
            let sent = self.send()?;
            progress.sent |= sent;
            progress.blocked = self.is_sending();
            if progress.blocked || staged.is_empty() {
                return Ok(progress);
            }
            // Where something was sent, nothing may have been encrypted because there was no room.
            if !sent && staged.len() == before {
                return Err(ChannelError::Exhausted);
            }
        }
    }

    /// Whether ciphertext waits to be sent.
    pub(in crate::server) fn is_sending(&self) -> bool {
        !self.outgoing.is_empty()
    }

    pub(super) fn wire(&mut self) -> &mut Wire {
        &mut self.wire
    }

    /// The socket, when nothing more is to be said in TLS.
    pub(in crate::server) fn into_socket(self) -> TcpStream {
        self.wire.into_socket()
    }

    /// Ends the connection, after what can still be sent: an alert, or close_notify.
    pub(in crate::server) fn hang_up(&mut self) {
        let _ = self.send();
        self.wire.hang_up();
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wire.as_fd()
    }
}

type Traffic<'c> = rustls::unbuffered::WriteTraffic<'c, rustls::server::ServerConnectionData>;
type Message<'c> = rustls::unbuffered::EncodeTlsData<'c, rustls::server::ServerConnectionData>;

/// Appends a message of rustls' own to what is sent next.
fn encode(message: &mut Message<'_>, outgoing: &mut Buffer) -> Result<(), ChannelError> {
    let encoded = match message.encode(outgoing.reserve(AHEAD)) {
        Err(EncodeError::InsufficientSize(InsufficientSizeError { required_size })) => {
            message.encode(outgoing.reserve(required_size))
        }
        encoded => encoded,
    };
    let written =
        encoded.map_err(|error| ChannelError::Tls(rustls::Error::General(error.to_string())))?;
    outgoing.fill(written);
    Ok(())
}
