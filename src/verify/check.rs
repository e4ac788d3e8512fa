//! What a check is, and what it can come to.

use std::time::{Duration, Instant};

use serde::Serialize;

use crate::client::{ClientError, ProbeSession, Reply, Target, Transmitting};
use crate::nbd::{Errno, ExportInfo, ExportName};

/// Bytes of an outcome's text.
const TEXT: usize = 400;

/// One question put to a server.
#[derive(Debug, Serialize)]
pub struct Check {
    /// Stable: reports are compared by it.
    pub id: &'static str,
    pub title: &'static str,
    /// The heading in the specification, `doc/proto.md`, and the entry under it.
    pub section: &'static str,
    pub severity: Severity,
    /// What a failure means to the one who stores data there.
    pub why: &'static str,
    #[serde(skip)]
    pub(super) question: fn(&Subject<'_>) -> Result<String, Stop>,
}

/// What a finding puts at risk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Some clients will not get along with the server.
    Interoperability,
    /// What is read may be wrong.
    Data,
    /// Somebody on the network, or with another certificate, can do what they must not.
    Security,
}

/// What a check came to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "outcome", rename_all = "kebab-case")]
pub enum Outcome {
    /// `seen` says how the server behaved.
    Passed {
        seen: String,
    },
    Finding {
        evidence: String,
    },
    /// The server lacks the feature that could be wrong.
    Inapplicable {
        reason: String,
    },
    /// Nothing is known: in doubt, that is no pass.
    NotRun {
        reason: String,
    },
}

/// Why a check ends before its end.
#[derive(Debug)]
pub(super) enum Stop {
    Finding(String),
    Inapplicable(String),
    /// A finding where the server broke the protocol; otherwise the question was never put.
    Client(ClientError),
}

/// The server as one check sees it.
#[derive(Debug)]
pub(super) struct Subject<'a> {
    target: &'a Target,
    deadline: Instant,
}

impl Check {
    pub(super) fn run(&self, subject: &Subject<'_>) -> Outcome {
        match (self.question)(subject) {
            Ok(seen) => Outcome::Passed { seen: brief(seen) },
            Err(Stop::Finding(evidence)) => Outcome::Finding {
                evidence: brief(evidence),
            },
            Err(Stop::Inapplicable(reason)) => Outcome::Inapplicable {
                reason: brief(reason),
            },
            Err(Stop::Client(error)) if error.is_violation() => Outcome::Finding {
                evidence: brief(error.to_string()),
            },
            Err(Stop::Client(error)) => Outcome::NotRun {
                reason: brief(error.to_string()),
            },
        }
    }
}

/// What a server said can be long; reports end in events and error messages.
fn brief(mut text: String) -> String {
    if text.len() > TEXT {
        text.truncate(text.floor_char_boundary(TEXT));
        text.push('…');
    }
    text
}

impl From<ClientError> for Stop {
    fn from(error: ClientError) -> Self {
        Self::Client(error)
    }
}

/// A session that went well so far and then broke: whatever the reason, the server is the one to ask.
pub(super) fn broke(error: ClientError) -> Stop {
    Stop::Finding(error.to_string())
}

pub(super) fn require(holds: bool, evidence: impl FnOnce() -> String) -> Result<(), Stop> {
    if holds {
        return Ok(());
    }
    Err(Stop::Finding(evidence()))
}

impl<'a> Subject<'a> {
    pub(super) fn new(target: &'a Target, deadline: Instant) -> Self {
        Self { target, deadline }
    }

    /// For a new session, which has the rest of the check's time.
    pub(super) fn target(&self) -> Target {
        let left = self.deadline.saturating_duration_since(Instant::now());
        Target {
            // Connecting within no time at all is an error of the call, not a deadline.
            timeout: left.max(Duration::from_millis(1)),
            ..self.target.clone()
        }
    }

    pub(super) fn export(&self) -> &'a ExportName {
        &self.target.export
    }

    /// A name that is most likely no export; if it is one, it is another than ours.
    pub(super) fn other_export(&self) -> ExportName {
        let name = self.target.export.as_str();
        let end = name.floor_char_boundary(crate::nbd::MAX_STRING - 6);
        ExportName::try_from(format!("{}-other", &name[..end]).as_str()).unwrap_or_default()
    }

    /// A session that is past all doubt of our own certificate: the server has told us about the export.
    pub(super) fn admitted(&self) -> Result<(ProbeSession, ExportInfo), Stop> {
        let mut probe = ProbeSession::connect(&self.target())?;
        match probe.info(self.export())? {
            Ok(info) => Ok((probe, info)),
            Err(refusal) => Err(Stop::Inapplicable(format!(
                "INFO about the export: {refusal}"
            ))),
        }
    }

    /// Begins transmission on a session that was admitted.
    pub(super) fn go(&self, probe: ProbeSession) -> Result<Transmitting, Stop> {
        probe.go(self.export()).map_err(broke)
    }
}

/// The length of a request that every export of that kind must answer; `None` for an empty one.
pub(super) fn one_block(info: &ExportInfo) -> Option<u32> {
    let minimum = info.block_sizes.map_or(512, |sizes| sizes.minimum.max(512));
    let length = u64::from(minimum).min(info.size);
    u32::try_from(length).ok().filter(|length| *length > 0)
}

/// BLOCK_STATUS where no context is valid must be refused with EINVAL.
pub(super) fn require_no_contexts(session: &mut Transmitting, length: u32) -> Result<(), Stop> {
    let reply = session.block_status(0, length).map_err(broke)?;
    let errno = reply.errno();
    require(errno == Errno::EINVAL, || match errno {
        Errno::OK => format!("BLOCK_STATUS was answered: {}", shape(&reply)),
        errno => format!("BLOCK_STATUS was refused with {errno}, not with EINVAL"),
    })
}

/// READ without structured replies must be answered with a simple reply, or the kernel driver gives up (K1).
pub(super) fn require_simple_read(session: &mut Transmitting, length: u32) -> Result<(), Stop> {
    let reply = session.read(0, length).map_err(broke)?;
    require(
        matches!(
            reply,
            Reply::Simple {
                errno: Errno::OK,
                ..
            }
        ),
        || {
            format!(
                "READ of {length} bytes at 0 was answered with {}",
                shape(&reply)
            )
        },
    )
}

/// A reply in a few words.
pub(super) fn shape(reply: &Reply) -> String {
    match reply {
        Reply::Simple { errno, data } if *errno == Errno::OK => {
            format!("a simple reply of {} bytes", data.len())
        }
        Reply::Simple { errno, .. } => format!("the error {errno} in a simple reply"),
        Reply::Structured(chunks) if reply.errno() == Errno::OK => {
            format!("{} structured chunks", chunks.len())
        }
        Reply::Structured(_) => format!("the error {} in a structured reply", reply.errno()),
    }
}
