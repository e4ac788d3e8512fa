//! The host's half: which kernels, which scenarios, and what became of them.

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hawser::demo::uml::{Access, Error, Kernel, Machine, Outcome};

use crate::inside::{self, Report};
use crate::{Scenario, kernels, scenarios};

/// What a machine needs besides its scenarios: to start, and to end.
const MARGIN: Duration = Duration::from_secs(60);

#[derive(Default)]
struct Arguments {
    kernel: Option<String>,
    list: bool,
    run: Option<Vec<String>>,
    filters: Vec<String>,
}

impl Arguments {
    fn parse(arguments: &[String]) -> Result<Self> {
        let mut parsed = Self::default();
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            match argument.as_str() {
                "--kernel" => {
                    parsed.kernel = Some(rest.next().context("--kernel VERSION")?.clone());
                }
                "--list" => parsed.list = true,
                "--run" => {
                    let command: Vec<String> = rest.by_ref().cloned().collect();
                    ensure!(!command.is_empty(), "--run COMMAND [ARGUMENT...]");
                    parsed.run = Some(command);
                }
                option if option.starts_with('-') => bail!("unknown option {option}"),
                filter => parsed.filters.push(filter.to_owned()),
            }
        }
        Ok(parsed)
    }

    fn wants(&self, scenario: &Scenario) -> bool {
        self.filters.is_empty() || self.filters.iter().any(|part| scenario.name.contains(part))
    }
}

#[derive(Default)]
struct Tally {
    passed: usize,
    failed: usize,
}

impl Tally {
    fn count(&mut self, kernel: &Kernel, name: &str, passed: bool, took: Duration, detail: &str) {
        if passed {
            self.passed += 1;
        } else {
            self.failed += 1;
        }
        let verdict = if passed { "ok" } else { "FAILED" };
        println!(
            "kernel {} {name} {verdict} {:.1}s",
            kernel.version(),
            took.as_secs_f64()
        );
        if !passed {
            for line in detail.lines() {
                println!("    {line}");
            }
        }
    }
}

pub(crate) fn main(arguments: &[String]) -> Result<ExitCode> {
    let arguments = Arguments::parse(arguments)?;
    if arguments.list {
        for scenario in scenarios().filter(|scenario| arguments.wants(scenario)) {
            println!("{}: test", scenario.name);
        }
        return Ok(ExitCode::SUCCESS);
    }
    let mut kernels = kernels::all()?;
    if let Some(wanted) = &arguments.kernel {
        kernels.retain(|kernel| kernel.version().starts_with(wanted));
        ensure!(
            !kernels.is_empty(),
            "no kernel here has a version that begins with {wanted}"
        );
    }
    if let Some(command) = &arguments.run {
        return run(&kernels[0], command);
    }

    let mut tally = Tally::default();
    for kernel in &kernels {
        let mut sets: Vec<&[&str]> = scenarios().map(|scenario| scenario.without).collect();
        sets.sort_unstable();
        sets.dedup();
        for without in sets {
            let pending: Vec<&Scenario> = scenarios()
                .filter(|scenario| scenario.without == without && arguments.wants(scenario))
                .collect();
            test(kernel, without, pending, &mut tally)?;
        }
    }
    println!("kernel: {} passed, {} failed", tally.passed, tally.failed);
    ensure!(
        tally.passed + tally.failed > 0,
        "no scenario has such a name"
    );
    Ok(ExitCode::from(u8::from(tally.failed > 0)))
}

/// One machine after the other, until no scenario is left.
fn test(
    kernel: &Kernel,
    without: &[&str],
    mut pending: Vec<&Scenario>,
    tally: &mut Tally,
) -> Result<()> {
    while !pending.is_empty() {
        let deadline = pending
            .iter()
            .map(|scenario| scenario.deadline)
            .sum::<Duration>()
            + MARGIN;
        let machine = without
            .iter()
            .fold(machine(kernel)?, |machine, module| machine.without(module))
            .deadline(deadline);
        let mut command = vec![executable()?, inside::ALL.to_owned()];
        command.extend(pending.iter().map(|scenario| scenario.name.to_owned()));

        let mut detail = String::new();
        let mut since = Instant::now();
        let mut done = 0;
        let outcome = machine.run(&command, |line| match Report::parse(line) {
            Some(report) => {
                tally.count(
                    kernel,
                    pending[done].name,
                    report.passed,
                    report.took,
                    &detail,
                );
                detail.clear();
                since = Instant::now();
                done += 1;
            }
            None => {
                detail.push_str(line);
                detail.push('\n');
            }
        });
        let unfinished = match outcome {
            Ok(Outcome { status: 0, .. }) => None,
            Ok(Outcome { status, console }) => {
                Some(format!("exit status {status}; console:\n{console}"))
            }
            Err(error @ (Error::TimedOut { .. } | Error::Died { .. })) => Some(error.to_string()),
            Err(error) => return Err(error.into()),
        };
        // A machine that ended of itself after a failure has told of it; one that did not has one to tell of.
        match unfinished {
            Some(reason) if done < pending.len() => {
                let detail = format!("{detail}{reason}");
                tally.count(kernel, pending[done].name, false, since.elapsed(), &detail);
                done += 1;
            }
            None if done == 0 => bail!("the machine ended well and reported nothing:\n{detail}"),
            _ => {}
        }
        pending.drain(..done);
    }
    Ok(())
}

/// Runs a command of the developer's in a machine like the scenarios'.
fn run(kernel: &Kernel, command: &[String]) -> Result<ExitCode> {
    let outcome = machine(kernel)?.run(command, |line| println!("{line}"))?;
    if outcome.status != 0 {
        eprintln!("{}", outcome.console);
    }
    Ok(ExitCode::from(
        u8::try_from(outcome.status).unwrap_or(u8::MAX),
    ))
}

/// A machine that sees the checkout and what was built from it.
fn machine(kernel: &Kernel) -> Result<Machine> {
    let built = Path::new(env!("CARGO_BIN_EXE_hawser"))
        .parent()
        .context("the build's folder")?;
    Ok(Machine::new(kernel.clone())
        .memory_mib(1536)
        .share(Access::ReadOnly, Path::new(env!("CARGO_MANIFEST_DIR")))
        .share(Access::ReadOnly, built)
        .share(Access::ReadOnly, &kernels::cache()?)
        .environment("HAWSER_CACHE", kernels::cache()?)
        .environment("RUST_BACKTRACE", "1"))
}

fn executable() -> Result<String> {
    let path = std::env::current_exe().context("this executable")?;
    path.into_os_string()
        .into_string()
        .ok()
        .context("an executable whose path is UTF-8")
}
