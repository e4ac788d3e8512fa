//! C64: the client's negotiation against a server that says anything at all.
#![no_main]

use hawser::nbd::ExportName;
use hawser::nbd::client::{Answer, Handshake, Kernel, Plain, PlainStep, Probe, Secured};
use libfuzzer_sys::fuzz_target;

fn plaintext(mut bytes: &[u8]) -> Option<(Handshake, &[u8])> {
    let mut plain = Plain::new();
    while let Some((head, rest)) = bytes.split_at_checked(plain.wanted()) {
        assert!(plain.wanted() <= 4096);
        bytes = rest;
        plain = match plain.receive(head) {
            Ok(PlainStep::Continue(next) | PlainStep::Send(next, _)) => next,
            Ok(PlainStep::Upgrade(handshake)) => return Some((handshake, bytes)),
            Err(_) => return None,
        };
    }
    None
}

/// Reads one answer; returns the rest, or `None` at the end of the session.
fn answer<'a, P>(secured: &mut Secured<P>, mut bytes: &'a [u8]) -> Option<(Answer, &'a [u8])> {
    while let Some((head, rest)) = bytes.split_at_checked(secured.wanted()) {
        assert!(secured.wanted() <= 16 << 10);
        bytes = rest;
        if let Some(answer) = secured.receive(head).ok()? {
            assert!(!secured.is_waiting());
            return Some((answer, bytes));
        }
    }
    None
}

fuzz_target!(|bytes: &[u8]| {
    let Some((handshake, bytes)) = plaintext(bytes) else { return };
    let Some((&choice, bytes)) = bytes.split_first() else { return };
    let export = ExportName::default();
    if choice & 1 == 0 {
        let mut kernel = Secured::<Kernel>::new(handshake);
        kernel.go(&export);
        if let Some((Answer::Transmission(session), _)) = answer(&mut kernel, bytes) {
            assert!(!session.structured && session.contexts.is_empty(), "K1");
        }
        return;
    }
    let mut probe = Secured::<Probe>::new(handshake);
    probe.structured_reply();
    let Some((structured, bytes)) = answer(&mut probe, bytes) else { return };
    probe.set_meta_context(&export, &["base:allocation"]);
    let Some((_, bytes)) = answer(&mut probe, bytes) else { return };
    probe.list();
    let Some((_, bytes)) = answer(&mut probe, bytes) else { return };
    probe.go(&export);
    if let Some((Answer::Transmission(session), _)) = answer(&mut probe, bytes) {
        assert_eq!(session.structured, structured == Answer::Accepted);
    }
});
