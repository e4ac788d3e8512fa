//! What a run comes to: which findings weigh, and the exit status.

use serde::Serialize;

use super::COULD_NOT_RUN;
use crate::nbd::Uri;
use crate::verify::{Examined, Outcome, Report, Selection, Severity};

/// The least severity that makes a run fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum FailOn {
    Security,
    Data,
    Interoperability,
    Style,
    Never,
}

/// The word for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Verdict {
    /// All checks were made or do not apply, and no finding weighs enough.
    Passed,
    /// A finding weighs enough.
    Failed,
    /// Checks could not be made.
    Incomplete,
    /// A signal ended the run.
    Interrupted,
}

/// A run that is over, and how it is to be judged.
#[derive(Debug)]
pub(super) struct Conclusion<'a> {
    pub(super) uri: &'a Uri,
    pub(super) report: &'a Report,
    pub(super) selection: &'a Selection,
    pub(super) fail_on: FailOn,
    /// Checks that could not be made are in order.
    pub(super) partial: bool,
    /// What ended the run early.
    pub(super) signal: Option<u8>,
}

/// How many checks came to what.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(super) struct Counts {
    pub(super) passed: usize,
    pub(super) security: usize,
    pub(super) data: usize,
    pub(super) interoperability: usize,
    pub(super) style: usize,
    pub(super) inapplicable: usize,
    pub(super) not_run: usize,
}

impl FailOn {
    pub(super) fn includes(self, severity: Severity) -> bool {
        match self {
            Self::Security => severity >= Severity::Security,
            Self::Data => severity >= Severity::Data,
            Self::Interoperability => severity >= Severity::Interoperability,
            Self::Style => true,
            Self::Never => false,
        }
    }
}

impl Conclusion<'_> {
    pub(super) fn verdict(&self) -> Verdict {
        if self.signal.is_some() {
            return Verdict::Interrupted;
        }
        if self.report.findings().any(|finding| self.weighs(finding)) {
            return Verdict::Failed;
        }
        if !self.partial && self.report.not_run().next().is_some() {
            return Verdict::Incomplete;
        }
        Verdict::Passed
    }

    /// Whether a finding is one that makes the run fail.
    pub(super) fn weighs(&self, finding: &Examined) -> bool {
        self.fail_on.includes(finding.check.severity)
    }

    pub(super) fn exit_status(&self) -> u8 {
        match self.verdict() {
            Verdict::Passed => 0,
            Verdict::Failed => 1,
            Verdict::Incomplete => COULD_NOT_RUN,
            // As shells say it.
            Verdict::Interrupted => self.signal.unwrap_or_default().saturating_add(128),
        }
    }

    /// The findings, the gravest first.
    pub(super) fn ranked(&self) -> Vec<&Examined> {
        let mut findings: Vec<_> = self.report.findings().collect();
        findings.sort_by_key(|finding| std::cmp::Reverse(finding.check.severity));
        findings
    }

    pub(super) fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        for examined in &self.report.results {
            *match (&examined.outcome, examined.check.severity) {
                (Outcome::Passed { .. }, _) => &mut counts.passed,
                (Outcome::Finding { .. }, Severity::Security) => &mut counts.security,
                (Outcome::Finding { .. }, Severity::Data) => &mut counts.data,
                (Outcome::Finding { .. }, Severity::Interoperability) => {
                    &mut counts.interoperability
                }
                (Outcome::Finding { .. }, Severity::Style) => &mut counts.style,
                (Outcome::Inapplicable { .. }, _) => &mut counts.inapplicable,
                (Outcome::NotRun { .. }, _) => &mut counts.not_run,
            } += 1;
        }
        counts
    }
}

impl Counts {
    pub(super) fn by_severity(self) -> [(Severity, usize); 4] {
        [
            (Severity::Security, self.security),
            (Severity::Data, self.data),
            (Severity::Interoperability, self.interoperability),
            (Severity::Style, self.style),
        ]
    }

    pub(super) fn findings(self) -> usize {
        self.by_severity().into_iter().map(|(_, count)| count).sum()
    }
}
