//! NbdPool: where volumes may live, and how much room is left there.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Nodes that keep volumes, and where on them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, CustomResource, KubeSchema)]
#[kube(
    group = "hawser.dev",
    version = "v1alpha1",
    kind = "NbdPool",
    plural = "nbdpools",
    shortname = "nbdp",
    category = "hawser",
    status = "NbdPoolStatus",
    derive = "PartialEq",
    doc = "Nodes that keep volumes, and where on them.",
    printcolumn(
        name = "Path",
        type_ = "string",
        json_path = ".spec.backend.directory.path"
    ),
    printcolumn(name = "Reachable", type_ = "string", json_path = ".spec.reachable"),
    printcolumn(name = "Healthy", type_ = "string", json_path = ".status.healthy"),
    printcolumn(name = "Available", type_ = "string", json_path = ".status.available"),
    printcolumn(
        name = "Message",
        type_ = "string",
        json_path = ".status.message",
        priority = 1
    ),
    printcolumn(
        name = "Age",
        type_ = "date",
        json_path = ".metadata.creationTimestamp"
    )
)]
#[serde(rename_all = "camelCase")]
pub struct NbdPoolSpec {
    /// Labels of the nodes that belong to the pool. Empty selects every node that an agent runs on.
    #[serde(default)]
    #[schemars(extend("maxProperties" = 32))]
    pub node_selector: BTreeMap<String, String>,
    /// What keeps the data. It cannot be changed: volumes would be left behind.
    #[x_kube(validation = Rule::new("self == oldSelf").message("backend is immutable; make another pool"))]
    pub backend: Backend,
    /// How many times its room the pool may promise, as "1.5". Without it, what is promised is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = r"^[0-9]+(\.[0-9]{1,3})?$"))]
    pub overcommit_ratio: Option<String>,
    /// From where the pool's volumes can be used.
    #[serde(default)]
    pub reachable: Reach,
    /// Whether the volumes' servers use the network of their node instead of the pods' network.
    #[serde(default)]
    pub host_network: bool,
}

/// What keeps the data of a pool: one of these.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Backend {
    pub directory: DirectoryBackend,
}

/// A directory on each node: sparse files in a file system.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DirectoryBackend {
    /// Absolute path on the node.
    #[schemars(
        length(max = 1024),
        regex(pattern = r"^/([^/.][^/]*|\.[^/.][^/]*)(/([^/.][^/]*|\.[^/.][^/]*))*$")
    )]
    pub path: String,
}

/// From where a pool's volumes can be used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Reach {
    /// From every node.
    #[default]
    Everywhere,
    /// From nodes with the same `topology.kubernetes.io/zone` as the node that keeps the volume.
    Zone,
}

/// What the pool's agents found.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct NbdPoolStatus {
    /// Each node's share, written by the agent there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub nodes: Vec<PoolNode>,
    /// Healthy nodes of all nodes, for people; written by the controller.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub healthy: Option<String>,
    /// What may still be promised on the healthy nodes, for people; written by the controller.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub available: Option<String>,
    /// What is wrong with the other nodes, for people; written by the controller, for an agent that is away cannot say so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// One node's share of a pool.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PoolNode {
    /// The node's name.
    pub name: String,
    /// Bytes that may be promised altogether.
    #[serde(default)]
    #[schemars(with = "i64", range(min = 0))]
    pub capacity_bytes: u64,
    /// Bytes that may still be promised.
    #[serde(default)]
    #[schemars(with = "i64", range(min = 0))]
    pub available_bytes: u64,
    /// Bytes of the largest volume that can be made now.
    #[serde(default)]
    #[schemars(with = "i64", range(min = 0))]
    pub maximum_volume_bytes: u64,
    /// Whether new volumes may be put there.
    #[serde(default)]
    pub healthy: bool,
    /// Why not, or what else a person should know.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// Volumes kept there.
    #[serde(default)]
    #[schemars(with = "i64", range(min = 0))]
    pub volumes: u32,
    /// Volumes found there that no object names. They are kept until a person decides.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub orphans: Vec<String>,
    /// When the agent last wrote this: about once a minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_seen: Option<Time>,
}
