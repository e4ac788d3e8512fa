//! Which exports there are at this moment, and which sessions use them.
//!
//! Entering transmission and revoking an export take the same lock, so a session is either refused or known to who
//! revokes. A session counts as there until its last request has been carried out, not only until its socket is
//! closed: that is what makes revoking a fence.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use tokio::sync::Notify;

use super::wake::Wake;
use crate::nbd::ExportName;

/// Sessions of one export: a kernel device has up to a handful, and as many again while they are replaced.
const SESSIONS_PER_EXPORT: usize = 32;

/// Sessions of the process, each with a thread.
const SESSIONS: usize = 128;

/// The exports and their sessions.
#[derive(Debug, Default)]
pub(super) struct Exports {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    allowed: BTreeMap<ExportName, Arc<Export>>,
    sessions: HashMap<u64, (Arc<Export>, Weak<Presence>)>,
    next: u64,
    draining: bool,
}

/// One export, as long as it is allowed.
#[derive(Debug)]
pub(super) struct Export {
    pub(super) name: ExportName,
    pub(super) read_only: bool,
    pub(super) counters: Counters,
}

/// What was done through an export since this server started.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) reads: AtomicU64,
    pub(super) writes: AtomicU64,
    pub(super) read_bytes: AtomicU64,
    pub(super) written_bytes: AtomicU64,
    pub(super) failed: AtomicU64,
}

/// Why a session may not begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum NotNow {
    #[error("the export is not allowed any more")]
    NotAllowed,
    #[error("there are {0} sessions already")]
    TooMany(usize),
    #[error("the server is shutting down")]
    Draining,
}

/// What a session is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(super) enum Order {
    Serve,
    /// Finish what was begun, then close.
    Finish,
    /// Close now.
    Close,
}

/// A session that is there, until the last clone of its `Arc` is gone.
#[derive(Debug)]
pub(super) struct Presence {
    exports: Arc<Exports>,
    id: u64,
    pub(super) export: Arc<Export>,
    pub(super) wake: Arc<Wake>,
    order: AtomicU8,
}

impl Exports {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets clients in from now on. What is there already stays as it is.
    pub(super) fn allow(&self, name: ExportName, read_only: bool) {
        let mut state = self.state();
        state.allowed.entry(name.clone()).or_insert_with(|| {
            Arc::new(Export {
                name,
                read_only,
                counters: Counters::default(),
            })
        });
    }

    pub(super) fn find(&self, name: &ExportName) -> Option<Arc<Export>> {
        self.state().allowed.get(name).cloned()
    }

    /// All exports, each with the number of its sessions.
    pub(super) fn all(&self) -> Vec<(Arc<Export>, usize)> {
        let state = self.state();
        let sessions = |export: &Arc<Export>| {
            let of = |(other, _): &&(Arc<Export>, _)| Arc::ptr_eq(other, export);
            state.sessions.values().filter(of).count()
        };
        state
            .allowed
            .values()
            .map(|export| (Arc::clone(export), sessions(export)))
            .collect()
    }

    /// Lets nobody in any more. Sessions that are there are not touched.
    pub(super) fn forbid(&self, name: &ExportName) {
        self.state().allowed.remove(name);
    }

    /// Begins a session, if that is allowed now.
    pub(super) fn enter(self: &Arc<Self>, name: &ExportName) -> Result<Arc<Presence>, NotNow> {
        let wake = Arc::new(Wake::new().map_err(|_: io::Error| NotNow::TooMany(SESSIONS))?);
        let mut state = self.state();
        if state.draining {
            return Err(NotNow::Draining);
        }
        let Some(export) = state.allowed.get(name).cloned() else {
            return Err(NotNow::NotAllowed);
        };
        let of_export = state
            .sessions
            .values()
            .filter(|(other, _)| other.name == *name)
            .count();
        if of_export >= SESSIONS_PER_EXPORT {
            return Err(NotNow::TooMany(of_export));
        }
        if state.sessions.len() >= SESSIONS {
            return Err(NotNow::TooMany(SESSIONS));
        }
        let id = state.next;
        state.next += 1;
        let presence = Arc::new(Presence {
            exports: Arc::clone(self),
            id,
            export: Arc::clone(&export),
            wake,
            order: AtomicU8::new(Order::Serve as u8),
        });
        state
            .sessions
            .insert(id, (export, Arc::downgrade(&presence)));
        Ok(presence)
    }

    /// Tells the sessions of an export, or all of them, what to do. Returns how many there were.
    pub(super) fn order(&self, name: Option<&ExportName>, order: Order) -> usize {
        let told: Vec<_> = self
            .state()
            .sessions
            .values()
            .filter(|(export, _)| name.is_none_or(|name| export.name == *name))
            .map(|(_, presence)| presence.upgrade())
            .collect();
        // Not under the lock: this may be the last hold on a presence, whose end takes it.
        for presence in told.iter().flatten() {
            presence.order.fetch_max(order as u8, Ordering::AcqRel);
            presence.wake.wake();
        }
        told.len()
    }

    /// Lets no session begin any more, and lets the ones that are there finish.
    pub(super) fn drain(&self) {
        self.state().draining = true;
        self.order(None, Order::Finish);
    }

    /// Returns when no session of that export is left, or none at all.
    pub(super) async fn vacated(&self, name: Option<&ExportName>) {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if self.sessions(name) == 0 {
                return;
            }
            changed.await;
        }
    }

    fn sessions(&self, name: Option<&ExportName>) -> usize {
        let matches = |export: &Export| name.is_none_or(|name| export.name == *name);
        let state = self.state();
        let sessions = state.sessions.values();
        sessions.filter(|(export, _)| matches(export)).count()
    }
}

impl Presence {
    pub(super) fn order(&self) -> Order {
        match self.order.load(Ordering::Acquire) {
            0 => Order::Serve,
            1 => Order::Finish,
            _ => Order::Close,
        }
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        self.exports.state().sessions.remove(&self.id);
        self.exports.changed.notify_waiters();
    }
}
