//! `hawser agent`: the pools of a storage node.
//!
//! It makes, grows and deletes backing stores as the NbdVolumes of its node ask, tells their servers who may connect,
//! and says in the objects' statuses what is. What it finds after a restart it goes on with; what no object names it
//! reports and leaves alone. While the API server is away it does nothing, and nothing is undone.
//!
//! - `decide`: what is to be done, as pure functions
//! - `pools`, `volume`: doing it on disk and at the servers
//! - `queue`, `reconcile`: when, and what is said of it
//! - `survey`: what is said of the pools; `metrics`: what is measured

mod command;
mod decide;
pub(crate) mod metrics;
mod pools;
mod queue;
mod reconcile;
mod survey;
mod volume;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::Node;
use kube::{Api, Client, ResourceExt};
use tokio::sync::{Notify, mpsc, watch};

pub use self::command::{Args, run};

use self::metrics::Metrics;
use self::pools::{PoolError, Pools};
use crate::kube::api::{BACKING_READY, NbdPool, NbdVolume, find_condition};
use crate::kube::follow::Seen;
use crate::storage::Pool;
use crate::volumes::VolumeId;

/// How long one look at a volume may take. Revoking waits for a disk, and for the API server.
const LOOK: Duration = Duration::from_secs(150);

/// What the agent of one node knows and works with.
struct Agent {
    node: String,
    volumes: Api<NbdVolume>,
    pool_objects: Api<NbdPool>,
    nodes: Api<Node>,
    pools: Pools,
    seen: Mutex<World>,
    /// Which of the watches were heard.
    heard: watch::Sender<Heard>,
    /// Asks for a look at a volume.
    ask: mpsc::UnboundedSender<VolumeId>,
    /// Told when the pools have to be surveyed again.
    changed: Notify,
    /// The orphans of each pool that the log has.
    told_orphans: Mutex<BTreeMap<String, Vec<String>>>,
    metrics: Metrics,
}

/// What the API server has, as far as it concerns this node.
#[derive(Default)]
struct World {
    volumes: HashMap<VolumeId, Arc<NbdVolume>>,
    pools: BTreeMap<String, Arc<NbdPool>>,
    labels: BTreeMap<String, String>,
}

/// The watches that have begun with all there is.
#[derive(Debug, Clone, Copy, Default)]
struct Heard {
    volumes: bool,
    pools: bool,
    node: bool,
}

impl Heard {
    fn everything(self) -> bool {
        self.volumes && self.pools && self.node
    }
}

/// Whether two states of an object ask for different things.
fn asks_otherwise(before: &NbdVolume, now: &NbdVolume) -> bool {
    let asked = |object: &NbdVolume| {
        let metadata = object.metadata.clone();
        let format = object
            .status
            .as_ref()
            .and_then(|status| status.format.clone());
        (
            metadata.uid,
            metadata.deletion_timestamp,
            metadata.finalizers,
            object.spec.clone(),
            format,
        )
    };
    asked(before) != asked(now) || has_lost(before, now)
}

/// Whether something that we said in the status is not said any more: somebody wiped it.
fn has_lost(before: &NbdVolume, now: &NbdVolume) -> bool {
    let said = |object: &NbdVolume| {
        let status = object.status.clone().unwrap_or_default();
        let is_asked = |id: &str| now.spec.attachments.iter().any(|one| one.id == id);
        let attachments = status.attachments.iter();
        let stated = attachments.filter(|one| one.state.is_some() && is_asked(&one.id));
        (
            status.size_bytes.is_some(),
            find_condition(&status.conditions, BACKING_READY).is_some(),
            stated.count(),
        )
    };
    let (before, now) = (said(before), said(now));
    (before.0 && !now.0) || (before.1 && !now.1) || before.2 > now.2
}

impl Agent {
    fn new(
        client: &Client,
        namespace: &str,
        node: &str,
        root: &Path,
        ask: mpsc::UnboundedSender<VolumeId>,
    ) -> Self {
        Self {
            node: node.to_owned(),
            volumes: Api::namespaced(client.clone(), namespace),
            pool_objects: Api::all(client.clone()),
            nodes: Api::all(client.clone()),
            pools: Pools::new(root),
            seen: Mutex::default(),
            heard: watch::Sender::default(),
            ask,
            changed: Notify::new(),
            told_orphans: Mutex::default(),
            metrics: Metrics::default(),
        }
    }

    fn seen(&self) -> MutexGuard<'_, World> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The object of a volume that is kept here, as it was seen last.
    fn volume(&self, id: &VolumeId) -> Option<Arc<NbdVolume>> {
        self.seen().volumes.get(id).cloned()
    }

    fn see_volumes(&self, seen: Seen<NbdVolume>) {
        let mut world = self.seen();
        let is_ours = |object: &NbdVolume| object.spec.node == self.node;
        let named = |object: NbdVolume| {
            let id = object.name_any().parse::<VolumeId>().ok()?;
            Some((id, Arc::new(object)))
        };
        let mut changed = Vec::new();
        match seen {
            Seen::All(objects) => {
                let ours = objects.into_iter().filter(is_ours).filter_map(named);
                let before = std::mem::replace(&mut world.volumes, ours.collect());
                changed.extend(world.volumes.keys().cloned());
                if world.volumes.len() != before.len() {
                    self.changed.notify_one();
                }
                self.heard.send_modify(|heard| heard.volumes = true);
            }
            Seen::Present(object) => {
                if is_ours(&object)
                    && let Some((id, object)) = named(object)
                {
                    let before = world.volumes.insert(id.clone(), Arc::clone(&object));
                    // Others' words in the status, and our own, are no news.
                    if before.is_none_or(|before| asks_otherwise(&before, &object)) {
                        changed.push(id);
                    }
                }
            }
            Seen::Gone(object) => {
                if let Some((id, _)) = named(object)
                    && world.volumes.remove(&id).is_some()
                {
                    self.changed.notify_one();
                }
            }
        }
        drop(world);
        for id in changed {
            // Nobody looks any more where this process ends.
            let _ = self.ask.send(id);
        }
    }

    fn see_pools(&self, seen: Seen<NbdPool>) {
        let mut world = self.seen();
        match seen {
            Seen::All(objects) => {
                let named = objects.into_iter();
                world.pools = named
                    .map(|object| (object.name_any(), Arc::new(object)))
                    .collect();
                self.heard.send_modify(|heard| heard.pools = true);
                self.changed.notify_one();
            }
            Seen::Present(object) => {
                let name = object.name_any();
                let before = world.pools.insert(name, Arc::new(object.clone()));
                // Every agent writes into the same status.
                if before.is_none_or(|before| before.spec != object.spec) {
                    self.changed.notify_one();
                }
            }
            Seen::Gone(object) => {
                world.pools.remove(&object.name_any());
            }
        }
    }

    fn see_node(&self, seen: Seen<Node>) {
        let node = match seen {
            Seen::All(mut nodes) => {
                self.heard.send_modify(|heard| heard.node = true);
                nodes.pop()
            }
            Seen::Present(node) => Some(node),
            Seen::Gone(_) => None,
        };
        let labels = node.map(|node| node.labels().clone()).unwrap_or_default();
        let mut world = self.seen();
        if world.labels != labels {
            world.labels = labels;
            self.changed.notify_one();
        }
    }

    /// The pool that keeps a volume, opened.
    async fn pool_of(self: &Arc<Self>, object: &NbdVolume) -> Result<Arc<Pool>, PoolError> {
        self.open(&object.spec.pool).await
    }

    async fn open(self: &Arc<Self>, name: &str) -> Result<Arc<Pool>, PoolError> {
        let (pool, expected) = {
            let world = self.seen();
            let pool = world.pools.get(name).cloned();
            let made = world
                .volumes
                .values()
                .filter(|object| object.spec.pool == name && decide::was_made(object));
            (pool, made.count())
        };
        let pool = pool.ok_or_else(|| PoolError::Unknown(name.to_owned()))?;
        let (agent, name) = (Arc::clone(self), name.to_owned());
        tokio::task::spawn_blocking(move || agent.pools.open(&name, &pool.spec, expected))
            .await
            .unwrap_or(Err(PoolError::ShuttingDown))
    }
}
