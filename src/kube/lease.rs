//! One leader at a time, by a Lease.
//!
//! Whoever finds the Lease unchanged for as long as it lasts, on a clock of its own, takes it; other machines' clocks
//! are never compared. The holder gives up working before anybody else may begin.

use std::future::Future;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::apply::is_conflict;

/// How long a Lease lasts after its holder was heard of.
const LASTS: Duration = Duration::from_secs(15);

/// When the holder stops, if it could not renew: before [`LASTS`] is over, by more than a call takes.
const GIVES_UP: Duration = Duration::from_secs(10);

/// How often it is renewed, or looked at.
const EVERY: Duration = Duration::from_secs(3);

/// How long one call may take.
const CALL: Duration = Duration::from_secs(4);

/// What to do about a Lease.
#[derive(Debug, PartialEq, Eq)]
enum Move {
    /// There is none: make it.
    Make,
    /// It is ours, or nobody's any more: write our name and the time into it.
    Take,
    /// Somebody else holds it.
    Wait,
}

/// What is remembered of a Lease: what it said, and since when it has said that.
#[derive(Debug, Default)]
struct Seen {
    version: Option<String>,
    since: Option<Instant>,
}

impl Seen {
    /// Notes the Lease as it is now.
    fn look(&mut self, lease: Option<&Lease>, now: Instant) {
        let version = lease.and_then(|lease| lease.metadata.resource_version.clone());
        if self.since.is_none() || self.version != version {
            *self = Self {
                version,
                since: Some(now),
            };
        }
    }
}

fn holder(lease: &Lease) -> Option<&str> {
    let holder = lease.spec.as_ref()?.holder_identity.as_deref();
    holder.filter(|holder| !holder.is_empty())
}

fn evaluate(lease: Option<&Lease>, seen: &Seen, me: &str, now: Instant) -> Move {
    let Some(lease) = lease else {
        return Move::Make;
    };
    let is_over = seen.since.is_some_and(|since| now - since > LASTS);
    match holder(lease) {
        Some(other) if other != me && !is_over => Move::Wait,
        _ => Move::Take,
    }
}

/// A part in the election.
pub struct Candidate {
    leases: Api<Lease>,
    name: String,
    /// Nobody else's name, nor that of an earlier life of this pod.
    me: String,
    seen: Seen,
}

impl Candidate {
    #[must_use]
    pub fn new(client: Client, namespace: &str, name: &str, me: String) -> Self {
        Self {
            leases: Api::namespaced(client, namespace),
            name: name.to_owned(),
            me,
            seen: Seen::default(),
        }
    }

    /// Waits to become the leader, works for as long as that lasts, and begins again; for ever.
    pub async fn run<F: Future<Output = ()>>(mut self, work: impl Fn() -> F) {
        loop {
            let won = self.win().await;
            tracing::info!(lease = self.name, me = self.me, "leading");
            tokio::select! {
                () = work() => tracing::error!("the leader's work ended by itself"),
                () = self.keep(won) => tracing::warn!("not leading any more"),
            }
            // Whoever cannot renew is slow to try again.
            sleep(EVERY).await;
        }
    }

    async fn win(&mut self) -> Instant {
        loop {
            let begun = Instant::now();
            match timeout(CALL, self.step()).await {
                Ok(Ok(true)) => return begun,
                Ok(Ok(false)) => {}
                Ok(Err(error)) => tracing::warn!(%error, "the Lease cannot be had"),
                Err(_) => tracing::warn!("the API server does not answer about the Lease"),
            }
            sleep(EVERY).await;
        }
    }

    /// Renews; returns when the Lease is lost, or may be.
    async fn keep(&mut self, mut renewed: Instant) {
        loop {
            sleep(EVERY).await;
            let begun = Instant::now();
            match timeout_at(renewed + GIVES_UP, self.step()).await {
                Ok(Ok(true)) => renewed = begun,
                Ok(Ok(false)) | Err(_) => return,
                Ok(Err(error)) => {
                    tracing::warn!(%error, "the Lease cannot be renewed");
                    if renewed.elapsed() + EVERY > GIVES_UP {
                        return;
                    }
                }
            }
        }
    }

    /// Looks, and takes or renews where that is right. Whether the Lease is ours now.
    async fn step(&mut self) -> kube::Result<bool> {
        let now = self.leases.get_opt(&self.name).await?;
        self.seen.look(now.as_ref(), Instant::now());
        let mine = self.mine(now.as_ref());
        let params = PostParams::default();
        let written = match evaluate(now.as_ref(), &self.seen, &self.me, Instant::now()) {
            Move::Wait => return Ok(false),
            Move::Make => self.leases.create(&params, &mine).await,
            Move::Take => self.leases.replace(&self.name, &params, &mine).await,
        };
        match written {
            Ok(_) => Ok(true),
            Err(error) if is_conflict(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The Lease in our name.
    fn mine(&self, now: Option<&Lease>) -> Lease {
        let old = now.and_then(|lease| lease.spec.as_ref());
        let time = MicroTime(Timestamp::now());
        let is_ours = now.and_then(holder) == Some(self.me.as_str());
        let transitions = old.and_then(|old| old.lease_transitions).unwrap_or(0);
        Lease {
            metadata: now.map_or_else(
                || ObjectMeta {
                    name: Some(self.name.clone()),
                    ..ObjectMeta::default()
                },
                |lease| lease.metadata.clone(),
            ),
            spec: Some(LeaseSpec {
                holder_identity: Some(self.me.clone()),
                lease_duration_seconds: i32::try_from(LASTS.as_secs()).ok(),
                acquire_time: match old {
                    Some(old) if is_ours => old.acquire_time.clone(),
                    _ => Some(time.clone()),
                },
                renew_time: Some(time),
                lease_transitions: Some(transitions + i32::from(now.is_some() && !is_ours)),
                ..LeaseSpec::default()
            }),
        }
    }
}

/// Lets the Lease go, if it is ours, so that nobody has to wait for its end.
pub async fn release(client: Client, namespace: &str, name: &str, me: &str) -> kube::Result<()> {
    let leases: Api<Lease> = Api::namespaced(client, namespace);
    let Some(mut lease) = leases.get_opt(name).await? else {
        return Ok(());
    };
    if holder(&lease) != Some(me) {
        return Ok(());
    }
    if let Some(spec) = &mut lease.spec {
        spec.holder_identity = None;
    }
    match leases.replace(name, &PostParams::default(), &lease).await {
        Err(error) if !is_conflict(&error) => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease(holder: Option<&str>, version: &str) -> Lease {
        Lease {
            metadata: ObjectMeta {
                resource_version: Some(version.to_owned()),
                ..ObjectMeta::default()
            },
            spec: Some(LeaseSpec {
                holder_identity: holder.map(str::to_owned),
                ..LeaseSpec::default()
            }),
        }
    }

    #[test]
    fn a_lease_is_taken_when_it_is_nobodys_or_was_silent_for_its_time() {
        let begun = Instant::now();
        let (theirs, ours) = (lease(Some("other"), "1"), lease(Some("me"), "1"));
        let (free, empty) = (lease(None, "1"), lease(Some(""), "1"));
        let mut seen = Seen::default();
        seen.look(Some(&theirs), begun);
        for (now, after, expected) in [
            (None, 0, Move::Make),
            (Some(&ours), 0, Move::Take),
            (Some(&free), 0, Move::Take),
            (Some(&empty), 0, Move::Take),
            (Some(&theirs), 0, Move::Wait),
            (Some(&theirs), 15, Move::Wait),
            (Some(&theirs), 16, Move::Take),
        ] {
            let when = begun + Duration::from_secs(after);
            assert_eq!(
                evaluate(now, &seen, "me", when),
                expected,
                "{now:?} {after}"
            );
        }
        // It was renewed: its time begins again.
        let renewed = lease(Some("other"), "2");
        let later = begun + Duration::from_secs(14);
        seen.look(Some(&renewed), later);
        let when = begun + Duration::from_secs(20);
        assert_eq!(evaluate(Some(&renewed), &seen, "me", when), Move::Wait);
    }

    #[test]
    fn the_holder_stops_before_another_may_begin() {
        assert!(GIVES_UP + EVERY < LASTS);
        assert!(CALL < GIVES_UP);
    }
}
