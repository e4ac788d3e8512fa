use std::net::TcpListener;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustls::{ServerConnection, StreamOwned};
use rustls_pki_types::ServerName;

use super::*;
use crate::nbd::client::Transmission;
use crate::nbd::{ExportInfo, ExportName, TransmissionFlags};
use crate::tls::{self, Authority, Profile, Secret, ServerOptions, ServerTls, Side};
use crate::volumes::VolumeId;

type Stream = StreamOwned<ServerConnection, TcpStream>;

/// A session with a server that does what `script` says.
fn session<T: Send + 'static>(
    script: impl FnOnce(Stream) -> T + Send + 'static,
) -> (ProxySession, JoinHandle<T>) {
    let volume = VolumeId::from_bytes([7; 16]);
    let authority = Authority::temporary().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let parts = authority.issue_server(&volume, &[]).unwrap();
    tls::write_secret(directory.path(), &parts).unwrap();
    let options = ServerOptions {
        tls12: false,
        clients: vec![tls::client_identity(&volume)],
    };
    let server = ServerTls::load(directory.path(), options).unwrap().config();
    let parts = authority.issue_client(&volume).unwrap();
    let secret = Secret::from_map("the client Secret", &parts, Side::Client).unwrap();
    let client = tls::client_config(&secret, Profile::Probe).unwrap();

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let played = std::thread::spawn(move || {
        let (socket, _) = listener.accept().unwrap();
        let tls = ServerConnection::new(server).unwrap();
        let mut stream = StreamOwned::new(tls, socket);
        stream.conn.complete_io(&mut stream.sock).unwrap();
        script(stream)
    });
    let name = ServerName::try_from(tls::server_identity(&volume)).unwrap();
    let mut socket = TcpStream::connect(address).unwrap();
    let mut tls = ClientConnection::new(client, name).unwrap();
    while tls.is_handshaking() || tls.wants_write() {
        tls.complete_io(&mut socket).unwrap();
    }
    let info = ExportInfo {
        size: 1 << 20,
        flags: TransmissionFlags::HAS_FLAGS,
        block_sizes: None,
        description: None,
    };
    let transmission = Transmission {
        export: ExportName::default(),
        info,
        structured: false,
        contexts: Vec::new(),
    };
    let session = ProxySession {
        socket,
        tls,
        transmission,
    };
    (session, played)
}

fn wait_until_none_runs(proxies: &Proxies) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !proxies.running().is_empty() {
        assert!(Instant::now() < deadline, "the proxy's thread does not end");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn bytes_arrive_in_order_in_both_directions_at_once() {
    let (session, played) = session(|mut stream| {
        let mut buffer = vec![0; 100_000];
        let mut total = 0;
        loop {
            match stream.read(&mut buffer).unwrap() {
                0 => return total,
                count => {
                    stream.write_all(&buffer[..count]).unwrap();
                    total += count;
                }
            }
        }
    });
    let proxies = Proxies::default();
    let mut driver = proxies.start(session).unwrap();
    let inode = rustix::fs::fstat(&driver).unwrap().st_ino;
    assert_eq!(proxies.running(), HashSet::from([inode]));
    let sent: Vec<u8> = (0..8u32 << 20)
        .map(|i| (i ^ (i >> 9)).to_le_bytes()[0])
        .collect();
    let expected = sent.clone();
    let mut writing = driver.try_clone().unwrap();
    let writer = std::thread::spawn(move || writing.write_all(&sent).unwrap());
    let mut received = vec![0; expected.len()];
    driver.read_exact(&mut received).unwrap();
    assert!(received == expected, "the bytes differ");
    writer.join().unwrap();

    // As the driver ends: the server hears a goodbye, not a cut.
    driver.shutdown(std::net::Shutdown::Both).unwrap();
    drop(driver);
    assert_eq!(played.join().unwrap(), expected.len());
    wait_until_none_runs(&proxies);
}

#[test]
fn the_driver_sees_the_servers_end() {
    let (session, played) = session(|mut stream| {
        stream.write_all(b"the last words").unwrap();
        stream.conn.send_close_notify();
        stream.flush().unwrap();
        // Not closed before the driver has its end: the goodbye alone must do.
        let _ = stream.read(&mut [0]);
    });
    let proxies = Proxies::default();
    let mut driver = proxies.start(session).unwrap();
    let mut received = Vec::new();
    driver.read_to_end(&mut received).unwrap();
    assert_eq!(received, b"the last words");
    played.join().unwrap();
    wait_until_none_runs(&proxies);
}

#[test]
fn k21_what_the_driver_gave_up_does_not_arrive() {
    let (go_on, told) = std::sync::mpsc::channel();
    let (session, played) = session(move |mut stream| {
        told.recv().unwrap();
        let (mut total, mut buffer) = (0, vec![0; 100_000]);
        while let Ok(count @ 1..) = stream.read(&mut buffer) {
            total += count;
        }
        total
    });
    let proxies = Proxies::default();
    let mut driver = proxies.start(session).unwrap();
    driver
        .set_write_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    let mut sent = 0;
    // Until the server, which reads nothing, has everything on the way full.
    while let Ok(count) = driver.write(&[7; 50_000]) {
        sent += count;
    }
    driver.shutdown(std::net::Shutdown::Both).unwrap();
    wait_until_none_runs(&proxies);
    go_on.send(()).unwrap();
    let received = played.join().unwrap();
    assert!(received < sent, "{received} of {sent}");
}
