//! The Identity service: who answers here, and what for.

use tonic::{Request, Response, Status};

use super::DRIVER_NAME;
use crate::proto::csi::identity_server::Identity;
use crate::proto::csi::plugin_capability::{
    self, Service, VolumeExpansion, service, volume_expansion,
};
use crate::proto::csi::{
    GetPluginCapabilitiesRequest, GetPluginCapabilitiesResponse, GetPluginInfoRequest,
    GetPluginInfoResponse, PluginCapability, ProbeRequest, ProbeResponse,
};

pub(super) struct IdentityService {
    /// Whether the Controller service is served here as well.
    pub(super) has_controller: bool,
    /// Whether some volumes can be used from some nodes only.
    pub(super) has_topology: bool,
}

#[tonic::async_trait]
impl Identity for IdentityService {
    async fn get_plugin_info(
        &self,
        _: Request<GetPluginInfoRequest>,
    ) -> Result<Response<GetPluginInfoResponse>, Status> {
        Ok(Response::new(GetPluginInfoResponse {
            name: DRIVER_NAME.into(),
            vendor_version: env!("CARGO_PKG_VERSION").into(),
            manifest: std::collections::HashMap::new(),
        }))
    }

    async fn get_plugin_capabilities(
        &self,
        _: Request<GetPluginCapabilitiesRequest>,
    ) -> Result<Response<GetPluginCapabilitiesResponse>, Status> {
        let expansion = plugin_capability::Type::VolumeExpansion(VolumeExpansion {
            r#type: volume_expansion::Type::Online.into(),
        });
        let controller = plugin_capability::Type::Service(Service {
            r#type: service::Type::ControllerService.into(),
        });
        let topology = plugin_capability::Type::Service(Service {
            r#type: service::Type::VolumeAccessibilityConstraints.into(),
        });
        let offered = [
            Some(expansion),
            self.has_controller.then_some(controller),
            self.has_topology.then_some(topology),
        ];
        let capabilities = offered
            .into_iter()
            .flatten()
            .map(|r#type| PluginCapability {
                r#type: Some(r#type),
            })
            .collect();
        Ok(Response::new(GetPluginCapabilitiesResponse {
            capabilities,
        }))
    }

    async fn probe(&self, _: Request<ProbeRequest>) -> Result<Response<ProbeResponse>, Status> {
        Ok(Response::new(ProbeResponse { ready: Some(true) }))
    }
}
