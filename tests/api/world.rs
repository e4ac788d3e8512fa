//! One namespace with everything a volume needs, and CSI's calls as the sidecars make them.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use hawser::kube::api::{NbdPool, NbdVolume, Phase};
use hawser::proto::csi::controller_client::ControllerClient;
use hawser::proto::csi::volume_capability::{AccessType, BlockVolume};
use hawser::proto::csi::{self, volume_capability};
use hawser::proto::socket;
use kube::Api;
use kube::api::PostParams;
use serde_json::json;
use tokio::task::JoinHandle;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::parts::{Agent, kubelet, report};
use crate::server::{ApiServer, Process};
use crate::until;

pub(crate) const SOON: Duration = Duration::from_secs(30);
pub(crate) const GIB: u64 = 1 << 30;

/// The refusal of a call that must not succeed.
pub(crate) fn refusal<T>(result: Result<T, Status>) -> Result<Status> {
    match result {
        Ok(_) => Err(anyhow!("it was not refused")),
        Err(status) => Ok(status),
    }
}

/// A controller's process and a connection to it.
pub(crate) struct Controller {
    pub(crate) process: Process,
    pub(crate) csi: ControllerClient<Channel>,
    pub(crate) log: PathBuf,
}

impl Controller {
    pub(crate) async fn start(
        server: &ApiServer,
        folder: &std::path::Path,
        namespace: &str,
        name: &str,
    ) -> Result<Self> {
        let path = folder.join(format!("{name}.sock"));
        let log = folder.join(format!("{name}.log"));
        let process = Process::start(
            &log,
            Command::new(env!("CARGO_BIN_EXE_hawser"))
                .args([
                    "controller",
                    "--image=hawser:test",
                    "--lease=hawser-controller",
                ])
                .arg(format!("--endpoint=unix://{}", path.display()))
                .arg(format!("--namespace={namespace}"))
                .arg(format!("--name={name}"))
                .env("KUBECONFIG", &server.kubeconfig),
        )?;
        let channel = until("the controller answers", SOON, async || {
            Ok(socket::connect(&path).await.ok())
        })
        .await
        .with_context(|| std::fs::read_to_string(&log).unwrap_or_default())?;
        Ok(Self {
            process,
            csi: ControllerClient::new(channel),
            log,
        })
    }

    pub(crate) fn told(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

/// A namespace with a pool on node-1, an agent, a kubelet and a controller.
pub(crate) struct World<'a> {
    pub(crate) server: &'a ApiServer,
    pub(crate) namespace: String,
    pub(crate) folder: tempfile::TempDir,
    pub(crate) agent: Agent,
    pub(crate) kubelet: JoinHandle<()>,
    pub(crate) controller: Controller,
}

impl Drop for World<'_> {
    fn drop(&mut self) {
        self.kubelet.abort();
    }
}

impl<'a> World<'a> {
    pub(crate) async fn new(server: &'a ApiServer, namespace: &str) -> Result<Self> {
        make_pool(server, namespace, "Everywhere").await?;
        report(&server.client, namespace, "node-1", 100 * GIB).await?;
        let folder = tempfile::tempdir()?;
        let controller = Controller::start(server, folder.path(), namespace, "a").await?;
        Ok(Self {
            server,
            namespace: namespace.to_owned(),
            folder,
            agent: Agent::start(server.client.clone(), namespace),
            kubelet: kubelet(server.client.clone(), namespace),
            controller,
        })
    }

    pub(crate) fn api<K>(&self) -> Api<K>
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.server.client.clone(), &self.namespace)
    }

    pub(crate) fn wanted(&self, name: &str) -> csi::CreateVolumeRequest {
        csi::CreateVolumeRequest {
            name: name.to_owned(),
            capacity_range: Some(csi::CapacityRange {
                required_bytes: 1 << 30,
                limit_bytes: 0,
            }),
            volume_capabilities: vec![capability()],
            parameters: [("pool".to_owned(), self.namespace.clone())].into(),
            ..csi::CreateVolumeRequest::default()
        }
    }

    /// Creates as csi-provisioner does: again and again.
    pub(crate) async fn create(&mut self, name: &str) -> Result<csi::Volume> {
        let wanted = self.wanted(name);
        let client = self.controller.csi.clone();
        let made = until("the volume is made", SOON, async || {
            match client.clone().create_volume(wanted.clone()).await {
                Ok(made) => Ok(made.into_inner().volume),
                Err(status) if matches!(status.code(), Code::Unavailable | Code::Aborted) => {
                    Ok(None)
                }
                Err(status) => bail!("{status}"),
            }
        });
        made.await.with_context(|| self.controller.told())
    }

    pub(crate) async fn publish(&mut self, id: &str, node: &str) -> Result<String, tonic::Status> {
        let request = csi::ControllerPublishVolumeRequest {
            volume_id: id.to_owned(),
            node_id: node.to_owned(),
            volume_capability: Some(capability()),
            ..csi::ControllerPublishVolumeRequest::default()
        };
        let published = self
            .controller
            .csi
            .controller_publish_volume(request)
            .await?;
        Ok(published.into_inner().publish_context["attachment"].clone())
    }

    pub(crate) async fn unpublish(&mut self, id: &str, node: &str) -> Result<(), tonic::Status> {
        let request = csi::ControllerUnpublishVolumeRequest {
            volume_id: id.to_owned(),
            node_id: node.to_owned(),
            ..csi::ControllerUnpublishVolumeRequest::default()
        };
        self.controller
            .csi
            .controller_unpublish_volume(request)
            .await?;
        Ok(())
    }

    pub(crate) async fn delete(&mut self, id: &str) -> Result<(), tonic::Status> {
        let request = csi::DeleteVolumeRequest {
            volume_id: id.to_owned(),
            ..csi::DeleteVolumeRequest::default()
        };
        self.controller.csi.delete_volume(request).await?;
        Ok(())
    }

    pub(crate) async fn ready(&self, id: &str) -> Result<NbdVolume> {
        let api: Api<NbdVolume> = self.api();
        until("the volume is ready", SOON, async || {
            let volume = api.get(id).await?;
            let phase = volume.status.as_ref().and_then(|status| status.phase);
            Ok((phase == Some(Phase::Ready)).then_some(volume))
        })
        .await
        .with_context(|| self.controller.told())
    }
}

pub(crate) async fn make_pool(server: &ApiServer, name: &str, reachable: &str) -> Result<()> {
    let pools: Api<NbdPool> = Api::all(server.client.clone());
    let pool = serde_json::from_value(json!({
        "apiVersion": "hawser.dev/v1alpha1", "kind": "NbdPool", "metadata": { "name": name },
        "spec": { "backend": { "directory": { "path": "/var/lib/hawser" } }, "reachable": reachable },
    }))?;
    pools.create(&PostParams::default(), &pool).await?;
    Ok(())
}

pub(crate) fn capability() -> csi::VolumeCapability {
    use volume_capability::access_mode::Mode;
    csi::VolumeCapability {
        access_mode: Some(volume_capability::AccessMode {
            mode: Mode::SingleNodeSingleWriter.into(),
        }),
        access_type: Some(AccessType::Block(BlockVolume {})),
    }
}
