//! A TLS connection on a socket that never blocks.
//!
//! rustls reads 4 KiB at a time from whatever it is given; a buffer between it and the socket takes a whole burst in
//! one system call. Nothing is decrypted before what was decrypted last has been consumed, so that a session which
//! stops reading holds no more than this buffer and one record.

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};

use rustls::ServerConnection;

/// Bytes of ciphertext that wait to be sent: enough to fill a socket's buffer in one call.
const OUTGOING: usize = 256 << 10;

/// Bytes that are thrown away at the end, before a peer that goes on sending is reset.
const UNREAD: usize = 1 << 20;

/// A connection inside TLS, or on its way there.
pub(super) struct Channel {
    socket: TcpStream,
    tls: ServerConnection,
    /// Ciphertext from the socket that rustls has not been given yet: `incoming[start..end]`.
    incoming: Vec<u8>,
    start: usize,
    end: usize,
    /// The peer said that it will send nothing more.
    closed: bool,
}

/// What came of waiting for bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Received {
    /// There is plaintext.
    Plaintext,
    /// There may be later.
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
}

impl Channel {
    /// `incoming` bytes are read from the socket at a time.
    pub(super) fn new(socket: TcpStream, mut tls: ServerConnection, incoming: usize) -> Self {
        tls.set_buffer_limit(Some(OUTGOING));
        Self {
            socket,
            tls,
            incoming: vec![0; incoming],
            start: 0,
            end: 0,
            closed: false,
        }
    }

    /// Reads more at a time from now on.
    pub(super) fn widen(&mut self, incoming: usize) {
        if incoming > self.incoming.len() {
            self.incoming.resize(incoming, 0);
        }
    }

    pub(super) fn tls(&self) -> &ServerConnection {
        &self.tls
    }

    /// Looks for plaintext, first in what is here already. Also drives the handshake.
    pub(super) fn receive(&mut self) -> Result<Received, ChannelError> {
        loop {
            if !self.plaintext().is_empty() {
                return Ok(Received::Plaintext);
            }
            // What follows is not for rustls, which would not take it.
            if self.closed {
                return Ok(Received::End);
            }
            if self.start < self.end {
                let mut ciphertext = &self.incoming[self.start..self.end];
                let available = ciphertext.len();
                self.tls.read_tls(&mut ciphertext)?;
                self.start += available - ciphertext.len();
                let state = match self.tls.process_new_packets() {
                    Ok(state) => state,
                    Err(error) => {
                        // The alert tells the peer why, if it still listens.
                        let _ = self.send();
                        return Err(ChannelError::Tls(error));
                    }
                };
                self.closed = state.peer_has_closed();
                continue;
            }
            match self.socket.read(&mut self.incoming) {
                Ok(0) => return Ok(Received::End),
                Ok(read) => (self.start, self.end) = (0, read),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Ok(Received::Nothing);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The plaintext that is here, or a first part of it.
    pub(super) fn plaintext(&mut self) -> &[u8] {
        self.tls.reader().into_first_chunk().unwrap_or_default()
    }

    /// Whether [`Channel::receive`] has something to say without the socket.
    pub(super) fn has_buffered(&mut self) -> bool {
        self.start < self.end || self.closed || !self.plaintext().is_empty()
    }

    pub(super) fn consume(&mut self, length: usize) {
        use std::io::BufRead;
        self.tls.reader().consume(length);
    }

    /// Encrypts a part of the plaintext, from its beginning: how much, and 0 when enough waits to be sent.
    pub(super) fn encrypt(&mut self, plaintext: &[IoSlice<'_>]) -> Result<usize, ChannelError> {
        Ok(self.tls.writer().write_vectored(plaintext)?)
    }

    /// Sends what it can without waiting; whether anything was sent.
    pub(super) fn send(&mut self) -> Result<bool, ChannelError> {
        let mut sent = false;
        while self.tls.wants_write() {
            match self.tls.write_tls(&mut self.socket) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::WriteZero).into()),
                Ok(_) => sent = true,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(sent)
    }

    /// Whether ciphertext waits to be sent.
    pub(super) fn is_sending(&self) -> bool {
        self.tls.wants_write()
    }

    /// Says that nothing more will be sent; [`Channel::send`] sends it.
    pub(super) fn close(&mut self) {
        self.tls.send_close_notify();
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
        while let Ok(read @ 1..) = self.socket.read(&mut self.incoming) {
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
