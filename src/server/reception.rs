//! The thread that accepts connections and negotiates with all of them at once.
//!
//! A connection that is silent costs a file descriptor and a few hundred bytes here, not a thread. When there are
//! too many, one has to go for each new one: one that has not proven who it is before one that has, and among those
//! the oldest of the address that has the most. So who opens hundreds of connections and says nothing pushes out
//! itself.

use std::collections::HashMap;
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt;
use tracing::{error, info, info_span, warn};

use super::negotiation::{Established, Negotiation, Progress, Refused};
use super::service::{Service, Telling};
use super::session::{Ending, Session};
use super::wake::Wake;
use crate::listen;

/// Connections that negotiate at a time.
const NEGOTIATING: usize = 128;

/// Connections accepted before the others get their turn.
const ACCEPTED_AT_ONCE: usize = 32;

/// rustls and the encoders need little; a debug build needs more than a release build.
const STACK: usize = 512 << 10;

/// When the system has no more file descriptors, accepting is left alone for this long.
const RESPITE: Duration = Duration::from_millis(100);

/// A dead peer is noticed after 15 + 3 * 10 s of silence, and after a minute in which it acknowledges nothing.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(15);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_PROBES: u32 = 3;
const USER_TIMEOUT_MS: u32 = 60_000;

/// Accepts and negotiates.
pub(super) struct Reception {
    service: Arc<Service>,
    listener: Option<TcpListener>,
    wake: Arc<Wake>,
    negotiations: Vec<Negotiation>,
    resting_until: Option<Instant>,
}

impl Reception {
    /// `wake` is to be woken when the service begins to drain.
    pub(super) fn new(
        service: Arc<Service>,
        listener: TcpListener,
        wake: Arc<Wake>,
    ) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self {
            service,
            listener: Some(listener),
            wake,
            negotiations: Vec::new(),
            resting_until: None,
        })
    }

    /// Runs in a thread of its own, until the process ends.
    pub(super) fn start(self) -> io::Result<()> {
        std::thread::Builder::new()
            .name("reception".into())
            .stack_size(STACK)
            .spawn(move || {
                // Without this thread nobody can connect: better to be started again than to stay deaf.
                let _deaf = Deaf;
                self.run();
            })
            .map(drop)
    }

    fn run(mut self) -> Infallible {
        loop {
            self.service
                .negotiating
                .store(self.negotiations.len(), Ordering::Relaxed);
            let ready = self.sleep();
            if self.service.draining.load(Ordering::Acquire) {
                self.listener = None;
            }
            for index in ready.into_iter().rev() {
                self.advance(index);
            }
            self.expire();
            self.accept();
        }
    }

    /// Waits for something to happen; which negotiations can go on.
    fn sleep(&mut self) -> Vec<usize> {
        let now = Instant::now();
        self.resting_until = self.resting_until.filter(|until| *until > now);
        let mut fds = Vec::with_capacity(self.negotiations.len() + 2);
        let mut indexes = Vec::with_capacity(self.negotiations.len());
        for (index, negotiation) in self.negotiations.iter().enumerate() {
            if let Some(socket) = negotiation.socket() {
                fds.push(PollFd::from_borrowed_fd(socket, negotiation.interest()));
                indexes.push(index);
            }
        }
        fds.push(PollFd::new(&*self.wake, PollFlags::IN));
        if let Some(listener) = self
            .listener
            .as_ref()
            .filter(|_| self.resting_until.is_none())
        {
            fds.push(PollFd::new(listener, PollFlags::IN));
        }
        let deadlines = self.negotiations.iter().map(Negotiation::deadline);
        let timeout = deadlines
            .chain(self.resting_until)
            .min()
            .map(|deadline| deadline.saturating_duration_since(now))
            .and_then(|left| Timespec::try_from(left).ok());
        if let Err(errno) = poll(&mut fds, timeout.as_ref())
            && errno != rustix::io::Errno::INTR
        {
            warn!("poll: {errno}");
            std::thread::sleep(RESPITE);
        }
        let ready = indexes
            .iter()
            .zip(&fds)
            .filter(|(_, fd)| !fd.revents().is_empty())
            .map(|(index, _)| *index)
            .collect();
        self.wake.take();
        ready
    }

    fn accept(&mut self) {
        for _ in 0..ACCEPTED_AT_ONCE {
            let Some(listener) = &self.listener else {
                return;
            };
            let (socket, peer) = match listener.accept() {
                Ok((socket, peer)) => (socket, listen::plain(peer)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    self.without_descriptors(&error);
                    return;
                }
            };
            if let Err(error) = prepare(&socket) {
                info!(%peer, "connection lost at once: {error}");
                continue;
            }
            if self.negotiations.len() >= NEGOTIATING {
                self.make_room();
            }
            self.negotiations
                .push(Negotiation::new(socket, peer, &self.service));
            self.advance(self.negotiations.len() - 1);
        }
    }

    /// Most errors of accept(2) are the connection's own; the rest pass when descriptors are free again.
    fn without_descriptors(&mut self, error: &io::Error) {
        let raw = error
            .raw_os_error()
            .map(rustix::io::Errno::from_raw_os_error);
        use rustix::io::Errno;
        if let Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) = raw {
            warn!("cannot accept connections: {error}");
            self.make_room();
            self.resting_until = Some(Instant::now() + RESPITE);
        }
    }

    /// Ends the negotiation that is least likely to come to anything.
    fn make_room(&mut self) {
        let mut of_address: HashMap<IpAddr, usize> = HashMap::new();
        for negotiation in &self.negotiations {
            *of_address.entry(negotiation.peer.ip()).or_default() += 1;
        }
        let crowd = self.negotiations.len();
        let victim = self
            .negotiations
            .iter()
            .enumerate()
            .min_by_key(|(_, negotiation)| {
                let neighbours = of_address.get(&negotiation.peer.ip()).copied();
                (
                    !negotiation.is_parting(),
                    negotiation.is_proven(),
                    std::cmp::Reverse(neighbours),
                    negotiation.deadline(),
                )
            })
            .map(|(index, _)| index);
        if let Some(index) = victim {
            let negotiation = self.negotiations.remove(index);
            if !negotiation.is_parting() {
                self.refuse(negotiation.peer, &Refused::Crowded(crowd));
            }
        }
    }

    fn advance(&mut self, index: usize) {
        let Some(negotiation) = self.negotiations.get_mut(index) else {
            return;
        };
        let peer = negotiation.peer;
        let service = &self.service;
        // One client's negotiation must not be the end of all others'.
        match std::panic::catch_unwind(AssertUnwindSafe(|| negotiation.advance(service))) {
            Ok(Progress::Waiting) => return,
            Ok(Progress::Transmission(established)) => self.begin(*established),
            Ok(Progress::Refused(refused)) => {
                let parting = negotiation.is_parting();
                self.refuse(peer, &refused);
                if parting {
                    return;
                }
            }
            Ok(Progress::Over) => {}
            Err(_) => self.refuse(peer, &Refused::Bug),
        }
        self.negotiations.remove(index);
    }

    fn expire(&mut self) {
        let now = Instant::now();
        let mut late = Vec::new();
        self.negotiations.retain(|negotiation| {
            let in_time = negotiation.deadline() > now;
            if !in_time && !negotiation.is_parting() {
                late.push((negotiation.peer, negotiation.allowed()));
            }
            in_time
        });
        for (peer, allowed) in late {
            self.refuse(peer, &Refused::Deadline(allowed));
        }
    }

    fn refuse(&self, peer: SocketAddr, refused: &Refused) {
        let reason = refused.reason();
        // Anybody can make these lines, so there is a limit to them.
        match self.service.refused.count(reason) {
            Telling::Tell { untold: 0 } => info!(%peer, reason, "no session: {refused}"),
            Telling::Tell { untold } => info!(%peer, reason, untold, "no session: {refused}"),
            Telling::Keep => {}
        }
    }

    /// Gives an established session its thread.
    fn begin(&self, established: Established) {
        let Established {
            channel,
            presence,
            session,
            identity,
            peer,
        } = established;
        let service = Arc::clone(&self.service);
        let thread = std::thread::Builder::new()
            .name("session".into())
            .stack_size(STACK)
            .spawn(move || {
                let export = session.export.clone();
                let _span = info_span!("session", ?export, %peer).entered();
                let tls = channel.tls();
                info!(
                    ?identity,
                    version = ?tls.protocol_version(),
                    cipher = ?tls.negotiated_cipher_suite().map(|suite| suite.suite()),
                    structured = session.structured,
                    read_only = presence.export.read_only,
                    "session begins"
                );
                let began = Instant::now();
                let ending = Session::new(service, channel, presence, &session)
                    .map_or_else(|ending| ending, Session::run);
                let seconds = began.elapsed().as_secs();
                match ending {
                    Ending::Broken(_) | Ending::Unbearable(_) | Ending::Stalled(_) => {
                        warn!(seconds, "session ends: {ending}");
                    }
                    _ => info!(seconds, "session ends: {ending}"),
                }
            });
        if let Err(error) = thread {
            warn!(%peer, "no thread for a session: {error}");
            self.service.refused.count("no-thread");
        }
    }
}

/// Ends the process when it is dropped.
struct Deaf;

impl Drop for Deaf {
    fn drop(&mut self) {
        error!("no more connections can be accepted: this is a bug");
        std::process::abort();
    }
}

/// Sets up an accepted socket.
fn prepare(socket: &TcpStream) -> io::Result<()> {
    socket.set_nonblocking(true)?;
    socket.set_nodelay(true)?; // C61
    let fd = socket.as_fd();
    sockopt::set_socket_keepalive(fd, true)?;
    sockopt::set_tcp_keepidle(fd, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(fd, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(fd, KEEPALIVE_PROBES)?;
    sockopt::set_tcp_user_timeout(fd, USER_TIMEOUT_MS)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn c61_sockets_send_at_once_and_notice_dead_peers() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (socket, _) = listener.accept().unwrap();
        prepare(&socket).unwrap();
        assert!(socket.nodelay().unwrap());
        assert!(sockopt::socket_keepalive(&socket).unwrap());
        assert_eq!(sockopt::tcp_keepidle(&socket).unwrap(), KEEPALIVE_IDLE);
        assert_eq!(sockopt::tcp_user_timeout(&socket).unwrap(), USER_TIMEOUT_MS);
    }
}
