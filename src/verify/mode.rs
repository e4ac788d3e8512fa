//! What kind of server it is: its TLS mode, and what it offers, found out before any check is made.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use super::check::{Stop, brief};
use super::failure::{Cancel, Failure};
use super::server::Server;
use super::session::{go, greeting, query};
use super::subject::{NO_CERTIFICATES, Subject};
use crate::client::{Reason, Step};
use crate::nbd::client::Fault;
use crate::nbd::{BlockSizes, OptionCode, ReplyCode, TransmissionFlags};

/// Exports and contexts that a summary names.
const NAMES: usize = 64;

/// How long a second connection waits for its greeting.
const SECOND: Duration = Duration::from_millis(1500);

/// The server's TLS mode, in the words of the specification ("TLS support"), or why it has none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// STARTTLS is refused.
    NoTls,
    /// Some things are to be had in plaintext, and STARTTLS is accepted.
    Selective,
    /// Nothing is to be had in plaintext.
    Forced,
    /// Newstyle, but not fixed newstyle.
    NotFixed,
    Oldstyle,
    /// Something else listens there.
    NotNbd,
    /// Nothing was learned: nobody listens, or nobody speaks.
    Unknown,
}

/// What a server offers, as far as it was found out.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Features {
    /// The server's handshake flags.
    pub handshake_flags: Option<u16>,
    /// The version and the cipher, as in "TLS 1.3, TLS13_AES_256_GCM_SHA384".
    pub tls: Option<String>,
    /// The first of those that LIST names.
    pub exports: Option<Vec<String>>,
    /// Bytes.
    pub size: Option<u64>,
    /// The names of the transmission flags.
    pub flags: Option<Vec<&'static str>>,
    pub block_sizes: Option<Sizes>,
    pub description: Option<String>,
    pub structured_replies: Option<bool>,
    pub extended_headers: Option<bool>,
    /// The first of those that LIST_META_CONTEXT names.
    pub contexts: Option<Vec<String>>,
    /// Whether a second connection is greeted while a first one is open.
    pub concurrent_sessions: Option<bool>,
}

/// The block sizes, in bytes, as the server says them.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Sizes {
    pub minimum: u32,
    pub preferred: u32,
    pub maximum_payload: u32,
}

/// What was found out before the checks.
#[derive(Debug)]
pub(super) struct Survey {
    pub(super) mode: Mode,
    pub(super) evidence: String,
    pub(super) features: Features,
    /// Why no session on the export is to be had.
    pub(super) blocked: Option<String>,
}

impl Survey {
    /// Asks the server; each of the few sessions has the time of one check.
    pub(super) fn make(server: &Server, cancel: &Cancel, time: Duration) -> Self {
        let subject = |mode| {
            let deadline = std::time::Instant::now() + time;
            Subject::new(server, mode, cancel, deadline)
        };
        let mut survey = Self {
            mode: Mode::Unknown,
            evidence: String::new(),
            features: Features::default(),
            blocked: None,
        };
        let result = survey.plaintext(&subject(Mode::Unknown));
        if let Err(failure) = result {
            survey.mode = match *failure.reason {
                Reason::Fault(Fault::NotNbd) => Mode::NotNbd,
                Reason::Fault(Fault::Oldstyle) => Mode::Oldstyle,
                Reason::Fault(Fault::NotFixedNewstyle) => Mode::NotFixed,
                _ => Mode::Unknown,
            };
            survey.evidence = brief(&failure.to_string());
            survey.blocked = Some(survey.evidence.clone());
            return survey;
        }
        let subject = subject(survey.mode);
        survey.blocked = match survey.export(&subject) {
            Ok(()) => None,
            Err(Stop::Finding(why) | Stop::Inapplicable(why) | Stop::NotRun(why)) => {
                Some(brief(&why))
            }
            Err(Stop::Session(failure)) => Some(brief(&format!(
                "no session on the export is to be had: {failure}"
            ))),
        };
        survey
    }

    /// The greeting, and how options fare before TLS: each on a connection of its own, so that none spoils another.
    fn plaintext(&mut self, subject: &Subject<'_>) -> Result<(), Failure> {
        let mut link = subject.link()?;
        let flags = greeting(&mut link)?;
        self.features.handshake_flags = Some(flags);
        if flags & 1 == 0 {
            return Err(Failure::new(Step::Greeting, Fault::NotFixedNewstyle));
        }
        let second = subject
            .link()
            .and_then(|mut link| link.stirs(SECOND).map_err(Failure::at(Step::Greeting)));
        self.features.concurrent_sessions = second.ok();
        drop(link);
        let mut refused = Vec::new();
        let mut answered = Vec::new();
        let export = subject.other_export();
        for (option, payload) in [
            (OptionCode(0x7fff_fff0), Vec::new()),
            (OptionCode::LIST, Vec::new()),
            (OptionCode::STRUCTURED_REPLY, Vec::new()),
            (OptionCode::LIST_META_CONTEXT, query(&export, &[])),
            (OptionCode::INFO, go(&export, &[])),
        ] {
            let mut session = subject.plaintext()?;
            match session.ask(option, &payload) {
                Ok(answer) if answer.last.code == ReplyCode::ERR_TLS_REQD => {
                    refused.push(option.to_string());
                }
                Ok(answer) => answered.push(format!("{option} {}", answer.last.code)),
                Err(failure) if failure.is_end() => answered.push(format!("{option} the end")),
                Err(failure) => return Err(failure),
            }
        }
        let mut session = subject.plaintext()?;
        session.send(OptionCode::STARTTLS, &[])?;
        let accepted = session.accepted(OptionCode::STARTTLS);
        (self.mode, self.evidence) = match accepted {
            Err(Failure { reason, .. })
                if matches!(*reason, Reason::Fault(Fault::TlsRefused { .. })) =>
            {
                (Mode::NoTls, reason.to_string())
            }
            Err(failure) if !failure.is_violation() => return Err(failure),
            _ if refused.len() > answered.len() => (
                Mode::Forced,
                format!("before TLS, {} got ERR_TLS_REQD", refused.join(", ")),
            ),
            _ => (
                Mode::Selective,
                format!(
                    "STARTTLS was accepted, and before TLS the answers were: {}",
                    answered.join(", ")
                ),
            ),
        };
        Ok(())
    }

    /// A session on the export, as every other check will want one.
    fn export(&mut self, subject: &Subject<'_>) -> Result<(), Stop> {
        let mut session = subject.session()?;
        if let Some(tls) = session.link().tls() {
            self.features.tls = Some(format!(
                "{}, {}",
                match tls.protocol_version() {
                    Some(rustls::ProtocolVersion::TLSv1_3) => "TLS 1.3".to_owned(),
                    Some(rustls::ProtocolVersion::TLSv1_2) => "TLS 1.2".to_owned(),
                    other => format!("{other:?}"),
                },
                tls.negotiated_cipher_suite()
                    .map_or("no cipher".to_owned(), |suite| format!(
                        "{:?}",
                        suite.suite()
                    ))
            ));
        }
        if let Ok(names) = session.list()? {
            self.features.exports = Some(shorten(names));
        }
        let info = session.info(subject.export())?.map_err(|refusal| {
            let mut why = format!("INFO about the export {:?}: {refusal}", subject.export());
            if subject.mode == Mode::Selective && refusal.code == ReplyCode::ERR_TLS_REQD {
                why = format!("{why}; {NO_CERTIFICATES}");
            }
            Stop::NotRun(why)
        })?;
        self.features.size = Some(info.size);
        self.features.flags = Some(flag_names(info.flags));
        self.features.block_sizes = info.block_sizes.map(Sizes::from);
        self.features.description = info.description.as_deref().map(brief);
        let structured = session.structured_reply()?.is_ok();
        self.features.structured_replies = Some(structured);
        let contexts = session.list_meta_context(subject.export(), &[])?;
        let contexts = contexts.map(|contexts| contexts.into_iter().map(|context| context.name));
        self.features.contexts = Some(contexts.map(shorten).unwrap_or_default());
        let extended = session.ask(OptionCode::EXTENDED_HEADERS, &[])?;
        self.features.extended_headers = Some(extended.last.code == ReplyCode::ACK);
        session.abort();
        let (session, _) = subject.admitted()?;
        session.go(subject.export())?.disconnect();
        Ok(())
    }
}

fn shorten(names: impl IntoIterator<Item = String>) -> Vec<String> {
    names
        .into_iter()
        .take(NAMES)
        .map(|name| brief(&name))
        .collect()
}

/// The flags by the names that the specification gives them, without `NBD_FLAG_`.
fn flag_names(flags: TransmissionFlags) -> Vec<&'static str> {
    [
        (TransmissionFlags::HAS_FLAGS, "HAS_FLAGS"),
        (TransmissionFlags::READ_ONLY, "READ_ONLY"),
        (TransmissionFlags::SEND_FLUSH, "SEND_FLUSH"),
        (TransmissionFlags::SEND_FUA, "SEND_FUA"),
        (TransmissionFlags::ROTATIONAL, "ROTATIONAL"),
        (TransmissionFlags::SEND_TRIM, "SEND_TRIM"),
        (TransmissionFlags::SEND_WRITE_ZEROES, "SEND_WRITE_ZEROES"),
        (TransmissionFlags::SEND_DF, "SEND_DF"),
        (TransmissionFlags::CAN_MULTI_CONN, "CAN_MULTI_CONN"),
        (TransmissionFlags::SEND_RESIZE, "SEND_RESIZE"),
        (TransmissionFlags::SEND_CACHE, "SEND_CACHE"),
        (TransmissionFlags::SEND_FAST_ZERO, "SEND_FAST_ZERO"),
        (TransmissionFlags(1 << 12), "BLOCK_STATUS_PAYLOAD"),
    ]
    .into_iter()
    .filter_map(|(flag, name)| flags.contains(flag).then_some(name))
    .collect()
}

impl From<BlockSizes> for Sizes {
    fn from(sizes: BlockSizes) -> Self {
        Self {
            minimum: sizes.minimum,
            preferred: sizes.preferred,
            maximum_payload: sizes.maximum_payload,
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoTls => "NOTLS",
            Self::Selective => "SELECTIVETLS",
            Self::Forced => "FORCEDTLS",
            Self::NotFixed => "newstyle, not fixed",
            Self::Oldstyle => "oldstyle",
            Self::NotNbd => "not NBD",
            Self::Unknown => "unknown",
        })
    }
}

/// A line or two, as nbdinfo has them.
impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        parts.extend(self.tls.clone());
        parts.extend(self.size.map(|size| format!("{size} bytes")));
        parts.extend(
            self.flags
                .as_ref()
                .map(|flags| flags.join(" "))
                .filter(|flags| !flags.is_empty()),
        );
        parts.extend(self.block_sizes.map(|sizes| {
            format!(
                "blocks of {}, {} preferred, payloads up to {}",
                sizes.minimum, sizes.preferred, sizes.maximum_payload
            )
        }));
        parts.extend(self.structured_replies.map(|has| {
            if has {
                "structured replies"
            } else {
                "simple replies"
            }
            .to_owned()
        }));
        parts.extend(
            self.extended_headers
                .filter(|has| *has)
                .map(|_| "extended headers".to_owned()),
        );
        parts.extend(self.contexts.as_ref().map(|contexts| {
            if contexts.is_empty() {
                "no contexts".to_owned()
            } else {
                format!("contexts {}", contexts.join(" "))
            }
        }));
        parts.extend(
            self.concurrent_sessions
                .filter(|concurrent| !concurrent)
                .map(|_| "one session at a time".to_owned()),
        );
        parts.extend(
            self.description
                .as_ref()
                .map(|description| format!("described as {description:?}")),
        );
        f.write_str(&parts.join("; "))
    }
}
