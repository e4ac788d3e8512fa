//! One line on the terminal that says how far a run is; nothing where there is no terminal.

use std::io::{self, Write};

use super::escape::printable;
use super::layout::columns;
use crate::verify::Progress;

/// Goes away with the run, so that only the report stays.
#[derive(Debug)]
pub(super) struct Bar {
    shown: bool,
}

impl Bar {
    pub(super) fn on_stderr(quiet: bool) -> Self {
        let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
        Self {
            shown: !quiet && !dumb && columns(&io::stderr()).is_some(),
        }
    }

    pub(super) fn show(&self, progress: &Progress<'_>) {
        let text = match progress {
            Progress::Surveyed(summary) => format!("{}, making the checks", summary.mode),
            Progress::Begun(_) => return,
            Progress::Ended { examined, done, of } => {
                format!("{done}/{of}  {}", examined.check.id)
            }
        };
        self.draw(&text);
    }

    fn draw(&self, text: &str) {
        if !self.shown {
            return;
        }
        // The last column stays free: some terminals break the line when it is full.
        let room = columns(&io::stderr()).unwrap_or(1).saturating_sub(1);
        let line: String = printable(text).chars().take(room).collect();
        let mut stderr = io::stderr().lock();
        // A terminal that went away is no reason to end.
        let _ = write!(stderr, "\r{line}\x1b[K").and_then(|()| stderr.flush());
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.draw("");
        if self.shown {
            let _ = write!(io::stderr(), "\r");
        }
    }
}
