//! What the host makes of machines that do not end well. Every other test relies on it.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hawser::demo::uml::{Error, Kernel, Machine, Outcome};

type Test = fn(&Kernel) -> Result<()>;

pub(crate) const TESTS: [(&str, Test); 4] = [
    (
        "machine::its_exit_status_and_output_arrive",
        status_and_output,
    ),
    ("machine::a_silent_one_is_killed", silent),
    ("machine::a_panic_is_told", panic),
    ("machine::a_restart_ends_it", restart),
];

/// Long enough to start, and far from a scenario's deadline.
const PATIENCE: Duration = Duration::from_secs(60);

fn shell(machine: &Machine, script: &str, lines: &mut Vec<String>) -> Result<Outcome, Error> {
    machine.run(&["sh", "-c", script], |line| lines.push(line.to_owned()))
}

fn status_and_output(kernel: &Kernel) -> Result<()> {
    let mut lines = Vec::new();
    let machine = Machine::new(kernel.clone()).deadline(PATIENCE);
    let outcome = shell(&machine, "seq 1 20000; echo end >&2; exit 7", &mut lines)?;
    ensure!(outcome.status == 7, "exit status {}", outcome.status);
    let expected = (1..=20_000)
        .map(|number: u32| number.to_string())
        .chain(["end".to_owned()]);
    ensure!(
        lines.iter().cloned().eq(expected),
        "lines are missing or changed"
    );
    Ok(())
}

fn silent(kernel: &Kernel) -> Result<()> {
    let mut lines = Vec::new();
    let machine = Machine::new(kernel.clone()).silence(Duration::from_secs(20));
    let started = Instant::now();
    match shell(&machine, "echo said; sleep 1000", &mut lines) {
        Err(Error::TimedOut { .. }) => {}
        other => bail!("it ended: {other:?}"),
    }
    ensure!(lines == ["said"], "{lines:?}");
    ensure!(
        started.elapsed() < PATIENCE,
        "it took {:?}",
        started.elapsed()
    );
    nothing_left()
}

fn panic(kernel: &Kernel) -> Result<()> {
    let machine = Machine::new(kernel.clone()).deadline(PATIENCE);
    let script = "echo c >/proc/sysrq-trigger; sleep 1000";
    match shell(&machine, script, &mut Vec::new()) {
        Err(Error::Died { console }) => ensure!(console.contains("Kernel panic"), "{console}"),
        other => bail!("it ended: {other:?}"),
    }
    nothing_left()
}

/// User-mode Linux restarts by starting itself again, which would run the command a second time.
fn restart(kernel: &Kernel) -> Result<()> {
    let mut lines = Vec::new();
    let machine = Machine::new(kernel.clone()).deadline(PATIENCE);
    let script = "echo once; sleep 1; echo b >/proc/sysrq-trigger; sleep 1000";
    match shell(&machine, script, &mut lines) {
        Err(Error::Died { .. }) => {}
        other => bail!("it ended: {other:?}"),
    }
    ensure!(lines == ["once"], "{lines:?}");
    nothing_left()
}

/// Of all folders of this process's machines, only those that the other kernel's thread uses now are there.
fn nothing_left() -> Result<()> {
    let own = format!("hawser-uml-{}-", std::process::id());
    let mut folders = 0;
    for entry in fs::read_dir(std::env::temp_dir()).context("the temporary folder")? {
        folders += usize::from(entry?.file_name().to_string_lossy().starts_with(&own));
    }
    ensure!(folders <= 1, "{folders} folders of machines are left");
    Ok(())
}
