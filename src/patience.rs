//! How long whoever made a call waits for its answer.
//!
//! A gRPC caller says it in the header `grpc-timeout`. What has to wait for others does so for about as long, and not for
//! less, to be asked again; and it stops when the caller is gone, since then nobody hears what became of it.

use std::time::Duration;

use axum::extract::Request;
use axum::middleware::Next;
use axum::response::Response;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

/// What an answer needs to reach its caller in time.
const MARGIN: Duration = Duration::from_secs(2);

tokio::task_local! {
    static CALLER: Patience;
}

/// A caller's patience. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Patience {
    /// `None` where the caller said nothing.
    deadline: Option<Instant>,
    gone: CancellationToken,
}

impl Patience {
    /// That of whoever made the call that this task works on; somebody who said nothing where there is none.
    #[must_use]
    pub fn of_caller() -> Self {
        CALLER
            .try_with(Clone::clone)
            .unwrap_or_else(|_| Self::with(None))
    }

    /// That of somebody who waits for so long from now on.
    #[must_use]
    pub fn within(time: Duration) -> Self {
        Self::with(Instant::now().checked_add(time))
    }

    fn with(deadline: Option<Instant>) -> Self {
        Self {
            deadline,
            gone: CancellationToken::new(),
        }
    }

    /// Until when to wait: as long as the caller does, but for what the answer needs; for `usual` where it did not say,
    /// and for `most` at most.
    #[must_use]
    pub fn until(&self, usual: Duration, most: Duration) -> Instant {
        self.until_from(Instant::now(), usual, most)
    }

    fn until_from(&self, now: Instant, usual: Duration, most: Duration) -> Instant {
        match self.deadline {
            None => now + usual.min(most),
            Some(deadline) => {
                let left = deadline.saturating_duration_since(now);
                // Who waits for a moment only is still told what it would have waited for.
                let margin = MARGIN.min(left / 5);
                now + (left - margin).min(most)
            }
        }
    }

    /// Waits until nobody waits for the answer any more.
    pub async fn ends(&self) {
        self.gone.cancelled().await;
    }

    /// Ends this patience, and that of all clones, when it is dropped.
    #[must_use]
    pub fn guard(&self) -> DropGuard {
        self.gone.clone().drop_guard()
    }

    /// Works on the call of this caller.
    pub async fn scope<F: Future>(self, work: F) -> F::Output {
        CALLER.scope(self, work).await
    }
}

/// Learns what each call's caller said, in a [`axum::middleware::from_fn`].
pub(crate) async fn learn(request: Request, next: Next) -> Response {
    let said = request.headers().get("grpc-timeout");
    let said = said.and_then(|said| said.to_str().ok()).and_then(timeout);
    let patience = said.map_or_else(|| Patience::with(None), Patience::within);
    let _gone = patience.guard();
    patience.scope(next.run(request)).await
}

/// A timeout as gRPC writes it: up to eight digits and a unit (gRPC over HTTP/2, "Timeout").
fn timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_read_as_grpc_writes_them() {
        for (text, expected) in [
            ("30S", Some(Duration::from_secs(30))),
            ("29997m", Some(Duration::from_millis(29_997))),
            ("2M", Some(Duration::from_secs(120))),
            ("99999999H", Some(Duration::from_secs(359_999_996_400))),
            ("5u", Some(Duration::from_micros(5))),
            ("100n", Some(Duration::from_nanos(100))),
            ("123456789S", None),
            ("S", None),
            ("", None),
            ("-1S", None),
            ("1s", None),
            ("1é", None),
        ] {
            assert_eq!(timeout(text), expected, "{text:?}");
        }
    }

    #[test]
    fn a_caller_is_answered_before_it_stops_waiting() {
        let (usual, most) = (Duration::from_secs(8), Duration::from_secs(60));
        let waits = |said: Option<u64>| {
            let now = Instant::now();
            let patience = Patience::with(said.map(|seconds| now + Duration::from_secs(seconds)));
            patience.until_from(now, usual, most) - now
        };
        assert_eq!(waits(None), usual);
        assert_eq!(waits(Some(30)), Duration::from_secs(28));
        assert_eq!(waits(Some(120)), most);
        assert_eq!(waits(Some(5)), Duration::from_secs(4));
        assert_eq!(waits(Some(0)), Duration::ZERO);
    }

    #[tokio::test]
    async fn work_in_a_call_knows_its_caller_and_learns_that_it_left() {
        let patience = Patience::within(Duration::ZERO);
        let guard = patience.guard();
        let here = patience.scope(async { Patience::of_caller() }).await;
        assert!(here.deadline.is_some());
        assert!(!here.gone.is_cancelled());
        drop(guard);
        here.ends().await;
        assert!(Patience::of_caller().deadline.is_none());
    }
}
