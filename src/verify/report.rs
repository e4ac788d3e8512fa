//! What a battery found, for programs and for people.

use std::fmt;
use std::time::Duration;

use serde::{Serialize, Serializer};

use super::check::{Check, Outcome, Severity};
use super::mode::{Features, Mode};
use super::server::Address;

/// What is known of a server: the outcome of each check that was asked for, in the order of [`super::CHECKS`].
#[derive(Debug, Serialize)]
pub struct Report {
    pub address: Address,
    pub export: String,
    /// What kind of server it is, and how that was told; the battery before an attach does not ask.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub summary: Option<Summary>,
    pub results: Vec<Examined>,
    #[serde(rename = "duration_us", serialize_with = "microseconds")]
    pub duration: Duration,
}

/// What kind of server it is.
#[derive(Debug, Serialize)]
pub struct Summary {
    pub mode: Mode,
    pub evidence: String,
    #[serde(flatten)]
    pub features: Features,
}

/// One check's outcome.
#[derive(Debug, Serialize)]
pub struct Examined {
    #[serde(flatten)]
    pub check: &'static Check,
    #[serde(flatten)]
    pub outcome: Outcome,
    #[serde(rename = "duration_us", serialize_with = "microseconds")]
    pub duration: Duration,
}

impl Report {
    /// What is wrong with the server.
    pub fn findings(&self) -> impl Iterator<Item = &Examined> {
        self.results
            .iter()
            .filter(|examined| matches!(examined.outcome, Outcome::Finding { .. }))
    }

    /// The gravest of the findings.
    #[must_use]
    pub fn gravest(&self) -> Option<Severity> {
        self.findings()
            .map(|examined| examined.check.severity)
            .max()
    }

    /// What is not known about it.
    pub fn not_run(&self) -> impl Iterator<Item = &Examined> {
        self.results
            .iter()
            .filter(|examined| matches!(examined.outcome, Outcome::NotRun { .. }))
    }
}

impl Examined {
    /// Its evidence, or what else there is to say.
    #[must_use]
    pub fn text(&self) -> &str {
        self.outcome.text()
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.mode, self.evidence)?;
        let features = self.features.to_string();
        if features.is_empty() {
            return Ok(());
        }
        write!(f, ": {features}")
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let passed = self
            .results
            .iter()
            .filter(|examined| matches!(examined.outcome, Outcome::Passed { .. }))
            .count();
        write!(
            f,
            "verification of export {:?} at {}: {passed} of {} checks passed, ",
            self.export,
            self.address,
            self.results.len(),
        )?;
        match self.findings().count() {
            1 => f.write_str("1 finding")?,
            count => write!(f, "{count} findings")?,
        }
        match self.not_run().count() {
            0 => {}
            count => write!(f, ", {count} could not run")?,
        }
        write!(f, ", in {:.0} ms", milliseconds(self.duration))?;
        for examined in &self.results {
            write!(f, "\n{examined}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Examined {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = match self.outcome {
            Outcome::Passed { .. } => "passed ",
            Outcome::Finding { .. } => "FINDING",
            Outcome::Inapplicable { .. } => "n/a    ",
            Outcome::NotRun { .. } => "NOT RUN",
        };
        let Check {
            id,
            title,
            section,
            severity,
            why,
            ..
        } = self.check;
        let time = milliseconds(self.duration);
        write!(f, "  {mark}  {id:<32} {time:>6.1} ms  {}", self.text())?;
        if matches!(self.outcome, Outcome::Finding { .. }) {
            write!(
                f,
                "\n           wanted: {title}\n           {severity}: {why}\n           see \"{section}\""
            )?;
        }
        Ok(())
    }
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn microseconds<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(u64::try_from(duration.as_micros()).unwrap_or(u64::MAX))
}
