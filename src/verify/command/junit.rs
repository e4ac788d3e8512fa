//! The report for continuous integration, as JUnit XML: a suite for each group, a case for each check.
//!
//! A case fails where the finding weighs enough for the exit status; a lighter one is told in the case's output. A check
//! that could not be made is an error, unless the user does not mind.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

use super::conclusion::Conclusion;
use super::escape::xml;
use crate::verify::{Examined, Group, Outcome};

pub(super) fn document(conclusion: &Conclusion<'_>) -> String {
    let mut groups: BTreeMap<Group, Vec<&Examined>> = BTreeMap::new();
    for examined in &conclusion.report.results {
        groups
            .entry(examined.check.group)
            .or_default()
            .push(examined);
    }
    let all: Vec<_> = conclusion.report.results.iter().collect();
    let mut out = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
    let _ = writeln!(
        out,
        "<testsuites name=\"hawser verify {}\"{} time=\"{}\">",
        xml(&conclusion.uri.to_string()),
        counts(conclusion, &all),
        seconds(conclusion.report.duration)
    );
    for (group, examined) in groups {
        let time = examined.iter().map(|examined| examined.duration).sum();
        let _ = writeln!(
            out,
            "  <testsuite name=\"{group}\"{} time=\"{}\">",
            counts(conclusion, &examined),
            seconds(time)
        );
        for examined in examined {
            case(&mut out, conclusion, examined);
        }
        out.push_str("  </testsuite>\n");
    }
    out.push_str("</testsuites>\n");
    out
}

/// How a check shows.
enum Shown {
    Passed,
    Failure,
    Lighter,
    Skipped,
    Error,
}

fn shown(conclusion: &Conclusion<'_>, examined: &Examined) -> Shown {
    match examined.outcome {
        Outcome::Passed { .. } => Shown::Passed,
        Outcome::Finding { .. } if conclusion.weighs(examined) => Shown::Failure,
        Outcome::Finding { .. } => Shown::Lighter,
        Outcome::NotRun { .. } if !conclusion.partial => Shown::Error,
        Outcome::NotRun { .. } | Outcome::Inapplicable { .. } => Shown::Skipped,
    }
}

fn counts(conclusion: &Conclusion<'_>, examined: &[&Examined]) -> String {
    let (mut failures, mut errors, mut skipped) = (0, 0, 0);
    for examined in examined {
        match shown(conclusion, examined) {
            Shown::Failure => failures += 1,
            Shown::Error => errors += 1,
            Shown::Skipped => skipped += 1,
            Shown::Passed | Shown::Lighter => {}
        }
    }
    format!(
        " tests=\"{}\" failures=\"{failures}\" errors=\"{errors}\" skipped=\"{skipped}\"",
        examined.len()
    )
}

fn case(out: &mut String, conclusion: &Conclusion<'_>, examined: &Examined) {
    let check = examined.check;
    let text = xml(examined.text());
    let explained = format!(
        "wanted: {}\nspecification: {}\nwhy it matters: {}",
        xml(check.title),
        xml(check.section),
        xml(check.why)
    );
    let _ = write!(
        out,
        "    <testcase classname=\"hawser.verify.{}\" name=\"{}\" time=\"{}\"",
        check.group,
        xml(check.id),
        seconds(examined.duration)
    );
    let _ = match shown(conclusion, examined) {
        Shown::Passed => writeln!(out, "/>"),
        Shown::Failure => writeln!(
            out,
            "><failure type=\"{}\" message=\"{text}\">{explained}</failure></testcase>",
            check.severity
        ),
        Shown::Lighter => writeln!(
            out,
            "><system-out>{} finding: {text}\n{explained}</system-out></testcase>",
            check.severity
        ),
        Shown::Skipped => writeln!(out, "><skipped message=\"{text}\"/></testcase>"),
        Shown::Error => writeln!(
            out,
            "><error type=\"could not be made\" message=\"{text}\"/></testcase>"
        ),
    };
}

fn seconds(duration: Duration) -> String {
    format!("{:.3}", duration.as_secs_f64())
}
