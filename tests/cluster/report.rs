//! What a run says of itself: how long each step took, a scenario's steps in one piece where several run side by side.
//!
//! `steps.log` has every line the moment it is said, so that a run that hangs says where.

use std::cell::RefCell;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::{Mutex, OnceLock};
use std::time::Instant;

use anyhow::Result;

static STEPS: OnceLock<(Instant, Mutex<File>)> = OnceLock::new();

/// A scenario's name, and what it has said so far.
struct Telling {
    scenario: &'static str,
    said: String,
}

thread_local! {
    /// The scenario of this thread.
    static TELLING: RefCell<Option<Telling>> = const { RefCell::new(None) };
}

/// Begins `steps.log`.
pub(crate) fn open(logs: &Path) -> Result<()> {
    let file = File::create(logs.join("steps.log"))?;
    let _ = STEPS.set((Instant::now(), Mutex::new(file)));
    Ok(())
}

pub(crate) fn say(line: &str) {
    TELLING.with_borrow_mut(|telling| {
        let scenario = telling.as_ref().map_or("", |telling| telling.scenario);
        if let Some((started, file)) = STEPS.get() {
            let seconds = started.elapsed().as_secs_f32();
            // A machine that has no room for its logs has other troubles.
            let _ = file
                .lock()
                .map(|mut file| writeln!(file, "{seconds:7.1} {scenario}: {line}"));
        }
        match telling {
            Some(telling) => telling.said += &format!("cluster: {line}\n"),
            None => println!("cluster: {line}"),
        }
    });
}

/// Runs a scenario on this thread; what it said comes out in one piece when it is over.
pub(crate) fn gathered<T>(scenario: &'static str, work: impl FnOnce() -> T) -> T {
    TELLING.set(Some(Telling {
        scenario,
        said: String::new(),
    }));
    let result = work();
    if let Some(telling) = TELLING.take() {
        print!("{}", telling.said);
    }
    result
}

/// Does a step and says how long it took.
pub(crate) fn step<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let started = Instant::now();
    let result = work();
    let verdict = if result.is_ok() { "" } else { " FAILED" };
    say(&format!(
        "{:6.1} s  {what}{verdict}",
        started.elapsed().as_secs_f32()
    ));
    result
}
