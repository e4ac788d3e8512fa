//! What the checks are, for `--list` and `--explain`.

use std::fmt::Write;
use std::io;

use anyhow::{Result, anyhow};

use super::Format;
use super::json::pretty;
use super::layout::{Layout, columns};
use crate::verify::{CHECKS, Check, Needs, check};

/// All checks, in the order of a session's life: as a table, or as JSON.
pub(super) fn list(format: Format) -> Result<String> {
    match format {
        Format::Json => pretty(&CHECKS),
        Format::Text => Ok(table(columns(&io::stdout()))),
        Format::Junit => Err(no_junit()),
    }
}

/// One check, in full.
pub(super) fn explain(id: &str, format: Format) -> Result<String> {
    let check = check(id).ok_or_else(|| anyhow!(unknown(id)))?;
    match format {
        Format::Json => pretty(&check),
        Format::Text => Ok(page(check, Layout::of_stdout())),
        Format::Junit => Err(no_junit()),
    }
}

/// Says that there is no such check, and what may have been meant.
pub(super) fn unknown(name: &str) -> String {
    let near: Vec<_> = CHECKS
        .iter()
        .map(|check| check.id)
        .filter(|id| id.split('-').any(|word| name.split('-').any(|n| n == word)))
        .take(6)
        .collect();
    let mut text = format!("no check and no group of checks has the name {name:?}");
    match near.as_slice() {
        [] => text.push_str("; --list says which there are"),
        near => {
            let _ = write!(text, "; there are {} and others (--list)", near.join(", "));
        }
    }
    text
}

fn no_junit() -> anyhow::Error {
    anyhow!("JUnit XML tells of a run: use --format text or json here")
}

/// A line for each check, cut to fit a terminal, and only there.
fn table(width: Option<usize>) -> String {
    let mut out = String::new();
    let longest = CHECKS.iter().map(|check| check.id.len()).max().unwrap_or(0);
    let mut group = None;
    for check in CHECKS {
        if group != Some(check.group) {
            let _ = writeln!(out, "{}:", check.group);
            group = Some(check.group);
        }
        let mut line = format!(
            "  {:<longest$}  {:<16}  {:<9}  {}",
            check.id,
            check.severity.to_string(),
            option(check.needs),
            check.title
        );
        if let Some(width) = width
            && let Some((end, _)) = line.char_indices().nth(width)
        {
            line.truncate(end);
        }
        let _ = writeln!(out, "{}", line.trim_end());
    }
    out
}

/// What allows a check.
fn option(needs: Needs) -> &'static str {
    match needs {
        Needs::Nothing => "",
        Needs::Write => "write",
        Needs::Intrusive => "intrusive",
    }
}

fn page(check: &Check, layout: Layout) -> String {
    let mut out = String::new();
    let rules: Vec<_> = check.rules.iter().map(|rule| format!("C{rule}")).collect();
    let needs = match check.needs {
        Needs::Nothing => "nothing: it only reads",
        Needs::Write => "--write --yes: it overwrites the export",
        Needs::Intrusive => "--intrusive: it tries to exhaust the server",
    };
    layout.paragraph(&mut out, "", 0, check.id);
    for (label, text) in [
        ("wanted", check.title),
        ("why", check.why),
        ("severity", &check.severity.to_string()),
        ("group", &check.group.to_string()),
        ("see", check.section),
        ("needs", needs),
        ("rules", &rules.join(", ")),
    ] {
        if !text.is_empty() {
            layout.paragraph(&mut out, &format!("  {label:<10}"), 12, text);
        }
    }
    out
}
