//! Sessions in this process, whose workers can be kept busy: what is in flight stays in flight until the test lets
//! it go on.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use rustls::{ClientConnection, StreamOwned};
use tempfile::TempDir;

use super::exports::{Exports, Order};
use super::reception::Reception;
use super::service::Service;
use super::subject::Subject;
use super::wake::Wake;
use super::workers::MOST;
use crate::nbd::client::{Answer, Plain, PlainStep, Probe, Secured};
use crate::nbd::reply::{Chunk, ReplyHeader};
use crate::nbd::request::RawRequest;
use crate::nbd::{Command, CommandFlags, Cookie, Errno, ExportName};
use crate::tls::{self, Authority, Leaf, Profile, Secret, ServerOptions, ServerTls, Side};

const CLIENT: &str = "client.test";
const SERVER: &str = "server.test";
const PATIENCE: Duration = Duration::from_secs(20);
const NONE: CommandFlags = CommandFlags(0);
const SIZE: u64 = 64 << 20;

/// A WRITE that goes through a worker.
const LONG: usize = 2 << 20;

/// A service with one export, and clients for it.
struct Bench {
    directory: TempDir,
    authority: Authority,
    service: Arc<Service>,
    address: SocketAddr,
    wake: Arc<Wake>,
    export: ExportName,
}

impl Bench {
    fn new() -> Self {
        Self::with_memory(128 << 20)
    }

    fn with_memory(pool: usize) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let authority = Authority::temporary().unwrap();
        let secret = authority
            .issue(&Leaf::new(Side::Server, vec![SERVER.to_owned()]))
            .unwrap();
        tls::write_secret(&directory.path().join("tls"), &secret).unwrap();
        let clients = vec![CLIENT.to_owned()];
        let options = ServerOptions {
            tls12: false,
            clients,
        };
        let tls = ServerTls::load(&directory.path().join("tls"), options).unwrap();
        let data = directory.path().join("data");
        File::create(&data).unwrap().set_len(SIZE).unwrap();
        let export = ExportName::try_from("disk").unwrap();
        let subject = Subject::file(&data, &export, false).unwrap();
        let service = Arc::new(subject.service(tls, pool));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let wake = Arc::new(Wake::new().unwrap());
        Reception::new(Arc::clone(&service), listener, Arc::clone(&wake))
            .and_then(Reception::start)
            .unwrap();
        Self {
            directory,
            authority,
            service,
            address,
            wake,
            export,
        }
    }

    fn client(&self, structured: bool) -> Client {
        let leaf = Leaf::new(Side::Client, vec![CLIENT.to_owned()]);
        let secret = self.authority.issue(&leaf).unwrap();
        let secret = Secret::from_map("the test", &secret, Side::Client).unwrap();
        let config = tls::client_config(&secret, Profile::Probe).unwrap();
        let tls = ClientConnection::new(config, SERVER.try_into().unwrap()).unwrap();
        Client::connect(self.address, tls, &self.export, structured).unwrap()
    }

    /// Keeps all workers busy until the guard is dropped. Requests that need one stay in flight.
    fn hold_workers(&self) -> Held {
        let started = Arc::new(Barrier::new(MOST + 1));
        let mut release = Vec::new();
        for _ in 0..MOST {
            let (sender, receiver) = channel::<()>();
            release.push(sender);
            let started = Arc::clone(&started);
            self.service.workers.submit(move || {
                started.wait();
                let _ = receiver.recv();
            });
        }
        started.wait();
        Held { _release: release }
    }

    fn file(&self) -> Vec<u8> {
        std::fs::read(self.directory.path().join("data")).unwrap()
    }

    /// Waits until that many requests wait for a worker.
    fn in_flight(&self, requests: usize) {
        wait_until(|| self.service.workers.waiting() == requests);
    }
}

struct Held {
    _release: Vec<Sender<()>>,
}

fn wait_until(condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "it does not happen");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A client in transmission.
struct Client {
    stream: StreamOwned<ClientConnection, TcpStream>,
}

impl Client {
    fn connect(
        address: SocketAddr,
        tls: ClientConnection,
        export: &ExportName,
        structured: bool,
    ) -> io::Result<Self> {
        let mut socket = TcpStream::connect(address)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        let mut plain = Plain::new();
        let handshake = loop {
            let mut bytes = vec![0; plain.wanted()];
            socket.read_exact(&mut bytes)?;
            match plain.receive(&bytes).map_err(io::Error::other)? {
                PlainStep::Continue(next) => plain = next,
                PlainStep::Send(next, bytes) => {
                    socket.write_all(&bytes)?;
                    plain = next;
                }
                PlainStep::Upgrade(handshake) => break handshake,
            }
        };
        let mut stream = StreamOwned::new(tls, socket);
        let mut machine = Secured::<Probe>::new(handshake);
        let mut ask = |machine: &mut Secured<Probe>, option: Vec<u8>| -> io::Result<Answer> {
            stream.write_all(&option)?;
            loop {
                let mut bytes = vec![0; machine.wanted()];
                stream.read_exact(&mut bytes)?;
                if let Some(answer) = machine.receive(&bytes).map_err(io::Error::other)? {
                    return Ok(answer);
                }
            }
        };
        if structured {
            let option = machine.structured_reply();
            assert_eq!(ask(&mut machine, option)?, Answer::Accepted);
        }
        let option = machine.go(export);
        match ask(&mut machine, option)? {
            Answer::Transmission(_) => Ok(Self { stream }),
            other => panic!("{other:?}"),
        }
    }

    fn send(&mut self, command: Command, flags: CommandFlags, cookie: u64, range: (u64, u32)) {
        let request = RawRequest {
            flags,
            command,
            cookie: Cookie(cookie),
            offset: range.0,
            length: range.1,
        };
        self.stream.write_all(&request.encode()).unwrap();
        self.stream.flush().unwrap();
    }

    fn send_write(&mut self, cookie: u64, offset: u64, data: &[u8]) {
        let length = u32::try_from(data.len()).unwrap();
        self.send(Command::WRITE, NONE, cookie, (offset, length));
        self.stream.write_all(data).unwrap();
        self.stream.flush().unwrap();
    }

    /// The next reply, with `length` bytes of data if it is a simple one that succeeded.
    fn reply(&mut self, length: impl Fn(u64) -> usize) -> io::Result<(u64, Errno)> {
        let mut magic = [0; 4];
        self.stream.read_exact(&mut magic)?;
        let mut header = vec![0; ReplyHeader::length(magic).unwrap()];
        header[..4].copy_from_slice(&magic);
        self.stream.read_exact(&mut header[4..])?;
        match ReplyHeader::parse(&header).unwrap() {
            ReplyHeader::Simple { cookie, errno } => {
                if errno == Errno::OK {
                    self.stream.read_exact(&mut vec![0; length(cookie.0)])?;
                }
                Ok((cookie.0, errno))
            }
            ReplyHeader::Chunk {
                cookie,
                kind,
                done,
                length,
            } => {
                let mut payload = vec![0; length as usize];
                self.stream.read_exact(&mut payload)?;
                assert!(done, "one chunk is expected here");
                match Chunk::parse(kind, &payload).unwrap() {
                    Chunk::Error { errno, .. } => Ok((cookie.0, errno)),
                    _ => Ok((cookie.0, Errno::OK)),
                }
            }
        }
    }

    fn status(&mut self) -> (u64, Errno) {
        self.reply(|_| 0).unwrap()
    }

    fn is_closed(&mut self) -> bool {
        let error = self.reply(|_| 0).unwrap_err();
        matches!(
            error.kind(),
            ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe
        )
    }
}

fn exports(bench: &Bench) -> &Arc<Exports> {
    &bench.service.exports
}

#[test]
fn c46_replies_come_in_the_order_in_which_they_are_ready_with_their_cookies() {
    let bench = Bench::new();
    let mut client = bench.client(false);
    bench.service.store.write(0, &[1; 4096]).unwrap();
    let held = bench.hold_workers();
    client.send_write(1, 2 << 20, &vec![7; LONG]);
    client.send(Command::READ, NONE, 2, (32 << 20, 2 << 20));
    // A request that needs no worker overtakes them: an error, because not every file system reads without waiting.
    client.send(Command::READ, NONE, 3, (SIZE, 1));
    assert_eq!(client.status(), (3, Errno::EINVAL));
    drop(held);
    let mut done: Vec<_> = (0..2)
        .map(|_| {
            client
                .reply(|cookie| if cookie == 2 { 2 << 20 } else { 0 })
                .unwrap()
        })
        .collect();
    done.sort_unstable();
    assert_eq!(done, [(1, Errno::OK), (2, Errno::OK)]);
}

#[test]
fn a_client_may_change_its_keys_at_any_time() {
    let bench = Bench::new();
    let mut client = bench.client(false);
    for cookie in 0..4 {
        // It asks for the server's new keys too, which must not come after what they encrypt.
        client.stream.conn.refresh_traffic_keys().unwrap();
        client.send_write(2 * cookie, 0, &[7; 40_000]);
        client.stream.conn.refresh_traffic_keys().unwrap();
        client.send(Command::READ, NONE, 2 * cookie + 1, (0, 40_000));
        let mut replies = [0, 1].map(|_| {
            client
                .reply(|cookie| if cookie % 2 == 1 { 40_000 } else { 0 })
                .unwrap()
        });
        replies.sort_unstable();
        assert_eq!(
            replies,
            [2 * cookie, 2 * cookie + 1].map(|cookie| (cookie, Errno::OK))
        );
    }
}

#[test]
fn c57_disc_waits_for_what_was_asked_before() {
    let bench = Bench::new();
    let mut client = bench.client(false);
    let held = bench.hold_workers();
    client.send_write(1, 0, &vec![7; LONG]);
    client.send(Command::DISC, NONE, 2, (0, 0));
    bench.in_flight(1);
    drop(held);
    assert_eq!(client.status(), (1, Errno::OK));
    assert!(client.is_closed(), "and no reply to DISC");
    assert_eq!(bench.file()[..LONG], vec![7; LONG]);
}

#[tokio::test(flavor = "multi_thread")]
async fn revoking_waits_for_writes_in_flight_and_lets_nothing_follow_them() {
    // What the kernel asked for and nobody began is dropped with its connection.
    for (structured, expected) in [(true, 7), (false, 0)] {
        let bench = Bench::new();
        let mut client = bench.client(structured);
        let held = bench.hold_workers();
        client.send_write(1, 0, &vec![7; LONG]);
        bench.in_flight(1);
        exports(&bench).forbid(&bench.export);
        assert_eq!(exports(&bench).order(Some(&bench.export), Order::Close), 1);
        let vacated = exports(&bench).vacated(Some(&bench.export));
        tokio::pin!(vacated);
        let soon = Duration::from_millis(100);
        assert!(
            tokio::time::timeout(soon, &mut vacated).await.is_err(),
            "the write is not over"
        );
        assert!(client.is_closed(), "the client is cut off at once");
        drop(held);
        tokio::time::timeout(PATIENCE, vacated).await.unwrap();
        assert_eq!(bench.file()[..LONG], vec![expected; LONG]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn c60_a_server_that_shuts_down_finishes_what_was_begun() {
    let bench = Bench::new();
    let mut kernel = bench.client(false);
    let mut probe = bench.client(true);
    let held = bench.hold_workers();
    kernel.send_write(1, 0, &vec![7; LONG]);
    probe.send_write(1, LONG as u64, &vec![8; LONG]);
    bench.in_flight(2);
    bench.service.draining.store(true, Ordering::Release);
    bench.wake.wake();
    exports(&bench).drain();
    assert!(exports(&bench).enter(&bench.export).is_err());
    // Only who can tell ESHUTDOWN from a broken disk is told.
    probe.send_write(2, 0, &[9; 4096]);
    assert_eq!(probe.status(), (2, Errno::ESHUTDOWN));
    kernel.send_write(2, 0, &[9; 4096]);
    drop(held);
    assert_eq!(kernel.status(), (1, Errno::OK));
    assert_eq!(probe.status(), (1, Errno::OK));
    assert!(kernel.is_closed(), "without an answer to what came late");
    probe.send(Command::FLUSH, NONE, 3, (0, 0));
    assert_eq!(probe.status(), (3, Errno::ESHUTDOWN));
    assert!(probe.is_closed());
    let vacated = exports(&bench).vacated(None);
    tokio::time::timeout(PATIENCE, vacated).await.unwrap();
    let file = bench.file();
    assert_eq!(file[..LONG], vec![7; LONG]);
    assert_eq!(file[LONG..2 * LONG], vec![8; LONG]);
}

#[test]
fn memory_in_flight_is_bounded_and_a_stalled_session_stops_no_other() {
    let pool = 64 << 20;
    let bench = Bench::with_memory(pool);
    let held = bench.hold_workers();
    let mut greedy: Vec<_> = (0..3).map(|_| bench.client(false)).collect();
    for client in &mut greedy {
        for cookie in 0..4 {
            client.send(Command::READ, NONE, cookie, (0, 24 << 20));
        }
    }
    // Two requests fill the pool; the others wait, and nothing is allocated for them.
    bench.in_flight(2);
    let mut modest = bench.client(false);
    modest.send(Command::WRITE, NONE, 1, (0, 4096));
    std::thread::sleep(Duration::from_millis(50));
    assert!(bench.service.budget.in_flight() <= pool);
    modest.stream.write_all(&[3; 4096]).unwrap();
    modest.send(Command::READ, NONE, 2, (SIZE, 1));
    let first = modest.status();
    drop(held);
    let mut replies = vec![first, modest.status()];
    replies.sort_unstable();
    assert_eq!(replies, [(1, Errno::OK), (2, Errno::EINVAL)]);
    std::thread::scope(|scope| {
        for client in &mut greedy {
            scope.spawn(|| {
                let replies = (0..4).map(|_| client.reply(|_| 24 << 20).unwrap());
                let mut cookies: Vec<_> = replies.collect();
                cookies.sort_unstable();
                let expected: Vec<_> = (0..4).map(|cookie| (cookie, Errno::OK)).collect();
                assert_eq!(cookies, expected, "all are served in the end");
            });
        }
    });
    wait_until(|| bench.service.budget.in_flight() == 0);
}

#[test]
fn one_fdatasync_serves_all_that_wait_and_takes_one_worker() {
    let bench = Bench::new();
    let mut clients: Vec<_> = (0..4).map(|_| bench.client(false)).collect();
    let held = bench.hold_workers();
    for client in &mut clients {
        for cookie in 0..32 {
            client.send(Command::FLUSH, NONE, cookie, (0, 0));
        }
    }
    wait_until(|| bench.service.commits.waiting() == 4 * 32);
    assert_eq!(bench.service.workers.waiting(), 1);
    drop(held);
    for client in &mut clients {
        for _ in 0..32 {
            assert_eq!(client.status().1, Errno::OK);
        }
    }
}

#[test]
fn a_client_that_vanishes_leaves_nothing_behind() {
    let bench = Bench::new();
    let mut client = bench.client(false);
    let held = bench.hold_workers();
    for cookie in 0..8 {
        client.send(Command::READ, NONE, cookie, (0, 2 << 20));
    }
    client.send(Command::WRITE, NONE, 99, (0, 1 << 20));
    client.stream.write_all(&[5; 1000]).unwrap();
    wait_until(|| bench.service.budget.in_flight() >= 17 << 20);
    drop(client);
    drop(held);
    wait_until(|| bench.service.budget.in_flight() == 0);
    wait_until(|| exports(&bench).all()[0].1 == 0);
    assert_eq!(bench.file()[..1000], [0; 1000], "half a WRITE is none");
}

#[test]
fn k21_what_waits_for_a_worker_is_dropped_with_its_connection() {
    for (structured, expected) in [(false, 7), (true, 5)] {
        let bench = Bench::new();
        let mut client = bench.client(structured);
        let file = File::options()
            .write(true)
            .open(bench.directory.path().join("data"));
        file.unwrap().write_all(&[7; 8192]).unwrap();
        let held = bench.hold_workers();
        client.send(Command::WRITE, CommandFlags::FUA, 1, (0, 4096));
        client.stream.write_all(&[5; 4096]).unwrap();
        client.send(Command::WRITE_ZEROES, NONE, 2, (4096, 4096));
        client.stream.flush().unwrap();
        wait_until(|| bench.service.workers.waiting() == 2);
        drop(client);
        drop(held);
        wait_until(|| exports(&bench).all()[0].1 == 0);
        let file = bench.file();
        assert_eq!(file[..4096], [expected; 4096], "structured: {structured}");
        assert_eq!(file[4096] == 0, structured);
    }
}
