//! Options, whole and broken, on the session where the export is to be had.

use super::prelude::*;
use crate::nbd::codec::wire_length;
use crate::nbd::{MAX_STRING, magic};
use crate::verify::session::{Answer, go};

const HAGGLING: &str = "Handshake phase, Fixed newstyle negotiation";
const GO: &str = "Option types, NBD_OPT_INFO and NBD_OPT_GO";
const STRINGS: &str = "Conventions, strings";

/// C5.
pub(super) const MAGIC_CHECKED: Check = Check {
    id: "option-magic-checked",
    title: "An option that does not begin with IHAVEOPT is not carried out",
    group: Group::Options,
    section: HAGGLING,
    severity: Severity::Interoperability,
    why: "The two sides are out of step, and data would be taken for options.",
    rules: &[5],
    question: magic_checked,
    ..Check::USUAL
};

/// C6.
pub(super) const UNKNOWN_REFUSED: Check = Check {
    id: "unknown-option-refused",
    title: "An unknown option gets ERR_UNSUP, its payload is read, and the next option is understood",
    group: Group::Options,
    section: "Option reply types, NBD_REP_ERR_UNSUP",
    severity: Severity::Interoperability,
    why: "Clients that know newer options than the server cannot fall back.",
    rules: &[6],
    question: unknown_refused,
    ..Check::USUAL
};

/// C11.
pub(super) const NO_PAYLOAD: Check = Check {
    id: "option-payload-refused",
    title: "LIST and STRUCTURED_REPLY with a payload get ERR_INVALID, and the session goes on",
    group: Group::Options,
    section: "Option types, NBD_OPT_LIST and NBD_OPT_STRUCTURED_REPLY",
    severity: Severity::Style,
    why: "A client's mistake goes unnoticed.",
    rules: &[11],
    question: no_payload,
    ..Check::USUAL
};

/// C12.
pub(super) const ABORT_ACKNOWLEDGED: Check = Check {
    id: "abort-acknowledged",
    title: "ABORT gets an ACK",
    group: Group::Options,
    section: "Option types, NBD_OPT_ABORT",
    severity: Severity::Interoperability,
    why: "A client that waits for the answer takes the end of the connection for a failure.",
    rules: &[12],
    question: abort_acknowledged,
    ..Check::USUAL
};

/// C12.
pub(super) const ABORT_DATA_IGNORED: Check = Check {
    id: "abort-data-ignored",
    title: "What comes with ABORT is ignored",
    group: Group::Options,
    section: "Option types, NBD_OPT_ABORT",
    severity: Severity::Style,
    why: "The server refuses the one option that needs no agreement.",
    rules: &[12],
    question: abort_data_ignored,
    ..Check::USUAL
};

/// C9.
pub(super) const LONG_NAME_HEARD: Check = Check {
    id: "longest-name-heard",
    title: "A name of 4096 bytes is looked up, and the session goes on",
    group: Group::Options,
    section: STRINGS,
    severity: Severity::Interoperability,
    why: "The longest name that is allowed ends the session.",
    rules: &[7, 9],
    question: long_name_heard,
    ..Check::USUAL
};

/// C9.
pub(super) const TOO_LONG_REFUSED: Check = Check {
    id: "too-long-name-refused",
    title: "A name of 4097 bytes is no export",
    group: Group::Options,
    section: STRINGS,
    severity: Severity::Interoperability,
    why: "Strings beyond the limit are where servers overflowed before.",
    rules: &[9],
    question: too_long_refused,
    ..Check::USUAL
};

/// C9.
pub(super) const NUL_REFUSED: Check = Check {
    id: "name-with-nul-refused",
    title: "A name with a NUL in it is no export",
    group: Group::Options,
    section: STRINGS,
    severity: Severity::Interoperability,
    why: "A part of the name decides which export is opened, and rules that look at the whole name are got around.",
    rules: &[9],
    question: nul_refused,
    ..Check::USUAL
};

/// C10.
pub(super) const LENGTHS_CHECKED: Check = Check {
    id: "option-lengths-checked",
    title: "INFO whose parts do not fit its length is refused",
    group: Group::Options,
    section: GO,
    severity: Severity::Interoperability,
    why: "The server reads beyond what it was sent, or takes the rest for the next option.",
    rules: &[10],
    question: lengths_checked,
    ..Check::USUAL
};

/// C40.
pub(super) const STRUCTURED_TWICE: Check = Check {
    id: "structured-reply-twice-survived",
    title: "STRUCTURED_REPLY for a second time is accepted or refused, and the session goes on",
    group: Group::Options,
    section: "Option types, NBD_OPT_STRUCTURED_REPLY",
    severity: Severity::Interoperability,
    why: "A client that asks again loses its session.",
    rules: &[40],
    question: structured_twice,
    ..Check::USUAL
};

/// C31.
pub(super) const TLS_REQUIRED_NEVER: Check = Check {
    id: "tls-required-has-no-place",
    title: "ERR_TLS_REQD is never sent inside TLS, nor by a server that has none",
    group: Group::Options,
    section: "FORCEDTLS mode; NOTLS mode",
    severity: Severity::Interoperability,
    why: "The client is told to do what it has done already, or what cannot be done.",
    rules: &[31],
    question: tls_required_never,
    ..Check::USUAL
};

/// Whether the session is still good for an INFO about the export.
pub(super) fn require_alive(
    subject: &Subject<'_>,
    mut session: Session,
    after: &str,
) -> Result<(), Stop> {
    match session.info(subject.export()) {
        Ok(Ok(_)) => {
            session.abort();
            Ok(())
        }
        Ok(Err(refusal)) => Err(Stop::Finding(format!("INFO after {after}: {refusal}"))),
        Err(failure) => Err(Stop::Finding(format!("after {after}: {failure}"))),
    }
}

/// What an option that must not succeed came to; `None` where the connection ended.
pub(super) fn refusal(result: Result<Answer, Failure>) -> Result<Option<ReplyCode>, Stop> {
    match result {
        Ok(answer) => Ok(Some(answer.last.code)),
        Err(failure) if failure.is_end() => Ok(None),
        Err(failure) => Err(broke(failure)),
    }
}

fn magic_checked(subject: &Subject<'_>) -> Result<String, Stop> {
    let (mut session, _) = subject.admitted()?;
    let mut option = OptionHeader::encode(OptionCode::INFO, &go(subject.export(), &[]));
    option[..8].copy_from_slice(&(magic::IHAVEOPT ^ 1).to_be_bytes());
    session.send_raw(OptionCode::INFO, &option).map_err(broke)?;
    if !session
        .link()
        .stirs(std::time::Duration::from_secs(1))
        .unwrap_or(true)
    {
        return Ok("no answer".into());
    }
    match refusal(session.answer(OptionCode::INFO))? {
        None => Ok("the connection ended".into()),
        Some(ReplyCode::ACK) => Err(Stop::Finding(
            "INFO that begins with another magic was answered".into(),
        )),
        Some(code) => Ok(format!("it was refused with {code}")),
    }
}

fn unknown_refused(subject: &Subject<'_>) -> Result<String, Stop> {
    let (mut session, _) = subject.admitted()?;
    // The payload would pass for an option.
    let payload = OptionHeader::encode(OptionCode::ABORT, &[]);
    let answer = session
        .ask(OptionCode(0x7fff_ffff), &payload)
        .map_err(broke)?;
    let code = answer.last.code;
    require(code == ReplyCode::ERR_UNSUP, || {
        format!("an unknown option got {code}, not ERR_UNSUP")
    })?;
    require_alive(subject, session, "an unknown option")?;
    Ok("ERR_UNSUP, and INFO worked after it".into())
}

fn no_payload(subject: &Subject<'_>) -> Result<String, Stop> {
    let (mut session, _) = subject.admitted()?;
    for option in [OptionCode::LIST, OptionCode::STRUCTURED_REPLY] {
        let answer = session.ask(option, b"surplus").map_err(broke)?;
        require(answer.last.code != ReplyCode::ACK, || {
            format!("{option} with a payload was accepted")
        })?;
    }
    require_alive(subject, session, "options with a payload")?;
    Ok("both were refused".into())
}

fn abort_acknowledged(subject: &Subject<'_>) -> Result<String, Stop> {
    let (mut session, _) = subject.admitted()?;
    match refusal(session.ask(OptionCode::ABORT, &[]))? {
        Some(ReplyCode::ACK) => Ok("ACK".into()),
        Some(code) => Err(Stop::Finding(format!("ABORT got {code}"))),
        None => Err(Stop::Finding(
            "ABORT: the connection ended without an ACK".into(),
        )),
    }
}

fn abort_data_ignored(subject: &Subject<'_>) -> Result<String, Stop> {
    let (mut session, _) = subject.admitted()?;
    match refusal(session.ask(OptionCode::ABORT, b"goodbye"))? {
        Some(code) if code.is_error() => {
            Err(Stop::Finding(format!("ABORT with a payload got {code}")))
        }
        // Whether there is an ACK is another check's question.
        _ => Ok("the session ended".into()),
    }
}

fn long_name_heard(subject: &Subject<'_>) -> Result<String, Stop> {
    let (mut session, _) = subject.admitted()?;
    let payload = payload(&[b'x'; MAX_STRING], &[]);
    let answer = session.ask(OptionCode::INFO, &payload).map_err(broke)?;
    let code = answer.last.code;
    require_alive(subject, session, "a name of 4096 bytes")?;
    Ok(format!("{code}, and INFO worked after it"))
}

fn too_long_refused(subject: &Subject<'_>) -> Result<String, Stop> {
    let payload = payload(&[b'x'; MAX_STRING + 1], &[]);
    refused(subject, &payload, "a name of 4097 bytes")
}

fn nul_refused(subject: &Subject<'_>) -> Result<String, Stop> {
    let mut name = subject.export().as_str().as_bytes().to_vec();
    name.truncate(MAX_STRING - 2);
    name.extend_from_slice(b"\0x");
    refused(subject, &payload(&name, &[]), "a name with a NUL")
}

fn lengths_checked(subject: &Subject<'_>) -> Result<String, Stop> {
    let name = subject.export().as_str().as_bytes();
    let mut long = payload(name, &[]);
    long[..4].copy_from_slice(&(wire_length(name.len()) + 1000).to_be_bytes());
    refused(subject, &long, "a name that runs past the end of INFO")?;
    let mut many = payload(name, &[]);
    let end = many.len();
    many[end - 2..].copy_from_slice(&7_u16.to_be_bytes());
    refused(subject, &many, "INFO that lacks the requests it counts")?;
    let mut surplus = payload(name, &[]);
    surplus.extend_from_slice(b"surplus");
    refused(subject, &surplus, "INFO with bytes after its requests")
}

fn structured_twice(subject: &Subject<'_>) -> Result<String, Stop> {
    let (mut session, _) = subject.admitted()?;
    if let Err(refusal) = session.structured_reply().map_err(broke)? {
        return Err(Stop::Inapplicable(format!(
            "the server has no structured replies: {refusal}"
        )));
    }
    let again = session
        .ask(OptionCode::STRUCTURED_REPLY, &[])
        .map_err(broke)?;
    let code = again.last.code;
    require_alive(subject, session, "a second STRUCTURED_REPLY")?;
    Ok(format!("{code}, and INFO worked after it"))
}

fn tls_required_never(subject: &Subject<'_>) -> Result<String, Stop> {
    if subject.mode == Mode::Selective && !subject.is_secured() {
        return Err(Stop::Inapplicable(
            "the session is in plaintext, and the server has TLS".into(),
        ));
    }
    let (mut session, _) = subject.admitted()?;
    let info = go(&subject.other_export(), &[]);
    for (option, payload) in [
        (OptionCode::LIST, &[][..]),
        (OptionCode(0x7fff_fffe), &[]),
        (OptionCode::INFO, &info),
        (OptionCode::GO, &info),
    ] {
        // Whether the session survives these is the question of other checks.
        let Some(code) = refusal(session.ask(option, payload))? else {
            break;
        };
        require(code != ReplyCode::ERR_TLS_REQD, || {
            format!("{option} got ERR_TLS_REQD")
        })?;
        if option == OptionCode::GO && code == ReplyCode::ACK {
            break;
        }
    }
    Ok("it did not come".into())
}

/// The payload of INFO or GO with any bytes for a name.
fn payload(name: &[u8], requests: &[u16]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.put_u32(wire_length(name.len()));
    bytes.extend_from_slice(name);
    bytes.put_u16(u16::try_from(requests.len()).unwrap_or(0));
    for request in requests {
        bytes.put_u16(*request);
    }
    bytes
}

/// INFO with this payload must not succeed.
fn refused(subject: &Subject<'_>, payload: &[u8], what: &str) -> Result<String, Stop> {
    let (mut session, _) = subject.admitted()?;
    match refusal(session.ask(OptionCode::INFO, payload))? {
        None => Ok("the connection ended".into()),
        Some(ReplyCode::ACK) => Err(Stop::Finding(format!("{what} was accepted"))),
        Some(code) => {
            session.abort();
            Ok(code.to_string())
        }
    }
}
