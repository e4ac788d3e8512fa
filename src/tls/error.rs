//! Each way in which a certificate can be wrong, and what a failed handshake means, in words.

use std::path::PathBuf;

use rustls::{AlertDescription, CertificateError as Refusal, Error, OtherError};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// A Secret that cannot be used. `origin` is the directory or the Secret it came from.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    #[error("{origin} has no {part}; it needs {}", .accepted.join(" or "))]
    Missing {
        origin: String,
        part: &'static str,
        accepted: Vec<&'static str>,
    },
    #[error("cannot read or write {}", .path.display())]
    File {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{part} of {origin} is longer than {limit} bytes")]
    TooLong {
        origin: String,
        part: &'static str,
        limit: usize,
    },
    #[error("{part} of {origin} is not PEM, or holds no {wanted}")]
    NotPem {
        origin: String,
        part: &'static str,
        wanted: &'static str,
    },
    #[error("the certificate in {origin} cannot be read: {problem}")]
    Malformed { origin: String, problem: String },
    #[error("the certificate in {origin} ended at {}: renew it", date(*.not_after))]
    Expired { origin: String, not_after: i64 },
    #[error("the certificate in {origin} is valid until {}, and one that has expired is needed", date(*.not_after))]
    NotExpired { origin: String, not_after: i64 },
    #[error("the certificate in {origin} is not valid before {}: is the clock right?", date(*.not_before))]
    NotYetValid { origin: String, not_before: i64 },
    #[error("the certificate in {origin} is for {found}, but {wanted} is needed")]
    WrongName {
        origin: String,
        wanted: String,
        found: String,
    },
    #[error(
        "the certificate in {origin} may not be used for {wanted}: its extended key usage lacks it"
    )]
    WrongUsage {
        origin: String,
        wanted: &'static str,
    },
    #[error("the private key in {origin} does not belong to its certificate")]
    KeyMismatch { origin: String },
    #[error("the certificate in {origin} was not issued by an authority in its ca.crt")]
    WrongAuthority { origin: String },
    #[error("the certificates in {origin} cannot be used")]
    Unusable {
        origin: String,
        #[source]
        source: rustls::Error,
    },
    #[error("cannot issue a certificate for {subject}")]
    Issue {
        subject: String,
        #[source]
        source: rcgen::Error,
    },
}

/// Seconds since 1970 as people write dates.
#[must_use]
pub fn date(seconds: i64) -> String {
    OffsetDateTime::from_unix_timestamp(seconds)
        .ok()
        .and_then(|date| date.format(&Rfc3339).ok())
        .unwrap_or_else(|| format!("{seconds} s since 1970"))
}

/// What a failed handshake means, and on which side to look.
#[must_use]
pub fn explain(error: &Error) -> String {
    match error {
        Error::InvalidCertificate(refusal) => refused(refusal),
        Error::NoCertificatesPresented => "the peer presented no certificate".into(),
        Error::AlertReceived(alert) => alerted(*alert),
        Error::InvalidMessage(_) => {
            format!("the peer does not speak TLS where it must ({error})")
        }
        Error::PeerIncompatible(_) => {
            format!("the two sides have no TLS version or cipher in common ({error})")
        }
        other => other.to_string(),
    }
}

fn refused(refusal: &Refusal) -> String {
    let why = match refusal {
        Refusal::Expired => "has expired".to_owned(),
        Refusal::ExpiredContext { not_after, .. } => {
            format!("ended at {}", date(seconds(not_after.as_secs())))
        }
        Refusal::NotValidYet => "is not valid yet".to_owned(),
        Refusal::NotValidYetContext { not_before, .. } => {
            format!(
                "is not valid before {}",
                date(seconds(not_before.as_secs()))
            )
        }
        Refusal::UnknownIssuer => "was not issued by an authority in ca.crt".to_owned(),
        Refusal::BadSignature => "has a wrong signature".to_owned(),
        Refusal::Revoked => "was revoked".to_owned(),
        Refusal::NotValidForName => "is for another name".to_owned(),
        Refusal::NotValidForNameContext {
            expected,
            presented,
        } => format!(
            "is for {}, but {} is needed",
            presented.join(", "),
            expected.to_str()
        ),
        Refusal::InvalidPurpose | Refusal::InvalidPurposeContext { .. } => {
            "may not be used for this side: see its extended key usage".to_owned()
        }
        Refusal::BadEncoding => "cannot be read".to_owned(),
        // Ours, and written for people.
        Refusal::Other(OtherError(why)) => return why.to_string(),
        other => return other.to_string(),
    };
    format!("the peer's certificate {why}")
}

fn alerted(alert: AlertDescription) -> String {
    let why = match alert {
        AlertDescription::CertificateRequired => "it wants a certificate and was given none",
        AlertDescription::UnknownCA => "our certificate was not issued by an authority it trusts",
        AlertDescription::CertificateExpired => {
            "our certificate has expired, or its clock is wrong"
        }
        AlertDescription::BadCertificate | AlertDescription::CertificateUnknown => {
            "it does not accept our certificate"
        }
        AlertDescription::UnsupportedCertificate => {
            "our certificate may not be used for this side: see its extended key usage"
        }
        AlertDescription::AccessDenied => "our certificate is for another volume or client",
        AlertDescription::ProtocolVersion => "it does not speak the TLS version we need",
        AlertDescription::HandshakeFailure => "it has no cipher or key exchange in common with us",
        _ => return format!("the peer ended TLS with the alert {alert:?}"),
    };
    format!("the peer refused: {why} (alert {alert:?})")
}

fn seconds(seconds: u64) -> i64 {
    i64::try_from(seconds).unwrap_or(i64::MAX)
}
