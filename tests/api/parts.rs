//! The parts of a cluster that are played here: the agents, and what makes pods of StatefulSets.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use futures::StreamExt;
use hawser::kube::api::{
    AGENT, AttachmentState, AttachmentStatus, BACKING_FINALIZER, BACKING_READY, NO_ROOM, NbdPool,
    NbdVolume, NbdVolumeStatus, SERVER_FINALIZER, agent_manager, condition, now,
};
use hawser::kube::apply::{apply_status, is_conflict, is_not_found};
use hawser::kube::follow::{Seen, follow};
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::runtime::watcher;
use kube::{Api, Client, Resource, ResourceExt};
use serde_json::json;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

/// How often a part looks again though it heard nothing.
const TURN: Duration = Duration::from_millis(500);

/// How often an agent says that it is there.
const HEARTBEAT: Duration = Duration::from_secs(60);

/// What a part does side by side.
const SIDE_BY_SIDE: usize = 8;

/// A node's room for one pool's volumes.
#[derive(Debug)]
struct Room {
    bytes: u64,
    /// The volumes there, by the uid of their object.
    kept: HashMap<String, u64>,
    is_told: bool,
    told_at: Instant,
}

/// What the agents of all nodes do.
pub(crate) struct Agent {
    played: Arc<Played>,
    tasks: [JoinHandle<()>; 2],
}

struct Played {
    client: Client,
    volumes: Api<NbdVolume>,
    is_awake: AtomicBool,
    /// Objects that changed and were not looked at since.
    changed: Mutex<HashMap<String, NbdVolume>>,
    news: Notify,
    rooms: Mutex<BTreeMap<(String, String), Room>>,
}

impl Agent {
    pub(crate) fn start(client: Client, namespace: &str) -> Self {
        let played = Arc::new(Played {
            volumes: Api::namespaced(client.clone(), namespace),
            client,
            is_awake: AtomicBool::new(true),
            changed: Mutex::default(),
            news: Notify::new(),
            rooms: Mutex::default(),
        });
        let (seeing, working) = (Arc::clone(&played), Arc::clone(&played));
        let see = async move {
            let api = seeing.volumes.clone();
            follow(api, watcher::Config::default(), |seen| seeing.see(seen)).await;
        };
        let tasks = [tokio::spawn(see), tokio::spawn(working.work())];
        Self { played, tasks }
    }

    pub(crate) fn sleeps(&self, asleep: bool) {
        self.played.is_awake.store(!asleep, Ordering::SeqCst);
        self.played.news.notify_one();
    }

    /// From now on that node has so much room for that pool's volumes, and says what is left of it.
    pub(crate) fn keeps(&self, pool: &str, node: &str, bytes: u64) {
        let room = Room {
            bytes,
            kept: HashMap::new(),
            is_told: false,
            told_at: Instant::now(),
        };
        let mut rooms = self
            .played
            .rooms
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        rooms.insert((pool.to_owned(), node.to_owned()), room);
        self.played.news.notify_one();
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Played {
    fn see(&self, seen: Seen<NbdVolume>) {
        let mut changed = self.changed.lock().unwrap_or_else(PoisonError::into_inner);
        match seen {
            Seen::All(all) => changed.extend(all.into_iter().map(|one| (one.name_any(), one))),
            Seen::Present(one) => drop(changed.insert(one.name_any(), one)),
            Seen::Gone(one) => {
                changed.remove(&one.name_any());
                self.forget(&one);
            }
        }
        self.news.notify_one();
    }

    async fn work(self: Arc<Self>) {
        loop {
            let _ = tokio::time::timeout(TURN, self.news.notified()).await;
            if !self.is_awake.load(Ordering::SeqCst) {
                continue;
            }
            let batch =
                std::mem::take(&mut *self.changed.lock().unwrap_or_else(PoisonError::into_inner));
            let look = async |(name, volume): (String, NbdVolume)| {
                match self.look_after(&volume).await {
                    // A newer state of it is on its way.
                    Err(error) if is_conflict(&error) || is_not_found(&error) => {}
                    Err(_) => {
                        let mut changed =
                            self.changed.lock().unwrap_or_else(PoisonError::into_inner);
                        changed.entry(name).or_insert(volume);
                    }
                    Ok(()) => {}
                }
            };
            futures::stream::iter(batch)
                .for_each_concurrent(SIDE_BY_SIDE, look)
                .await;
            self.tell_rooms().await;
        }
    }

    fn forget(&self, volume: &NbdVolume) {
        let mut rooms = self.rooms.lock().unwrap_or_else(PoisonError::into_inner);
        let place = (volume.spec.pool.clone(), volume.spec.node.clone());
        if let Some(room) = rooms.get_mut(&place)
            && room
                .kept
                .remove(&volume.uid().unwrap_or_default())
                .is_some()
        {
            room.is_told = false;
        }
    }

    /// Whether the volume has its room.
    fn has_room(&self, volume: &NbdVolume) -> bool {
        let mut rooms = self.rooms.lock().unwrap_or_else(PoisonError::into_inner);
        let place = (volume.spec.pool.clone(), volume.spec.node.clone());
        let Some(room) = rooms.get_mut(&place) else {
            return true;
        };
        let uid = volume.uid().unwrap_or_default();
        let others = room.kept.iter().filter(|(other, _)| **other != uid);
        let taken: u64 = others.map(|(_, bytes)| bytes).sum();
        if taken + volume.spec.size_bytes > room.bytes {
            return room.kept.contains_key(&uid);
        }
        if room.kept.insert(uid, volume.spec.size_bytes) != Some(volume.spec.size_bytes) {
            room.is_told = false;
        }
        true
    }

    async fn tell_rooms(&self) {
        let due: Vec<_> = {
            let mut rooms = self.rooms.lock().unwrap_or_else(PoisonError::into_inner);
            let due = rooms
                .iter_mut()
                .filter(|(_, room)| !room.is_told || room.told_at.elapsed() > HEARTBEAT);
            due.map(|(place, room)| {
                room.is_told = true;
                room.told_at = Instant::now();
                (place.clone(), room.bytes, room.kept.values().sum::<u64>())
            })
            .collect()
        };
        for ((pool, node), bytes, taken) in due {
            let told = report_left(&self.client, &pool, &node, bytes, bytes - taken).await;
            if told.is_err() {
                let mut rooms = self.rooms.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(room) = rooms.get_mut(&(pool, node)) {
                    room.is_told = false;
                }
            }
        }
    }

    async fn look_after(&self, volume: &NbdVolume) -> kube::Result<()> {
        let held = |name: &str| volume.finalizers().iter().any(|held| held == name);
        if volume.metadata.deletion_timestamp.is_some() && !held(SERVER_FINALIZER) {
            if held(BACKING_FINALIZER) {
                self.forget(volume);
                let patch = json!({ "metadata": {
                    "uid": volume.uid(), "resourceVersion": volume.resource_version(), "finalizers": null,
                }});
                let patch = Patch::Merge(patch);
                self.volumes
                    .patch(&volume.name_any(), &PatchParams::default(), &patch)
                    .await?;
            }
            return Ok(());
        }
        let old = volume.status.clone().unwrap_or_default();
        let has_room = self.has_room(volume);
        let attachments: Vec<_> = volume
            .spec
            .attachments
            .iter()
            .map(|one| AttachmentStatus {
                id: one.id.clone(),
                state: Some(match one.revoked {
                    true => AttachmentState::Revoked,
                    false => AttachmentState::Allowed,
                }),
                ..AttachmentStatus::default()
            })
            .collect();
        let (reason, message) = match has_room {
            true => ("Present", ""),
            false => (NO_ROOM, "the pool has not the room"),
        };
        let backing = condition(
            &old.conditions,
            BACKING_READY,
            Some(has_room),
            reason,
            message,
            None,
        );
        let is_said = |one: &AttachmentStatus| {
            let mut said = old.attachments.iter();
            said.any(|said| (&said.id, said.state) == (&one.id, one.state))
        };
        if old.size_bytes == has_room.then_some(volume.spec.size_bytes)
            && old.conditions.contains(&backing)
            && attachments.iter().all(is_said)
        {
            return Ok(());
        }
        let status = NbdVolumeStatus {
            size_bytes: has_room.then_some(volume.spec.size_bytes),
            epoch: Some(1),
            conditions: vec![backing],
            attachments,
            ..NbdVolumeStatus::default()
        };
        apply_status(&self.volumes, volume, AGENT, &status)
            .await
            .map(drop)
    }
}

/// Has a node report its share of a pool, all of it free.
pub(crate) async fn report(client: &Client, pool: &str, node: &str, bytes: u64) -> Result<()> {
    report_left(client, pool, node, bytes, bytes).await
}

async fn report_left(client: &Client, pool: &str, node: &str, bytes: u64, left: u64) -> Result<()> {
    let share = json!({
        "name": node, "capacityBytes": bytes, "availableBytes": left, "maximumVolumeBytes": left,
        "healthy": true, "lastSeen": now(),
    });
    report_share(client, pool, node, &share).await
}

/// Has a node report that share of a pool.
pub(crate) async fn report_share(
    client: &Client,
    pool: &str,
    node: &str,
    share: &serde_json::Value,
) -> Result<()> {
    let api: Api<NbdPool> = Api::all(client.clone());
    let pool = api.get(pool).await?;
    let status = json!({ "nodes": [share] });
    apply_status(&api, &pool, &agent_manager(node), &status).await?;
    Ok(())
}

/// Makes pods of StatefulSets on nodes that are there, and ends those whose StatefulSet or node is gone.
pub(crate) struct Kubelet([JoinHandle<()>; 4]);

impl Drop for Kubelet {
    fn drop(&mut self) {
        self.0.iter().for_each(JoinHandle::abort);
    }
}

type Known<K> = Arc<Mutex<HashMap<String, K>>>;

/// Keeps what there is of a kind.
fn keep<K>(api: Api<K>, news: &Arc<Notify>) -> (Known<K>, JoinHandle<()>)
where
    K: Resource<DynamicType = ()>
        + Clone
        + serde::de::DeserializeOwned
        + std::fmt::Debug
        + Send
        + 'static,
{
    let known = Known::<K>::default();
    let (seen_there, news) = (Arc::clone(&known), Arc::clone(news));
    let see = move |seen| {
        let mut known = seen_there.lock().unwrap_or_else(PoisonError::into_inner);
        match seen {
            Seen::All(all) => {
                *known = all
                    .into_iter()
                    .map(|one: K| (one.name_any(), one))
                    .collect();
            }
            Seen::Present(one) => drop(known.insert(one.name_any(), one)),
            Seen::Gone(one) => drop(known.remove(&one.name_any())),
        }
        news.notify_one();
    };
    let task = tokio::spawn(follow(api, watcher::Config::default(), see));
    (known, task)
}

impl Kubelet {
    pub(crate) fn start(client: Client, namespace: &str) -> Self {
        let news = Arc::new(Notify::new());
        let pods_api: Api<Pod> = Api::namespaced(client.clone(), namespace);
        let (sets, one) = keep::<StatefulSet>(Api::namespaced(client.clone(), namespace), &news);
        let (pods, two) = keep(pods_api.clone(), &news);
        let (nodes, three) = keep::<Node>(Api::all(client), &news);
        let work = tokio::spawn(async move {
            loop {
                let _ = tokio::time::timeout(TURN, news.notified()).await;
                let (mut missing, mut over) = (Vec::new(), Vec::new());
                {
                    let sets = sets.lock().unwrap_or_else(PoisonError::into_inner);
                    let pods = pods.lock().unwrap_or_else(PoisonError::into_inner);
                    let nodes = nodes.lock().unwrap_or_else(PoisonError::into_inner);
                    let is_there = |set: &StatefulSet| {
                        place(set).is_some_and(|node| nodes.contains_key(&node))
                    };
                    for (name, set) in sets.iter() {
                        if is_there(set) && !pods.contains_key(&format!("{name}-0")) {
                            missing.push(set.clone());
                        }
                    }
                    for name in pods.keys() {
                        let set = name.strip_suffix("-0").and_then(|set| sets.get(set));
                        if !set.is_some_and(is_there) {
                            over.push(name.clone());
                        }
                    }
                }
                // Whatever fails is tried again.
                futures::stream::iter(missing)
                    .for_each_concurrent(SIDE_BY_SIDE, async |set| {
                        let _ = run(&pods_api, &set).await;
                    })
                    .await;
                for name in over {
                    let now = DeleteParams::default().grace_period(0);
                    let _ = pods_api.delete(&name, &now).await;
                }
            }
        });
        Self([one, two, three, work])
    }
}

/// The node that a StatefulSet's pods are for.
fn place(set: &StatefulSet) -> Option<String> {
    let pod = set.spec.as_ref()?.template.spec.as_ref()?;
    let affinity = pod.affinity.as_ref()?.node_affinity.as_ref()?;
    let selector = affinity
        .required_during_scheduling_ignored_during_execution
        .as_ref()?;
    let field = selector
        .node_selector_terms
        .first()?
        .match_fields
        .as_ref()?
        .first()?;
    field.values.as_ref()?.first().cloned()
}

async fn run(pods: &Api<Pod>, set: &StatefulSet) -> Result<()> {
    let name = format!("{}-0", set.name_any());
    let Some(spec) = &set.spec else { return Ok(()) };
    let mut pod = Pod {
        metadata: spec.template.metadata.clone().unwrap_or_default(),
        spec: spec.template.spec.clone(),
        status: None,
    };
    pod.metadata.name = Some(name.clone());
    if let Some(spec) = &mut pod.spec {
        spec.node_name = place(set);
    }
    pods.create(&PostParams::default(), &pod).await?;
    let status = json!({ "status": {
        "phase": "Running", "podIP": "198.18.0.7", "podIPs": [{ "ip": "198.18.0.7" }],
        "containerStatuses": [{
            "name": "server", "ready": true, "restartCount": 0, "image": "x", "imageID": "x",
            "state": { "running": {} },
        }],
    }});
    pods.patch_status(&name, &PatchParams::default(), &Patch::Merge(status))
        .await?;
    Ok(())
}
