//! What sockets can do and `std` does not say.

use std::io;
use std::os::fd::AsFd;

use super::sockopt;

/// From now on a poll(2) for input succeeds when so many bytes are there, at the end of the stream, or when the peer can
/// send no more before some are read. A read takes what there is, as before.
pub fn set_receive_low_water(socket: impl AsFd, bytes: usize) -> io::Result<()> {
    let bytes = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
    sockopt::set(
        socket.as_fd(),
        libc::SOL_SOCKET,
        libc::SO_RCVLOWAT,
        &bytes.to_ne_bytes(),
    )
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::*;

    #[test]
    fn input_is_there_when_enough_is_there_or_when_it_ended() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut socket, _) = listener.accept().unwrap();
        let has_input = || {
            let soon = Timespec {
                tv_sec: 0,
                tv_nsec: 50_000_000,
            };
            let mut fds = [PollFd::new(&socket, PollFlags::IN)];
            poll(&mut fds, Some(&soon)).unwrap() > 0
        };
        set_receive_low_water(&socket, 100).unwrap();
        peer.write_all(&[7; 99]).unwrap();
        assert!(!has_input());
        peer.write_all(&[7]).unwrap();
        assert!(has_input());
        peer.write_all(&[7; 10]).unwrap();
        let mut bytes = [0; 105];
        socket.read_exact(&mut bytes).unwrap();
        let has_input = |socket: &TcpStream| {
            let soon = Timespec {
                tv_sec: 1,
                tv_nsec: 0,
            };
            let mut fds = [PollFd::new(socket, PollFlags::IN)];
            poll(&mut fds, Some(&soon)).unwrap() > 0
        };
        drop(peer);
        assert!(has_input(&socket), "five bytes and the end");
        assert_eq!(socket.read(&mut bytes).unwrap(), 5);
    }
}
