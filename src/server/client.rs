//! Whether a client still waits for what it asked.
//!
//! The kernel's client gives up a connection on which a request takes longer than its timeout, and asks again on another
//! one for all that was under way. It may have the answer, and have written something newer to the same place, while the
//! old connection's session is still busy with what came before, or was held up by the disk, a debugger or the host. So
//! what such a client has asked for is not begun any more once it has closed the connection.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;

/// How often a session looks: the client needs longer to have its request answered elsewhere and to ask for another.
const OFTEN: Duration = Duration::from_millis(1);

/// A client that asks again, as its session sees it.
#[derive(Debug)]
pub(super) struct Client {
    socket: Arc<OwnedFd>,
    looked_at: Instant,
}

/// The same, as a request sees it that may outlive the session.
#[derive(Debug, Clone)]
pub(super) struct Asker(Weak<OwnedFd>);

impl Client {
    /// `socket` is the session's, once more.
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self {
            socket: Arc::new(socket),
            looked_at: Instant::now(),
        }
    }

    pub(super) fn asker(&self) -> Asker {
        Asker(Arc::downgrade(&self.socket))
    }

    /// Whether it has closed the connection; what happened in the last millisecond is not noticed.
    pub(super) fn has_left(&mut self) -> bool {
        if self.looked_at.elapsed() < OFTEN {
            return false;
        }
        self.looked_at = Instant::now();
        is_closed(&*self.socket)
    }
}

impl Asker {
    /// Whether the client has closed the connection, or the session is over.
    pub(super) fn has_left(&self) -> bool {
        self.0.upgrade().is_none_or(|socket| is_closed(&*socket))
    }
}

/// Whether the other side has said that it will send nothing more, whatever there is to be read before that.
fn is_closed(socket: impl AsFd) -> bool {
    let mut fds = [PollFd::new(&socket, PollFlags::RDHUP)];
    // A signal that comes here says nothing of the client. A connection that was reset counts as closed, and so does one
    // that cannot be asked: when in doubt, nothing is begun.
    retry_on_intr(|| poll(&mut fds, Some(&Timespec::default()))) != Ok(0)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{Shutdown, TcpListener, TcpStream};

    use super::*;

    fn connect() -> (TcpStream, Client) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (socket, _) = listener.accept().unwrap();
        (peer, Client::new(socket.into()))
    }

    #[test]
    fn who_closes_has_left_although_not_all_was_read() {
        let (mut peer, mut client) = connect();
        peer.write_all(b"unread").unwrap();
        std::thread::sleep(2 * OFTEN);
        assert!(!client.has_left());
        assert!(!client.asker().has_left());
        peer.shutdown(Shutdown::Write).unwrap();
        std::thread::sleep(2 * OFTEN);
        assert!(client.asker().has_left());
        assert!(client.has_left());
    }

    #[test]
    fn what_outlives_the_session_has_no_client() {
        let (_peer, client) = connect();
        let asker = client.asker();
        assert!(!asker.has_left());
        drop(client);
        assert!(asker.has_left());
    }
}
