//! Hawser's kernel devices beside nbd-client's: one kernel (user-mode Linux), one server, one cipher, the same fio.
//!
//! The server runs on the host, and the machine reaches it over a tap device: what the machine takes of the processor is
//! the client's side alone, with fio. Both devices are there at once and take turns at each case. Nothing is
//! asserted. `make bench-attach`; `docs/performance.md` says how to read it.

mod cases;
mod control;
#[path = "../../kernel/driver.rs"]
#[allow(dead_code, reason = "the kernel's tests call more")]
mod driver;
mod guest;
mod host;
#[path = "../network.rs"]
mod network;
mod report;
#[path = "../spread.rs"]
mod spread;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// Bytes of the volume, which is in memory.
const SIZE: u64 = 256 << 20;

fn main() -> Result<ExitCode> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments
        .first()
        .is_some_and(|first| first == guest::INSIDE)
    {
        return guest::main(&arguments[1..]).map(|()| ExitCode::SUCCESS);
    }
    let options = Options::parse(arguments)?;
    if let Some(status) = network::alone()? {
        return Ok(status);
    }
    host::main(&options)?;
    Ok(ExitCode::SUCCESS)
}

struct Options {
    repetitions: usize,
    seconds: f64,
    /// Only cases whose name has this in it.
    only: String,
    mode: Mode,
    output: Option<PathBuf>,
}

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Mode {
    /// Hawser's device and nbd-client's.
    Devices,
    /// Hawser's device with one setting changed at a time, in the place of nbd-client's.
    Settings,
    /// The calls before a volume can be used, and how long I/O stands still.
    Control,
}

impl Options {
    fn parse(arguments: Vec<String>) -> Result<Self> {
        let mut options = Self {
            repetitions: 3,
            seconds: 2.0,
            only: String::new(),
            mode: Mode::Devices,
            output: None,
        };
        let mut arguments = arguments.into_iter();
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().context("a value for the last option");
            match argument.as_str() {
                // Cargo's.
                "--bench" => {}
                "--settings" => options.mode = Mode::Settings,
                "--control" => options.mode = Mode::Control,
                "--only" => options.only = value()?,
                "--repetitions" => options.repetitions = value()?.parse()?,
                "--seconds" => options.seconds = value()?.parse()?,
                "--output" => options.output = Some(value()?.into()),
                other => bail!(
                    "unknown option {other}; there are --settings, --control, --only PART-OF-A-NAME, --repetitions N, --seconds S, --output FILE"
                ),
            }
        }
        Ok(options)
    }
}
