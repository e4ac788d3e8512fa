//! Where a new volume goes: pure decisions on what is known of the pools.

use std::time::{Duration, Instant};

use kube::ResourceExt;

use super::View;
use crate::kube::api::{self, NbdPool, PoolNode, Reach};
use crate::volumes::{Capacity, Placement, Topology, VolumesError};

/// How long an object that was made may take to be seen.
const SEEN: Duration = Duration::from_secs(60);

/// A volume whose object was made and may not be in the view yet.
pub(super) struct Placed {
    pool: String,
    node: String,
    size: u64,
    since: Instant,
}

impl Placed {
    pub(super) fn new(pool: String, node: String, size: u64) -> Self {
        Self {
            pool,
            node,
            size,
            since: Instant::now(),
        }
    }

    pub(super) fn is_recent(&self) -> bool {
        self.since.elapsed() < SEEN
    }
}

/// A node's share of a pool, as a volume may be put there.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Candidate {
    node: String,
    zone: String,
    available: u64,
    maximum: u64,
}

/// Whether a zone is among these places.
fn is_in(zone: &str, places: &[Topology]) -> bool {
    places
        .iter()
        .any(|place| place.get(api::ZONE_KEY).is_none_or(|wanted| wanted == zone))
}

/// The candidates from which the volume can be used where it is wanted, the best first.
fn order(mut candidates: Vec<Candidate>, reach: Reach, place: &Placement) -> Vec<Candidate> {
    candidates.sort_by(|a, b| b.available.cmp(&a.available).then(a.node.cmp(&b.node)));
    if reach == Reach::Zone {
        if !place.requisite.is_empty() {
            candidates.retain(|one| is_in(&one.zone, &place.requisite));
        }
        // Stable: within a zone the order stays.
        candidates.sort_by_key(|one| {
            let mut preferred = place.preferred.iter();
            let rank = preferred.position(|wanted| is_in(&one.zone, std::slice::from_ref(wanted)));
            rank.unwrap_or(usize::MAX)
        });
    }
    candidates
}

impl View {
    /// The nodes of a pool that can take a volume, and what they have left beyond what is promised already.
    fn candidates<'a>(
        &self,
        pool: &NbdPool,
        placed: impl Iterator<Item = &'a Placed> + Clone,
    ) -> Vec<Candidate> {
        let name = pool.name_any();
        let shares = pool.status.as_ref().map(|status| status.nodes.as_slice());
        let volumes = self.volumes();
        let candidate = |share: &PoolNode| {
            let kept = volumes
                .iter()
                .filter(|volume| volume.spec.pool == name && volume.spec.node == share.name);
            let unseen: u64 = placed
                .clone()
                .filter(|one| one.pool == name && one.node == share.name)
                .map(|one| one.size)
                .sum();
            let (promised, unmade) = kept.fold((unseen, unseen), |(promised, unmade), volume| {
                let size = volume.spec.size_bytes;
                let status = volume.status.as_ref();
                let is_made = status.is_some_and(|status| status.size_bytes.is_some());
                (promised + size, unmade + if is_made { 0 } else { size })
            });
            // What the agent has not made yet it has not counted either; and what it made just now it may have reported
            // in the volume, and not in the pool yet.
            let left = |said: u64| {
                let counted = share.capacity_bytes.saturating_sub(promised);
                said.saturating_sub(unmade).min(counted)
            };
            Candidate {
                node: share.name.clone(),
                zone: self.zone(&share.name),
                available: left(share.available_bytes),
                maximum: left(share.maximum_volume_bytes),
            }
        };
        let shares = shares.unwrap_or_default().iter();
        let open = shares.filter(|share| self.closed(pool, share).is_none());
        open.map(candidate).collect()
    }

    /// The pool and node for a new volume.
    pub(super) fn choose<'a>(
        &self,
        place: &Placement,
        size: u64,
        placed: impl Iterator<Item = &'a Placed> + Clone,
    ) -> Result<(String, String), VolumesError> {
        let pool = self.wanted_pool(place)?;
        let name = pool.name_any();
        if pool.metadata.deletion_timestamp.is_some() {
            return Err(VolumesError::NoRoom(format!(
                "pool {name} is being deleted, and takes no new volumes"
            )));
        }
        let all = self.candidates(&pool, placed);
        if all.is_empty() {
            return Err(VolumesError::NoRoom(format!(
                "pool {name} has no healthy node; see kubectl describe nbdpool {name}"
            )));
        }
        let within = order(all, pool.spec.reachable, place);
        let Some(best) = within.iter().find(|one| one.maximum >= size) else {
            let most = within.iter().map(|one| one.maximum).max().unwrap_or(0);
            return Err(VolumesError::NoRoom(format!(
                "no node of pool {name} from which the volume could be used has {size} bytes left; {most} are the most"
            )));
        };
        Ok((name, best.node.clone()))
    }

    fn wanted_pool(&self, place: &Placement) -> Result<std::sync::Arc<NbdPool>, VolumesError> {
        if let Some(name) = &place.pool {
            return self.pool(name).ok_or_else(|| {
                let there = match self.pool_names() {
                    names if names.is_empty() => "there is none at all".to_owned(),
                    names => format!("there are: {names}"),
                };
                VolumesError::Invalid(format!("there is no NbdPool {name}; {there}"))
            });
        }
        let pools = self.pools();
        match pools.as_slice() {
            [only] => Ok(only.clone()),
            [] => Err(VolumesError::Invalid(
                "there is no NbdPool: make one to say where volumes are kept".to_owned(),
            )),
            _ => Err(VolumesError::Invalid(format!(
                "there are several NbdPools, so parameter pool must name one of: {}",
                self.pool_names()
            ))),
        }
    }

    fn pool_names(&self) -> String {
        let mut names: Vec<_> = self.pools().iter().map(|pool| pool.name_any()).collect();
        names.sort_unstable();
        names.join(", ")
    }

    /// Room for new volumes; where nothing can be made, there is none.
    pub(super) fn capacity(&self, place: &Placement) -> Capacity {
        let mut capacity = Capacity {
            available_bytes: 0,
            maximum_volume_bytes: 0,
        };
        if let Ok(pool) = self.wanted_pool(place)
            && pool.metadata.deletion_timestamp.is_none()
        {
            let all = self.candidates(&pool, std::iter::empty());
            for one in order(all, pool.spec.reachable, place) {
                capacity.available_bytes = capacity.available_bytes.saturating_add(one.available);
                capacity.maximum_volume_bytes = capacity.maximum_volume_bytes.max(one.maximum);
            }
        }
        capacity
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(node: &str, zone: &str, available: u64) -> Candidate {
        Candidate {
            node: node.to_owned(),
            zone: zone.to_owned(),
            available,
            maximum: available,
        }
    }

    fn zones(names: &[&str]) -> Vec<Topology> {
        let zone = |name: &&str| Topology::from([(api::ZONE_KEY.to_owned(), (*name).to_owned())]);
        names.iter().map(zone).collect()
    }

    #[test]
    fn the_first_is_the_emptiest_of_the_preferred_zone_where_zones_matter() {
        let all = || {
            vec![
                candidate("a", "one", 5),
                candidate("b", "two", 7),
                candidate("c", "two", 9),
                candidate("d", "three", 9),
            ]
        };
        let names = |reach, requisite: &[&str], preferred: &[&str]| {
            let place = Placement {
                pool: None,
                requisite: zones(requisite),
                preferred: zones(preferred),
            };
            let ordered = order(all(), reach, &place);
            ordered.into_iter().map(|one| one.node).collect::<String>()
        };
        assert_eq!(names(Reach::Everywhere, &["one"], &["one"]), "cdba");
        assert_eq!(names(Reach::Zone, &[], &[]), "cdba");
        assert_eq!(names(Reach::Zone, &["one", "two"], &["one", "two"]), "acb");
        assert_eq!(names(Reach::Zone, &["three"], &["three"]), "d");
        assert_eq!(names(Reach::Zone, &["four"], &["four"]), "");
    }
}
