//! The machine's half: runs scenarios and tells the host, line by line on standard output.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal};

use crate::{Scenario, scenarios};

/// `ALL NAME...`: these scenarios, until one fails.
pub(crate) const ALL: &str = "--inside";
/// `ONE NAME`: this scenario, in this process.
pub(crate) const ONE: &str = "--scenario";

/// Begins a line that is a report, where any other belongs to the scenario that runs.
const MARK: &str = "\u{1}scenario ";
const LOG: &str = "/run/scenario.log";

/// What a kernel prints when something of it is broken.
const COMPLAINTS: [&str; 6] = [
    "BUG:",
    "WARNING:",
    "Oops",
    "general protection",
    "INFO: task ",
    "possible deadlock",
];

/// How a scenario ended, said on a line of its own after what it printed.
pub(crate) struct Report {
    pub(crate) passed: bool,
    pub(crate) took: Duration,
}

impl Report {
    fn print(&self) -> Result<()> {
        let verdict = if self.passed { "ok" } else { "FAILED" };
        let mut out = std::io::stdout().lock();
        writeln!(out, "{MARK}{verdict} {}", self.took.as_millis())?;
        out.flush().context("telling the host")
    }

    pub(crate) fn parse(line: &str) -> Option<Self> {
        let (verdict, took) = line.strip_prefix(MARK)?.split_once(' ')?;
        Some(Self {
            passed: verdict == "ok",
            took: Duration::from_millis(took.parse().ok()?),
        })
    }
}

fn named(name: &str) -> Result<&'static Scenario> {
    scenarios()
        .find(|scenario| scenario.name == name)
        .with_context(|| format!("no scenario {name}"))
}

pub(crate) fn all(names: &[String]) -> Result<ExitCode> {
    kernel_log()?;
    for name in names {
        let started = Instant::now();
        let faults = supervise(named(name)?)?;
        for fault in &faults {
            println!("{fault}");
        }
        let report = Report {
            passed: faults.is_empty(),
            took: started.elapsed(),
        };
        report.print()?;
        if !report.passed {
            break;
        }
    }
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn one(names: &[String]) -> Result<ExitCode> {
    let name = names.first().context("a scenario's name")?;
    (named(name)?.run)()?;
    Ok(ExitCode::SUCCESS)
}

/// Runs one scenario in a process group of its own, and says what was wrong with it.
fn supervise(scenario: &Scenario) -> Result<Vec<String>> {
    let log = File::create(LOG)?;
    let mut child = Command::new(std::env::current_exe()?)
        .args([ONE, scenario.name])
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .process_group(0)
        .spawn()?;
    let mut faults = Vec::new();
    match ended(&mut child, scenario.deadline)? {
        Some(status) if status.success() => {}
        Some(status) => faults.push(format!("{status}")),
        None => {
            faults.push(format!(
                "still running after {} s",
                scenario.deadline.as_secs()
            ));
            faults.push(stuck_tasks());
        }
    }
    faults.extend(leftovers()?);
    let messages = kernel_log()?;
    faults.extend(
        messages
            .lines()
            .find(|line| COMPLAINTS.iter().any(|complaint| line.contains(complaint)))
            .map(|line| format!("the kernel complained: {line}")),
    );
    end_all_others()?;
    if !faults.is_empty() {
        faults.insert(0, fs::read_to_string(LOG).unwrap_or_default());
        let tail: Vec<&str> = messages.lines().rev().take(40).collect();
        faults.extend(tail.into_iter().rev().map(|line| format!("dmesg: {line}")));
    }
    Ok(faults)
}

/// The exit status, or nothing where the deadline passed and the process group was killed.
fn ended(child: &mut Child, deadline: Duration) -> Result<Option<std::process::ExitStatus>> {
    let started = Instant::now();
    while started.elapsed() < deadline {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(None)
}

/// Connected devices and mounts that a scenario should have taken away itself.
fn leftovers() -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/sys/block")? {
        let entry = entry?;
        if entry.path().join("pid").exists() {
            found.push(format!(
                "{} is still connected",
                entry.file_name().to_string_lossy()
            ));
        }
    }
    let mounts = fs::read_to_string("/proc/mounts")?;
    found.extend(
        mounts
            .lines()
            .filter(|mount| mount.starts_with("/dev/nbd"))
            .map(|mount| format!("still mounted: {mount}")),
    );
    Ok(found)
}

/// Where each task that cannot be interrupted waits.
fn stuck_tasks() -> String {
    let mut text = String::new();
    for pid in processes() {
        let folder = Path::new("/proc").join(pid.to_string());
        let status = fs::read_to_string(folder.join("status")).unwrap_or_default();
        if status.contains("State:\tD") {
            let name = fs::read_to_string(folder.join("comm")).unwrap_or_default();
            let stack = fs::read_to_string(folder.join("stack")).unwrap_or_default();
            text.push_str(&format!(
                "{} ({pid}) waits in the kernel:\n{stack}",
                name.trim()
            ));
        }
    }
    text
}

/// Ends every process but the first one, its shell and this one.
fn end_all_others() -> Result<()> {
    let own = i32::try_from(std::process::id())?;
    for pid in processes().into_iter().filter(|pid| *pid > own) {
        if let Some(pid) = Pid::from_raw(pid) {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
    }
    Ok(())
}

/// Processes with a command line, which kernel threads have not.
fn processes() -> Vec<i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter(|entry| fs::read(entry.path().join("cmdline")).is_ok_and(|line| !line.is_empty()))
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

/// What the kernel said since this was last asked.
fn kernel_log() -> Result<String> {
    let output = Command::new("dmesg")
        .arg("--read-clear")
        .output()
        .context("dmesg")?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
