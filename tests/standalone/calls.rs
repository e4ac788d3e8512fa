//! The CSI calls as these tests make them.

use std::collections::HashMap;

use hawser::proto::csi::volume_capability::access_mode::Mode;
use hawser::proto::csi::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use hawser::proto::csi::{
    CapacityRange, ControllerExpandVolumeRequest, ControllerPublishVolumeRequest,
    ControllerUnpublishVolumeRequest, CreateVolumeRequest, DeleteVolumeRequest, ListVolumesRequest,
    Volume, VolumeCapability,
};
use tonic::{Code, Status};

use crate::home::Controller;

pub(crate) const MIB: i64 = 1 << 20;

fn capability(access_type: AccessType) -> VolumeCapability {
    VolumeCapability {
        access_mode: Some(AccessMode {
            mode: Mode::SingleNodeWriter.into(),
        }),
        access_type: Some(access_type),
    }
}

pub(crate) fn block() -> VolumeCapability {
    capability(AccessType::Block(BlockVolume {}))
}

pub(crate) fn mount(fs_type: &str) -> VolumeCapability {
    capability(AccessType::Mount(MountVolume {
        fs_type: fs_type.to_owned(),
        ..MountVolume::default()
    }))
}

impl Controller {
    pub(crate) async fn create(&self, name: &str, size: i64) -> Result<Volume, Status> {
        let request = CreateVolumeRequest {
            name: name.to_owned(),
            capacity_range: Some(CapacityRange {
                required_bytes: size,
                limit_bytes: 0,
            }),
            volume_capabilities: vec![block()],
            ..CreateVolumeRequest::default()
        };
        let answer = self.0.clone().create_volume(request).await?;
        Ok(answer.into_inner().volume.unwrap())
    }

    pub(crate) async fn delete(&self, id: &str) -> Result<(), Status> {
        let request = DeleteVolumeRequest {
            volume_id: id.to_owned(),
            ..DeleteVolumeRequest::default()
        };
        self.0.clone().delete_volume(request).await?;
        Ok(())
    }

    /// Returns the attachment.
    pub(crate) async fn publish(&self, id: &str, node: &str) -> Result<String, Status> {
        let request = ControllerPublishVolumeRequest {
            volume_id: id.to_owned(),
            node_id: node.to_owned(),
            volume_capability: Some(block()),
            ..ControllerPublishVolumeRequest::default()
        };
        let answer = self.0.clone().controller_publish_volume(request).await?;
        let mut context: HashMap<_, _> = answer.into_inner().publish_context;
        Ok(context.remove("attachment").unwrap())
    }

    pub(crate) async fn unpublish(&self, id: &str, node: &str) -> Result<(), Status> {
        let request = ControllerUnpublishVolumeRequest {
            volume_id: id.to_owned(),
            node_id: node.to_owned(),
            ..ControllerUnpublishVolumeRequest::default()
        };
        self.0.clone().controller_unpublish_volume(request).await?;
        Ok(())
    }

    pub(crate) async fn expand(&self, id: &str, size: i64) -> Result<i64, Status> {
        let request = ControllerExpandVolumeRequest {
            volume_id: id.to_owned(),
            capacity_range: Some(CapacityRange {
                required_bytes: size,
                limit_bytes: 0,
            }),
            volume_capability: Some(block()),
            ..ControllerExpandVolumeRequest::default()
        };
        let answer = self.0.clone().controller_expand_volume(request).await?;
        Ok(answer.into_inner().capacity_bytes)
    }

    /// The ids of all volumes, each with its size and the nodes it is published on.
    pub(crate) async fn volumes(&self) -> HashMap<String, (i64, Vec<String>)> {
        let request = ListVolumesRequest::default();
        let answer = self.0.clone().list_volumes(request).await.unwrap();
        let entries = answer.into_inner().entries.into_iter();
        entries
            .map(|entry| {
                let volume = entry.volume.unwrap();
                let nodes = entry.status.unwrap().published_node_ids;
                (volume.volume_id, (volume.capacity_bytes, nodes))
            })
            .collect()
    }
}

/// The code and text of a refusal.
#[track_caller]
pub(crate) fn refusal<T>(answer: Result<T, Status>) -> (Code, String) {
    match answer {
        Ok(_) => panic!("it was not refused"),
        Err(status) => (status.code(), status.message().to_owned()),
    }
}
