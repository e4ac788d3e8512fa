//! A node: kubelet, containerd and kube-proxy on a kernel of their own, in user-mode Linux.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hawser::demo::uml::Kernel;

use super::control::{ControlPlane, PROXY};
use super::network::{self, GATEWAY};
use super::process::{Process, output};
use super::tools::Tools;
use super::{disk, kernels};

/// What it may use at most, in MiB; it is taken from the host as it is touched.
const MEMORY_MIB: u32 = 3072;

/// How long what a shell is told may take.
const ANSWER: Duration = Duration::from_secs(120);

/// What its version begins with: the oldest that has all that a kubelet wants.
const KERNEL: &str = "6.12.";

/// What all nodes find in `/node`.
const COMMON: [(&str, &str); 4] = [
    ("init", include_str!("node/init")),
    ("containerd.toml", include_str!("node/containerd.toml")),
    ("kubelet.yaml", include_str!("node/kubelet.yaml")),
    ("resolv.conf", ""),
];

/// What a node is made of.
#[derive(Debug, Clone)]
pub(crate) struct Parts {
    pub(crate) kernel: Kernel,
    pub(crate) root: PathBuf,
    /// What is `/node` inside.
    pub(crate) shared: PathBuf,
    pub(crate) disks: PathBuf,
    pub(crate) logs: PathBuf,
}

pub(crate) struct Node {
    pub(crate) name: String,
    index: usize,
    parts: Parts,
    /// The folder that is `/node/NAME` inside.
    folder: PathBuf,
    disk: PathBuf,
    machine: Mutex<Option<Process>>,
    asked: AtomicU32,
}

pub(crate) fn name(index: usize) -> String {
    format!("node{index}")
}

impl Parts {
    /// Lays out what all nodes share.
    pub(crate) fn lay_out(tools: &Tools, work: &Path, logs: &Path) -> Result<Self> {
        let kernel = kernels::all()?
            .into_iter()
            .find(|kernel| kernel.version().starts_with(KERNEL))
            .with_context(|| format!("no kernel {KERNEL}: run `tests/support/install e2e`"))?;
        let parts = Self {
            root: tools.root().clone(),
            shared: work.join("node"),
            disks: work.join("disks"),
            logs: logs.to_owned(),
            kernel,
        };
        fs::create_dir(&parts.shared)?;
        fs::create_dir(&parts.disks)?;
        for (file, content) in COMMON {
            fs::write(parts.shared.join(file), content)?;
        }
        fs::set_permissions(parts.shared.join("init"), fs::Permissions::from_mode(0o755))?;
        let modules = parts.root.join("lib/modules").join(parts.kernel.version());
        fs::create_dir_all(&modules)?;
        bind(parts.kernel.modules(), &modules)?;
        // Nothing of the cache may be bound into the work folder: that is removed at the end, with all that is in it.
        bind(&parts.shared, &parts.root.join("node"))?;
        Ok(parts)
    }

    /// What each node's own begins with.
    pub(crate) fn disk(&self) -> PathBuf {
        self.disks.join("first")
    }
}

/// Shows a folder at another place, to this namespace alone.
fn bind(folder: &Path, at: &Path) -> Result<()> {
    output(Command::new("mount").arg("--bind").args([folder, at])).map(drop)
}

impl Node {
    pub(crate) fn start(index: usize, parts: &Parts, plane: &ControlPlane) -> Result<Self> {
        let name = name(index);
        let folder = parts.shared.join(&name);
        fs::create_dir_all(&folder)?;
        plane.write_kubeconfig(&name, &folder.join("kubeconfig"))?;
        plane.write_kubeconfig(PROXY, &parts.shared.join(PROXY))?;
        let disk = parts.disks.join(&name);
        disk::copy(&parts.disk(), &disk)?;
        let node = Self {
            name,
            index,
            parts: parts.clone(),
            folder,
            disk,
            machine: Mutex::default(),
            asked: AtomicU32::new(0),
        };
        node.power_on()?;
        Ok(node)
    }

    pub(crate) fn power_on(&self) -> Result<()> {
        let peers: Vec<String> = (1..=super::NODES)
            .map(|peer| {
                format!(
                    "{}={}",
                    network::node_address(peer),
                    network::pod_range(peer)
                )
            })
            .collect();
        let mut command = self.parts.kernel.command();
        command
            .arg(format!("mem={MEMORY_MIB}M"))
            .arg("rootfstype=hostfs")
            .arg(format!("rootflags={}", self.parts.root.display()))
            .args(["ro", "init=/node/init", "con=null", "con0=null,fd:1"])
            .arg(format!("uml_dir={}/", self.folder.display()))
            .arg(format!("ubd0={}", self.disk.display()))
            .arg(format!(
                "vec0:transport=tap,ifname={},depth=128,gro=1,mac=02:00:00:00:00:{:02x}",
                network::tap(self.index),
                self.index
            ))
            .arg(format!("nodename={}", self.name))
            .arg(format!("nodeip={}", network::node_address(self.index)))
            .arg(format!("gateway={GATEWAY}"))
            .arg(format!("peers={}", peers.join(",")))
            .arg(format!("share={}", self.parts.shared.display()))
            .arg(format!("logs={}", self.parts.logs.display()))
            .env("TMPDIR", "/dev/shm");
        let machine = Process::start(
            &format!("{}-console", self.name),
            &self.parts.logs,
            &mut command,
        )?;
        *self.machine.lock().unwrap() = Some(machine);
        Ok(())
    }

    /// A loss of power.
    pub(crate) fn power_off(&self) {
        *self.machine.lock().unwrap() = None;
    }

    pub(crate) fn lives(&self) -> Result<()> {
        let mut machine = self.machine.lock().unwrap();
        machine.as_mut().map_or(Ok(()), Process::lives)
    }

    /// Cuts it off, or joins it again.
    pub(crate) fn connect(&self, connected: bool) -> Result<()> {
        network::connect(self.index, connected)
    }

    /// What a shell as root on the node prints.
    pub(crate) fn shell(&self, script: &str) -> Result<String> {
        let asked = self.asked.fetch_add(1, Ordering::Relaxed);
        let file = |end: &str| self.folder.join(format!("do-{asked}.{end}"));
        fs::write(file("new"), script)?;
        fs::rename(file("new"), file("sh"))?;
        let deadline = Instant::now() + ANSWER;
        while !file("status").exists() {
            ensure!(
                Instant::now() < deadline,
                "after {} s, {} has not run {script:?} to its end",
                ANSWER.as_secs(),
                self.name
            );
            thread::sleep(Duration::from_millis(20));
        }
        let printed = fs::read_to_string(file("out"))?;
        let status = fs::read_to_string(file("status"))?;
        ensure!(
            status.trim() == "0",
            "{}: {script:?} ended with {}: {printed}",
            self.name,
            status.trim()
        );
        Ok(printed)
    }
}
