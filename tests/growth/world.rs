//! A controller, an agent for each of some nodes, and CSI's calls as the sidecars make them.

use std::fs;
use std::ops::Sub;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use futures::{StreamExt, TryStreamExt};
use hawser::kube::api::{NbdPool, NbdVolume, definitions};
use hawser::proto::csi::controller_client::ControllerClient;
use hawser::proto::csi::volume_capability::{AccessMode, AccessType, BlockVolume, access_mode};
use hawser::proto::csi::{self, VolumeCapability};
use hawser::proto::socket;
use k8s_openapi::api::core::v1::{Namespace, Node};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{ListParams, PostParams};
use kube::{Api, Client};
use serde_json::json;
use tonic::Code;
use tonic::transport::Channel;

use crate::api_server::{ApiServer, Process, write_kubeconfig};
use crate::pods::Kubelet;

const NAMESPACE: &str = "growth";
const POOL: &str = "growth";
const NODES: [&str; 3] = ["node-1", "node-2", "node-3"];

/// csi-provisioner's default is 100 at a time; more than a machine of two cores can do something with.
const AT_ONCE: usize = 16;

const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) struct World {
    client: Client,
    csi: ControllerClient<Channel>,
    controller: Process,
    agents: Vec<Process>,
    kubelet: Kubelet,
    log: PathBuf,
}

/// What was asked of the API server.
#[derive(Clone, Copy)]
pub(crate) struct Asked {
    pub(crate) requests: f64,
    /// What it told those who watch.
    pub(crate) events: f64,
}

impl Asked {
    pub(crate) fn per(self, number: f64) -> Self {
        Self {
            requests: self.requests / number,
            events: self.events / number,
        }
    }
}

impl Sub for Asked {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            requests: self.requests - before.requests,
            events: self.events - before.events,
        }
    }
}

/// How long the calls of one volume's life took.
#[derive(Clone, Copy)]
pub(crate) struct Life {
    pub(crate) create: Duration,
    pub(crate) publish: Duration,
    pub(crate) unpublish: Duration,
    pub(crate) delete: Duration,
}

impl World {
    pub(crate) async fn start(api: &ApiServer, folder: &Path, hawser: &Path) -> Result<Self> {
        let client = api.client.clone();
        let kubeconfig = write_kubeconfig(folder, &api.url, "admin")?;
        prepare(&client).await?;
        let kubelet = Kubelet::start(&client, NAMESPACE);
        let mut agents = Vec::new();
        for node in NODES {
            let root = folder.join(node);
            fs::create_dir_all(root.join("pool"))?;
            agents.push(Process::start(
                &folder.join(format!("{node}.log")),
                Command::new(hawser)
                    .args(["agent", "--node", node, "--namespace", NAMESPACE])
                    .arg("--host-root")
                    .arg(root)
                    .env("KUBECONFIG", &kubeconfig),
            )?);
        }
        let endpoint = folder.join("csi.sock");
        let log = folder.join("controller.log");
        let controller = Process::start(
            &log,
            Command::new(hawser)
                .args(["controller", "--image=hawser:test", "--name=growth"])
                .args(["--namespace", NAMESPACE])
                .arg(format!("--endpoint=unix://{}", endpoint.display()))
                .env("KUBECONFIG", &kubeconfig),
        )?;
        let channel = until("the controller answers", async || {
            Ok(socket::connect(&endpoint).await.ok())
        })
        .await?;
        let world = Self {
            client,
            csi: ControllerClient::new(channel),
            controller,
            agents,
            kubelet,
            log,
        };
        let pools: Api<NbdPool> = Api::all(world.client.clone());
        until("all agents have reported", async || {
            let status = pools.get(POOL).await?.status.unwrap_or_default();
            let healthy = status.nodes.iter().filter(|node| node.healthy).count();
            Ok((healthy == NODES.len()).then_some(()))
        })
        .await?;
        Ok(world)
    }

    /// Makes the volumes from that number to that one, several at a time, and waits until all are ready.
    pub(crate) async fn fill(&self, from: usize, to: usize) -> Result<()> {
        futures::stream::iter(from..to)
            .map(|number| self.create(format!("volume-{number}")))
            .buffer_unordered(AT_ONCE)
            .try_for_each(|_| async { Ok(()) })
            .await
            .with_context(|| fs::read_to_string(&self.log).unwrap_or_default())?;
        let volumes: Api<NbdVolume> = Api::namespaced(self.client.clone(), NAMESPACE);
        until("all volumes are ready", async || {
            let listed = volumes.list(&ListParams::default()).await?;
            let is_ready = |volume: &NbdVolume| {
                let status = volume.status.as_ref();
                status.is_some_and(|status| status.endpoint.is_some())
            };
            Ok(listed.items.iter().all(is_ready).then_some(()))
        })
        .await
    }

    async fn create(&self, name: String) -> Result<String> {
        let request = csi::CreateVolumeRequest {
            name,
            capacity_range: Some(csi::CapacityRange {
                required_bytes: 1 << 30,
                limit_bytes: 0,
            }),
            volume_capabilities: vec![capability()],
            ..csi::CreateVolumeRequest::default()
        };
        let made = self
            .call(async |csi| csi.create_volume(request.clone()).await)
            .await?;
        Ok(made.volume.context("no volume came back")?.volume_id)
    }

    /// A volume from its first call to its last.
    pub(crate) async fn live(&self, name: &str) -> Result<Life> {
        let began = Instant::now();
        let volume_id = self.create(name.to_owned()).await?;
        let create = began.elapsed();
        let began = Instant::now();
        let request = csi::ControllerPublishVolumeRequest {
            volume_id: volume_id.clone(),
            node_id: NODES[0].to_owned(),
            volume_capability: Some(capability()),
            ..csi::ControllerPublishVolumeRequest::default()
        };
        self.call(async |csi| csi.controller_publish_volume(request.clone()).await)
            .await?;
        let publish = began.elapsed();
        let began = Instant::now();
        let request = csi::ControllerUnpublishVolumeRequest {
            volume_id: volume_id.clone(),
            node_id: NODES[0].to_owned(),
            ..csi::ControllerUnpublishVolumeRequest::default()
        };
        self.call(async |csi| csi.controller_unpublish_volume(request.clone()).await)
            .await?;
        let unpublish = began.elapsed();
        let began = Instant::now();
        let request = csi::DeleteVolumeRequest {
            volume_id,
            ..csi::DeleteVolumeRequest::default()
        };
        self.call(async |csi| csi.delete_volume(request.clone()).await)
            .await?;
        Ok(Life {
            create,
            publish,
            unpublish,
            delete: began.elapsed(),
        })
    }

    /// Calls as the sidecars do: again, where it is said to be worth it.
    async fn call<T>(
        &self,
        mut call: impl AsyncFnMut(
            &mut ControllerClient<Channel>,
        ) -> Result<tonic::Response<T>, tonic::Status>,
    ) -> Result<T> {
        let mut csi = self.csi.clone();
        let deadline = Instant::now() + PATIENCE;
        loop {
            match call(&mut csi).await {
                Ok(answer) => return Ok(answer.into_inner()),
                Err(status)
                    if matches!(status.code(), Code::Unavailable | Code::Aborted)
                        && Instant::now() < deadline =>
                {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                Err(status) => bail!("{status}"),
            }
        }
    }

    /// What was asked so far, but for what this program asked itself.
    pub(crate) async fn asked(&self) -> Result<Asked> {
        let request = axum::http::Request::get("/metrics").body(Vec::new())?;
        let text = self.client.request_text(request).await?;
        let sum = |name: &str, matters: fn(&str) -> bool| {
            let lines = text.lines().filter(|line| line.starts_with(name));
            let values = lines
                .filter(|line| matters(line))
                .filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok());
            values.sum::<f64>()
        };
        let ours = self.kubelet.asked.load(Ordering::Relaxed) as f64;
        // The API server's own, of which there are always the same, are not for objects of these kinds.
        let requests = sum("apiserver_request_total{", |line| {
            KINDS.iter().any(|kind| line.contains(kind))
        });
        Ok(Asked {
            requests: requests - ours,
            events: sum("apiserver_watch_events_total{", |line| {
                !line.contains("kind=\"Event\"")
            }),
        })
    }

    /// Bytes that are resident now.
    pub(crate) fn controller_memory(&self) -> Result<f64> {
        resident(self.controller.id())
    }

    /// That of the agent that has most.
    pub(crate) fn agent_memory(&self) -> Result<f64> {
        let mut all = self.agents.iter().map(|agent| resident(agent.id()));
        all.try_fold(0.0, |most, one| Ok(f64::max(most, one?)))
    }
}

const KINDS: [&str; 7] = [
    "resource=\"nbdvolumes\"",
    "resource=\"nbdpools\"",
    "resource=\"secrets\"",
    "resource=\"pods\"",
    "resource=\"statefulsets\"",
    "resource=\"nodes\"",
    "resource=\"events\"",
];

fn resident(process: u32) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next());
    Ok(kib.context("a process's memory")?.parse::<f64>()? * 1024.0)
}

fn capability() -> VolumeCapability {
    VolumeCapability {
        access_mode: Some(AccessMode {
            mode: access_mode::Mode::SingleNodeSingleWriter.into(),
        }),
        access_type: Some(AccessType::Block(BlockVolume {})),
    }
}

/// The CRDs, the nodes, a namespace and a pool.
async fn prepare(client: &Client) -> Result<()> {
    let once = PostParams::default();
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    for definition in definitions() {
        api.create(&once, &definition).await?;
    }
    let nodes: Api<Node> = Api::all(client.clone());
    for node in NODES {
        let node = json!({ "metadata": { "name": node } });
        nodes.create(&once, &serde_json::from_value(node)?).await?;
    }
    let namespace = json!({ "metadata": { "name": NAMESPACE } });
    Api::<Namespace>::all(client.clone())
        .create(&once, &serde_json::from_value(namespace)?)
        .await?;
    let pool: NbdPool = serde_json::from_value(json!({
        "apiVersion": "hawser.dev/v1alpha1", "kind": "NbdPool", "metadata": { "name": POOL },
        "spec": { "backend": { "directory": { "path": "/pool" } }, "overcommitRatio": "1000" },
    }))?;
    let pools: Api<NbdPool> = Api::all(client.clone());
    until("the CRDs are served", async || {
        Ok(pools.create(&once, &pool).await.ok().map(drop))
    })
    .await
}

/// Asks until there is an answer.
async fn until<T>(what: &str, mut ask: impl AsyncFnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask().await? {
            return Ok(answer);
        }
        if Instant::now() > deadline {
            bail!("waited {PATIENCE:?} in vain until {what}");
        }
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
}
