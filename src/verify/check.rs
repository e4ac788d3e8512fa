//! What a check is, and what it can come to.

use std::fmt;

use serde::Serialize;

use super::failure::Failure;
use super::subject::Subject;

/// Bytes of an outcome's text.
const TEXT: usize = 400;

/// One question put to a server.
#[derive(Debug, Serialize)]
pub struct Check {
    /// Stable: reports are compared by it.
    pub id: &'static str,
    /// What the server ought to do.
    pub title: &'static str,
    pub group: Group,
    /// The heading in the specification, `doc/proto.md`, and the entry under it.
    pub section: &'static str,
    pub severity: Severity,
    /// What a failure means to the one who stores data there.
    pub why: &'static str,
    /// What the server or its data must bear for it.
    pub needs: Needs,
    /// The rules of `docs/protocol.md` (C1 to C64) that it puts to the test.
    #[serde(skip)]
    pub rules: &'static [u8],
    /// Whether it is made before every attach.
    #[serde(skip)]
    pub attach: bool,
    #[serde(skip)]
    pub(super) scope: Scope,
    #[serde(skip)]
    pub(super) question: fn(&Subject<'_>) -> Result<String, Stop>,
}

/// The part of a session's life that a check belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Group {
    Greeting,
    Options,
    Plaintext,
    Starttls,
    Certificates,
    Secured,
    Contexts,
    Transmission,
    Robustness,
    Resources,
}

/// What a finding puts at risk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The specification recommends otherwise, or good practice does; no client need notice.
    Style,
    /// Some clients will not get along with the server.
    Interoperability,
    /// What is read may be wrong, or what was written may be lost.
    Data,
    /// Somebody on the network, or with another certificate, can do what they must not.
    Security,
}

/// What a check does to a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Needs {
    /// It reads, and asks for little.
    Nothing,
    /// It overwrites the export's content, and does not restore it.
    Write,
    /// It tries to exhaust the server, which other clients may feel.
    Intrusive,
}

/// Where a check can be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scope {
    /// Wherever a server listens.
    Always,
    /// Where fixed newstyle is spoken.
    Newstyle,
    /// Where STARTTLS is accepted.
    Tls,
    /// Where nothing is to be had without TLS.
    Forced,
    /// Where some things are to be had without TLS.
    Selective,
    /// Inside TLS.
    Secured,
    /// Where the export is to be had: inside TLS where there is TLS.
    Session,
    /// As `Session`, and whether it is to be had is the question.
    Gate,
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
    /// The question could not be put.
    NotRun(String),
    /// A finding where the server broke the protocol; otherwise the question was never put.
    Session(Failure),
}

impl Check {
    /// What the fields of most checks are.
    pub(super) const USUAL: Self = Self {
        id: "",
        title: "",
        group: Group::Greeting,
        section: "",
        severity: Severity::Interoperability,
        why: "",
        needs: Needs::Nothing,
        rules: &[],
        attach: false,
        scope: Scope::Session,
        question: |_| Err(Stop::NotRun(String::new())),
    };

    pub(super) fn run(&self, subject: &Subject<'_>) -> Outcome {
        let outcome = match (self.question)(subject) {
            Ok(seen) => Outcome::Passed { seen },
            Err(Stop::Finding(evidence)) => Outcome::Finding { evidence },
            Err(Stop::Inapplicable(reason)) => Outcome::Inapplicable { reason },
            Err(Stop::NotRun(reason)) => Outcome::NotRun { reason },
            Err(Stop::Session(failure)) if failure.is_violation() => Outcome::Finding {
                evidence: failure.to_string(),
            },
            Err(Stop::Session(failure)) => Outcome::NotRun {
                reason: failure.to_string(),
            },
        };
        outcome.brief()
    }
}

impl Outcome {
    /// Its evidence, or what else there is to say.
    #[must_use]
    pub fn text(&self) -> &str {
        match self {
            Self::Passed { seen: text }
            | Self::Finding { evidence: text }
            | Self::Inapplicable { reason: text }
            | Self::NotRun { reason: text } => text,
        }
    }

    /// What a server said can be long, and holds what it likes; reports end in events and terminals.
    pub(super) fn brief(mut self) -> Self {
        let (Self::Passed { seen: text }
        | Self::Finding { evidence: text }
        | Self::Inapplicable { reason: text }
        | Self::NotRun { reason: text }) = &mut self;
        *text = brief(text);
        self
    }
}

/// A text that is short and safe to print.
pub(super) fn brief(text: &str) -> String {
    let mut short: String = text
        .chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect();
    if short.len() > TEXT {
        short.truncate(short.floor_char_boundary(TEXT));
        short.push('…');
    }
    short
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Self {
        Self::Session(failure)
    }
}

/// A session that went well so far and then broke: whatever the reason, the server is the one to ask.
pub(super) fn broke(failure: Failure) -> Stop {
    if matches!(*failure.reason, crate::client::Reason::Cancelled) {
        return Stop::Session(failure);
    }
    Stop::Finding(failure.to_string())
}

/// As `broke`, for so many bytes that a slow network may not carry them in time.
pub(super) fn broke_or_slow(failure: Failure) -> Stop {
    if matches!(*failure.reason, crate::client::Reason::TimedOut(_)) {
        let advice = "a server that hangs, or a slow network: a longer timeout tells";
        return Stop::NotRun(format!("{failure}: {advice}"));
    }
    broke(failure)
}

pub(super) fn require(holds: bool, evidence: impl FnOnce() -> String) -> Result<(), Stop> {
    if holds {
        return Ok(());
    }
    Err(Stop::Finding(evidence()))
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Greeting => "greeting",
            Self::Options => "options",
            Self::Plaintext => "plaintext",
            Self::Starttls => "starttls",
            Self::Certificates => "certificates",
            Self::Secured => "secured",
            Self::Contexts => "contexts",
            Self::Transmission => "transmission",
            Self::Robustness => "robustness",
            Self::Resources => "resources",
        })
    }
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Style => "style",
            Self::Interoperability => "interoperability",
            Self::Data => "data",
            Self::Security => "security",
        })
    }
}
