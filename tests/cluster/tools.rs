//! What `tests/support/cluster` built and unpacked: Kubernetes' binaries, and Debian's in the nodes' root file system.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, ensure};

#[derive(Debug, Clone)]
pub(crate) struct Tools {
    binaries: PathBuf,
    root: PathBuf,
    images: PathBuf,
}

impl Tools {
    pub(crate) fn find() -> Result<Self> {
        let cache = super::kernels::cache()?.join("cluster");
        let tools = Self {
            binaries: cache.join("bin"),
            root: cache.join("root"),
            images: cache.join("images"),
        };
        for needed in [
            tools.binaries.join("kube-apiserver"),
            tools.root.join("node"),
        ] {
            ensure!(
                needed.exists(),
                "{} is missing: run `tests/support/install e2e`",
                needed.display()
            );
        }
        Ok(tools)
    }

    /// One of Kubernetes' binaries, or helm.
    pub(crate) fn kubernetes(&self, name: &str) -> Command {
        Command::new(self.binaries.join(name))
    }

    /// One of Debian's, with the libraries of its own release.
    pub(crate) fn debian(&self, name: &str) -> Command {
        let mut command = Command::new(self.root.join("lib64/ld-linux-x86-64.so.2"));
        command
            .arg("--library-path")
            .arg(self.root.join("lib/x86_64-linux-gnu"))
            .arg(self.root.join("usr/bin").join(name));
        command
    }

    /// The root file system of the nodes.
    pub(crate) fn root(&self) -> &PathBuf {
        &self.root
    }

    /// Where archives of images are.
    pub(crate) fn images(&self) -> PathBuf {
        self.images.clone()
    }

    /// All but the driver's own.
    pub(crate) fn other_images(&self) -> Result<Vec<PathBuf>> {
        let mut archives = Vec::new();
        for entry in fs::read_dir(&self.images)? {
            let path = entry?.path();
            let is_archive = path.extension().is_some_and(|extension| extension == "tar");
            if is_archive && path.file_stem().is_some_and(|stem| stem != "hawser") {
                archives.push(path);
            }
        }
        Ok(archives)
    }
}
