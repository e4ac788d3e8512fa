//! What the person in front of the demo sees: one line for each step, with its time, and what it showed.

use std::future::Future;
use std::io::Write;
use std::time::Instant;

use anyhow::Context;

/// Where the dots end.
const WIDTH: usize = 66;

/// The steps, counted and timed.
#[derive(Debug)]
pub(super) struct Show {
    began: Instant,
    steps: u32,
}

/// What a step found: a value for the next steps, and lines for the person.
#[derive(Debug)]
pub(super) struct Found<T> {
    value: T,
    lines: Vec<String>,
}

impl<T> Found<T> {
    pub(super) fn new(value: T) -> Self {
        Self {
            value,
            lines: Vec::new(),
        }
    }

    /// Adds a line of evidence.
    #[must_use]
    pub(super) fn saying(mut self, line: impl Into<String>) -> Self {
        self.lines.push(line.into());
        self
    }
}

impl Show {
    pub(super) fn new() -> Self {
        Self {
            began: Instant::now(),
            steps: 0,
        }
    }

    /// Carries out one step and shows it; its error ends the demo.
    pub(super) async fn step<T>(
        &mut self,
        title: &str,
        work: impl Future<Output = anyhow::Result<Found<T>>>,
    ) -> anyhow::Result<T> {
        self.steps += 1;
        print!(
            "{:3}  {title} {:.<2$} ",
            self.steps,
            "",
            WIDTH.saturating_sub(title.len())
        );
        let _ = std::io::stdout().flush();
        let began = Instant::now();
        match work.await {
            Ok(found) => {
                println!("{:6.2} s", began.elapsed().as_secs_f64());
                for line in found.lines.iter().flat_map(|line| line.lines()) {
                    println!("       {line}");
                }
                Ok(found.value)
            }
            Err(error) => {
                println!("FAILED");
                Err(error).with_context(|| format!("step {} ({title})", self.steps))
            }
        }
    }

    pub(super) fn seconds(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }

    pub(super) fn steps(&self) -> u32 {
        self.steps
    }
}
