//! The first words of each side.

use super::prelude::*;
use crate::verify::session::greeting;

const NEWSTYLE: &str = "Handshake phase, Newstyle negotiation";
const CLIENT_FLAGS: &str = "Client flags";

/// C1.
pub(super) const FIXED_NEWSTYLE: Check = Check {
    id: "greeting-newstyle",
    title: "The server greets with NBDMAGIC, IHAVEOPT and flags that have FIXED_NEWSTYLE",
    group: Group::Greeting,
    section: NEWSTYLE,
    severity: Severity::Interoperability,
    why: "Without fixed newstyle there is no TLS, and no way to ask for anything but an export.",
    rules: &[1],
    scope: Scope::Always,
    question: fixed_newstyle,
    ..Check::USUAL
};

/// C1.
pub(super) const FLAGS_KNOWN: Check = Check {
    id: "greeting-flags-known",
    title: "The server's handshake flags have no bits but FIXED_NEWSTYLE and NO_ZEROES",
    group: Group::Greeting,
    section: "Handshake flags",
    severity: Severity::Interoperability,
    why: "What other bits mean is not written anywhere: a client cannot know what it agrees to.",
    rules: &[1],
    scope: Scope::Newstyle,
    question: flags_known,
    ..Check::USUAL
};

/// C2.
pub(super) const CLIENT_FLAGS_CHECKED: Check = Check {
    id: "client-flags-checked",
    title: "A client that sets a flag which was not offered is dropped",
    group: Group::Greeting,
    section: CLIENT_FLAGS,
    severity: Severity::Interoperability,
    why: "Client and server would disagree about how the session goes on.",
    rules: &[2],
    scope: Scope::Newstyle,
    question: client_flags_checked,
    ..Check::USUAL
};

/// C3.
pub(super) const NO_TLS_UNASKED: Check = Check {
    id: "no-tls-without-fixed-newstyle",
    title: "A client that did not agree to fixed newstyle cannot start TLS",
    group: Group::Greeting,
    section: "Server-side requirements",
    severity: Severity::Interoperability,
    why: "The server forgets what the client said in the greeting, on which all that follows is built.",
    rules: &[3],
    scope: Scope::Tls,
    question: no_tls_unasked,
    ..Check::USUAL
};

fn fixed_newstyle(subject: &Subject<'_>) -> Result<String, Stop> {
    let flags = greeting(&mut subject.link()?)?;
    require(flags & 1 != 0, || {
        format!("the server's flags are {flags:#06x}, without FIXED_NEWSTYLE")
    })?;
    Ok(format!("newstyle, flags {flags:#06x}"))
}

fn flags_known(subject: &Subject<'_>) -> Result<String, Stop> {
    let flags = greeting(&mut subject.link()?)?;
    require(flags & !3 == 0, || {
        format!("the server's flags are {flags:#06x}")
    })?;
    Ok(format!("flags {flags:#06x}"))
}

/// Sends flags and an option, and returns what it is answered with; `None` if the connection ends.
fn with_flags(
    subject: &Subject<'_>,
    flags: impl Fn(u16) -> u32,
    option: OptionCode,
) -> Result<Option<ReplyCode>, Stop> {
    let mut link = subject.link()?;
    let offered = greeting(&mut link)?;
    let mut bytes = flags(offered).to_be_bytes().to_vec();
    bytes.extend(OptionHeader::encode(option, &[]));
    link.write_all(&bytes)
        .map_err(Failure::at(Step::Greeting))?;
    match Session::at_options(link).reply(option) {
        Ok(reply) => Ok(Some(reply.code)),
        Err(failure) if failure.is_end() => Ok(None),
        Err(failure) => Err(failure.into()),
    }
}

fn client_flags_checked(subject: &Subject<'_>) -> Result<String, Stop> {
    let answer = with_flags(
        subject,
        |offered| u32::from(offered & 3) | 1 << 31,
        OptionCode::LIST,
    )?;
    match answer {
        None => Ok("the connection ended".into()),
        Some(code) => Err(Stop::Finding(format!(
            "a client with the unknown flag 0x80000000 went on, LIST was answered with {code}"
        ))),
    }
}

fn no_tls_unasked(subject: &Subject<'_>) -> Result<String, Stop> {
    let answer = with_flags(
        subject,
        |offered| u32::from(offered & 2),
        OptionCode::STARTTLS,
    )?;
    match answer {
        None => Ok("the connection ended".into()),
        Some(ReplyCode::ACK) => Err(Stop::Finding(
            "STARTTLS was accepted from a client without C_FIXED_NEWSTYLE".into(),
        )),
        Some(code) => Ok(format!("STARTTLS got {code}")),
    }
}
