//! getsockopt and setsockopt for options whose values are plain bytes.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use libc::{c_int, socklen_t};

/// Sets an option to `value`, whose bytes are what the kernel expects of that option.
pub(super) fn set(
    socket: BorrowedFd<'_>,
    level: c_int,
    name: c_int,
    value: &[u8],
) -> io::Result<()> {
    let length = socklen_t::try_from(value.len()).map_err(io::Error::other)?;
    // SAFETY: `value` is valid for reads of `length` bytes, and the kernel only copies from it.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            value.as_ptr().cast(),
            length,
        )
    };
    if result == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error())
}

/// Reads an option into `value`; returns how many bytes the kernel wrote.
pub(super) fn read(
    socket: BorrowedFd<'_>,
    level: c_int,
    name: c_int,
    value: &mut [u8],
) -> io::Result<usize> {
    let mut length = socklen_t::try_from(value.len()).map_err(io::Error::other)?;
    // SAFETY: `value` is valid for writes of `length` bytes, the most that the kernel writes, and `length` outlives
    // the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            name,
            value.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if result == 0 {
        return Ok(value.len().min(length as usize));
    }
    Err(io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn what_was_set_is_read_back() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        set(
            socket.as_fd(),
            libc::SOL_SOCKET,
            libc::SO_BROADCAST,
            &1i32.to_ne_bytes(),
        )
        .unwrap();
        let mut value = [0; 4];
        let length = read(
            socket.as_fd(),
            libc::SOL_SOCKET,
            libc::SO_BROADCAST,
            &mut value,
        );
        assert_eq!(length.unwrap(), 4);
        assert_eq!(i32::from_ne_bytes(value), 1);
        let error = set(socket.as_fd(), libc::SOL_SOCKET, -1, &[]).unwrap_err();
        assert!(error.raw_os_error().is_some());
    }
}
