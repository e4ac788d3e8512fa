//! Volumes in memory, for the tests of the services.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::SocketAddr;
use std::sync::Mutex;

use crate::tls::Authority;
use crate::volumes::{
    AccessMode, Attachment, AttachmentId, Capacity, CreateRequest, Format, NodeVolumes, Placement,
    Volume, VolumeId, Volumes, VolumesError,
};

/// Volumes that one node may have at one time.
pub(super) const NODE_LIMIT: usize = 3;
/// The nodes of this installation.
pub(super) const NODES: [&str; 2] = ["node-1", "node-2"];
/// Bytes of all volumes together.
pub(super) const ROOM: u64 = 1 << 40;

pub(super) struct Memory {
    volumes: Mutex<BTreeMap<VolumeId, Volume>>,
    authority: Authority,
}

impl Default for Memory {
    fn default() -> Self {
        Self {
            volumes: Mutex::default(),
            authority: Authority::temporary().unwrap(),
        }
    }
}

/// The id that a name gets here.
pub(super) fn id_of(name: &str) -> VolumeId {
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    let mut bytes = [0; 16];
    bytes[8..].copy_from_slice(&hasher.finish().to_be_bytes());
    VolumeId::from_bytes(bytes)
}

impl Memory {
    pub(super) fn change<T>(
        &self,
        id: &VolumeId,
        change: impl FnOnce(&mut Volume) -> T,
    ) -> Result<T, VolumesError> {
        let mut volumes = self.volumes.lock().unwrap();
        volumes
            .get_mut(id)
            .map(change)
            .ok_or_else(|| VolumesError::NotFound(id.to_string()))
    }
}

#[tonic::async_trait]
impl Volumes for Memory {
    async fn create(&self, request: CreateRequest) -> Result<Volume, VolumesError> {
        let id = id_of(&request.name);
        let mut volumes = self.volumes.lock().unwrap();
        let size_bytes = request.required_bytes.next_multiple_of(4096);
        let limit = request.limit_bytes.unwrap_or(u64::MAX);
        if let Some(volume) = volumes.get(&id) {
            let fits = (request.required_bytes..=limit).contains(&volume.size_bytes);
            if fits && volume.options == request.options {
                return Ok(volume.clone());
            }
            return Err(VolumesError::Incompatible {
                volume: id.to_string(),
                difference: "it is different".into(),
            });
        }
        if size_bytes > limit {
            return Err(VolumesError::OutOfRange("limit".into()));
        }
        if size_bytes > ROOM {
            return Err(VolumesError::NoRoom("no room".into()));
        }
        let volume = Volume {
            id: id.clone(),
            name: request.name,
            size_bytes,
            options: request.options,
            format: Format::Never,
            attachments: Vec::new(),
        };
        volumes.insert(id, volume.clone());
        Ok(volume)
    }

    async fn find(&self, id: &VolumeId) -> Result<Volume, VolumesError> {
        self.change(id, |volume| volume.clone())
    }

    async fn list(
        &self,
        after: Option<&VolumeId>,
        most: usize,
    ) -> Result<Vec<Volume>, VolumesError> {
        let volumes = self.volumes.lock().unwrap();
        let later = volumes
            .values()
            .filter(|volume| after.is_none_or(|after| volume.id > *after));
        Ok(later.take(most).cloned().collect())
    }

    async fn delete(&self, id: &VolumeId) -> Result<(), VolumesError> {
        let mut volumes = self.volumes.lock().unwrap();
        if let Some(attachment) = volumes.get(id).and_then(|v| v.attachments.first()) {
            return Err(VolumesError::InUse {
                volume: id.to_string(),
                node: attachment.node.clone(),
            });
        }
        volumes.remove(id);
        Ok(())
    }

    async fn attach(
        &self,
        id: &VolumeId,
        node: &str,
        mode: AccessMode,
        read_only: bool,
    ) -> Result<Attachment, VolumesError> {
        let mut volumes = self.volumes.lock().unwrap();
        let attached = volumes.values().flat_map(|volume| &volume.attachments);
        let full = attached.filter(|a| a.node == node).count() >= NODE_LIMIT;
        let volume = volumes
            .get_mut(id)
            .ok_or_else(|| VolumesError::NotFound(id.to_string()))?;
        if !NODES.contains(&node) {
            return Err(VolumesError::NodeNotFound(node.into()));
        }
        if let Some(same) = volume.attachments.iter().find(|a| a.node == node) {
            if (same.mode, same.read_only) == (mode, read_only) {
                return Ok(same.clone());
            }
            return Err(VolumesError::Incompatible {
                volume: id.to_string(),
                difference: "it is attached otherwise".into(),
            });
        }
        if let Some(other) = volume.attachments.first()
            && (mode.is_single_node() || other.mode.is_single_node())
        {
            return Err(VolumesError::AttachedElsewhere {
                volume: id.to_string(),
                node: other.node.clone(),
            });
        }
        if full {
            return Err(VolumesError::NodeFull {
                node: node.into(),
                limit: NODE_LIMIT as u64,
            });
        }
        let number = u8::try_from(volume.attachments.len()).unwrap();
        let attachment = Attachment {
            id: AttachmentId::from_bytes([number; 16]),
            node: node.into(),
            read_only,
            mode,
        };
        volume.attachments.push(attachment.clone());
        Ok(attachment)
    }

    async fn detach(&self, id: &VolumeId, node: Option<&str>) -> Result<(), VolumesError> {
        let _ = self.change(id, |volume| {
            volume
                .attachments
                .retain(|attachment| node.is_some_and(|node| attachment.node != node));
        });
        Ok(())
    }

    async fn grow(
        &self,
        id: &VolumeId,
        required_bytes: u64,
        limit_bytes: Option<u64>,
    ) -> Result<u64, VolumesError> {
        let size = self.change(id, |volume| {
            volume.size_bytes = volume.size_bytes.max(required_bytes.next_multiple_of(4096));
            volume.size_bytes
        })?;
        match limit_bytes {
            Some(limit) if limit < size => Err(VolumesError::OutOfRange("limit".into())),
            _ => Ok(size),
        }
    }

    async fn capacity(&self, _: &Placement) -> Result<Capacity, VolumesError> {
        Ok(Capacity {
            available_bytes: ROOM,
            maximum_volume_bytes: ROOM,
        })
    }
}

#[tonic::async_trait]
impl NodeVolumes for Memory {
    async fn find(&self, id: &VolumeId) -> Result<Volume, VolumesError> {
        self.change(id, |volume| volume.clone())
    }

    async fn endpoint(&self, _: &VolumeId) -> Result<SocketAddr, VolumesError> {
        Ok(SocketAddr::from(([127, 0, 0, 1], 10809)))
    }

    async fn client_secret(
        &self,
        id: &VolumeId,
    ) -> Result<BTreeMap<String, Vec<u8>>, VolumesError> {
        self.change(id, |_| ())?;
        Ok(self.authority.issue_client(id).unwrap())
    }

    async fn set_format(&self, id: &VolumeId, format: Format) -> Result<(), VolumesError> {
        self.change(id, |volume| match (&volume.format, &format) {
            (Format::Never, _) | (Format::Started { .. }, Format::Done { .. }) => {
                volume.format = format;
                Ok(())
            }
            (old, new) if old == new => Ok(()),
            (old, new) => Err(VolumesError::Invalid(format!("{old:?} -> {new:?}"))),
        })?
    }
}
