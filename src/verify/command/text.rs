//! The report for people: what kind of server it is, what is wrong with it and why that matters, what is not known.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::conclusion::{Conclusion, Counts, Verdict};
use super::escape::printable;
use super::layout::Layout;
use crate::verify::{Examined, Outcome};

pub(super) fn document(conclusion: &Conclusion<'_>, layout: Layout, verbose: bool) -> String {
    let report = conclusion.report;
    let mut out = String::new();
    let place = format!("{} at {}", conclusion.uri, report.address);
    layout.paragraph(&mut out, "", 2, &printable(&place));
    if let Some(summary) = &report.summary {
        let mode = format!("{}: {}", summary.mode, summary.evidence);
        layout.paragraph(&mut out, "", 2, &printable(&mode));
        let features = summary.features.to_string();
        if !features.is_empty() {
            layout.paragraph(&mut out, "", 2, &printable(&features));
        }
    }
    if conclusion.verdict() == Verdict::Interrupted {
        out.push('\n');
        let text = "Interrupted: this is what was found until then.";
        layout.paragraph(&mut out, "", 2, text);
    }
    for finding in conclusion.ranked() {
        out.push('\n');
        describe(&mut out, layout, finding);
    }
    if verbose {
        out.push('\n');
        for examined in &report.results {
            line(&mut out, layout, examined);
        }
    }
    if !verbose {
        unknown(&mut out, layout, conclusion);
    }
    out.push('\n');
    layout.paragraph(&mut out, "", 2, &closing(conclusion));
    out
}

/// What is not known, by why it is not.
fn unknown(out: &mut String, layout: Layout, conclusion: &Conclusion<'_>) {
    let mut reasons: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for examined in conclusion.report.not_run() {
        let reason = examined.text();
        reasons.entry(reason).or_default().push(examined.check.id);
    }
    for (reason, ids) in reasons {
        out.push('\n');
        let all = ids.len() == conclusion.report.results.len();
        let checks = match ids.len() {
            _ if all => "None of the checks could be made".to_owned(),
            1 => "1 check could not be made".to_owned(),
            count => format!("{count} checks could not be made"),
        };
        let text = format!("{checks}: {}", printable(reason));
        layout.paragraph(out, "", 2, &text);
        if !all {
            layout.paragraph(out, "  ", 2, &ids.join(", "));
        }
    }
}

fn describe(out: &mut String, layout: Layout, finding: &Examined) {
    let check = finding.check;
    let severity = check.severity.to_string().to_uppercase();
    layout.paragraph(out, &format!("{severity}  "), 2, check.id);
    for (label, text) in [
        ("wanted", check.title),
        ("found", finding.text()),
        ("see", check.section),
        ("why", check.why),
    ] {
        layout.paragraph(out, &format!("  {label:<8}"), 10, &printable(text));
    }
}

fn line(out: &mut String, layout: Layout, examined: &Examined) {
    let mark = match examined.outcome {
        Outcome::Passed { .. } => "passed ",
        Outcome::Finding { .. } => "FINDING",
        Outcome::Inapplicable { .. } => "n/a    ",
        Outcome::NotRun { .. } => "not run",
    };
    let text = format!("{}: {}", examined.check.id, printable(examined.text()));
    layout.paragraph(out, &format!("{mark}  "), 9, &text);
}

fn closing(conclusion: &Conclusion<'_>) -> String {
    let (report, counts) = (conclusion.report, conclusion.counts());
    let Counts {
        passed,
        inapplicable,
        not_run,
        ..
    } = counts;
    let mut text = match counts.findings() {
        0 => "No findings".to_owned(),
        1 => "1 finding".to_owned(),
        count => format!("{count} findings"),
    };
    let severities: Vec<_> = counts
        .by_severity()
        .into_iter()
        .filter(|(_, count)| *count > 0)
        .map(|(severity, count)| format!("{count} {severity}"))
        .collect();
    if !severities.is_empty() {
        let _ = write!(text, " ({})", severities.join(", "));
    }
    let _ = write!(text, "; of {} checks {passed} passed", report.results.len());
    if not_run > 0 {
        let _ = write!(text, ", {not_run} could not be made");
    }
    if inapplicable > 0 {
        let _ = write!(text, ", {inapplicable} do not apply here");
    }
    let seconds = report.duration.as_secs_f64();
    let _ = write!(text, ". {seconds:.1} s");
    text
}
