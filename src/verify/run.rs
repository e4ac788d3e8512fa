//! Making the checks: which ones, side by side, and in bounded time.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::Target;
use super::check::{Check, Needs, Outcome, Scope};
use super::checks::CHECKS;
use super::failure::Cancel;
use super::mode::{Mode, Survey};
use super::report::{Examined, Report, Summary};
use super::server::Server;
use super::subject::{NO_CERTIFICATES, Subject};

/// How long one check of an attach may take, where the target's timeout does not say less: far more than a busy machine
/// needs for a handful of messages, and so little that a hostile server holds up an attach for half a minute at most.
const CHECK: Duration = Duration::from_secs(15);

/// How long a check may take that waits for a server's own deadlines, or fills it with sessions.
const INTRUSION: Duration = Duration::from_secs(75);

/// Checks that run at a time: few enough that a server's limit on handshakes has room for real clients.
const AT_A_TIME: usize = 8;

/// Which checks are made.
#[derive(Debug, Clone)]
pub struct Selection {
    /// Checks that overwrite the export's content. Nothing is restored.
    pub write: bool,
    /// Checks that try to exhaust the server.
    pub intrusive: bool,
    /// Ids of checks, or names of groups; empty for all.
    pub only: Vec<String>,
    /// Ids of checks, or names of groups, that are left out.
    pub skip: Vec<String>,
    /// For the whole run: checks that have not begun by then are not run.
    pub limit: Duration,
}

impl Default for Selection {
    fn default() -> Self {
        Self {
            write: false,
            intrusive: false,
            only: Vec::new(),
            skip: Vec::new(),
            limit: Duration::from_secs(300),
        }
    }
}

impl Selection {
    /// The checks it asks for, whether or not it allows them.
    fn checks(&self) -> impl Iterator<Item = &'static Check> {
        let names = |names: &[String], check: &Check| {
            names
                .iter()
                .any(|name| name == check.id || *name == check.group.to_string())
        };
        CHECKS.iter().copied().filter(move |check| {
            (self.only.is_empty() || names(&self.only, check)) && !names(&self.skip, check)
        })
    }

    fn allows(&self, check: &Check) -> Result<(), Outcome> {
        let reason = match check.needs {
            Needs::Write if !self.write => "it overwrites the export: see --write",
            Needs::Intrusive if !self.intrusive => {
                "it tries to exhaust the server: see --intrusive"
            }
            _ => return Ok(()),
        };
        Err(Outcome::Inapplicable {
            reason: reason.into(),
        })
    }
}

/// What a run tells while it goes on.
#[derive(Debug)]
pub enum Progress<'a> {
    /// What kind of server it is.
    Surveyed(&'a Summary),
    Begun(&'static Check),
    /// `done` of `of` checks are over.
    Ended {
        examined: &'a Examined,
        done: usize,
        of: usize,
    },
}

/// The check with this id.
#[must_use]
pub fn check(id: &str) -> Option<&'static Check> {
    CHECKS.iter().copied().find(|check| check.id == id)
}

/// What every check of one run shares.
struct Run<'a> {
    server: &'a Server,
    mode: Mode,
    cancel: &'a Cancel,
    /// When no further check begins.
    end: Option<Instant>,
    at_a_time: usize,
    concurrent: bool,
    progress: &'a (dyn Fn(Progress<'_>) + Sync),
    done: AtomicUsize,
    of: usize,
}

/// How long a check may take with a server that is given so long.
pub(super) fn time(needs: Needs, timeout: Duration) -> Duration {
    match needs {
        // What it waits for is the server's patience, not an answer.
        Needs::Intrusive => (5 * timeout).clamp(timeout, INTRUSION.max(timeout)),
        Needs::Nothing | Needs::Write => timeout,
    }
}

/// Makes the checks that guard an attach. Always returns, within a few times the target's timeout whatever the server
/// does.
#[must_use]
pub fn battery(target: &Target) -> Report {
    let started = Instant::now();
    let checks: Vec<_> = CHECKS
        .iter()
        .copied()
        .filter(|check| check.attach)
        .collect();
    let mut server = Server::from(target);
    server.timeout = server.timeout.min(CHECK);
    let run = Run {
        server: &server,
        // Nothing less will do.
        mode: Mode::Forced,
        cancel: &Cancel::new(),
        end: None,
        at_a_time: AT_A_TIME,
        concurrent: true,
        progress: &|_| {},
        done: AtomicUsize::new(0),
        of: checks.len(),
    };
    report(&server, None, run.make(&checks), started)
}

/// Makes every check of the selection. Always returns, within the selection's limit and the time of one check, or
/// within a moment when it is cancelled.
pub fn run(
    server: &Server,
    selection: &Selection,
    progress: &(dyn Fn(Progress<'_>) + Sync),
    cancel: &Cancel,
) -> Report {
    let started = Instant::now();
    let survey = Survey::make(server, cancel, server.timeout);
    let concurrent = survey.features.concurrent_sessions != Some(false);
    let Survey {
        mode,
        evidence,
        features,
        blocked,
    } = survey;
    let summary = Summary {
        mode,
        evidence,
        features,
    };
    progress(Progress::Surveyed(&summary));
    let checks: Vec<_> = selection.checks().collect();
    let run = Run {
        server,
        mode,
        cancel,
        end: Some(started + selection.limit),
        at_a_time: if concurrent { AT_A_TIME } else { 1 },
        concurrent,
        progress,
        done: AtomicUsize::new(0),
        of: checks.len(),
    };
    let mut results = Vec::new();
    let mut reading = Vec::new();
    let mut writing = Vec::new();
    let mut intruding = Vec::new();
    for check in checks {
        let verdict = fits(check, server, &summary, blocked.as_deref())
            .and_then(|()| selection.allows(check));
        match (verdict, check.needs) {
            (Err(outcome), _) => results.push(run.over(check, outcome, Duration::ZERO)),
            (Ok(()), Needs::Nothing) => reading.push(check),
            (Ok(()), Needs::Write) => writing.push(check),
            (Ok(()), Needs::Intrusive) => intruding.push(check),
        }
    }
    results.extend(run.make(&reading));
    // One at a time: each leaves its mark on the content, or on the server.
    let alone = Run {
        at_a_time: 1,
        done: AtomicUsize::new(run.done.load(Ordering::Relaxed)),
        ..run
    };
    results.extend(alone.make(&writing));
    results.extend(alone.make(&intruding));
    report(server, Some(summary), results, started)
}

/// Whether a check makes sense against this kind of server.
fn fits(
    check: &Check,
    server: &Server,
    summary: &Summary,
    blocked: Option<&str>,
) -> Result<(), Outcome> {
    let mode = summary.mode;
    let newstyle = matches!(mode, Mode::NoTls | Mode::Selective | Mode::Forced);
    let inapplicable = |reason: &str| {
        Err(Outcome::Inapplicable {
            reason: reason.to_owned(),
        })
    };
    let not_run = |reason: &str| {
        Err(Outcome::NotRun {
            reason: reason.to_owned(),
        })
    };
    if check.scope == Scope::Always {
        return Ok(());
    }
    let greets = summary
        .features
        .handshake_flags
        .is_some_and(|flags| flags & 1 != 0);
    if !(newstyle || greets && check.scope == Scope::Newstyle) {
        return not_run(&summary.evidence);
    }
    let has_tls = mode != Mode::NoTls;
    let may_tls = server.identity.is_some() && server.server_name.is_some();
    match check.scope {
        Scope::Always | Scope::Newstyle => Ok(()),
        Scope::Tls | Scope::Secured if !has_tls => inapplicable("the server has no TLS"),
        Scope::Tls => Ok(()),
        Scope::Forced if mode != Mode::Forced => inapplicable("the server does not force TLS"),
        Scope::Forced => Ok(()),
        Scope::Selective if mode != Mode::Selective => {
            inapplicable("the server has no exports with and without TLS side by side")
        }
        Scope::Selective => Ok(()),
        Scope::Secured if !may_tls => not_run(NO_CERTIFICATES),
        Scope::Session | Scope::Gate if mode == Mode::Forced && !may_tls => {
            not_run(NO_CERTIFICATES)
        }
        Scope::Secured | Scope::Session => match blocked {
            Some(reason) => not_run(reason),
            None => Ok(()),
        },
        Scope::Gate => Ok(()),
    }
}

fn report(
    server: &Server,
    summary: Option<Summary>,
    mut results: Vec<Examined>,
    started: Instant,
) -> Report {
    results.sort_by_key(|examined| {
        CHECKS
            .iter()
            .position(|check| check.id == examined.check.id)
    });
    Report {
        address: server.address.clone(),
        export: server.export.to_string(),
        summary,
        results,
        duration: started.elapsed(),
    }
}

impl Run<'_> {
    fn make(&self, checks: &[&'static Check]) -> Vec<Examined> {
        let next = AtomicUsize::new(0);
        let work = || {
            let mut done = Vec::new();
            while let Some(check) = checks.get(next.fetch_add(1, Ordering::Relaxed)) {
                done.push(self.examine(check));
            }
            done
        };
        thread::scope(|scope| {
            // Where no more threads are to be had, fewer do.
            let helpers: Vec<_> = (1..self.at_a_time.min(checks.len()))
                .map_while(|_| thread::Builder::new().spawn_scoped(scope, work).ok())
                .collect();
            let mut results = work();
            for helper in helpers {
                results.extend(helper.join().unwrap_or_default());
            }
            results
        })
    }

    fn examine(&self, check: &'static Check) -> Examined {
        let started = Instant::now();
        let over = |reason: &str| Outcome::NotRun {
            reason: reason.to_owned(),
        };
        if self.cancel.is_cancelled() {
            return self.over(check, over("the run was ended"), Duration::ZERO);
        }
        if self.end.is_some_and(|end| started >= end) {
            let outcome = over("the time for the whole run was over");
            return self.over(check, outcome, Duration::ZERO);
        }
        (self.progress)(Progress::Begun(check));
        let time = time(check.needs, self.server.timeout);
        // A check that panics leaves nothing behind: it owns its sessions, and only reads its subject.
        let mut subject = Subject::new(self.server, self.mode, self.cancel, started + time);
        subject.concurrent = self.concurrent;
        let outcome = catch_unwind(AssertUnwindSafe(|| check.run(&subject))).unwrap_or_else(|_| {
            over("the check itself failed, which is a fault of Hawser: please report it")
        });
        self.over(check, outcome, started.elapsed())
    }

    fn over(&self, check: &'static Check, outcome: Outcome, duration: Duration) -> Examined {
        let examined = Examined {
            check,
            outcome,
            duration,
        };
        let done = self.done.fetch_add(1, Ordering::Relaxed) + 1;
        (self.progress)(Progress::Ended {
            examined: &examined,
            done,
            of: self.of,
        });
        examined
    }
}
