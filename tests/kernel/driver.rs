//! A running `hawser standalone`, and the calls of an orchestrator.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hawser::proto::csi::controller_client::ControllerClient;
use hawser::proto::csi::node_client::NodeClient;
use hawser::proto::csi::volume_capability::access_mode::Mode;
use hawser::proto::csi::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use hawser::proto::csi::{
    CapacityRange, ControllerExpandVolumeRequest, ControllerPublishVolumeRequest,
    ControllerUnpublishVolumeRequest, CreateVolumeRequest, DeleteVolumeRequest,
    NodeExpandVolumeRequest, NodeGetVolumeStatsRequest, NodePublishVolumeRequest,
    NodeStageVolumeRequest, NodeUnpublishVolumeRequest, NodeUnstageVolumeRequest, VolumeCapability,
    VolumeUsage,
};
use hawser::proto::socket;
use rustix::process::{Pid, Signal};
use tempfile::TempDir;
use tonic::Status;
use tonic::transport::Channel;

pub(crate) const NODE: &str = "node-a";

/// How long the process may take to end.
const ENDING: Duration = Duration::from_secs(60);

/// State, Secrets and pool in a folder of their own, and the process on them.
pub(crate) struct Driver {
    home: TempDir,
    arguments: Vec<String>,
    child: Child,
}

impl Driver {
    pub(crate) fn start(arguments: &[&str]) -> Result<Self> {
        let home = TempDir::with_prefix("hw")?;
        for folder in ["state", "secrets", "pool"] {
            fs::create_dir(home.path().join(folder))?;
        }
        let arguments: Vec<String> = arguments.iter().map(|&text| text.to_owned()).collect();
        let child = spawn(&home, &arguments)?;
        Ok(Self {
            home,
            arguments,
            child,
        })
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    pub(crate) fn endpoint(&self) -> String {
        endpoint(&self.home)
    }

    pub(crate) fn log(&self) -> Result<String> {
        Ok(fs::read_to_string(self.path("log"))?)
    }

    /// The process is killed and started again.
    pub(crate) fn restart(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        self.child = spawn(&self.home, &self.arguments)?;
        Ok(())
    }

    pub(crate) async fn connect(&self) -> Result<Calls<'_>> {
        let channel = socket::connect(&self.path("csi.sock")).await?;
        Ok(Calls {
            driver: self,
            controller: ControllerClient::new(channel.clone()),
            node: NodeClient::new(channel),
            parameters: HashMap::new(),
        })
    }

    /// Ends it in good order: nothing to warn of in its log, no volume, no record, no published directory.
    pub(crate) fn end_well(mut self) -> Result<()> {
        rustix::process::kill_process(Pid::from_child(&self.child), Signal::TERM)?;
        let begun = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            ensure!(begun.elapsed() < ENDING, "hawser standalone does not end");
            std::thread::sleep(Duration::from_millis(20));
        };
        let log = self.log()?;
        ensure!(status.success(), "hawser standalone: {status}\n{log}");
        let problem = log
            .lines()
            .find(|line| line.contains(" ERROR ") || line.contains(" WARN "));
        ensure!(
            problem.is_none(),
            "in the log: {}",
            problem.unwrap_or_default()
        );
        for folder in [
            "pool/volumes",
            "state/node/volumes",
            "state/node/devices",
            "mount",
        ] {
            let Ok(entries) = fs::read_dir(self.path(folder)) else {
                continue;
            };
            let left: Vec<_> = entries
                .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
                // What is known of formats outlives its volume.
                .filter(|name| !name.starts_with('.') && name != "lock" && name != "foreign")
                .collect();
            ensure!(left.is_empty(), "left in {folder}: {left:?}");
        }
        Ok(())
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn endpoint(home: &TempDir) -> String {
    format!("unix://{}", home.path().join("csi.sock").display())
}

fn spawn(home: &TempDir, arguments: &[String]) -> Result<Child> {
    let path = |name: &str| home.path().join(name);
    let log = fs::File::options()
        .create(true)
        .append(true)
        .open(path("log"))?;
    let mut child = Command::new(env!("CARGO_BIN_EXE_hawser"))
        .args(["standalone", "--node-id", NODE, "--stop-servers"])
        .args(arguments)
        .arg("--state")
        .arg(path("state"))
        .arg("--secrets")
        .arg(path("secrets"))
        .arg("--pool")
        .arg(path("pool"))
        .args(["--endpoint", &endpoint(home)])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()?;
    let mut line = String::new();
    BufReader::new(child.stdout.take().context("its output")?).read_line(&mut line)?;
    ensure!(
        line.contains("serving CSI on"),
        "hawser standalone does not serve: {line}{}",
        fs::read_to_string(path("log"))?
    );
    Ok(child)
}

/// How a volume is used.
pub(crate) fn block(mode: Mode) -> VolumeCapability {
    VolumeCapability {
        access_mode: Some(AccessMode { mode: mode.into() }),
        access_type: Some(AccessType::Block(BlockVolume {})),
    }
}

pub(crate) fn mounted(mode: Mode, mount: MountVolume) -> VolumeCapability {
    VolumeCapability {
        access_mode: Some(AccessMode { mode: mode.into() }),
        access_type: Some(AccessType::Mount(mount)),
    }
}

/// A volume that was created, and how it is used.
#[derive(Clone)]
pub(crate) struct Claim {
    pub(crate) id: String,
    pub(crate) capability: VolumeCapability,
    pub(crate) context: HashMap<String, String>,
    published: HashMap<String, String>,
    /// What the PersistentVolume's Secret holds; Hawser's own volumes need none here.
    pub(crate) secrets: HashMap<String, String>,
    pub(crate) readonly: bool,
}

impl Claim {
    /// A volume that nobody creates.
    pub(crate) fn elsewhere(
        handle: &str,
        capability: VolumeCapability,
        context: HashMap<String, String>,
        secrets: HashMap<String, String>,
    ) -> Self {
        Self {
            id: handle.into(),
            capability,
            context,
            published: HashMap::new(),
            secrets,
            readonly: false,
        }
    }
}

/// The calls of an orchestrator that keeps the order of the specification. Each returns what the driver says.
pub(crate) struct Calls<'a> {
    driver: &'a Driver,
    controller: ControllerClient<Channel>,
    node: NodeClient<Channel>,
    /// What the StorageClass asks for.
    pub(crate) parameters: HashMap<String, String>,
}

impl Calls<'_> {
    pub(crate) async fn create(
        &mut self,
        name: &str,
        bytes: i64,
        capability: VolumeCapability,
    ) -> Result<Claim, Status> {
        let request = CreateVolumeRequest {
            name: name.into(),
            capacity_range: Some(CapacityRange {
                required_bytes: bytes,
                limit_bytes: 0,
            }),
            volume_capabilities: vec![capability.clone()],
            parameters: self.parameters.clone(),
            ..CreateVolumeRequest::default()
        };
        let created = self.controller.create_volume(request).await?.into_inner();
        let volume = created.volume.unwrap_or_default();
        Ok(Claim {
            id: volume.volume_id,
            capability,
            context: volume.volume_context,
            published: HashMap::new(),
            secrets: HashMap::new(),
            readonly: false,
        })
    }

    pub(crate) async fn attach(&mut self, claim: &mut Claim) -> Result<(), Status> {
        let request = ControllerPublishVolumeRequest {
            volume_id: claim.id.clone(),
            node_id: NODE.into(),
            volume_capability: Some(claim.capability.clone()),
            readonly: claim.readonly,
            volume_context: claim.context.clone(),
            ..ControllerPublishVolumeRequest::default()
        };
        let answer = self.controller.controller_publish_volume(request).await?;
        claim.published = answer.into_inner().publish_context;
        Ok(())
    }

    pub(crate) async fn stage(&mut self, claim: &Claim) -> Result<(), Status> {
        fs::create_dir_all(self.driver.path("staging"))?;
        let request = NodeStageVolumeRequest {
            volume_id: claim.id.clone(),
            publish_context: claim.published.clone(),
            staging_target_path: self.driver.text("staging"),
            volume_capability: Some(claim.capability.clone()),
            volume_context: claim.context.clone(),
            secrets: claim.secrets.clone(),
        };
        self.node.node_stage_volume(request).await?;
        Ok(())
    }

    /// Returns where it is then.
    pub(crate) async fn publish(
        &mut self,
        claim: &Claim,
        target: &str,
        readonly: bool,
    ) -> Result<PathBuf, Status> {
        fs::create_dir_all(self.driver.path("mount"))?;
        let path = self.driver.path("mount").join(target);
        let request = NodePublishVolumeRequest {
            volume_id: claim.id.clone(),
            publish_context: claim.published.clone(),
            staging_target_path: self.driver.text("staging"),
            target_path: path.display().to_string(),
            volume_capability: Some(claim.capability.clone()),
            readonly,
            volume_context: claim.context.clone(),
            secrets: claim.secrets.clone(),
        };
        self.node.node_publish_volume(request).await?;
        Ok(path)
    }

    pub(crate) async fn unpublish(&mut self, claim: &Claim, target: &str) -> Result<(), Status> {
        let request = NodeUnpublishVolumeRequest {
            volume_id: claim.id.clone(),
            target_path: self.driver.path("mount").join(target).display().to_string(),
        };
        self.node.node_unpublish_volume(request).await?;
        Ok(())
    }

    pub(crate) async fn unstage(&mut self, claim: &Claim) -> Result<(), Status> {
        let request = NodeUnstageVolumeRequest {
            volume_id: claim.id.clone(),
            staging_target_path: self.driver.text("staging"),
        };
        self.node.node_unstage_volume(request).await?;
        Ok(())
    }

    pub(crate) async fn detach(&mut self, claim: &Claim) -> Result<(), Status> {
        let request = ControllerUnpublishVolumeRequest {
            volume_id: claim.id.clone(),
            node_id: NODE.into(),
            ..ControllerUnpublishVolumeRequest::default()
        };
        self.controller.controller_unpublish_volume(request).await?;
        Ok(())
    }

    pub(crate) async fn delete(&mut self, claim: &Claim) -> Result<(), Status> {
        let request = DeleteVolumeRequest {
            volume_id: claim.id.clone(),
            ..DeleteVolumeRequest::default()
        };
        self.controller.delete_volume(request).await?;
        Ok(())
    }

    /// Both halves.
    pub(crate) async fn expand(
        &mut self,
        claim: &Claim,
        target: &str,
        bytes: i64,
    ) -> Result<(), Status> {
        let capacity_range = Some(CapacityRange {
            required_bytes: bytes,
            limit_bytes: 0,
        });
        let request = ControllerExpandVolumeRequest {
            volume_id: claim.id.clone(),
            capacity_range,
            ..ControllerExpandVolumeRequest::default()
        };
        self.controller.controller_expand_volume(request).await?;
        self.expand_here(claim, target, bytes).await
    }

    /// The node's half alone.
    pub(crate) async fn expand_here(
        &mut self,
        claim: &Claim,
        target: &str,
        bytes: i64,
    ) -> Result<(), Status> {
        let capacity_range = (bytes > 0).then_some(CapacityRange {
            required_bytes: bytes,
            limit_bytes: 0,
        });
        let request = NodeExpandVolumeRequest {
            volume_id: claim.id.clone(),
            volume_path: self.driver.path("mount").join(target).display().to_string(),
            capacity_range,
            ..NodeExpandVolumeRequest::default()
        };
        self.node.node_expand_volume(request).await?;
        Ok(())
    }

    pub(crate) async fn usage(
        &mut self,
        claim: &Claim,
        target: &str,
    ) -> Result<Vec<VolumeUsage>, Status> {
        let request = NodeGetVolumeStatsRequest {
            volume_id: claim.id.clone(),
            volume_path: self.driver.path("mount").join(target).display().to_string(),
            ..NodeGetVolumeStatsRequest::default()
        };
        Ok(self
            .node
            .node_get_volume_stats(request)
            .await?
            .into_inner()
            .usage)
    }
}
