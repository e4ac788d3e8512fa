//! `hawser standalone` as a child process, and the calls that a kubelet and its sidecars would make.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context;
use tokio::process::{Child, Command};
use tonic::transport::Channel;

use crate::proto::control::StatisticsRequest;
use crate::proto::control::control_client::ControlClient;
use crate::proto::csi::controller_client::ControllerClient;
use crate::proto::csi::identity_client::IdentityClient;
use crate::proto::csi::node_client::NodeClient;
use crate::proto::csi::volume_capability::access_mode::Mode;
use crate::proto::csi::volume_capability::{AccessMode, AccessType, MountVolume};
use crate::proto::csi::{
    CapacityRange, ControllerExpandVolumeRequest, ControllerPublishVolumeRequest,
    ControllerUnpublishVolumeRequest, CreateVolumeRequest, DeleteVolumeRequest,
    NodeExpandVolumeRequest, NodePublishVolumeRequest, NodeStageVolumeRequest,
    NodeUnpublishVolumeRequest, NodeUnstageVolumeRequest, ProbeRequest, Volume, VolumeCapability,
};
use crate::proto::socket;

/// The node's name in the demo.
const NODE: &str = "demo";

/// How long the services may take to answer after their start.
const START: Duration = Duration::from_secs(30);

/// Everything the demo keeps on disk.
#[derive(Debug, Clone)]
pub(super) struct Folders {
    root: PathBuf,
}

impl Folders {
    pub(super) fn new(root: PathBuf) -> anyhow::Result<Self> {
        for name in ["state", "secrets", "pool", "staging", "target"] {
            std::fs::create_dir_all(root.join(name))
                .with_context(|| format!("create {}", root.join(name).display()))?;
        }
        Ok(Self { root })
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }
}

/// The CSI services.
#[derive(Debug)]
pub(super) struct Plugin {
    folders: Folders,
    child: Child,
    channel: Channel,
}

impl Plugin {
    /// Starts the services and waits until they answer.
    pub(super) async fn start(folders: &Folders) -> anyhow::Result<Self> {
        let socket = folders.path("csi.sock");
        let log = std::fs::OpenOptions::new()
            .append(true)
            .create(true)
            .open(folders.path("standalone.log"))?;
        let child = Command::new(std::env::current_exe()?)
            .arg("standalone")
            .arg("--state")
            .arg(folders.path("state"))
            .arg("--secrets")
            .arg(folders.path("secrets"))
            .arg("--pool")
            .arg(folders.path("pool"))
            .arg("--endpoint")
            .arg(format!("unix://{}", socket.display()))
            .args(["--node-id", NODE])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .context("start hawser standalone")?;
        let channel = tokio::time::timeout(START, answering(&socket))
            .await
            .context("hawser standalone does not answer")?;
        Ok(Self {
            folders: folders.clone(),
            child,
            channel,
        })
    }

    /// kill -9, as the kernel's out-of-memory killer would.
    pub(super) async fn kill(&mut self) -> anyhow::Result<()> {
        self.child.kill().await.context("kill hawser standalone")
    }

    /// Ends it as an init system would.
    pub(super) async fn stop(mut self) -> anyhow::Result<()> {
        let id = self.child.id().context("hawser standalone has ended")?;
        terminate(id)?;
        let status = self.child.wait().await?;
        anyhow::ensure!(status.success(), "hawser standalone ended with {status}");
        Ok(())
    }

    fn controller(&self) -> ControllerClient<Channel> {
        ControllerClient::new(self.channel.clone())
    }

    fn node(&self) -> NodeClient<Channel> {
        NodeClient::new(self.channel.clone())
    }

    pub(super) async fn create(&self, name: &str, bytes: i64) -> anyhow::Result<Volume> {
        let response = self
            .controller()
            .create_volume(CreateVolumeRequest {
                name: name.to_owned(),
                capacity_range: Some(at_least(bytes)),
                volume_capabilities: vec![capability()],
                ..Default::default()
            })
            .await?;
        response.into_inner().volume.context("no volume came back")
    }

    pub(super) async fn controller_publish(
        &self,
        volume: &Volume,
    ) -> anyhow::Result<HashMap<String, String>> {
        let response = self
            .controller()
            .controller_publish_volume(ControllerPublishVolumeRequest {
                volume_id: volume.volume_id.clone(),
                node_id: NODE.to_owned(),
                volume_capability: Some(capability()),
                volume_context: volume.volume_context.clone(),
                ..Default::default()
            })
            .await?;
        Ok(response.into_inner().publish_context)
    }

    pub(super) async fn controller_unpublish(&self, volume: &Volume) -> anyhow::Result<()> {
        self.controller()
            .controller_unpublish_volume(ControllerUnpublishVolumeRequest {
                volume_id: volume.volume_id.clone(),
                node_id: NODE.to_owned(),
                ..Default::default()
            })
            .await?;
        Ok(())
    }

    pub(super) async fn stage(
        &self,
        volume: &Volume,
        context: &HashMap<String, String>,
    ) -> anyhow::Result<()> {
        self.node()
            .node_stage_volume(NodeStageVolumeRequest {
                volume_id: volume.volume_id.clone(),
                publish_context: context.clone(),
                staging_target_path: self.text("staging"),
                volume_capability: Some(capability()),
                volume_context: volume.volume_context.clone(),
                ..Default::default()
            })
            .await?;
        Ok(())
    }

    pub(super) async fn publish(
        &self,
        volume: &Volume,
        context: &HashMap<String, String>,
    ) -> anyhow::Result<PathBuf> {
        let target = self.folders.path("target/volume");
        self.node()
            .node_publish_volume(NodePublishVolumeRequest {
                volume_id: volume.volume_id.clone(),
                publish_context: context.clone(),
                staging_target_path: self.text("staging"),
                target_path: target.display().to_string(),
                volume_capability: Some(capability()),
                volume_context: volume.volume_context.clone(),
                ..Default::default()
            })
            .await?;
        Ok(target)
    }

    pub(super) async fn unpublish_and_unstage(&self, volume: &Volume) -> anyhow::Result<()> {
        self.node()
            .node_unpublish_volume(NodeUnpublishVolumeRequest {
                volume_id: volume.volume_id.clone(),
                target_path: self.text("target/volume"),
            })
            .await?;
        self.node()
            .node_unstage_volume(NodeUnstageVolumeRequest {
                volume_id: volume.volume_id.clone(),
                staging_target_path: self.text("staging"),
            })
            .await?;
        Ok(())
    }

    /// Grows the backing store, then the file system, with the volume in use.
    pub(super) async fn expand(&self, volume: &Volume, bytes: i64) -> anyhow::Result<()> {
        let response = self
            .controller()
            .controller_expand_volume(ControllerExpandVolumeRequest {
                volume_id: volume.volume_id.clone(),
                capacity_range: Some(at_least(bytes)),
                volume_capability: Some(capability()),
                ..Default::default()
            })
            .await?;
        anyhow::ensure!(
            response.into_inner().node_expansion_required,
            "the file system was not to be grown"
        );
        self.node()
            .node_expand_volume(NodeExpandVolumeRequest {
                volume_id: volume.volume_id.clone(),
                volume_path: self.text("target/volume"),
                staging_target_path: self.text("staging"),
                capacity_range: Some(at_least(bytes)),
                volume_capability: Some(capability()),
                ..Default::default()
            })
            .await?;
        Ok(())
    }

    pub(super) async fn delete(&self, volume: &Volume) -> anyhow::Result<()> {
        self.controller()
            .delete_volume(DeleteVolumeRequest {
                volume_id: volume.volume_id.clone(),
                ..Default::default()
            })
            .await?;
        Ok(())
    }

    /// The volume's server: where it listens, and its process.
    pub(super) async fn server(&self, volume: &Volume) -> anyhow::Result<(String, u32)> {
        let control = self
            .folders
            .path("state/servers")
            .join(&volume.volume_id)
            .join("control");
        let statistics = ControlClient::new(socket::connect(&control).await?)
            .statistics(StatisticsRequest {})
            .await?
            .into_inner();
        Ok((statistics.address, statistics.process_id))
    }

    fn text(&self, name: &str) -> String {
        self.folders.path(name).display().to_string()
    }
}

/// Sends SIGTERM.
fn terminate(id: u32) -> anyhow::Result<()> {
    signal(id, rustix::process::Signal::TERM)
}

/// Sends a signal to a process that the demo started.
pub(super) fn signal(id: u32, signal: rustix::process::Signal) -> anyhow::Result<()> {
    let id = rustix::process::Pid::from_raw(id.try_into()?).context("no process")?;
    rustix::process::kill_process(id, signal).context("send a signal")
}

/// Tries until the services answer.
async fn answering(path: &Path) -> Channel {
    loop {
        if let Ok(channel) = socket::connect(path).await
            && IdentityClient::new(channel.clone())
                .probe(ProbeRequest {})
                .await
                .is_ok()
        {
            return channel;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn at_least(bytes: i64) -> CapacityRange {
    CapacityRange {
        required_bytes: bytes,
        limit_bytes: 0,
    }
}

fn capability() -> VolumeCapability {
    VolumeCapability {
        access_mode: Some(AccessMode {
            mode: Mode::SingleNodeWriter.into(),
        }),
        access_type: Some(AccessType::Mount(MountVolume {
            fs_type: "ext4".into(),
            ..Default::default()
        })),
    }
}
