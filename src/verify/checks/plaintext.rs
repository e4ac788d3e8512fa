//! Before TLS, and the step into it: nothing may be learned, and nothing may be carried across.

use super::prelude::*;
use crate::nbd::client::Fault;
use crate::verify::session::{OptionReply, go, query};

const TLS_MODES: &str = "FORCEDTLS mode";
const UPGRADE: &str = "Option types, NBD_OPT_STARTTLS";

/// C15 to C22.
pub(super) const OPTIONS_REFUSED: Check = Check {
    id: "plaintext-options-refused",
    title: "Before TLS, every option gets exactly one ERR_TLS_REQD, and STARTTLS still works after them",
    group: Group::Plaintext,
    section: TLS_MODES,
    severity: Severity::Security,
    why: "Anyone who can reach the port could list and use exports without a certificate.",
    rules: &[15, 16, 17, 18, 19, 20, 21, 22],
    attach: true,
    scope: Scope::Forced,
    question: options_refused,
    ..Check::USUAL
};

/// C16, C17, C19, C20.
pub(super) const REFUSALS_ALIKE: Check = Check {
    id: "plaintext-refusals-alike",
    title: "Before TLS, refusals are the same to the byte whether the export exists or not",
    group: Group::Plaintext,
    section: TLS_MODES,
    severity: Severity::Security,
    why: "Anyone who can reach the port could find out which volumes and attachments exist.",
    rules: &[16, 17, 19, 20],
    attach: true,
    scope: Scope::Forced,
    question: refusals_alike,
    ..Check::USUAL
};

/// C23.
pub(super) const EXPORT_NAME_CLOSES: Check = Check {
    id: "plaintext-export-name-closes",
    title: "EXPORT_NAME before TLS ends the connection without a byte, whether the export exists or not",
    group: Group::Plaintext,
    section: TLS_MODES,
    severity: Severity::Security,
    why: "EXPORT_NAME has no way to say no: an answer means that the volume is open to everyone.",
    rules: &[23],
    attach: true,
    scope: Scope::Forced,
    question: export_name_closes,
    ..Check::USUAL
};

/// C25.
pub(super) const INJECTION_DEAD: Check = Check {
    id: "starttls-injection-dead",
    title: "Options injected behind STARTTLS have no effect inside TLS",
    group: Group::Starttls,
    section: UPGRADE,
    severity: Severity::Security,
    why: "Somebody on the network could put options into the client's encrypted session: it would read wrong data.",
    rules: &[25],
    attach: true,
    scope: Scope::Tls,
    question: injection_dead,
    ..Check::USUAL
};

/// C32.
pub(super) const STATE_DROPPED: Check = Check {
    id: "plaintext-state-dropped",
    title: "What was asked for before STARTTLS is forgotten after it",
    group: Group::Starttls,
    section: UPGRADE,
    severity: Severity::Security,
    why: "Somebody on the network could choose the session's reply format and contexts before the client begins.",
    rules: &[32],
    attach: true,
    scope: Scope::Secured,
    question: state_dropped,
    ..Check::USUAL
};

fn allocation(export: &ExportName) -> Vec<u8> {
    query(export, &["base:allocation"])
}

/// The options that name an export, with their payloads.
fn about(export: &ExportName) -> [(OptionCode, Vec<u8>); 4] {
    [
        (OptionCode::INFO, go(export, &[])),
        (OptionCode::GO, go(export, &[])),
        (OptionCode::LIST_META_CONTEXT, allocation(export)),
        (OptionCode::SET_META_CONTEXT, allocation(export)),
    ]
}

fn options_refused(subject: &Subject<'_>) -> Result<String, Stop> {
    let mut options = vec![
        (OptionCode::LIST, Vec::new()),
        (OptionCode::STRUCTURED_REPLY, Vec::new()),
        (OptionCode::EXTENDED_HEADERS, Vec::new()),
        (
            OptionCode(0x7fff_ffff),
            b"an option that nobody knows".to_vec(),
        ),
    ];
    options.extend(about(subject.export()));
    options.extend(about(&subject.other_export()));
    let mut session = subject.plaintext()?;
    for (option, payload) in &options {
        let reply = ask(&mut session, *option, payload)?;
        require(reply.option == *option, || {
            format!("a reply to {} came where {option} was asked", reply.option)
        })?;
        require(reply.code == ReplyCode::ERR_TLS_REQD, || {
            format!("{option} before TLS was answered with {}", reply.code)
        })?;
    }
    if subject.server.identity.is_none() {
        session.send(OptionCode::STARTTLS, &[]).map_err(broke)?;
        session.accepted(OptionCode::STARTTLS).map_err(broke)?;
        return Ok(format!("{} options were refused", options.len()));
    }
    match subject.upgrade(session, &[]) {
        Ok(probe) => {
            probe.abort();
            Ok(format!("{} options were refused", options.len()))
        }
        // TLS began, and failed for a reason of its own.
        Err(Stop::Session(failure))
            if failure.step != Step::Handshake || failure.is_violation() =>
        {
            Err(Stop::Finding(format!(
                "after {} refusals: {failure}",
                options.len()
            )))
        }
        Err(stop) => Err(stop),
    }
}

fn refusals_alike(subject: &Subject<'_>) -> Result<String, Stop> {
    let mut session = subject.plaintext()?;
    let pairs = about(subject.export())
        .into_iter()
        .zip(about(&subject.other_export()));
    for ((option, ours), (_, others)) in pairs {
        let ours = ask(&mut session, option, &ours)?;
        let others = ask(&mut session, option, &others)?;
        require(ours == others, || {
            format!(
                "{option} before TLS: {} for the export, {} for one that does not exist",
                words(&ours),
                words(&others)
            )
        })?;
    }
    Ok("existing and missing exports were refused alike".into())
}

fn export_name_closes(subject: &Subject<'_>) -> Result<String, Stop> {
    let option = OptionCode::EXPORT_NAME;
    for export in [subject.export(), &subject.other_export()] {
        let mut session = subject.plaintext()?;
        session
            .send(option, export.as_str().as_bytes())
            .map_err(broke)?;
        require(session.ends(option).map_err(broke)?, || {
            format!("EXPORT_NAME {export:?} before TLS was answered")
        })?;
    }
    Ok("the connection ended silently".into())
}

fn injection_dead(subject: &Subject<'_>) -> Result<String, Stop> {
    let export = subject.export();
    let mut injected = OptionHeader::encode(OptionCode::STRUCTURED_REPLY, &[]);
    injected.extend(OptionHeader::encode(
        OptionCode::SET_META_CONTEXT,
        &allocation(export),
    ));
    injected.extend(OptionHeader::encode(OptionCode::LIST, &[]));
    let session = subject.plaintext()?;
    let probe = match subject.upgrade(session, &injected) {
        Ok(probe) => probe,
        Err(Stop::Session(failure)) => {
            return match *failure.reason {
                // What came in the place of TLS.
                Reason::Tls(rustls::Error::InvalidMessage(_)) => Err(broke(failure)),
                Reason::Tls(_) | Reason::Closed | Reason::Io(_) => {
                    Ok("the connection ended".into())
                }
                Reason::Fault(Fault::TlsRefused { .. }) => Ok("STARTTLS was refused".into()),
                _ => Err(broke(failure)),
            };
        }
        Err(stop) => return Err(stop),
    };
    match nothing_survived(subject, probe) {
        Ok(()) => Ok("TLS began, and the injected options had no effect".into()),
        Err(Stop::Session(failure)) if !failure.is_violation() => Ok("the session ended".into()),
        Err(stop) => Err(unless_always(subject, stop)),
    }
}

fn state_dropped(subject: &Subject<'_>) -> Result<String, Stop> {
    let mut session = subject.plaintext()?;
    for (option, payload) in [
        (OptionCode::STRUCTURED_REPLY, Vec::new()),
        (OptionCode::SET_META_CONTEXT, allocation(subject.export())),
    ] {
        let mut reply = ask(&mut session, option, &payload)?;
        // A server that does not force TLS may accept it here, and names contexts before its ACK.
        while reply.code == ReplyCode::META_CONTEXT {
            reply = session.reply(option).map_err(broke)?;
        }
    }
    let probe = subject.upgrade(session, &[])?;
    nothing_survived(subject, probe).map_err(|stop| unless_always(subject, stop))?;
    Ok("simple replies, and no context".into())
}

/// On a session that negotiated nothing inside TLS, nothing may be in force.
pub(super) fn nothing_survived(subject: &Subject<'_>, mut probe: Session) -> Result<(), Stop> {
    let info = subject.info(&mut probe)?;
    let mut session = subject.go(probe)?;
    if let Some(length) = one_block(&info) {
        require_simple_read(&mut session, length)?;
        require_no_contexts(&mut session, length)?;
    }
    session.disconnect();
    Ok(())
}

/// A finding that a session without any plaintext options has too is another check's.
pub(super) fn unless_always(subject: &Subject<'_>, stop: Stop) -> Stop {
    let Stop::Finding(evidence) = stop else {
        return stop;
    };
    let control = subject.session();
    match control.and_then(|probe| nothing_survived(subject, probe)) {
        Err(Stop::Finding(same)) if same == evidence => Stop::Inapplicable(format!(
            "so it is on every session, whatever was said before TLS: {evidence}"
        )),
        _ => Stop::Finding(evidence),
    }
}

/// An option in plaintext and the first reply to it; no reply is a finding.
fn ask(session: &mut Session, option: OptionCode, payload: &[u8]) -> Result<OptionReply, Stop> {
    session.send(option, payload).map_err(broke)?;
    session.reply(option).map_err(broke)
}

fn words(reply: &OptionReply) -> String {
    let text = String::from_utf8_lossy(&reply.payload);
    let end = text.floor_char_boundary(80);
    format!("{} {:?}", reply.code, &text[..end])
}

/// Not a rule of the specification, which allows a server to have no TLS, or to have it for some exports only.
pub(super) const TLS_OFFERED: Check = Check {
    id: "export-needs-tls",
    title: "The export is not to be had without TLS",
    group: Group::Plaintext,
    section: "TLS support",
    severity: Severity::Security,
    why: "Everyone on the network can read and change what is stored there, and so can everyone who reaches the port.",
    rules: &[3, 16, 17],
    scope: Scope::Newstyle,
    question: tls_offered,
    ..Check::USUAL
};

fn tls_offered(subject: &Subject<'_>) -> Result<String, Stop> {
    if subject.mode == Mode::Forced {
        return Ok("nothing is to be had without TLS".into());
    }
    let mut session = subject.plaintext()?;
    let told = session.info(subject.export())?;
    let code = match told {
        Err(refusal) => refusal.code,
        Ok(info) => {
            session.abort();
            let bytes = info.size;
            return Err(Stop::Finding(if subject.mode == Mode::NoTls {
                format!("the server has no TLS: its {bytes} bytes are open to the network")
            } else {
                format!("the export of {bytes} bytes is to be had with TLS and without")
            }));
        }
    };
    session.abort();
    require(subject.mode != Mode::NoTls, || {
        "the server has no TLS".to_owned()
    })?;
    Ok(format!("without TLS, INFO about the export gets {code}"))
}

/// Where exports are to be had with and without TLS.
pub(super) const SELECTIVE_ANSWERS: Check = Check {
    id: "selective-options-answered",
    title: "Where TLS is at the client's option, only INFO, GO and EXPORT_NAME may ask for it",
    group: Group::Plaintext,
    section: "SELECTIVETLS mode",
    severity: Severity::Interoperability,
    why: "Clients take a server that refuses other options for one that forces TLS.",
    rules: &[15, 18, 19, 20],
    scope: Scope::Selective,
    question: selective_answers,
    ..Check::USUAL
};

fn selective_answers(subject: &Subject<'_>) -> Result<String, Stop> {
    let mut session = subject.plaintext()?;
    for (option, payload) in [
        (OptionCode::LIST, Vec::new()),
        (OptionCode(0x7fff_ffff), Vec::new()),
        (OptionCode::STRUCTURED_REPLY, Vec::new()),
        (OptionCode::LIST_META_CONTEXT, allocation(subject.export())),
        (OptionCode::SET_META_CONTEXT, allocation(subject.export())),
    ] {
        let code = session.ask(option, &payload).map_err(broke)?.last.code;
        require(code != ReplyCode::ERR_TLS_REQD, || {
            format!("{option} before TLS got ERR_TLS_REQD")
        })?;
    }
    session.abort();
    Ok("no option but INFO, GO and EXPORT_NAME asked for TLS".into())
}
