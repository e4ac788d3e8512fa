//! `hawser verify`: the battery for people and for pipelines, against any NBD server.
//!
//! Nothing here judges a server; the checks do. Here is what surrounds them: whom to ask and as whom, what the user
//! allows, how the findings are told, and what the exit status says. Whatever a server sent is escaped before it is
//! printed.

mod catalogue;
mod conclusion;
mod escape;
mod identity;
mod interrupt;
mod json;
mod junit;
mod layout;
mod place;
mod progress;
mod selection;
#[cfg(test)]
mod tests;
mod text;

use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};

use self::conclusion::{Conclusion, FailOn};
use self::identity::Certificates;
use self::interrupt::Interrupt;
use self::layout::Layout;
use self::progress::Bar;
use self::selection::Choice;
use super::{Cancel, Server, run as make};
use crate::nbd::Uri;

/// Exit status where the server could not be examined, which includes a command line that makes no sense.
pub const COULD_NOT_RUN: u8 = 2;

/// Examine an NBD server: is its TLS real, and its negotiation right?
///
/// The server's content is only read, and the server is not strained, unless --write or --intrusive ask for it.
///
/// Exit status: 0 all checks were made, and nothing at or above --fail-on was found; 1 something was; 2 the server, or
/// a part of it, could not be examined; 128 and the signal's number where one ended the run.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The export, as nbds://HOST[:PORT]/EXPORT, nbd://..., nbds+unix:///EXPORT?socket=PATH or nbd+unix:///...
    ///
    /// With the parameters tls-certificates=DIRECTORY and tls-hostname=NAME, as libnbd has them.
    #[arg(required_unless_present_any = ["list", "explain"])]
    uri: Option<Uri>,
    #[command(flatten)]
    certificates: Certificates,
    #[command(flatten)]
    choice: Choice,
    #[command(flatten)]
    reports: Reports,
    /// Say what all checks are, and make none.
    #[arg(long, conflicts_with_all = ["uri", "explain"])]
    list: bool,
    /// Say what a check asks, where the specification says so, and why it matters; make none.
    #[arg(long, value_name = "CHECK", conflicts_with = "uri")]
    explain: Option<String>,
}

/// What is told of the run, and where.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Reports")]
struct Reports {
    /// What goes to standard output.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
    /// Write a JSON report to a file as well.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write a JUnit report to a file as well.
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
    /// The least severity of a finding that makes the exit status 1.
    #[arg(long, value_enum, default_value_t = FailOn::Interoperability)]
    fail_on: FailOn,
    /// Do not mind checks that could not be made: without it they make the exit status 2.
    #[arg(long)]
    partial: bool,
    /// In the text, name the checks that passed or do not apply, too.
    #[arg(long, short)]
    verbose: bool,
    /// Show no progress on the terminal.
    #[arg(long, short)]
    quiet: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    Text,
    Json,
    Junit,
}

/// Carries out the command; the exit status is the result in every case.
#[must_use]
pub fn run(args: &Args) -> ExitCode {
    let result = match (&args.uri, &args.explain) {
        (_, Some(id)) => catalogue::explain(id, args.reports.format).and_then(|text| say(&text)),
        (Some(uri), None) => return ExitCode::from(examine(args, uri).unwrap_or_else(failed)),
        (None, None) => catalogue::list(args.reports.format).and_then(|text| say(&text)),
    };
    ExitCode::from(result.map_or_else(failed, |()| 0))
}

fn failed(error: anyhow::Error) -> u8 {
    complain(&format!("{error:#}"));
    COULD_NOT_RUN
}

fn examine(args: &Args, uri: &Uri) -> Result<u8> {
    let selection = args.choice.selection()?;
    let (server_name, identities) = args.certificates.load(uri)?;
    for note in &identities.notes {
        complain(note);
    }
    // Before minutes of work, not after.
    let json = create(args.reports.json.as_ref())?;
    let junit = create(args.reports.junit.as_ref())?;
    let timeout = Duration::from_secs(args.choice.timeout);
    let server = Server {
        address: place::find(&uri.endpoint, timeout)?,
        export: uri.export.clone(),
        identity: identities.ours,
        server_name,
        other: identities.other,
        expired: identities.expired,
        timeout,
    };
    let cancel = Cancel::new();
    let interrupt = Interrupt::watch(&cancel).context("watch for Ctrl-C")?;
    let report = {
        let bar = Bar::on_stderr(args.reports.quiet);
        make(
            &server,
            &selection,
            &|progress| bar.show(&progress),
            &cancel,
        )
    };
    let conclusion = Conclusion {
        uri,
        report: &report,
        selection: &selection,
        fail_on: args.reports.fail_on,
        partial: args.reports.partial,
        signal: interrupt.signal(),
    };
    if let Some((path, mut file)) = json {
        file.write_all(json::document(&conclusion)?.as_bytes())
            .with_context(|| format!("write the JSON report to {}", path.display()))?;
    }
    if let Some((path, mut file)) = junit {
        file.write_all(junit::document(&conclusion).as_bytes())
            .with_context(|| format!("write the JUnit report to {}", path.display()))?;
    }
    let output = match args.reports.format {
        Format::Text => text::document(&conclusion, Layout::of_stdout(), args.reports.verbose),
        Format::Json => json::document(&conclusion)?,
        Format::Junit => junit::document(&conclusion),
    };
    say(&output)?;
    Ok(conclusion.exit_status())
}

fn create(path: Option<&PathBuf>) -> Result<Option<(&PathBuf, File)>> {
    path.map(|path| {
        File::create(path)
            .map(|file| (path, file))
            .with_context(|| format!("create the report {}", path.display()))
    })
    .transpose()
}

/// Writes to standard output. Whoever reads it may have had enough, which is no error.
fn say(text: &str) -> Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
    {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(error).context("write to standard output")
        }
        _ => Ok(()),
    }
}

/// Writes a line to standard error, if that is still there.
fn complain(text: &str) {
    let _ = writeln!(io::stderr().lock(), "hawser: {}", escape::printable(text));
}
