//! How long each step of an operation took, for its line in the log.

use std::fmt;
use std::time::{Duration, Instant};

pub(super) struct Steps {
    begun: Instant,
    last: Instant,
    steps: Vec<(&'static str, Duration)>,
}

impl Steps {
    pub(super) fn begin() -> Self {
        let now = Instant::now();
        Self {
            begun: now,
            last: now,
            steps: Vec::new(),
        }
    }

    /// Ends the step `name`; the next one begins.
    pub(super) fn done(&mut self, name: &'static str) {
        let now = Instant::now();
        self.steps.push((name, now - self.last));
        self.last = now;
    }
}

impl fmt::Display for Steps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let milliseconds = |duration: Duration| duration.as_secs_f64() * 1000.0;
        for (name, duration) in &self.steps {
            write!(f, "{name} {:.1} ms, ", milliseconds(*duration))?;
        }
        write!(f, "total {:.1} ms", milliseconds(self.last - self.begun))
    }
}
