//! The CSI gRPC services, and the one place where errors become status codes.
//!
//! They know the volumes of the installation through [`Volumes`] and [`NodeVolumes`], the kernel's devices through
//! [`Devices`], and not which role hosts them: a role builds [`Services`] and serves [`router`] on a socket.

mod capability;
mod controller;
mod foreign;
mod identity;
mod locks;
#[cfg(test)]
mod memory;
mod node;
mod parameters;
mod request;
mod status;

use std::path::PathBuf;
use std::sync::Arc;

use axum::middleware::{from_fn, from_fn_with_state};
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::Router;

pub use self::node::Devices;
pub(crate) use self::status::chain;
use crate::metrics::{Calls, observe};
use crate::patience;
use crate::proto::csi::controller_server::ControllerServer;
use crate::proto::csi::identity_server::IdentityServer;
use crate::proto::csi::node_server::NodeServer;
use crate::volumes::{NodeVolumes, Volumes};

/// What the driver is called in StorageClasses and PersistentVolumes.
pub const DRIVER_NAME: &str = "csi.hawser.dev";

/// Key of publish_context: the attachment that ControllerPublish allowed.
const ATTACHMENT: &str = "attachment";
/// Key of publish_context: whether that attachment may not write.
const READ_ONLY: &str = "readOnly";

/// What is to be served.
pub struct Services {
    /// Serves the Controller service on these volumes.
    pub controller: Option<Arc<dyn Volumes>>,
    /// Serves the Node service.
    pub node: Option<NodeServices>,
    /// Counts the calls.
    pub calls: Calls,
}

/// What the Node service stands on.
pub struct NodeServices {
    /// How this machine is called: what NodeGetInfo says and ControllerPublish gets. 256 bytes at most.
    pub node_id: String,
    /// Volumes that can be attached here at one time; 0 sets no limit.
    pub maximum_volumes: u32,
    pub volumes: Arc<dyn NodeVolumes>,
    pub devices: Arc<dyn Devices>,
    /// A directory that outlives a restart, for a record of each volume that is staged here.
    pub state: PathBuf,
}

/// The services, ready for a socket: see [`Router::serve_with_incoming_shutdown`].
#[must_use]
pub fn router(services: Services) -> Router {
    let identity = identity::IdentityService {
        has_controller: services.controller.is_some(),
        has_topology: services
            .controller
            .as_ref()
            .is_some_and(|volumes| volumes.has_topology()),
    };
    let controller = services.controller.map(controller::ControllerService::new);
    let node = services.node.map(node::NodeService::new);
    let mut routes = Routes::new(IdentityServer::new(identity));
    if let Some(controller) = controller {
        routes = routes.add_service(ControllerServer::new(controller));
    }
    if let Some(node) = node {
        routes = routes.add_service(NodeServer::new(node));
    }
    let observed = routes
        .into_axum_router()
        .layer(from_fn(patience::learn))
        .layer(from_fn_with_state(services.calls, observe));
    Server::builder().add_routes(observed.into())
}

#[cfg(test)]
mod tests {
    use tokio_stream::wrappers::UnixListenerStream;
    use tonic::Code;

    use super::*;
    use crate::metrics::Exposition;
    use crate::proto::csi::controller_client::ControllerClient;
    use crate::proto::csi::identity_client::IdentityClient;
    use crate::proto::csi::{
        CreateSnapshotRequest, DeleteVolumeRequest, GetPluginCapabilitiesRequest,
        GetPluginInfoRequest, ListVolumesRequest, ProbeRequest,
    };
    use crate::proto::socket;

    #[tokio::test]
    async fn only_what_a_role_has_is_served() {
        for controller in [
            None,
            Some(Arc::new(memory::Memory::default()) as Arc<dyn Volumes>),
        ] {
            let has_controller = controller.is_some();
            let calls = Calls::default();
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("csi.sock");
            let listener = UnixListenerStream::new(socket::bind(&path).unwrap());
            let services = Services {
                controller,
                node: None,
                calls: calls.clone(),
            };
            let server = tokio::spawn(router(services).serve_with_incoming(listener));
            let channel = socket::connect(&path).await.unwrap();

            let mut identity = IdentityClient::new(channel.clone());
            let info = identity.get_plugin_info(GetPluginInfoRequest {}).await;
            assert_eq!(info.unwrap().into_inner().name, DRIVER_NAME);
            let ready = identity.probe(ProbeRequest {}).await.unwrap().into_inner();
            assert_eq!(ready.ready, Some(true));
            let told = identity
                .get_plugin_capabilities(GetPluginCapabilitiesRequest {})
                .await
                .unwrap()
                .into_inner();
            assert_eq!(told.capabilities.len(), 1 + usize::from(has_controller));

            let mut client = ControllerClient::new(channel);
            let listed = client.list_volumes(ListVolumesRequest::default()).await;
            assert_eq!(listed.is_ok(), has_controller);
            let undeclared = client
                .create_snapshot(CreateSnapshotRequest::default())
                .await;
            assert_eq!(undeclared.unwrap_err().code(), Code::Unimplemented);
            let deleted = client.delete_volume(DeleteVolumeRequest::default()).await;
            assert!(deleted.is_err());
            server.abort();

            let mut exposition = Exposition::new();
            calls.tell(&mut exposition);
            let text = exposition.text().unwrap();
            let counted = |method: &str, code: &str| {
                let labels = format!("{{method=\"{method}\",code=\"{code}\"}}");
                let line = format!("hawser_csi_call_seconds_count{labels} 1\n");
                text.contains(&line)
            };
            assert!(counted("Probe", "Ok"), "{text}");
            // A method that is not served has no name here: callers could make up any.
            assert!(!text.contains("CreateSnapshot"), "{text}");
            assert_eq!(counted("ListVolumes", "Ok"), has_controller, "{text}");
            assert_eq!(
                counted("DeleteVolume", "InvalidArgument"),
                has_controller,
                "{text}"
            );
        }
    }
}
