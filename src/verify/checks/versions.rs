//! Which versions of TLS are spoken. What is too old for our own TLS is said by hand.

use rustls::Error;

use super::prelude::*;
use crate::nbd::codec::wire_length;

const SECTION: &str = "TLS versions";

/// C28.
pub(super) const TLS13: Check = Check {
    id: "tls-1.3-spoken",
    title: "TLS 1.3 is spoken",
    group: Group::Certificates,
    section: SECTION,
    severity: Severity::Style,
    why: "Hawser's kernel sessions need it, and it hides the client's certificate from the network.",
    rules: &[28],
    scope: Scope::Secured,
    question: tls13,
    ..Check::USUAL
};

/// C28.
pub(super) const OLD_REFUSED: Check = Check {
    id: "old-tls-refused",
    title: "TLS 1.0 and 1.1 are refused",
    group: Group::Certificates,
    section: SECTION,
    severity: Severity::Style,
    why: "RFC 8996 forbids them, and the specification advises against them: a client that knows nothing newer gets \
          weak encryption. Newer clients cannot be led down to them.",
    rules: &[27, 28],
    scope: Scope::Tls,
    question: old_refused,
    ..Check::USUAL
};

fn tls13(subject: &Subject<'_>) -> Result<String, Stop> {
    let (identity, _) = subject.credentials()?;
    if let Some(refusal) = refusal(subject, identity.tls13.as_ref())? {
        return Err(Stop::Finding(format!("TLS 1.3 only: {refusal}")));
    }
    Ok(match refusal(subject, identity.tls12.as_ref())? {
        None => "TLS 1.2 and 1.3 are spoken".into(),
        Some(_) => {
            "it is spoken, and TLS 1.2 is not: stricter than the specification asks for".into()
        }
    })
}

/// Why the server does not speak the only version of this configuration; `None` where it does.
fn refusal(
    subject: &Subject<'_>,
    config: Option<&std::sync::Arc<rustls::ClientConfig>>,
) -> Result<Option<String>, Stop> {
    let config =
        config.ok_or_else(|| Stop::NotRun("the certificates were given for one version".into()))?;
    let (_, name) = subject.credentials()?;
    match subject
        .plaintext()
        .and_then(|session| session.upgrade(config.clone(), name, &[]))
    {
        Ok(session) => {
            session.abort();
            Ok(None)
        }
        Err(failure)
            if failure.step == Step::Handshake
                && (failure.is_end()
                    || matches!(*failure.reason, Reason::Tls(Error::PeerIncompatible(_)))) =>
        {
            Ok(Some(failure.reason.to_string()))
        }
        Err(failure) => Err(failure.into()),
    }
}

fn old_refused(subject: &Subject<'_>) -> Result<String, Stop> {
    let mut seen = Vec::new();
    for (minor, name) in [(1, "TLS 1.0"), (2, "TLS 1.1")] {
        let mut session = subject.plaintext()?;
        session.send(OptionCode::STARTTLS, &[])?;
        session.accepted(OptionCode::STARTTLS)?;
        let mut link = session.into_link();
        let failed = Failure::at::<Reason>(Step::Handshake);
        link.push(&hello(minor)).map_err(&failed)?;
        let mut record = [0; 6];
        let mut count = 0;
        while count < record.len() {
            match link.pop(&mut record[count..]) {
                Ok(0) => break,
                Ok(more) => count += more,
                Err(Reason::Io(_)) => break,
                Err(reason) => return Err(failed(reason).into()),
            }
        }
        // A handshake record with a ServerHello.
        require(count < 6 || record[0] != 22 || record[5] != 2, || {
            format!("{name} was accepted")
        })?;
        seen.push(format!("{name} was refused"));
    }
    Ok(seen.join(", "))
}

/// A ClientHello of TLS 1.0 (minor version 1) or 1.1 (2), with the suites that every server of that time had.
fn hello(minor: u8) -> Vec<u8> {
    let mut body = vec![3, minor];
    body.extend_from_slice(&[0x5a; 32]);
    body.push(0);
    // ECDHE and RSA, AES and 3DES, all with SHA-1.
    let suites: [u16; 8] = [
        0xc00a, 0xc009, 0xc014, 0xc013, 0x0035, 0x002f, 0x000a, 0x00ff,
    ];
    body.put_u16(16);
    for suite in suites {
        body.put_u16(suite);
    }
    body.extend_from_slice(&[1, 0]);
    // The groups P-256, P-384 and X25519, and points in full.
    let extensions: &[u8] = &[0, 10, 0, 8, 0, 6, 0, 23, 0, 24, 0, 29, 0, 11, 0, 2, 1, 0];
    body.put_u16(u16::try_from(extensions.len()).unwrap_or(0));
    body.extend_from_slice(extensions);
    let mut message = wire_length(body.len()).to_be_bytes();
    message[0] = 1;
    let mut record = vec![22, 3, 1];
    record.put_u16(u16::try_from(body.len() + 4).unwrap_or(0));
    record.extend_from_slice(&message);
    record.extend(body);
    record
}
