//! NbdSnapshot: a volume as it was at one moment.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

/// A volume as it was at one moment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, CustomResource, KubeSchema)]
#[kube(
    group = "hawser.dev",
    version = "v1alpha1",
    kind = "NbdSnapshot",
    plural = "nbdsnapshots",
    shortname = "nbds",
    category = "hawser",
    namespaced,
    status = "NbdSnapshotStatus",
    derive = "PartialEq",
    doc = "A volume as it was at one moment.",
    printcolumn(name = "Volume", type_ = "string", json_path = ".spec.volume"),
    printcolumn(name = "Ready", type_ = "boolean", json_path = ".status.ready"),
    printcolumn(name = "Taken", type_ = "date", json_path = ".status.takenAt"),
    printcolumn(
        name = "Age",
        type_ = "date",
        json_path = ".metadata.creationTimestamp"
    )
)]
#[x_kube(validation = Rule::new("self == oldSelf").message("a snapshot's spec is immutable"))]
#[serde(rename_all = "camelCase")]
pub struct NbdSnapshotSpec {
    /// The name that the container orchestrator chose.
    #[schemars(length(min = 1, max = 128))]
    pub name: String,
    /// The volume's id.
    #[schemars(length(max = 36), regex(pattern = r"^vol-[0-9a-f]{32}$"))]
    pub volume: String,
}

/// What became of the snapshot.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct NbdSnapshotStatus {
    /// Whether volumes can be made from it.
    #[serde(default)]
    pub ready: bool,
    /// Bytes of the volume when it was taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i64>", range(min = 0))]
    pub size_bytes: Option<u64>,
    /// When it was taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub taken_at: Option<Time>,
    /// How it is, part by part.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}
