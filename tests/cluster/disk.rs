//! The disk that every node begins with: the images, imported and unpacked.
//!
//! A node would take a minute for that on its slow processor, and each of them again. So a containerd does it here, into a
//! folder that then becomes a file system.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use super::process::{Process, output};
use super::tools::Tools;
use super::until;

/// Sparse.
const SIZE: &str = "24G";

const STARTS: Duration = Duration::from_secs(60);

pub(crate) struct Staging {
    tools: Tools,
    folder: PathBuf,
    socket: PathBuf,
    containerd: Process,
}

impl Staging {
    /// Begins with none.
    pub(crate) fn begin(tools: &Tools, work: &Path, logs: &Path) -> Result<Self> {
        let folder = work.join("staging");
        fs::create_dir(&folder)?;
        // On whatever the work folder is, overlayfs may not stand.
        output(
            Command::new("mount")
                .args(["-t", "tmpfs", "-o", "mode=755", "tmpfs"])
                .arg(&folder),
        )?;
        let root = folder.join("var/lib/containerd");
        fs::create_dir_all(&root)?;
        let state = work.join("containerd");
        let socket = state.join("socket");
        let config = work.join("containerd.toml");
        // Nothing is run by this one.
        fs::write(
            &config,
            "version = 2\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n",
        )?;
        let mut command = tools.debian("containerd");
        command
            .arg("--config")
            .arg(config)
            .arg("--root")
            .arg(root)
            .arg("--state")
            .arg(&state)
            .arg("--address")
            .arg(&socket);
        let containerd = Process::start("containerd", logs, &mut command)?;
        let mut staging = Self {
            tools: tools.clone(),
            folder,
            socket,
            containerd,
        };
        until("containerd answers", STARTS, || {
            if let Err(dead) = staging.containerd.lives() {
                return Ok(Some(Err(dead)));
            }
            Ok(output(staging.ctr().arg("version"))
                .is_ok()
                .then_some(Ok(())))
        })??;
        Ok(staging)
    }

    fn ctr(&self) -> Command {
        let mut command = self.tools.debian("ctr");
        command
            .arg("--address")
            .arg(&self.socket)
            .args(["--namespace", "k8s.io"]);
        command
    }

    pub(crate) fn import(&self, archive: &Path) -> Result<()> {
        output(self.ctr().args(["images", "import"]).arg(archive))
            .map(drop)
            .with_context(|| format!("importing {}", archive.display()))
    }

    /// Gives an image a second name.
    pub(crate) fn tag(&self, image: &str, name: &str) -> Result<()> {
        output(self.ctr().args(["images", "tag", image, name])).map(drop)
    }

    /// Makes the disk.
    pub(crate) fn finish(self, disk: &Path) -> Result<()> {
        drop(self.containerd);
        output(
            Command::new("mkfs.ext4")
                .args(["-q", "-O", "^metadata_csum_seed", "-d"])
                .arg(&self.folder)
                .arg(disk)
                .arg(SIZE),
        )?;
        output(Command::new("umount").arg(&self.folder)).map(drop)
    }
}

/// A copy of a disk, as sparse as it.
pub(crate) fn copy(disk: &Path, to: &Path) -> Result<()> {
    output(
        Command::new("cp")
            .args(["--sparse=always", "--reflink=auto"])
            .args([disk, to]),
    )
    .map(drop)
}
