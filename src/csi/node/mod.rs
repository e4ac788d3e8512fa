//! The Node service: one volume on one machine.
//!
//! Requests are checked here; [`stage`], [`publish`] and [`volume`] do the work, on what [`mounts`] finds in the
//! kernel, with [`record`] to remember what was asked.

mod devices;
mod format;
mod host;
mod kubelet;
mod mounts;
mod publish;
mod record;
mod stage;
mod steps;
mod volume;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use tonic::{Request, Response, Status};

pub use self::devices::Devices;
pub(super) use self::record::RecordError;

use self::format::Formats;
use self::host::{Host, Machine};
use self::mounts::resolve;
use self::publish::Publish;
use self::record::Records;
use self::stage::Stage;
use self::volume::Fill;
use super::capability::{Capability, Refusal};
use super::foreign;
use super::locks::Locks;
use super::parameters::Parameters;
use super::request::{self, Size};
use super::status::{invalid, precondition};
use super::{ATTACHMENT, NodeServices, READ_ONLY};
use crate::proto::csi;
use crate::proto::csi::node_server::Node;
use crate::proto::csi::node_service_capability::{self as capability, Rpc, rpc};
use crate::proto::csi::volume_usage::Unit;
use crate::volumes::{AttachmentId, NodeVolumes, VolumeId};

const CAPABILITIES: [rpc::Type; 5] = [
    rpc::Type::StageUnstageVolume,
    rpc::Type::GetVolumeStats,
    rpc::Type::ExpandVolume,
    rpc::Type::SingleNodeMultiWriter,
    rpc::Type::VolumeMountGroup,
];

pub(super) struct NodeService {
    node_id: String,
    maximum_volumes: u32,
    inner: Arc<Inner>,
    locks: Locks,
}

/// What the operations share.
struct Inner {
    volumes: Arc<dyn NodeVolumes>,
    devices: Arc<dyn Devices>,
    host: Box<dyn Host>,
    records: Records,
    formats: Formats,
}

impl NodeService {
    pub(super) fn new(services: NodeServices) -> Self {
        Self::on(Box::new(Machine), services)
    }

    fn on(host: Box<dyn Host>, services: NodeServices) -> Self {
        Self {
            node_id: services.node_id,
            maximum_volumes: services.maximum_volumes,
            inner: Arc::new(Inner {
                volumes: services.volumes,
                devices: services.devices,
                host,
                formats: Formats::new(services.state.join("foreign")),
                records: Records::new(services.state),
            }),
            locks: Locks::default(),
        }
    }
}

/// What stage and publish requests have in common, checked.
fn stage(
    volume_id: &str,
    path: PathBuf,
    capability: Capability,
    publish_context: &HashMap<String, String>,
    volume_context: &HashMap<String, String>,
    secrets: HashMap<String, String>,
) -> Result<Stage, Status> {
    request::secrets(&secrets)?;
    request::map("publish_context", publish_context)?;
    request::map("volume_context", volume_context)?;
    let context = match volume_context.is_empty() {
        true => None,
        false => Some(Parameters::parse_context(volume_context)?),
    };
    let foreign = context.as_ref().and_then(|context| context.foreign.clone());
    let foreign = foreign::named(volume_id, foreign)?;
    let attachment: AttachmentId = publish_context
        .get(ATTACHMENT)
        .ok_or_else(|| {
            invalid(format!(
                "publish_context has no {ATTACHMENT}; ControllerPublishVolume gives it"
            ))
        })?
        .parse()?;
    let read_only = match publish_context.get(READ_ONLY).map(String::as_str) {
        Some("true") => true,
        Some("false") | None => false,
        Some(other) => {
            return Err(invalid(format!(
                "publish_context has {READ_ONLY} {other:?}, which is neither true nor false"
            )));
        }
    };
    Ok(Stage {
        handle: volume_id.to_owned(),
        volume: VolumeId::of_handle(volume_id),
        foreign,
        attachment,
        read_only,
        path,
        capability,
        secrets,
        context,
    })
}

#[tonic::async_trait]
impl Node for NodeService {
    async fn node_get_info(
        &self,
        _: Request<csi::NodeGetInfoRequest>,
    ) -> Result<Response<csi::NodeGetInfoResponse>, Status> {
        let segments = self.inner.volumes.topology().await?;
        Ok(Response::new(csi::NodeGetInfoResponse {
            node_id: self.node_id.clone(),
            max_volumes_per_node: self.maximum_volumes.into(),
            accessible_topology: (!segments.is_empty()).then(|| csi::Topology {
                segments: segments.into_iter().collect(),
            }),
        }))
    }

    async fn node_get_capabilities(
        &self,
        _: Request<csi::NodeGetCapabilitiesRequest>,
    ) -> Result<Response<csi::NodeGetCapabilitiesResponse>, Status> {
        let capabilities = CAPABILITIES
            .into_iter()
            .map(|r#type| csi::NodeServiceCapability {
                r#type: Some(capability::Type::Rpc(Rpc {
                    r#type: r#type.into(),
                })),
            })
            .collect();
        Ok(Response::new(csi::NodeGetCapabilitiesResponse {
            capabilities,
        }))
    }

    async fn node_stage_volume(
        &self,
        request: Request<csi::NodeStageVolumeRequest>,
    ) -> Result<Response<csi::NodeStageVolumeResponse>, Status> {
        let request = request.into_inner();
        request::required("volume_id", &request.volume_id)?;
        let path = request::path("staging_target_path", &request.staging_target_path)?;
        let capability = Capability::parse(request.volume_capability).map_err(Refusal::on_node)?;
        let stage = stage(
            &request.volume_id,
            resolve(&path),
            capability,
            &request.publish_context,
            &request.volume_context,
            request.secrets,
        )?;
        let inner = self.inner.clone();
        self.locks
            .run("NodeStageVolume", &request.volume_id, async move {
                inner.stage(stage).await?;
                Ok(csi::NodeStageVolumeResponse {})
            })
            .await
    }

    async fn node_unstage_volume(
        &self,
        request: Request<csi::NodeUnstageVolumeRequest>,
    ) -> Result<Response<csi::NodeUnstageVolumeResponse>, Status> {
        let request = request.into_inner();
        request::required("volume_id", &request.volume_id)?;
        let path = request::path("staging_target_path", &request.staging_target_path)?;
        let volume = VolumeId::of_handle(&request.volume_id);
        let inner = self.inner.clone();
        self.locks
            .run("NodeUnstageVolume", &request.volume_id, async move {
                inner.unstage(&volume, &resolve(&path)).await?;
                Ok(csi::NodeUnstageVolumeResponse {})
            })
            .await
    }

    async fn node_publish_volume(
        &self,
        request: Request<csi::NodePublishVolumeRequest>,
    ) -> Result<Response<csi::NodePublishVolumeResponse>, Status> {
        let request = request.into_inner();
        request::required("volume_id", &request.volume_id)?;
        let target = request::path("target_path", &request.target_path)?;
        let capability = Capability::parse(request.volume_capability).map_err(Refusal::on_node)?;
        if request.staging_target_path.is_empty() {
            return Err(precondition(
                "staging_target_path is missing; NodeStageVolume comes first",
            ));
        }
        let path = request::path("staging_target_path", &request.staging_target_path)?;
        let publish = Publish {
            stage: stage(
                &request.volume_id,
                resolve(&path),
                capability,
                &request.publish_context,
                &request.volume_context,
                request.secrets,
            )?,
            target: resolve(&target),
            read_only: request.readonly,
        };
        let inner = self.inner.clone();
        self.locks
            .run("NodePublishVolume", &request.volume_id, async move {
                inner.publish(publish).await?;
                Ok(csi::NodePublishVolumeResponse {})
            })
            .await
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<csi::NodeUnpublishVolumeRequest>,
    ) -> Result<Response<csi::NodeUnpublishVolumeResponse>, Status> {
        let request = request.into_inner();
        request::required("volume_id", &request.volume_id)?;
        let target = request::path("target_path", &request.target_path)?;
        let volume = VolumeId::of_handle(&request.volume_id);
        let inner = self.inner.clone();
        self.locks
            .run("NodeUnpublishVolume", &request.volume_id, async move {
                inner.unpublish(&volume, &resolve(&target)).await?;
                Ok(csi::NodeUnpublishVolumeResponse {})
            })
            .await
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<csi::NodeGetVolumeStatsRequest>,
    ) -> Result<Response<csi::NodeGetVolumeStatsResponse>, Status> {
        let request = request.into_inner();
        request::required("volume_id", &request.volume_id)?;
        request::required_path("volume_path", &request.volume_path)?;
        let volume = VolumeId::of_handle(&request.volume_id);
        let fill = self.inner.fill(&volume, &request.volume_path).await?;
        Ok(Response::new(csi::NodeGetVolumeStatsResponse {
            usage: to_csi(&fill),
        }))
    }

    async fn node_expand_volume(
        &self,
        request: Request<csi::NodeExpandVolumeRequest>,
    ) -> Result<Response<csi::NodeExpandVolumeResponse>, Status> {
        let request = request.into_inner();
        request::required("volume_id", &request.volume_id)?;
        request::required_path("volume_path", &request.volume_path)?;
        request::secrets(&request.secrets)?;
        let size = request.capacity_range.map(Size::parse).transpose()?;
        if let Some(capability) = request.volume_capability {
            Capability::parse(Some(capability))?;
        }
        let volume = VolumeId::of_handle(&request.volume_id);
        let inner = self.inner.clone();
        self.locks
            .run("NodeExpandVolume", &request.volume_id, async move {
                let bytes = inner.expand(&volume, &request.volume_path, size).await?;
                Ok(csi::NodeExpandVolumeResponse {
                    capacity_bytes: i64::try_from(bytes).unwrap_or(i64::MAX),
                })
            })
            .await
    }
}

fn to_csi(fill: &Fill) -> Vec<csi::VolumeUsage> {
    let signed = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
    let usage = |unit: Unit, total, available, used| csi::VolumeUsage {
        unit: unit.into(),
        total: signed(total),
        available: signed(available),
        used: signed(used),
    };
    match fill {
        Fill::Block(bytes) => vec![usage(Unit::Bytes, *bytes, 0, 0)],
        Fill::Filesystem(found) => {
            let bytes = usage(
                Unit::Bytes,
                found.total_bytes,
                found.available_bytes,
                found.used_bytes,
            );
            let inodes = (found.total_inodes != 0).then(|| {
                let used = found.total_inodes.saturating_sub(found.free_inodes);
                usage(Unit::Inodes, found.total_inodes, found.free_inodes, used)
            });
            [Some(bytes), inodes].into_iter().flatten().collect()
        }
    }
}

#[cfg(test)]
mod fake;
#[cfg(test)]
mod tests;
