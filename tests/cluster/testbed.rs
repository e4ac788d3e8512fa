//! Inside: the cluster as the scenarios have it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::control::ControlPlane;
use super::kubectl::{self, Kubectl, PATIENCE};
use super::node::{self, Node};
use super::tools::Tools;
use super::{NODES, driver, network, scenarios, step, until};

/// Everything that a scenario may want to hold on to.
pub(crate) struct Testbed {
    pub(crate) plane: ControlPlane,
    pub(crate) nodes: Vec<Node>,
    pub(crate) kubectl: Kubectl,
    pub(crate) logs: PathBuf,
    installed: bool,
    // Last, so that it is removed after all that writes to it has ended.
    _work: tempfile::TempDir,
}

pub(crate) fn main(arguments: &[String]) -> Result<ExitCode> {
    let started = Instant::now();
    let shell = arguments.iter().any(|argument| argument == "--shell");
    let wanted: Vec<&scenarios::Scenario> = scenarios::all()
        .filter(|scenario| {
            arguments.is_empty()
                || arguments
                    .iter()
                    .any(|part| scenario.name.contains(part.as_str()))
        })
        .collect();
    ensure!(
        shell || !wanted.is_empty(),
        "no scenario has a name like {arguments:?}"
    );
    let mut testbed = Testbed::bring_up()?;
    if shell {
        let status = Command::new("bash")
            .env("KUBECONFIG", testbed.plane.kubeconfig())
            .status()?;
        return Ok(if status.success() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        });
    }
    let mut failed = Vec::new();
    for scenario in &wanted {
        println!("cluster: {}", scenario.name);
        let begun = Instant::now();
        let result = (scenario.run)(&mut testbed);
        let verdict = if result.is_ok() { "ok" } else { "FAILED" };
        println!(
            "cluster: {:6.1} s  {} {verdict}",
            begun.elapsed().as_secs_f32(),
            scenario.name
        );
        if let Err(error) = result {
            println!("{error:#}");
            testbed.photograph(scenario.name);
            failed.push(scenario.name);
        }
    }
    testbed.photograph("end");
    for name in &failed {
        println!("cluster: FAILED {name}");
    }
    println!(
        "cluster: {:6.1} s  all; logs of every part: {}",
        started.elapsed().as_secs_f32(),
        testbed.logs.display()
    );
    println!(
        "cluster: {} passed, {} failed",
        wanted.len() - failed.len(),
        failed.len()
    );
    Ok(if failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

impl Testbed {
    fn bring_up() -> Result<Self> {
        let tools = Tools::find()?;
        let logs = fresh_logs()?;
        let work = tempfile::Builder::new()
            .prefix("hawser-cluster-")
            .tempdir()?;
        let names: Vec<String> = (1..=NODES).map(node::name).collect();
        step("network", || network::lay_out(NODES))?;
        step("image", || driver::build_image(&tools.images()))?;
        let parts = node::Parts::lay_out(&tools, work.path(), &logs)?;
        let plane = step("control plane", || {
            ControlPlane::start(&tools, work.path(), &logs, &names)
        })?;
        let kubectl = Kubectl::new(&tools, plane.kubeconfig());
        let mut testbed = Self {
            plane,
            nodes: Vec::new(),
            kubectl,
            logs,
            installed: false,
            _work: work,
        };
        step("nodes", || testbed.start_nodes(&parts))
            .inspect_err(|_| testbed.photograph("nodes"))?;
        Ok(testbed)
    }

    fn start_nodes(&mut self, parts: &node::Parts) -> Result<()> {
        for index in 1..=NODES {
            self.nodes.push(Node::start(index, parts, &self.plane)?);
        }
        for name in (1..=NODES).map(node::name) {
            until(&format!("{name} is ready"), PATIENCE, || {
                // A dead node is not waited for.
                if let Some(dead) = self.nodes.iter_mut().find_map(|node| node.lives().err()) {
                    return Ok(Some(Err(dead)));
                }
                Ok(self
                    .kubectl
                    .object("node", &name)?
                    .filter(kubectl::is_ready)
                    .map(|_| Ok(())))
            })??;
        }
        Ok(())
    }

    /// A namespace for a scenario that uses the driver, which is installed if it is not there yet.
    pub(crate) fn namespace(&mut self, name: &str) -> Result<Kubectl> {
        if !self.installed {
            driver::install(&self.kubectl, &mut self.nodes)?;
            self.installed = true;
        }
        self.kubectl.create_namespace(name)
    }

    /// Deletes it with the pods and claims in it, and waits until no node has a device of theirs.
    pub(crate) fn delete_namespace(&mut self, namespace: &Kubectl) -> Result<()> {
        step("namespace deleted", || {
            namespace.run(&[
                "delete",
                "namespace",
                &namespace.namespace,
                "--timeout=240s",
            ])
        })?;
        step("devices gone", || {
            self.nodes
                .iter_mut()
                .try_for_each(|node| driver::until_devices(node, 0))
        })
    }

    pub(crate) fn node(&mut self, name: &str) -> Result<&mut Node> {
        self.nodes
            .iter_mut()
            .find(|node| node.name == name)
            .with_context(|| format!("no node is called {name}"))
    }

    /// Keeps what is to be seen of a cluster, for a person who was not there.
    fn photograph(&mut self, name: &str) {
        let file = self.logs.join(format!("{name}.txt"));
        let mut text = String::new();
        for arguments in [
            &["get", "all,pvc,secrets", "-A", "-o", "wide"][..],
            &[
                "get",
                "nodes,pv,storageclass,csidriver,csinode,volumeattachments,csistoragecapacities",
                "-A",
                "-o",
                "wide",
            ],
            &["get", "nbdpools,nbdvolumes", "-A", "-o", "yaml"],
            &["get", "events", "-A", "--sort-by=.lastTimestamp"],
            &["describe", "pods", "-A"],
        ] {
            let result = self
                .kubectl
                .run(arguments)
                .unwrap_or_else(|error| format!("{error:#}\n"));
            text += &format!("$ kubectl {}\n{result}\n", arguments.join(" "));
        }
        // A machine that has no room for its logs has other troubles.
        let _ = fs::write(&file, text);
    }
}

/// An empty `target/e2e-logs`.
fn fresh_logs() -> Result<PathBuf> {
    let logs = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/e2e-logs");
    if logs.exists() {
        fs::remove_dir_all(&logs).with_context(|| format!("removing {}", logs.display()))?;
    }
    fs::create_dir_all(&logs).with_context(|| format!("creating {}", logs.display()))?;
    Ok(logs)
}
