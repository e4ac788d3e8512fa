//! What people see of a pool at a glance, and what keeps a pool from going before its volumes.

use std::collections::HashMap;
use std::time::Duration;

use k8s_openapi::api::core::v1::PersistentVolume;
use kube::api::{ListParams, Patch, PatchParams};
use kube::runtime::events::{Event, EventType, Recorder};
use kube::{Api, Client, Resource, ResourceExt};
use serde_json::json;

use super::status::size;
use crate::csi::{DRIVER_NAME, chain};
use crate::kube::api::{CONTROLLER, NbdPool, NbdPoolStatus, volumes_finalizer};
use crate::kube::apply::{apply_status, is_conflict, is_not_found};
use crate::kube::claim::claim;
use crate::kube::volumes::View;

/// How often pools are looked at: agents write theirs once a minute.
const EVERY: Duration = Duration::from_secs(10);

/// Nodes that are named with what is wrong with them: a person begins with some.
const NAMED: usize = 5;

/// What is said of a pool: healthy nodes of all nodes, what may still be promised there, and why the others are not.
fn summary(pool: &NbdPool, view: &View) -> NbdPoolStatus {
    let nodes = pool.status.as_ref().map(|status| status.nodes.as_slice());
    let nodes = nodes.unwrap_or_default();
    let closed: Vec<_> = nodes.iter().map(|node| view.closed(pool, node)).collect();
    let healthy = nodes.iter().zip(&closed).filter(|(_, why)| why.is_none());
    let available = healthy.clone().map(|(node, _)| node.available_bytes).sum();
    let mut why: Vec<_> = closed.iter().flatten().cloned().collect();
    why.dedup();
    if why.len() > NAMED {
        let more = format!("and {} nodes more", why.len() - NAMED);
        why.truncate(NAMED);
        why.push(more);
    }
    NbdPoolStatus {
        healthy: Some(format!("{}/{}", healthy.count(), nodes.len())),
        available: Some(size(available)),
        message: (!why.is_empty()).then(|| why.join("; ")),
        ..NbdPoolStatus::default()
    }
}

/// Keeps the pools.
pub(super) struct Pools {
    api: Api<NbdPool>,
    persistent_volumes: Api<PersistentVolume>,
    view: View,
    recorder: Recorder,
    finalizer: String,
    /// What was told of each pool, by its uid: said again only when it changes.
    told: HashMap<String, Vec<String>>,
}

impl Pools {
    pub(super) fn new(client: Client, namespace: &str, view: View, recorder: Recorder) -> Self {
        Self {
            finalizer: volumes_finalizer(namespace),
            api: Api::all(client.clone()),
            persistent_volumes: Api::all(client),
            view,
            recorder,
            told: HashMap::new(),
        }
    }

    /// Looks after all pools, for ever.
    pub(super) async fn keep(mut self) {
        loop {
            let pools = self.view.pools();
            let is_there = |uid: &String| pools.iter().any(|pool| pool.uid().as_ref() == Some(uid));
            self.told.retain(|uid, _| is_there(uid));
            for pool in pools {
                match self.look(&pool).await {
                    Err(error) if !is_conflict(&error) && !is_not_found(&error) => {
                        let (pool, error) = (pool.name_any(), chain(&error));
                        tracing::warn!(pool, error, "a pool cannot be looked after");
                    }
                    _ => {}
                }
            }
            tokio::time::sleep(EVERY).await;
        }
    }

    async fn look(&mut self, pool: &NbdPool) -> kube::Result<()> {
        let volumes = self.hold(pool).await?;
        let status = pool.status.clone().unwrap_or_default();
        let said = summary(pool, &self.view);
        let is_said = (&status.healthy, &status.available, &status.message)
            == (&said.healthy, &said.available, &said.message);
        if !is_said {
            apply_status(&self.api, pool, CONTROLLER, &said).await?;
        }
        self.tell(pool, &status, volumes).await
    }

    /// Keeps the pool's object for as long as it has volumes: without it nobody knows where their data is. Returns how
    /// many there are.
    async fn hold(&self, pool: &NbdPool) -> kube::Result<usize> {
        let name = pool.name_any();
        let volumes = self.view.volumes();
        let count = volumes
            .iter()
            .filter(|volume| volume.spec.pool == name)
            .count();
        let mut finalizers = pool.finalizers().to_vec();
        let is_held = finalizers.contains(&self.finalizer);
        // None can be added to what is being deleted.
        if is_held == (count > 0) || (count > 0 && pool.metadata.deletion_timestamp.is_some()) {
            return Ok(count);
        }
        finalizers.retain(|held| *held != self.finalizer);
        if count > 0 {
            finalizers.push(self.finalizer.clone());
        }
        let patch = json!({ "metadata": {
            "uid": pool.uid(), "resourceVersion": pool.resource_version(), "finalizers": finalizers,
        }});
        let params = PatchParams {
            field_manager: Some(CONTROLLER.to_owned()),
            ..PatchParams::default()
        };
        self.api.patch(&name, &params, &Patch::Merge(patch)).await?;
        Ok(count)
    }

    /// Tells as Events what a person has to decide, once.
    async fn tell(
        &mut self,
        pool: &NbdPool,
        status: &NbdPoolStatus,
        volumes: usize,
    ) -> kube::Result<()> {
        let mut news = Vec::new();
        if pool.metadata.deletion_timestamp.is_some() && volumes > 0 {
            let note = format!(
                "it is deleted once its volumes are, and takes no new ones: {volumes} are left \
                 (kubectl get nbdvolumes -A -o wide)"
            );
            news.push(("HasVolumes", note));
        }
        let mut orphans = Vec::new();
        for node in status.nodes.iter().filter(|node| !node.orphans.is_empty()) {
            orphans.extend(node.orphans.iter().cloned());
            let note = format!(
                "on node {} is data that no NbdVolume names: {}. It is kept: restore the NbdVolumes from a backup, or \
                 delete the directories",
                node.name,
                node.orphans.join(", ")
            );
            news.push(("Orphans", note));
        }
        let notes: Vec<_> = news.iter().map(|(_, note)| note.clone()).collect();
        let uid = pool.uid().unwrap_or_default();
        if self.told.get(&uid).is_some_and(|told| *told == notes) {
            return Ok(());
        }
        for (reason, note) in news {
            let event = warning(reason, note);
            self.recorder.publish(&event, &pool.object_ref(&())).await?;
        }
        if !orphans.is_empty() {
            self.tell_owners(&orphans).await?;
        }
        self.told.insert(uid, notes);
        Ok(())
    }

    /// Tells the owners of PersistentVolumes whose data no NbdVolume names.
    async fn tell_owners(&self, orphans: &[String]) -> kube::Result<()> {
        let all = self.persistent_volumes.list(&ListParams::default()).await?;
        for volume in all {
            let source = volume.spec.as_ref().and_then(|spec| spec.csi.as_ref());
            let Some(id) = source
                .filter(|source| source.driver == DRIVER_NAME)
                .map(|source| &source.volume_handle)
                .filter(|id| orphans.contains(id))
            else {
                continue;
            };
            let event = warning(
                "NbdVolumeMissing",
                format!(
                    "NbdVolume {id} is gone, so nobody serves it; its data is there still: restore the NbdVolume from a \
                     backup"
                ),
            );
            let about = claim(&volume).unwrap_or_else(|| volume.object_ref(&()));
            self.recorder.publish(&event, &about).await?;
        }
        Ok(())
    }
}

fn warning(reason: &str, note: String) -> Event {
    Event {
        type_: EventType::Warning,
        reason: reason.to_owned(),
        note: Some(note.chars().take(1000).collect()),
        action: "Look".to_owned(),
        secondary: None,
    }
}
