//! From a host's name to the address that answers.

use std::io;
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::nbd::uri::Endpoint;
use crate::verify::Address;

/// Of a host with more addresses, these are tried.
const TRIED: usize = 8;

/// Every check is to ask the same server, so a host with several addresses is reduced to the first that accepts a
/// connection; where none does, the run itself says so.
pub(super) fn find(endpoint: &Endpoint, timeout: Duration) -> Result<Address> {
    let (host, port) = match endpoint {
        Endpoint::Unix(path) => return Ok(Address::Unix(path.clone())),
        Endpoint::Tcp { host, port } => (host, *port),
    };
    let addresses = resolve(host, port).with_context(|| format!("look up the host {host:?}"))?;
    let Some(first) = addresses.first() else {
        bail!("the host {host:?} has no address");
    };
    let patience = timeout / u32::try_from(addresses.len()).unwrap_or(u32::MAX);
    let answering = match addresses.len() {
        1 => None,
        _ => addresses
            .iter()
            .find(|address| TcpStream::connect_timeout(address, patience).is_ok()),
    };
    Ok(Address::Tcp(*answering.unwrap_or(first)))
}

fn resolve(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    let mut addresses = Vec::new();
    for address in (host, port).to_socket_addrs()? {
        if !addresses.contains(&address) && addresses.len() < TRIED {
            addresses.push(address);
        }
    }
    Ok(addresses)
}
