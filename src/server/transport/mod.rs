//! A client's connection in TLS: the socket, what was received and not understood, what is to be encrypted and sent.
//!
//! [`Channel`] has rustls make and open all records: during the handshake and the negotiation, and for as long as a TLS
//! 1.2 session lasts. A TLS 1.3 session in transmission makes them itself, in place ([`RecordChannel`]).

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

mod buffer;
mod channel;
mod records;
mod staged;
#[cfg(test)]
mod tests;
mod wire;

pub(super) use self::channel::Channel;
use self::records::RecordChannel;
pub(super) use self::staged::{Room, Staged};
use self::wire::Wire;
use crate::tls::records::CONTENT;

/// Bytes of plaintext that are encrypted before they are sent. More would leave the processor's second cache between
/// the cipher and the socket, fewer would be more system calls.
const OUTGOING: usize = 8 * CONTENT;

/// Where plaintext goes.
pub(super) trait Sink {
    type Error: From<ChannelError>;

    /// Whether more of it is wanted now.
    fn wants(&self) -> bool;

    /// The peer's next bytes are there.
    fn arrived(&mut self) {}

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

/// What came of sending.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Progress {
    pub(super) sent: bool,
    /// There is more than the socket takes now.
    pub(super) blocked: bool,
}

/// Why a connection cannot go on.
#[derive(Debug, thiserror::Error)]
pub(super) enum ChannelError {
    #[error("{}", crate::tls::explain(.0))]
    Tls(rustls::Error),
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("the peer's TLS message is longer than any that is allowed")]
    Endless,
    #[error("the session's keys are used up")]
    Exhausted,
}

/// A connection in transmission.
pub(super) enum Transport {
    Rustls(Box<Channel>),
    Records(Box<RecordChannel>),
}

impl Transport {
    /// Looks for plaintext, first in what is here already, and hands it to `sink`.
    pub(super) fn receive<S: Sink>(&mut self, sink: &mut S) -> Result<Received, S::Error> {
        match self {
            Self::Rustls(channel) => channel.receive(sink),
            Self::Records(channel) => channel.receive(sink),
        }
    }

    /// Whether [`Transport::receive`] has something to say without the socket.
    pub(super) fn has_buffered(&self) -> bool {
        match self {
            Self::Rustls(channel) => channel.has_buffered(),
            Self::Records(channel) => channel.has_buffered(),
        }
    }

    /// Encrypts and sends what is staged, as much as it can without waiting.
    pub(super) fn transmit(&mut self, staged: &mut Staged) -> Result<Progress, ChannelError> {
        match self {
            Self::Rustls(channel) => channel.transmit(staged),
            Self::Records(channel) => channel.transmit(staged),
        }
    }

    /// Gives back the memory that is not in use.
    pub(super) fn shrink(&mut self) {
        match self {
            Self::Rustls(channel) => channel.shrink(),
            Self::Records(channel) => channel.shrink(),
        }
    }

    /// From now on poll(2) finds something to read when so many bytes are there, or the end.
    pub(super) fn set_low_water(&mut self, bytes: usize) -> Result<(), ChannelError> {
        Ok(self.wire().set_low_water(bytes)?)
    }

    /// Bytes that wait in the socket.
    pub(super) fn unread(&mut self) -> Result<usize, ChannelError> {
        Ok(self.wire().unread()?)
    }

    /// Ends the connection, after what can still be sent, and tells the peer.
    pub(super) fn close(&mut self, staged: &mut Staged) {
        match self {
            Self::Rustls(channel) => {
                channel.close();
                channel.hang_up();
            }
            Self::Records(channel) => channel.close(staged),
        }
    }

    /// Tells the peer what it did wrong, if that is why the connection ends.
    pub(super) fn give_up(&mut self, staged: &mut Staged) {
        match self {
            // It was told when that was found.
            Self::Rustls(_) => {}
            Self::Records(channel) => channel.give_up(staged),
        }
    }

    fn wire(&mut self) -> &mut Wire {
        match self {
            Self::Rustls(channel) => channel.wire(),
            Self::Records(channel) => channel.wire(),
        }
    }
}

impl AsFd for Transport {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Rustls(channel) => channel.as_fd(),
            Self::Records(channel) => channel.as_fd(),
        }
    }
}
