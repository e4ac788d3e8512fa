//! Watching objects of one kind for as long as a role lives, whatever becomes of the API server meanwhile.

use std::fmt::Debug;
use std::pin::pin;
use std::time::{Duration, SystemTime};

use futures::StreamExt;
use kube::runtime::WatchStreamExt;
use kube::runtime::utils::Backoff;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Resource};
use serde::de::DeserializeOwned;

use crate::daemon::chain;

/// Pauses between attempts to reach an API server that is away. A server that moved is to be found soon after it is
/// back, and many watches must not come back at one moment: each pause is up to twice as long.
const FIRST: Duration = Duration::from_millis(200);
const LAST: Duration = Duration::from_secs(2);

/// The pauses of one watch, or of some that pause together.
pub(super) struct Pauses {
    next: Duration,
    last: Duration,
}

impl Pauses {
    /// Of so many watches whose failures count as one another's: each is still tried as often as one that is alone.
    pub(super) fn of(watches: u32) -> Self {
        let last = LAST / watches;
        Self {
            next: FIRST.min(last),
            last,
        }
    }
}

impl Iterator for Pauses {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let pause = self.next;
        self.next = (pause * 2).min(self.last);
        let chance = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        Some(pause + pause * (chance.subsec_micros() % 1000) / 1000)
    }
}

impl Backoff for Pauses {
    fn reset(&mut self) {
        self.next = FIRST.min(self.last);
    }
}

/// What a watch saw.
#[derive(Debug)]
pub enum Seen<K> {
    /// All there are. It is the first that is seen, and comes again whenever some of the news may have been missed.
    All(Vec<K>),
    /// One that is new or changed.
    Present(K),
    /// One that is not there any more.
    Gone(K),
}

/// Watches, and never returns.
pub async fn follow<K>(api: Api<K>, which: watcher::Config, mut see: impl FnMut(Seen<K>))
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let kind = K::kind(&());
    loop {
        let mut events = pin!(watcher(api.clone(), which.clone()).backoff(Pauses::of(1)));
        let mut all = Vec::new();
        let mut said = None;
        while let Some(event) = events.next().await {
            match event {
                Ok(Event::Init) => all.clear(),
                Ok(Event::InitApply(object)) => all.push(object),
                Ok(Event::InitDone) => {
                    if said.take().is_some() {
                        tracing::info!(%kind, "the API server answers again");
                    }
                    see(Seen::All(std::mem::take(&mut all)));
                }
                Ok(Event::Apply(object)) => see(Seen::Present(object)),
                Ok(Event::Delete(object)) => see(Seen::Gone(object)),
                Err(error) => {
                    let problem = chain(&error);
                    if said.as_ref() != Some(&problem) {
                        tracing::warn!(%kind, problem, "cannot watch; trying again");
                        said = Some(problem);
                    }
                }
            }
        }
        tokio::time::sleep(LAST).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_api_server_that_is_away_is_asked_every_few_seconds_however_long_that_is() {
        for watches in [1, 4] {
            let mut pauses = Pauses::of(watches);
            let first = pauses.next().unwrap();
            assert!(first < FIRST * 2, "{first:?}");
            for pause in pauses.by_ref().skip(8).take(1000) {
                let of_each = pause * watches;
                assert!(of_each >= LAST && of_each < LAST * 2, "{pause:?}");
            }
            pauses.reset();
            assert!(pauses.next().unwrap() < FIRST * 2);
        }
    }
}
