//! The threads that do what may block on the disk: made when there is work, gone when there is none.

use std::collections::VecDeque;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Threads at most: enough to keep an SSD's queue busy.
pub(super) const MOST: usize = 16;

/// How long a thread waits for work before it ends.
const PATIENCE: Duration = Duration::from_secs(5);

/// They only call the system; 16 of them are 4 MiB of addresses, and far less memory.
const STACK: usize = 256 << 10;

type Job = Box<dyn FnOnce() + Send>;

/// Does jobs in the order in which they come, several at a time.
#[derive(Clone, Default)]
pub(super) struct Workers(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    work: Condvar,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
}

impl Workers {
    /// Does `job` soon. It runs here and now if there is no thread and none can be made.
    pub(super) fn submit(&self, job: impl FnOnce() + Send + 'static) {
        let mut state = self.0.state();
        state.jobs.push_back(Box::new(job));
        if state.idle >= state.jobs.len() || state.threads == MOST {
            drop(state);
            self.0.work.notify_one();
            return;
        }
        state.threads += 1;
        drop(state);
        let shared = Arc::clone(&self.0);
        let thread = std::thread::Builder::new()
            .name("worker".into())
            .stack_size(STACK)
            .spawn(move || shared.run());
        if let Err(error) = thread {
            tracing::warn!("no thread for a request: {error}");
            let mut state = self.0.state();
            state.threads -= 1;
            let job = if state.threads == 0 {
                state.jobs.pop_front()
            } else {
                None
            };
            drop(state);
            if let Some(job) = job {
                job();
            }
        }
    }
}

#[cfg(test)]
impl Workers {
    /// Jobs that nobody has begun.
    pub(super) fn waiting(&self) -> usize {
        self.0.state().jobs.len()
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut state = self.state();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                if std::panic::catch_unwind(AssertUnwindSafe(job)).is_err() {
                    tracing::error!("a request failed in a way it never should: this is a bug");
                }
                state = self.state();
                continue;
            }
            state.idle += 1;
            let (woken, waited) = self
                .work
                .wait_timeout(state, PATIENCE)
                .unwrap_or_else(PoisonError::into_inner);
            state = woken;
            state.idle -= 1;
            if waited.timed_out() && state.jobs.is_empty() {
                state.threads -= 1;
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn jobs_run_side_by_side_and_a_panic_takes_no_thread_away() {
        let workers = Workers::default();
        for _ in 0..MOST {
            workers.submit(|| panic!("as a job should not"));
        }
        let (sender, receiver) = mpsc::channel();
        let barrier = Arc::new(std::sync::Barrier::new(MOST));
        for index in 0..2 * MOST {
            let (sender, barrier) = (sender.clone(), Arc::clone(&barrier));
            workers.submit(move || {
                barrier.wait();
                let _ = sender.send(index);
            });
        }
        let mut done: Vec<_> = (0..2 * MOST).map(|_| receiver.recv().unwrap()).collect();
        done.sort_unstable();
        assert_eq!(done, (0..2 * MOST).collect::<Vec<_>>());
        assert!(workers.0.state().threads <= MOST);
    }
}
