//! Keeps each volume's server and Secrets as its object says, whatever happened to them.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{Pod, Secret};
use kube::api::{DeleteParams, Patch, PatchParams};
use kube::core::PartialObjectMeta;
use kube::runtime::controller::{self, Action, Controller};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::runtime::reflector::ObjectRef;
use kube::runtime::watcher;
use kube::{Api, Client, Resource, ResourceExt};
use serde_json::{Value, json};
use time::OffsetDateTime;
use tokio::sync::Mutex;

use super::certificates::{Certificates, SecretsError};
use super::metrics::Metrics;
use super::pools;
use super::server::{PORT, Server, ServerPods, look, pod_name, stateful_set};
use super::status::{Certified, is_said, status};
use crate::csi::chain;
use crate::kube::api::{
    self, BACKING_FINALIZER, BACKING_READY, COMPONENT_LABEL, CONTROLLER, NbdPool, NbdVolume,
    NbdVolumeStatus, SERVER, SERVER_FINALIZER, VOLUME_LABEL,
};
use crate::kube::apply::{apply, apply_status, is_conflict, is_not_found};
use crate::kube::volumes::{View, prune, without_ended};
use crate::volumes::VolumeId;

/// How many volumes are looked at side by side.
const CONCURRENCY: u16 = 16;

/// How long changes of one volume are gathered before it is looked at.
const GATHER: Duration = Duration::from_millis(50);

/// How often a volume is looked at though nothing is known to have changed.
const AGAIN: Duration = Duration::from_secs(600);

/// How often a volume is looked at that waits for something that is not watched.
const SOON: Duration = Duration::from_secs(10);

/// After how long a failed look is repeated.
const RETRY: Duration = Duration::from_secs(5);

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
    ) -> Self {
        let reporter = Reporter::from(CONTROLLER);
        Self(Arc::new(Inner {
            namespace: namespace.to_owned(),
            volumes: Api::namespaced(client.clone(), namespace),
            sets: Api::namespaced(client.clone(), namespace),
            pods: Api::namespaced(client.clone(), namespace),
            certificates: Certificates::new(client.clone(), namespace),
            recorder: Recorder::new(client.clone(), reporter),
            view,
            image,
            pods_have,
            metrics,
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
        let view = inner.view.clone();
        let of_pool = move |pool: NbdPool| {
            let name = pool.name_any();
            let volumes = view.volumes().into_iter();
            let of_it = volumes.filter(move |volume| volume.spec.pool == name);
            of_it
                .map(|volume| ObjectRef::from_obj(&*volume))
                .collect::<Vec<_>>()
        };
        let secrets: Api<PartialObjectMeta<Secret>> =
            Api::namespaced(inner.client.clone(), &inner.namespace);
        let volumes = Controller::new(inner.volumes.clone(), watcher::Config::default())
            .with_config(
                controller::Config::default()
                    .concurrency(CONCURRENCY)
                    .debounce(GATHER),
            )
            .owns(inner.sets.clone(), ours())
            .owns(secrets, ours())
            .watches(inner.pods.clone(), servers, of_pod)
            .watches(
                Api::<NbdPool>::all(inner.client.clone()),
                watcher::Config::default(),
                of_pool,
            )
            .run(reconcile, again, Arc::clone(inner))
            .for_each(|looked| async move {
                // What failed on one volume was told where it failed.
                if let Err(error @ controller::Error::QueueError(_)) = &looked {
                    tracing::warn!(%error, "a watch broke off");
                }
            });
        tokio::join!(
            volumes,
            pools::keep(inner.client.clone(), inner.view.clone()),
            inner.measure_authority()
        );
    }
}

async fn reconcile(volume: Arc<NbdVolume>, keeper: Arc<Inner>) -> Result<Action, KeepError> {
    let looked = keeper.keep(&volume).await;
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
                next = next.min(until(ready.renew_at));
                self.metrics.certified(id.as_str(), ready.end);
                Ok(ready.server)
            }
            Err(error) => {
                next = SOON;
                Err((error.reason(), chain(&error)))
            }
        };
        let server = match &certified {
            Ok(secret) => self.serve(volume, secret).await?,
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
        self.tell(volume, &certified.map(|_| ()), &server).await?;
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
        match apply(&self.sets, CONTROLLER, &set).await {
            Ok(_) => {}
            Err(kube::Error::Api(refusal)) if matches!(refusal.code, 403 | 422) => {
                // A quota or a policy: it is for a person to see.
                return self.look(volume, "Refused", &refusal.message).await;
            }
            Err(error) => return Err(api("apply its StatefulSet")(error)),
        }
        self.look(volume, "NoPod", "its server's pod is not there yet")
            .await
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
            return Ok(Action::await_change());
        }
        let id = volume.name_any();
        let away = |message: String| Server::Away {
            reason: "Ending",
            message,
        };
        match self.sets.delete(&id, &DeleteParams::background()).await {
            Err(error) if !is_not_found(&error) => {
                return Err(api("delete its StatefulSet")(error));
            }
            _ => {}
        }
        let pod = self.pods.get_opt(&pod_name(&id)).await;
        if pod.map_err(api("read its server's pod"))?.is_some() {
            let server = away(format!("pod {} is ending", pod_name(&id)));
            self.tell(volume, &Ok(()), &server).await?;
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
        tracing::info!(volume = id, "its server and Secrets are gone");
        Ok(Action::await_change())
    }

    /// Writes the status where it is not that already, and an Event where something became wrong.
    async fn tell(
        &self,
        volume: &NbdVolume,
        certified: &Certified,
        server: &Server,
    ) -> Result<(), KeepError> {
        let absent_agent = self.view.absent_agent(volume);
        let said = status(volume, certified, server, absent_agent.as_deref());
        if is_said(volume, &said) {
            return Ok(());
        }
        apply_status(&self.volumes, volume, CONTROLLER, &said)
            .await
            .map_err(api("write its status"))?;
        self.publish(volume, &said).await;
        Ok(())
    }

    /// Tells as Events what became wrong since the object was seen.
    async fn publish(&self, volume: &NbdVolume, said: &NbdVolumeStatus) {
        let old = volume
            .status
            .as_ref()
            .map(|status| status.conditions.as_slice());
        let old = old.unwrap_or_default();
        for condition in &said.conditions {
            let before = api::find_condition(old, &condition.type_);
            let is_news = before.is_none_or(|before| {
                (&before.reason, &before.message) != (&condition.reason, &condition.message)
            });
            let is_wrong = condition.status == "False" && condition.type_ != api::READY;
            // A volume that is new has nothing yet, and a server that is ending was told to.
            let is_usual = [
                "NoPod",
                "NoData",
                "NoPort",
                "NoCertificates",
                "Ending",
                "SecretMissing",
            ]
            .contains(&condition.reason.as_str())
                || condition.message.ends_with("it is being started");
            if !is_news || !is_wrong || is_usual {
                continue;
            }
            let event = Event {
                type_: EventType::Warning,
                reason: condition.reason.clone(),
                note: Some(condition.message.chars().take(1000).collect()),
                action: "Reconcile".to_owned(),
                secondary: None,
            };
            if let Err(error) = self.recorder.publish(&event, &volume.object_ref(&())).await {
                tracing::debug!(%error, "an Event is lost");
            }
        }
    }
}

/// Until that second since 1970; at least a minute, so that a certificate that cannot be renewed is no busy loop.
fn until(when: i64) -> Duration {
    let seconds = when - OffsetDateTime::now_utc().unix_timestamp();
    Duration::from_secs(u64::try_from(seconds).unwrap_or(0).max(60))
}
