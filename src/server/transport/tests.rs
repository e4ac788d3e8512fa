//! A client that is rustls alone, at the other end of a socket.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustls::server::UnbufferedServerConnection;
use rustls::{AlertDescription, ClientConnection, Error, StreamOwned};

use super::*;
use crate::tls::{self, Authority, Leaf, Profile, Secret, ServerOptions, ServerTls, Side};

const PATIENCE: Duration = Duration::from_secs(20);
const EARLY: usize = 3;
const WIDE: usize = 128 << 10;

type Client = StreamOwned<ClientConnection, TcpStream>;

/// A connection after its handshake, seen from both sides.
fn connect(profile: Profile) -> (RecordChannel, Staged, Client) {
    match transport(profile, &[]) {
        (Transport::Records(channel), staged, client) => (*channel, staged, client),
        _ => panic!("not TLS 1.3"),
    }
}

/// The client sends `early` at once, and rustls has handed out the first bytes of it when it is relieved.
fn transport(profile: Profile, early: &[u8]) -> (Transport, Staged, Client) {
    let authority = Authority::temporary().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let server = Leaf::new(Side::Server, vec!["server.test".to_owned()]);
    tls::write_secret(directory.path(), &authority.issue(&server).unwrap()).unwrap();
    let options = ServerOptions {
        tls12: true,
        clients: vec!["client.test".to_owned()],
    };
    let server = ServerTls::load(directory.path(), options).unwrap();
    let leaf = Leaf::new(Side::Client, vec!["client.test".to_owned()]);
    let secret = authority.issue(&leaf).unwrap();
    let secret = Secret::from_map("the test", &secret, Side::Client).unwrap();
    let config = tls::client_config(&secret, profile).unwrap();
    let client = ClientConnection::new(config, "server.test".try_into().unwrap()).unwrap();

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut client = StreamOwned::new(client, socket);
    let sent = early.to_owned();
    let client = std::thread::spawn(move || {
        client.conn.complete_io(&mut client.sock).unwrap();
        client.write_all(&sent).unwrap();
        client
    });
    let (socket, _) = listener.accept().unwrap();
    socket.set_nonblocking(true).unwrap();
    let tls = UnbufferedServerConnection::new(server.config()).unwrap();
    let mut channel = Channel::new(socket, tls, 8 << 10);
    let mut taken = Taken::at_most(EARLY.min(early.len()).max(1));
    while channel.tls().is_handshaking() || taken.bytes.len() < early.len().min(EARLY) {
        channel.receive(&mut taken).unwrap();
        channel.send().unwrap();
        sleep(Duration::from_millis(1));
    }
    assert_eq!(taken.bytes, early[..early.len().min(EARLY)]);
    let (transport, staged) = channel.into_transport(WIDE).unwrap();
    (transport, staged, client.join().unwrap())
}

/// What was received, some of it at a time.
struct Taken {
    bytes: Vec<u8>,
    most: usize,
}

impl Taken {
    fn at_most(most: usize) -> Self {
        let bytes = Vec::new();
        Self { bytes, most }
    }
}

impl Sink for Taken {
    type Error = ChannelError;

    fn wants(&self) -> bool {
        self.bytes.len() < self.most
    }

    fn take(&mut self, plaintext: &[u8]) -> Result<usize, ChannelError> {
        let taken = plaintext.len().min(self.most - self.bytes.len());
        self.bytes.extend_from_slice(&plaintext[..taken]);
        Ok(taken)
    }
}

fn pattern(length: usize) -> Vec<u8> {
    (0_u8..251).cycle().take(length).collect()
}

/// Receives until `until` says that it is enough, or fails.
fn receive(
    transport: &mut RecordChannel,
    taken: &mut Taken,
    until: impl Fn(&Taken, Received) -> bool,
) -> Result<(), ChannelError> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let received = transport.receive(taken)?;
        if until(taken, received) {
            return Ok(());
        }
        assert!(Instant::now() < deadline, "nothing comes");
        sleep(Duration::from_millis(1));
    }
}

fn transmit(transport: &mut RecordChannel, staged: &mut Staged) {
    let deadline = Instant::now() + PATIENCE;
    while transport.transmit(staged).unwrap().blocked {
        assert!(Instant::now() < deadline, "nothing is taken");
        sleep(Duration::from_millis(1));
    }
    assert!(staged.is_empty());
}

fn stage(staged: &mut Staged, bytes: &[u8]) {
    let room = staged.room(20, bytes.len() - 20);
    room.header.copy_from_slice(&bytes[..20]);
    let mut left = &bytes[20..];
    for mut piece in room.data {
        let (part, behind) = left.split_at(piece.len());
        piece.copy_from_slice(part);
        left = behind;
    }
    staged.stage(bytes.len());
}

#[test]
fn bytes_go_both_ways() {
    for profile in [Profile::Probe, Profile::Kernel] {
        let (mut transport, mut staged, mut client) = connect(profile);
        let sent = pattern(700_000);
        let expected = sent.clone();
        let client = std::thread::spawn(move || {
            client.write_all(&sent).unwrap();
            client.flush().unwrap();
            let mut back = vec![0; sent.len() + 3];
            client.read_exact(&mut back).unwrap();
            back
        });
        let mut taken = Taken::at_most(0);
        while taken.most < expected.len() {
            taken.most = expected.len().min(taken.most + 7001);
            receive(&mut transport, &mut taken, |taken, _| !taken.wants()).unwrap();
        }
        assert!(taken.bytes == expected);
        staged.append(b"ack");
        for part in expected.chunks(100_001) {
            stage(&mut staged, part);
        }
        transmit(&mut transport, &mut staged);
        let back = client.join().unwrap();
        assert_eq!(&back[..3], b"ack");
        assert!(back[3..] == expected);
    }
}

#[test]
fn tls12_stays_with_rustls() {
    let (mut transport, mut staged, mut client) = transport(Profile::Tls12, &[]);
    assert!(matches!(transport, Transport::Rustls(_)));
    client.write_all(b"a question").unwrap();
    let mut taken = Taken::at_most(10);
    while taken.wants() {
        transport.receive(&mut taken).unwrap();
    }
    // More than the socket takes, so that the rest has to wait for the reader.
    let answer = pattern(20 << 20);
    for part in answer.chunks(1 << 20) {
        stage(&mut staged, part);
    }
    assert!(transport.transmit(&mut staged).unwrap().blocked);
    let length = answer.len();
    let reader = std::thread::spawn(move || {
        let mut back = vec![0; length];
        client.read_exact(&mut back).unwrap();
        back
    });
    while transport.transmit(&mut staged).unwrap().blocked {
        sleep(Duration::from_millis(5));
    }
    assert!(staged.is_empty());
    assert!(reader.join().unwrap() == answer);
}

#[test]
fn what_rustls_has_received_is_not_lost() {
    let early = pattern(40_000);
    for profile in [Profile::Probe, Profile::Tls12] {
        let (mut transport, _, _client) = transport(profile, &early);
        let mut taken = Taken::at_most(early.len() - EARLY);
        let deadline = Instant::now() + PATIENCE;
        while taken.wants() {
            transport.receive(&mut taken).unwrap();
            assert!(Instant::now() < deadline, "nothing comes");
        }
        assert!(taken.bytes == early[EARLY..]);
    }
}

#[test]
fn keys_change_when_the_peer_wants_it() {
    let (mut transport, mut staged, mut client) = connect(Profile::Probe);
    for round in 0..3 {
        staged.append(&pattern(50_000));
        transmit(&mut transport, &mut staged);
        let before = transport.tls().sealed();
        client.conn.refresh_traffic_keys().unwrap();
        client.write_all(b"more").unwrap();
        client.flush().unwrap();
        let mut taken = Taken::at_most(4);
        receive(&mut transport, &mut taken, |taken, _| !taken.wants()).unwrap();
        assert_eq!(taken.bytes, b"more");
        staged.append(b"and an answer");
        transmit(&mut transport, &mut staged);
        // The answer was sealed after the KeyUpdate, or with it.
        assert!(transport.tls().sealed() < before, "{round}");
        let mut back = vec![0; 50_000 + 13];
        client.read_exact(&mut back).unwrap();
        assert!(back.ends_with(b"and an answer"));
    }
}

#[test]
fn worn_keys_are_changed() {
    let (mut transport, mut staged, mut client) = connect(Profile::Probe);
    transport.tls().wear_out_after(5);
    let expected = pattern(40 * CONTENT);
    let all = expected.len();
    let reader = std::thread::spawn(move || {
        let mut back = vec![0; all];
        client.read_exact(&mut back).unwrap();
        back
    });
    for part in expected.chunks(2 * CONTENT) {
        staged.append(part);
        transmit(&mut transport, &mut staged);
        assert!(transport.tls().sealed() < 5 + 4);
    }
    assert!(reader.join().unwrap() == expected);
}

#[test]
fn many_wishes_for_new_keys_get_one_answer() {
    let (mut transport, mut staged, mut client) = connect(Profile::Probe);
    for _ in 0..1000 {
        client.conn.refresh_traffic_keys().unwrap();
        while client.conn.wants_write() {
            client.conn.write_tls(&mut client.sock).unwrap();
        }
    }
    client.write_all(b"end").unwrap();
    let mut taken = Taken::at_most(3);
    receive(&mut transport, &mut taken, |taken, _| !taken.wants()).unwrap();
    transmit(&mut transport, &mut staged);
    let mut answer = [0; 1000];
    assert_eq!(client.sock.read(&mut answer).unwrap(), HEAD_AND_KEY_UPDATE);
}

#[test]
fn an_alert_is_the_last_record() {
    let (mut transport, mut staged, mut client) = connect(Profile::Probe);
    client.conn.refresh_traffic_keys().unwrap();
    client.write_all(b"good").unwrap();
    client.sock.write_all(&[22, 3, 3, 0, 5]).unwrap();
    let mut taken = Taken::at_most(100);
    receive(&mut transport, &mut taken, |_, _| false).unwrap_err();
    transport.give_up(&mut staged);
    drop(transport);
    let mut last = Vec::new();
    client.sock.read_to_end(&mut last).unwrap();
    assert_eq!(last.len(), HEAD_AND_ALERT);
}

/// An alert in its record.
const HEAD_AND_ALERT: usize = 5 + 2 + 17;

/// A KeyUpdate in its record.
const HEAD_AND_KEY_UPDATE: usize = 5 + 5 + 17;

#[test]
fn what_is_no_record_of_the_peer_ends_the_connection_and_it_is_told() {
    let forged: [(&[u8], _, _); 3] = [
        (
            &[&[23, 3, 3, 0, 32][..], &[9; 32]].concat(),
            Error::DecryptError,
            AlertDescription::BadRecordMac,
        ),
        (
            &[23, 3, 3, 0x7f, 0xff],
            Error::PeerSentOversizedRecord,
            AlertDescription::RecordOverflow,
        ),
        (
            &[22, 3, 3, 0, 5, 24, 0, 0, 1, 0],
            Error::InappropriateMessage {
                expect_types: vec![rustls::ContentType::ApplicationData],
                got_type: rustls::ContentType::Handshake,
            },
            AlertDescription::UnexpectedMessage,
        ),
    ];
    for (bytes, expected, alert) in forged {
        let (mut transport, mut staged, mut client) = connect(Profile::Probe);
        client.write_all(b"good").unwrap();
        client.sock.write_all(bytes).unwrap();
        let mut taken = Taken::at_most(100);
        let refused = receive(&mut transport, &mut taken, |_, _| false).unwrap_err();
        assert!(matches!(refused, ChannelError::Tls(error) if error == expected));
        assert_eq!(taken.bytes, b"good");
        transport.give_up(&mut staged);
        let told = client.read(&mut [0; 10]).unwrap_err();
        let told = told.into_inner().unwrap().downcast::<Error>().unwrap();
        assert_eq!(*told, Error::AlertReceived(alert));
    }
}

#[test]
fn a_record_that_was_changed_or_comes_again_is_refused() {
    for again in [false, true] {
        let (mut transport, _, mut client) = connect(Profile::Probe);
        client.conn.writer().write_all(b"a record").unwrap();
        let mut record = Vec::new();
        client.conn.write_tls(&mut record).unwrap();
        if again {
            record.extend_from_within(..);
        } else {
            record[7] ^= 1;
        }
        client.sock.write_all(&record).unwrap();
        let mut taken = Taken::at_most(100);
        let refused = receive(&mut transport, &mut taken, |_, _| false).unwrap_err();
        assert!(matches!(refused, ChannelError::Tls(Error::DecryptError)));
        assert_eq!(taken.bytes, if again { &b"a record"[..] } else { b"" });
    }
}

#[test]
fn either_side_may_say_that_it_is_done() {
    let (mut transport, mut staged, mut client) = connect(Profile::Probe);
    client.write_all(b"last").unwrap();
    client.conn.send_close_notify();
    client.flush().unwrap();
    let mut taken = Taken::at_most(100);
    let ended = |_: &Taken, received| received == Received::End;
    receive(&mut transport, &mut taken, ended).unwrap();
    assert_eq!(taken.bytes, b"last");
    staged.append(b"to the end");
    transport.close(&mut staged);
    let mut back = Vec::new();
    client.read_to_end(&mut back).unwrap();
    assert_eq!(back, b"to the end");
}
