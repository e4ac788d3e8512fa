//! How it is with the place that keeps a volume: its pool, its node, and the agent there.

use std::collections::BTreeMap;

use futures::Stream;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use std::time::Duration;

use super::View;
use super::view::SILENCE;
use crate::kube::api::{NbdPool, PoolNode};

/// How often places are looked at though nothing was heard of them: silence is no news.
const AGAIN: Duration = Duration::from_secs(10);

/// How long news of places are gathered: agents write theirs every second while volumes are made.
const GATHER: Duration = Duration::from_secs(1);

/// What it means that no agent is there.
const UNATTENDED: &str =
    "Volumes there are served as before, but cannot be attached, detached, grown or deleted";

/// How it is with a place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// The agent was heard, and all is well there.
    Good,
    PoolGone,
    /// The pool is to be deleted, and has volumes still.
    PoolLeaving,
    NodeGone,
    /// The node has not the labels that the pool asks for.
    NotSelected,
    /// The agent never said anything of that pool.
    Unreported,
    Silent(Timestamp),
    /// The same, and it is no wonder: agents run where pools select nodes.
    Abandoned(Timestamp),
    Unhealthy(String),
}

impl Standing {
    /// The reason of the condition that tells it.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Good => "Attended",
            Self::PoolGone => "PoolGone",
            Self::PoolLeaving => "PoolLeaving",
            Self::NodeGone => "NodeGone",
            Self::NotSelected => "NodeNotSelected",
            Self::Unreported => "AgentUnknown",
            Self::Silent(_) | Self::Abandoned(_) => "AgentSilent",
            Self::Unhealthy(_) => "PoolUnhealthy",
        }
    }

    /// Whether an agent does there what is asked of it.
    #[must_use]
    pub fn is_attended(&self) -> bool {
        match self {
            Self::Good | Self::PoolLeaving | Self::NotSelected | Self::Unhealthy(_) => true,
            Self::PoolGone
            | Self::NodeGone
            | Self::Unreported
            | Self::Silent(_)
            | Self::Abandoned(_) => false,
        }
    }

    /// The same for a person: what is, and what can be done; nothing where all is well.
    #[must_use]
    pub fn message(&self, pool: &str, node: &str) -> String {
        match self {
            Self::Good => String::new(),
            Self::PoolGone => format!(
                "NbdPool {pool} is gone, and with it the path of the data on node {node}: make it again as it was"
            ),
            Self::PoolLeaving => format!(
                "NbdPool {pool} is being deleted; it stays until its volumes are deleted, and takes no new ones"
            ),
            Self::NodeGone => format!(
                "node {node}, which keeps the data, is not in the cluster: bring it back under that name with its disk; \
                 if the disk is lost, so is the data"
            ),
            Self::NotSelected => format!(
                "node {node} has not the labels that NbdPool {pool} selects: its volumes stay and go on, and no new ones \
                 are put there"
            ),
            Self::Unreported => {
                format!("the agent on node {node} never reported pool {pool}: is its pod running?")
            }
            Self::Silent(since) => format!(
                "the agent on node {node} is silent since {since}, is its pod running? {UNATTENDED}"
            ),
            Self::Abandoned(since) => format!(
                "node {node} has not the labels that NbdPool {pool} selects, and no agent is there since {since}. \
                 {UNATTENDED}"
            ),
            Self::Unhealthy(message) => {
                format!("pool {pool} is not healthy on node {node}: {message}")
            }
        }
    }
}

/// What is asked of a pool and how its places are: when this changes, volumes are concerned.
type Places = BTreeMap<(String, String), (Option<i64>, Standing)>;

/// Whether the labels of a node are those that the pool selects.
fn selects(pool: &NbdPool, labels: &BTreeMap<String, String>) -> bool {
    let mut wanted = pool.spec.node_selector.iter();
    wanted.all(|(key, value)| labels.get(key) == Some(value))
}

impl View {
    /// How it is with a node's share of a pool.
    #[must_use]
    pub fn standing(&self, pool: &str, node: &str) -> Standing {
        let Some(object) = self.pool(pool) else {
            return Standing::PoolGone;
        };
        let Some(there) = self.node(node) else {
            return Standing::NodeGone;
        };
        let is_selected = selects(&object, there.labels());
        let mut shares = object.status.iter().flat_map(|status| &status.nodes);
        let how = match shares.find(|share| share.name == node) {
            Some(share) => of_share(share, Timestamp::now()),
            None => Standing::Unreported,
        };
        match how {
            Standing::Silent(since) if !is_selected => Standing::Abandoned(since),
            how if !how.is_attended() => how,
            _ if object.metadata.deletion_timestamp.is_some() => Standing::PoolLeaving,
            _ if !is_selected => Standing::NotSelected,
            how => how,
        }
    }

    /// Why a node's share of a pool takes no volumes; `None` where it does.
    pub(in crate::kube) fn closed(&self, pool: &NbdPool, share: &PoolNode) -> Option<String> {
        let (pool, node) = (pool.name_any(), &share.name);
        Some(self.standing(&pool, node).message(&pool, node)).filter(|why| !why.is_empty())
    }

    fn places(&self) -> Places {
        let mut places = Places::new();
        for volume in self.volumes() {
            let (pool, node) = (&volume.spec.pool, &volume.spec.node);
            let place = (pool.clone(), node.clone());
            places.entry(place).or_insert_with(|| {
                let object = self.pool(pool);
                let generation = object.and_then(|object| object.metadata.generation);
                (generation, self.standing(pool, node))
            });
        }
        places
    }

    /// Yields whenever something about places changed that volumes have to do with.
    pub fn moves(&self) -> impl Stream<Item = ()> + Send + 'static + use<> {
        let state = (self.clone(), self.changes(), self.places());
        futures::stream::unfold(state, |(view, mut changes, before)| async move {
            loop {
                let told = tokio::time::timeout(AGAIN, changes.changed());
                if let Ok(Err(_)) = told.await {
                    return None;
                }
                tokio::time::sleep(GATHER).await;
                let now = view.places();
                // A volume that is new is looked at anyway.
                let is_news = now
                    .iter()
                    .any(|(place, how)| before.get(place).is_some_and(|before| before != how));
                if is_news || now.len() != before.len() {
                    return Some(((), (view, changes, now)));
                }
            }
        })
    }
}

fn of_share(share: &PoolNode, now: Timestamp) -> Standing {
    match &share.last_seen {
        Some(seen) if now.duration_since(seen.0) > SILENCE => Standing::Silent(seen.0),
        _ if !share.healthy => Standing::Unhealthy(share.message.clone()),
        _ => Standing::Good,
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use k8s_openapi::jiff::SignedDuration;

    use super::*;

    #[test]
    fn an_agent_is_silent_after_three_minutes() {
        let now = Timestamp::now();
        let heard = |seconds, healthy| PoolNode {
            healthy,
            last_seen: Some(Time(now - SignedDuration::from_secs(seconds))),
            message: "no disk".to_owned(),
            ..PoolNode::default()
        };
        assert_eq!(of_share(&heard(180, true), now), Standing::Good);
        assert!(matches!(
            of_share(&heard(181, true), now),
            Standing::Silent(_)
        ));
        let unhealthy = Standing::Unhealthy("no disk".to_owned());
        assert_eq!(of_share(&heard(1, false), now), unhealthy);
        assert!(
            unhealthy
                .message("p", "n")
                .contains("pool p is not healthy on node n: no disk")
        );
    }
}
