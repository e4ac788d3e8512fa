//! Up to transmission: C1 to C44.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use hawser::nbd::option::OptionHeader;
use hawser::nbd::option_reply::{Information, parse_server, reply};
use hawser::nbd::{
    BlockSizes, Command, CommandFlags, Errno, InfoType, OptionCode, ReplyCode, TransmissionFlags,
};
use hawser::tls::{self, Authority, Leaf, Secret, Side};
use rustls::client::Resumption;
use rustls::{AlertDescription, ClientConfig, HandshakeKind};
use time::OffsetDateTime;

use crate::bench::{Bench, EXPORT, config, unchecked_config};
use crate::wire::{Plain, Tls, Wire, go_payload, is_end, meta_payload};

const NONE: CommandFlags = CommandFlags(0);
const MIB: u64 = 1 << 20;

#[test]
fn c1_the_greeting_is_fixed_newstyle_and_no_more() {
    let bench = Bench::new(MIB);
    let server = bench.serve_file(&[]);
    let mut socket = TcpStream::connect(server.address).unwrap();
    let mut greeting = [0; 18];
    socket.read_exact(&mut greeting).unwrap();
    assert_eq!(greeting, *b"NBDMAGICIHAVEOPT\x00\x03");
}

#[test]
fn c2_c3_clients_with_other_flags_are_dropped() {
    let bench = Bench::new(MIB);
    let server = bench.serve_file(&[]);
    for flags in [0_u32, 2, 4, 7, 0x8000_0001, u32::MAX] {
        let mut wire = Plain::silent(server.address).unwrap();
        wire.say(&flags.to_be_bytes());
        wire.hears_the_end();
    }
    for flags in [1_u32, 3] {
        let mut wire = Plain::silent(server.address).unwrap();
        wire.say(&flags.to_be_bytes());
        let refused = wire.ask(OptionCode::LIST, &[]).0;
        assert_eq!(refused, ReplyCode::ERR_TLS_REQD);
    }
}

#[test]
fn c5_an_option_without_its_magic_ends_the_connection() {
    let bench = Bench::new(MIB);
    let server = bench.serve_file(&[]);
    let mut option = OptionHeader::encode(OptionCode::LIST, &[]);
    option[7] ^= 1;
    let mut plain = Plain::connect(server.address);
    plain.say(&option);
    plain.hears_the_end();
    let mut tls = Tls::connect(server.address, &bench.client());
    tls.say(&option);
    tls.hears_the_end();
}

#[test]
fn c6_unknown_options_are_refused_with_their_payload() {
    let bench = Bench::new(MIB);
    let server = bench.serve_file(&[]);
    let mut wire = Tls::connect(server.address, &bench.client());
    for (code, length) in [(4, 0), (11, 0), (12, 5), (0, 1), (0x7fff_ffff, 60_000)] {
        let refused = wire.ask(OptionCode(code), &vec![0xaa; length]).0;
        assert_eq!(refused, ReplyCode::ERR_UNSUP, "{code}");
    }
    wire.go(EXPORT).unwrap();
}

#[test]
fn c7_an_options_length_is_not_believed() {
    let bench = Bench::new(MIB);
    let server = bench.serve_file(&[]);
    for length in [(64_u32 << 10) + 1, 1 << 31, u32::MAX] {
        let mut header = OptionHeader::encode(OptionCode::GO, &[]);
        header[12..].copy_from_slice(&length.to_be_bytes());
        let mut plain = Plain::connect(server.address);
        plain.say(&header);
        plain.hears_the_end();
        let mut tls = Tls::connect(server.address, &bench.client());
        tls.say(&header);
        let (code, _) = tls.answer(OptionCode::GO).unwrap();
        assert_eq!(code, ReplyCode::ERR_TOO_BIG);
        tls.hears_the_end();
    }
    let mut plain = Plain::connect(server.address);
    let refused = plain.ask(OptionCode::GO, &[0; 64 << 10]).0;
    assert_eq!(
        refused,
        ReplyCode::ERR_TLS_REQD,
        "64 KiB are read and refused"
    );
    plain.starttls(&bench.client()).unwrap();
}

#[test]
fn c8_options_have_a_number() {
    let bench = Bench::new(MIB);
    let server = bench.serve_file(&[]);
    let mut plain = Plain::connect(server.address);
    for _ in 0..32 {
        assert_eq!(plain.ask(OptionCode::LIST, &[]).0, ReplyCode::ERR_TLS_REQD);
    }
    plain.option(OptionCode::LIST, &[]);
    plain.hears_the_end();
    let mut tls = Tls::connect(server.address, &bench.client());
    for _ in 0..1024 {
        assert!(tls.ask(OptionCode(99), &[]).0.is_error());
    }
    tls.option(OptionCode(99), &[]);
    tls.hears_the_end();
}

#[test]
fn c9_c10_names_fit_their_option_and_have_a_limit() {
    let bench = Bench::new(MIB);
    let server = bench.serve_file(&[]);
    let mut wire = Tls::connect(server.address, &bench.client());
    let longest = "x".repeat(4096);
    assert_eq!(wire.go(&longest), Err(ReplyCode::ERR_UNKNOWN));
    let mut malformed = Vec::new();
    let mut longer = go_payload(&longest, &[]);
    longer.insert(4, b'x');
    longer[..4].copy_from_slice(&4097_u32.to_be_bytes());
    malformed.push(longer);
    let good = go_payload(EXPORT, &[InfoType::BLOCK_SIZE]);
    let mut nul = good.clone();
    nul[5] = 0;
    malformed.push(nul);
    let mut not_utf8 = good.clone();
    not_utf8[5] = 0xff;
    malformed.push(not_utf8);
    for length in [0, 5, 8, 1 << 31, u32::MAX] {
        let mut wrong = good.clone();
        wrong[..4].copy_from_slice(&length.to_be_bytes());
        malformed.push(wrong);
    }
    for count in [0_u16, 2, u16::MAX] {
        let mut wrong = good.clone();
        let at = wrong.len() - 4;
        wrong[at..at + 2].copy_from_slice(&count.to_be_bytes());
        malformed.push(wrong);
    }
    malformed.extend((0..good.len()).map(|end| good[..end].to_vec()));
    for payload in malformed {
        for code in [OptionCode::INFO, OptionCode::GO] {
            let refused = wire.ask(code, &payload).0;
            assert_eq!(refused, ReplyCode::ERR_INVALID, "{payload:?}");
        }
    }
    wire.go(EXPORT).unwrap();
}

#[test]
fn c11_options_without_payload_have_none() {
    let bench = Bench::new(MIB);
    let server = bench.serve_file(&[]);
    let mut plain = Plain::connect(server.address);
    let refused = plain.ask(OptionCode::STARTTLS, &[0]).0;
    assert_eq!(refused, ReplyCode::ERR_INVALID);
    let mut tls = plain.starttls(&bench.client()).unwrap();
    for code in [OptionCode::LIST, OptionCode::STRUCTURED_REPLY] {
        assert_eq!(tls.ask(code, &[0]).0, ReplyCode::ERR_INVALID);
    }
    tls.go(EXPORT).unwrap();
}

#[test]
fn c12_abort_is_acknowledged_also_with_payload_and_when_nobody_waits() {
    let bench = Bench::new(MIB);
    let server = bench.serve_file(&[]);
    for payload in [&b""[..], b"bye"] {
        let mut plain = Plain::connect(server.address);
        assert_eq!(plain.ask(OptionCode::ABORT, payload).0, ReplyCode::ACK);
        plain.hears_the_end();
        let mut tls = Tls::connect(server.address, &bench.client());
        assert_eq!(tls.ask(OptionCode::ABORT, payload).0, ReplyCode::ACK);
        tls.hears_the_end();
    }
    let mut hasty = Plain::connect(server.address);
    hasty.option(OptionCode::ABORT, &[]);
    hasty.stream.shutdown(Shutdown::Both).unwrap();
    Tls::simple(server.address, &bench.client(), EXPORT);
}

#[test]
fn c15_to_c22_before_tls_every_option_gets_the_same_answer_whatever_exists() {
    let bench = Bench::new(MIB);
    let server = bench.serve_file(&[]);
    let refused = |code, payload: &[u8]| {
        let mut wire = Plain::connect(server.address);
        wire.option(code, payload);
        let answer = wire.answer(code).unwrap();
        assert_eq!(answer.0, ReplyCode::ERR_TLS_REQD, "{code}");
        // Exactly one: the next thing heard belongs to the next option.
        let mut tls = wire.starttls(&bench.client()).unwrap();
        tls.go(EXPORT).unwrap();
        answer
    };
    let exports = [EXPORT, "missing", ""];
    let go = exports.map(|export| go_payload(export, &[InfoType::BLOCK_SIZE]));
    let meta = exports.map(|export| meta_payload(export, &["base:allocation"]));
    let cases: [(OptionCode, &[Vec<u8>]); 8] = [
        (OptionCode::LIST, &[Vec::new(), vec![1]]),    // C15
        (OptionCode::INFO, &go),                       // C16
        (OptionCode::GO, &go),                         // C17
        (OptionCode::STRUCTURED_REPLY, &[Vec::new()]), // C18
        (OptionCode::LIST_META_CONTEXT, &meta),        // C19
        (OptionCode::SET_META_CONTEXT, &meta),         // C20
        (OptionCode::EXTENDED_HEADERS, &[Vec::new()]), // C21
        (OptionCode(0x7fff_ffff), &[vec![0; 5000]]),   // C22
    ];
    for (code, payloads) in cases {
        let answers: Vec<_> = payloads
            .iter()
            .map(|payload| refused(code, payload))
            .collect();
        assert!(answers.iter().all(|answer| *answer == answers[0]), "{code}");
    }
}

#[test]
fn c23_export_name_before_tls_is_answered_by_the_end() {
    let bench = Bench::new(MIB);
    let server = bench.serve_file(&[]);
    for export in [EXPORT, "missing"] {
        let mut wire = Plain::connect(server.address);
        wire.option(OptionCode::EXPORT_NAME, export.as_bytes());
        wire.hears_the_end();
    }
}

#[test]
fn c25_options_behind_starttls_are_never_heard_however_they_arrive() {
    let bench = Bench::new(MIB);
    let server = bench.serve_file(&[]);
    let ack = reply(OptionCode::STARTTLS, ReplyCode::ACK, &[]);
    let mut sent = 3_u32.to_be_bytes().to_vec();
    sent.extend(OptionHeader::encode(OptionCode::STARTTLS, &[]));
    let honest = sent.len();
    sent.extend(OptionHeader::encode(OptionCode::STRUCTURED_REPLY, &[]));
    sent.extend(OptionHeader::encode(OptionCode::LIST, &[]));
    for split in 1..=sent.len() {
        let mut wire = Plain::silent(server.address).unwrap();
        wire.say(&sent[..split]);
        if split < sent.len() {
            // The server sees the parts apart, or does not: both must be safe.
            std::thread::sleep(Duration::from_millis(3));
            let _ = wire.try_say(&sent[split..]);
        }
        let mut heard = Vec::new();
        match wire.stream.read_to_end(&mut heard) {
            Ok(_) => {}
            Err(error) => assert!(is_end(&error), "{error}"),
        }
        // The answer to STARTTLS, if that came alone; then a TLS alert, if anything; never an option's reply.
        if split < honest {
            assert!(heard.is_empty(), "split {split}: {heard:?}");
        }
        let rest = heard.strip_prefix(&ack[..]).unwrap_or(&heard);
        let is_alert = rest.len() == 7 && rest[0] == 21;
        assert!(rest.is_empty() || is_alert, "split {split}: {heard:?}");
    }
    Tls::simple(server.address, &bench.client(), EXPORT);
}

#[test]
fn c26_a_client_hello_before_the_answer_is_never_taken_for_an_option() {
    let bench = Bench::new(MIB);
    let server = bench.serve_file(&[]);
    let mut wire = Plain::silent(server.address).unwrap();
    let mut sent = 3_u32.to_be_bytes().to_vec();
    sent.extend(OptionHeader::encode(OptionCode::STARTTLS, &[]));
    let name = "localhost".try_into().unwrap();
    let mut client = rustls::ClientConnection::new(bench.client(), name).unwrap();
    client.write_tls(&mut sent).unwrap();
    wire.say(&sent);
    wire.hears_the_end();
    server.logged("bytes behind STARTTLS");
}

/// Whether a client gets as far as a session.
fn is_let_in(bench: &Bench, client: &Arc<ClientConfig>, address: std::net::SocketAddr) -> bool {
    let _ = bench;
    let Ok(mut wire) = Plain::connect(address).starttls(client) else {
        return false;
    };
    // TLS 1.3: the client is done before the server has looked at its certificate.
    if wire
        .try_say(&OptionHeader::encode(
            OptionCode::GO,
            &go_payload(EXPORT, &[]),
        ))
        .is_err()
    {
        return false;
    }
    let mut all = Vec::new();
    let mut byte = [0];
    match wire.stream.read(&mut byte) {
        Ok(1) => true,
        Ok(_) => false,
        Err(_) => {
            let _ = wire.stream.read_to_end(&mut all);
            assert!(all.is_empty());
            false
        }
    }
}

#[test]
fn c27_only_this_volumes_clients_get_through_the_handshake() {
    let bench = Bench::new(MIB);
    let server = bench.serve_file(&[]);
    let now = OffsetDateTime::now_utc();
    let hour = time::Duration::hours(1);
    assert!(is_let_in(&bench, &bench.client(), server.address));

    let secret = bench.authority.issue_client(&bench.volume).unwrap();
    let secret = Secret::from_map("the test", &secret, Side::Client).unwrap();
    let anonymous = tls::anonymous_client_config(&secret).unwrap();
    assert!(!is_let_in(&bench, &anonymous, server.address));
    server.logged("certificate");

    // A certificate of another authority that says the same.
    let other = Authority::temporary().unwrap();
    let foreign = other.issue_client(&bench.volume).unwrap();
    let foreign = Secret::from_map("the test", &foreign, Side::Client).unwrap();
    let foreign = tls::client_config(&foreign.trusting(&secret), tls::Profile::Probe).unwrap();
    assert!(!is_let_in(&bench, &foreign, server.address));

    let cases: [(&str, Arc<ClientConfig>); 4] = [
        (
            "expired",
            bench.client_with(|leaf| {
                leaf.not_before = now - 2 * hour;
                leaf.not_after = now - hour;
            }),
        ),
        (
            "not yet valid",
            bench.client_with(|leaf| leaf.not_before = now + hour),
        ),
        (
            "another identity",
            bench.client_with(|leaf| leaf.names = vec!["vol-x.client.hawser.dev".to_owned()]),
        ),
        (
            "a server of this volume",
            bench.client_with(|leaf| leaf.names = vec![tls::server_identity(&bench.volume)]),
        ),
    ];
    for (what, client) in cases {
        assert!(!is_let_in(&bench, &client, server.address), "{what}");
    }
    assert!(is_let_in(&bench, &bench.client(), server.address));
}

#[test]
fn c27_a_refused_client_is_told_why_though_it_did_not_wait() {
    let bench = Bench::new(MIB);
    let server = bench.serve_file(&[]);
    let secret = bench.authority.issue_client(&bench.volume).unwrap();
    let secret = Secret::from_map("the test", &secret, Side::Client).unwrap();
    let anonymous = tls::anonymous_client_config(&secret).unwrap();
    let expired = bench.client_with(|leaf| {
        leaf.not_before = OffsetDateTime::now_utc() - time::Duration::hours(2);
        leaf.not_after = OffsetDateTime::now_utc() - time::Duration::hours(1);
    });
    for (client, alert) in [
        (anonymous, AlertDescription::CertificateRequired),
        (expired, AlertDescription::CertificateExpired),
    ] {
        let mut wire = Plain::connect(server.address).starttls(&client).unwrap();
        for _ in 0..20 {
            let _ = wire.try_say(&OptionHeader::encode(OptionCode::LIST, &[]));
        }
        let error = wire.hear(1).unwrap_err();
        let told = error.get_ref().and_then(|error| error.downcast_ref());
        assert_eq!(told, Some(&rustls::Error::AlertReceived(alert)), "{error}");
    }
}

#[test]
fn c27_a_certificate_for_servers_is_none_for_clients() {
    let bench = Bench::new(MIB);
    let server = bench.serve_file(&[]);
    let name = tls::client_identity(&bench.volume);
    let secret = bench
        .authority
        .issue(&Leaf::new(Side::Server, vec![name]))
        .unwrap();
    let client = unchecked_config(&secret, rustls::DEFAULT_VERSIONS);
    assert!(!is_let_in(&bench, &client, server.address));
}

#[test]
fn c27_plaintext_after_the_answer_to_starttls_is_not_answered_in_plaintext() {
    let bench = Bench::new(MIB);
    let server = bench.serve_file(&[]);
    let mut wire = Plain::connect(server.address);
    assert_eq!(wire.ask(OptionCode::STARTTLS, &[]).0, ReplyCode::ACK);
    wire.option(OptionCode::LIST, &[]);
    let mut heard = Vec::new();
    let _ = wire.stream.read_to_end(&mut heard);
    assert!(heard.is_empty() || heard[0] == 21, "an alert: {heard:?}");
}

/// A client that speaks one version of TLS.
fn client_of(
    bench: &Bench,
    version: &'static rustls::SupportedProtocolVersion,
) -> Arc<ClientConfig> {
    let secret = bench.authority.issue_client(&bench.volume).unwrap();
    unchecked_config(&secret, &[version])
}

#[test]
fn c28_tls_1_3_is_required_unless_1_2_is_allowed_and_nothing_older_ever_is() {
    let bench = Bench::new(MIB);
    let strict = bench.serve_file(&[]);
    let old = client_of(&bench, &rustls::version::TLS12);
    assert!(!is_let_in(&bench, &old, strict.address));
    drop(strict);
    let lenient = bench.serve_file(&["--tls12"]);
    let mut wire = Tls::simple(lenient.address, &old, EXPORT);
    assert_eq!(wire.write(NONE, 0, b"x"), Errno::OK);
    let version = wire.stream.conn.protocol_version();
    assert_eq!(version, Some(rustls::ProtocolVersion::TLSv1_2));
    assert!(is_let_in(&bench, &bench.client(), lenient.address));

    // A ClientHello of TLS 1.1, with a cipher of that time.
    let body = [&[3, 2][..], &[7; 32], &[0, 0, 2, 0x00, 0x2f, 1, 0]].concat();
    let length = u8::try_from(body.len()).unwrap();
    let hello = [&[22, 3, 1, 0, length + 4, 1, 0, 0, length][..], &body].concat();
    let mut wire = Plain::connect(lenient.address);
    assert_eq!(wire.ask(OptionCode::STARTTLS, &[]).0, ReplyCode::ACK);
    wire.say(&hello);
    let mut heard = Vec::new();
    let _ = wire.stream.read_to_end(&mut heard);
    assert!(heard.len() == 7 && heard[0] == 21, "an alert: {heard:?}");
}

#[test]
fn c29_no_session_is_resumed_and_nothing_is_said_early() {
    let bench = Bench::new(MIB);
    let server = bench.serve_file(&[]);
    let mut config = (*bench.client()).clone();
    config.resumption = Resumption::in_memory_sessions(8);
    config.enable_early_data = true;
    let config = Arc::new(config);
    for _ in 0..2 {
        let mut wire = Tls::simple(server.address, &config, EXPORT);
        assert_eq!(wire.read(0, 1), Ok(vec![0]));
        let connection = &wire.stream.conn;
        assert_eq!(connection.handshake_kind(), Some(HandshakeKind::Full));
        assert_eq!(connection.tls13_tickets_received(), 0, "K3");
        assert!(!connection.is_early_data_accepted());
    }
}

#[test]
fn c30_c31_inside_tls_starttls_is_invalid_and_nothing_requires_tls() {
    let bench = Bench::new(MIB);
    let server = bench.serve_file(&[]);
    let mut wire = Tls::connect(server.address, &bench.client());
    assert_eq!(
        wire.ask(OptionCode::STARTTLS, &[]).0,
        ReplyCode::ERR_INVALID
    );
    for code in (2..=12).chain([0x7fff_ffff]).map(OptionCode) {
        if matches!(code, OptionCode::ABORT | OptionCode::LIST) {
            continue;
        }
        let (answer, _) = wire.ask(code, &[0xff; 3]);
        assert!(
            answer.is_error() && answer != ReplyCode::ERR_TLS_REQD,
            "{code}"
        );
    }
    wire.go(EXPORT).unwrap();
}

#[test]
fn c32_what_was_said_in_plaintext_is_forgotten() {
    let bench = Bench::new(MIB);
    let server = bench.serve_file(&[]);
    let mut plain = Plain::connect(server.address);
    assert!(plain.ask(OptionCode::STRUCTURED_REPLY, &[]).0.is_error());
    let meta = meta_payload(EXPORT, &["base:allocation"]);
    assert!(plain.ask(OptionCode::SET_META_CONTEXT, &meta).0.is_error());
    let mut wire = plain.starttls(&bench.client()).unwrap();
    let flags = wire.go(EXPORT).unwrap().export().1;
    assert!(!flags.contains(TransmissionFlags::SEND_DF));
    assert_eq!(wire.read(0, 3), Ok(vec![0; 3]), "a simple reply");
    let status = wire.carry_out(Command::BLOCK_STATUS, NONE, 0, 4096);
    assert_eq!(status, Errno::EINVAL);
}

#[test]
fn c33_c34_c36_an_unknown_export_is_unknown_to_every_option() {
    let bench = Bench::new(MIB);
    let server = bench.serve_file(&[]);
    let mut wire = Tls::connect(server.address, &bench.client());
    wire.ask(OptionCode::STRUCTURED_REPLY, &[]);
    for code in [OptionCode::INFO, OptionCode::GO] {
        let refused = wire.go_or_info(code, "other", &[]);
        assert_eq!(refused, Err(ReplyCode::ERR_UNKNOWN));
    }
    for code in [OptionCode::LIST_META_CONTEXT, OptionCode::SET_META_CONTEXT] {
        let refused = wire.meta_context(code, "other", &["base:allocation"]);
        assert_eq!(refused, Err(ReplyCode::ERR_UNKNOWN));
    }
    wire.option(OptionCode::LIST, &[]);
    let listed = wire.replies(OptionCode::LIST).unwrap();
    assert_eq!(parse_server(&listed[0]).unwrap(), EXPORT);
    assert_eq!(listed.len(), 1);
    wire.option(OptionCode::EXPORT_NAME, b"other");
    wire.hears_the_end();
}

#[test]
fn c35_c37_c38_c39_c44_go_says_what_info_said() {
    let bench = Bench::new(MIB + 1);
    let server = bench.serve_file(&[]);
    let asked = [
        InfoType::BLOCK_SIZE,
        InfoType::NAME,
        InfoType(77),
        InfoType::DESCRIPTION,
    ];
    for structured in [false, true] {
        let mut wire = Tls::connect(server.address, &bench.client());
        if structured {
            wire.ask(OptionCode::STRUCTURED_REPLY, &[]);
        }
        let bare = wire.go_or_info(OptionCode::INFO, EXPORT, &[]).unwrap();
        assert_eq!(bare.information.len(), 1, "block sizes are not required");
        let info = wire.go_or_info(OptionCode::INFO, EXPORT, &asked).unwrap();
        let go = wire.go_or_info(OptionCode::GO, EXPORT, &asked).unwrap();
        assert_eq!(info, go);
        let (size, flags) = go.export();
        assert_eq!(size, MIB + 1, "any size is served as it is");
        let has = |flag| flags.contains(flag);
        assert!(has(TransmissionFlags::HAS_FLAGS));
        assert!(has(TransmissionFlags::SEND_FAST_ZERO));
        assert!(has(TransmissionFlags::SEND_WRITE_ZEROES));
        assert!(has(TransmissionFlags::CAN_MULTI_CONN));
        assert_eq!(has(TransmissionFlags::SEND_DF), structured);
        let sizes = BlockSizes {
            minimum: 1,
            preferred: 4096,
            maximum_payload: 32 << 20,
        };
        assert!(go.information.contains(&Information::BlockSize(sizes)));
        assert!(go.information.contains(&Information::Name(EXPORT.into())));
        // Nothing behind the final reply: the next byte answers a request.
        assert_eq!(wire.ask_read_magic(structured), structured);
    }
}

impl Tls {
    /// READs a byte; whether the answer is a structured one.
    fn ask_read_magic(&mut self, structured: bool) -> bool {
        if structured {
            self.read_chunks(NONE, 0, 1).is_ok()
        } else {
            self.read(0, 1).is_err()
        }
    }
}

#[test]
fn c36_export_name_answers_with_or_without_padding() {
    let bench = Bench::new(MIB);
    let server = bench.serve_file(&[]);
    for (flags, padding) in [(1_u32, 124), (3, 0)] {
        let mut plain = Plain::silent(server.address).unwrap();
        plain.say(&flags.to_be_bytes());
        let mut wire = plain.starttls(&bench.client()).unwrap();
        wire.option(OptionCode::EXPORT_NAME, EXPORT.as_bytes());
        let reply = wire.hear(10 + padding).unwrap();
        assert_eq!(reply[..8], MIB.to_be_bytes());
        assert!(reply[10..].iter().all(|byte| *byte == 0));
        assert_eq!(wire.read(0, 2), Ok(vec![0; 2]));
    }
}

#[test]
fn c40_structured_replies_are_negotiated_once() {
    let bench = Bench::new(MIB);
    let server = bench.serve_file(&[]);
    let mut wire = Tls::connect(server.address, &bench.client());
    let codes = [ReplyCode::ACK, ReplyCode::ERR_INVALID];
    for code in codes {
        assert_eq!(wire.ask(OptionCode::STRUCTURED_REPLY, &[]).0, code);
    }
    wire.go(EXPORT).unwrap();
    assert!(wire.read_chunks(NONE, 0, 1).is_ok());
}

#[test]
fn c41_c42_only_the_last_selection_counts_and_only_for_its_export() {
    let bench = Bench::new(MIB);
    let server = bench.serve_file(&[]);
    let base = ["base:allocation"];
    let start = || {
        let mut wire = Tls::connect(server.address, &bench.client());
        let early = wire.set_meta_context(EXPORT, &base);
        assert_eq!(early, Err(ReplyCode::ERR_INVALID), "C41");
        wire.ask(OptionCode::STRUCTURED_REPLY, &[]);
        wire
    };
    let status = |mut wire: Tls| {
        wire.go(EXPORT).unwrap();
        wire.block_status(NONE, 0, 4096).map(|(id, _)| id)
    };
    assert_eq!(status(start()), Err(Errno::EINVAL), "none was selected");
    let mut wire = start();
    let id = wire.set_meta_context(EXPORT, &base).unwrap()[0].id;
    assert_eq!(status(wire), Ok(id));
    let mut wire = start();
    wire.set_meta_context(EXPORT, &base).unwrap();
    assert!(wire.set_meta_context("other", &base).is_err());
    assert_eq!(status(wire), Err(Errno::EINVAL), "a SET that failed");
    let mut wire = start();
    wire.set_meta_context(EXPORT, &base).unwrap();
    assert_eq!(wire.set_meta_context(EXPORT, &[]), Ok(Vec::new()));
    assert_eq!(status(wire), Err(Errno::EINVAL), "a SET of nothing");
    let mut wire = start();
    wire.set_meta_context(EXPORT, &base).unwrap();
    assert_eq!(wire.set_meta_context(EXPORT, &["x:y"]), Ok(Vec::new()));
    assert_eq!(status(wire), Err(Errno::EINVAL), "a SET of unknown ones");
}

#[test]
fn c43_queries_select_by_their_rules() {
    let bench = Bench::new(MIB);
    let server = bench.serve_file(&[]);
    let mut wire = Tls::connect(server.address, &bench.client());
    wire.ask(OptionCode::STRUCTURED_REPLY, &[]);
    let mut ask = |code, queries: &[&str]| {
        wire.option(code, &meta_payload(EXPORT, queries));
        wire.replies(code).map(|replies| replies.len())
    };
    let codes = [OptionCode::LIST_META_CONTEXT, OptionCode::SET_META_CONTEXT];
    for (queries, counts) in [
        (&[][..], [1, 0]),
        (&["base:"], [1, 0]),
        (&["base:allocation"], [1, 1]),
        (&["base:allocation", "base:allocation"], [1, 1]),
        (&["base:other", "qemu:dirty-bitmap:x", "ns:"], [0, 0]),
    ] {
        for (code, count) in codes.into_iter().zip(counts) {
            assert_eq!(ask(code, queries), Ok(count), "{code} {queries:?}");
        }
    }
    let long = format!("x:{}", "y".repeat(4095));
    for code in codes {
        for query in ["base", &long] {
            assert_eq!(ask(code, &[query]), Err(ReplyCode::ERR_INVALID));
        }
    }
    let good = meta_payload(EXPORT, &["base:allocation"]);
    let mut many = good.clone();
    many[8..12].copy_from_slice(&u32::MAX.to_be_bytes());
    let cuts = (0..good.len()).map(|end| good[..end].to_vec());
    for payload in cuts.chain([many]) {
        for code in codes {
            assert_eq!(wire.ask(code, &payload).0, ReplyCode::ERR_INVALID);
        }
    }
}

#[test]
fn c27_a_stolen_certificate_of_another_volume_is_refused() {
    let bench = Bench::new(MIB);
    let server = bench.serve_volume(&[]);
    let other = hawser::volumes::VolumeId::from_bytes([9; 16]);
    let client = config(&bench.authority.issue_client(&other).unwrap());
    let Ok(mut wire) = Plain::connect(server.address).starttls(&client) else {
        return;
    };
    let _ = wire.try_say(&OptionHeader::encode(OptionCode::LIST, &[]));
    assert!(wire.hear(1).is_err());
    server.logged("reason=\"tls\"");
}

#[test]
fn c64_every_option_cut_anywhere_ends_in_nothing() {
    let bench = Bench::new(MIB);
    let server = bench.serve_file(&[]);
    let client = bench.client();
    let option = OptionHeader::encode(OptionCode::GO, &go_payload(EXPORT, &[InfoType::NAME]));
    for end in 0..option.len() {
        let mut plain = Plain::connect(server.address);
        plain.stream.write_all(&option[..end]).unwrap();
        plain.stream.shutdown(Shutdown::Write).unwrap();
        plain.hears_the_end();
        let mut tls = Tls::connect(server.address, &client);
        tls.say(&option[..end]);
        tls.stream.conn.send_close_notify();
        let _ = tls.stream.flush();
        tls.hears_the_end();
    }
    let wire: Wire<_> = Tls::simple(server.address, &client, EXPORT);
    wire.cut();
}
