//! A connection as verification needs it: TCP or a Unix socket, in plaintext or inside TLS, raw, and over at its
//! deadline.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::{ClientConfig, ClientConnection};
use rustls_pki_types::ServerName;

use super::failure::{Cancel, Failure};
use super::server::Address;
use crate::client::{Reason, Step};

/// How long a read sleeps before it looks whether anybody still wants to know.
const NAP: Duration = Duration::from_millis(100);

/// Bytes between two looks at the clock.
const PIECE: usize = 64 << 10;

/// A stream of bytes.
#[derive(Debug)]
pub(super) struct Link {
    /// A Unix socket has no methods that matter here beyond those of a TCP one.
    socket: TcpStream,
    timeout: Duration,
    deadline: Instant,
    cancel: Cancel,
    tls: Option<Box<ClientConnection>>,
    /// What came for TLS, and was not given to it yet.
    raw: Vec<u8>,
    /// Whether anything came inside TLS: before that, an end means that our certificate was not accepted.
    heard: bool,
}

impl Link {
    pub(super) fn connect(
        address: &Address,
        timeout: Duration,
        cancel: &Cancel,
    ) -> Result<Self, Failure> {
        let deadline = Instant::now() + timeout;
        let failed = |error: io::Error| Failure::new(Step::Connect, explain(error, timeout));
        let socket = match address {
            Address::Tcp(address) => {
                let socket = TcpStream::connect_timeout(address, timeout).map_err(failed)?;
                socket.set_nodelay(true).map_err(failed)?;
                socket
            }
            Address::Unix(path) => {
                TcpStream::from(OwnedFd::from(UnixStream::connect(path).map_err(failed)?))
            }
        };
        Ok(Self {
            socket,
            timeout,
            deadline,
            cancel: cancel.clone(),
            tls: None,
            raw: Vec::new(),
            heard: false,
        })
    }

    pub(super) fn is_secured(&self) -> bool {
        self.tls.is_some()
    }

    pub(super) fn tls(&self) -> Option<&ClientConnection> {
        self.tls.as_deref()
    }

    /// Makes the TLS handshake on what was plaintext so far. In TLS 1.3 the server's verdict on our certificate comes
    /// only with the first read.
    pub(super) fn start_tls(
        &mut self,
        config: Arc<ClientConfig>,
        name: ServerName<'static>,
    ) -> Result<(), Reason> {
        let tls = ClientConnection::new(config, name).map_err(Reason::Tls)?;
        self.resume_tls(tls)
    }

    /// Goes on with a handshake whose first message may have been sent already.
    pub(super) fn resume_tls(&mut self, tls: ClientConnection) -> Result<(), Reason> {
        self.tls = Some(Box::new(tls));
        self.flush()?;
        while self.tls.as_ref().is_some_and(|tls| tls.is_handshaking()) {
            self.pull()?;
        }
        Ok(())
    }

    pub(super) fn read_exact(&mut self, bytes: &mut [u8]) -> Result<(), Reason> {
        let mut filled = 0;
        while filled < bytes.len() {
            match self.read(&mut bytes[filled..])? {
                0 if self.tls.is_some() && !self.heard => return Err(Reason::ClosedAfterHandshake),
                0 => return Err(Reason::Closed),
                count => filled += count,
            }
        }
        Ok(())
    }

    /// `length` bytes; memory follows what really comes, not what was claimed.
    pub(super) fn take(&mut self, length: u32) -> Result<Vec<u8>, Reason> {
        let length = length as usize;
        let mut bytes = Vec::new();
        while bytes.len() < length {
            let start = bytes.len();
            bytes.resize(length.min(start + PIECE), 0);
            self.read_exact(&mut bytes[start..])?;
        }
        Ok(bytes)
    }

    /// Whether the connection ends here, without another byte.
    pub(super) fn ends(&mut self) -> Result<bool, Reason> {
        match self.read(&mut [0]) {
            Ok(count) => Ok(count == 0),
            Err(Reason::Io(error)) if is_gone(&error) => Ok(true),
            // The server's last word in TLS, or a close without close_notify.
            Err(Reason::Tls(rustls::Error::AlertReceived(_))) => Ok(true),
            Err(reason) => Err(reason),
        }
    }

    /// Whether something comes, or the connection ends, within `patience`.
    pub(super) fn stirs(&mut self, patience: Duration) -> Result<bool, Reason> {
        if !self.raw.is_empty() {
            return Ok(true);
        }
        let end = Instant::now() + patience;
        let deadline = self.deadline;
        self.deadline = end.min(deadline);
        let mut byte = [0];
        let stirred = loop {
            match self.nap().and_then(|()| {
                self.socket
                    .peek(&mut byte)
                    .map_err(|error| explain(error, self.timeout))
            }) {
                Ok(_) => break Ok(true),
                Err(Reason::Io(error)) if is_pause(&error) => {}
                Err(Reason::Io(_)) => break Ok(true),
                Err(Reason::TimedOut(_)) if Instant::now() >= end => break Ok(false),
                Err(reason) => break Err(reason),
            }
        };
        self.deadline = deadline;
        stirred
    }

    pub(super) fn write_all(&mut self, mut bytes: &[u8]) -> Result<(), Reason> {
        while !bytes.is_empty() {
            let Some(tls) = self.tls.as_mut() else {
                return self.push(bytes);
            };
            let count = tls.writer().write(bytes).map_err(Reason::Io)?;
            bytes = &bytes[count..];
            if let Err(reason) = self.flush() {
                return Err(self.last_words(reason));
            }
        }
        Ok(())
    }

    /// Past TLS, straight into the socket.
    pub(super) fn push(&mut self, mut bytes: &[u8]) -> Result<(), Reason> {
        while !bytes.is_empty() {
            let left = self.left()?.min(NAP);
            self.socket
                .set_write_timeout(Some(left))
                .map_err(Reason::Io)?;
            match self.socket.write(bytes) {
                Ok(count) => bytes = &bytes[count..],
                Err(error) if is_pause(&error) => {}
                Err(error) => return Err(explain(error, self.timeout)),
            }
        }
        Ok(())
    }

    /// What comes in the socket, whatever it is.
    pub(super) fn pop(&mut self, bytes: &mut [u8]) -> Result<usize, Reason> {
        loop {
            self.nap()?;
            match self.socket.read(bytes) {
                Err(error) if is_pause(&error) => {}
                result => return result.map_err(|error| explain(error, self.timeout)),
            }
        }
    }

    /// Says goodbye; a server that is gone already does not matter.
    pub(super) fn close(mut self) {
        if let Some(tls) = self.tls.as_mut() {
            tls.send_close_notify();
            let _ = self.flush();
        }
    }

    /// What came, which at the end of the connection is nothing.
    fn read(&mut self, bytes: &mut [u8]) -> Result<usize, Reason> {
        loop {
            let Some(tls) = self.tls.as_mut() else {
                return self.pop(bytes);
            };
            match tls.reader().read(bytes) {
                Ok(count) => {
                    self.heard |= count > 0;
                    return Ok(count);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => match self.pull() {
                    Err(Reason::Closed) => return Ok(0),
                    Err(Reason::Io(error)) if is_gone(&error) && !self.heard => return Ok(0),
                    other => other?,
                },
                // Without close_notify; whether that matters is another question.
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(0),
                Err(error) => return Err(Reason::Io(error)),
            }
        }
    }

    /// Gives TLS what the socket has, until there is something to read: rustls does not hold more than that.
    fn pull(&mut self) -> Result<(), Reason> {
        if self.raw.is_empty() {
            let mut piece = [0; 16 << 10];
            let count = self.pop(&mut piece)?;
            if count == 0 {
                return Err(Reason::Closed);
            }
            self.raw.extend_from_slice(&piece[..count]);
        }
        let Some(tls) = self.tls.as_mut() else {
            return Ok(());
        };
        let mut rest = self.raw.as_slice();
        let mut processed = Ok(());
        while !rest.is_empty() {
            if tls.read_tls(&mut rest).map_err(Reason::Io)? == 0 {
                return Err(Reason::Closed);
            }
            match tls.process_new_packets() {
                Ok(state) if state.plaintext_bytes_to_read() == 0 => {}
                Ok(_) => break,
                Err(error) => {
                    processed = Err(Reason::Tls(error));
                    break;
                }
            }
        }
        let taken = self.raw.len() - rest.len();
        self.raw.drain(..taken);
        let flushed = self.flush();
        processed?;
        flushed
    }

    fn flush(&mut self) -> Result<(), Reason> {
        let mut bytes = Vec::new();
        if let Some(tls) = self.tls.as_mut() {
            while tls.wants_write() {
                tls.write_tls(&mut bytes).map_err(Reason::Io)?;
            }
        }
        self.push(&bytes)
    }

    /// A server that closes while we write has often said why: an alert waits in the socket.
    fn last_words(&mut self, failure: Reason) -> Reason {
        match &failure {
            Reason::Io(error) if is_gone(error) => {}
            _ => return failure,
        }
        match self.pull() {
            Err(reason @ Reason::Tls(_)) => reason,
            _ if self.heard => failure,
            _ => Reason::ClosedAfterHandshake,
        }
    }

    /// Sets the next read's timeout.
    fn nap(&mut self) -> Result<(), Reason> {
        let left = self.left()?.min(NAP);
        self.socket.set_read_timeout(Some(left)).map_err(Reason::Io)
    }

    fn left(&self) -> Result<Duration, Reason> {
        if self.cancel.is_cancelled() {
            return Err(Reason::Cancelled);
        }
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Reason::TimedOut(self.timeout));
        }
        Ok(left)
    }
}

/// A TLS connection and its first message, which is not in it any more.
pub(super) fn hello(
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
) -> Result<(ClientConnection, Vec<u8>), Reason> {
    let mut tls = ClientConnection::new(config, name).map_err(Reason::Tls)?;
    let mut bytes = Vec::new();
    while tls.wants_write() {
        tls.write_tls(&mut bytes).map_err(Reason::Io)?;
    }
    Ok((tls, bytes))
}

/// Whether the peer is simply not there any more.
fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::ConnectionReset | ErrorKind::ConnectionAborted | ErrorKind::BrokenPipe
    )
}

/// Whether nothing happened yet.
fn is_pause(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock)
}

fn explain(error: io::Error, timeout: Duration) -> Reason {
    match error.kind() {
        ErrorKind::TimedOut => Reason::TimedOut(timeout),
        _ => Reason::Io(error),
    }
}
