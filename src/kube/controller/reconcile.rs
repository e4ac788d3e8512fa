//! Keeps each volume's server and Secrets as its object says, whatever happened to them.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{Pod, Secret};
use kube::api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::core::PartialObjectMeta;
use kube::runtime::controller::{self, Action, Controller};
use kube::runtime::events::{Recorder, Reporter};
use kube::runtime::reflector::ObjectRef;
use kube::runtime::watcher;
use kube::{Api, Client, ResourceExt};
use serde_json::{Value, json};
use time::OffsetDateTime;
use tokio::sync::{Mutex, Semaphore};

use super::certificates::{Certificates, SecretsError, is_own};
use super::metrics::Metrics;
use super::news::News;
use super::pools::Pools;
use super::server::{PORT, Server, ServerPods, look, pod_name, stateful_set};
use super::status::{Certified, is_said, status};
use crate::csi::chain;
use crate::kube::api::{
    self, BACKING_FINALIZER, BACKING_READY, COMPONENT_LABEL, CONTROLLER, NbdVolume, SERVER,
    SERVER_FINALIZER, VOLUME_LABEL,
};
use crate::kube::apply::{apply, apply_status_of, is_conflict, is_not_found};
use crate::kube::follow::Pauses;
use crate::kube::volumes::{View, prune, without_ended};
use crate::volumes::VolumeId;

/// How many volumes are looked at side by side.
const CONCURRENCY: usize = 16;

/// How long changes of one volume are gathered before it is looked at.
const GATHER: Duration = Duration::from_millis(50);

/// How often a volume is looked at though nothing is known to have changed.
const AGAIN: Duration = Duration::from_secs(600);

/// How often a volume is looked at that waits for something that is not watched.
const SOON: Duration = Duration::from_secs(10);

/// Watches that bring volumes here, and pause together: on the volumes, and on their StatefulSets, Secrets and pods.
const WATCHES: u32 = 4;

/// After how long a failed look is repeated.
const RETRY: Duration = Duration::from_secs(5);

/// Reason of a server that is not there because the API server would not have its StatefulSet.
const REFUSED: &str = "Refused";

/// Why a volume could not be looked after.
#[derive(Debug, thiserror::Error)]
pub(super) enum KeepError {
    #[error("cannot {doing}")]
    Api {
        doing: &'static str,
        #[source]
        source: kube::Error,
    },
    #[error("cannot remove its Secrets")]
    Secrets(#[from] SecretsError),
    #[error("its name is not a volume id")]
    Name,
}

impl KeepError {
    /// Whether the volume is another by now: the next look sees which.
    fn is_overtaken(&self) -> bool {
        matches!(self, Self::Api { source, .. } if is_conflict(source) || is_not_found(source))
    }
}

fn api(doing: &'static str) -> impl FnOnce(kube::Error) -> KeepError {
    move |source| KeepError::Api { doing, source }
}

/// A StatefulSet that was applied, and is as it was then while it has that uid and generation.
#[derive(Debug, Clone, PartialEq)]
struct Applied {
    wanted: StatefulSet,
    uid: Option<String>,
    generation: Option<i64>,
}

/// What keeps the volumes. Cheap to clone.
#[derive(Clone)]
pub(super) struct Keeper(Arc<Inner>);

struct Inner {
    client: Client,
    namespace: String,
    view: View,
    image: String,
    pods_have: ServerPods,
    volumes: Api<NbdVolume>,
    sets: Api<StatefulSet>,
    pods: Api<Pod>,
    certificates: Certificates,
    recorder: Recorder,
    metrics: Metrics,
    news: News,
    /// Volumes have their turns in the order in which they come.
    turns: Semaphore,
    /// The StatefulSets that were applied: what, and what that made of them.
    applied: Mutex<HashMap<String, Applied>>,
    /// Ports that were given on nodes whose network servers share, and may not be in the view yet.
    ports: Mutex<HashMap<(String, u16), String>>,
}

impl Keeper {
    pub(super) fn new(
        client: Client,
        namespace: &str,
        view: View,
        image: String,
        pods_have: ServerPods,
        metrics: Metrics,
        authority_overlap: Duration,
    ) -> Self {
        let recorder = Recorder::new(client.clone(), Reporter::from(CONTROLLER));
        Self(Arc::new(Inner {
            namespace: namespace.to_owned(),
            volumes: Api::namespaced(client.clone(), namespace),
            sets: Api::namespaced(client.clone(), namespace),
            pods: Api::namespaced(client.clone(), namespace),
            certificates: Certificates::new(client.clone(), namespace, authority_overlap),
            news: News::new(client.clone(), recorder.clone()),
            recorder,
            view,
            image,
            pods_have,
            metrics,
            turns: Semaphore::new(CONCURRENCY),
            applied: Mutex::default(),
            ports: Mutex::default(),
            client,
        }))
    }

    /// Keeps all volumes and pools, for ever. It may be dropped anywhere: everything it does may be repeated.
    pub(super) async fn run(self) {
        let inner = &self.0;
        let namespace = inner.namespace.clone();
        let ours = || watcher::Config::default().labels(VOLUME_LABEL);
        let servers = watcher::Config::default().labels(&format!("{COMPONENT_LABEL}={SERVER}"));
        let of_pod = move |pod: Pod| {
            let volume = pod.labels().get(VOLUME_LABEL).cloned();
            volume.map(|volume| ObjectRef::new(&volume).within(&namespace))
        };
        let (view, namespace) = (inner.view.clone(), inner.namespace.clone());
        let of_secret = move |secret: PartialObjectMeta<Secret>| {
            let (name, labelled) = (
                secret.name_any(),
                secret.labels().get(VOLUME_LABEL).cloned(),
            );
            let volumes = view.volumes().into_iter();
            // One's own has whatever labels it has.
            let users = volumes.filter(|volume| is_own(volume, &name));
            let users = users.map(|volume| volume.name_any());
            labelled
                .into_iter()
                .chain(users)
                .map(|volume| ObjectRef::new(&volume).within(&namespace))
                .collect::<Vec<_>>()
        };
        let secrets: Api<PartialObjectMeta<Secret>> =
            Api::namespaced(inner.client.clone(), &inner.namespace);
        let volumes = Controller::new(inner.volumes.clone(), watcher::Config::default())
            // The runtime's own limit takes those that wait in no order: with more work than it lets through, some would
            // wait until all others are done.
            .with_config(controller::Config::default().debounce(GATHER))
            .owns(inner.sets.clone(), ours())
            .watches(secrets, watcher::Config::default(), of_secret)
            .watches(inner.pods.clone(), servers, of_pod)
            // Not each change of a pool or node: agents write there all the time.
            .trigger_backoff(Pauses::of(WATCHES))
            .reconcile_all_on(inner.view.moves())
            .reconcile_all_on(inner.certificates.changes())
            .run(reconcile, again, Arc::clone(inner))
            .for_each(|looked| async move {
                // What failed on one volume was told where it failed.
                if let Err(error @ controller::Error::QueueError(_)) = &looked {
                    tracing::warn!(%error, "a watch broke off");
                }
            });
        tokio::join!(
            volumes,
            inner.measure_authority(),
            inner.certificates.keep_authority(),
            Pools::new(
                inner.client.clone(),
                &inner.namespace,
                inner.view.clone(),
                inner.recorder.clone()
            )
            .keep()
        );
    }
}

async fn reconcile(volume: Arc<NbdVolume>, keeper: Arc<Inner>) -> Result<Action, KeepError> {
    let turn = keeper.turns.acquire().await;
    // Who waits does so with little memory.
    let looked = Box::pin(keeper.keep(&volume)).await;
    drop(turn);
    let is_overtaken = looked.as_ref().is_err_and(KeepError::is_overtaken);
    keeper.metrics.looked(looked.is_ok() || is_overtaken);
    looked
}

// The signature is the runtime's.
#[allow(clippy::needless_pass_by_value)]
fn again(volume: Arc<NbdVolume>, error: &KeepError, _: Arc<Inner>) -> Action {
    if error.is_overtaken() {
        tracing::debug!(
            volume = volume.name_any(),
            error = chain(error),
            "overtaken"
        );
    } else {
        tracing::warn!(
            volume = volume.name_any(),
            error = chain(error),
            "cannot be kept"
        );
    }
    Action::requeue(RETRY)
}

impl Inner {
    async fn keep(&self, volume: &NbdVolume) -> Result<Action, KeepError> {
        let is_deleting = volume.metadata.deletion_timestamp.is_some();
        if is_deleting && volume.spec.attachments.is_empty() {
            return self.end(volume).await;
        }
        if !is_deleting && self.restore_finalizers(volume).await? {
            // The change brings it here again.
            return Ok(Action::await_change());
        }
        let id: VolumeId = volume.name_any().parse().map_err(|_| KeepError::Name)?;
        if let Some(spec) = without_ended(volume) {
            self.change(volume, spec).await?;
            return Ok(Action::await_change());
        }
        prune(&self.volumes, volume)
            .await
            .map_err(api("remove the status of former attachments"))?;
        let mut next = AGAIN;
        let certified = match self.certificates.ensure(volume, &id).await {
            Ok(ready) => {
                self.metrics.certified(id.as_str(), ready.end);
                next = next.min(until(ready.look_at));
                let said = match ready.problem {
                    None => Ok(ready.ends_soon),
                    Some(error) => {
                        next = SOON;
                        Err((error.reason(), chain(&error)))
                    }
                };
                Ok((ready.server, said))
            }
            Err(error) => {
                next = SOON;
                Err((error.reason(), chain(&error)))
            }
        };
        let server = match &certified {
            Ok((secret, _)) => self.serve(volume, secret).await?,
            // What was started goes on: it has its certificates in memory.
            Err(_) => {
                self.look(
                    volume,
                    "NoCertificates",
                    "its server waits for certificates",
                )
                .await?
            }
        };
        if matches!(
            server,
            Server::Away {
                reason: REFUSED,
                ..
            }
        ) {
            next = SOON;
        }
        let certified = certified.and_then(|(_, said)| said);
        self.tell(volume, &certified, &server).await?;
        Ok(Action::requeue(next))
    }

    /// Looks now and then when the managed authority ends, for ever.
    async fn measure_authority(&self) {
        loop {
            match self.certificates.authority_end().await {
                Ok(end) => self.metrics.authority(end),
                Err(error) => {
                    tracing::warn!(error = chain(&error), "cannot tell when the authority ends");
                }
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// Sees to it that the server runs, and says how it is.
    async fn serve(&self, volume: &NbdVolume, secret: &str) -> Result<Server, KeepError> {
        let conditions = volume
            .status
            .as_ref()
            .map(|status| status.conditions.as_slice());
        if !api::holds(conditions.unwrap_or_default(), BACKING_READY) {
            // A pod could not start without its directory; one that runs is not touched.
            return self
                .look(volume, "NoData", "its server waits for its data")
                .await;
        }
        let Some(pool) = self.view.pool(&volume.spec.pool) else {
            let message = format!(
                "NbdPool {} is gone, and with it the path of the data",
                volume.spec.pool
            );
            return self.look(volume, "NoPool", &message).await;
        };
        if pool.spec.host_network && volume.spec.port.is_none() {
            self.give_port(volume).await?;
            return self
                .look(volume, "NoPort", "its server waits for a port")
                .await;
        }
        let set = stateful_set(volume, &pool, secret, &self.image, &self.pods_have);
        if self.is_leftover(volume).await? {
            self.delete_set(volume).await?;
            return self
                .look(
                    volume,
                    "NoPod",
                    "the server of an earlier volume of its name is being ended",
                )
                .await;
        }
        match self.apply_set(set).await {
            Ok(()) => {}
            Err(kube::Error::Api(refusal)) if matches!(refusal.code, 403 | 422) => {
                // A quota or a policy: it is for a person to see.
                return self.look(volume, REFUSED, &refusal.message).await;
            }
            Err(error) => return Err(api("apply its StatefulSet")(error)),
        }
        self.look(volume, "NoPod", "its server's pod is not there yet")
            .await
    }

    /// Whether there is a StatefulSet of the volume's name that belonged to another one: its object was made again.
    async fn is_leftover(&self, volume: &NbdVolume) -> Result<bool, KeepError> {
        let now = self.sets.get_opt(&volume.name_any()).await;
        let now = now.map_err(api("read its StatefulSet"))?;
        Ok(now.is_some_and(|now| is_anothers(&now, volume)))
    }

    /// Makes the StatefulSet what it is to be, if somebody or something has made it another.
    async fn apply_set(&self, mut wanted: StatefulSet) -> kube::Result<()> {
        let name = wanted.name_any();
        let now = self.sets.get_opt(&name).await?;
        let seen = |now: &StatefulSet| Applied {
            wanted: wanted.clone(),
            uid: now.uid(),
            generation: now.metadata.generation,
        };
        if let Some(now) = &now
            && self.applied.lock().await.get(&name) == Some(&seen(now))
            && now.metadata.deletion_timestamp.is_none()
            && has_metadata(now, &wanted)
        {
            return Ok(());
        }
        let made = match now {
            None => {
                let params = PostParams {
                    field_manager: Some(CONTROLLER.to_owned()),
                    ..PostParams::default()
                };
                self.sets.create(&params, &wanted).await?
            }
            Some(now) => {
                wanted.metadata.resource_version = now.resource_version();
                apply(&self.sets, CONTROLLER, &wanted).await?
            }
        };
        wanted.metadata.resource_version = None;
        let applied = Applied {
            uid: made.uid(),
            generation: made.metadata.generation,
            wanted,
        };
        self.applied.lock().await.insert(name, applied);
        Ok(())
    }

    /// How the server's pod is; where there is none, this is why.
    async fn look(
        &self,
        volume: &NbdVolume,
        reason: &'static str,
        message: &str,
    ) -> Result<Server, KeepError> {
        let pod = self.pods.get_opt(&pod_name(&volume.name_any())).await;
        let pod = pod.map_err(api("read its server's pod"))?;
        Ok(match pod {
            Some(pod) => look(Some(&pod), volume.spec.port.unwrap_or(PORT)),
            None => Server::Away {
                reason,
                message: message.to_owned(),
            },
        })
    }

    /// Gives the server a port of the node's that no other server has.
    async fn give_port(&self, volume: &NbdVolume) -> Result<(), KeepError> {
        let (id, node) = (volume.name_any(), &volume.spec.node);
        let mut ports = self.ports.lock().await;
        let volumes = self.view.volumes();
        let is_taken = |port: u16| {
            let mut there = volumes.iter().filter(|other| other.spec.node == *node);
            let given = ports.get(&(node.clone(), port));
            there.any(|other| other.spec.port == Some(port) && other.name_any() != id)
                || given.is_some_and(|to| *to != id && self.view.has_volume(to))
        };
        let Some(port) = (PORT..=u16::MAX).find(|port| !is_taken(*port)) else {
            return Ok(());
        };
        ports.insert((node.clone(), port), id);
        self.change(volume, json!({ "port": port })).await
    }

    /// Puts back finalizers that somebody took away; whether there was anything to do.
    async fn restore_finalizers(&self, volume: &NbdVolume) -> Result<bool, KeepError> {
        let mut finalizers = volume.finalizers().to_vec();
        let before = finalizers.len();
        for needed in [BACKING_FINALIZER, SERVER_FINALIZER] {
            if !finalizers.iter().any(|held| held == needed) {
                finalizers.push(needed.to_owned());
            }
        }
        if finalizers.len() == before {
            return Ok(false);
        }
        let patch = json!({ "metadata": {
            "resourceVersion": volume.resource_version(),
            "finalizers": finalizers,
        }});
        self.patch(volume, patch).await?;
        Ok(true)
    }

    async fn change(&self, volume: &NbdVolume, spec: Value) -> Result<(), KeepError> {
        let patch = json!({
            "metadata": { "resourceVersion": volume.resource_version() },
            "spec": spec,
        });
        self.patch(volume, patch).await
    }

    async fn patch(&self, volume: &NbdVolume, patch: Value) -> Result<(), KeepError> {
        let params = PatchParams {
            field_manager: Some(CONTROLLER.to_owned()),
            ..PatchParams::default()
        };
        let patched = self
            .volumes
            .patch(&volume.name_any(), &params, &Patch::Merge(patch))
            .await;
        patched.map(|_| ()).map_err(api("change its object"))
    }

    /// Ends the server, removes the Secrets, and lets the agent delete the data.
    async fn end(&self, volume: &NbdVolume) -> Result<Action, KeepError> {
        if !volume
            .finalizers()
            .iter()
            .any(|held| held == SERVER_FINALIZER)
        {
            let server = Server::Away {
                reason: "Ended",
                message: "it is ended".to_owned(),
            };
            self.tell(volume, &Ok(None), &server).await?;
            return Ok(Action::await_change());
        }
        let id = volume.name_any();
        self.delete_set(volume).await?;
        let pod = self.pods.get_opt(&pod_name(&id)).await;
        if pod.map_err(api("read its server's pod"))?.is_some() {
            let server = Server::Away {
                reason: "Ending",
                message: format!("pod {} is ending", pod_name(&id)),
            };
            self.tell(volume, &Ok(None), &server).await?;
            // The pod's end is watched; this is for a pod that is not ours to see.
            return Ok(Action::requeue(SOON));
        }
        self.certificates.remove(volume).await?;
        self.metrics.ended(&id);
        let left: Vec<_> = volume
            .finalizers()
            .iter()
            .filter(|held| *held != SERVER_FINALIZER)
            .collect();
        let patch = json!({ "metadata": {
            "resourceVersion": volume.resource_version(),
            "finalizers": left,
        }});
        self.patch(volume, patch).await?;
        self.news.forget(volume).await;
        tracing::info!(volume = id, "its server and Secrets are gone");
        Ok(Action::await_change())
    }

    /// Deletes the volume's StatefulSet; that of an earlier or later volume of that name is let be.
    async fn delete_set(&self, volume: &NbdVolume) -> Result<(), KeepError> {
        let id = volume.name_any();
        let now = self.sets.get_opt(&id).await;
        let Some(now) = now.map_err(api("read its StatefulSet"))? else {
            return Ok(());
        };
        if now.metadata.deletion_timestamp.is_some() {
            return Ok(());
        }
        if is_anothers(&now, volume) {
            // Either it is a leftover, or this volume is.
            let live = self.volumes.get_opt(&id).await;
            let live = live.map_err(api("read its object"))?;
            if live.is_none_or(|live| live.uid() != volume.uid()) {
                return Ok(());
            }
        }
        let mut params = DeleteParams::background();
        params.preconditions = Some(Preconditions {
            uid: now.uid(),
            resource_version: None,
        });
        self.applied.lock().await.remove(&id);
        match self.sets.delete(&id, &params).await {
            Err(error) if !is_not_found(&error) => Err(api("delete its StatefulSet")(error)),
            _ => Ok(()),
        }
    }

    /// Writes the status where it is not that already, and an Event where something became wrong.
    async fn tell(
        &self,
        volume: &NbdVolume,
        certified: &Certified,
        server: &Server,
    ) -> Result<(), KeepError> {
        let (pool, node) = (&volume.spec.pool, &volume.spec.node);
        let standing = self.view.standing(pool, node);
        let said = status(volume, certified, server, &standing);
        self.news.tell_late(volume, &said).await;
        if is_said(volume, &said) {
            return Ok(());
        }
        apply_status_of(&self.volumes, volume, CONTROLLER, &said)
            .await
            .map_err(api("write its status"))?;
        self.news.publish(volume, &said).await;
        Ok(())
    }
}

/// Whether the StatefulSet belongs to another volume of that name.
fn is_anothers(set: &StatefulSet, volume: &NbdVolume) -> bool {
    let mut owners = set.owner_references().iter();
    owners.any(|owner| owner.kind == "NbdVolume" && Some(&owner.uid) != volume.uid().as_ref())
}

/// Whether the StatefulSet has the labels and the owner that it is to have: their change is no new generation.
fn has_metadata(now: &StatefulSet, wanted: &StatefulSet) -> bool {
    let mut labels = wanted.labels().iter();
    let mut owners = wanted.owner_references().iter();
    labels.all(|(key, value)| now.labels().get(key) == Some(value))
        && owners.all(|owner| now.owner_references().contains(owner))
}

/// Until that second since 1970; at least a minute, so that a certificate that cannot be renewed is no busy loop.
fn until(when: i64) -> Duration {
    let seconds = when - OffsetDateTime::now_utc().unix_timestamp();
    Duration::from_secs(u64::try_from(seconds).unwrap_or(0).max(60))
}
