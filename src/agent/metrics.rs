//! What the agent of a storage node measures: each pool's share of its node.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;

use crate::kube::api::PoolNode;
use crate::metrics::{Exposition, Reading};

/// Cheap to clone; all clones measure the same.
#[derive(Clone, Default)]
pub(super) struct Metrics {
    looks: Family<[(&'static str, &'static str); 1], Counter>,
    shares: Arc<Mutex<BTreeMap<String, Share>>>,
}

/// A pool's share, as the last survey found it.
#[derive(Debug, Clone, Default)]
pub(super) struct Share {
    pub(super) told: PoolNode,
    /// Bytes that volumes were promised.
    pub(super) provisioned_bytes: u64,
    pub(super) orphans: usize,
}

impl Share {
    /// One of which nothing could be measured.
    pub(super) fn of(told: PoolNode) -> Self {
        Self {
            told,
            ..Self::default()
        }
    }
}

impl Metrics {
    /// A look at a volume came to its end.
    pub(super) fn looked(&self, is_well: bool) {
        let result = if is_well { "ok" } else { "error" };
        self.looks.get_or_create(&[("result", result)]).inc();
    }

    /// `None`: this node has no part in the pool any more.
    pub(super) fn surveyed(&self, pool: &str, share: Option<Share>) {
        let mut shares = self.shares();
        match share {
            Some(share) => shares.insert(pool.to_owned(), share),
            None => shares.remove(pool),
        };
    }

    /// Forgets the pools that are not there any more.
    pub(super) fn retain(&self, is_there: impl Fn(&str) -> bool) {
        self.shares().retain(|pool, _| is_there(pool));
    }

    fn shares(&self) -> MutexGuard<'_, BTreeMap<String, Share>> {
        self.shares.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All that an agent tells.
    pub(super) fn exposition(&self) -> Exposition {
        let mut told = Exposition::new();
        told.add(
            "reconciles",
            "Looks at a volume to see that all is as its object says, by result.",
            self.looks.clone(),
        );
        self.tell(
            &mut told,
            "pool_capacity_bytes",
            "Bytes that the pool may promise on this node altogether.",
            |share| Some(share.told.capacity_bytes.try_into().unwrap_or(i64::MAX)),
        );
        self.tell(
            &mut told,
            "pool_available_bytes",
            "Bytes that the pool may still promise on this node.",
            |share| Some(share.told.available_bytes.try_into().unwrap_or(i64::MAX)),
        );
        self.tell(
            &mut told,
            "pool_provisioned_bytes",
            "Bytes that volumes on this node were promised, orphans too.",
            |share| Some(share.provisioned_bytes.try_into().unwrap_or(i64::MAX)),
        );
        self.tell(
            &mut told,
            "pool_volumes",
            "Volumes that the pool keeps on this node.",
            |share| Some(share.told.volumes.into()),
        );
        self.tell(
            &mut told,
            "pool_orphans",
            "Volumes that are kept on this node, and no NbdVolume names.",
            |share| share.orphans.try_into().ok(),
        );
        self.tell(
            &mut told,
            "pool_healthy",
            "Whether new volumes may be put into the pool on this node.",
            |share| Some(share.told.healthy.into()),
        );
        self.tell(
            &mut told,
            "pool_surveyed_timestamp_seconds",
            "When the pool was looked at last, in seconds since 1970.",
            |share| Some(share.told.last_seen.as_ref()?.0.as_second()),
        );
        told
    }

    fn tell(
        &self,
        told: &mut Exposition,
        name: &'static str,
        help: &'static str,
        value: impl Fn(&Share) -> Option<i64> + Send + Sync + 'static,
    ) {
        let me = self.clone();
        told.read(name, help, move || {
            let shares = me.shares();
            let readings = shares.iter().filter_map(|(pool, share)| {
                let labels = [("pool", pool.clone()), ("node", share.told.name.clone())];
                Some(Reading::new(labels, value(share)?))
            });
            readings.collect()
        });
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::kube::api::now;

    /// All that an agent tells, of no pools.
    pub(crate) fn exposition() -> Exposition {
        Metrics::default().exposition()
    }

    #[test]
    fn each_pool_has_its_share_until_it_is_gone() {
        let metrics = Metrics::default();
        let told = metrics.exposition();
        let share = Share {
            told: PoolNode {
                name: "worker".to_owned(),
                capacity_bytes: 1 << 40,
                available_bytes: 1 << 39,
                healthy: true,
                volumes: 3,
                last_seen: Some(now()),
                ..PoolNode::default()
            },
            provisioned_bytes: 7,
            orphans: 2,
        };
        metrics.surveyed("fast", Some(share.clone()));
        metrics.surveyed("slow", Some(share));
        metrics.looked(false);
        let text = told.text().unwrap();
        for (name, value) in [
            ("capacity_bytes", 1i64 << 40),
            ("available_bytes", 1 << 39),
            ("provisioned_bytes", 7),
            ("volumes", 3),
            ("orphans", 2),
            ("healthy", 1),
        ] {
            let line = format!("hawser_pool_{name}{{pool=\"fast\",node=\"worker\"}} {value}\n");
            assert!(text.contains(&line), "{line}{text}");
        }
        assert!(text.contains("hawser_reconciles_total{result=\"error\"} 1\n"));
        metrics.surveyed("slow", None);
        assert!(!told.text().unwrap().contains("slow"));
        metrics.retain(|_| false);
        assert!(!told.text().unwrap().contains("fast"));
    }
}
