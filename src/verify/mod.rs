//! The verification battery: whether a server's TLS is real, and its negotiation right, asked of the server itself.
//!
//! Each check is a small value with a stable id, run on sessions of its own before the device is used. Checks only
//! read, run side by side, and each has a deadline, so that a hostile server can neither stall an attach nor harm
//! the volume.

mod certificates;
mod check;
mod contexts;
mod extents;
mod plaintext;
mod policy;
mod report;
mod secured;
#[cfg(test)]
mod tests;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use self::check::Subject;
pub use self::check::{Check, Outcome, Severity};
pub use self::policy::{Policy, Refused, UnknownPolicy};
pub use self::report::{Examined, Report};
/// What is verified: how a genuine client reaches its export.
pub use crate::client::Target;

/// How long one check may take, where the target does not say less: far more than a busy machine needs for a handful
/// of messages, and so little that a hostile server holds up an attach for half a minute at most.
const CHECK: Duration = Duration::from_secs(15);

/// Checks that run at a time: few enough that a server's limit on handshakes has room for real clients.
const AT_A_TIME: usize = 8;

/// All checks, in the order of a session's life.
pub static CHECKS: &[Check] = &[
    plaintext::OPTIONS_REFUSED,
    plaintext::REFUSALS_ALIKE,
    plaintext::EXPORT_NAME_CLOSES,
    plaintext::INJECTION_DEAD,
    plaintext::STATE_DROPPED,
    certificates::ANONYMOUS_REFUSED,
    certificates::FOREIGN_REFUSED,
    secured::SECOND_STARTTLS_REFUSED,
    secured::BLOCK_STATUS_REFUSED,
    secured::READ_SIMPLE,
    contexts::IDS_UNIQUE,
    extents::WELL_FORMED,
    contexts::OTHER_EXPORT_VOID,
    contexts::FAILED_SELECTION_CLEARS,
    contexts::EMPTY_SELECTION_CLEARS,
];

/// Runs every check. Always returns, within a few times the target's timeout whatever the server does.
#[must_use]
pub fn battery(target: &Target) -> Report {
    let started = Instant::now();
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        while let Some(check) = CHECKS.get(next.fetch_add(1, Ordering::Relaxed)) {
            done.push(examine(check, target));
        }
        done
    };
    let mut results = thread::scope(|scope| {
        // Where no more threads are to be had, fewer do.
        let helpers: Vec<_> = (1..AT_A_TIME)
            .map_while(|_| thread::Builder::new().spawn_scoped(scope, work).ok())
            .collect();
        let mut results = work();
        for helper in helpers {
            results.extend(helper.join().unwrap_or_default());
        }
        results
    });
    results.sort_by_key(|examined| {
        CHECKS
            .iter()
            .position(|check| check.id == examined.check.id)
    });
    Report {
        address: target.address,
        export: target.export.to_string(),
        results,
        duration: started.elapsed(),
    }
}

fn examine(check: &'static Check, target: &Target) -> Examined {
    let started = Instant::now();
    // A check that panics leaves nothing behind: it owns its sessions, and only reads its subject.
    let subject = Subject::new(target, started + target.timeout.min(CHECK));
    let outcome = catch_unwind(AssertUnwindSafe(|| check.run(&subject))).unwrap_or_else(|_| {
        Outcome::NotRun {
            reason: "the check itself failed, which is a fault of Hawser: please report it".into(),
        }
    });
    Examined {
        check,
        outcome,
        duration: started.elapsed(),
    }
}
