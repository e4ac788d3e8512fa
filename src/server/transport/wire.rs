//! A socket that never blocks, and what was read from it and not yet understood.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};

use rustix::io::ioctl_fionread;

use super::buffer::Buffer;
use crate::sys::socket::set_receive_low_water;

/// Bytes that are thrown away at the end, before a peer that goes on sending is reset.
const UNREAD: usize = 1 << 20;

pub(super) struct Wire {
    socket: TcpStream,
    pub(super) incoming: Buffer,
    /// How long `incoming` is to be.
    wide: usize,
    /// There is no more whole message in `incoming`.
    pub(super) searched: bool,
    /// Bytes that poll(2) is to wait for.
    low_water: usize,
}

/// What came of reading.
pub(super) enum Filled {
    /// The buffer is full, and has no message in it that ends.
    Full,
    /// There is something to search; whether the socket has nothing more just now.
    Some {
        drained: bool,
    },
    /// There may be something later.
    Nothing,
    End,
}

impl Wire {
    pub(super) fn new(socket: TcpStream, incoming: usize) -> Self {
        Self {
            socket,
            incoming: Buffer::default(),
            wide: incoming,
            searched: true,
            low_water: 1,
        }
    }

    /// Reads more at a time from now on, if it is more.
    pub(super) fn widen(&mut self, incoming: usize) {
        self.wide = self.wide.max(incoming);
    }

    pub(super) fn wide(&self) -> usize {
        self.wide
    }

    /// Reads once.
    pub(super) fn fill(&mut self) -> io::Result<Filled> {
        let space = self.incoming.space(self.wide);
        if space.is_empty() {
            return Ok(Filled::Full);
        }
        loop {
            return match self.socket.read(space) {
                Ok(0) => Ok(Filled::End),
                Ok(read) => {
                    // What comes meanwhile wakes the session.
                    let drained = read < space.len();
                    self.incoming.fill(read);
                    self.searched = false;
                    Ok(Filled::Some { drained })
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Filled::Nothing),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => Err(error),
            };
        }
    }

    /// Writes once: how much, and 0 when the socket takes no more now.
    pub(super) fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            return match self.socket.write(bytes) {
                Ok(0) => Err(io::ErrorKind::WriteZero.into()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                written => written,
            };
        }
    }

    /// From now on poll(2) finds something to read when so many bytes are there, or the end.
    pub(super) fn set_low_water(&mut self, bytes: usize) -> io::Result<()> {
        if bytes != self.low_water {
            set_receive_low_water(&self.socket, bytes)?;
            self.low_water = bytes;
        }
        Ok(())
    }

    /// Bytes that wait in the socket.
    pub(super) fn unread(&self) -> io::Result<usize> {
        let unread = ioctl_fionread(&self.socket)?;
        Ok(usize::try_from(unread).unwrap_or(usize::MAX))
    }

    pub(super) fn into_socket(self) -> TcpStream {
        self.socket
    }

    /// Ends the connection.
    ///
    /// What the peer has sent and nobody read is thrown away first. A socket that is closed on unread bytes resets the
    /// connection, and the peer might never see our last words.
    pub(super) fn hang_up(&mut self) {
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

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
