//! What is known of the cluster: one watch on each kind of object, shared by all calls; and what it means in words.

use std::fmt::Debug;
use std::hash::Hash;
use std::sync::Arc;

use futures::{Stream, StreamExt};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::jiff::SignedDuration;
use kube::core::PartialObjectMeta;
use kube::runtime::reflector::{self, ObjectRef, Store};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use super::attach::state;
use super::backing;
use crate::kube::api::{
    self, AttachmentState, BACKING_FINALIZER, BACKING_READY, CERTIFICATES_READY, NO_ZONE, NbdPool,
    NbdVolume, PoolNode, READY, SERVER_FINALIZER, SERVER_READY, ZONE_LABEL,
};
use crate::kube::follow::Pauses;
use crate::volumes::VolumesError;

/// How long an agent may be silent: it writes once a minute.
pub(super) const SILENCE: SignedDuration = SignedDuration::from_secs(180);

/// The cluster as it was seen last. Cheap to clone; the watches end with the last clone.
#[derive(Clone)]
pub struct View {
    namespace: String,
    volumes: Store<NbdVolume>,
    pools: Store<NbdPool>,
    nodes: Store<PartialObjectMeta<Node>>,
    changes: watch::Receiver<()>,
    _watches: Arc<[AbortOnDropHandle<()>; 3]>,
}

impl View {
    /// Begins to watch the volumes in `namespace`, all pools and all nodes.
    #[must_use]
    pub fn watch(client: &Client, namespace: &str) -> Self {
        let config = watcher::Config::default;
        let (told, changes) = watch::channel(());
        let told = Arc::new(told);
        let (volumes, volumes_watch) = keep(
            watcher(
                Api::<NbdVolume>::namespaced(client.clone(), namespace),
                config(),
            ),
            Arc::clone(&told),
        );
        let (pools, pools_watch) = keep(
            watcher(Api::<NbdPool>::all(client.clone()), config()),
            Arc::clone(&told),
        );
        let (nodes, nodes_watch) = keep(
            watcher(
                Api::<PartialObjectMeta<Node>>::all(client.clone()),
                config(),
            ),
            told,
        );
        Self {
            namespace: namespace.to_owned(),
            volumes,
            pools,
            nodes,
            changes,
            _watches: Arc::new([volumes_watch, pools_watch, nodes_watch]),
        }
    }

    /// Waits until everything was listed once.
    pub async fn complete(&self) {
        // An error means that the watch is over, and so is this process.
        let _ = self.volumes.wait_until_ready().await;
        let _ = self.pools.wait_until_ready().await;
        let _ = self.nodes.wait_until_ready().await;
    }

    pub(super) fn changes(&self) -> watch::Receiver<()> {
        self.changes.clone()
    }

    pub(super) fn volume(&self, id: &str) -> Option<Arc<NbdVolume>> {
        self.volumes
            .get(&ObjectRef::new(id).within(&self.namespace))
    }

    #[must_use]
    pub fn has_volume(&self, id: &str) -> bool {
        self.volume(id).is_some()
    }

    #[must_use]
    pub fn volumes(&self) -> Vec<Arc<NbdVolume>> {
        self.volumes.state()
    }

    #[must_use]
    pub fn pool(&self, name: &str) -> Option<Arc<NbdPool>> {
        self.pools.get(&ObjectRef::new(name))
    }

    #[must_use]
    pub fn pools(&self) -> Vec<Arc<NbdPool>> {
        self.pools.state()
    }

    pub(super) fn node(&self, name: &str) -> Option<Arc<PartialObjectMeta<Node>>> {
        self.nodes.get(&ObjectRef::new(name))
    }

    /// A node's zone, as its topology says it.
    #[must_use]
    pub fn zone(&self, node: &str) -> String {
        let node = self.node(node);
        let zone = node.as_ref().and_then(|node| node.labels().get(ZONE_LABEL));
        zone.cloned().unwrap_or_else(|| NO_ZONE.to_owned())
    }

    /// Volumes that are attached to the node, as far as is known.
    pub(super) fn attached_to(&self, node: &str) -> u64 {
        let volumes = self.volumes.state();
        let is_there = |volume: &&Arc<NbdVolume>| {
            let mut attachments = volume.spec.attachments.iter();
            attachments.any(|one| one.node == node && !one.revoked)
        };
        u64::try_from(volumes.iter().filter(is_there).count()).unwrap_or(u64::MAX)
    }

    /// The share of a pool on the node that keeps the volume.
    fn share(&self, object: &NbdVolume) -> Option<PoolNode> {
        let pool = self.pool(&object.spec.pool)?;
        let mut nodes = pool.status.as_ref()?.nodes.iter();
        nodes.find(|node| node.name == object.spec.node).cloned()
    }

    /// Refuses to ask for more than the pool can give: it could not be taken back.
    pub(super) fn check_room_to_grow(
        &self,
        object: &NbdVolume,
        more: u64,
    ) -> Result<(), VolumesError> {
        match self.share(object) {
            Some(share) if share.available_bytes < more => Err(VolumesError::NoRoom(format!(
                "volume {} needs {more} bytes more, but pool {} has {} bytes left on node {}",
                object.name_any(),
                object.spec.pool,
                share.available_bytes,
                share.name
            ))),
            _ => Ok(()),
        }
    }

    /// How it is with the agent that keeps the volume.
    fn agent(&self, object: &NbdVolume) -> String {
        let (pool, node) = (&object.spec.pool, &object.spec.node);
        match self.standing(pool, node).message(pool, node) {
            message if message.is_empty() => format!("waiting for the agent on node {node}"),
            message => format!("waiting for the agent on node {node}: {message}"),
        }
    }

    /// What the agent said of the backing store last, or how it is with it.
    pub(super) fn agent_says(&self, object: &NbdVolume) -> String {
        match backing(object).filter(|condition| condition.status == "False") {
            Some(condition) => format!(
                "but the agent on node {} says: {}",
                object.spec.node, condition.message
            ),
            None => self.agent(object),
        }
    }

    pub(super) fn creation_waits_for(&self, object: &NbdVolume) -> String {
        let conditions = object
            .status
            .as_ref()
            .map(|status| status.conditions.as_slice());
        let conditions = conditions.unwrap_or_default();
        let mut waits = Vec::new();
        if !api::holds(conditions, BACKING_READY) {
            waits.push(self.agent_says(object));
        }
        if !api::holds(conditions, CERTIFICATES_READY) {
            waits.push(said(object, CERTIFICATES_READY, "its certificates"));
        }
        format!("it is being made: {}", waits.join("; "))
    }

    pub(super) fn attachment_waits_for(&self, object: &NbdVolume, id: &str) -> String {
        let mut waits = Vec::new();
        if state(object, id) != Some(AttachmentState::Allowed) {
            waits.push(self.agent_says(object));
        }
        if object
            .status
            .as_ref()
            .is_none_or(|status| status.endpoint.is_none())
        {
            waits.push(said(object, SERVER_READY, "its server"));
        }
        format!("it is being attached: {}", waits.join("; "))
    }

    pub(super) fn revocation_waits_for(&self, object: &NbdVolume) -> String {
        let nodes: Vec<_> = object
            .spec
            .attachments
            .iter()
            .filter(|one| one.revoked && state(object, &one.id) != Some(AttachmentState::Revoked))
            .map(|one| one.node.as_str())
            .collect();
        format!(
            "it is being detached from {}: {}",
            nodes.join(", "),
            self.agent(object)
        )
    }

    pub(super) fn deletion_waits_for(&self, object: &NbdVolume) -> String {
        let finalizers = object.finalizers();
        let held = |name: &str| finalizers.iter().any(|held| held == name);
        if held(SERVER_FINALIZER) {
            return said(object, READY, "its server to end");
        }
        if held(BACKING_FINALIZER) {
            return format!("its data is being deleted: {}", self.agent(object));
        }
        "it is being deleted".to_owned()
    }
}

/// What a condition says, or that nothing was said yet.
fn said(object: &NbdVolume, condition: &str, what: &str) -> String {
    let conditions = object
        .status
        .as_ref()
        .map(|status| status.conditions.as_slice());
    match api::find_condition(conditions.unwrap_or_default(), condition) {
        Some(condition) if !condition.message.is_empty() => {
            format!("waiting for {what}: {}", condition.message)
        }
        _ => format!("waiting for {what}"),
    }
}

/// Keeps the objects of a watch, and tells of every change after it was made.
fn keep<K>(
    events: impl Stream<Item = watcher::Result<watcher::Event<K>>> + Send + 'static,
    told: Arc<watch::Sender<()>>,
) -> (Store<K>, AbortOnDropHandle<()>)
where
    K: Resource + Clone + Debug + Send + Sync + 'static,
    K::DynamicType: Hash + Eq + Clone + Default + Send + Sync,
{
    let (store, writer) = reflector::store();
    let watch = async move {
        let events = reflector::reflector(writer, events.backoff(Pauses::of(1)));
        let mut events = std::pin::pin!(events);
        while let Some(event) = events.next().await {
            match event {
                Ok(_) => {
                    told.send_replace(());
                }
                // It is tried again.
                Err(error) => tracing::warn!(%error, "a watch broke off"),
            }
        }
    };
    (store, AbortOnDropHandle::new(tokio::spawn(watch)))
}
