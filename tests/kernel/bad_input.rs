//! Node calls that make no sense, and volumes to which something happens while they are in use: each call ends with
//! the code of the specification, and afterwards everything can be taken away.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use hawser::proto::csi::controller_client::ControllerClient;
use hawser::proto::csi::node_client::NodeClient;
use hawser::proto::csi::volume_capability::MountVolume;
use hawser::proto::csi::volume_capability::access_mode::Mode;
use hawser::proto::csi::{
    CapacityRange, ControllerPublishVolumeRequest, ControllerUnpublishVolumeRequest,
    CreateVolumeRequest, DeleteVolumeRequest, NodeExpandVolumeRequest, NodePublishVolumeRequest,
    NodeStageVolumeRequest, NodeUnpublishVolumeRequest, NodeUnstageVolumeRequest, Volume,
    VolumeCapability,
};
use hawser::proto::socket;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::Scenario;
use crate::driver::{Driver, NODE, mounted};
use crate::node::block_on;

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario::new("bad_input::stage_and_publish", stage_and_publish).within_seconds(120),
    Scenario::new("bad_input::secrets", secrets).within_seconds(120),
    Scenario::new("bad_input::a_damaged_backing_file", a_damaged_backing_file).within_seconds(180),
    Scenario::new("bad_input::a_full_pool", a_full_pool).within_seconds(120),
    Scenario::new(
        "bad_input::detached_under_a_mounted_file_system",
        detached_under_a_mounted_file_system,
    )
    .within_seconds(180),
];

const SIZE: i64 = 64 << 20;

/// `hawser standalone`, and requests to it as a caller wrote them.
struct Plugin {
    driver: Driver,
    channel: Channel,
}

impl Plugin {
    async fn start() -> Result<Self> {
        let driver = Driver::start(&["--overcommit", "100"])?;
        for name in ["staging", "target"] {
            fs::create_dir(driver.path(name))?;
        }
        let channel = socket::connect(&driver.path("csi.sock")).await?;
        Ok(Self { driver, channel })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.driver.path(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    fn controller(&self) -> ControllerClient<Channel> {
        ControllerClient::new(self.channel.clone())
    }

    fn node(&self) -> NodeClient<Channel> {
        NodeClient::new(self.channel.clone())
    }

    /// A volume, published to this node.
    async fn volume(&self, name: &str, parameters: &[(&str, &str)]) -> Result<Published> {
        let volume = self
            .controller()
            .create_volume(CreateVolumeRequest {
                name: name.to_owned(),
                capacity_range: Some(CapacityRange {
                    required_bytes: SIZE,
                    limit_bytes: 0,
                }),
                volume_capabilities: vec![capability("ext4", &[])],
                parameters: parameters
                    .iter()
                    .map(|&(key, value)| (key.to_owned(), value.to_owned()))
                    .collect(),
                ..Default::default()
            })
            .await?
            .into_inner()
            .volume
            .context("no volume")?;
        let context = self
            .controller()
            .controller_publish_volume(ControllerPublishVolumeRequest {
                volume_id: volume.volume_id.clone(),
                node_id: NODE.to_owned(),
                volume_capability: Some(capability("ext4", &[])),
                ..Default::default()
            })
            .await?
            .into_inner()
            .publish_context;
        Ok(Published { volume, context })
    }

    async fn stage(&self, request: NodeStageVolumeRequest) -> Result<(), Status> {
        self.node().node_stage_volume(request).await.map(drop)
    }

    async fn publish(&self, request: NodePublishVolumeRequest) -> Result<(), Status> {
        self.node().node_publish_volume(request).await.map(drop)
    }

    fn to_stage(&self, volume: &Published) -> NodeStageVolumeRequest {
        NodeStageVolumeRequest {
            volume_id: volume.id().to_owned(),
            publish_context: volume.context.clone(),
            staging_target_path: self.text("staging"),
            volume_capability: Some(capability("ext4", &[])),
            volume_context: volume.volume.volume_context.clone(),
            ..Default::default()
        }
    }

    fn to_publish(&self, volume: &Published) -> NodePublishVolumeRequest {
        NodePublishVolumeRequest {
            volume_id: volume.id().to_owned(),
            publish_context: volume.context.clone(),
            staging_target_path: self.text("staging"),
            target_path: self.text("target/volume"),
            volume_capability: Some(capability("ext4", &[])),
            volume_context: volume.volume.volume_context.clone(),
            ..Default::default()
        }
    }

    async fn unpublish(&self, id: &str, target: &str) -> Result<(), Status> {
        let request = NodeUnpublishVolumeRequest {
            volume_id: id.to_owned(),
            target_path: target.to_owned(),
        };
        self.node().node_unpublish_volume(request).await.map(drop)
    }

    async fn unstage(&self, id: &str, path: &str) -> Result<(), Status> {
        let request = NodeUnstageVolumeRequest {
            volume_id: id.to_owned(),
            staging_target_path: path.to_owned(),
        };
        self.node().node_unstage_volume(request).await.map(drop)
    }

    async fn detach(&self, id: &str) -> Result<(), Status> {
        let request = ControllerUnpublishVolumeRequest {
            volume_id: id.to_owned(),
            node_id: NODE.to_owned(),
            ..Default::default()
        };
        let mut controller = self.controller();
        controller
            .controller_unpublish_volume(request)
            .await
            .map(drop)
    }

    /// Takes everything away, and sees that nothing is left of the volume.
    async fn remove(&self, volume: &Published) -> Result<()> {
        let id = volume.id();
        self.unpublish(id, &self.text("target/volume")).await?;
        self.unstage(id, &self.text("staging")).await?;
        ensure!(device_of(id)?.is_none(), "a device is left");
        self.detach(id).await?;
        let request = DeleteVolumeRequest {
            volume_id: id.to_owned(),
            ..Default::default()
        };
        self.controller().delete_volume(request).await?;
        for (directory, own) in [
            ("pool/volumes", ""),
            ("state/servers", ""),
            ("state/node/volumes", ""),
            ("state/node/devices", "lock"),
        ] {
            for entry in fs::read_dir(self.path(directory)).into_iter().flatten() {
                let name = entry?.file_name();
                let text = name.to_string_lossy();
                ensure!(
                    name == own || !text.contains(id),
                    "{directory}/{text} is left"
                );
            }
        }
        Ok(())
    }
}

struct Published {
    volume: Volume,
    context: HashMap<String, String>,
}

impl Published {
    fn id(&self) -> &str {
        &self.volume.volume_id
    }
}

fn capability(kind: &str, flags: &[&str]) -> VolumeCapability {
    let mount = MountVolume {
        fs_type: kind.to_owned(),
        mount_flags: flags.iter().map(|&flag| flag.to_owned()).collect(),
        ..Default::default()
    };
    mounted(Mode::SingleNodeWriter, mount)
}

/// The kernel device of a volume.
fn device_of(id: &str) -> Result<Option<PathBuf>> {
    for entry in fs::read_dir("/sys/block")? {
        let path = entry?.path();
        if fs::read_to_string(path.join("backend")).is_ok_and(|backend| backend.contains(id)) {
            return Ok(path.file_name().map(|name| Path::new("/dev").join(name)));
        }
    }
    Ok(None)
}

/// Whether a call was refused with that code, and says of what and why.
fn refused(what: &str, answer: Result<(), Status>, code: Code, parts: &[&str]) -> Result<()> {
    let status = answer.err().with_context(|| format!("{what}: accepted"))?;
    println!("{what}: {:?}: {}", status.code(), status.message());
    ensure!(status.code() == code, "{what}: not {code:?}");
    for part in parts {
        ensure!(
            status.message().contains(part),
            "{what}: it does not say {part:?}"
        );
    }
    Ok(())
}

fn mount_tmpfs(at: &Path) -> Result<()> {
    let at = at.to_str().context("a path")?;
    run("mount", &["-t", "tmpfs", "tmpfs", at])
}

fn run(program: &str, arguments: &[&str]) -> Result<()> {
    let status = Command::new(program).args(arguments).status()?;
    ensure!(status.success(), "{program} {arguments:?}: {status}");
    Ok(())
}

fn stage_and_publish() -> Result<()> {
    block_on(async {
        let plugin = Plugin::start().await?;
        let volume = plugin.volume("n", &[]).await?;
        let id = volume.id();
        let at = |path: &str| NodeStageVolumeRequest {
            staging_target_path: plugin.text(path),
            ..plugin.to_stage(&volume)
        };
        fs::write(plugin.path("file"), b"mine")?;
        std::os::unix::fs::symlink("staging", plugin.path("link"))?;
        fs::create_dir(plugin.path("taken"))?;
        mount_tmpfs(&plugin.path("taken"))?;
        for (what, path, code) in [
            ("a file", "file", Code::InvalidArgument),
            ("a symbolic link", "link", Code::InvalidArgument),
            ("below a file", "file/x", Code::FailedPrecondition),
            ("missing", "nowhere", Code::FailedPrecondition),
            ("mounted already", "taken", Code::FailedPrecondition),
        ] {
            refused(what, plugin.stage(at(path)).await, code, &[path])?;
            ensure!(device_of(id)?.is_none(), "{what}: a device is left");
        }
        ensure!(fs::read(plugin.path("file"))? == b"mine");
        run("umount", &[&plugin.text("taken")])?;

        let mut unknown = plugin.to_stage(&volume);
        unknown.volume_capability = Some(capability("ntfs", &[]));
        let answer = plugin.stage(unknown).await;
        refused("ntfs", answer, Code::InvalidArgument, &["ntfs", "ext4"])?;
        let mut forged = plugin.to_stage(&volume);
        let forgery = format!("att-{}", "0".repeat(32));
        forged.publish_context.insert("attachment".into(), forgery);
        let answer = plugin.stage(forged).await;
        refused(
            "a forged attachment",
            answer,
            Code::FailedPrecondition,
            &[id],
        )?;
        let mut gone = plugin.to_stage(&volume);
        gone.volume_id = format!("vol-{}", "0".repeat(32));
        let gone = plugin.stage(gone).await;
        refused("an unknown volume", gone, Code::NotFound, &["vol-000"])?;
        let mut flags = plugin.to_stage(&volume);
        flags.volume_capability = Some(capability("ext4", &["nonsense=17"]));
        let flags = plugin.stage(flags).await;
        refused("a mount flag", flags, Code::Internal, &[id, "bad option"])?;
        ensure!(device_of(id)?.is_none(), "a device is left");
        let early = plugin.publish(plugin.to_publish(&volume)).await;
        refused("publish first", early, Code::FailedPrecondition, &[id])?;

        plugin.stage(plugin.to_stage(&volume)).await?;
        plugin.stage(plugin.to_stage(&volume)).await?;
        fs::create_dir(plugin.path("second"))?;
        let second = plugin.stage(at("second")).await;
        let staging = plugin.text("staging");
        refused(
            "staged twice",
            second,
            Code::FailedPrecondition,
            &[id, &staging],
        )?;
        plugin.unstage(id, &plugin.text("second")).await?;
        ensure!(device_of(id)?.is_some(), "unstaging elsewhere detached it");
        let expand = NodeExpandVolumeRequest {
            volume_id: id.to_owned(),
            volume_path: staging.clone(),
            capacity_range: Some(CapacityRange {
                required_bytes: 2 * SIZE,
                limit_bytes: 0,
            }),
            ..Default::default()
        };
        let early = plugin.node().node_expand_volume(expand).await.map(drop);
        refused("the node expands first", early, Code::OutOfRange, &[id])?;

        let to = |path: &str| NodePublishVolumeRequest {
            target_path: plugin.text(path),
            ..plugin.to_publish(&volume)
        };
        fs::create_dir_all(plugin.path("full/of"))?;
        for (what, path) in [
            ("to a file", "file"),
            ("below a file", "file/x"),
            ("to a symbolic link", "link"),
            ("into a missing directory", "no/where"),
            ("to what is not empty", "full"),
        ] {
            let answer = plugin.publish(to(path)).await;
            refused(what, answer, Code::FailedPrecondition, &[path])?;
        }
        ensure!(fs::read(plugin.path("file"))? == b"mine");
        plugin.publish(plugin.to_publish(&volume)).await?;
        let answer = plugin.publish(to("target/other")).await;
        refused("published twice", answer, Code::FailedPrecondition, &[id])?;
        let answer = plugin.unstage(id, &staging).await;
        let target = plugin.text("target/volume");
        refused(
            "unstaged first",
            answer,
            Code::FailedPrecondition,
            &[id, &target],
        )?;
        let open = File::create(plugin.path("target/volume/open"))?;
        let answer = plugin.unpublish(id, &target).await;
        refused("in use", answer, Code::FailedPrecondition, &[&target])?;
        drop(open);
        for path in ["file", "full"] {
            let answer = plugin.unpublish(id, &plugin.text(path)).await;
            refused("not ours", answer, Code::FailedPrecondition, &[path])?;
        }
        plugin.unpublish(id, &plugin.text("nowhere/at/all")).await?;
        // Somebody else unmounts everything and removes the directories.
        run("umount", &[&target])?;
        run("umount", &[&staging])?;
        fs::remove_dir(&target)?;
        fs::remove_dir(&staging)?;
        plugin.remove(&volume).await
    })
}

fn secrets() -> Result<()> {
    block_on(async {
        let plugin = Plugin::start().await?;
        let volume = plugin.volume("n", &[]).await?;
        let other = plugin.volume("other", &[]).await?;
        let id = volume.id();
        let secret = |id: &str| -> Result<HashMap<String, String>> {
            let directory = plugin.path("secrets").join(format!("{id}-client"));
            ["tls.crt", "tls.key", "ca.crt"]
                .into_iter()
                .map(|part| Ok((part.into(), fs::read_to_string(directory.join(part))?)))
                .collect()
        };
        let (ours, theirs) = (secret(id)?, secret(other.id())?);
        let with = |change: &dyn Fn(&mut HashMap<String, String>)| {
            let mut request = plugin.to_stage(&volume);
            request.secrets = ours.clone();
            change(&mut request.secrets);
            request
        };
        let key = &ours["tls.key"];
        let cases: [(&str, NodeStageVolumeRequest, &str); 7] = [
            (
                "of another volume",
                with(&|parts| *parts = theirs.clone()),
                other.id(),
            ),
            (
                "with another volume's key",
                with(&|parts| drop(parts.insert("tls.key".into(), theirs["tls.key"].clone()))),
                "private key",
            ),
            (
                "without key",
                with(&|parts| drop(parts.remove("tls.key"))),
                "key",
            ),
            (
                "without authority",
                with(&|parts| drop(parts.remove("ca.crt"))),
                "ca.crt",
            ),
            (
                "with half a key",
                with(&|parts| drop(parts.insert("tls.key".into(), key[..key.len() / 2].into()))),
                "key",
            ),
            (
                "with a key for a certificate",
                with(&|parts| drop(parts.insert("tls.crt".into(), key.clone()))),
                "certificate",
            ),
            (
                "with an empty key",
                with(&|parts| drop(parts.insert("tls.key".into(), String::new()))),
                "key",
            ),
        ];
        let material: Vec<&str> = key
            .lines()
            .filter(|line| !line.starts_with('-'))
            .map(|line| &line[..line.len().min(24)])
            .collect();
        for (what, request, part) in cases {
            let answer = plugin.stage(request).await;
            if let Err(status) = &answer {
                let message = status.message();
                ensure!(
                    !material.iter().any(|text| message.contains(text)),
                    "{what}: key material in {message}"
                );
            }
            refused(what, answer, Code::Unauthenticated, &[id, part])?;
            ensure!(device_of(id)?.is_none(), "{what}: a device is left");
        }
        // The installation's own, missing and swapped.
        let directory = |id: &str| plugin.path("secrets").join(format!("{id}-client"));
        fs::rename(directory(id), plugin.path("kept"))?;
        let answer = plugin.stage(plugin.to_stage(&volume)).await;
        refused("missing", answer, Code::Unauthenticated, &[id])?;
        fs::rename(directory(other.id()), directory(id))?;
        let answer = plugin.stage(plugin.to_stage(&volume)).await;
        refused("swapped", answer, Code::Unauthenticated, &[id, other.id()])?;
        fs::rename(directory(id), directory(other.id()))?;
        fs::rename(plugin.path("kept"), directory(id))?;
        plugin.stage(plugin.to_stage(&volume)).await?;
        plugin.remove(&volume).await?;
        plugin.remove(&other).await
    })
}

fn a_damaged_backing_file() -> Result<()> {
    block_on(async {
        let plugin = Plugin::start().await?;
        type Harm = fn(&Path) -> Result<()>;
        let harms: [(&str, Harm); 3] = [
            ("deleted", |data| Ok(fs::remove_file(data)?)),
            ("truncated", |data| {
                Ok(File::options().write(true).open(data)?.set_len(4096)?)
            }),
            ("read-only", |data| {
                let data = data.to_str().context("a path")?;
                run("chmod", &["0444", data])
            }),
        ];
        for (what, harm) in harms {
            let volume = plugin.volume(what, &[("reconnectTimeout", "10")]).await?;
            plugin.stage(plugin.to_stage(&volume)).await?;
            plugin.publish(plugin.to_publish(&volume)).await?;
            let file = plugin.path("target/volume/file");
            fs::write(&file, b"before")?;
            File::open(&file)?.sync_all()?;
            harm(&plugin.path("pool/volumes").join(volume.id()).join("data"))?;
            let mut open = File::options().append(true).open(&file)?;
            let written = open.write_all(b"after").and_then(|()| open.sync_all());
            println!("{what}: {written:?}");
            ensure!(written.is_err(), "{what}: a lost write was acknowledged");
            drop(open);
            plugin.remove(&volume).await.context(what)?;
        }
        Ok(())
    })
}

fn a_full_pool() -> Result<()> {
    block_on(async {
        // Where the driver's folders will be: its records and logs are on the full disk too.
        let disk = std::env::temp_dir().display().to_string();
        run("mount", &["-t", "tmpfs", "-o", "size=24m", "tmpfs", &disk])?;
        let plugin = Plugin::start().await?;
        let volume = plugin.volume("n", &[]).await?;
        plugin.stage(plugin.to_stage(&volume)).await?;
        plugin.publish(plugin.to_publish(&volume)).await?;
        let file = plugin.path("target/volume/file");
        fs::write(&file, vec![7; 1 << 20])?;
        File::open(&file)?.sync_all()?;
        let ballast = plugin.path("pool/ballast");
        let _ = fs::write(&ballast, vec![1; 32 << 20]);
        let large = plugin.path("target/volume/large");
        let mut large = File::create(&large)?;
        let written = large
            .write_all(&vec![8; 16 << 20])
            .and_then(|()| large.sync_all());
        println!("full: {written:?}");
        ensure!(written.is_err(), "a write to a full disk was acknowledged");
        drop(large);
        let create = plugin.volume("another", &[]).await;
        let status = create.err().context("a volume on a full disk")?;
        let status = status.downcast::<Status>()?;
        let answer = Err(status);
        refused("create", answer, Code::ResourceExhausted, &[])?;
        fs::remove_file(&ballast)?;
        // The file system gave up; staged anew, it is checked and whole.
        plugin
            .unpublish(volume.id(), &plugin.text("target/volume"))
            .await?;
        plugin.unstage(volume.id(), &plugin.text("staging")).await?;
        plugin.stage(plugin.to_stage(&volume)).await?;
        plugin.publish(plugin.to_publish(&volume)).await?;
        ensure!(
            fs::read(&file)? == vec![7; 1 << 20],
            "what was durable is lost"
        );
        fs::write(&file, b"goes on")?;
        plugin.remove(&volume).await?;
        drop(plugin);
        run("umount", &["--lazy", &disk])
    })
}

/// What an orchestrator does to a node that it takes for dead.
fn detached_under_a_mounted_file_system() -> Result<()> {
    block_on(async {
        let plugin = Plugin::start().await?;
        let volume = plugin.volume("n", &[("reconnectTimeout", "10")]).await?;
        let id = volume.id();
        plugin.stage(plugin.to_stage(&volume)).await?;
        plugin.publish(plugin.to_publish(&volume)).await?;
        let file = plugin.path("target/volume/file");
        fs::write(&file, b"before")?;
        File::open(&file)?.sync_all()?;
        plugin.detach(id).await?;
        let mut open = File::options().append(true).open(&file)?;
        let written = open.write_all(b"after").and_then(|()| open.sync_all());
        println!("{written:?}");
        ensure!(written.is_err(), "written after it was detached");
        drop(open);
        let again = plugin.stage(plugin.to_stage(&volume)).await;
        println!("staged again: {again:?}");
        plugin.remove(&volume).await?;
        let gone = plugin.stage(plugin.to_stage(&volume)).await;
        refused("staged when deleted", gone, Code::NotFound, &[id])
    })
}
