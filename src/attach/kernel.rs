//! Commands to the kernel's nbd driver, and its announcements of dead sockets.
//!
//! What may become a device's socket is a matter of type: [`DeviceSocket`] is either encrypted by the kernel or
//! the near end of the proxy, and nothing else is ever offered to the driver (K2).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout, socket_timeout};

use super::netlink::{Connect, Family, Message, Messages, connected_index, dead_link, find_family};
use crate::sys::ktls::Encrypted;
use crate::sys::netlink::{Socket, Subscription};

/// The kernel's answers are shorter; the controller's about a family is the longest, some hundred bytes.
const DATAGRAM: usize = 16 << 10;

/// What may be given to the driver.
#[derive(Debug)]
pub(super) enum DeviceSocket {
    KernelTls(Encrypted),
    /// A socket pair's end; the proxy has the other.
    Proxy(UnixStream),
}

impl AsFd for DeviceSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::KernelTls(socket) => socket.as_fd(),
            Self::Proxy(socket) => socket.as_fd(),
        }
    }
}

impl DeviceSocket {
    /// The number by which `/proc/net` lists the socket for as long as it exists, whoever holds it.
    pub(super) fn inode(&self) -> io::Result<u64> {
        Ok(rustix::fs::fstat(self)?.st_ino)
    }
}

/// A command that the kernel did not carry out.
#[derive(Debug, thiserror::Error)]
#[error("{command} failed")]
pub struct KernelError {
    command: &'static str,
    source: io::Error,
}

impl KernelError {
    /// Whether the driver said EINVAL: for RECONFIGURE, that the device is not connected, or is another's.
    pub(super) fn is_invalid(&self) -> bool {
        Errno::from_io_error(&self.source) == Some(Errno::INVAL)
    }
}

/// The nbd driver. Its calls may wait for the driver's locks: not for async tasks.
#[derive(Debug)]
pub(super) struct Driver {
    socket: Socket,
    family: Family,
    sequence: u32,
}

impl Driver {
    /// Finds the driver; `None` if the kernel has none loaded.
    pub(super) fn open() -> Result<Option<Self>, KernelError> {
        let failed = |source| KernelError {
            command: "asking for the nbd netlink family",
            source,
        };
        let socket = Socket::open().map_err(failed)?;
        let mut family = None;
        let answer = exchange(&socket, 1, &find_family(1), |message| {
            if let Message::Generic { attributes, .. } = message {
                family = Family::parse(*attributes).ok().flatten();
            }
        });
        match answer {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed(error)),
            Ok(()) => Ok(family.map(|family| Self {
                socket,
                family,
                sequence: 1,
            })),
        }
    }

    /// Subscribes to the announcements of dead sockets. They reach the initial network namespace only (K11).
    pub(super) fn announcements(&self) -> Result<Announcements, KernelError> {
        let subscription = Subscription::new(self.family.group).map_err(|source| KernelError {
            command: "subscribing to the nbd driver's announcements",
            source,
        })?;
        Ok(Announcements(subscription))
    }

    /// Makes a device of free index out of these sockets; returns the index.
    pub(super) fn connect(
        &mut self,
        device: &Connect<'_>,
        sockets: &[DeviceSocket],
    ) -> Result<u32, KernelError> {
        let descriptors: Vec<RawFd> = sockets
            .iter()
            .map(|socket| socket.as_fd().as_raw_fd())
            .collect();
        let sequence = self.next_sequence();
        let message = self.family.connect(sequence, device, &descriptors);
        let mut index = None;
        self.command("nbd CONNECT", &message, |answer| {
            index = index.or(connected_index(answer));
        })?;
        index.ok_or(KernelError {
            command: "nbd CONNECT",
            source: io::Error::new(io::ErrorKind::InvalidData, "the answer names no device"),
        })
    }

    /// Disconnects the device. The driver compares no backend identifier here: the caller has just read it (K10).
    pub(super) fn disconnect(&mut self, index: u32) -> Result<(), KernelError> {
        let sequence = self.next_sequence();
        let message = self.family.disconnect(sequence, index);
        self.command("nbd DISCONNECT", &message, |_| {})
    }

    /// Whether the device is connected under this backend identifier. One that was disconnected while it was open
    /// still shows its identifier, but takes no socket any more.
    pub(super) fn is_connected(&mut self, index: u32, backend: &str) -> Result<bool, KernelError> {
        let sequence = self.next_sequence();
        let message = self.family.check(sequence, index, backend);
        match self.command("nbd RECONFIGURE", &message, |_| {}) {
            Ok(()) => Ok(true),
            Err(error) if error.is_invalid() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Tells the device its new size.
    pub(super) fn resize(
        &mut self,
        index: u32,
        backend: &str,
        size_bytes: u64,
    ) -> Result<(), KernelError> {
        let sequence = self.next_sequence();
        let message = self.family.resize(sequence, index, backend, size_bytes);
        self.command("nbd RECONFIGURE (size)", &message, |_| {})
    }

    /// Offers a socket in the place of a dead one; returns whether the driver took it.
    ///
    /// The driver does not say (K5). But a socket it takes gets the device's request timeout as its sending
    /// timeout, so that clearing this first and reading it afterwards tells.
    pub(super) fn offer(
        &mut self,
        index: u32,
        backend: &str,
        socket: &DeviceSocket,
    ) -> Result<bool, KernelError> {
        let failed = |source: Errno| KernelError {
            command: "the sending timeout of an offered socket",
            source: source.into(),
        };
        set_socket_timeout(socket, Timeout::Send, None).map_err(failed)?;
        let sequence = self.next_sequence();
        let message = self
            .family
            .offer(sequence, index, backend, socket.as_fd().as_raw_fd());
        self.command("nbd RECONFIGURE (socket)", &message, |_| {})?;
        let timeout = socket_timeout(socket, Timeout::Send).map_err(failed)?;
        Ok(timeout.is_some_and(|timeout| timeout > Duration::ZERO))
    }

    fn next_sequence(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        self.sequence
    }

    fn command(
        &self,
        command: &'static str,
        message: &[u8],
        each: impl FnMut(&Message<'_>),
    ) -> Result<(), KernelError> {
        exchange(&self.socket, self.sequence, message, each)
            .map_err(|source| KernelError { command, source })
    }
}

/// Sends a request and passes on what belongs to it, until the kernel says that it is done.
fn exchange(
    socket: &Socket,
    wanted: u32,
    request: &[u8],
    mut each: impl FnMut(&Message<'_>),
) -> io::Result<()> {
    socket.send(request)?;
    let mut buffer = vec![0; DATAGRAM];
    loop {
        let length = socket.receive(&mut buffer)?;
        for message in Messages(&buffer[..length]) {
            match message.map_err(io::Error::other)? {
                Message::Done { sequence, errno } if sequence == wanted => {
                    return match errno {
                        0 => Ok(()),
                        errno => Err(io::Error::from_raw_os_error(errno)),
                    };
                }
                Message::Done { .. } => {}
                message @ Message::Generic { sequence, .. } => {
                    if sequence == wanted {
                        each(&message);
                    }
                }
            }
        }
    }
}

/// Says which devices lost a socket.
#[derive(Debug)]
pub(super) struct Announcements(Subscription);

impl Announcements {
    /// Waits for the next announcement; the devices of which a socket died. `None`: some announcements were lost, so
    /// that any device may be meant.
    pub(super) async fn receive(&self) -> io::Result<Option<Vec<u32>>> {
        let mut buffer = vec![0; DATAGRAM];
        match self.0.receive(&mut buffer).await {
            Ok(length) => Ok(Some(
                Messages(&buffer[..length])
                    .filter_map(Result::ok)
                    .filter_map(|message| dead_link(&message))
                    .collect(),
            )),
            Err(error) if Errno::from_io_error(&error) == Some(Errno::NOBUFS) => Ok(None),
            Err(error) => Err(error),
        }
    }
}
