//! A generic netlink socket: datagrams to and from the kernel, and membership in multicast groups.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, recvfrom, sendto,
    socket_with,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::sockopt::set;

/// A request is carried out inside the call that sends it, so that its answer is there already; this only bounds
/// the wait for a kernel that breaks this rule.
const ANSWER: Duration = Duration::from_secs(10);

/// One socket of the generic netlink protocol, closed on exec.
#[derive(Debug)]
pub struct Socket(OwnedFd);

impl Socket {
    /// Opens a socket for requests, which waits for answers.
    pub fn open() -> io::Result<Self> {
        let socket = Self::create(SocketFlags::CLOEXEC)?;
        sockopt::set_socket_timeout(&socket, Timeout::Recv, Some(ANSWER))?;
        Ok(Self(socket))
    }

    /// Sends one request to the kernel. Descriptors named in it must be open until this returns.
    pub fn send(&self, message: &[u8]) -> io::Result<()> {
        let sent = sendto(
            &self.0,
            message,
            SendFlags::empty(),
            &SocketAddrNetlink::new(0, 0),
        )?;
        if sent == message.len() {
            return Ok(());
        }
        Err(io::ErrorKind::WriteZero.into())
    }

    /// Receives one datagram of the kernel's, skipping what any other process sent; returns its length.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let (_, length, sender) = match recvfrom(&self.0, &mut *buffer, RecvFlags::TRUNC) {
                Err(rustix::io::Errno::INTR) => continue,
                received => received?,
            };
            let sender = sender.and_then(|sender| SocketAddrNetlink::try_from(sender).ok());
            if sender.is_none_or(|sender| sender.pid() != 0) {
                continue;
            }
            if length > buffer.len() {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!(
                        "a netlink datagram of {length} bytes, the limit is {}",
                        buffer.len()
                    ),
                ));
            }
            return Ok(length);
        }
    }

    fn create(flags: SocketFlags) -> io::Result<OwnedFd> {
        let socket = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            flags,
            Some(netlink::GENERIC),
        )?;
        bind(&socket, &SocketAddrNetlink::new(0, 0))?;
        Ok(socket)
    }
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// A socket that receives what the kernel sends to a multicast group.
#[derive(Debug)]
pub struct Subscription(AsyncFd<Socket>);

impl Subscription {
    /// Subscribes to the group. Fails outside of a Tokio runtime.
    pub fn new(group: u32) -> io::Result<Self> {
        tokio::runtime::Handle::try_current().map_err(io::Error::other)?;
        let socket = Socket::create(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
        set(
            socket.as_fd(),
            libc::SOL_NETLINK,
            libc::NETLINK_ADD_MEMBERSHIP,
            &group.to_ne_bytes(),
        )?;
        // SAFETY: `Socket` owns its descriptor and never exchanges it, so that it stays open, and the same, for as long
        // as the registration owns the socket.
        unsafe { AsyncFd::register_with_interest(Socket(socket), Interest::READABLE) }
            .map(Self)
            .map_err(|error| error.into_parts().1)
    }

    /// Receives one datagram; ENOBUFS means that some were lost.
    pub async fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut ready = self.0.readable().await?;
            if let Ok(received) = ready.try_io(|socket| socket.get_ref().receive(buffer)) {
                return received;
            }
        }
    }
}
