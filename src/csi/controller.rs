//! The Controller service: CSI's volumes in terms of [`Volumes`].

use std::collections::HashMap;
use std::sync::Arc;

use tonic::{Code, Request, Response, Status};

use super::capability::{Access, Capability, Refusal};
use super::foreign;
use super::locks::Locks;
use super::parameters::Parameters;
use super::request::{self, Size};
use super::status::{invalid, not_found, out_of_range, status};
use super::{ATTACHMENT, READ_ONLY};
use crate::filesystem::Kind;
use crate::proto::csi;
use crate::proto::csi::controller_server::Controller;
use crate::proto::csi::controller_service_capability::{self as capability, Rpc, rpc};
use crate::proto::csi::validate_volume_capabilities_response::Confirmed;
use crate::proto::csi::volume_content_source;
use crate::volumes::{
    Attachment, Content, CreateRequest, Placement, Topology, Volume, VolumeId, VolumeOptions,
    Volumes,
};

/// Bytes of a volume whose size nobody asked for.
const DEFAULT_SIZE: u64 = 1 << 30;

/// Bytes of the smallest raw block volume; of the others, see [`Kind::minimum_size`].
const MINIMUM_BLOCK_SIZE: u64 = 1 << 20;

/// A size is rounded up to a multiple of this.
const GRANULE: u64 = 4096;

/// Volumes in one answer of ListVolumes at most, so that it stays within gRPC's 4 MiB.
const PAGE: usize = 5000;

const CAPABILITIES: [rpc::Type; 8] = [
    rpc::Type::CreateDeleteVolume,
    rpc::Type::PublishUnpublishVolume,
    rpc::Type::ListVolumes,
    rpc::Type::ListVolumesPublishedNodes,
    rpc::Type::GetCapacity,
    rpc::Type::ExpandVolume,
    rpc::Type::GetVolume,
    rpc::Type::SingleNodeMultiWriter,
];

pub(super) struct ControllerService {
    volumes: Arc<dyn Volumes>,
    locks: Locks,
}

impl ControllerService {
    pub(super) fn new(volumes: Arc<dyn Volumes>) -> Self {
        Self {
            volumes,
            locks: Locks::default(),
        }
    }
}

/// A required volume id. A text that is no id of ours names no volume: `None`.
fn volume_id(text: &str) -> Result<Option<VolumeId>, Status> {
    Ok(request::required("volume_id", text)?.parse().ok())
}

/// A required volume id of a volume that must exist.
fn known_volume_id(text: &str) -> Result<VolumeId, Status> {
    volume_id(text)?.ok_or_else(|| foreign::unknown(text))
}

/// Whether the volume called `handle` is one on another server, which `context` then describes; refused, what it cannot
/// be.
fn is_foreign(handle: &str, context: &HashMap<String, String>) -> Result<bool, Status> {
    if !context.contains_key(super::parameters::URI) {
        return Ok(false);
    }
    let described = Parameters::parse_context(context)?.foreign;
    Ok(foreign::named(handle, described)?.is_some())
}

fn to_csi(volume: Volume, accessible_from: Vec<Topology>) -> csi::Volume {
    csi::Volume {
        capacity_bytes: i64::try_from(volume.size_bytes).unwrap_or(i64::MAX),
        volume_id: volume.id.into(),
        volume_context: volume.options.context.into_iter().collect(),
        content_source: None,
        accessible_topology: accessible_from.into_iter().map(topology).collect(),
    }
}

fn topology(segments: Topology) -> csi::Topology {
    csi::Topology {
        segments: segments.into_iter().collect(),
    }
}

fn topologies(list: Vec<csi::Topology>) -> Result<Vec<Topology>, Status> {
    let segments = |topology: csi::Topology| {
        request::map("accessibility_requirements", &topology.segments)?;
        Ok(topology.segments.into_iter().collect())
    };
    list.into_iter().map(segments).collect()
}

fn published_nodes(volume: &Volume) -> Vec<String> {
    let nodes = volume.attachments.iter().map(|a| a.node.clone());
    let mut nodes: Vec<_> = nodes.collect();
    nodes.sort_unstable();
    nodes.dedup();
    nodes
}

fn capabilities(list: Vec<csi::VolumeCapability>) -> Result<Vec<Capability>, Refusal> {
    if list.is_empty() {
        return Err(Refusal::Malformed("there is none".into()));
    }
    list.into_iter()
        .map(|capability| Capability::parse(Some(capability)))
        .collect()
}

/// What a volume with all these capabilities holds, and the file system they name.
fn content(wanted: &[Capability]) -> Result<(Content, Option<Kind>), Status> {
    let contents = wanted.iter().map(Capability::content);
    let content = wanted.first().map_or(Content::Block, Capability::content);
    if contents.into_iter().any(|other| other != content) {
        return Err(invalid(
            "volume_capabilities: a volume is either a raw block device or a file system, not both",
        ));
    }
    let mut kinds: Vec<Kind> = wanted
        .iter()
        .filter_map(|capability| match &capability.access {
            Access::Mount(mount) => mount.kind,
            Access::Block => None,
        })
        .collect();
    kinds.dedup();
    if kinds.len() > 1 {
        return Err(invalid(
            "volume_capabilities: they name different file systems",
        ));
    }
    Ok((content, kinds.pop()))
}

/// What the node is told of an attachment.
fn published(attachment: Attachment) -> csi::ControllerPublishVolumeResponse {
    csi::ControllerPublishVolumeResponse {
        publish_context: HashMap::from([
            (ATTACHMENT.into(), attachment.id.into()),
            (READ_ONLY.into(), attachment.read_only.to_string()),
        ]),
    }
}

/// Checks a CreateVolume request and says what it asks for.
fn wanted(request: csi::CreateVolumeRequest, has_topology: bool) -> Result<CreateRequest, Status> {
    let name = request::name(&request.name)?.to_owned();
    let (content, kind) = content(&capabilities(request.volume_capabilities)?)?;
    request::map("parameters", &request.parameters)?;
    request::secrets(&request.secrets)?;
    let parameters = Parameters::parse(&request.parameters)?;
    if let Some(source) = request.volume_content_source {
        return Err(invalid(match source.r#type {
            Some(volume_content_source::Type::Snapshot(_)) => {
                "volume_content_source: volumes are not made from snapshots yet"
            }
            Some(volume_content_source::Type::Volume(_)) => {
                "volume_content_source: volumes are not cloned yet"
            }
            None => "volume_content_source says neither snapshot nor volume",
        }));
    }
    if request.accessibility_requirements.is_some() && !has_topology {
        return Err(invalid(
            "accessibility_requirements: volumes have no topology, every node reaches each of them",
        ));
    }
    let places = request.accessibility_requirements.unwrap_or_default();
    let placement = Placement {
        pool: parameters.pool.clone(),
        requisite: topologies(places.requisite)?,
        preferred: topologies(places.preferred)?,
    };
    if !request.mutable_parameters.is_empty() {
        return Err(invalid("mutable_parameters: there are none"));
    }
    let mut context = Parameters::context(&request.parameters);
    let kind = kind.or(parameters.kind);
    if let (Content::Filesystem, Some(kind)) = (content, kind) {
        context.insert(super::parameters::FS_TYPE.into(), kind.to_string());
    }
    let minimum = match content {
        Content::Block => MINIMUM_BLOCK_SIZE,
        Content::Filesystem => kind.unwrap_or_default().minimum_size(),
    };
    let size = match request.capacity_range {
        Some(range) => match Size::parse(range)? {
            Size {
                required: 0,
                limit: Some(limit),
            } => Size {
                required: limit.min(DEFAULT_SIZE) / GRANULE * GRANULE,
                limit: Some(limit),
            },
            size => size,
        },
        None => Size {
            required: DEFAULT_SIZE,
            limit: None,
        },
    }
    .at_least(minimum)?;
    check_representable(size.required)?;
    Ok(CreateRequest {
        name,
        required_bytes: size.required,
        limit_bytes: size.limit,
        options: VolumeOptions { content, context },
        placement,
        certificates: parameters.certificates,
    })
}

/// CSI counts in signed numbers, and sizes are rounded up.
fn check_representable(required: u64) -> Result<(), Status> {
    match required
        .checked_next_multiple_of(GRANULE)
        .map(i64::try_from)
    {
        Some(Ok(_)) => Ok(()),
        _ => Err(out_of_range(format!(
            "required_bytes {required} is more than a volume can have"
        ))),
    }
}

#[tonic::async_trait]
impl Controller for ControllerService {
    async fn controller_get_capabilities(
        &self,
        _: Request<csi::ControllerGetCapabilitiesRequest>,
    ) -> Result<Response<csi::ControllerGetCapabilitiesResponse>, Status> {
        let capabilities = CAPABILITIES
            .into_iter()
            .map(|r#type| csi::ControllerServiceCapability {
                r#type: Some(capability::Type::Rpc(Rpc {
                    r#type: r#type.into(),
                })),
            })
            .collect();
        Ok(Response::new(csi::ControllerGetCapabilitiesResponse {
            capabilities,
        }))
    }

    async fn create_volume(
        &self,
        request: Request<csi::CreateVolumeRequest>,
    ) -> Result<Response<csi::CreateVolumeResponse>, Status> {
        let wanted = wanted(request.into_inner(), self.volumes.has_topology())?;
        let volumes = self.volumes.clone();
        let name = wanted.name.clone();
        self.locks
            .run(
                "CreateVolume",
                &format!("volume named {name:?}"),
                async move {
                    let volume = volumes.create(wanted).await?;
                    tracing::info!(id = %volume.id, bytes = volume.size_bytes, "volume is there");
                    let from = volumes.accessible_from(&volume.id).await?;
                    Ok(csi::CreateVolumeResponse {
                        volume: Some(to_csi(volume, from)),
                    })
                },
            )
            .await
    }

    async fn delete_volume(
        &self,
        request: Request<csi::DeleteVolumeRequest>,
    ) -> Result<Response<csi::DeleteVolumeResponse>, Status> {
        let request = request.into_inner();
        request::secrets(&request.secrets)?;
        // What cannot be a volume of ours is deleted already, as the specification has it for unknown ids.
        let Some(id) = volume_id(&request.volume_id)? else {
            return Ok(Response::new(csi::DeleteVolumeResponse {}));
        };
        let volumes = self.volumes.clone();
        self.locks
            .run("DeleteVolume", &request.volume_id, async move {
                volumes.delete(&id).await?;
                Ok(csi::DeleteVolumeResponse {})
            })
            .await
    }

    async fn controller_publish_volume(
        &self,
        request: Request<csi::ControllerPublishVolumeRequest>,
    ) -> Result<Response<csi::ControllerPublishVolumeResponse>, Status> {
        let request = request.into_inner();
        request::required("volume_id", &request.volume_id)?;
        let node = request::node_id(&request.node_id)?.to_owned();
        let capability = Capability::parse(request.volume_capability)?;
        request::secrets(&request.secrets)?;
        request::map("volume_context", &request.volume_context)?;
        let read_only = request.readonly || capability.mode.is_read_only();
        let volumes = self.volumes.clone();
        if is_foreign(&request.volume_id, &request.volume_context)? {
            let handle = request.volume_id.clone();
            return self
                .locks
                .run("ControllerPublishVolume", &request.volume_id, async move {
                    let attachment = volumes
                        .attach_foreign(&handle, &node, capability.mode, read_only)
                        .await?;
                    tracing::info!(
                        node, attachment = %attachment.id, read_only,
                        "attached by the record only: its server is not Hawser's, and keeps no other node away"
                    );
                    Ok(published(attachment))
                })
                .await;
        }
        let id = known_volume_id(&request.volume_id)?;
        self.locks
            .run("ControllerPublishVolume", &request.volume_id, async move {
                capability.fits(&volumes.find(&id).await?)?;
                let attachment = volumes
                    .attach(&id, &node, capability.mode, read_only)
                    .await?;
                tracing::info!(node, attachment = %attachment.id, read_only, "attached");
                Ok(published(attachment))
            })
            .await
    }

    async fn controller_unpublish_volume(
        &self,
        request: Request<csi::ControllerUnpublishVolumeRequest>,
    ) -> Result<Response<csi::ControllerUnpublishVolumeResponse>, Status> {
        let request = request.into_inner();
        request::secrets(&request.secrets)?;
        let node = match request.node_id.as_str() {
            "" => None,
            text => Some(request::node_id(text)?.to_owned()),
        };
        let id = volume_id(&request.volume_id)?;
        let handle = request.volume_id.clone();
        let volumes = self.volumes.clone();
        self.locks
            .run(
                "ControllerUnpublishVolume",
                &request.volume_id,
                async move {
                    match id {
                        Some(id) => volumes.detach(&id, node.as_deref()).await?,
                        // A foreign volume, or none at all.
                        None => volumes.detach_foreign(&handle, node.as_deref()).await?,
                    }
                    Ok(csi::ControllerUnpublishVolumeResponse {})
                },
            )
            .await
    }

    async fn validate_volume_capabilities(
        &self,
        request: Request<csi::ValidateVolumeCapabilitiesRequest>,
    ) -> Result<Response<csi::ValidateVolumeCapabilitiesResponse>, Status> {
        let request = request.into_inner();
        request::required("volume_id", &request.volume_id)?;
        request::secrets(&request.secrets)?;
        request::map("volume_context", &request.volume_context)?;
        request::map("parameters", &request.parameters)?;
        let parsed = capabilities(request.volume_capabilities.clone());
        if let Err(refusal @ Refusal::Malformed(_)) = parsed {
            return Err(refusal.into());
        }
        let refusal = if is_foreign(&request.volume_id, &request.volume_context)? {
            // What its server can do, only a node finds out.
            parsed
                .map_err(|refusal| refusal.to_string())
                .and_then(|_| no_parameters(&request))
        } else {
            let id = known_volume_id(&request.volume_id)?;
            let volume = self.volumes.find(&id).await?;
            parsed
                .and_then(|wanted| wanted.iter().try_for_each(|c| c.fits(&volume)))
                .map_err(|refusal| refusal.to_string())
                .and_then(|()| confirm_parameters(&request, &volume))
        };
        Ok(Response::new(match refusal {
            Err(message) => csi::ValidateVolumeCapabilitiesResponse {
                confirmed: None,
                message,
            },
            Ok(()) => csi::ValidateVolumeCapabilitiesResponse {
                confirmed: Some(Confirmed {
                    volume_context: request.volume_context,
                    volume_capabilities: request.volume_capabilities,
                    parameters: request.parameters,
                    mutable_parameters: HashMap::new(),
                }),
                message: String::new(),
            },
        }))
    }

    async fn list_volumes(
        &self,
        request: Request<csi::ListVolumesRequest>,
    ) -> Result<Response<csi::ListVolumesResponse>, Status> {
        let request = request.into_inner();
        let most = match usize::try_from(request.max_entries) {
            Ok(0) => PAGE,
            Ok(most) => most.min(PAGE),
            Err(_) => {
                return Err(invalid(format!(
                    "max_entries {} is negative",
                    request.max_entries
                )));
            }
        };
        // A token is the last id that was told, so it stays good when that volume is deleted.
        let after: Option<VolumeId> = match request.starting_token.as_str() {
            "" => None,
            token => Some(token.parse().map_err(|_| {
                status(
                    Code::Aborted,
                    "starting_token is not one of ours; begin again without",
                )
            })?),
        };
        let mut volumes = self.volumes.list(after.as_ref(), most + 1).await?;
        let more = volumes.len() > most;
        volumes.truncate(most);
        let next_token = match volumes.last() {
            Some(last) if more => last.id.to_string(),
            _ => String::new(),
        };
        let entries = volumes
            .into_iter()
            .map(|volume| csi::list_volumes_response::Entry {
                status: Some(csi::list_volumes_response::VolumeStatus {
                    published_node_ids: published_nodes(&volume),
                }),
                // Nobody reads topology here, and each volume's would be another question.
                volume: Some(to_csi(volume, Vec::new())),
            })
            .collect();
        Ok(Response::new(csi::ListVolumesResponse {
            entries,
            next_token,
        }))
    }

    async fn controller_get_volume(
        &self,
        request: Request<csi::ControllerGetVolumeRequest>,
    ) -> Result<Response<csi::ControllerGetVolumeResponse>, Status> {
        let id = known_volume_id(&request.into_inner().volume_id)?;
        let volume = self.volumes.find(&id).await?;
        let from = self.volumes.accessible_from(&id).await?;
        Ok(Response::new(csi::ControllerGetVolumeResponse {
            status: Some(csi::controller_get_volume_response::VolumeStatus {
                published_node_ids: published_nodes(&volume),
            }),
            volume: Some(to_csi(volume, from)),
        }))
    }

    async fn get_capacity(
        &self,
        request: Request<csi::GetCapacityRequest>,
    ) -> Result<Response<csi::GetCapacityResponse>, Status> {
        let request = request.into_inner();
        request::map("parameters", &request.parameters)?;
        let parameters = Parameters::parse_class(&request.parameters)?;
        let asked = request.volume_capabilities;
        let minimum = match (!asked.is_empty()).then(|| capabilities(asked)) {
            // Nothing can be made with a capability that is not supported: no error, but no room.
            Some(Err(Refusal::Unsupported(_))) => {
                return Ok(Response::new(csi::GetCapacityResponse::default()));
            }
            Some(Err(refusal)) => return Err(refusal.into()),
            Some(Ok(wanted)) => match content(&wanted)? {
                (Content::Block, _) => MINIMUM_BLOCK_SIZE,
                (Content::Filesystem, kind) => {
                    kind.or(parameters.kind).unwrap_or_default().minimum_size()
                }
            },
            None => MINIMUM_BLOCK_SIZE,
        };
        let place = Placement {
            pool: parameters.pool,
            requisite: topologies(request.accessible_topology.into_iter().collect())?,
            preferred: Vec::new(),
        };
        let capacity = self.volumes.capacity(&place).await?;
        let signed = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
        Ok(Response::new(csi::GetCapacityResponse {
            available_capacity: signed(capacity.available_bytes),
            maximum_volume_size: Some(signed(capacity.maximum_volume_bytes)),
            minimum_volume_size: Some(signed(minimum)),
        }))
    }

    async fn controller_expand_volume(
        &self,
        request: Request<csi::ControllerExpandVolumeRequest>,
    ) -> Result<Response<csi::ControllerExpandVolumeResponse>, Status> {
        let request = request.into_inner();
        request::required("volume_id", &request.volume_id)?;
        request::secrets(&request.secrets)?;
        let range = request
            .capacity_range
            .ok_or_else(|| invalid("capacity_range is missing"))?;
        let size = Size::parse(range)?;
        check_representable(size.required)?;
        let capability = request
            .volume_capability
            .map(|capability| Capability::parse(Some(capability)))
            .transpose()?;
        let id = volume_id(&request.volume_id)?.ok_or_else(|| {
            not_found(format!(
                "volume {:?} does not exist here; one on another server than Hawser's is grown at that server, and its \
                 device when it is staged the next time",
                request.volume_id
            ))
        })?;
        let volumes = self.volumes.clone();
        self.locks
            .run("ControllerExpandVolume", &request.volume_id, async move {
                if let Some(capability) = capability {
                    capability.fits(&volumes.find(&id).await?)?;
                }
                // Where only a limit is set, any size is enough.
                let required = size.required.max(1);
                let bytes = volumes.grow(&id, required, size.limit).await?;
                tracing::info!(bytes, "volume has grown");
                Ok(csi::ControllerExpandVolumeResponse {
                    capacity_bytes: i64::try_from(bytes).unwrap_or(i64::MAX),
                    // Of a raw block volume too: its kernel device has to learn the new size.
                    node_expansion_required: true,
                })
            })
            .await
    }
}

/// A foreign volume was made from no StorageClass.
fn no_parameters(request: &csi::ValidateVolumeCapabilitiesRequest) -> Result<(), String> {
    if request.parameters.is_empty() && request.mutable_parameters.is_empty() {
        return Ok(());
    }
    Err("parameters: a volume on another server than Hawser's has none".into())
}

/// Whether a volume is what `parameters` and `volume_context` of a validation say; the message says why not.
fn confirm_parameters(
    request: &csi::ValidateVolumeCapabilitiesRequest,
    volume: &Volume,
) -> Result<(), String> {
    if !request.mutable_parameters.is_empty() {
        return Err("mutable_parameters: there are none".into());
    }
    let recorded = Parameters::recorded(&volume.options.context)
        .map_err(|status| status.message().to_owned())?;
    let same = |asked: Result<Parameters, Status>, what: &str| {
        let mut asked = asked.map_err(|status| status.message().to_owned())?;
        // A capability may have named the file system instead.
        asked.kind = asked.kind.or(recorded.kind);
        if (&asked.options, asked.kind) == (&recorded.options, recorded.kind) {
            return Ok(());
        }
        Err(format!("{what}: volume {} was made with others", volume.id))
    };
    if !request.volume_context.is_empty() {
        same(
            Parameters::parse_context(&request.volume_context),
            "volume_context",
        )?;
    }
    if !request.parameters.is_empty() {
        same(Parameters::parse(&request.parameters), "parameters")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
