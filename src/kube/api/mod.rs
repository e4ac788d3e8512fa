//! The API objects of group `hawser.dev`, from which the CRDs are made.
//!
//! Every field has one writer, told apart by the field manager of server-side apply:
//!
//! | fields | writer | manager |
//! |---|---|---|
//! | NbdVolume `spec` | controller | [`CONTROLLER`] |
//! | NbdVolume `status.phase`, `size`, `attachedTo`, `encryption`, `verified`, `endpoint`, conditions but BackingReady | controller | [`CONTROLLER`] |
//! | NbdVolume `status.sizeBytes`, `epoch`, condition BackingReady, `attachments[].state` | agent | [`AGENT`] |
//! | NbdVolume `status.attachments[].verification`, `encryption` | node plugin | [`node_manager`] |
//! | NbdVolume `status.format` | node plugin, by merge patch | [`NODE`] |
//! | NbdPool `status.nodes[]` | agent | [`agent_manager`] |
//! | NbdPool `status.healthy`, `available`, `message` | controller | [`CONTROLLER`] |
//!
//! `status.format` is never applied: a manager that applies without a field it alone owns removes that field, and a
//! volume without its format would be formatted again.
#![allow(
    clippy::duplicated_attributes,
    reason = "columns of a table may have the same type"
)]

#[allow(
    unreachable_pub,
    reason = "KubeSchema repeats the structures inside functions"
)]
mod pool;
#[allow(unreachable_pub, reason = "as above")]
mod snapshot;
#[allow(unreachable_pub, reason = "as above")]
mod volume;

pub use self::pool::{
    Backend, DirectoryBackend, NbdPool, NbdPoolSpec, NbdPoolStatus, PoolNode, Reach,
};
pub use self::snapshot::{NbdSnapshot, NbdSnapshotSpec, NbdSnapshotStatus};
pub use self::volume::{
    AttachmentState, AttachmentStatus, Certificates, FormatState, FormatStatus, Issuer, NbdVolume,
    NbdVolumeSpec, NbdVolumeStatus, Phase, Source, VerificationStatus, VolumeAttachment,
};

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;
use kube::CustomResourceExt;

/// Field manager of the controller.
pub const CONTROLLER: &str = "hawser-controller";
/// Field manager of a volume's agent.
pub const AGENT: &str = "hawser-agent";
/// Field manager of what a node plugin writes without applying.
pub const NODE: &str = "hawser-node";

/// Label of every object that belongs to a volume: the volume's id.
pub const VOLUME_LABEL: &str = "hawser.dev/volume";
/// The label that tells the roles' pods apart, and its value on servers.
pub const COMPONENT_LABEL: &str = "app.kubernetes.io/component";
pub const SERVER: &str = "server";

/// Annotation of a volume that may be made: nobody ever used it. It goes with the first change after it was made, so that
/// a backup of its object, restored where the data is not, makes no empty volume in its place.
pub const NEW: &str = "hawser.dev/new";

/// Held by the agent: the volume's data is still there.
pub const BACKING_FINALIZER: &str = "hawser.dev/backing";
/// Held by the controller: the volume's server, Secrets or attachments are still there. The agent deletes data only
/// when it is gone.
pub const SERVER_FINALIZER: &str = "hawser.dev/server";

/// Topology key of nodes and volumes. Its value is the node's label [`ZONE_LABEL`], or [`NO_ZONE`].
pub const ZONE_KEY: &str = "csi.hawser.dev/zone";
pub const ZONE_LABEL: &str = "topology.kubernetes.io/zone";
pub const NO_ZONE: &str = "none";

/// The backing store has its size and can be served.
pub const BACKING_READY: &str = "BackingReady";
/// Both sides' Secrets are there, right, and not about to end.
pub const CERTIFICATES_READY: &str = "CertificatesReady";
/// Reason of a false [`BACKING_READY`]: the pool's node has not the room. The controller places the volume elsewhere.
pub const NO_ROOM: &str = "NoRoom";
/// The node that keeps the volume is in the cluster and its pool's, and the agent there is heard. A volume may be used
/// without it; nobody can be let in or kept out.
pub const AGENT_READY: &str = "AgentReady";
/// The server's pod runs and is ready.
pub const SERVER_READY: &str = "ServerReady";
/// All of the others.
pub const READY: &str = "Ready";

/// Bytes of a field manager's name.
const MANAGER_LIMIT: usize = 128;

/// Field manager of one node's agent in the status of pools.
#[must_use]
pub fn agent_manager(node: &str) -> String {
    manager(AGENT, node)
}

/// Field manager of one node's plugin. It is the node's own, because a volume may be on several.
#[must_use]
pub fn node_manager(node: &str) -> String {
    manager(NODE, node)
}

fn manager(role: &str, node: &str) -> String {
    let mut name = format!("{role}-{node}");
    // Names of nodes that only differ after this would have to be told apart by more: DNS has 63 bytes a label.
    name.truncate(name.floor_char_boundary(MANAGER_LIMIT));
    name
}

/// On a pool, held by the controller of that namespace: it has volumes there.
#[must_use]
pub fn volumes_finalizer(namespace: &str) -> String {
    format!("{namespace}.hawser.dev/volumes")
}

/// The CRDs of all API objects.
#[must_use]
pub fn definitions() -> Vec<CustomResourceDefinition> {
    vec![NbdPool::crd(), NbdVolume::crd(), NbdSnapshot::crd()]
}

/// Seconds since 1970, as the API writes times. `None` where it has no such time.
#[must_use]
pub fn time(seconds: i64) -> Option<Time> {
    Timestamp::from_second(seconds).ok().map(Time)
}

/// The time now.
#[must_use]
pub fn now() -> Time {
    // The API has whole seconds; what is finer would be a change on every comparison.
    let now = Timestamp::now();
    Time(Timestamp::from_second(now.as_second()).unwrap_or(now))
}

/// A condition as it is to be now. It keeps the time of the last transition where the status is what it was.
#[must_use]
pub fn condition(
    old: &[Condition],
    kind: &str,
    holds: Option<bool>,
    reason: &str,
    message: impl Into<String>,
    generation: Option<i64>,
) -> Condition {
    let status = match holds {
        Some(true) => "True",
        Some(false) => "False",
        None => "Unknown",
    };
    let since = find_condition(old, kind)
        .filter(|before| before.status == status)
        .map_or_else(now, |before| before.last_transition_time.clone());
    Condition {
        type_: kind.to_owned(),
        status: status.to_owned(),
        reason: reason.to_owned(),
        message: message.into(),
        last_transition_time: since,
        observed_generation: generation,
    }
}

#[must_use]
pub fn find_condition<'a>(conditions: &'a [Condition], kind: &str) -> Option<&'a Condition> {
    conditions.iter().find(|condition| condition.type_ == kind)
}

/// Whether a condition is there and true.
#[must_use]
pub fn holds(conditions: &[Condition], kind: &str) -> bool {
    find_condition(conditions, kind).is_some_and(|condition| condition.status == "True")
}

#[cfg(test)]
mod tests;
