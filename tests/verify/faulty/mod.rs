//! An NBD server that is right in all but one thing.
//!
//! It shares the wire format with Hawser and nothing of its negotiation, so that a mistake there is not made twice.

mod contexts;
mod fault;
mod options;
mod plain;
mod transmission;

use std::io::{self, Read};
use std::net::TcpListener;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use hawser::nbd::OptionCode;
use hawser::nbd::option::OptionHeader;
use hawser::verify::{Server, Target};

pub(crate) use self::fault::Fault;
pub(crate) use self::options::{Options, Tls};
use super::certificates::{Clients, Versions, Volume, volume};

/// Bytes of the export, and of its runs of data and holes.
const SIZE: u64 = 4 << 20;
const RUN: u64 = 64 << 10;
const BLOCK: u32 = 512;
const EXPORT: &str = "volume/attachment";
/// Listed where the server has a second one.
const OTHER: &str = "another/attachment";

/// Options of one session.
const OPTIONS: usize = 1000;

/// Bytes of an option.
const OPTION: u32 = 64 << 10;

/// What all connections to one server share.
pub(crate) struct Shared {
    fault: Fault,
    disk: Mutex<Vec<u8>>,
    /// After a fault that ends it all.
    dead: AtomicBool,
}

impl Shared {
    pub(crate) fn new(fault: Fault) -> Arc<Self> {
        Arc::new(Self {
            fault,
            disk: Mutex::new(vec![0; usize::try_from(SIZE).unwrap()]),
            dead: AtomicBool::new(false),
        })
    }

    fn has(&self, fault: Fault) -> bool {
        self.fault == fault
    }
}

/// Starts the server for the rest of the test's life.
pub(crate) fn start(fault: Fault) -> Target {
    started(fault).target
}

/// The same, with every certificate there is to try it with.
pub(crate) fn server(fault: Fault) -> Server {
    let volume = started(fault);
    Server {
        identity: Some(volume.identity),
        other: Some(volume.other),
        expired: Some(volume.expired),
        ..Server::from(&volume.target)
    }
}

fn started(fault: Fault) -> Volume {
    let clients = match fault {
        Fault::AnonymousClients => Clients::AlsoAnonymous,
        Fault::ForeignClients => Clients::AnyCertificate,
        Fault::EveryClient => Clients::Everyone,
        Fault::ExpiredClients => Clients::AlsoExpired,
        _ => Clients::Genuine,
    };
    let versions = match fault {
        Fault::NoTls12 => Versions::Only13,
        Fault::NoTls13 => Versions::Only12,
        _ => Versions::Both,
    };
    let name = match fault {
        Fault::OtherServer => "another.server.test",
        _ => "volume.server.test",
    };
    let mut volume = volume(clients, versions, name);
    let listener = TcpListener::bind(volume.target.address).unwrap();
    volume.target.address = listener.local_addr().unwrap();
    let (config, shared) = (volume.config.clone(), Shared::new(fault));
    std::thread::spawn(move || {
        let mut waiting = Vec::new();
        for socket in listener.incoming() {
            let (socket, config) = (socket.unwrap(), config.clone());
            let shared = shared.clone();
            if fault == Fault::SilentLockOut && Arc::strong_count(&shared) > 64 {
                // Never served, and never told.
                waiting.push(socket);
                continue;
            }
            // A client that goes away ends its session: that is no failure of the test.
            std::thread::spawn(move || plain::Plain::new(socket, shared).serve(config));
        }
    });
    volume
}

/// Reads a whole option, whatever its magic.
pub(crate) fn option(from: &mut impl Read) -> io::Result<(OptionCode, Vec<u8>)> {
    let mut header = [0; OptionHeader::LENGTH];
    from.read_exact(&mut header)?;
    let header = OptionHeader::parse(&header).map_err(io::Error::other)?;
    if header.length > OPTION {
        return Err(io::Error::other("an option without end"));
    }
    let mut payload = vec![0; header.length as usize];
    from.read_exact(&mut payload)?;
    Ok((header.code, payload))
}
