//! The memory of requests in flight: bounded for each session, and for the process.
//!
//! Each session has a small floor that nobody can take from it, so that peers which stall with requests half sent
//! cannot stop another one; what goes beyond the floor comes out of a pool that all share, first come, first served.
//! Nobody waits for memory while holding some that others need in order to finish: a request's whole need is taken at
//! once, before the first byte is allocated.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::wake::Wake;

/// Bytes a session may always hold: 4 KiB requests go on, whatever the others do.
pub(super) const FLOOR: usize = 256 << 10;

/// What a request takes besides its payload: its own records, and the reply's header.
pub(super) const OVERHEAD: usize = 1 << 10;

/// Memory for requests in flight.
#[derive(Debug)]
pub(super) struct Budget {
    per_session: usize,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Bytes left in the pool.
    pool: usize,
    held: HashMap<u64, usize>,
    /// Sessions that found the pool too empty, in the order in which they came.
    waiting: VecDeque<(u64, Arc<Wake>)>,
    next: u64,
    granted: u64,
}

/// A session's account.
#[derive(Debug)]
pub(super) struct Account {
    budget: Arc<Budget>,
    id: u64,
    wake: Arc<Wake>,
}

/// Memory that a request may use; given back when dropped.
#[derive(Debug)]
pub(super) struct Permit {
    account: Arc<Account>,
    bytes: usize,
}

impl Budget {
    /// `pool` and `per_session` in bytes; the largest request must fit into both.
    pub(super) fn new(pool: usize, per_session: usize) -> Self {
        Self {
            per_session,
            state: Mutex::new(State {
                pool,
                held: HashMap::new(),
                waiting: VecDeque::new(),
                next: 0,
                granted: 0,
            }),
        }
    }

    /// Opens an account; `wake` is woken when memory that was refused may be there.
    pub(super) fn account(self: &Arc<Self>, wake: Arc<Wake>) -> Arc<Account> {
        let mut state = self.state();
        let id = state.next;
        state.next += 1;
        state.held.insert(id, 0);
        Arc::new(Account {
            budget: Arc::clone(self),
            id,
            wake,
        })
    }

    /// Bytes that all requests hold now.
    pub(super) fn in_flight(&self) -> usize {
        self.state().held.values().sum()
    }

    /// Permits that were ever given.
    pub(super) fn granted(&self) -> u64 {
        self.state().granted
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn wake_first(&self) {
        if let Some((_, wake)) = self.waiting.front() {
            wake.wake();
        }
    }
}

/// The part of what a session holds that comes out of the pool.
fn pooled(held: usize) -> usize {
    held.saturating_sub(FLOOR)
}

impl Account {
    /// Takes memory for a request with that much payload, or nothing: then the session is woken when it is worth
    /// asking again, at the latest by the end of a request of its own.
    pub(super) fn take(self: &Arc<Self>, payload: usize) -> Option<Permit> {
        let bytes = payload + OVERHEAD;
        let mut state = self.budget.state();
        let held = state.held.get(&self.id).copied().unwrap_or(0);
        // A single request always fits the session's own limit.
        if held > 0 && held + bytes > self.budget.per_session {
            return None;
        }
        let need = pooled(held + bytes) - pooled(held);
        let place = state.waiting.iter().position(|(id, _)| *id == self.id);
        let before = place.unwrap_or(state.waiting.len());
        if need > 0 && (before > 0 || need > state.pool) {
            if place.is_none() {
                state.waiting.push_back((self.id, Arc::clone(&self.wake)));
            }
            return None;
        }
        if let Some(place) = place {
            state.waiting.remove(place);
            state.wake_first();
        }
        state.pool -= need;
        state.granted += 1;
        state.held.insert(self.id, held + bytes);
        Some(Permit {
            account: Arc::clone(self),
            bytes,
        })
    }
}

impl Account {
    /// Whether others wait for memory while this session holds more than its floor.
    pub(super) fn is_in_the_way(&self) -> bool {
        let state = self.budget.state();
        let held = state.held.get(&self.id).copied().unwrap_or(0);
        held > FLOOR && state.waiting.iter().any(|(id, _)| *id != self.id)
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        let mut state = self.budget.state();
        state.held.remove(&self.id);
        state.waiting.retain(|(id, _)| *id != self.id);
        state.wake_first();
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut state = self.account.budget.state();
        let Some(held) = state.held.get(&self.account.id).copied() else {
            return;
        };
        let left = held.saturating_sub(self.bytes);
        state.pool += pooled(held) - pooled(left);
        state.held.insert(self.account.id, left);
        state.wake_first();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    fn account(budget: &Arc<Budget>) -> (Arc<Account>, Arc<Wake>) {
        let wake = Arc::new(Wake::new().unwrap());
        (budget.account(Arc::clone(&wake)), wake)
    }

    #[test]
    fn a_full_pool_stops_large_requests_and_lets_small_ones_through() {
        let budget = Arc::new(Budget::new(4 * MIB, 4 * MIB));
        let (greedy, _) = account(&budget);
        let (other, wake) = account(&budget);
        let all = greedy.take(4 * MIB).unwrap();
        let small = other.take(4096).unwrap();
        assert!(other.take(MIB).is_none(), "the pool is empty");
        assert!(!wake.take(), "nothing was given back yet");
        assert!(greedy.is_in_the_way() && !other.is_in_the_way());
        drop(all);
        assert!(wake.take(), "woken by what was given back");
        assert!(other.take(MIB).is_some());
        drop(small);
        assert_eq!(budget.in_flight(), 0);
    }

    #[test]
    fn the_pool_is_first_come_first_served() {
        let budget = Arc::new(Budget::new(4 * MIB, 4 * MIB));
        let (holder, _) = account(&budget);
        let (large, _) = account(&budget);
        let (late, _) = account(&budget);
        let held = holder.take(2 * MIB).unwrap();
        assert!(large.take(4 * MIB - FLOOR).is_none());
        assert!(late.take(MIB).is_none(), "not before the one that waits");
        drop(held);
        assert!(late.take(MIB).is_none());
        let taken = large.take(2 * MIB).unwrap();
        let second = late.take(MIB).unwrap();
        drop((taken, second));
        drop((large, late));
        assert!(holder.take(4 * MIB - OVERHEAD).is_some(), "all is back");
    }

    #[test]
    fn a_session_that_ends_gives_back_its_place_and_its_memory() {
        let budget = Arc::new(Budget::new(MIB, MIB));
        let (first, _) = account(&budget);
        let (second, _) = account(&budget);
        let (third, wake) = account(&budget);
        let held = first.take(MIB).unwrap();
        assert!(second.take(MIB / 2).is_none());
        assert!(third.take(MIB / 2).is_none());
        drop(second);
        drop(held);
        assert!(wake.take());
        assert!(third.take(MIB / 2).is_some());
    }

    #[test]
    fn a_session_has_a_limit_of_its_own_which_one_request_may_fill() {
        let budget = Arc::new(Budget::new(64 * MIB, MIB));
        let (account, _) = account(&budget);
        let whole = account.take(MIB).unwrap();
        assert!(account.take(0).is_none());
        drop(whole);
        assert!(account.take(0).is_some());
    }
}
