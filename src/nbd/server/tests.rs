//! The server's negotiation, driven as a client would, byte by byte where bytes matter.

use proptest::prelude::*;

use super::*;
use crate::nbd::codec::{Put, Reader};
use crate::nbd::option::{GoRequest, MetaContextQuery, OptionHeader};
use crate::nbd::option_reply::{Information, MetaContextReply, OptionReplyHeader};
use crate::nbd::{
    BlockSizes, ExportInfo, ExportName, InfoType, MetaContext, ReplyCode, TransmissionFlags, magic,
};

const FLAGS: [u8; 4] = [0, 0, 0, 3];

struct Two;

impl Exports for Two {
    fn find(&self, name: &ExportName) -> Option<ExportInfo> {
        ["a", "b"].contains(&name.as_str()).then(|| ExportInfo {
            size: 1 << 30,
            flags: TransmissionFlags::SEND_FLUSH,
            block_sizes: Some(BlockSizes {
                minimum: 1,
                preferred: 4096,
                maximum_payload: 1 << 25,
            }),
            description: Some("epoch=7".into()),
        })
    }

    fn names(&self) -> Vec<ExportName> {
        ["a", "b"].map(name).to_vec()
    }
}

fn name(text: &str) -> ExportName {
    ExportName::try_from(text).unwrap()
}

/// How a plaintext connection ended, and all that was sent on it.
#[derive(Debug, PartialEq)]
enum End {
    Waiting,
    Tls { no_zeroes: bool, unread: usize },
    Closed,
    Faulted,
}

/// Feeds a plaintext connection as a driver does: the wanted bytes, no more.
fn plaintext(mut bytes: &[u8]) -> (Vec<u8>, End) {
    let (mut plain, greeting) = Plain::new(Limits::default());
    assert_eq!(
        greeting,
        [b"NBDMAGICIHAVEOPT".as_slice(), &[0, 3]].concat(),
        "C1"
    );
    let mut sent = Vec::new();
    while let Some((head, rest)) = bytes.split_at_checked(plain.wanted()) {
        bytes = rest;
        plain = match plain.receive(head) {
            Ok(PlainStep::Continue(next)) => next,
            Ok(PlainStep::Reply(next, reply)) => {
                sent.extend(reply);
                next
            }
            Ok(PlainStep::StartTls { ack, handshake }) => {
                sent.extend(ack);
                let no_zeroes = handshake.no_zeroes;
                return (
                    sent,
                    End::Tls {
                        no_zeroes,
                        unread: bytes.len(),
                    },
                );
            }
            Ok(PlainStep::Close(reply)) => {
                sent.extend(reply);
                return (sent, End::Closed);
            }
            Err(_) => return (sent, End::Faulted),
        };
    }
    (sent, End::Waiting)
}

/// The codes of the replies in `bytes`, with the options they answer.
fn replies(mut bytes: &[u8]) -> Vec<(OptionCode, ReplyCode, Vec<u8>)> {
    let mut all = Vec::new();
    while !bytes.is_empty() {
        let (head, rest) = bytes.split_at(OptionReplyHeader::LENGTH);
        let header = OptionReplyHeader::parse(head).unwrap();
        let (payload, rest) = rest.split_at(header.length as usize);
        all.push((header.option, header.code, payload.to_vec()));
        bytes = rest;
    }
    all
}

fn codes(bytes: &[u8]) -> Vec<ReplyCode> {
    replies(bytes)
        .into_iter()
        .map(|(_, code, _)| code)
        .collect()
}

fn starttls() -> Vec<u8> {
    OptionHeader::encode(OptionCode::STARTTLS, &[])
}

#[test]
fn c2_c3_client_flags_are_checked() {
    for (flags, end) in [
        (0_u32, End::Faulted),
        (2, End::Faulted),
        (4 | 1, End::Faulted),
        (1 << 31 | 1, End::Faulted),
        (
            1,
            End::Tls {
                no_zeroes: false,
                unread: 0,
            },
        ),
        (
            3,
            End::Tls {
                no_zeroes: true,
                unread: 0,
            },
        ),
    ] {
        let bytes = [flags.to_be_bytes().to_vec(), starttls()].concat();
        assert_eq!(plaintext(&bytes).1, end, "{flags:#x}");
    }
}

#[test]
fn c5_c7_c8_broken_frames_end_the_connection_without_a_reply() {
    let mut wrong_magic = [&FLAGS[..], &starttls()].concat();
    wrong_magic[5] ^= 1;
    assert_eq!(plaintext(&wrong_magic), (vec![], End::Faulted));
    for length in [(64 << 10) + 1, 1 << 31, u32::MAX] {
        let mut long = [&FLAGS[..], &starttls()].concat();
        long[16..20].copy_from_slice(&length.to_be_bytes());
        assert_eq!(plaintext(&long), (vec![], End::Faulted), "{length}");
    }
    let many = [
        &FLAGS[..],
        &OptionHeader::encode(OptionCode::LIST, &[]).repeat(33),
    ]
    .concat();
    let (sent, end) = plaintext(&many);
    assert_eq!((codes(&sent).len(), end), (32, End::Faulted));
}

#[test]
fn c15_to_c22_before_tls_every_option_is_refused_alike_and_consumed() {
    let go = |export: &str| {
        GoRequest {
            export: name(export),
            information: vec![],
        }
        .encode()
    };
    let meta = |export: &str| {
        MetaContextQuery {
            export: name(export),
            queries: vec!["base:allocation".into()],
        }
        .encode()
    };
    let cases = [
        (OptionCode::LIST, vec![]),
        (OptionCode::INFO, go("a")),
        (OptionCode::INFO, go("missing")),
        (OptionCode::GO, go("a")),
        (OptionCode::GO, go("missing")),
        (OptionCode::STRUCTURED_REPLY, vec![]),
        (OptionCode::LIST_META_CONTEXT, meta("a")),
        (OptionCode::SET_META_CONTEXT, meta("a")),
        (OptionCode::SET_META_CONTEXT, meta("missing")),
        (OptionCode::EXTENDED_HEADERS, vec![]),
        (OptionCode(0x7fff_ffff), vec![0x49; 5000]),
    ];
    let mut texts = Vec::new();
    for (option, payload) in cases {
        let bytes = [
            &FLAGS[..],
            &OptionHeader::encode(option, &payload),
            &starttls()[..],
        ]
        .concat();
        let (sent, end) = plaintext(&bytes);
        assert_eq!(
            end,
            End::Tls {
                no_zeroes: true,
                unread: 0
            },
            "{option}: still usable"
        );
        let answers = replies(&sent);
        assert_eq!(
            answers.len(),
            2,
            "{option}: exactly one reply, then STARTTLS's"
        );
        assert_eq!(
            (answers[0].0, answers[0].1),
            (option, ReplyCode::ERR_TLS_REQD)
        );
        texts.push(answers[0].2.clone());
        assert_eq!(
            answers[1],
            (OptionCode::STARTTLS, ReplyCode::ACK, vec![]),
            "C24"
        );
    }
    assert!(
        texts.iter().all(|text| *text == texts[0]),
        "no oracle in the words either"
    );
}

#[test]
fn c11_c12_c23_abort_export_name_and_a_fat_starttls() {
    let say = |option, payload: &[u8]| {
        plaintext(&[&FLAGS[..], &OptionHeader::encode(option, payload)].concat())
    };
    let (sent, end) = say(OptionCode::ABORT, b"bye");
    assert_eq!((codes(&sent), end), (vec![ReplyCode::ACK], End::Closed));
    assert_eq!(say(OptionCode::EXPORT_NAME, b"a"), (vec![], End::Closed));
    let (sent, end) = say(OptionCode::STARTTLS, b"x");
    assert_eq!(
        (codes(&sent), end),
        (vec![ReplyCode::ERR_INVALID], End::Waiting)
    );
}

#[test]
fn c25_what_is_injected_behind_starttls_is_never_parsed() {
    let injected = [
        OptionHeader::encode(OptionCode::STRUCTURED_REPLY, &[]),
        OptionHeader::encode(OptionCode::LIST, &[]),
    ]
    .concat();
    let bytes = [&FLAGS[..], &starttls(), &injected].concat();
    let (sent, end) = plaintext(&bytes);
    assert_eq!(codes(&sent), [ReplyCode::ACK], "only STARTTLS is answered");
    assert_eq!(
        end,
        End::Tls {
            no_zeroes: true,
            unread: injected.len()
        }
    );
}

#[test]
fn c60_when_shutting_down_new_options_are_refused() {
    let (mut plain, _) = Plain::new(Limits::default());
    plain.shut_down();
    let Ok(PlainStep::Continue(plain)) = plain.receive(&FLAGS) else {
        panic!()
    };
    let Ok(PlainStep::Reply(_, reply)) = plain.receive(&starttls()) else {
        panic!()
    };
    assert_eq!(codes(&reply), [ReplyCode::ERR_SHUTDOWN]);
    let mut secured = secured();
    secured.shut_down();
    assert_eq!(
        ask(&mut secured, OptionCode::LIST, &[]).0,
        [ReplyCode::ERR_SHUTDOWN]
    );
    assert!(matches!(
        step(&mut secured, OptionCode::ABORT, &[]),
        Step::Close(_)
    ));
}

fn secured() -> Secured {
    Secured::new(Handshake { no_zeroes: true }, Limits::default())
}

fn step(secured: &mut Secured, option: OptionCode, payload: &[u8]) -> Step {
    let bytes = OptionHeader::encode(option, payload);
    let (header, payload) = bytes.split_at(OptionHeader::LENGTH);
    match secured.receive(header, &Two).unwrap() {
        Step::Continue => secured.receive(payload, &Two).unwrap(),
        done => done,
    }
}

fn ask(secured: &mut Secured, option: OptionCode, payload: &[u8]) -> (Vec<ReplyCode>, Vec<u8>) {
    match step(secured, option, payload) {
        Step::Reply(reply) => (codes(&reply), reply),
        other => panic!("{option}: {other:?}"),
    }
}

fn go(secured: &mut Secured, export: &str) -> Session {
    let payload = GoRequest {
        export: name(export),
        information: vec![],
    }
    .encode();
    match step(secured, OptionCode::GO, &payload) {
        Step::Transmit { session, .. } => session,
        other => panic!("{other:?}"),
    }
}

fn set(secured: &mut Secured, export: &str, queries: &[&str]) -> Vec<ReplyCode> {
    let queries = queries.iter().map(|query| (*query).to_owned()).collect();
    let payload = MetaContextQuery {
        export: name(export),
        queries,
    }
    .encode();
    ask(secured, OptionCode::SET_META_CONTEXT, &payload).0
}

#[test]
fn c6_c30_c31_after_tls_unknown_options_and_a_second_starttls_are_refused() {
    let mut secured = secured();
    assert_eq!(
        ask(&mut secured, OptionCode(99), &[1; 700]).0,
        [ReplyCode::ERR_UNSUP]
    );
    assert_eq!(
        ask(&mut secured, OptionCode::EXTENDED_HEADERS, &[]).0,
        [ReplyCode::ERR_UNSUP]
    );
    assert_eq!(
        ask(&mut secured, OptionCode::STARTTLS, &[]).0,
        [ReplyCode::ERR_INVALID]
    );
    assert_eq!(
        ask(&mut secured, OptionCode::LIST, &[1]).0,
        [ReplyCode::ERR_INVALID],
        "C11"
    );
    let (list, bytes) = ask(&mut secured, OptionCode::LIST, &[]);
    assert_eq!(list, [ReplyCode::SERVER, ReplyCode::SERVER, ReplyCode::ACK]);
    assert_eq!(replies(&bytes)[0].2, [0, 0, 0, 1, b'a']);
    go(&mut secured, "a");
}

#[test]
fn c7_an_option_that_is_too_long_is_refused_before_it_is_read() {
    let mut secured = secured();
    let mut header = OptionHeader::encode(OptionCode::GO, &[]);
    header[12..].copy_from_slice(&u32::MAX.to_be_bytes());
    let Ok(Step::Close(reply)) = secured.receive(&header, &Two) else {
        panic!()
    };
    assert_eq!(codes(&reply), [ReplyCode::ERR_TOO_BIG]);
}

#[test]
fn c32_nothing_of_the_plaintext_phase_reaches_a_session() {
    // All of it was refused; and Secured can be made from a Handshake only, which holds one bit.
    let mut secured = secured();
    let session = go(&mut secured, "a");
    assert!(!session.structured && session.contexts.is_empty());
    assert_eq!(size_of::<Handshake>(), 1);
}

#[test]
fn c34_c35_c37_c38_info_and_go() {
    let mut secured = secured();
    let ask_for = |export: &str, kinds: &[InfoType]| {
        GoRequest {
            export: name(export),
            information: kinds.to_vec(),
        }
        .encode()
    };
    for option in [OptionCode::INFO, OptionCode::GO] {
        let payload = ask_for("missing", &[InfoType::BLOCK_SIZE]);
        assert_eq!(
            ask(&mut secured, option, &payload).0,
            [ReplyCode::ERR_UNKNOWN]
        );
        assert_eq!(
            ask(&mut secured, option, &[0; 5]).0,
            [ReplyCode::ERR_INVALID],
            "C10"
        );
    }
    let all = [
        InfoType::BLOCK_SIZE,
        InfoType(77),
        InfoType::NAME,
        InfoType::DESCRIPTION,
    ];
    let info = ask(&mut secured, OptionCode::INFO, &ask_for("b", &all)).1;
    let Step::Transmit { reply, session } = step(&mut secured, OptionCode::GO, &ask_for("b", &all))
    else {
        panic!()
    };
    let strip = |bytes: &[u8]| -> Vec<_> {
        replies(bytes)
            .into_iter()
            .map(|(_, code, payload)| (code, payload))
            .collect()
    };
    assert_eq!(strip(&info), strip(&reply), "C37");
    let kinds: Vec<_> = strip(&reply)
        .iter()
        .filter(|(code, _)| *code == ReplyCode::INFO)
        .map(|(_, payload)| Information::parse(payload).unwrap())
        .collect();
    let flags = TransmissionFlags::HAS_FLAGS.with(TransmissionFlags::SEND_FLUSH);
    assert_eq!(
        kinds[0],
        Information::Export {
            size: 1 << 30,
            flags
        },
        "C44: no SEND_DF"
    );
    assert_eq!(kinds.len(), 4);
    assert_eq!(session.export, name("b"));
}

#[test]
fn c36_export_name_after_tls() {
    for no_zeroes in [true, false] {
        let mut secured = Secured::new(Handshake { no_zeroes }, Limits::default());
        let Step::Transmit { reply, .. } = step(&mut secured, OptionCode::EXPORT_NAME, b"a") else {
            panic!()
        };
        assert_eq!(reply.len(), if no_zeroes { 10 } else { 134 });
        assert_eq!(reply[..8], (1_u64 << 30).to_be_bytes());
        let closed = step(&mut secured, OptionCode::EXPORT_NAME, b"missing");
        assert!(matches!(closed, Step::Close(reply) if reply.is_empty()));
    }
}

#[test]
fn c40_c41_c42_meta_contexts_follow_the_last_set_only() {
    let mut secured = secured();
    assert_eq!(
        set(&mut secured, "a", &["base:allocation"]),
        [ReplyCode::ERR_INVALID],
        "C41"
    );
    assert_eq!(
        ask(&mut secured, OptionCode::STRUCTURED_REPLY, &[]).0,
        [ReplyCode::ACK]
    );
    assert_eq!(
        ask(&mut secured, OptionCode::STRUCTURED_REPLY, &[]).0,
        [ReplyCode::ERR_INVALID],
        "C40"
    );
    let chosen = [ReplyCode::META_CONTEXT, ReplyCode::ACK];
    let valid = vec![(1, MetaContext::BaseAllocation)];
    assert_eq!(set(&mut secured, "a", &["base:allocation"]), chosen);
    assert_eq!(go(&mut secured, "a").contexts, valid);
    assert!(
        go(&mut secured, "b").contexts.is_empty(),
        "chosen for another export"
    );
    assert!(
        go(&mut secured, "a")
            .info
            .flags
            .contains(TransmissionFlags::SEND_DF),
        "C44"
    );

    assert_eq!(set(&mut secured, "a", &[]), [ReplyCode::ACK]);
    assert!(
        go(&mut secured, "a").contexts.is_empty(),
        "zero queries clear"
    );
    assert_eq!(set(&mut secured, "a", &["base:allocation"]), chosen);
    assert_eq!(
        set(&mut secured, "missing", &["base:allocation"]),
        [ReplyCode::ERR_UNKNOWN]
    );
    assert!(
        go(&mut secured, "a").contexts.is_empty(),
        "a failed SET clears"
    );
    assert_eq!(set(&mut secured, "a", &["base:allocation"]), chosen);
    assert_eq!(
        ask(&mut secured, OptionCode::SET_META_CONTEXT, &[0xff]).0,
        [ReplyCode::ERR_INVALID]
    );
    assert!(
        go(&mut secured, "a").contexts.is_empty(),
        "a malformed SET clears too"
    );
}

#[test]
fn c43_queries() {
    let mut secured = secured();
    ask(&mut secured, OptionCode::STRUCTURED_REPLY, &[]);
    for (queries, found) in [
        (&["base:"][..], 0),
        (&["base:unknown"], 0),
        (&["qemu:dirty-bitmap:x"], 0),
        (&["base:allocation", "base:allocation"], 1),
    ] {
        assert_eq!(
            set(&mut secured, "a", queries).len(),
            found + 1,
            "SET {queries:?}"
        );
    }
    for (queries, found) in [
        (&[][..], 1),
        (&["base:"], 1),
        (&["base:x"], 0),
        (&["other:"], 0),
    ] {
        let queries = queries
            .iter()
            .map(|query: &&str| (*query).to_owned())
            .collect();
        let payload = MetaContextQuery {
            export: name("a"),
            queries,
        }
        .encode();
        let (codes, bytes) = ask(&mut secured, OptionCode::LIST_META_CONTEXT, &payload);
        assert_eq!(codes.len(), found + 1);
        if found == 1 {
            assert_eq!(
                MetaContextReply::parse(&replies(&bytes)[0].2).unwrap().id,
                0
            );
        }
    }
    let mut overlong = Vec::new();
    overlong.put_string("a");
    overlong.put_u32(1);
    overlong.put_u32(u32::MAX);
    for payload in [&overlong[..], &overlong[..9]] {
        assert_eq!(
            ask(&mut secured, OptionCode::SET_META_CONTEXT, payload).0,
            [ReplyCode::ERR_INVALID]
        );
    }
}

#[test]
fn c9_a_name_of_4096_bytes_is_heard_and_one_of_4097_is_not() {
    let mut secured = secured();
    for (length, code) in [
        (4096, ReplyCode::ERR_UNKNOWN),
        (4097, ReplyCode::ERR_INVALID),
    ] {
        let mut payload = Vec::new();
        payload.put_string(&"x".repeat(length));
        payload.put_u16(0);
        assert_eq!(ask(&mut secured, OptionCode::GO, &payload).0, [code]);
    }
    let nul = [&[0, 0, 0, 1, 0][..], &[0, 0]].concat();
    assert_eq!(
        ask(&mut secured, OptionCode::GO, &nul).0,
        [ReplyCode::ERR_INVALID]
    );
}

proptest! {
    /// C64: any bytes, in any order, never panic and never make the server want more than its limit.
    #[test]
    fn any_client_is_survived(noise in prop::collection::vec(any::<u8>(), 0..512),
                              options in prop::collection::vec((0_u32..13, 0_usize..64), 0..40)) {
        let mut bytes = FLAGS.to_vec();
        let mut pieces = Vec::new();
        let mut noise = noise.into_iter().cycle().chain(std::iter::repeat(0));
        for (option, length) in options {
            let payload: Vec<u8> = noise.by_ref().take(length).collect();
            pieces.push((OptionCode(option), payload));
        }
        for (option, payload) in &pieces {
            bytes.extend(OptionHeader::encode(*option, payload));
        }
        let (sent, _) = plaintext(&bytes);
        prop_assert!(codes(&sent).iter().all(|code| *code == ReplyCode::ACK
            || *code == ReplyCode::ERR_TLS_REQD || *code == ReplyCode::ERR_INVALID));

        let mut secured = secured();
        let mut rest = &bytes[4..];
        while let Some((head, tail)) = rest.split_at_checked(secured.wanted()) {
            prop_assert!(secured.wanted() <= 64 << 10);
            match secured.receive(head, &Two) {
                Ok(Step::Continue) => {}
                Ok(Step::Reply(reply)) => {
                    prop_assert!(!codes(&reply).contains(&ReplyCode::ERR_TLS_REQD), "C31");
                }
                Ok(Step::Transmit { .. } | Step::Close(_)) | Err(_) => break,
            }
            rest = tail;
        }
    }

    /// Cut anywhere, the plaintext phase waits for the rest and has sent nothing but refusals.
    #[test]
    fn every_prefix_waits(end in 0_usize..100) {
        let bytes = [&FLAGS[..], &OptionHeader::encode(OptionCode::GO, &[7; 40]), &starttls()].concat();
        let end = end.min(bytes.len() - 1);
        prop_assert_eq!(plaintext(&bytes[..end]).1, End::Waiting);
    }
}

#[test]
fn a_machine_that_is_fed_wrong_lengths_says_so() {
    let (plain, _) = Plain::new(Limits::default());
    assert!(matches!(
        plain.receive(&[0; 5]),
        Err(Fault::Misfed {
            wanted: 4,
            given: 5
        })
    ));
    assert!(matches!(
        secured().receive(&[], &Two),
        Err(Fault::Misfed { .. })
    ));
    assert_eq!(magic::IHAVEOPT, Reader::new("", b"IHAVEOPT").u64().unwrap());
}
