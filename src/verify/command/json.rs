//! The report for programs. Its form is documented in `docs/verify.md`: fields may be added under the same schema,
//! none is renamed or removed.

use anyhow::Result;
use serde::Serialize;

use super::conclusion::{Conclusion, Counts, FailOn, Verdict};
use super::escape::json;
use crate::verify::Report;

/// Changes when a program that reads reports must.
pub(super) const SCHEMA: &str = "hawser.dev/verify/1";

#[derive(Serialize)]
struct Document<'a> {
    schema: &'static str,
    hawser: &'static str,
    uri: String,
    verdict: Verdict,
    exit_status: u8,
    fail_on: FailOn,
    write: bool,
    intrusive: bool,
    counts: Counts,
    #[serde(flatten)]
    report: &'a Report,
}

pub(super) fn document(conclusion: &Conclusion<'_>) -> Result<String> {
    pretty(&Document {
        schema: SCHEMA,
        hawser: env!("CARGO_PKG_VERSION"),
        uri: conclusion.uri.to_string(),
        verdict: conclusion.verdict(),
        exit_status: conclusion.exit_status(),
        fail_on: conclusion.fail_on,
        write: conclusion.selection.write,
        intrusive: conclusion.selection.intrusive,
        counts: conclusion.counts(),
        report: conclusion.report,
    })
}

/// On several lines, and with nothing in it that a terminal would not print.
pub(super) fn pretty(value: &impl Serialize) -> Result<String> {
    let mut text = json(&serde_json::to_string_pretty(value)?);
    text.push('\n');
    Ok(text)
}
