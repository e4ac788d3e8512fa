//! What can go wrong with a session, and at which step.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use crate::nbd::client::{Fault, sentence};
use crate::nbd::codec::Malformed;
use crate::nbd::{Command, ExportName, OptionCode, ReplyCode};

/// A session that failed: with whom, where, and why.
#[derive(Debug, thiserror::Error)]
#[error("export {export:?} at {address}: {step}: {reason}")]
pub struct ClientError {
    pub address: SocketAddr,
    pub export: ExportName,
    pub step: Step,
    pub reason: Box<Reason>,
}

impl ClientError {
    /// Whether trying again later may help: nothing was said that settles it.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match &*self.reason {
            Reason::Io(_)
            | Reason::TimedOut(_)
            | Reason::Closed
            | Reason::ClosedAfterHandshake
            | Reason::KeysChanged => true,
            Reason::Refused(refusal) => refusal.code == ReplyCode::ERR_SHUTDOWN,
            _ => false,
        }
    }
}

/// Where in a session's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    Connect,
    Greeting,
    StartTls,
    /// An option in plaintext, which only verification sends.
    Plaintext(OptionCode),
    Handshake,
    Option(OptionCode),
    HandOver,
    Command(Command),
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect => f.write_str("connecting"),
            Self::Greeting => f.write_str("the greeting"),
            Self::StartTls => f.write_str("STARTTLS"),
            Self::Plaintext(option) => write!(f, "{option} before TLS"),
            Self::Handshake => f.write_str("the TLS handshake"),
            Self::Option(option) => write!(f, "{option}"),
            Self::HandOver => f.write_str("handing over to the kernel"),
            Self::Command(command) => write!(f, "command {command}"),
        }
    }
}

/// An option that the server refused; the session can go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    pub code: ReplyCode,
    /// The server's words for people.
    pub message: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = sentence(&self.message);
        write!(f, "the server refused with {}{words}", self.code)
    }
}

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
pub enum Reason {
    #[error("{0}")]
    Io(io::Error),
    #[error("not finished within {0:?}, the limit for the whole session")]
    TimedOut(Duration),
    #[error("the server closed the connection")]
    Closed,
    #[error(
        "the server closed the connection right after the TLS handshake, as servers do that do not accept the \
         client's certificate; its log may say why"
    )]
    ClosedAfterHandshake,
    #[error("the server answered with something that is not TLS: {0:02x?}")]
    NotTls([u8; 5]),
    #[error("{}", crate::tls::explain(.0))]
    Tls(rustls::Error),
    #[error(transparent)]
    Fault(#[from] Fault),
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error("{0}")]
    Refused(Refusal),
    #[error("a reply of more than {limit} bytes")]
    TooLong { limit: u32 },
    #[error("the server sent {0} bytes that nobody asked for")]
    Surplus(usize),
    #[error("the TLS version must be 1.3, the server chose {0:?}")]
    Version(Option<rustls::ProtocolVersion>),
    #[error("the run was ended")]
    Cancelled,
    #[error("the server changed its TLS keys during negotiation, which the kernel cannot follow")]
    KeysChanged,
}

impl Reason {
    /// Whether the server broke the protocol at this step, or kept us waiting: neither a refusal nor a fault of the
    /// network or of our own certificate explains it.
    #[must_use]
    pub fn is_violation(&self, step: Step) -> bool {
        match self {
            Self::TimedOut(_) => step != Step::Connect,
            Self::Tls(error) => matches!(
                error,
                rustls::Error::InvalidMessage(_)
                    | rustls::Error::PeerMisbehaved(_)
                    | rustls::Error::InappropriateMessage { .. }
                    | rustls::Error::InappropriateHandshakeMessage { .. }
                    | rustls::Error::DecryptError
                    | rustls::Error::PeerSentOversizedRecord
            ),
            Self::NotTls(_)
            | Self::Fault(_)
            | Self::Malformed(_)
            | Self::TooLong { .. }
            | Self::Surplus(_) => true,
            _ => false,
        }
    }
}
