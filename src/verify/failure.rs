//! A session that did not go as it should, and whose fault that is.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::client::{Reason, Step};

/// A session that failed: where, and why.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) step: Step,
    pub(super) reason: Box<Reason>,
}

impl Failure {
    pub(super) fn new(step: Step, reason: impl Into<Reason>) -> Self {
        Self {
            step,
            reason: Box::new(reason.into()),
        }
    }

    /// Puts a reason where it belongs.
    pub(super) fn at<R: Into<Reason>>(step: Step) -> impl Fn(R) -> Self {
        move |reason| Self::new(step, reason)
    }

    /// Whether the server is to blame.
    pub(super) fn is_violation(&self) -> bool {
        self.reason.is_violation(self.step)
    }

    /// Whether the connection is simply over.
    pub(super) fn is_end(&self) -> bool {
        matches!(
            *self.reason,
            Reason::Closed
                | Reason::ClosedAfterHandshake
                | Reason::Io(_)
                | Reason::Tls(rustls::Error::AlertReceived(_))
        )
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.step, self.reason)
    }
}

/// A way to end a run early, from another thread.
#[derive(Debug, Clone, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sessions end within a moment; checks that had no answer yet are reported as not run.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
