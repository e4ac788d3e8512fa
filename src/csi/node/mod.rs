//! The Node service: one volume on one machine.

mod devices;

use tonic::{Request, Response, Status};

pub use self::devices::{Attach, Device, Devices};
use super::NodeServices;
use crate::proto::csi;
use crate::proto::csi::node_server::Node;

pub(super) struct NodeService {
    services: NodeServices,
}

impl NodeService {
    pub(super) fn new(services: NodeServices) -> Self {
        Self { services }
    }
}

#[tonic::async_trait]
impl Node for NodeService {
    async fn node_get_info(
        &self,
        _: Request<csi::NodeGetInfoRequest>,
    ) -> Result<Response<csi::NodeGetInfoResponse>, Status> {
        Ok(Response::new(csi::NodeGetInfoResponse {
            node_id: self.services.node_id.clone(),
            max_volumes_per_node: self.services.maximum_volumes.into(),
            accessible_topology: None,
        }))
    }
}
