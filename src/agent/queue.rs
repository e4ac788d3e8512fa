//! Which volume is looked at when: each at most once at a time, soon when something changed, later and later while it
//! fails, and now and then in any case.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use crate::volumes::VolumeId;

/// Volumes that are looked at side by side.
const SIDE_BY_SIDE: usize = 8;

/// The pauses after failures, doubled each time.
const FIRST: Duration = Duration::from_millis(500);
const LAST: Duration = Duration::from_secs(60);

/// What came of a look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Looked {
    /// All is as it is to be: the next look is after that long.
    Well(Duration),
    /// Something is to be tried again.
    Badly,
    /// There is nothing to look at.
    Nothing,
}

/// Looks at volumes as they come, until nobody asks any more.
pub(super) async fn run<F>(
    mut asked: mpsc::UnboundedReceiver<VolumeId>,
    look: impl Fn(VolumeId) -> F,
) where
    F: Future<Output = Looked> + Send + 'static,
{
    let mut due: HashMap<VolumeId, Instant> = HashMap::new();
    let mut failures: HashMap<VolumeId, u32> = HashMap::new();
    let mut looking: HashSet<VolumeId> = HashSet::new();
    let mut looks = JoinSet::new();
    loop {
        let now = Instant::now();
        let ready: Vec<_> = due
            .iter()
            .filter(|(id, at)| **at <= now && !looking.contains(*id))
            .take(SIDE_BY_SIDE.saturating_sub(looking.len()))
            .map(|(id, _)| id.clone())
            .collect();
        for id in ready {
            due.remove(&id);
            looking.insert(id.clone());
            let look = tokio::spawn(look(id.clone()));
            // What breaks is as good as what fails: it is looked at again.
            looks.spawn(async move { (id, look.await.unwrap_or(Looked::Badly)) });
        }
        let waiting = due.iter().filter(|(id, _)| !looking.contains(*id));
        let next = waiting.map(|(_, at)| *at).min();
        let is_free = looking.len() < SIDE_BY_SIDE;
        tokio::select! {
            id = asked.recv() => match id {
                Some(id) => {
                    due.insert(id, Instant::now());
                }
                None => return,
            },
            Some(Ok((id, looked))) = looks.join_next(), if !looks.is_empty() => {
                looking.remove(&id);
                if let Some(pause) = pause(looked, &id, &mut failures) {
                    // What was asked for meanwhile comes first.
                    due.entry(id).or_insert_with(|| Instant::now() + pause);
                }
            }
            () = sleep_until(next.unwrap_or(now)), if next.is_some() && is_free => {}
        }
    }
}

fn pause(looked: Looked, id: &VolumeId, failures: &mut HashMap<VolumeId, u32>) -> Option<Duration> {
    match looked {
        Looked::Well(pause) => {
            failures.remove(id);
            Some(pause)
        }
        Looked::Nothing => {
            failures.remove(id);
            None
        }
        Looked::Badly => {
            let count = failures.entry(id.clone()).or_default();
            *count = count.saturating_add(1);
            let doubled = FIRST.saturating_mul(1 << (*count - 1).min(16));
            Some(doubled.min(LAST))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn failures_are_tried_again_later_and_later() {
        let id = VolumeId::from_bytes([1; 16]);
        let mut failures = HashMap::new();
        let mut pauses = Vec::new();
        for _ in 0..40 {
            pauses.extend(pause(Looked::Badly, &id, &mut failures));
        }
        assert_eq!(pauses[..3], [FIRST, FIRST * 2, FIRST * 4]);
        assert_eq!(pauses.last(), Some(&LAST));
        let well = Looked::Well(Duration::from_secs(7));
        assert_eq!(
            pause(well, &id, &mut failures),
            Some(Duration::from_secs(7))
        );
        assert_eq!(pause(Looked::Badly, &id, &mut failures), Some(FIRST));
        assert_eq!(pause(Looked::Nothing, &id, &mut failures), None);
    }

    #[tokio::test]
    async fn a_volume_is_looked_at_once_at_a_time_and_once_more_when_asked_meanwhile() {
        let (ask, asked) = mpsc::unbounded_channel();
        let (first, second) = (VolumeId::from_bytes([1; 16]), VolumeId::from_bytes([2; 16]));
        let looks: Arc<Mutex<Vec<VolumeId>>> = Arc::default();
        let most = Arc::new(AtomicUsize::new(0));
        let (told, running) = (Arc::clone(&looks), Arc::clone(&most));
        let broken = second.clone();
        let queue = tokio::spawn(run(asked, move |id| {
            let (told, running, broken) = (Arc::clone(&told), Arc::clone(&running), broken.clone());
            async move {
                assert_eq!(
                    running.fetch_add(usize::from(id != broken), Ordering::SeqCst),
                    0
                );
                told.lock().unwrap().push(id.clone());
                assert_ne!(id, broken, "on purpose");
                tokio::time::sleep(Duration::from_millis(30)).await;
                running.fetch_sub(1, Ordering::SeqCst);
                Looked::Nothing
            }
        }));
        ask.send(first.clone()).unwrap();
        while looks.lock().unwrap().is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        for _ in 0..5 {
            ask.send(first.clone()).unwrap();
        }
        while looks.lock().unwrap().len() < 2 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(*looks.lock().unwrap(), [first.clone(), first]);
        ask.send(second.clone()).unwrap();
        while looks
            .lock()
            .unwrap()
            .iter()
            .filter(|id| **id == second)
            .count()
            < 2
        {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        drop(ask);
        queue.await.unwrap();
    }
}
