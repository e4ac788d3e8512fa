//! One namespace with everything a volume needs, and CSI's calls as the sidecars make them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use hawser::kube::api::{NbdPool, NbdVolume, Phase};
use hawser::proto::csi::controller_client::ControllerClient;
use hawser::proto::csi::volume_capability::{AccessType, BlockVolume};
use hawser::proto::csi::{self, volume_capability};
use hawser::proto::socket;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use kube::api::{ObjectMeta, Patch, PatchParams, PostParams};
use serde_json::json;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::parts::{Agent, Kubelet};
use crate::server::{ApiServer, Process, Who};
use crate::until;

/// How long a thing may take that takes a second where nothing else goes on.
pub(crate) const SOON: Duration = Duration::from_secs(60);
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
    pub(crate) socket: PathBuf,
    pub(crate) log: PathBuf,
}

impl Controller {
    /// Starts the replica of that name, with the rights of the chart.
    pub(crate) async fn start(
        server: &ApiServer,
        folder: &Path,
        namespace: &str,
        name: &str,
    ) -> Result<Self> {
        let path = folder.join(format!("{name}.sock"));
        let log = folder.join(format!("{name}.log"));
        let who = Who::Controller {
            namespace,
            replica: name,
        };
        let process = Process::start(
            &log,
            Command::new(env!("CARGO_BIN_EXE_hawser"))
                .args([
                    "controller",
                    "--image=hawser:test",
                    "--lease=hawser-controller",
                    "--authority-overlap=1",
                ])
                .arg(format!("--endpoint=unix://{}", path.display()))
                .arg(format!("--namespace={namespace}"))
                .arg(format!("--name={name}"))
                .env("KUBECONFIG", server.kubeconfig(who)?),
        )?;
        let channel = until("the controller answers", SOON, async || {
            Ok(socket::connect(&path).await.ok())
        })
        .await
        .with_context(|| tail(&log))?;
        Ok(Self {
            process,
            csi: ControllerClient::new(channel),
            socket: path,
            log,
        })
    }

    pub(crate) fn told(&self) -> String {
        tail(&self.log)
    }
}

/// The end of a log.
pub(crate) fn tail(log: &Path) -> String {
    const LINES: usize = 60;
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}

/// A namespace with a pool on node-1, an agent, a kubelet and a controller.
pub(crate) struct World<'a> {
    pub(crate) server: &'a ApiServer,
    pub(crate) namespace: String,
    pub(crate) folder: tempfile::TempDir,
    pub(crate) agent: Agent,
    _kubelet: Kubelet,
    pub(crate) controller: Controller,
}

impl<'a> World<'a> {
    pub(crate) async fn new(server: &'a ApiServer, namespace: &str) -> Result<Self> {
        server.chart.grant(&server.client, namespace).await?;
        make_pool(server, namespace, "Everywhere").await?;
        let folder = tempfile::tempdir()?;
        let controller = Controller::start(server, folder.path(), namespace, "a").await?;
        let agent = Agent::start(server.client.clone(), namespace);
        agent.keeps(namespace, "node-1", 100 * GIB);
        until("the pool has room", SOON, async || {
            let pools: Api<NbdPool> = Api::all(server.client.clone());
            let status = pools.get(namespace).await?.status;
            Ok(status.filter(|status| !status.nodes.is_empty()).map(|_| ()))
        })
        .await?;
        Ok(Self {
            server,
            namespace: namespace.to_owned(),
            folder,
            agent,
            _kubelet: Kubelet::start(server.client.clone(), namespace),
            controller,
        })
    }

    pub(crate) fn api<K>(&self) -> Api<K>
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.server.client.clone(), &self.namespace)
    }

    /// Somebody's own Secret for one side of a volume.
    pub(crate) async fn put_secret(
        &self,
        name: &str,
        parts: &BTreeMap<String, Vec<u8>>,
    ) -> Result<()> {
        let data = parts.iter();
        let data = data.map(|(key, value)| (key.clone(), ByteString(value.clone())));
        let secret = Secret {
            metadata: ObjectMeta {
                name: Some(name.to_owned()),
                ..ObjectMeta::default()
            },
            type_: Some("kubernetes.io/tls".to_owned()),
            data: Some(data.collect()),
            ..Secret::default()
        };
        let api: Api<Secret> = self.api();
        let patch = Patch::Apply(json!({
            "apiVersion": "v1", "kind": "Secret", "metadata": secret.metadata,
            "type": secret.type_, "data": secret.data,
        }));
        api.patch(name, &PatchParams::apply("somebody").force(), &patch)
            .await?;
        Ok(())
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

    /// Deletes as csi-provisioner does: again and again.
    pub(crate) async fn delete_at_last(&mut self, id: &str) -> Result<()> {
        let request = csi::DeleteVolumeRequest {
            volume_id: id.to_owned(),
            ..csi::DeleteVolumeRequest::default()
        };
        let client = self.controller.csi.clone();
        let deleted = until("the volume is deleted", SOON, async || {
            match client.clone().delete_volume(request.clone()).await {
                Ok(_) => Ok(Some(())),
                Err(status) if matches!(status.code(), Code::Unavailable | Code::Aborted) => {
                    Ok(None)
                }
                Err(status) => bail!("{status}"),
            }
        });
        deleted.await.with_context(|| self.controller.told())
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
