//! One operation at a time on one thing, and every operation to its end.
//!
//! A gRPC call that times out drops its future (spec "Timeouts"); work that was half done would then stay half done
//! without anybody knowing. So the work runs in a task of its own that holds the lock, and the call only waits for it. The
//! work still knows its caller, so that it does not wait for others when nobody waits for it ([`Patience`]).
//! A call that finds the lock held is answered ABORTED, as the specification asks, and comes back later.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tonic::{Code, Response, Status};
use tracing::Instrument;

use super::status::status;
use crate::patience::Patience;

/// The things that are being worked on, and by which operation.
#[derive(Clone, Default)]
pub(super) struct Locks(Arc<Mutex<HashMap<String, &'static str>>>);

/// Held while an operation is in flight.
struct Held {
    locks: Locks,
    what: String,
}

impl Locks {
    /// Runs `work` on `what` in a task of its own and waits for it; refused with ABORTED while another one runs.
    pub(super) async fn run<T, F>(
        &self,
        operation: &'static str,
        what: &str,
        work: F,
    ) -> Result<Response<T>, Status>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Status>> + Send + 'static,
    {
        let held = self.hold(operation, what)?;
        let span = tracing::info_span!("csi", operation, volume = what);
        let name = what.to_owned();
        let task = async move {
            let begun = Instant::now();
            let result = work.await.map_err(|refusal| naming(&name, refusal));
            let milliseconds = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
            match &result {
                Ok(_) => tracing::info!(milliseconds, "done"),
                Err(status) => tracing::info!(
                    milliseconds,
                    code = ?status.code(),
                    reason = status.message(),
                    "refused"
                ),
            }
            drop(held);
            result
        };
        let task = Patience::of_caller().scope(task);
        tokio::spawn(task.instrument(span))
            .await
            .unwrap_or_else(|failure| {
                tracing::error!(operation, volume = what, %failure, "an operation broke off");
                Err(status(
                    Code::Internal,
                    format!("{operation} of {what} broke off, see the log"),
                ))
            })
            .map(Response::new)
    }

    fn hold(&self, operation: &'static str, what: &str) -> Result<Held, Status> {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match held.entry(what.to_owned()) {
            Entry::Occupied(other) => Err(status(
                Code::Aborted,
                format!(
                    "{what}: {} is in progress; {operation} can be repeated when it has ended",
                    other.get()
                ),
            )),
            Entry::Vacant(free) => {
                free.insert(operation);
                Ok(Held {
                    locks: self.clone(),
                    what: what.to_owned(),
                })
            }
        }
    }
}

/// A refusal that says of what it is: the errors of file systems and mounts know devices and paths only.
fn naming(what: &str, refusal: Status) -> Status {
    match refusal.message() {
        message if message.contains(what) => refusal,
        message => status(refusal.code(), format!("{what}: {message}")),
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut held = self.locks.0.lock().unwrap_or_else(PoisonError::into_inner);
        held.remove(&self.what);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn the_second_operation_on_the_same_thing_is_aborted_and_names_the_first() {
        let locks = Locks::default();
        let (release, wait) = oneshot::channel::<()>();
        let other = locks.clone();
        let first = tokio::spawn(async move {
            other
                .run("NodeStageVolume", "vol-a", async move {
                    let _ = wait.await;
                    Ok(1)
                })
                .await
        });
        while locks.0.lock().unwrap().is_empty() {
            tokio::task::yield_now().await;
        }
        let refused = locks
            .run("NodeUnstageVolume", "vol-a", async { Ok(2) })
            .await
            .unwrap_err();
        assert_eq!(refused.code(), Code::Aborted);
        assert!(refused.message().contains("NodeStageVolume is in progress"));
        let elsewhere = locks.run("NodeStageVolume", "vol-b", async { Ok(3) }).await;
        assert_eq!(elsewhere.unwrap().into_inner(), 3);
        release.send(()).unwrap();
        assert_eq!(first.await.unwrap().unwrap().into_inner(), 1);
        assert!(locks.0.lock().unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_dropped_call_neither_stops_the_work_nor_frees_the_lock() {
        let locks = Locks::default();
        let (release, wait) = oneshot::channel::<()>();
        let (ended, end) = oneshot::channel::<()>();
        let call = locks.run("NodeStageVolume", "vol-a", async move {
            let _ = wait.await;
            let _ = ended.send(());
            Ok(())
        });
        assert!(
            tokio::time::timeout(Duration::from_millis(20), call)
                .await
                .is_err()
        );
        let refused = locks
            .run("NodeStageVolume", "vol-a", async { Ok(()) })
            .await;
        assert_eq!(refused.unwrap_err().code(), Code::Aborted);
        release.send(()).unwrap();
        end.await.unwrap();
    }

    #[tokio::test]
    async fn a_panic_is_answered_and_frees_the_lock() {
        let locks = Locks::default();
        let broken = locks
            .run::<(), _>("NodeStageVolume", "vol-a", async { panic!("boom") })
            .await;
        assert_eq!(broken.unwrap_err().code(), Code::Internal);
        assert!(locks.0.lock().unwrap().is_empty());
    }
}
