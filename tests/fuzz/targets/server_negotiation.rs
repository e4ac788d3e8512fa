//! C64: the server's negotiation. Before TLS nothing is said but refusals; after it, memory stays within limits.
#![no_main]

use hawser::nbd::option_reply::OptionReplyHeader;
use hawser::nbd::server::{Exports, Handshake, Limits, Plain, PlainStep, Secured, Step};
use hawser::nbd::{ExportInfo, ExportName, ReplyCode, TransmissionFlags};
use libfuzzer_sys::fuzz_target;

struct One;

impl Exports for One {
    fn find(&self, name: &ExportName) -> Option<ExportInfo> {
        (name.as_str() == "a").then(|| ExportInfo {
            size: 1 << 20,
            flags: TransmissionFlags::SEND_FLUSH,
            block_sizes: None,
            description: None,
        })
    }

    fn names(&self) -> Vec<ExportName> {
        ExportName::try_from("a").into_iter().collect()
    }
}

/// Feeds the plaintext phase; returns what passes STARTTLS, and what was left unread.
fn plaintext(mut bytes: &[u8]) -> Option<(Handshake, &[u8])> {
    let (mut plain, _) = Plain::new(Limits::default());
    while let Some((head, rest)) = bytes.split_at_checked(plain.wanted()) {
        assert!(plain.wanted() <= 4096);
        bytes = rest;
        plain = match plain.receive(head) {
            Ok(PlainStep::Continue(next)) => next,
            Ok(PlainStep::Reply(next, reply)) => {
                let header = OptionReplyHeader::parse(&reply[..OptionReplyHeader::LENGTH])
                    .expect("our own reply parses");
                assert!(header.code.is_error(), "nothing but refusals in plaintext");
                next
            }
            Ok(PlainStep::StartTls { handshake, .. }) => return Some((handshake, bytes)),
            Ok(PlainStep::Close(_)) | Err(_) => return None,
        };
    }
    None
}

fuzz_target!(|bytes: &[u8]| {
    let Some((handshake, mut bytes)) = plaintext(bytes) else { return };
    let mut secured = Secured::new(handshake, Limits::default());
    while let Some((head, rest)) = bytes.split_at_checked(secured.wanted()) {
        assert!(secured.wanted() <= 64 << 10);
        bytes = rest;
        match secured.receive(head, &One) {
            Ok(Step::Continue) => {}
            Ok(Step::Reply(reply)) => {
                let header = OptionReplyHeader::parse(&reply[..OptionReplyHeader::LENGTH])
                    .expect("our own reply parses");
                assert_ne!(header.code, ReplyCode::ERR_TLS_REQD, "C31");
            }
            Ok(Step::Transmit { session, .. }) => {
                assert_eq!(session.export.as_str(), "a");
                assert!(session.structured || session.contexts.is_empty());
                let df = session.info.flags.contains(TransmissionFlags::SEND_DF);
                assert_eq!(df, session.structured, "C44");
                return;
            }
            Ok(Step::Close(_)) | Err(_) => return,
        }
    }
});
