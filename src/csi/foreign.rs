//! A static PersistentVolume: an export of a server that is not Hawser's, which the orchestrator calls by a handle of
//! its own choice and describes in `volume_context`.
//!
//! | key | value |
//! |---|---|
//! | `uri` | `nbds://HOST[:PORT]/EXPORT[?tls-hostname=NAME]` |
//! | `format` | `never`, the default; `if-empty`: make a file system where the device reads as zeros |
//!
//! Nothing is known of such a volume but what a request says, so whatever needs to know more, as growing it does, is
//! for the one who runs the server.

use std::fmt;
use std::str::FromStr;

use rustls_pki_types::ServerName;
use tonic::Status;

use super::status::{invalid, not_found};
use crate::attach::Foreign;
use crate::nbd::Uri;
use crate::nbd::uri::{Endpoint, InvalidUri};
use crate::volumes::VolumeId;

/// Whether a file system may be made on a foreign export.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Formatting {
    #[default]
    Never,
    /// Where the device reads as zeros at both ends, and this node has not seen a file system there before.
    IfEmpty,
}

/// A word that says nothing about formatting.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is neither never nor if-empty")]
pub(super) struct UnknownFormatting(String);

impl FromStr for Formatting {
    type Err = UnknownFormatting;

    fn from_str(text: &str) -> Result<Self, UnknownFormatting> {
        match text {
            "never" => Ok(Self::Never),
            "if-empty" => Ok(Self::IfEmpty),
            _ => Err(UnknownFormatting(text.chars().take(64).collect())),
        }
    }
}

impl fmt::Display for Formatting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Never => "never",
            Self::IfEmpty => "if-empty",
        })
    }
}

/// A URI that names no export that a pod may have.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unfit {
    #[error(transparent)]
    Invalid(#[from] InvalidUri),
    #[error("volumes are inside TLS always: the scheme must be nbds")]
    Plaintext,
    #[error("a unix socket is on one machine only: use nbds:// and a host")]
    Socket,
    #[error("a user's name has no meaning where certificates say who one is")]
    User,
    #[error(
        "certificates come from the volume's Secret, not from a node's directory as tls-certificates says"
    )]
    Certificates,
    #[error("{0:?} cannot be the name in a certificate: give another one as tls-hostname")]
    Name(String),
}

/// Reads the value of `uri`.
pub(super) fn parse(text: &str) -> Result<Foreign, Unfit> {
    let uri: Uri = text.parse()?;
    let server_name = uri.server_name().unwrap_or_default().to_owned();
    let (host, port) = match uri.endpoint {
        Endpoint::Tcp { host, port } => (host, port),
        Endpoint::Unix(_) => return Err(Unfit::Socket),
    };
    if !uri.tls {
        return Err(Unfit::Plaintext);
    }
    if uri.user.is_some() {
        return Err(Unfit::User);
    }
    if uri.certificates.is_some() {
        return Err(Unfit::Certificates);
    }
    if ServerName::try_from(server_name.as_str()).is_err() {
        return Err(Unfit::Name(server_name));
    }
    Ok(Foreign {
        host,
        port,
        export: uri.export.to_string(),
        server_name,
    })
}

/// What a request says of the volume it calls `handle`: `None` for one of Hawser's own. A handle that is neither
/// Hawser's nor said to be elsewhere names nothing.
pub(super) fn named(handle: &str, foreign: Option<Foreign>) -> Result<Option<Foreign>, Status> {
    match (handle.parse::<VolumeId>(), foreign) {
        (Ok(_), None) => Ok(None),
        (Err(_), Some(foreign)) => Ok(Some(foreign)),
        (Ok(_), Some(_)) => Err(invalid(format!(
            "volume_context has a uri, but volume {handle} is called as Hawser calls its own; call a volume on another \
             server by another name"
        ))),
        (Err(_), None) => Err(unknown(handle)),
    }
}

/// A handle that is not Hawser's, where the request cannot or does not say more.
pub(super) fn unknown(handle: &str) -> Status {
    not_found(format!(
        "volume {handle:?} does not exist; one on another server than Hawser's has its uri in volume_context"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_says_where_a_volume_is_and_who_serves_it() {
        let foreign = |host: &str, port, export: &str, name: &str| Foreign {
            host: host.into(),
            port,
            export: export.into(),
            server_name: name.into(),
        };
        for (text, expected) in [
            (
                "nbds://storage.example/disk",
                foreign("storage.example", 10809, "disk", "storage.example"),
            ),
            (
                "nbds://192.0.2.1:1234",
                foreign("192.0.2.1", 1234, "", "192.0.2.1"),
            ),
            (
                "nbds://[2001:db8::1]/a/b%20c?tls-hostname=nbd.example",
                foreign("2001:db8::1", 10809, "a/b c", "nbd.example"),
            ),
            (
                "nbds://[fe80::1%25eth0]/?tls-hostname=nbd.example",
                foreign("fe80::1%eth0", 10809, "", "nbd.example"),
            ),
        ] {
            assert_eq!(parse(text).unwrap(), expected, "{text}");
        }
    }

    #[test]
    fn a_uri_that_leads_elsewhere_is_refused_with_the_reason() {
        for (text, part) in [
            ("storage.example/disk", "begins with"),
            ("nbd://storage.example/disk", "must be nbds"),
            ("nbds+unix:///disk?socket=/run/nbd", "unix socket"),
            ("nbds://alice@storage.example/disk", "user"),
            (
                "nbds://storage.example/disk?tls-certificates=/etc/pki",
                "Secret",
            ),
            ("nbds://storage.example/disk?tls-verify-peer=0", "checked"),
            ("nbds://[fe80::1%25eth0]/disk", "tls-hostname"),
            (
                "nbds://storage.example/disk?tls-hostname=a%20b",
                "certificate",
            ),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn a_handle_is_hawsers_own_or_is_said_to_be_elsewhere() {
        let elsewhere = || Some(parse("nbds://storage.example/disk").unwrap());
        let own = VolumeId::from_bytes([1; 16]).to_string();
        assert_eq!(named(&own, None).unwrap(), None);
        assert_eq!(named("disk", elsewhere()).unwrap(), elsewhere());
        let code = |result: Result<_, Status>| result.unwrap_err().code();
        assert_eq!(code(named(&own, elsewhere())), tonic::Code::InvalidArgument);
        assert_eq!(code(named("disk", None)), tonic::Code::NotFound);
    }
}
