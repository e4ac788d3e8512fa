//! One leader at a time, by a Lease.
//!
//! Whoever finds the Lease unchanged for as long as it lasts, on a clock of its own, takes it; other machines' clocks
//! are never compared. The holder gives up working before anybody else may begin.
//!
//! A holder that was stopped and goes on later does not know it at once, and is in the middle of something. So the work
//! has an API client that sends no change once the [`Tenure`] is over; it looks at the clock at each. What was sent just
//! before is bound to the object that it was decided upon (`resourceVersion`, `uid`), and refused if that is another by
//! then.

use std::future::Future;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use axum::http::{Method, Request};

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ObjectMeta, PostParams};
use kube::client::Body;
use kube::{Api, Client};
use rustix::time::{ClockId, clock_gettime};
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

/// Until when we lead, as far as is known, on [`clock`]. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Tenure(Arc<RwLock<Option<Duration>>>);

/// The time since this machine was started. Unlike that of [`Instant`], it goes on while the machine is suspended.
fn clock() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    Duration::try_from(now).unwrap_or_default()
}

/// A change that a former leader did not send.
#[derive(Debug, thiserror::Error)]
#[error("not the leader any more: {0} {1} is not sent")]
struct Over(Method, String);

impl Tenure {
    /// It was given, or renewed, when that was asked for at `asked`.
    fn begin(&self, asked: Duration) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Some(asked + GIVES_UP);
    }

    fn end(&self) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn allows(&self, method: &Method) -> bool {
        let end = *self.0.read().unwrap_or_else(PoisonError::into_inner);
        method.is_safe() || end.is_some_and(|end| clock() < end)
    }

    /// A client that changes nothing but while we lead.
    #[must_use]
    pub fn bind(&self, client: Client) -> Client {
        let namespace = client.default_namespace().to_owned();
        let tenure = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let (client, tenure) = (client.clone(), tenure.clone());
            async move {
                if !tenure.allows(request.method()) {
                    let path = request.uri().path().to_owned();
                    return Err(tower::BoxError::from(Over(request.method().clone(), path)));
                }
                client.send(request).await.map_err(tower::BoxError::from)
            }
        });
        Client::new(service, namespace)
    }
}

/// A part in the election.
pub struct Candidate {
    leases: Api<Lease>,
    name: String,
    /// Nobody else's name, nor that of an earlier life of this pod.
    me: String,
    seen: Seen,
    tenure: Tenure,
}

impl Candidate {
    #[must_use]
    pub fn new(client: Client, namespace: &str, name: &str, me: String, tenure: Tenure) -> Self {
        Self {
            tenure,
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
            self.tenure.end();
            // Whoever cannot renew is slow to try again.
            sleep(EVERY).await;
        }
    }

    async fn win(&mut self) -> Instant {
        loop {
            let (begun, asked) = (Instant::now(), clock());
            match timeout(CALL, self.step()).await {
                Ok(Ok(true)) => {
                    self.tenure.begin(asked);
                    return begun;
                }
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
            let (begun, asked) = (Instant::now(), clock());
            match timeout_at(renewed + GIVES_UP, self.step()).await {
                Ok(Ok(true)) => {
                    renewed = begun;
                    self.tenure.begin(asked);
                }
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

    #[tokio::test]
    async fn a_former_leader_sends_no_change() {
        let sent = Arc::new(RwLock::new(Vec::new()));
        let seen = Arc::clone(&sent);
        let service = tower::service_fn(move |request: Request<Body>| {
            seen.write().unwrap().push(request.method().clone());
            let lease = serde_json::to_vec(&lease(None, "1")).unwrap();
            let answer = axum::http::Response::new(Body::from(lease));
            async move { Ok::<_, std::convert::Infallible>(answer) }
        });
        let tenure = Tenure::default();
        let api: Api<Lease> =
            Api::namespaced(tenure.bind(Client::new(service, "storage")), "storage");
        let (params, object) = (PostParams::default(), lease(None, "1"));
        assert!(api.get("any").await.is_ok());
        assert!(api.create(&params, &object).await.is_err());
        tenure.begin(clock());
        api.create(&params, &object).await.unwrap();
        tenure.begin(clock() - GIVES_UP);
        let refused = api.create(&params, &object).await.unwrap_err();
        assert!(
            crate::daemon::chain(&refused).contains("not the leader"),
            "{refused:?}"
        );
        assert_eq!(*sent.read().unwrap(), [Method::GET, Method::POST]);
    }

    #[test]
    fn the_holder_stops_before_another_may_begin() {
        assert!(GIVES_UP + EVERY < LASTS);
        assert!(CALL < GIVES_UP);
    }
}
