//! Which checks a user wants, and what the user allows.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Result, bail, ensure};

use super::catalogue::unknown;
use crate::verify::{CHECKS, Check, Needs, Selection};

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Checks")]
pub(super) struct Choice {
    /// Make only these checks; groups of checks go by their names, too (see --list).
    #[arg(long = "check", value_name = "CHECK|GROUP", value_delimiter = ',')]
    checks: Vec<String>,
    /// Leave these checks or groups out.
    #[arg(long, value_name = "CHECK|GROUP", value_delimiter = ',')]
    skip: Vec<String>,
    /// Make the checks that OVERWRITE THE EXPORT as well. What it held is lost: only for an export made for it.
    #[arg(long, requires = "yes")]
    write: bool,
    /// Yes, what the export holds may be destroyed.
    #[arg(long, requires = "write")]
    yes: bool,
    /// Make the checks that try to exhaust the server as well: its other clients may feel them.
    #[arg(long)]
    intrusive: bool,
    /// Seconds that each check has.
    #[arg(long, value_name = "SECONDS", default_value_t = 15, value_parser = clap::value_parser!(u64).range(1..=600))]
    pub(super) timeout: u64,
    /// Seconds after which no further check begins.
    #[arg(long, value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    limit: u64,
}

impl Choice {
    pub(super) fn selection(&self) -> Result<Selection> {
        let wanted = named(&self.checks)?;
        let skipped = named(&self.skip)?;
        let ids: Vec<String> = CHECKS
            .iter()
            .filter(|check| wanted.is_empty() || wanted.contains(check.id))
            .filter(|check| !skipped.contains(check.id))
            .map(|check| check.id.to_owned())
            .collect();
        ensure!(
            !ids.is_empty(),
            "no check is left: --skip leaves out all that --check asks for"
        );
        // Where all are asked for, those that are not allowed are merely left out.
        for check in CHECKS {
            if self.checks.iter().any(|name| name == check.id) {
                self.allows(check)?;
            }
        }
        Ok(Selection {
            write: self.write,
            intrusive: self.intrusive,
            only: ids,
            limit: Duration::from_secs(self.limit),
            ..Selection::default()
        })
    }

    fn allows(&self, check: &Check) -> Result<()> {
        let id = check.id;
        match check.needs {
            Needs::Write if !self.write => {
                bail!("the check {id} overwrites the export: allow it with --write --yes")
            }
            Needs::Intrusive if !self.intrusive => {
                bail!("the check {id} tries to exhaust the server: allow it with --intrusive")
            }
            _ => Ok(()),
        }
    }
}

/// The ids of the checks that are meant by ids or names of groups.
fn named(names: &[String]) -> Result<BTreeSet<&'static str>> {
    let mut ids = BTreeSet::new();
    for name in names {
        let meant: Vec<_> = CHECKS
            .iter()
            .filter(|check| check.id == name || check.group.to_string() == *name)
            .map(|check| check.id)
            .collect();
        ensure!(!meant.is_empty(), unknown(name));
        ids.extend(meant);
    }
    Ok(ids)
}
