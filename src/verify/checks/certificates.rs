//! Who is let in: nobody without a certificate, nobody with one of another authority.

use std::sync::Arc;

use rustls::client::ResolvesClientCert;
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, SignatureScheme};
use rustls_pki_types::DnsName;

use super::prelude::*;
use crate::tls::{self, Authority, CertificateError, Leaf, Secret, Side};

const SECTION: &str = "Certificates, authentication and authorisation";

/// C27.
pub(super) const ANONYMOUS_REFUSED: Check = Check {
    id: "anonymous-client-refused",
    title: "A client without a certificate is refused",
    group: Group::Certificates,
    section: SECTION,
    severity: Severity::Security,
    why: "TLS would hide the data from the network, but let anyone on it read and write the volume.",
    rules: &[27],
    attach: true,
    scope: Scope::Tls,
    question: anonymous_refused,
    ..Check::USUAL
};

/// C27.
pub(super) const FOREIGN_REFUSED: Check = Check {
    id: "foreign-client-refused",
    title: "A client with the right names from an unknown authority is refused",
    group: Group::Certificates,
    section: SECTION,
    severity: Severity::Security,
    why: "Anyone could make the certificate that opens the volume.",
    rules: &[27],
    attach: true,
    scope: Scope::Tls,
    question: foreign_refused,
    ..Check::USUAL
};

/// C27.
pub(super) const SERVER_GENUINE: Check = Check {
    id: "server-certificate-valid",
    title: "The server's certificate is valid now, for this name, and from an authority that the client trusts",
    group: Group::Certificates,
    section: SECTION,
    severity: Severity::Security,
    why: "Clients cannot tell the server from somebody in between, or learn not to look.",
    rules: &[27],
    scope: Scope::Tls,
    question: server_genuine,
    ..Check::USUAL
};

/// C27.
pub(super) const EXPIRED_REFUSED: Check = Check {
    id: "expired-client-refused",
    title: "A client whose certificate has ended is refused",
    group: Group::Certificates,
    section: SECTION,
    severity: Severity::Security,
    why: "A certificate that was meant to be of no use any more still opens the volume.",
    rules: &[27],
    scope: Scope::Secured,
    question: expired_refused,
    ..Check::USUAL
};

/// C33.
pub(super) const OTHER_REFUSED: Check = Check {
    id: "other-identity-refused",
    title: "Another client of the same authority learns nothing of this export, by no option",
    group: Group::Certificates,
    section: SECTION,
    severity: Severity::Security,
    why: "Whoever has any certificate of this authority can use, or find out about, everybody's volumes.",
    rules: &[33],
    scope: Scope::Secured,
    question: other_refused,
    ..Check::USUAL
};

fn server_genuine(subject: &Subject<'_>) -> Result<String, Stop> {
    let (identity, name) = subject.credentials()?;
    let result = subject
        .plaintext()
        .and_then(|session| session.upgrade(identity.any.clone(), name.clone(), &[]));
    match result {
        Ok(session) => {
            session.abort();
            Ok(format!("it is {}'s", name.to_str()))
        }
        Err(failure)
            if matches!(
                *failure.reason,
                Reason::Tls(rustls::Error::InvalidCertificate(_))
            ) =>
        {
            Err(broke(failure))
        }
        // It was looked at before our own was refused.
        Err(failure) if failure.is_end() && failure.step == Step::Handshake => {
            Ok("the handshake ended for another reason".into())
        }
        Err(failure) => Err(failure.into()),
    }
}

fn expired_refused(subject: &Subject<'_>) -> Result<String, Stop> {
    let Some(expired) = &subject.server.expired else {
        return Err(Stop::Inapplicable(
            "no expired certificate was given".into(),
        ));
    };
    refused(subject, expired.any.clone())
}

fn other_refused(subject: &Subject<'_>) -> Result<String, Stop> {
    let Some(other) = &subject.server.other else {
        return Err(Stop::Inapplicable(
            "no other client's certificate was given".into(),
        ));
    };
    let (_, name) = subject.credentials()?;
    let session = subject
        .plaintext()
        .and_then(|session| session.upgrade(other.any.clone(), name, &[]));
    let mut session = match session {
        Ok(session) => session,
        Err(failure) if is_refusal(&failure) => return Ok(failure.reason.to_string()),
        Err(failure) => return Err(failure.into()),
    };
    // In TLS 1.3 the first answer tells.
    let told = match session.info(subject.export()) {
        Ok(told) => told,
        Err(failure) if is_refusal(&failure) => return Ok(failure.reason.to_string()),
        Err(failure) => return Err(failure.into()),
    };
    if let Ok(info) = told {
        return Err(Stop::Finding(format!(
            "INFO told another client of the export of {} bytes",
            info.size
        )));
    }
    let names = session.list().map_err(broke)?.unwrap_or_default();
    require(
        !names.iter().any(|name| name == subject.export().as_str()),
        || "LIST named the export to another client".to_owned(),
    )?;
    if session.structured_reply().map_err(broke)?.is_ok() {
        let contexts = session
            .list_meta_context(subject.export(), &[])
            .map_err(broke)?;
        require(contexts.is_err(), || {
            "LIST_META_CONTEXT told another client that the export exists".to_owned()
        })?;
    }
    session.abort();
    Ok("it was let in, and learned nothing of the export".into())
}

fn anonymous_refused(subject: &Subject<'_>) -> Result<String, Stop> {
    let (identity, _) = subject.credentials()?;
    let mut config = (*identity.any).clone();
    config.client_auth_cert_resolver = Arc::new(NoCertificate);
    refused(subject, Arc::new(config))
}

fn foreign_refused(subject: &Subject<'_>) -> Result<String, Stop> {
    let (identity, _) = subject.credentials()?;
    let config = foreign(&identity.any)
        .map_err(|error| Stop::Inapplicable(format!("no certificate to try it with: {error}")))?;
    refused(subject, Arc::new(config))
}

/// In TLS 1.3 the client's handshake is over before the server has looked at its certificate: only the first answer
/// tells.
fn refused(subject: &Subject<'_>, config: Arc<ClientConfig>) -> Result<String, Stop> {
    let (_, name) = subject.credentials()?;
    let answer = subject
        .plaintext()
        .and_then(|session| session.upgrade(config, name, &[]))
        .and_then(|mut session| Ok((session.info(subject.export())?, session)));
    match answer {
        Ok((answer, session)) => {
            session.abort();
            let what = match answer {
                Ok(info) => format!("told it about the export of {} bytes", info.size),
                Err(refusal) => format!("answered its INFO ({refusal})"),
            };
            Err(Stop::Finding(format!(
                "the server let the client in and {what}"
            )))
        }
        Err(failure) if is_refusal(&failure) => Ok(failure.reason.to_string()),
        Err(failure) if failure.step == Step::Handshake && failure.is_violation() => {
            Err(broke(failure))
        }
        Err(failure) => Err(failure.into()),
    }
}

/// Whether the server turned a client away, as opposed to us turning away the server. Closing counts only once the
/// certificate was sent: before that, it may have been for any reason.
fn is_refusal(failure: &Failure) -> bool {
    match *failure.reason {
        Reason::Tls(rustls::Error::AlertReceived(_)) => true,
        Reason::ClosedAfterHandshake => matches!(failure.step, Step::Option(_)),
        _ => false,
    }
}

/// The same configuration with a certificate that names the same client, from an authority made on the spot.
fn foreign(genuine: &ClientConfig) -> Result<ClientConfig, CertificateError> {
    let schemes = genuine
        .crypto_provider()
        .signature_verification_algorithms
        .supported_schemes();
    let mut names: Vec<String> = genuine
        .client_auth_cert_resolver
        .resolve(&[], &schemes)
        .and_then(|key| key.cert.first().map(tls::certificate_names))
        .unwrap_or_default();
    names.retain(|name| DnsName::try_from(name.as_str()).is_ok());
    if names.is_empty() {
        names.push("client.invalid".into());
    }
    let parts = Authority::temporary()?.issue(&Leaf::new(Side::Client, names))?;
    let secret = Secret::from_map("a made-up Secret", &parts, Side::Client)?;
    let stranger = tls::client_config(&secret, tls::Profile::Probe)?;
    let mut config = genuine.clone();
    config.client_auth_cert_resolver = stranger.client_auth_cert_resolver.clone();
    Ok(config)
}

#[derive(Debug)]
struct NoCertificate;

impl ResolvesClientCert for NoCertificate {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}
