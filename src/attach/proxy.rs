//! The way out where the kernel has no TLS: a thread for each connection carries bytes between the driver's socket
//! and a TLS session in this process.
//!
//! Its price is what kernel TLS avoids. The data is copied twice more, and the connections end with this process:
//! the next one replaces them, which is why requests must wait longer than a restart takes.

use std::collections::HashSet;
use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::ioctl_fionread;
use rustix::net::sockopt;
use rustls::ClientConnection;

use crate::client::ProxySession;
use crate::nbd::request::RawRequest;

/// Bytes carried at a time: four full TLS records.
const CHUNK: usize = 64 << 10;

/// The proxied connections of this process, by the inodes of the driver's sockets.
#[derive(Debug, Default)]
pub(super) struct Proxies(Arc<Mutex<HashSet<u64>>>);

impl Proxies {
    /// Starts to carry a session's bytes; returns the socket for the driver. The thread ends with either side.
    pub(super) fn start(&self, session: ProxySession) -> io::Result<UnixStream> {
        let (near, far) = UnixStream::pair()?;
        far.set_nonblocking(true)?;
        session.socket.set_nonblocking(true)?;
        let inode = rustix::fs::fstat(&near)?.st_ino;
        let entry = Entry {
            inode,
            running: self.0.clone(),
        };
        lock(&self.0).insert(inode);
        let mut connection = Connection {
            driver: far,
            server: session.socket,
            tls: session.tls,
            plaintext: Vec::with_capacity(CHUNK),
            buffer: vec![0; CHUNK],
            closed: false,
        };
        std::thread::Builder::new()
            .name("nbd proxy".into())
            .spawn(move || {
                let _entry = entry;
                // Memory that is needed to write out memory must not wait for that same writing (K16).
                if let Err(error) = rustix::process::configure_io_flusher_behavior(true) {
                    tracing::debug!("the proxy's memory may wait for its own device: {error}");
                }
                if let Err(error) = connection.carry() {
                    tracing::warn!("a proxied connection ended: {error}");
                }
            })?;
        Ok(near)
    }

    /// The driver's sockets whose connections live.
    pub(super) fn running(&self) -> HashSet<u64> {
        lock(&self.0).clone()
    }
}

fn lock(running: &Mutex<HashSet<u64>>) -> std::sync::MutexGuard<'_, HashSet<u64>> {
    running.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes the connection out of the list, however its thread ends.
struct Entry {
    inode: u64,
    running: Arc<Mutex<HashSet<u64>>>,
}

impl Drop for Entry {
    fn drop(&mut self) {
        lock(&self.running).remove(&self.inode);
    }
}

struct Connection {
    driver: UnixStream,
    server: TcpStream,
    tls: ClientConnection,
    /// Decrypted, and not yet taken by the driver.
    plaintext: Vec<u8>,
    buffer: Vec<u8>,
    /// Whether the server has said all it will.
    closed: bool,
}

impl Connection {
    /// Carries until one side ends. Nothing is read from one side while the other has not taken what came before, so
    /// that a connection never holds more than some chunks.
    fn carry(&mut self) -> io::Result<()> {
        self.tls.set_buffer_limit(None);
        loop {
            let (driver, server) = self.wait()?;
            if driver.intersects(PollFlags::RDHUP | PollFlags::HUP) && self.was_given_up()? {
                return Err(self.abort());
            }
            if driver.contains(PollFlags::OUT) {
                self.deliver()?;
            }
            if driver.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR)
                && !self.tls.wants_write()
                && !self.encrypt()?
            {
                self.tls.send_close_notify();
                // The driver's last words are on their way: wait for them to leave.
                self.server.set_nonblocking(false)?;
                return self.send();
            }
            if server.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR)
                && self.plaintext.is_empty()
            {
                self.decrypt()?;
            }
            if self.closed && self.plaintext.is_empty() {
                return Err(io::Error::new(
                    ErrorKind::UnexpectedEof,
                    "the server closed it",
                ));
            }
            self.send()?;
        }
    }

    /// Whether the driver, which has closed its end, waits for nothing that is still under way: it then asks for the same
    /// on another connection. If it disconnects in order, its last word is alone.
    fn was_given_up(&self) -> io::Result<bool> {
        let unread = ioctl_fionread(&self.driver)?;
        Ok(self.tls.wants_write() || unread > RawRequest::LENGTH as u64)
    }

    /// Has nothing more arrive of what was given up: it may come behind something newer.
    fn abort(&self) -> io::Error {
        match sockopt::set_socket_linger(&self.server, Some(Duration::ZERO)) {
            Ok(()) => io::Error::new(ErrorKind::TimedOut, "the driver gave it up"),
            Err(errno) => errno.into(),
        }
    }

    /// Waits until something can be done. A side that has nothing to do is left out: its end, which poll would report
    /// again and again, is for later.
    fn wait(&self) -> io::Result<(PollFlags, PollFlags)> {
        let when = |condition, flags| {
            if condition { flags } else { PollFlags::empty() }
        };
        let sending = self.tls.wants_write();
        let delivering = !self.plaintext.is_empty();
        let driver =
            when(!sending, PollFlags::IN) | when(delivering, PollFlags::OUT) | PollFlags::RDHUP;
        let server = when(!delivering, PollFlags::IN) | when(sending, PollFlags::OUT);
        let mut descriptors = Vec::with_capacity(2);
        descriptors.push(PollFd::new(&self.driver, driver));
        if !server.is_empty() {
            descriptors.push(PollFd::new(&self.server, server));
        }
        while let Err(error) = poll(&mut descriptors, None) {
            if error != rustix::io::Errno::INTR {
                return Err(error.into());
            }
        }
        let mut events = descriptors.iter().map(PollFd::revents);
        let mut of = |interest: PollFlags| {
            if interest.is_empty() {
                return interest;
            }
            events.next().unwrap_or(interest)
        };
        Ok((of(driver), of(server)))
    }

    /// From the driver into TLS; `false` when the driver has closed its end.
    fn encrypt(&mut self) -> io::Result<bool> {
        match self.driver.read(&mut self.buffer) {
            Ok(0) => Ok(false),
            Ok(count) => {
                self.tls.writer().write_all(&self.buffer[..count])?;
                Ok(true)
            }
            Err(error) => passing(error).map(|()| true),
        }
    }

    /// From the server into plaintext.
    fn decrypt(&mut self) -> io::Result<()> {
        let count = match self.server.read(&mut self.buffer) {
            Ok(count) => count,
            Err(error) => return passing(error),
        };
        self.closed |= count == 0;
        let mut records = &self.buffer[..count];
        while !records.is_empty() {
            self.tls.read_tls(&mut records)?;
            let state = self.tls.process_new_packets().map_err(io::Error::other)?;
            let from = self.plaintext.len();
            self.plaintext
                .resize(from + state.plaintext_bytes_to_read(), 0);
            self.tls.reader().read_exact(&mut self.plaintext[from..])?;
            self.closed |= state.peer_has_closed();
        }
        Ok(())
    }

    fn deliver(&mut self) -> io::Result<()> {
        match self.driver.write(&self.plaintext) {
            Ok(count) => {
                self.plaintext.drain(..count);
                Ok(())
            }
            Err(error) => passing(error),
        }
    }

    fn send(&mut self) -> io::Result<()> {
        while self.tls.wants_write() {
            match self.tls.write_tls(&mut self.server) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// An error that the next poll gets over.
fn passing(error: io::Error) -> io::Result<()> {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::Interrupted => Ok(()),
        _ => Err(error),
    }
}

#[cfg(test)]
mod tests;
