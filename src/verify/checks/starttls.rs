//! The boundary between plaintext and TLS, whatever way the bytes arrive.

use std::thread::sleep;
use std::time::Duration;

use rustls::Error;

use super::plaintext::nothing_survived;
use super::prelude::*;
use crate::nbd::client::Fault;

const STARTTLS: &str = "Option types, NBD_OPT_STARTTLS";
const FORCED: &str = "FORCEDTLS mode";

/// Between two pieces of an option: a reader that takes what there is has taken the first by then.
const PAUSE: Duration = Duration::from_millis(10);

/// How long an answer that should not come is waited for.
const QUIET: Duration = Duration::from_millis(300);

/// C24.
pub(super) const ACCEPTED: Check = Check {
    id: "starttls-accepted",
    title: "STARTTLS gets an empty ACK, and a TLS handshake after it works",
    group: Group::Starttls,
    section: FORCED,
    severity: Severity::Security,
    why: "A server that says it has TLS and has none leaves its clients without it.",
    rules: &[24],
    scope: Scope::Tls,
    question: accepted,
    ..Check::USUAL
};

/// C11.
pub(super) const PAYLOAD_REFUSED: Check = Check {
    id: "starttls-payload-refused",
    title: "STARTTLS with a payload is refused",
    group: Group::Starttls,
    section: STARTTLS,
    severity: Severity::Interoperability,
    why: "What comes with STARTTLS in plaintext could be taken for a part of the session inside TLS.",
    rules: &[11],
    scope: Scope::Tls,
    question: payload_refused,
    ..Check::USUAL
};

/// C24.
pub(super) const IN_PIECES: Check = Check {
    id: "starttls-in-pieces",
    title: "STARTTLS that arrives in two pieces is one STARTTLS, wherever it is cut",
    group: Group::Starttls,
    section: STARTTLS,
    severity: Severity::Interoperability,
    why: "TCP may deliver in any pieces: sessions fail now and then, on busy networks.",
    rules: &[24, 64],
    scope: Scope::Tls,
    question: in_pieces,
    ..Check::USUAL
};

/// C25.
pub(super) const SPLIT_INJECTION_DEAD: Check = Check {
    id: "starttls-split-injection-dead",
    title: "An option injected behind STARTTLS has no effect inside TLS, wherever the bytes are cut into packets",
    group: Group::Starttls,
    section: STARTTLS,
    severity: Severity::Security,
    why: "Somebody on the network could put options into the client's encrypted session: it would read wrong data.",
    rules: &[25],
    scope: Scope::Secured,
    question: split_injection_dead,
    ..Check::USUAL
};

/// C26.
pub(super) const EARLY_HELLO: Check = Check {
    id: "early-client-hello-survived",
    title: "A ClientHello sent along with STARTTLS begins TLS, or ends the connection; it is never taken for an option",
    group: Group::Starttls,
    section: FORCED,
    severity: Severity::Interoperability,
    why: "The server mixes what is plaintext with what is TLS.",
    rules: &[26],
    scope: Scope::Secured,
    question: early_hello,
    ..Check::USUAL
};

/// C27.
pub(super) const PLAINTEXT_DEAD: Check = Check {
    id: "plaintext-after-starttls-dead",
    title: "Plaintext after STARTTLS was accepted ends the connection, and is not answered in plaintext",
    group: Group::Starttls,
    section: FORCED,
    severity: Severity::Security,
    why: "TLS could be skipped: data would travel in plaintext on a session that both sides take for encrypted.",
    rules: &[25, 27],
    scope: Scope::Tls,
    question: plaintext_dead,
    ..Check::USUAL
};

fn accepted(subject: &Subject<'_>) -> Result<String, Stop> {
    let mut session = subject.plaintext()?;
    session.send(OptionCode::STARTTLS, &[]).map_err(broke)?;
    session.accepted(OptionCode::STARTTLS).map_err(broke)?;
    let Ok((identity, name)) = subject.credentials() else {
        return Ok("an empty ACK; TLS was not tried without certificates".into());
    };
    match session.handshake(identity.any.clone(), name) {
        Ok(session) => {
            session.abort();
            Ok("an empty ACK, and TLS began".into())
        }
        // Who does not like whose certificate is another question.
        Err(failure)
            if matches!(
                *failure.reason,
                Reason::Tls(Error::InvalidCertificate(_) | Error::AlertReceived(_))
            ) =>
        {
            Ok("an empty ACK, and TLS began".into())
        }
        Err(failure) => Err(broke(failure)),
    }
}

fn payload_refused(subject: &Subject<'_>) -> Result<String, Stop> {
    let mut session = subject.plaintext()?;
    session
        .send(OptionCode::STARTTLS, b"surplus")
        .map_err(broke)?;
    match session.accepted(OptionCode::STARTTLS) {
        Ok(()) => Err(Stop::Finding("STARTTLS with a payload was accepted".into())),
        Err(failure) if failure.is_end() => Ok("the connection ended".into()),
        Err(failure) => match *failure.reason {
            Reason::Fault(Fault::TlsRefused { code, .. }) => Ok(code.to_string()),
            _ => Err(broke(failure)),
        },
    }
}

fn in_pieces(subject: &Subject<'_>) -> Result<String, Stop> {
    let option = OptionHeader::encode(OptionCode::STARTTLS, &[]);
    for cut in 1..option.len() {
        let mut session = subject.plaintext()?;
        let sent = session
            .send_raw(OptionCode::STARTTLS, &option[..cut])
            .and_then(|()| {
                sleep(PAUSE);
                session.send_raw(OptionCode::STARTTLS, &option[cut..])
            })
            .and_then(|()| session.accepted(OptionCode::STARTTLS));
        sent.map_err(|failure| {
            Stop::Finding(format!("STARTTLS cut after {cut} bytes: {failure}"))
        })?;
    }
    Ok("it was accepted, cut at every byte".into())
}

fn split_injection_dead(subject: &Subject<'_>) -> Result<String, Stop> {
    let mut bytes = OptionHeader::encode(OptionCode::STARTTLS, &[]);
    bytes.extend(OptionHeader::encode(OptionCode::STRUCTURED_REPLY, &[]));
    let mut ended = 0;
    for cut in 1..bytes.len() {
        match injected(subject, &bytes, cut) {
            Ok(true) => {}
            Ok(false) => ended += 1,
            Err(Stop::Finding(evidence)) => {
                return Err(Stop::Finding(format!("cut after {cut} bytes: {evidence}")));
            }
            Err(stop) => return Err(stop),
        }
    }
    let all = bytes.len() - 1;
    Ok(format!(
        "cut at every byte: {ended} of {all} connections ended, and nothing was carried into the others"
    ))
}

/// Whether there was a session, in which nothing survived.
fn injected(subject: &Subject<'_>, bytes: &[u8], cut: usize) -> Result<bool, Stop> {
    let (identity, name) = subject.credentials()?;
    let mut session = subject.plaintext()?;
    let result = session
        .send_raw(OptionCode::STARTTLS, &bytes[..cut])
        .and_then(|()| {
            sleep(PAUSE);
            session.send_raw(OptionCode::STARTTLS, &bytes[cut..])
        })
        .and_then(|()| session.accepted(OptionCode::STARTTLS))
        .and_then(|()| session.handshake(identity.any.clone(), name));
    let session = match result {
        Ok(session) => session,
        Err(failure) => {
            return match *failure.reason {
                Reason::Tls(Error::InvalidMessage(_)) => Err(broke(failure)),
                Reason::Fault(Fault::TlsRefused { .. }) | Reason::Tls(_) => Ok(false),
                _ if failure.is_end() => Ok(false),
                _ => Err(broke(failure)),
            };
        }
    };
    match nothing_survived(subject, session) {
        Ok(()) => Ok(true),
        Err(Stop::Session(failure)) if !failure.is_violation() => Ok(false),
        Err(stop) => Err(super::plaintext::unless_always(subject, stop)),
    }
}

fn early_hello(subject: &Subject<'_>) -> Result<String, Stop> {
    let (identity, name) = subject.credentials()?;
    let mut session = subject.plaintext()?;
    let (tls, hello) = crate::verify::link::hello(identity.any.clone(), name)
        .map_err(|reason| Stop::NotRun(format!("no ClientHello could be made: {reason}")))?;
    let mut bytes = OptionHeader::encode(OptionCode::STARTTLS, &[]);
    bytes.extend(hello);
    session
        .send_raw(OptionCode::STARTTLS, &bytes)
        .map_err(broke)?;
    let mut link = match session.accepted(OptionCode::STARTTLS) {
        Ok(()) => session.into_link(),
        Err(failure) if failure.is_end() => return Ok("the connection ended".into()),
        Err(failure) => return Err(broke(failure)),
    };
    match link.resume_tls(tls) {
        Ok(()) => {
            let mut session = Session::at_options(link);
            subject.info(&mut session)?;
            session.abort();
            Ok("TLS began".into())
        }
        Err(Reason::Tls(Error::AlertReceived(_)) | Reason::Closed | Reason::Io(_)) => {
            Ok("the connection ended".into())
        }
        Err(reason) => Err(broke(Failure::new(Step::Handshake, reason))),
    }
}

fn plaintext_dead(subject: &Subject<'_>) -> Result<String, Stop> {
    let mut session = subject.plaintext()?;
    session.send(OptionCode::STARTTLS, &[]).map_err(broke)?;
    session.accepted(OptionCode::STARTTLS).map_err(broke)?;
    session.send(OptionCode::LIST, &[]).map_err(broke)?;
    let quiet = !session
        .link()
        .stirs(QUIET)
        .map_err(Failure::at(Step::Handshake))?;
    if quiet {
        return Ok("no answer".into());
    }
    let mut first = [0; 8];
    let count = session.link().pop(&mut first).unwrap_or(0);
    // Type 21: the last word of TLS before the connection ends.
    require(count == 0 || first[0] == 21, || {
        format!(
            "LIST in the place of TLS was answered: {:02x?}…",
            &first[..count]
        )
    })?;
    Ok("the connection ended".into())
}
