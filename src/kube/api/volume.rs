//! NbdVolume: one volume, what it should be, where it is, and who may use it.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::volumes::{AccessMode, Attachment, Content, Format, InvalidName};

/// A block volume.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, CustomResource, KubeSchema)]
#[kube(
    group = "hawser.dev",
    version = "v1alpha1",
    kind = "NbdVolume",
    plural = "nbdvolumes",
    shortname = "nbdv",
    category = "hawser",
    namespaced,
    status = "NbdVolumeStatus",
    derive = "PartialEq",
    doc = "A block volume. Its name is the volume's id.",
    printcolumn(name = "Name", type_ = "string", json_path = ".spec.name"),
    printcolumn(name = "Size", type_ = "string", json_path = ".status.size"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Kept on", type_ = "string", json_path = ".spec.node"),
    printcolumn(name = "Attached to", type_ = "string", json_path = ".status.attachedTo"),
    printcolumn(name = "Encrypted", type_ = "string", json_path = ".status.encryption"),
    printcolumn(name = "Verified", type_ = "string", json_path = ".status.verified"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Pool", type_ = "string", json_path = ".spec.pool", priority = 1),
    printcolumn(name = "Endpoint", type_ = "string", json_path = ".status.endpoint", priority = 1),
    printcolumn(
        name = "Message",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].message",
        priority = 1
    ),
    validation = Rule::new("self.metadata.name.matches('^vol-[0-9a-f]{32}$')").message("the name is a volume id: vol- and 32 hex digits"),
    validation = Rule::new("!has(oldSelf.status) || !has(oldSelf.status.format) || (has(self.status) && has(self.status.format))").message("status.format is never forgotten: the volume would be formatted again"),
    validation = Rule::new("!has(oldSelf.spec.attachments) || oldSelf.spec.attachments.all(o, (has(self.spec.attachments) && self.spec.attachments.exists(n, n.id == o.id)) || (o.revoked && has(oldSelf.status) && has(oldSelf.status.attachments) && oldSelf.status.attachments.exists(s, s.id == o.id && has(s.state) && s.state == 'Revoked')))").message("an attachment is ended by its revoked: true, and leaves when the agent has said Revoked in status.attachments")
)]
#[serde(rename_all = "camelCase")]
pub struct NbdVolumeSpec {
    /// The name that the container orchestrator chose; the PersistentVolume's.
    #[schemars(length(min = 1, max = 128))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("name is immutable"))]
    pub name: String,
    /// Bytes, a multiple of 4096. It may grow, never shrink.
    #[schemars(with = "i64", range(min = 4096))]
    #[x_kube(validation = Rule::new("self >= oldSelf").message("a volume never shrinks"))]
    pub size_bytes: u64,
    /// The NbdPool that keeps the volume.
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("pool is immutable: the data is there"))]
    pub pool: String,
    /// The node that keeps the volume.
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("node is immutable: the data is there"))]
    pub node: String,
    /// Whether Hawser makes a file system on it, or the pods use it as a raw device.
    #[x_kube(validation = Rule::new("self == oldSelf").message("content is immutable"))]
    pub content: Content,
    /// What the StorageClass asked for, for the node plugin.
    #[serde(default)]
    #[schemars(extend("maxProperties" = 32, "additionalProperties" = {"type": "string", "maxLength": 4096}))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("context is immutable: PersistentVolumes have a copy of it"))]
    pub context: BTreeMap<String, String>,
    /// Where the certificates come from.
    #[serde(default)]
    pub certificates: Certificates,
    /// Port of the server, where it shares its node's network with others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65535))]
    #[schemars(with = "Option<i32>")]
    pub port: Option<u16>,
    /// Who may use the volume.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("maxItems" = 256))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["id".into()]))]
    #[x_kube(validation = Rule::new("self.all(a, a.revoked || a.mode == 'multi-node-reader-only' || self.all(b, b.revoked || b.node == a.node))").message("one node at a time has a volume, unless all only read: revoke the other attachment first"))]
    pub attachments: Vec<VolumeAttachment>,
}

/// Where a volume's certificates come from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.source != 'certManager' || has(self.issuer)").message("source certManager needs issuer"))]
pub struct Certificates {
    #[serde(default)]
    pub source: Source,
    /// With source `certManager`: who issues.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub issuer: Option<Issuer>,
    /// With source `secret`: the Secret of the volume's server, in the driver's namespace, if it is not
    /// `<volume>-server`. The clients' Secret is the StorageClass's node-stage and node-publish Secret.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub server_secret: Option<String>,
}

/// Who makes a volume's certificates.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Source {
    /// Hawser's own authority.
    #[default]
    Managed,
    /// cert-manager.
    CertManager,
    /// Somebody else: the Secrets are there.
    Secret,
}

/// An issuer of cert-manager's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Issuer {
    /// What it is called.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// `Issuer` (in the driver's namespace) or `ClusterIssuer`.
    #[schemars(length(min = 1, max = 63))]
    pub kind: String,
    /// The API group of an external issuer.
    #[serde(default = "cert_manager")]
    #[schemars(length(min = 1, max = 253))]
    pub group: String,
}

fn cert_manager() -> String {
    "cert-manager.io".to_owned()
}

/// One attachment. To detach, `revoked` is set; the entry goes when the agent has confirmed that id as Revoked. So a
/// confirmation is always something that is there, never something that is missing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.node == oldSelf.node && self.readOnly == oldSelf.readOnly && self.mode == oldSelf.mode").message("an attachment is immutable; make another one"))]
#[x_kube(validation = Rule::new("!oldSelf.revoked || self.revoked").message("an attachment that was revoked stays so"))]
pub struct VolumeAttachment {
    /// Random, and never used again: the server knows the attachment by it.
    #[schemars(length(max = 36), regex(pattern = r"^att-[0-9a-f]{32}$"))]
    pub id: String,
    /// The node's name.
    #[schemars(length(min = 1, max = 253))]
    pub node: String,
    /// Whether the server refuses its writes.
    #[serde(default)]
    pub read_only: bool,
    pub mode: AccessMode,
    /// Whether it is to end.
    #[serde(default)]
    pub revoked: bool,
}

impl TryFrom<&VolumeAttachment> for Attachment {
    type Error = InvalidName;

    fn try_from(attachment: &VolumeAttachment) -> Result<Self, InvalidName> {
        Ok(Self {
            id: attachment.id.parse()?,
            node: attachment.node.clone(),
            read_only: attachment.read_only,
            mode: attachment.mode,
        })
    }
}

/// What is. Every part is left out by those who do not write it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct NbdVolumeStatus {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,
    /// BackingReady (the agent's), CertificatesReady, ServerReady, AgentReady and Ready (the controller's): each with a reason, and a
    /// message for people.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
    /// Bytes of the backing store.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i64>", range(min = 0))]
    pub size_bytes: Option<u64>,
    /// The same for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<String>,
    /// Where the server listens: address and port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// Which life of the volume this is: another number means that unflushed writes may be gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i64>", range(min = 0))]
    pub epoch: Option<u64>,
    /// How far formatting has come. It only moves forward.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<FormatStatus>,
    /// The nodes that may use the volume, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attached_to: Option<String>,
    /// How the data travels, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encryption: Option<String>,
    /// What verification said of the attachments, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verified: Option<String>,
    /// What became of each attachment in spec.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("maxItems" = 256))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["id".into()]))]
    pub attachments: Vec<AttachmentStatus>,
}

/// How a volume is, in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Phase {
    /// It is being made, or its server is being started again.
    Pending,
    /// It can be used.
    Ready,
    /// It is being deleted.
    Deleting,
    /// It cannot be used: the conditions say why.
    Failed,
}

/// How far formatting has come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self == oldSelf || oldSelf.state == 'never' || (oldSelf.state == 'started' && self.state != 'never')").message("formatting only moves forward: a formatted volume would be formatted again"))]
pub struct FormatStatus {
    /// `never`, `started` or `done`. A volume is formatted only while this is not `done`.
    pub state: FormatState,
    /// The file system, once formatting was started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16))]
    pub fs: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum FormatState {
    Never,
    Started,
    Done,
}

impl From<&Format> for FormatStatus {
    fn from(format: &Format) -> Self {
        let (state, fs) = match format {
            Format::Never => (FormatState::Never, None),
            Format::Started { fs } => (FormatState::Started, Some(fs.clone())),
            Format::Done { fs } => (FormatState::Done, Some(fs.clone())),
        };
        Self { state, fs }
    }
}

impl From<&FormatStatus> for Format {
    fn from(status: &FormatStatus) -> Self {
        let fs = status.fs.clone().unwrap_or_default();
        match status.state {
            FormatState::Never => Self::Never,
            FormatState::Started => Self::Started { fs },
            FormatState::Done => Self::Done { fs },
        }
    }
}

/// What became of one attachment.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!has(oldSelf.state) || oldSelf.state != 'Revoked' || (has(self.state) && self.state == 'Revoked')").message("an attachment that was revoked stays so"))]
pub struct AttachmentStatus {
    /// The attachment's id in spec.
    #[schemars(length(max = 36))]
    pub id: String,
    /// What the server was told last, and has confirmed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<AttachmentState>,
    /// How the data travels: `kernel TLS 1.3`, say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub encryption: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verification: Option<VerificationStatus>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum AttachmentState {
    /// The server accepts it.
    Allowed,
    /// The server refuses it, its sessions are closed, and no write of it can land any more.
    Revoked,
}

/// What verification found at the server before the device was used.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VerificationStatus {
    /// `passed`, `warnings`, `failed` or `off`.
    #[schemars(length(max = 32))]
    pub result: String,
    /// One line for each check that did not pass.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("maxItems" = 64))]
    pub findings: Vec<String>,
    /// When that was.
    pub checked_at: Time,
    /// What the server calls itself, and where it listened.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub server: Option<String>,
}
