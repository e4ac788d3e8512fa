//! Inside: the cluster as the scenarios have it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Mutex;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, ensure};

use super::control::ControlPlane;
use super::disk::Staging;
use super::kubectl::{self, Kubectl, PATIENCE};
use super::node::{self, Node};
use super::report::{self, say, step};
use super::scenarios::{self, Scenario, When};
use super::tools::Tools;
use super::{NODES, driver, latency, network, until, workload};

/// How many scenarios run side by side. More would only wait for each other's processor.
const LANES: usize = 3;

/// Volumes that live for `--latency`.
const REPETITIONS: usize = 5;

/// The namespace of the pod that works on its volume through everything that happens.
const LOAD: &str = "load";

/// Everything that a scenario may want to hold on to.
pub(crate) struct Testbed {
    pub(crate) plane: Mutex<ControlPlane>,
    pub(crate) nodes: Vec<Node>,
    pub(crate) kubectl: Kubectl,
    pub(crate) logs: PathBuf,
    installed: Mutex<bool>,
    loaded: Mutex<bool>,
    // Last, so that it is removed after all that writes to it has ended.
    _work: tempfile::TempDir,
}

pub(crate) fn main(arguments: &[String]) -> Result<ExitCode> {
    let started = Instant::now();
    let asked = |option: &str| arguments.iter().any(|argument| argument == option);
    let (shell, latency) = (asked("--shell"), asked("--latency"));
    let wanted: Vec<&Scenario> = scenarios::all()
        .filter(|scenario| {
            arguments.is_empty()
                || arguments
                    .iter()
                    .any(|part| scenario.name.contains(part.as_str()))
        })
        .collect();
    ensure!(
        shell || latency || !wanted.is_empty(),
        "no scenario has a name like {arguments:?}"
    );
    let testbed = Testbed::bring_up()?;
    if latency {
        latency::measure(&testbed, REPETITIONS)?;
        return Ok(ExitCode::SUCCESS);
    }
    if shell {
        driver::install(&testbed.kubectl, &testbed.nodes, driver::CURRENT)?;
        let status = Command::new("bash")
            .env("KUBECONFIG", testbed.plane.lock().unwrap().kubeconfig())
            .status()?;
        return Ok(if status.success() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        });
    }
    let of = |when: When| wanted.iter().filter(move |scenario| scenario.when == when);
    let mut failed = testbed.side_by_side(&of(When::First).collect::<Vec<_>>());
    failed.extend(testbed.side_by_side(&of(When::SideBySide).collect::<Vec<_>>()));
    for scenario in of(When::Alone) {
        failed.extend(testbed.run(scenario));
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
        report::open(&logs)?;
        let work = tempfile::Builder::new()
            .prefix("hawser-cluster-")
            .tempdir()?;
        let names: Vec<String> = (1..=NODES).map(node::name).collect();
        step("network", || network::lay_out(NODES))?;
        let parts = node::Parts::lay_out(&tools, work.path(), &logs)?;
        let plane = thread::scope(|scope| {
            let plane = scope.spawn(|| {
                step("control plane", || {
                    ControlPlane::start(&tools, work.path(), &logs, &names)
                })
            });
            step("a disk with the images", || {
                lay_out_disk(&tools, work.path(), &logs, &parts.disk())
            })?;
            joined(plane)
        })?;
        let kubectl = Kubectl::new(&tools, plane.kubeconfig())?;
        let mut testbed = Self {
            plane: Mutex::new(plane),
            nodes: Vec::new(),
            kubectl,
            logs,
            installed: Mutex::default(),
            loaded: Mutex::default(),
            _work: work,
        };
        step("nodes", || testbed.start_nodes(&parts))
            .inspect_err(|_| testbed.photograph("nodes"))?;
        Ok(testbed)
    }

    fn start_nodes(&mut self, parts: &node::Parts) -> Result<()> {
        let plane = self.plane.lock().unwrap();
        for index in 1..=NODES {
            self.nodes.push(Node::start(index, parts, &plane)?);
        }
        for name in (1..=NODES).map(node::name) {
            until(&format!("{name} is ready"), PATIENCE, || {
                // A dead node is not waited for.
                if let Some(dead) = self.nodes.iter().find_map(|node| node.lives().err()) {
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

    /// Runs these in some lanes, and returns the names of those that failed.
    fn side_by_side(&self, scenarios: &[&&Scenario]) -> Vec<&'static str> {
        let next = Mutex::new(scenarios.iter());
        let lane = || {
            let mut failed = Vec::new();
            loop {
                let scenario = next.lock().unwrap().next();
                let Some(scenario) = scenario else {
                    return failed;
                };
                failed.extend(self.run(scenario));
            }
        };
        thread::scope(|scope| {
            let lanes: Vec<_> = (0..LANES).map(|_| scope.spawn(lane)).collect();
            lanes
                .into_iter()
                .flat_map(|lane| lane.join().unwrap())
                .collect()
        })
    }

    /// Runs one, and returns its name if it failed.
    fn run(&self, scenario: &Scenario) -> Option<&'static str> {
        report::gathered(scenario.name, || {
            say(scenario.name);
            let begun = Instant::now();
            let result = (scenario.run)(self);
            let seconds = begun.elapsed().as_secs_f32();
            let verdict = if result.is_ok() { "ok" } else { "FAILED" };
            say(&format!("{seconds:6.1} s  {} {verdict}", scenario.name));
            let error = result.err()?;
            say(&format!("{error:#}"));
            self.photograph(scenario.name);
            Some(scenario.name)
        })
    }

    /// Does something once, with the driver installed or to be so.
    pub(crate) fn install_once(&self, install: impl FnOnce() -> Result<()>) -> Result<()> {
        let mut installed = self.installed.lock().unwrap();
        if !*installed {
            install()?;
            *installed = true;
        }
        Ok(())
    }

    /// A namespace for a scenario that uses the driver, which is installed if it is not there yet.
    pub(crate) fn namespace(&self, name: &str) -> Result<Kubectl> {
        self.install_once(|| driver::install(&self.kubectl, &self.nodes, driver::CURRENT))?;
        self.kubectl.create_namespace(name)
    }

    /// The namespace of a pod that works all the time on a volume that its node does not keep: it lives through everything
    /// that happens to the driver. It is started if it is not there yet.
    pub(crate) fn load(&self) -> Result<Kubectl> {
        let kubectl = self.kubectl.in_namespace(LOAD);
        let mut loaded = self.loaded.lock().unwrap();
        if !*loaded {
            self.namespace(LOAD)?;
            workload::start_load(&kubectl)?;
            *loaded = true;
        }
        Ok(kubectl)
    }

    /// Waits until the pod under load has read back what it wrote, from now on, more than once.
    pub(crate) fn io_goes_on(&self) -> Result<()> {
        let kubectl = self.kubectl.in_namespace(LOAD);
        step("I/O goes on", || {
            workload::until_rounds(&kubectl, &self.logs)
        })
    }

    /// Ends it, and with it what its volume was.
    pub(crate) fn end_load(&self) -> Result<()> {
        let mut loaded = self.loaded.lock().unwrap();
        if *loaded {
            *loaded = false;
            self.delete_namespace(&self.kubectl.in_namespace(LOAD))?;
        }
        Ok(())
    }

    /// Deletes a namespace's pods and claims, waits until no node has a device of theirs, and leaves the rest to the
    /// cluster.
    pub(crate) fn delete_namespace(&self, namespace: &Kubectl) -> Result<()> {
        let volumes = workload::volume_ids(namespace)?;
        step("pods and claims deleted", || {
            namespace.run(&["delete", "pods,pvc", "--all", "--wait=false"])?;
            for kind in ["pod", "pvc"] {
                until(&format!("there is no {kind}"), PATIENCE, || {
                    Ok(namespace.objects(kind, "")?.is_empty().then_some(()))
                })?;
            }
            self.nodes
                .iter()
                .try_for_each(|node| driver::until_no_device(node, &volumes))
        })?;
        namespace.delete("namespace", &namespace.namespace)
    }

    pub(crate) fn node(&self, name: &str) -> Result<&Node> {
        self.nodes
            .iter()
            .find(|node| node.name == name)
            .with_context(|| format!("no node is called {name}"))
    }

    /// Keeps what is to be seen of a cluster, for a person who was not there.
    fn photograph(&self, name: &str) {
        let file = self.logs.join(format!("{name}.txt"));
        let mut text = String::new();
        for arguments in [
            &["get", "all,pvc,secrets", "-A", "-o", "wide"][..],
            &[
                "get",
                "nodes,pv,storageclass,csidriver,csinode,volumeattachments,csistoragecapacities,leases",
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

/// Makes the disk that nodes begin with.
fn lay_out_disk(tools: &Tools, work: &Path, logs: &Path, disk: &Path) -> Result<()> {
    let staging = Staging::begin(tools, work, logs)?;
    for archive in tools.other_images()? {
        staging.import(&archive)?;
    }
    driver::import_image(&staging, &tools.images())?;
    staging.finish(disk)
}

fn joined<T>(thread: thread::ScopedJoinHandle<'_, Result<T>>) -> Result<T> {
    thread.join().map_err(|_| anyhow!("a thread panicked"))?
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
