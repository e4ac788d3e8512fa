//! A TLS connection on a socket that never blocks.
//!
//! rustls keeps no buffers here: records are decrypted where they were received and encrypted into the buffer that is
//! sent, so a byte is moved as seldom as rustls allows. Nothing is decrypted before what was decrypted last has been
//! taken: a session that stops reading holds no more than one record of plaintext.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};

use rustix::io::ioctl_fionread;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{
    ConnectionState, EncodeError, EncryptError, InsufficientSizeError, UnbufferedStatus,
};

use super::buffer::Buffer;
use crate::sys::socket::set_receive_low_water;

/// The longest plaintext of a record (RFC 8446, 5.1).
const RECORD: usize = 16 << 10;

/// What a record may be longer than its plaintext: at most 29 bytes in the suites that are offered.
const RECORD_OVERHEAD: usize = 32;

/// What rustls may put before the first record: an answer to a KeyUpdate, and one of its own.
const AHEAD: usize = 256;

/// Bytes of plaintext that are encrypted before they are sent. More would leave the processor's second cache between
/// the cipher and the socket, fewer would be more system calls.
const OUTGOING: usize = 8 * RECORD;

/// Bytes of ciphertext that may wait to become a message: rustls lets no handshake message be longer.
const LONGEST: usize = 64 << 10;

/// Bytes that are thrown away at the end, before a peer that goes on sending is reset.
const UNREAD: usize = 1 << 20;

/// A connection inside TLS, or on its way there.
pub(super) struct Channel {
    socket: TcpStream,
    tls: UnbufferedServerConnection,
    incoming: Buffer,
    /// How long `incoming` is to be.
    wide: usize,
    /// rustls has seen all of `incoming`, and found no more whole message in it.
    searched: bool,
    /// Plaintext that was not taken.
    rest: Buffer,
    outgoing: Buffer,
    /// The peer said that it will send nothing more.
    closed: bool,
    /// Bytes that poll(2) is to wait for.
    low_water: usize,
}

/// Where plaintext goes.
pub(super) trait Sink {
    type Error: From<ChannelError>;

    /// Whether more of it is wanted now.
    fn wants(&self) -> bool;

    /// Takes a part of it, from its beginning; how much. All, as long as more is wanted.
    fn take(&mut self, plaintext: &[u8]) -> Result<usize, Self::Error>;
}

/// What came of looking for plaintext.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Received {
    /// No more was wanted, and there may be more here.
    Enough,
    /// There may be more later.
    Nothing,
    /// There never will be.
    End,
}

/// Why a connection cannot go on.
#[derive(Debug, thiserror::Error)]
pub(super) enum ChannelError {
    #[error("{}", crate::tls::explain(.0))]
    Tls(rustls::Error),
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("the peer's TLS message does not end after {LONGEST} bytes")]
    Endless,
    #[error("the session's keys are used up")]
    Exhausted,
}

impl Channel {
    /// `incoming` bytes are read from the socket at a time.
    pub(super) fn new(socket: TcpStream, tls: UnbufferedServerConnection, incoming: usize) -> Self {
        Self {
            socket,
            tls,
            incoming: Buffer::default(),
            wide: incoming,
            searched: true,
            rest: Buffer::default(),
            outgoing: Buffer::default(),
            closed: false,
            low_water: 1,
        }
    }

    /// Reads more at a time from now on.
    pub(super) fn widen(&mut self, incoming: usize) {
        self.wide = self.wide.max(incoming);
    }

    /// Gives back the memory that is not in use.
    pub(super) fn shrink(&mut self) {
        for buffer in [&mut self.incoming, &mut self.rest, &mut self.outgoing] {
            buffer.shrink();
        }
    }

    pub(super) fn tls(&self) -> &UnbufferedServerConnection {
        &self.tls
    }

    /// Looks for plaintext, first in what is here already, and hands it to `sink`. Also drives the handshake.
    pub(super) fn receive<S: Sink>(&mut self, sink: &mut S) -> Result<Received, S::Error> {
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
            if !self.searched {
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
            let space = self.incoming.space(self.wide);
            if space.is_empty() {
                let longer = 2 * self.wide;
                if longer > LONGEST {
                    return Err(ChannelError::Endless.into());
                }
                self.wide = longer;
                continue;
            }
            match self.socket.read(space) {
                Ok(0) => return Ok(Received::End),
                Ok(read) => {
                    // There is nothing left in the socket; what comes meanwhile wakes the session.
                    drained = read < space.len();
                    self.incoming.fill(read);
                    self.searched = false;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Ok(Received::Nothing);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(ChannelError::Io(error).into()),
            }
        }
    }

    /// Has rustls take the next message out of what was received.
    fn search<S: Sink>(&mut self, sink: &mut S) -> Result<(), S::Error> {
        let UnbufferedStatus { mut discard, state } =
            self.tls.process_tls_records(self.incoming.filled_mut());
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
                self.searched = true;
            }
            Ok(ConnectionState::BlockedHandshake | ConnectionState::WriteTraffic(_)) => {
                self.searched = true;
            }
            Ok(other) => {
                let unexpected = rustls::Error::General(format!("{other:?}"));
                return Err(ChannelError::Tls(unexpected).into());
            }
            Err(error) => {
                // The alert tells the peer why, if it still listens.
                let status = self.tls.process_tls_records(self.incoming.filled_mut());
                if let Ok(ConnectionState::EncodeTlsData(mut alert)) = status.state {
                    encode(&mut alert, &mut self.outgoing)?;
                }
                let _ = self.send();
                return Err(ChannelError::Tls(error).into());
            }
        }
        self.incoming.consume(discard);
        Ok(())
    }

    /// Whether [`Channel::receive`] has something to say without the socket.
    pub(super) fn has_buffered(&self) -> bool {
        !self.searched || self.closed || !self.rest.is_empty()
    }

    /// Encrypts a part of the plaintext, from its beginning: how much, and 0 when enough waits to be sent.
    pub(super) fn encrypt(&mut self, plaintext: &[u8]) -> Result<usize, ChannelError> {
        if self.outgoing.len() >= OUTGOING || plaintext.is_empty() {
            return Ok(0);
        }
        let most = (OUTGOING - self.outgoing.len()).next_multiple_of(RECORD);
        // A short end is not left for a record and a packet of its own.
        let plaintext = match plaintext.len() {
            all if all < most + RECORD => plaintext,
            _ => &plaintext[..most],
        };
        let needed = plaintext.len() + plaintext.len().div_ceil(RECORD) * RECORD_OVERHEAD + AHEAD;
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
    pub(super) fn close(&mut self) {
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
            let known = if self.searched {
                self.incoming.filled_mut()
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
            self.incoming.consume(discard);
            if let Some(written) = written {
                return Ok(written);
            }
        }
    }

    /// Sends what it can without waiting; whether anything was sent.
    pub(super) fn send(&mut self) -> Result<bool, ChannelError> {
        let mut sent = false;
        while !self.outgoing.is_empty() {
            match self.socket.write(self.outgoing.filled()) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::WriteZero).into()),
                Ok(written) => {
                    self.outgoing.consume(written);
                    sent = true;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(sent)
    }

    /// From now on poll(2) finds something to read when so many bytes are there, or the end.
    pub(super) fn set_low_water(&mut self, bytes: usize) -> Result<(), ChannelError> {
        if bytes != self.low_water {
            set_receive_low_water(&self.socket, bytes)?;
            self.low_water = bytes;
        }
        Ok(())
    }

    /// Bytes that wait in the socket.
    pub(super) fn unread(&self) -> Result<usize, ChannelError> {
        let unread = ioctl_fionread(&self.socket).map_err(io::Error::from)?;
        Ok(usize::try_from(unread).unwrap_or(usize::MAX))
    }

    /// Whether ciphertext waits to be sent.
    pub(super) fn is_sending(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// The socket, when nothing more is to be said in TLS.
    pub(super) fn into_socket(self) -> TcpStream {
        self.socket
    }

    /// Ends the connection, after what can still be sent: an alert, or close_notify.
    ///
    /// What the peer has sent and nobody read is thrown away first. A socket that is closed on unread bytes resets the
    /// connection, and the peer might never see our last words.
    pub(super) fn hang_up(&mut self) {
        let _ = self.send();
        let _ = self.socket.shutdown(Shutdown::Write);
        let mut most = UNREAD;
        let mut unread = [0; 4 << 10];
        while let Ok(read @ 1..) = self.socket.read(&mut unread) {
            if read >= most {
                return;
            }
            most -= read;
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
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
