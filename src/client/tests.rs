//! Sessions against a scripted server, whose verbs do as little as each story needs.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread::JoinHandle;
use std::time::Instant;

use rustls::{ConnectionTrafficSecrets, ServerConfig, ServerConnection, StreamOwned};

use super::*;
use crate::nbd::client::Transmission;
use crate::nbd::option_reply::reply as option_reply;
use crate::nbd::reply::{self, Extent};
use crate::nbd::request::RawRequest;
use crate::nbd::server::{Exports, Handshake, Limits, Plain, PlainStep, Secured, Step as Next};
use crate::nbd::{
    Command, CommandFlags, Errno, ExportInfo, OptionCode, ReplyCode, TransmissionFlags,
};
use crate::tls::{self, Authority, Secret, ServerOptions, ServerTls, Side};
use crate::volumes::VolumeId;

const SIZE: u64 = 1 << 20;

fn volume() -> VolumeId {
    VolumeId::from_bytes([7; 16])
}

fn export(name: &str) -> ExportName {
    ExportName::try_from(name).unwrap()
}

/// The certificates of one volume.
struct Volume {
    server: ServerConfig,
    client: Secret,
}

impl Volume {
    fn new() -> Self {
        let authority = Authority::temporary().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let parts = authority.issue_server(&volume(), &[]).unwrap();
        tls::write_secret(directory.path(), &parts).unwrap();
        let options = ServerOptions {
            tls12: false,
            clients: vec![tls::client_identity(&volume())],
        };
        let server = ServerTls::load(directory.path(), options).unwrap();
        let mut server = (*server.config()).clone();
        server.enable_secret_extraction = true;
        let parts = authority.issue_client(&volume()).unwrap();
        let client = Secret::from_map("the client Secret", &parts, Side::Client).unwrap();
        Self { server, client }
    }

    /// A server that plays `script` on its first connection, and how to reach it.
    fn serve<T: Send + 'static>(
        &self,
        profile: tls::Profile,
        script: impl FnOnce(Served) -> T + Send + 'static,
    ) -> (Target, JoinHandle<T>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let target = Target {
            address: listener.local_addr().unwrap(),
            export: export("vol/att"),
            tls: tls::client_config(&self.client, profile).unwrap(),
            server_name: ServerName::try_from(tls::server_identity(&volume())).unwrap(),
            timeout: Duration::from_secs(20),
        };
        let config = Arc::new(self.server.clone());
        let played = std::thread::spawn(move || {
            let (socket, _) = listener.accept().unwrap();
            script(Served { socket, config })
        });
        (target, played)
    }
}

struct One;

impl Exports for One {
    fn find(&self, name: &ExportName) -> Option<ExportInfo> {
        (name.as_str() == "vol/att").then(|| ExportInfo {
            size: SIZE,
            flags: TransmissionFlags::HAS_FLAGS.with(TransmissionFlags::CAN_MULTI_CONN),
            block_sizes: None,
            description: Some("hawser volume=v epoch=1".into()),
        })
    }

    fn names(&self) -> Vec<ExportName> {
        vec![export("vol/att")]
    }
}

/// A connection that was accepted.
struct Served {
    socket: TcpStream,
    config: Arc<ServerConfig>,
}

/// One inside TLS.
struct Inside {
    stream: StreamOwned<ServerConnection, TcpStream>,
    options: Secured,
}

impl Served {
    fn starttls(&mut self) -> Handshake {
        let (mut plain, greeting) = Plain::new(Limits::default());
        self.socket.write_all(&greeting).unwrap();
        loop {
            let mut bytes = vec![0; plain.wanted()];
            self.socket.read_exact(&mut bytes).unwrap();
            plain = match plain.receive(&bytes).unwrap() {
                PlainStep::Continue(next) => next,
                PlainStep::Reply(next, reply) => {
                    self.socket.write_all(&reply).unwrap();
                    next
                }
                PlainStep::StartTls { ack, handshake } => {
                    self.socket.write_all(&ack).unwrap();
                    return handshake;
                }
                PlainStep::Close(_) => panic!("the client went away"),
            };
        }
    }

    fn secure(mut self) -> Inside {
        let handshake = self.starttls();
        let tls = ServerConnection::new(self.config).unwrap();
        Inside {
            stream: StreamOwned::new(tls, self.socket),
            options: Secured::new(handshake, Limits::default()),
        }
    }
}

impl Inside {
    /// The answer to the next option; nothing is sent.
    fn option(&mut self) -> Vec<u8> {
        loop {
            let mut bytes = vec![0; self.options.wanted()];
            self.stream.read_exact(&mut bytes).unwrap();
            match self.options.receive(&bytes, &One).unwrap() {
                Next::Continue => {}
                Next::Reply(reply) | Next::Transmit { reply, .. } | Next::Close(reply) => {
                    return reply;
                }
            }
        }
    }

    fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
        self.stream.flush().unwrap();
    }

    fn answer(&mut self) {
        let reply = self.option();
        self.send(&reply);
    }

    fn request(&mut self) -> RawRequest {
        let mut bytes = [0; RawRequest::LENGTH];
        self.stream.read_exact(&mut bytes).unwrap();
        RawRequest::parse(&bytes).unwrap()
    }

    fn secrets(self) -> (u64, Vec<u8>, u64, Vec<u8>) {
        plain(self.stream.conn.dangerous_extract_secrets().unwrap())
    }
}

/// Sent and received: sequence number and key.
fn plain(secrets: rustls::ExtractedSecrets) -> (u64, Vec<u8>, u64, Vec<u8>) {
    let key = |secrets: &ConnectionTrafficSecrets| match secrets {
        ConnectionTrafficSecrets::Chacha20Poly1305 { key, .. } => key.as_ref().to_vec(),
        _ => panic!("K4: not ChaCha20-Poly1305"),
    };
    let (tx, rx) = (key(&secrets.tx.1), key(&secrets.rx.1));
    (secrets.tx.0, tx, secrets.rx.0, rx)
}

/// The reason of a kernel session that must fail.
fn kernel_reason(target: &Target) -> ClientError {
    match kernel_session(target) {
        Ok(_) => panic!("a session where none may be"),
        Err(error) => error,
    }
}

#[test]
fn a_kernel_session_ends_with_the_keys_and_sequence_numbers_of_the_server() {
    for tickets in [0, 2] {
        let mut volume = Volume::new();
        // M5: tickets of other servers are read before the hand-over.
        volume.server.send_tls13_tickets = tickets;
        let (target, played) = volume.serve(tls::Profile::Kernel, |served| {
            let mut inside = served.secure();
            inside.answer();
            inside.secrets()
        });
        let session = kernel_session(&target).unwrap_or_else(|error| panic!("{error}"));
        let expected = Transmission {
            export: export("vol/att"),
            info: One.find(&export("vol/att")).unwrap(),
            structured: false,
            contexts: Vec::new(),
        };
        assert_eq!(session.transmission, expected, "K1");
        assert!(session.socket.nodelay().unwrap(), "C61");
        assert_eq!(session.socket.read_timeout().unwrap(), None);
        assert_eq!(session.socket.write_timeout().unwrap(), None);
        let (sent, our_key, received, their_key) = plain(session.secrets);
        let theirs = played.join().unwrap();
        assert_eq!((received, their_key, sent, our_key), theirs, "{tickets}");
    }
}

#[test]
fn a_proxy_session_goes_on_in_userspace() {
    let (target, played) = Volume::new().serve(tls::Profile::Kernel, |served| {
        let mut inside = served.secure();
        inside.answer();
        inside.request().command
    });
    let session = proxy_session(&target).unwrap_or_else(|error| panic!("{error}"));
    let mut stream = StreamOwned::new(session.tls, session.socket);
    let request = RawRequest {
        flags: CommandFlags(0),
        command: Command::FLUSH,
        cookie: crate::nbd::Cookie(1),
        offset: 0,
        length: 0,
    };
    stream.write_all(&request.encode()).unwrap();
    assert_eq!(played.join().unwrap(), Command::FLUSH);
}

#[test]
fn k3_what_was_read_beyond_go_is_never_handed_over() {
    let (target, played) = Volume::new().serve(tls::Profile::Kernel, |served| {
        let mut inside = served.secure();
        let mut reply = inside.option();
        reply.extend_from_slice(b"surplus");
        inside.send(&reply);
    });
    let error = kernel_reason(&target);
    assert!(matches!(*error.reason, Reason::Surplus(7)), "{error}");
    assert_eq!(error.step, Step::HandOver);
    played.join().unwrap();
}

#[test]
fn k3_a_record_behind_go_stays_in_the_socket() {
    let (target, played) = Volume::new().serve(tls::Profile::Kernel, |served| {
        let mut inside = served.secure();
        inside.answer();
        inside.send(b"later");
        inside.secrets()
    });
    let session = kernel_session(&target).unwrap_or_else(|error| panic!("{error}"));
    let (sent, ..) = played.join().unwrap();
    assert_eq!(session.secrets.rx.0 + 1, sent);
    let mut header = [0; 5];
    (&session.socket).read_exact(&mut header).unwrap();
    assert_eq!(header[0], 23, "a whole record waits for the kernel");
}

#[test]
fn k4_keys_that_changed_during_negotiation_are_not_handed_over() {
    let (target, played) = Volume::new().serve(tls::Profile::Kernel, |served| {
        let mut inside = served.secure();
        let reply = inside.option();
        inside.stream.conn.refresh_traffic_keys().unwrap();
        inside.send(&reply);
    });
    let error = kernel_reason(&target);
    assert!(matches!(*error.reason, Reason::KeysChanged), "{error}");
    assert!(error.is_transient());
    played.join().unwrap();
}

#[test]
fn c25_plaintext_behind_the_ack_is_not_taken_for_negotiation() {
    let (target, played) = Volume::new().serve(tls::Profile::Kernel, |mut served| {
        served.starttls();
        let injected = option_reply(OptionCode::GO, ReplyCode::ACK, &[]);
        served.socket.write_all(&injected).unwrap();
        // The client says no more than its ClientHello.
        let _ = served.socket.read_to_end(&mut Vec::new());
    });
    let error = kernel_reason(&target);
    assert!(matches!(*error.reason, Reason::NotTls(_)), "{error}");
    assert!(error.reason.is_violation(error.step));
    played.join().unwrap();
}

#[test]
fn a_refusal_says_what_was_refused_and_why() {
    let (mut target, played) = Volume::new().serve(tls::Profile::Kernel, |served| {
        served.secure().answer();
    });
    target.export = export("vol/gone");
    let error = kernel_reason(&target);
    let Reason::Refused(refusal) = &*error.reason else {
        panic!("{error}")
    };
    assert_eq!(refusal.code, ReplyCode::ERR_UNKNOWN);
    assert!(!error.is_transient() && !error.reason.is_violation(error.step));
    let text = error.to_string();
    for part in ["vol/gone", "GO", "no such export"] {
        assert!(text.contains(part), "{text}");
    }
    played.join().unwrap();
}

#[test]
fn c27_a_certificate_that_is_not_accepted_is_explained() {
    let stranger = Volume::new();
    let (mut target, played) = Volume::new().serve(tls::Profile::Kernel, |served| {
        let mut inside = served.secure();
        inside.stream.read(&mut [0]).unwrap_err().to_string()
    });
    // It trusts the server, whose authority is another than its own certificate's.
    let mut config = (*target.tls).clone();
    let foreign = tls::client_config(&stranger.client, tls::Profile::Kernel).unwrap();
    config.client_auth_cert_resolver = foreign.client_auth_cert_resolver.clone();
    target.tls = Arc::new(config);
    let error = kernel_reason(&target);
    assert!(
        matches!(
            *error.reason,
            Reason::Tls(rustls::Error::AlertReceived(_)) | Reason::ClosedAfterHandshake
        ),
        "{error}"
    );
    assert!(error.to_string().contains("certificate"), "{error}");
    played.join().unwrap();
}

#[test]
fn a_server_that_drips_or_is_silent_ends_at_the_deadline() {
    for drip in [true, false] {
        let (mut target, played) = Volume::new().serve(tls::Profile::Kernel, move |mut served| {
            let (_, greeting) = Plain::new(Limits::default());
            for byte in greeting.iter().chain(std::iter::repeat(&0)) {
                std::thread::sleep(Duration::from_millis(20));
                if drip && served.socket.write_all(&[*byte]).is_err() {
                    return;
                }
                let mut ended = [0];
                if !drip && served.socket.read(&mut ended).is_ok_and(|count| count == 0) {
                    return;
                }
            }
        });
        target.timeout = Duration::from_millis(150);
        let started = Instant::now();
        let error = kernel_reason(&target);
        assert!(matches!(*error.reason, Reason::TimedOut(_)), "{error}");
        assert!(
            started.elapsed() >= Duration::from_millis(150),
            "not before its time"
        );
        assert!(error.is_transient() && error.reason.is_violation(error.step));
        played.join().unwrap();
    }
}

#[test]
fn nobody_listening_is_a_failure_to_connect() {
    let (mut target, played) = Volume::new().serve(tls::Profile::Kernel, drop);
    let closed = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = closed.local_addr().unwrap();
    drop(closed);
    drop(TcpStream::connect(target.address).unwrap());
    played.join().unwrap();
    target.address = address;
    let error = kernel_reason(&target);
    assert_eq!(error.step, Step::Connect);
    assert!(error.is_transient() && !error.reason.is_violation(error.step));
}

#[test]
fn a_probe_negotiates_contexts_and_reads_chunks() {
    let (target, played) = Volume::new().serve(tls::Profile::Probe, |served| {
        let mut inside = served.secure();
        for _ in 0..4 {
            inside.answer();
        }
        let read = inside.request();
        let mut data = reply::offset_data(read.cookie, false, 0, 2).to_vec();
        data.extend_from_slice(b"ab");
        data.extend_from_slice(&reply::offset_hole(read.cookie, true, 2, 510));
        inside.send(&data);
        let status = inside.request();
        let extents = [Extent {
            length: status.length,
            flags: 3,
        }];
        inside.send(&reply::block_status(status.cookie, true, 1, &extents));
        let refused = inside.request();
        inside.send(&reply::error(refused.cookie, Errno::EINVAL, "beyond"));
        let foreign = inside.request();
        inside.send(&reply::simple(crate::nbd::Cookie(1), Errno::OK));
        assert_eq!(inside.request().command, Command::DISC);
        foreign.command
    });
    let mut probe = ProbeSession::connect(&target).unwrap();
    assert_eq!(probe.list().unwrap(), Ok(vec!["vol/att".to_owned()]), "C15");
    assert_eq!(probe.structured_reply().unwrap(), Ok(()));
    let contexts = probe
        .set_meta_context(&target.export, &["base:allocation"])
        .unwrap()
        .unwrap();
    let mut session = probe.go(&target.export).unwrap();
    assert_eq!(session.transmission().contexts, contexts);
    let chunks = vec![
        OwnedChunk::Data {
            offset: 0,
            data: b"ab".to_vec(),
        },
        OwnedChunk::Hole {
            offset: 2,
            length: 510,
        },
    ];
    assert_eq!(session.read(0, 512).unwrap(), Reply::Structured(chunks));
    let Reply::Structured(chunks) = session.block_status(0, 4096).unwrap() else {
        panic!()
    };
    assert_eq!(chunks.len(), 1);
    assert_eq!(session.read(SIZE, 1).unwrap().errno(), Errno::EINVAL);
    let error = session.read(0, 1).unwrap_err();
    assert!(
        error.reason.is_violation(error.step),
        "C46: the cookie was another's: {error}"
    );
    session.disconnect();
    assert_eq!(played.join().unwrap(), Command::READ);
}

#[test]
fn c50_replies_longer_than_asked_for_end_the_session() {
    let (target, played) = Volume::new().serve(tls::Profile::Probe, |served| {
        let mut inside = served.secure();
        inside.answer();
        inside.answer();
        let read = inside.request();
        let header = reply::chunk_header(
            read.cookie,
            crate::nbd::ChunkType::OFFSET_DATA,
            true,
            1 << 24,
        );
        inside.send(&header);
    });
    let mut probe = ProbeSession::connect(&target).unwrap();
    probe.structured_reply().unwrap().unwrap();
    let mut session = probe.go(&target.export).unwrap();
    let error = session.read(0, 512).unwrap_err();
    assert!(matches!(*error.reason, Reason::TooLong { .. }), "{error}");
    played.join().unwrap();
}
