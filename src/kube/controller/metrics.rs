//! What a controller measures.
//!
//! What concerns all volumes is told by the leader alone, which looks after them: so a sum over the controllers is right,
//! and a cluster without a leader shows by what is missing.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;

use crate::kube::api::{NbdVolume, Phase};
use crate::metrics::{Calls, Exposition, Reading};

/// Cheap to clone; all clones measure the same.
#[derive(Clone, Default)]
pub(super) struct Metrics {
    is_leader: Arc<AtomicBool>,
    looks: Family<[(&'static str, &'static str); 1], Counter>,
    ends: Arc<Mutex<Ends>>,
}

/// When certificates end, in seconds since 1970.
#[derive(Default)]
struct Ends {
    authority: Option<i64>,
    /// The earlier of each volume's two.
    volumes: HashMap<String, i64>,
}

/// Leads for as long as it lives.
pub(super) struct Leading(Metrics);

impl Drop for Leading {
    fn drop(&mut self) {
        self.0.is_leader.store(false, Ordering::Relaxed);
        *self.0.ends() = Ends::default();
    }
}

impl Metrics {
    pub(super) fn lead(&self) -> Leading {
        self.is_leader.store(true, Ordering::Relaxed);
        Leading(self.clone())
    }

    /// A look at a volume came to its end.
    pub(super) fn looked(&self, is_well: bool) {
        let result = if is_well { "ok" } else { "error" };
        self.looks.get_or_create(&[("result", result)]).inc();
    }

    pub(super) fn certified(&self, volume: &str, end: i64) {
        self.ends().volumes.insert(volume.to_owned(), end);
    }

    pub(super) fn ended(&self, volume: &str) {
        self.ends().volumes.remove(volume);
    }

    pub(super) fn authority(&self, end: Option<i64>) {
        self.ends().authority = end;
    }

    fn ends(&self) -> MutexGuard<'_, Ends> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_leader(&self) -> bool {
        self.is_leader.load(Ordering::Relaxed)
    }

    /// All that a controller tells, of the volumes that `known` returns.
    pub(super) fn exposition(
        &self,
        calls: &Calls,
        known: impl Fn() -> Vec<Arc<NbdVolume>> + Clone + Send + Sync + 'static,
    ) -> Exposition {
        let mut told = Exposition::new();
        calls.tell(&mut told);
        let me = self.clone();
        told.read(
            "leader",
            "Whether this controller is the leader.",
            move || vec![Reading::plain(i64::from(me.is_leader()))],
        );
        told.add(
            "reconciles",
            "Looks at a volume to see that all is as its object says, by result.",
            self.looks.clone(),
        );
        let (me, all) = (self.clone(), known.clone());
        told.read(
            "volumes",
            "Volumes, by pool and phase; told by the leader.",
            move || match me.is_leader() {
                true => by_phase(&all()),
                false => Vec::new(),
            },
        );
        let me = self.clone();
        told.read(
            "volume_conditions_false",
            "Volumes of which this condition is False, those that are being deleted aside; told by the leader.",
            move || match me.is_leader() {
                true => false_conditions(&known()),
                false => Vec::new(),
            },
        );
        let me = self.clone();
        told.read(
            "certificate_expiry_timestamp_seconds",
            "When the first certificate of this kind ends, in seconds since 1970; told by the leader.",
            move || {
                let ends = me.ends();
                let first = ends.volumes.values().copied().min();
                [("authority", ends.authority), ("volume", first)]
                    .into_iter()
                    .filter_map(|(of, end)| Some(Reading::new([("of", of.to_owned())], end?)))
                    .collect()
            },
        );
        told
    }
}

fn by_phase(volumes: &[Arc<NbdVolume>]) -> Vec<Reading> {
    let mut counts: BTreeMap<(String, &'static str), i64> = BTreeMap::new();
    for volume in volumes {
        let status = volume.status.as_ref();
        let phase = match status.and_then(|status| status.phase) {
            Some(Phase::Ready) => "Ready",
            Some(Phase::Deleting) => "Deleting",
            Some(Phase::Failed) => "Failed",
            Some(Phase::Pending) | None => "Pending",
        };
        *counts.entry((volume.spec.pool.clone(), phase)).or_default() += 1;
    }
    let labelled = counts.into_iter().map(|((pool, phase), count)| {
        Reading::new([("pool", pool), ("phase", phase.to_owned())], count)
    });
    labelled.collect()
}

fn false_conditions(volumes: &[Arc<NbdVolume>]) -> Vec<Reading> {
    use crate::kube::api::{AGENT_READY, BACKING_READY, CERTIFICATES_READY, SERVER_READY};
    let stay = volumes
        .iter()
        .filter(|volume| volume.metadata.deletion_timestamp.is_none());
    let mut counts = BTreeMap::from([
        (AGENT_READY, 0i64),
        (BACKING_READY, 0),
        (CERTIFICATES_READY, 0),
        (SERVER_READY, 0),
    ]);
    let said = stay.filter_map(|volume| volume.status.as_ref());
    for condition in said.flat_map(|status| &status.conditions) {
        if condition.status == "False"
            && let Some(count) = counts.get_mut(condition.type_.as_str())
        {
            *count += 1;
        }
    }
    let labelled = counts
        .into_iter()
        .map(|(condition, count)| Reading::new([("condition", condition.to_owned())], count));
    labelled.collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// All that a controller tells, of no volumes.
    pub(crate) fn exposition() -> Exposition {
        Metrics::default().exposition(&Calls::default(), Vec::new)
    }

    fn volume(name: &str, status: &Value) -> Arc<NbdVolume> {
        let object = json!({
            "apiVersion": "hawser.dev/v1alpha1",
            "kind": "NbdVolume",
            "metadata": {"name": name},
            "spec": {"name": name, "sizeBytes": 4096, "pool": "fast", "node": "n", "content": "block"},
            "status": status,
        });
        Arc::new(serde_json::from_value(object).unwrap())
    }

    #[test]
    fn the_leader_alone_tells_of_all_volumes() {
        let metrics = Metrics::default();
        let silent = json!({"conditions": [{
            "type": "ServerReady", "status": "False", "reason": "NoPod", "message": "",
            "lastTransitionTime": "2026-01-01T00:00:00Z",
        }]});
        let volumes = vec![
            volume("vol-1", &json!({"phase": "Ready"})),
            volume("vol-2", &json!({"phase": "Ready"})),
            volume("vol-3", &silent),
        ];
        let told = metrics.exposition(&Calls::default(), move || volumes.clone());
        metrics.looked(true);
        metrics.looked(false);
        metrics.looked(false);
        let before = told.text().unwrap();
        assert!(before.contains("hawser_leader 0\n"), "{before}");
        assert!(!before.contains("hawser_volumes{"), "{before}");
        let leading = metrics.lead();
        metrics.certified("vol-1", 2_000);
        metrics.certified("vol-2", 1_000);
        metrics.authority(Some(9_000));
        let text = told.text().unwrap();
        for line in [
            "hawser_leader 1\n",
            "hawser_reconciles_total{result=\"error\"} 2\n",
            "hawser_volumes{pool=\"fast\",phase=\"Ready\"} 2\n",
            "hawser_volumes{pool=\"fast\",phase=\"Pending\"} 1\n",
            "hawser_volume_conditions_false{condition=\"ServerReady\"} 1\n",
            "hawser_volume_conditions_false{condition=\"BackingReady\"} 0\n",
            "hawser_certificate_expiry_timestamp_seconds{of=\"volume\"} 1000\n",
            "hawser_certificate_expiry_timestamp_seconds{of=\"authority\"} 9000\n",
        ] {
            assert!(text.contains(line), "{line}{text}");
        }
        // No volume is named: there may be thousands.
        assert!(!text.contains("vol-"), "{text}");
        metrics.ended("vol-2");
        let text = told.text().unwrap();
        assert!(text.contains("{of=\"volume\"} 2000\n"), "{text}");
        drop(leading);
        assert_eq!(told.text().unwrap(), before);
    }
}
