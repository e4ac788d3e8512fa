//! A TCP connection and the moment by which everything done on it must be over.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use super::Reason;

/// Reads exact lengths and never a byte more: what is not asked for stays in the socket (C25).
#[derive(Debug)]
pub(super) struct Wire {
    socket: TcpStream,
    timeout: Duration,
    deadline: Instant,
}

impl Wire {
    pub(super) fn connect(address: SocketAddr, timeout: Duration) -> Result<Self, Reason> {
        let deadline = Instant::now() + timeout;
        let socket = TcpStream::connect_timeout(&address, timeout)
            .map_err(|error| explain(error, timeout))?;
        socket.set_nodelay(true).map_err(Reason::Io)?;
        Ok(Self {
            socket,
            timeout,
            deadline,
        })
    }

    pub(super) fn read_exact(&mut self, mut bytes: &mut [u8]) -> Result<(), Reason> {
        while !bytes.is_empty() {
            let count = self.read(bytes)?;
            if count == 0 {
                return Err(Reason::Closed);
            }
            bytes = &mut bytes[count..];
        }
        Ok(())
    }

    pub(super) fn write_all(&mut self, mut bytes: &[u8]) -> Result<(), Reason> {
        while !bytes.is_empty() {
            let left = self.left()?;
            self.socket
                .set_write_timeout(Some(left))
                .map_err(Reason::Io)?;
            match self.socket.write(bytes) {
                Ok(count) => bytes = &bytes[count..],
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(explain(error, self.timeout)),
            }
        }
        Ok(())
    }

    /// The socket, without our timeouts: the kernel's nbd client would inherit them.
    pub(super) fn release(self) -> Result<TcpStream, Reason> {
        self.socket.set_read_timeout(None).map_err(Reason::Io)?;
        self.socket.set_write_timeout(None).map_err(Reason::Io)?;
        Ok(self.socket)
    }

    /// What came, which at the end of the connection is nothing.
    fn read(&mut self, bytes: &mut [u8]) -> Result<usize, Reason> {
        loop {
            let left = self.left()?;
            self.socket
                .set_read_timeout(Some(left))
                .map_err(Reason::Io)?;
            match self.socket.read(bytes) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                result => return result.map_err(|error| explain(error, self.timeout)),
            }
        }
    }

    fn left(&self) -> Result<Duration, Reason> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Reason::TimedOut(self.timeout));
        }
        Ok(left)
    }
}

/// Whether the peer is simply not there any more.
pub(super) fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::ConnectionReset | ErrorKind::ConnectionAborted | ErrorKind::BrokenPipe
    )
}

fn explain(error: io::Error, timeout: Duration) -> Reason {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => Reason::TimedOut(timeout),
        _ => Reason::Io(error),
    }
}
