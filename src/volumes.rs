//! The volumes of this installation: the names everything shares, and the one seam between Kubernetes and a
//! single machine.
//!
//! The CSI services speak to [`Volumes`] only. `standalone` implements it on directories and child processes.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use rustls::crypto::aws_lc_rs::{cipher_suite, default_provider};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::attach::Transport;
use crate::verify;

/// How long a volume id is: `vol-` and 32 hex digits, a valid DNS label.
const VOLUME_ID_LENGTH: usize = 36;

/// Names one volume: `vol-` and 32 hex digits derived from the CSI name, so that creating twice finds the first.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VolumeId(String);

/// Names one attachment of a volume to a node: `att-` and 32 random hex digits, made at ControllerPublish.
///
/// It is not a secret (a certificate is needed besides), but it is never used again once revoked.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct AttachmentId(String);

/// A text that is not the name it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a {what}: expected {expected}")]
pub struct InvalidName {
    what: &'static str,
    text: String,
    expected: &'static str,
}

/// Volume or attachment: a fixed prefix, then 32 lower-case hex digits.
fn is_hex_name(text: &str, prefix: &str) -> bool {
    text.len() == VOLUME_ID_LENGTH
        && text.strip_prefix(prefix).is_some_and(|digits| {
            digits
                .bytes()
                .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
        })
}

macro_rules! hex_name {
    ($name:ident, $prefix:literal, $what:literal) => {
        impl $name {
            /// Names the object with these 16 bytes.
            #[must_use]
            pub fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(format!(
                    concat!($prefix, "{:032x}"),
                    u128::from_be_bytes(bytes)
                ))
            }

            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidName;

            fn try_from(text: String) -> Result<Self, InvalidName> {
                if is_hex_name(&text, $prefix) {
                    return Ok(Self(text));
                }
                Err(InvalidName {
                    what: $what,
                    text: text.chars().take(64).collect(),
                    expected: concat!($prefix, " and 32 hex digits"),
                })
            }
        }

        impl std::str::FromStr for $name {
            type Err = InvalidName;

            fn from_str(text: &str) -> Result<Self, InvalidName> {
                Self::try_from(text.to_owned())
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

impl VolumeId {
    /// The id of the volume with that CSI name: from its SHA-256, so that creating twice finds the first.
    #[must_use]
    pub fn of_name(name: &str) -> Self {
        Self::from_bytes(digest(&[name]))
    }
}

impl AttachmentId {
    /// A new one that nobody had before.
    pub fn random() -> Result<Self, VolumesError> {
        let mut bytes = [0; 16];
        let filled = default_provider().secure_random.fill(&mut bytes);
        filled.map_err(|_| VolumesError::Internal {
            doing: "cannot draw random bytes".to_owned(),
            source: None,
        })?;
        Ok(Self::from_bytes(bytes))
    }
}

hex_name!(VolumeId, "vol-", "volume id");
hex_name!(AttachmentId, "att-", "attachment id");

impl VolumeId {
    /// The id, on this installation alone, of what an orchestrator calls `handle` and Hawser did not make: an export of
    /// a server of somebody else's. No id of a volume that Hawser made is the same.
    #[must_use]
    pub fn foreign(handle: &str) -> Self {
        Self::from_bytes(digest(&["foreign volume", handle]))
    }

    /// The id of whatever an orchestrator calls so.
    #[must_use]
    pub fn of_handle(handle: &str) -> Self {
        handle.parse().unwrap_or_else(|_| Self::foreign(handle))
    }
}

impl AttachmentId {
    /// The one attachment of a foreign volume to a node where nobody keeps a record of attachments.
    #[must_use]
    pub fn unrecorded(handle: &str, node: &str) -> Self {
        Self::from_bytes(digest(&["foreign attachment", handle, node]))
    }
}

/// The first half of the SHA-256 of `parts`, none of which has a zero byte.
fn digest(parts: &[&str]) -> [u8; 16] {
    // rustls names its hash functions by the cipher suites that use them.
    let suite = cipher_suite::TLS13_CHACHA20_POLY1305_SHA256.tls13();
    let mut bytes = [0; 16];
    if let Some(suite) = suite {
        let hash = suite.common.hash_provider.hash(parts.join("\0").as_bytes());
        bytes.copy_from_slice(&hash.as_ref()[..16]);
    }
    bytes
}

/// What a volume holds, settled when it is created.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Content {
    /// A file system that Hawser makes at the first stage and never again.
    Filesystem,
    /// Whatever the pod writes to the raw device: never formatted, never checked.
    Block,
}

/// How many consumers may use a volume at one time, as CSI's access modes say it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum AccessMode {
    SingleNodeWriter,
    SingleNodeReaderOnly,
    MultiNodeReaderOnly,
    SingleNodeSingleWriter,
    SingleNodeMultiWriter,
}

impl AccessMode {
    /// Whether one node at most may hold the volume.
    #[must_use]
    pub fn is_single_node(self) -> bool {
        !matches!(self, Self::MultiNodeReaderOnly)
    }

    /// Whether nobody may write.
    #[must_use]
    pub fn is_read_only(self) -> bool {
        matches!(self, Self::SingleNodeReaderOnly | Self::MultiNodeReaderOnly)
    }
}

/// What a StorageClass asks of every volume made from it; parsed and checked by `csi::parameters`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeOptions {
    pub content: Content,
    /// Extra parameters that the node needs, handed to it as CSI volume_context.
    pub context: BTreeMap<String, String>,
}

/// What to create.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateRequest {
    /// The name the CO chose, at most 128 bytes; the same name means the same volume.
    pub name: String,
    /// Bytes wanted at least; a multiple of 4096 results.
    pub required_bytes: u64,
    /// Bytes at most, if the CO set a limit.
    pub limit_bytes: Option<u64>,
    pub options: VolumeOptions,
    /// Where to keep it, in an installation of more than one machine.
    pub placement: Placement,
    /// Who makes its certificates.
    pub certificates: Certificates,
}

/// Key and value pairs that say where a node is.
pub type Topology = BTreeMap<String, String>;

/// Where a volume may be kept, so that it can be used where it is wanted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Placement {
    /// The pool, where there are several.
    pub pool: Option<String>,
    /// It must be usable from one of these at least; none asks for nothing.
    pub requisite: Vec<Topology>,
    /// The same, in the order of preference.
    pub preferred: Vec<Topology>,
}

/// Who makes a volume's certificates.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Certificates {
    /// The installation's own authority.
    #[default]
    Managed,
    /// cert-manager, through one of its issuers.
    CertManager {
        issuer: String,
        kind: String,
        group: String,
    },
    /// Somebody else: the server's Secret has this name, or the usual one.
    Secret { server: Option<String> },
}

/// One allowed attachment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    pub id: AttachmentId,
    pub node: String,
    pub read_only: bool,
    pub mode: AccessMode,
}

/// How far formatting a volume has come. It only ever moves forward, and is on disk before the next step is taken.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "lowercase")]
pub enum Format {
    /// mkfs was never started: the device must be empty, and may be formatted.
    #[default]
    Never,
    /// mkfs of `fs` was started and nothing was ever mounted: no user's data can be there, mkfs may run again.
    Started { fs: String },
    /// mkfs finished: it must never run again, whatever a probe of the device says.
    Done { fs: String },
}

/// A volume as the installation knows it now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    pub id: VolumeId,
    pub name: String,
    pub size_bytes: u64,
    pub options: VolumeOptions,
    pub format: Format,
    pub attachments: Vec<Attachment>,
}

/// Room left for new volumes, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Capacity {
    pub available_bytes: u64,
    pub maximum_volume_bytes: u64,
}

/// Why an operation on the installation's volumes was refused; `csi::status` maps each kind to a gRPC code.
#[derive(Debug, thiserror::Error)]
pub enum VolumesError {
    #[error("volume {0} does not exist")]
    NotFound(String),
    #[error("node {0} does not exist")]
    NodeNotFound(String),
    #[error("volume {volume} exists already, but {difference}")]
    Incompatible { volume: String, difference: String },
    #[error("volume {volume} is attached to node {node}; detach it there first")]
    AttachedElsewhere { volume: String, node: String },
    #[error(
        "volume {volume} is still attached to node {node}; it is deleted only after it was detached"
    )]
    InUse { volume: String, node: String },
    #[error("{0}")]
    OutOfRange(String),
    #[error("{0}")]
    NoRoom(String),
    #[error("{0}")]
    Invalid(String),
    #[error("node {node} already has {limit} volumes attached, its limit")]
    NodeFull { node: String, limit: u64 },
    #[error("volume {volume}: {doing}: try again")]
    Unavailable {
        volume: String,
        doing: String,
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// A Secret of the installation's that cannot be used.
    #[error("{problem}")]
    Secret {
        problem: String,
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    #[error("{doing}")]
    Internal {
        doing: String,
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
}

/// The volumes of this installation. Every call may be repeated, interrupted and raced; each leaves the volume
/// either as it was or as asked.
#[tonic::async_trait]
pub trait Volumes: Send + Sync + 'static {
    /// Creates the volume, its certificates and its server; returns it if it is there already and compatible.
    async fn create(&self, request: CreateRequest) -> Result<Volume, VolumesError>;

    /// The volume of that id.
    async fn find(&self, id: &VolumeId) -> Result<Volume, VolumesError>;

    /// All volumes in the order of their ids, strictly after `after`, at most `most`.
    async fn list(
        &self,
        after: Option<&VolumeId>,
        most: usize,
    ) -> Result<Vec<Volume>, VolumesError>;

    /// Deletes the volume, its data, server and certificates; deleting what is not there succeeds.
    async fn delete(&self, id: &VolumeId) -> Result<(), VolumesError>;

    /// Allows `node` to connect; repeated for the same node, mode and readonly it returns the same attachment.
    async fn attach(
        &self,
        id: &VolumeId,
        node: &str,
        mode: AccessMode,
        read_only: bool,
    ) -> Result<Attachment, VolumesError>;

    /// Revokes at the server, and returns only when no write of that node can land any more.
    /// `None` means every node. Detaching what is not attached succeeds.
    async fn detach(&self, id: &VolumeId, node: Option<&str>) -> Result<(), VolumesError>;

    /// Grows the backing store and the export to `required_bytes` at least; never shrinks. Returns the size.
    async fn grow(
        &self,
        id: &VolumeId,
        required_bytes: u64,
        limit_bytes: Option<u64>,
    ) -> Result<u64, VolumesError>;

    /// Room for new volumes in such a place.
    async fn capacity(&self, place: &Placement) -> Result<Capacity, VolumesError>;

    /// Whether volumes can be used from some nodes only, which [`Volumes::accessible_from`] says.
    fn has_topology(&self) -> bool {
        false
    }

    /// From where a volume can be used: from any of these; none means everywhere.
    async fn accessible_from(&self, _: &VolumeId) -> Result<Vec<Topology>, VolumesError> {
        Ok(Vec::new())
    }

    /// Records that `node` uses an export that Hawser neither made nor serves, and that one node alone does unless all
    /// only read. Nobody tells the server: it keeps no other client away.
    ///
    /// Where the orchestrator itself records attachments, as Kubernetes does, there is no need for a record here.
    async fn attach_foreign(
        &self,
        handle: &str,
        node: &str,
        mode: AccessMode,
        read_only: bool,
    ) -> Result<Attachment, VolumesError> {
        Ok(Attachment {
            id: AttachmentId::unrecorded(handle, node),
            node: node.to_owned(),
            read_only: read_only || mode.is_read_only(),
            mode,
        })
    }

    /// Forgets that `node`, or every node, uses a foreign volume. Nothing is revoked: there is nobody to ask.
    async fn detach_foreign(&self, handle: &str, node: Option<&str>) -> Result<(), VolumesError> {
        let _ = (handle, node);
        Ok(())
    }
}

/// What a node may ask and say about the volumes it was given: nothing else, so that a node that is taken over
/// has no more to gain.
#[tonic::async_trait]
pub trait NodeVolumes: Send + Sync + 'static {
    /// The volume of that id, as recorded.
    async fn find(&self, id: &VolumeId) -> Result<Volume, VolumesError>;

    /// Where the volume's server listens now.
    async fn endpoint(&self, id: &VolumeId) -> Result<SocketAddr, VolumesError>;

    /// The client Secret of a volume, for a node request that carries no secrets of its own.
    async fn client_secret(&self, id: &VolumeId)
    -> Result<BTreeMap<String, Vec<u8>>, VolumesError>;

    /// Records, durably, how far formatting has come. Going back is refused.
    async fn set_format(&self, id: &VolumeId, format: Format) -> Result<(), VolumesError>;

    /// Where this node is, as the orchestrator's topology has it; nothing where volumes can be used from everywhere.
    async fn topology(&self) -> Result<BTreeMap<String, String>, VolumesError> {
        Ok(BTreeMap::new())
    }

    /// Takes the client Secret that a node request brought, to show it until the next one comes. An installation that
    /// can look it up itself has no need to.
    async fn keep_client_secret(
        &self,
        id: &VolumeId,
        secret: BTreeMap<String, Vec<u8>>,
    ) -> Result<(), VolumesError> {
        let _ = (id, secret);
        Ok(())
    }

    /// Takes note of what the orchestrator calls a volume that the installation has no record of. It is a hint: what is told
    /// under that name is told only where it is of this volume.
    fn note_name(&self, id: &VolumeId, name: &str) {
        let _ = (id, name);
    }

    /// Takes note of what came of an attach. It waits for nobody.
    fn note_attach(&self, id: &VolumeId, note: AttachNote) {
        let _ = (id, note);
    }

    /// Takes note of an attempt to put new connections in the places of those that died: whether there are some now.
    fn note_reconnect(&self, id: &VolumeId, mended: bool) {
        let _ = (id, mended);
    }

    /// Takes note of a client Secret that was brought and cannot be used: the one before stays in use.
    fn note_refused_secret(&self, id: &VolumeId, problem: &str) {
        let _ = (id, problem);
    }

    /// Takes note that the volume is not on this node any more.
    fn note_detached(&self, id: &VolumeId) {
        let _ = id;
    }
}

/// What came of an attach, for the volume's record and whoever uses it.
#[derive(Debug, Clone)]
pub struct AttachNote {
    pub attachment: AttachmentId,
    pub policy: verify::Policy,
    /// What verification found, where it was made.
    pub report: Option<Arc<verify::Report>>,
    /// How the device's data travels; `None`: there is no device, because of what verification found.
    pub transport: Option<Transport>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_accept_only_their_own_shape() {
        let id = VolumeId::from_bytes([0xab; 16]);
        assert_eq!(id.as_str(), "vol-abababababababababababababababab");
        assert_eq!(id.as_str().parse::<VolumeId>(), Ok(id.clone()));
        for bad in [
            "",
            "vol-",
            "vol-ABABABABABABABABABABABABABABABAB",
            "../../../../../../etc/passwd-padding",
        ] {
            assert!(bad.parse::<VolumeId>().is_err(), "{bad}");
        }
        assert!(id.as_str().parse::<AttachmentId>().is_err());
    }

    #[test]
    fn a_foreign_handle_has_an_id_of_its_own() {
        let own = VolumeId::from_bytes([1; 16]);
        assert_eq!(VolumeId::of_handle(own.as_str()), own);
        let foreign = VolumeId::of_handle("legacy-disk");
        assert_eq!(foreign, VolumeId::foreign("legacy-disk"));
        // printf 'foreign volume\0legacy-disk' | sha256sum
        assert_eq!(foreign.as_str(), "vol-0c11ec0a05008ec1a3547685bf3e438e");
        assert_ne!(foreign, VolumeId::foreign("legacy-disk2"));
        let on = |node| AttachmentId::unrecorded("legacy-disk", node);
        assert_eq!(on("a"), on("a"));
        assert_ne!(on("a"), on("b"));
    }

    #[test]
    fn ids_are_the_hash_of_the_name() {
        // sha256sum of "pvc-1".
        assert_eq!(
            VolumeId::of_name("pvc-1").as_str(),
            "vol-f2868e1aa7cab669517cd9f5ab1b7957"
        );
        assert_ne!(VolumeId::of_name("pvc-1"), VolumeId::of_name("pvc-2"));
        assert_ne!(
            AttachmentId::random().unwrap(),
            AttachmentId::random().unwrap()
        );
    }
}
