//! What a finding means for the attach.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::Report;

/// Set for each StorageClass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// No attach with a finding, or with a check that could not be made.
    #[default]
    Strict,
    /// Findings are reported, and the attach goes on.
    Warn,
    /// The battery is not run.
    Off,
}

/// A word that is no policy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a verification policy: expected strict, warn or off")]
pub struct UnknownPolicy(String);

/// An attach that must not go on; the message names each reason.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the server of export {export:?} failed verification, and the policy is strict: {}; mend the server, or set the policy to warn",
    .reasons.join("; ")
)]
pub struct Refused {
    export: String,
    reasons: Vec<String>,
}

impl Policy {
    /// Whether the attach may go on after this report.
    pub fn decide(self, report: &Report) -> Result<(), Refused> {
        if self != Self::Strict {
            return Ok(());
        }
        let reasons: Vec<String> = report
            .findings()
            .map(|examined| format!("{}: {}", examined.check.id, examined.text()))
            .chain(report.not_run().map(|examined| {
                format!(
                    "{} could not be checked: {}",
                    examined.check.id,
                    examined.text()
                )
            }))
            .collect();
        if reasons.is_empty() {
            return Ok(());
        }
        Err(Refused {
            export: report.export.clone(),
            reasons,
        })
    }
}

impl FromStr for Policy {
    type Err = UnknownPolicy;

    fn from_str(text: &str) -> Result<Self, UnknownPolicy> {
        match text {
            "strict" => Ok(Self::Strict),
            "warn" => Ok(Self::Warn),
            "off" => Ok(Self::Off),
            _ => Err(UnknownPolicy(text.chars().take(64).collect())),
        }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Strict => "strict",
            Self::Warn => "warn",
            Self::Off => "off",
        })
    }
}
