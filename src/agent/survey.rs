//! What this node's share of each pool is, in the status of the NbdPool.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use kube::ResourceExt;

use super::Agent;
use super::metrics::Share;
use crate::daemon::chain;
use crate::kube::api::{NbdPool, NbdPoolStatus, PoolNode, agent_manager, now};
use crate::kube::apply::{apply_status, is_not_found};
use crate::storage::{Pool, StorageError};
use crate::volumes::Capacity;

/// How often the pools are surveyed when nothing changes: the controller takes an agent that is silent for longer for
/// gone.
const INTERVAL: Duration = Duration::from_secs(30);

/// The least pause between two surveys: many volumes may be made at one time.
const PAUSE: Duration = Duration::from_secs(1);

/// Orphans that are named: a person begins with some.
const NAMED: usize = 32;

impl Agent {
    /// Surveys the pools, and never returns.
    pub(super) async fn survey(self: Arc<Self>) {
        let mut heard = self.heard.subscribe();
        let _ = heard.wait_for(|heard| heard.everything()).await;
        loop {
            let pools: Vec<_> = self.seen().pools.values().cloned().collect();
            self.metrics
                .retain(|name| pools.iter().any(|pool| pool.name_any() == name));
            for pool in pools {
                if let Err(error) = self.survey_one(&pool).await {
                    let (pool, error) = (pool.name_any(), chain(&error));
                    tracing::warn!(pool, error, "the API server did not take its status");
                }
            }
            tokio::time::sleep(PAUSE).await;
            let _ = tokio::time::timeout(INTERVAL, self.changed.notified()).await;
        }
    }

    async fn survey_one(self: &Arc<Self>, object: &NbdPool) -> kube::Result<()> {
        let name = object.name_any();
        let (is_selected, volumes) = {
            let world = self.seen();
            let volumes = world.volumes.values();
            (
                selects(&object.spec.node_selector, &world.labels),
                volumes.filter(|volume| volume.spec.pool == name).count(),
            )
        };
        let told = object.status.as_ref().is_some_and(|status| {
            let mut nodes = status.nodes.iter();
            nodes.any(|node| node.name == self.node)
        });
        // Else not a node of this pool any more, and nothing of it is here.
        let share = match is_selected || volumes > 0 {
            true => Some(self.share(&name, is_selected, volumes).await),
            false => None,
        };
        self.metrics.surveyed(&name, share.clone());
        if share.is_none() && !told {
            return Ok(());
        }
        let nodes = share.map(|share| share.told).into_iter().collect();
        let status = NbdPoolStatus {
            nodes,
            ..NbdPoolStatus::default()
        };
        let manager = agent_manager(&self.node);
        let applied = apply_status(&self.pool_objects, object, &manager, &status);
        match tokio::time::timeout(INTERVAL, applied).await {
            Ok(Err(error)) if is_not_found(&error) => Ok(()),
            Ok(applied) => applied.map(drop),
            Err(late) => Err(kube::Error::Service(late.into())),
        }
    }

    async fn share(self: &Arc<Self>, name: &str, is_selected: bool, volumes: usize) -> Share {
        let told = PoolNode {
            name: self.node.clone(),
            volumes: u32::try_from(volumes).unwrap_or(u32::MAX),
            last_seen: Some(now()),
            ..PoolNode::default()
        };
        let pool = match self.open(name).await {
            Ok(pool) => pool,
            Err(error) => {
                return Share::of(PoolNode {
                    message: error.to_string(),
                    ..told
                });
            }
        };
        let measured = tokio::task::spawn_blocking({
            let pool = Arc::clone(&pool);
            move || measure(&pool)
        });
        let measured = match measured.await {
            Ok(Ok(measured)) => measured,
            Ok(Err(error)) => {
                return Share::of(PoolNode {
                    message: chain(&error),
                    ..told
                });
            }
            Err(_) => return Share::of(told),
        };
        let orphans = self.orphans(&pool);
        let mut message = String::new();
        if !orphans.is_empty() {
            message = format!(
                "{} volumes are kept that no NbdVolume names; make their NbdVolumes again, or delete their directories",
                orphans.len()
            );
        }
        self.tell_orphans(name, &orphans);
        if !is_selected {
            message = format!("the node is not selected any more, and keeps {volumes} volumes");
        }
        let room = match is_selected {
            true => measured.room,
            false => Capacity::default(),
        };
        Share {
            orphans: orphans.len(),
            provisioned_bytes: measured.provisioned_bytes,
            told: PoolNode {
                capacity_bytes: measured.capacity_bytes,
                available_bytes: room.available_bytes,
                maximum_volume_bytes: room.maximum_volume_bytes,
                healthy: is_selected,
                message,
                orphans: orphans.into_iter().take(NAMED).collect(),
                ..told
            },
        }
    }

    /// What is in the pool, and no object of this node's names.
    fn orphans(&self, pool: &Pool) -> Vec<String> {
        let world = self.seen();
        pool.ids()
            .into_iter()
            .filter(|id| !world.volumes.contains_key(id))
            .map(String::from)
            .collect()
    }
}

impl Agent {
    /// Once in the log, until there are others.
    fn tell_orphans(&self, pool: &str, orphans: &[String]) {
        let mut told = self
            .told_orphans
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let before = told.insert(pool.to_owned(), orphans.to_vec());
        if !orphans.is_empty() && before.as_deref() != Some(orphans) {
            tracing::warn!(pool, ?orphans, "volumes that no NbdVolume names are kept");
        }
    }
}

struct Measured {
    capacity_bytes: u64,
    provisioned_bytes: u64,
    room: Capacity,
}

fn measure(pool: &Pool) -> Result<Measured, StorageError> {
    let volumes = pool.list(None, usize::MAX);
    Ok(Measured {
        capacity_bytes: pool.promisable()?,
        provisioned_bytes: volumes.iter().map(|one| one.volume.size_bytes).sum(),
        room: pool.capacity()?,
    })
}

/// Whether labels are as a selector wants them.
fn selects(selector: &BTreeMap<String, String>, labels: &BTreeMap<String, String>) -> bool {
    selector
        .iter()
        .all(|(key, value)| labels.get(key) == Some(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_selector_selects_every_node() {
        let map = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
            let pairs = pairs.iter();
            pairs
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect()
        };
        let labels = map(&[("disk", "ssd"), ("zone", "a")]);
        for (selector, selected) in [
            (map(&[]), true),
            (map(&[("disk", "ssd")]), true),
            (map(&[("disk", "ssd"), ("zone", "a")]), true),
            (map(&[("disk", "hdd")]), false),
            (map(&[("gpu", "")]), false),
        ] {
            assert_eq!(selects(&selector, &labels), selected, "{selector:?}");
        }
    }
}
