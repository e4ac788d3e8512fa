//! A machine with `hawser standalone` on it, used as a kubelet and its sidecars use it.

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hawser::proto::control::StatisticsRequest;
use hawser::proto::control::control_client::ControlClient;
use hawser::proto::csi::controller_client::ControllerClient;
use hawser::proto::csi::node_client::NodeClient;
use hawser::proto::csi::volume_capability::access_mode::Mode;
use hawser::proto::csi::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use hawser::proto::csi::{self, CapacityRange, VolumeCapability};
use hawser::proto::socket;
use rustix::process::{Pid, Signal};
use tonic::transport::Channel;

/// What everything waits for at most: far above what any of it takes in a slow machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

const NODE: &str = "node";

/// What a volume is used as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Usage {
    FileSystem(&'static str),
    Block,
}

/// State, Secrets and pool. Each scenario is a process of its own, and has one.
pub(crate) struct Machine(PathBuf);

/// A running `hawser standalone`; killed when dropped.
pub(crate) struct Plugin {
    child: Child,
    channel: Channel,
}

/// A volume that is published on this node.
pub(crate) struct Volume {
    volume: csi::Volume,
    usage: Usage,
    context: HashMap<String, String>,
    staging: PathBuf,
    /// Where its content is: a mounted folder, or a device.
    pub(crate) target: PathBuf,
}

impl Machine {
    pub(crate) fn new() -> Result<Self> {
        let folder = PathBuf::from(format!("/run/machine.{}", std::process::id()));
        for name in ["state", "secrets", "pool", "staging", "target"] {
            fs::create_dir_all(folder.join(name))?;
        }
        Ok(Self(folder))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Starts the plugin, as often as it was killed.
    pub(crate) async fn start(&self) -> Result<Plugin> {
        let socket = self.path("csi.sock");
        let child = Command::new(env!("CARGO_BIN_EXE_hawser"))
            .args(["standalone", "--overcommit", "1000", "--node-id", NODE])
            .arg("--state")
            .arg(self.path("state"))
            .arg("--secrets")
            .arg(self.path("secrets"))
            .arg("--pool")
            .arg(self.path("pool"))
            .arg("--endpoint")
            .arg(format!("unix://{}", socket.display()))
            .stdin(Stdio::null())
            .spawn()?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Ok(channel) = socket::connect(&socket).await
                && NodeClient::new(channel.clone())
                    .node_get_info(csi::NodeGetInfoRequest {})
                    .await
                    .is_ok()
            {
                return Ok(Plugin { child, channel });
            }
            ensure!(
                Instant::now() < deadline,
                "hawser standalone does not answer"
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Kills the server of a volume, as a crash would.
    pub(crate) async fn kill_server(&self, volume: &Volume) -> Result<()> {
        let process = self.server(volume).await?;
        let process = Pid::from_raw(process.try_into()?).context("no process")?;
        rustix::process::kill_process(process, Signal::KILL).context("killing a server")
    }

    /// The process that serves a volume, once one answers.
    pub(crate) async fn server(&self, volume: &Volume) -> Result<u32> {
        let control = self
            .path("state/servers")
            .join(&volume.volume.volume_id)
            .join("control");
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Ok(channel) = socket::connect(&control).await
                && let Ok(answer) = ControlClient::new(channel)
                    .statistics(StatisticsRequest {})
                    .await
            {
                return Ok(answer.into_inner().process_id);
            }
            ensure!(
                Instant::now() < deadline,
                "no server of {}",
                volume.volume.volume_id
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Provisions a volume and makes it ready for use, with that many connections.
    pub(crate) async fn provide(
        &self,
        plugin: &Plugin,
        usage: Usage,
        connections: u8,
        bytes: i64,
    ) -> Result<Volume> {
        let parameters = [
            ("connections", connections.to_string()),
            // Short enough for a scenario to wait for.
            ("ioTimeout", "3".to_owned()),
            ("reconnectTimeout", "120".to_owned()),
        ];
        let created = plugin
            .controller()
            .create_volume(csi::CreateVolumeRequest {
                name: "data".to_owned(),
                capacity_range: Some(at_least(bytes)),
                volume_capabilities: vec![capability(usage)],
                parameters: parameters
                    .map(|(key, value)| (key.to_owned(), value))
                    .into(),
                ..Default::default()
            })
            .await?;
        let volume = created.into_inner().volume.context("no volume came back")?;
        let mut volume = Volume {
            volume,
            usage,
            context: HashMap::new(),
            staging: self.path("staging"),
            target: self.path("target/volume"),
        };
        volume.publish(plugin).await?;
        Ok(volume)
    }

    /// Takes a volume out of use and deletes it, after which nothing of it may be left.
    pub(crate) async fn remove(&self, plugin: &Plugin, volume: Volume) -> Result<()> {
        volume.unpublish(plugin).await?;
        let volume_id = volume.volume.volume_id;
        plugin
            .controller()
            .delete_volume(csi::DeleteVolumeRequest {
                volume_id: volume_id.clone(),
                ..Default::default()
            })
            .await?;
        for folder in ["pool/volumes", "state/servers", "secrets"] {
            for entry in fs::read_dir(self.path(folder))? {
                let name = entry?.file_name().to_string_lossy().into_owned();
                ensure!(!name.contains(&volume_id), "{folder}/{name} is left");
            }
        }
        for entry in fs::read_dir("/sys/block")? {
            let device = entry?.path();
            let backend = fs::read_to_string(device.join("backend")).unwrap_or_default();
            ensure!(
                backend.is_empty(),
                "{} is still {backend}",
                device.display()
            );
        }
        Ok(())
    }
}

impl Plugin {
    /// As the kernel's out-of-memory killer would.
    pub(crate) fn kill(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    fn controller(&self) -> ControllerClient<Channel> {
        ControllerClient::new(self.channel.clone())
    }

    fn node(&self) -> NodeClient<Channel> {
        NodeClient::new(self.channel.clone())
    }
}

impl Drop for Plugin {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Volume {
    /// ControllerPublish, NodeStage and NodePublish.
    pub(crate) async fn publish(&mut self, plugin: &Plugin) -> Result<()> {
        let capability = Some(capability(self.usage));
        let published = plugin
            .controller()
            .controller_publish_volume(csi::ControllerPublishVolumeRequest {
                volume_id: self.volume.volume_id.clone(),
                node_id: NODE.to_owned(),
                volume_capability: capability.clone(),
                volume_context: self.volume.volume_context.clone(),
                ..Default::default()
            })
            .await?;
        self.context = published.into_inner().publish_context;
        plugin
            .node()
            .node_stage_volume(csi::NodeStageVolumeRequest {
                volume_id: self.volume.volume_id.clone(),
                publish_context: self.context.clone(),
                staging_target_path: text(&self.staging),
                volume_capability: capability.clone(),
                volume_context: self.volume.volume_context.clone(),
                ..Default::default()
            })
            .await?;
        plugin
            .node()
            .node_publish_volume(csi::NodePublishVolumeRequest {
                volume_id: self.volume.volume_id.clone(),
                publish_context: self.context.clone(),
                staging_target_path: text(&self.staging),
                target_path: text(&self.target),
                volume_capability: capability,
                volume_context: self.volume.volume_context.clone(),
                ..Default::default()
            })
            .await?;
        Ok(())
    }

    /// NodeUnpublish, NodeUnstage and ControllerUnpublish.
    pub(crate) async fn unpublish(&self, plugin: &Plugin) -> Result<()> {
        let volume_id = &self.volume.volume_id;
        plugin
            .node()
            .node_unpublish_volume(csi::NodeUnpublishVolumeRequest {
                volume_id: volume_id.clone(),
                target_path: text(&self.target),
            })
            .await?;
        plugin
            .node()
            .node_unstage_volume(csi::NodeUnstageVolumeRequest {
                volume_id: volume_id.clone(),
                staging_target_path: text(&self.staging),
            })
            .await?;
        plugin
            .controller()
            .controller_unpublish_volume(csi::ControllerUnpublishVolumeRequest {
                volume_id: volume_id.clone(),
                node_id: NODE.to_owned(),
                ..Default::default()
            })
            .await?;
        Ok(())
    }

    /// ControllerExpand and NodeExpand, with the volume in use.
    pub(crate) async fn expand(&self, plugin: &Plugin, bytes: i64) -> Result<()> {
        plugin
            .controller()
            .controller_expand_volume(csi::ControllerExpandVolumeRequest {
                volume_id: self.volume.volume_id.clone(),
                capacity_range: Some(at_least(bytes)),
                volume_capability: Some(capability(self.usage)),
                ..Default::default()
            })
            .await?;
        plugin
            .node()
            .node_expand_volume(csi::NodeExpandVolumeRequest {
                volume_id: self.volume.volume_id.clone(),
                volume_path: text(&self.target),
                staging_target_path: text(&self.staging),
                capacity_range: Some(at_least(bytes)),
                volume_capability: Some(capability(self.usage)),
                ..Default::default()
            })
            .await?;
        Ok(())
    }
}

/// The programs of others that a scenario runs, to their end.
pub(crate) fn succeed(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        output.status.success(),
        "{command:?}: {}\n{printed}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(printed)
}

/// Runs a scenario's steps.
pub(crate) fn block_on(steps: impl Future<Output = Result<()>>) -> Result<()> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?
        .block_on(steps)
}

/// The file that `name` is in this scenario's own folder.
pub(crate) fn scratch(name: &str) -> Result<(PathBuf, File)> {
    let path = PathBuf::from(format!("/run/{name}.{}", std::process::id()));
    let file = File::create(&path)?;
    Ok((path, file))
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

fn at_least(bytes: i64) -> CapacityRange {
    CapacityRange {
        required_bytes: bytes,
        limit_bytes: 0,
    }
}

fn capability(usage: Usage) -> VolumeCapability {
    let access_type = match usage {
        Usage::FileSystem(fs_type) => AccessType::Mount(MountVolume {
            fs_type: fs_type.to_owned(),
            ..Default::default()
        }),
        Usage::Block => AccessType::Block(BlockVolume {}),
    };
    VolumeCapability {
        access_mode: Some(AccessMode {
            mode: Mode::SingleNodeWriter.into(),
        }),
        access_type: Some(access_type),
    }
}
