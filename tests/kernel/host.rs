//! The host's half: which kernels, which scenarios, and what became of them.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use hawser::demo::uml::{Access, Error, Kernel, Machine, Outcome};

use crate::inside::{self, Report};
use crate::{Scenario, hung, kernels, scenarios};

/// What a machine needs besides its scenarios: to start, and to end.
const MARGIN: Duration = Duration::from_secs(120);

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

    fn wants(&self, name: &str) -> bool {
        self.filters.is_empty() || self.filters.iter().any(|part| name.contains(part))
    }
}

/// Scenarios that passed and failed, on all kernels.
#[derive(Default)]
struct Tally {
    passed: AtomicUsize,
    failed: AtomicUsize,
}

impl Tally {
    fn count(&self, kernel: &Kernel, name: &str, passed: bool, took: Duration, detail: &str) {
        let count = if passed { &self.passed } else { &self.failed };
        count.fetch_add(1, Ordering::Relaxed);
        // Another kernel's lines must not come between these.
        let mut out = std::io::stdout().lock();
        let verdict = if passed { "ok" } else { "FAILED" };
        let head = format!("kernel {} {name} {verdict}", kernel.version());
        let _ = writeln!(out, "{head} {:.1}s", took.as_secs_f64());
        if !passed {
            for line in detail.lines() {
                let _ = writeln!(out, "    {line}");
            }
        }
    }
}

pub(crate) fn main(arguments: &[String]) -> Result<ExitCode> {
    let arguments = Arguments::parse(arguments)?;
    if arguments.list {
        let names = hung::TESTS.iter().map(|(name, _)| *name);
        for name in names.chain(scenarios().map(|scenario| scenario.name)) {
            if arguments.wants(name) {
                println!("{name}: test");
            }
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

    let tally = Tally::default();
    // A kernel has one processor, and so at least two of them have room beside each other.
    thread::scope(|scope| -> Result<()> {
        let running: Vec<_> = kernels
            .iter()
            .map(|kernel| scope.spawn(|| test_on(kernel, &arguments, &tally)))
            .collect();
        for kernel in running {
            kernel
                .join()
                .map_err(|_| anyhow!("a kernel's thread panicked"))??;
        }
        Ok(())
    })?;
    let (passed, failed) = (tally.passed.into_inner(), tally.failed.into_inner());
    println!("kernel: {passed} passed, {failed} failed");
    ensure!(passed + failed > 0, "no scenario has such a name");
    Ok(ExitCode::from(u8::from(failed > 0)))
}

/// The scenarios that are wanted, on machines that have what they need and lack what they must not have.
fn test_on(kernel: &Kernel, arguments: &Arguments, tally: &Tally) -> Result<()> {
    for (name, test) in hung::TESTS {
        if arguments.wants(name) {
            let started = Instant::now();
            let result = test(kernel);
            let detail = result
                .as_ref()
                .err()
                .map(|error| format!("{error:?}"))
                .unwrap_or_default();
            tally.count(kernel, name, result.is_ok(), started.elapsed(), &detail);
        }
    }
    let mut sets: Vec<&[&str]> = scenarios().map(|scenario| scenario.without).collect();
    sets.sort_unstable();
    sets.dedup();
    for without in sets {
        let pending: Vec<&Scenario> = scenarios()
            .filter(|scenario| scenario.without == without && arguments.wants(scenario.name))
            .collect();
        test(kernel, without, pending, tally)?;
    }
    Ok(())
}

/// One machine after the other, until no scenario is left.
fn test(
    kernel: &Kernel,
    without: &[&str],
    mut pending: Vec<&Scenario>,
    tally: &Tally,
) -> Result<()> {
    while !pending.is_empty() {
        let deadlines = pending.iter().map(|scenario| scenario.deadline);
        let machine = without
            .iter()
            .fold(machine(kernel)?, |machine, module| machine.without(module))
            .deadline(deadlines.clone().sum::<Duration>() + MARGIN)
            .silence(deadlines.max().unwrap_or_default() + MARGIN);
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
