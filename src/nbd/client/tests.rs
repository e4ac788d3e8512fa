//! Both state machines against each other, and the client's against servers that lie.

use proptest::prelude::*;

use super::*;
use crate::nbd::option_reply::reply;
use crate::nbd::server::{self, Exports, Limits, Step};
use crate::nbd::{BlockSizes, ExportInfo, ExportName, TransmissionFlags, magic};

struct One;

impl Exports for One {
    fn find(&self, name: &ExportName) -> Option<ExportInfo> {
        (name.as_str() == "vol/att").then(|| ExportInfo {
            size: 1 << 20,
            flags: TransmissionFlags::HAS_FLAGS.with(TransmissionFlags::SEND_FLUSH),
            block_sizes: Some(BlockSizes {
                minimum: 1,
                preferred: 4096,
                maximum_payload: 1 << 25,
            }),
            description: Some("epoch=1".into()),
        })
    }

    fn names(&self) -> Vec<ExportName> {
        vec![ExportName::try_from("vol/att").unwrap()]
    }
}

/// Runs both sides through STARTTLS.
fn upgraded() -> (server::Handshake, Handshake) {
    let (mut served, greeting) = server::Plain::new(Limits::default());
    let Ok(PlainStep::Send(mut plain, mut bytes)) = Plain::new().receive(&greeting) else {
        panic!("the greeting was refused")
    };
    loop {
        let rest = bytes.split_off(served.wanted());
        match served.receive(&bytes).unwrap() {
            server::PlainStep::Continue(next) => served = next,
            server::PlainStep::StartTls { ack, handshake } => {
                assert!(rest.is_empty());
                let PlainStep::Upgrade(ours) = plain.receive(&ack).unwrap() else {
                    panic!()
                };
                return (handshake, ours);
            }
            server::PlainStep::Reply(next, answer) => {
                served = next;
                plain = match plain.receive(&answer).unwrap() {
                    PlainStep::Continue(next) => next,
                    other => panic!("{other:?}"),
                };
            }
            server::PlainStep::Close(_) => panic!("closed"),
        }
        bytes = rest;
    }
}

/// Carries one option to the server and its answer back.
fn ask<P>(client: &mut Secured<P>, server: &mut server::Secured, mut bytes: Vec<u8>) -> Answer {
    loop {
        let rest = bytes.split_off(server.wanted());
        let mut answer = match server.receive(&bytes, &One).unwrap() {
            Step::Continue => Vec::new(),
            Step::Reply(reply) | Step::Transmit { reply, .. } | Step::Close(reply) => reply,
        };
        while !answer.is_empty() {
            let more = answer.split_off(client.wanted());
            if let Some(answer) = client.receive(&answer).unwrap() {
                assert!(more.is_empty() && rest.is_empty());
                return answer;
            }
            answer = more;
        }
        bytes = rest;
    }
}

#[test]
fn both_sides_agree_on_a_kernel_session() {
    let (theirs, ours) = upgraded();
    let mut server = server::Secured::new(theirs, Limits::default());
    let mut client = Secured::<Kernel>::new(ours);
    let unknown = ExportName::try_from("vol/other").unwrap();
    let bytes = client.go(&unknown);
    let Answer::Refused {
        code: ReplyCode::ERR_UNKNOWN,
        ..
    } = ask(&mut client, &mut server, bytes)
    else {
        panic!("C34")
    };
    let export = ExportName::try_from("vol/att").unwrap();
    let bytes = client.go(&export);
    let Answer::Transmission(session) = ask(&mut client, &mut server, bytes) else {
        panic!()
    };
    assert_eq!(session.info, One.find(&export).unwrap());
    assert!(!session.structured && session.contexts.is_empty(), "K1");
}

#[test]
fn both_sides_agree_on_a_probe_session() {
    let (theirs, ours) = upgraded();
    let mut server = server::Secured::new(theirs, Limits::default());
    let mut client = Secured::<Probe>::new(ours);
    let export = ExportName::try_from("vol/att").unwrap();
    let bytes = client.list();
    assert_eq!(
        ask(&mut client, &mut server, bytes),
        Answer::Names(vec!["vol/att".into()])
    );
    let bytes = client.structured_reply();
    assert_eq!(ask(&mut client, &mut server, bytes), Answer::Accepted);
    let bytes = client.list_meta_context(&export, &[]);
    let Answer::Contexts(listed) = ask(&mut client, &mut server, bytes) else {
        panic!()
    };
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0].id, 0);
    let bytes = client.set_meta_context(&export, &["base:allocation"]);
    let Answer::Contexts(set) = ask(&mut client, &mut server, bytes) else {
        panic!()
    };
    let bytes = client.go(&export);
    let Answer::Transmission(session) = ask(&mut client, &mut server, bytes) else {
        panic!()
    };
    assert!(session.structured);
    assert!(
        session.info.flags.contains(TransmissionFlags::SEND_DF),
        "C44"
    );
    assert_eq!(session.contexts, set);
}

fn greeting(second: u64, flags: u16) -> Vec<u8> {
    let mut bytes = magic::NBDMAGIC.to_be_bytes().to_vec();
    bytes.extend_from_slice(&second.to_be_bytes());
    bytes.extend_from_slice(&flags.to_be_bytes());
    bytes
}

#[test]
fn c4_unknown_server_flags_are_ignored_and_a_downgrade_is_refused() {
    let Ok(PlainStep::Send(_, answer)) = Plain::new().receive(&greeting(magic::IHAVEOPT, 0xffff))
    else {
        panic!()
    };
    assert_eq!(answer[..4], 3_u32.to_be_bytes(), "only the flags we know");
    let refused = |bytes: Vec<u8>| Plain::new().receive(&bytes).unwrap_err();
    assert_eq!(
        refused(greeting(magic::IHAVEOPT, 2)),
        Fault::NotFixedNewstyle
    );
    assert_eq!(refused(greeting(magic::OLDSTYLE, 0)), Fault::Oldstyle);
    assert_eq!(refused(vec![b'x'; 18]), Fault::NotNbd);
}

#[test]
fn c4_a_refused_starttls_is_never_a_session() {
    let starttls = OptionCode::STARTTLS;
    for (answer, with) in [
        (reply(starttls, ReplyCode::ERR_UNSUP, b""), "ERR_UNSUP"),
        (
            reply(starttls, ReplyCode::ERR_POLICY, b"no \x1b[31m TLS"),
            "ERR_POLICY",
        ),
        (reply(starttls, ReplyCode::ACK, b"x"), "ACK with payload"),
        (reply(starttls, ReplyCode::INFO, b""), "INFO"),
        (
            reply(OptionCode::GO, ReplyCode::ACK, b""),
            "another option's ACK",
        ),
        (vec![0; 20], "zeroes"),
    ] {
        let Ok(PlainStep::Send(plain, _)) = Plain::new().receive(&greeting(magic::IHAVEOPT, 3))
        else {
            panic!()
        };
        let (header, payload) = answer.split_at(20);
        let fault = match plain.receive(header) {
            Ok(PlainStep::Continue(plain)) => plain.receive(payload).unwrap_err(),
            Ok(other) => panic!("{with}: {other:?}"),
            Err(fault) => fault,
        };
        assert!(
            !fault.to_string().contains('\x1b'),
            "{with}: escaped for terminals"
        );
    }
}

fn secured() -> Secured<Probe> {
    Secured::new(Handshake { no_zeroes: true })
}

#[test]
fn c13_replies_that_do_not_belong_end_the_session() {
    let export = ExportName::default();
    let header = |option, code, length: u32| {
        let mut bytes = reply(option, code, &[]);
        bytes[16..20].copy_from_slice(&length.to_be_bytes());
        bytes
    };
    for bytes in [
        header(OptionCode::INFO, ReplyCode::ACK, 0),
        header(OptionCode::GO, ReplyCode::INFO, u32::MAX),
        header(OptionCode::GO, ReplyCode::ERR_INVALID, 1 << 31),
        header(OptionCode::GO, ReplyCode::META_CONTEXT, 0),
        header(OptionCode::GO, ReplyCode(5), 0),
        header(OptionCode::GO, ReplyCode::ACK, 0),
    ] {
        let mut client = secured();
        client.go(&export);
        assert!(client.receive(&bytes).is_err(), "{bytes:?}");
    }
    let mut client = secured();
    client.go(&export);
    let unknown = client
        .receive(&reply(OptionCode::GO, ReplyCode(0x8000_1234), &[]))
        .unwrap();
    assert!(matches!(
        unknown,
        Some(Answer::Refused {
            code: ReplyCode(0x8000_1234),
            ..
        })
    ));
}

#[test]
fn c13_endless_replies_end() {
    let mut client = secured();
    client.list();
    let name = reply(OptionCode::LIST, ReplyCode::SERVER, &[0, 0, 0, 1, b'x']);
    let mut rounds = 0;
    let fault = loop {
        if let Err(fault) = client.receive(&name[..20]) {
            break fault;
        }
        client.receive(&name[20..]).unwrap();
        rounds += 1;
        assert!(rounds < 100_000);
    };
    assert!(matches!(fault, Fault::TooManyReplies { .. }));
}

#[test]
fn c42_a_selection_for_another_export_is_not_ours() {
    let (theirs, ours) = upgraded();
    let mut server = server::Secured::new(theirs, Limits::default());
    let mut client = Secured::<Probe>::new(ours);
    let bytes = client.structured_reply();
    ask(&mut client, &mut server, bytes);
    let other = ExportName::try_from("vol/other").unwrap();
    let bytes = client.set_meta_context(&other, &["base:allocation"]);
    assert!(matches!(
        ask(&mut client, &mut server, bytes),
        Answer::Refused { .. }
    ));
    let bytes = client.go(&ExportName::try_from("vol/att").unwrap());
    let Answer::Transmission(session) = ask(&mut client, &mut server, bytes) else {
        panic!()
    };
    assert!(session.contexts.is_empty());
}

proptest! {
    /// A hostile server's bytes never panic the client, and it never wants more than its limit.
    #[test]
    fn any_server_is_survived(bytes in prop::collection::vec(any::<u8>(), 0..4096), valid in any::<bool>()) {
        let mut bytes = bytes;
        if valid && bytes.len() >= 20 {
            bytes[..12].copy_from_slice(&reply(OptionCode::GO, ReplyCode::ACK, &[])[..12]);
        }
        let mut client = secured();
        client.go(&ExportName::default());
        let mut rest = &bytes[..];
        while let Some((head, tail)) = rest.split_at_checked(client.wanted()) {
            prop_assert!(client.wanted() <= 16 << 10);
            if client.receive(head).is_err() || !client.is_waiting() {
                break;
            }
            rest = tail;
        }
        let mut plain = Plain::new();
        let mut rest = &bytes[..];
        while let Some((head, tail)) = rest.split_at_checked(plain.wanted()) {
            plain = match plain.receive(head) {
                Ok(PlainStep::Continue(next) | PlainStep::Send(next, _)) => next,
                Ok(PlainStep::Upgrade(_)) | Err(_) => break,
            };
            rest = tail;
        }
    }
}
