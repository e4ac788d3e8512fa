//! Where a role listens: at one address, or at all that the machine has, of whichever family.

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::str::FromStr;

use rustix::io::Errno;
use rustix::net::sockopt::{set_ipv6_v6only, set_socket_reuseaddr};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with};

/// Connections that wait to be accepted: as many as the standard library has.
const BACKLOG: i32 = 128;

/// `ADDRESS:PORT`, an IPv6 address in brackets; or `:PORT` for all addresses, IPv4's and IPv6's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Listen {
    At(SocketAddr),
    Everywhere(u16),
}

impl Listen {
    /// Listens. Where the kernel has no IPv6, everywhere means all addresses of IPv4.
    pub fn bind(self) -> io::Result<TcpListener> {
        match self {
            Self::At(address) => TcpListener::bind(address),
            Self::Everywhere(port) => match both_families(port) {
                Err(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL) => {
                    TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))
                }
                bound => bound.map_err(io::Error::from),
            },
        }
    }
}

/// An IPv6 socket that takes IPv4's connections too, whatever net.ipv6.bindv6only says.
fn both_families(port: u16) -> rustix::io::Result<TcpListener> {
    let socket = socket_with(
        AddressFamily::INET6,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    set_ipv6_v6only(&socket, false)?;
    set_socket_reuseaddr(&socket, true)?;
    bind(&socket, &SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)))?;
    listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::At(address) => address.fmt(f),
            Self::Everywhere(port) => write!(f, ":{port}"),
        }
    }
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let port = text.strip_prefix(':').map(str::parse);
        match (port, text.parse()) {
            (Some(Ok(port)), _) => Ok(Self::Everywhere(port)),
            (_, Ok(address)) => Ok(Self::At(address)),
            _ => Err(
                "expected ADDRESS:PORT, with an IPv6 address in brackets, or :PORT for all addresses"
                    .to_owned(),
            ),
        }
    }
}

/// A peer's address as people write it: over a socket of both families, IPv4's addresses come in IPv6's clothes.
#[must_use]
pub fn plain(peer: SocketAddr) -> SocketAddr {
    SocketAddr::new(peer.ip().to_canonical(), peer.port())
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;

    use super::*;

    #[test]
    fn an_address_is_written_as_it_is_read() {
        for text in ["127.0.0.1:80", "[::1]:80", "[2001:db8::1]:10809", ":9808"] {
            assert_eq!(text.parse::<Listen>().unwrap().to_string(), text);
        }
        for text in ["", ":", "80", "::1:80", "localhost:80", ":70000", "*:80"] {
            assert!(text.parse::<Listen>().is_err(), "{text}");
        }
    }

    #[test]
    fn everywhere_is_both_families_and_an_ipv4_peer_looks_like_one() {
        let listener = Listen::Everywhere(0).bind().unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut hosts = vec!["127.0.0.1"];
        if TcpListener::bind("[::1]:0").is_ok() {
            hosts.push("::1");
        }
        for host in hosts {
            let client = TcpStream::connect((host, port)).unwrap();
            let (_, peer) = listener.accept().unwrap();
            assert_eq!(plain(peer), client.local_addr().unwrap());
        }
    }
}
