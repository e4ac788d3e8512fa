//! Making data durable, for all who wait at once.
//!
//! One fdatasync serves every FLUSH and FUA that asked before it began, of all sessions: what it covers is the
//! file, not a connection (C53). So a crowd of flushes takes one worker and not all of them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::store::{Store, Trouble};
use super::workers::Workers;

type Waiting = Box<dyn FnOnce(Result<(), Trouble>) + Send>;

/// Where FLUSH and FUA wait.
pub(super) struct Commits {
    store: Arc<Store>,
    workers: Workers,
    state: Mutex<State>,
    /// Called once, when the system is found to have lost writes.
    on_loss: Box<dyn Fn() + Send + Sync>,
}

#[derive(Default)]
struct State {
    waiting: Vec<Waiting>,
    running: bool,
    loss_told: bool,
}

impl Commits {
    pub(super) fn new(
        store: Arc<Store>,
        workers: Workers,
        on_loss: impl Fn() + Send + Sync + 'static,
    ) -> Self {
        Self {
            store,
            workers,
            state: Mutex::default(),
            on_loss: Box::new(on_loss),
        }
    }

    /// Calls `done` when everything that was written until now is durable.
    pub(super) fn request(
        self: &Arc<Self>,
        done: impl FnOnce(Result<(), Trouble>) + Send + 'static,
    ) {
        let mut state = self.state();
        state.waiting.push(Box::new(done));
        if state.running {
            return;
        }
        state.running = true;
        drop(state);
        let commits = Arc::clone(self);
        self.workers.submit(move || commits.run());
    }

    fn run(&self) {
        loop {
            let mut state = self.state();
            if state.waiting.is_empty() {
                state.running = false;
                return;
            }
            let served = std::mem::take(&mut state.waiting);
            drop(state);
            let result = self.store.flush();
            if self.store.has_lost_writes() && !std::mem::replace(&mut self.state().loss_told, true)
            {
                (self.on_loss)();
            }
            for done in served {
                done(result);
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
impl Commits {
    /// Requests whose fdatasync has not begun.
    pub(super) fn waiting(&self) -> usize {
        self.state().waiting.len()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn writes_that_the_system_lost_are_never_durable_and_are_told_of_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("data");
        std::fs::write(&path, [0; 4096]).unwrap();
        let store = Arc::new(Store::open(&path, false).unwrap());
        let told = Arc::new(AtomicU32::new(0));
        let on_loss = {
            let told = Arc::clone(&told);
            move || {
                told.fetch_add(1, Ordering::Relaxed);
            }
        };
        let commits = Commits::new(Arc::clone(&store), Workers::default(), on_loss);
        let commits = Arc::new(commits);
        let flush = || {
            let (sender, receiver) = mpsc::channel();
            commits.request(move |result| sender.send(result).unwrap());
            receiver.recv().unwrap()
        };
        assert_eq!(flush(), Ok(()));
        store.lose();
        for _ in 0..3 {
            assert_eq!(flush(), Err(Trouble::Lost));
            assert_eq!(store.write(0, b"x"), Err(Trouble::Lost));
        }
        assert_eq!(told.load(Ordering::Relaxed), 1);
    }
}
