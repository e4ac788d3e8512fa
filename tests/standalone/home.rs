//! A machine's directories, the processes that work in them, and what is left in them.

use std::fs::{self, File};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use hawser::proto::control::control_client::ControlClient;
use hawser::proto::control::{StatisticsRequest, StatisticsResponse};
use hawser::proto::csi::ProbeRequest;
use hawser::proto::csi::controller_client::ControllerClient;
use hawser::proto::csi::identity_client::IdentityClient;
use hawser::proto::socket;
use tempfile::TempDir;
use tonic::transport::Channel;

/// How long anything may take on a busy machine before a test gives up.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) const NODE: &str = "node-a";
pub(crate) const OTHER_NODE: &str = "node-b";

/// State, Secrets and pool of one machine. Ends the servers that are left when it goes.
pub(crate) struct Home {
    directory: TempDir,
    /// The size of a file system that the pool has to itself, as mount(8) takes it.
    pool_size: Option<&'static str>,
}

/// Mounts a file system that only the command sees, and then runs it.
const MOUNT: &str = r#"mount -t tmpfs -o "size=$1" tmpfs "$2" && shift 2 && exec "$@""#;

/// A running `hawser standalone`. Killed when it goes.
pub(crate) struct Parent {
    child: Child,
    pub(crate) controller: Controller,
}

/// A connection to its Controller service.
#[derive(Clone)]
pub(crate) struct Controller(pub(crate) ControllerClient<Channel>);

impl Home {
    pub(crate) fn new() -> Self {
        Self {
            directory: TempDir::with_prefix("hw").unwrap(),
            pool_size: None,
        }
    }

    /// A machine whose pool is that small. It is there as long as its processes are: the next parent gets another.
    pub(crate) fn with_pool_of(size: &'static str) -> Self {
        let mut home = Self::new();
        home.pool_size = Some(size);
        fs::create_dir_all(home.path("pool/volumes")).unwrap();
        home
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn volume(&self, id: &str) -> PathBuf {
        self.path("pool/volumes").join(id)
    }

    /// The command, with what every test gives it.
    fn command(&self, pool: &Path) -> Command {
        let mut command = match self.pool_size {
            None => Command::new(env!("CARGO_BIN_EXE_hawser")),
            Some(size) => {
                let mut command = Command::new("unshare");
                command
                    .args(["--user", "--map-root-user", "--mount", "sh", "-c", MOUNT])
                    .args(["sh", size])
                    .arg(pool)
                    .arg(env!("CARGO_BIN_EXE_hawser"));
                command
            }
        };
        command
            .arg("standalone")
            .args(["--no-node", "--node-id", NODE, "--other-node", OTHER_NODE])
            .arg("--state")
            .arg(self.path("state"))
            .arg("--secrets")
            .arg(self.path("secrets"))
            .arg("--pool")
            .arg(pool)
            .arg("--endpoint")
            .arg(format!("unix://{}", self.path("csi.sock").display()));
        command
    }

    pub(crate) async fn start(&self) -> Parent {
        self.start_with(&["--overcommit", "1000"]).await
    }

    /// The process alone, which may not be up yet.
    pub(crate) fn spawn(&self, options: &[&str]) -> Child {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.path("log"))
            .unwrap();
        self.command(&self.path("pool"))
            .args(options)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap()
    }

    pub(crate) async fn start_with(&self, options: &[&str]) -> Parent {
        let mut child = self.spawn(options);
        let deadline = Instant::now() + PATIENCE;
        // A parent that was just killed may seem to listen still, through a server that it was starting.
        let channel = loop {
            if let Ok(channel) = socket::connect(&self.path("csi.sock")).await
                && IdentityClient::new(channel.clone())
                    .probe(ProbeRequest {})
                    .await
                    .is_ok()
            {
                break channel;
            }
            if let Some(status) = child.try_wait().unwrap() {
                panic!("standalone {status}:\n{}", self.log());
            }
            assert!(Instant::now() < deadline, "not up:\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        Parent {
            child,
            controller: Controller(ControllerClient::new(channel)),
        }
    }

    /// Starts it on that pool, where it must fail at once, and returns what it says.
    pub(crate) fn refused(&self, pool: &Path) -> String {
        let output = self.command(pool).output().unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// Waits until the log says that.
    pub(crate) async fn logged(&self, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.log().contains(text) {
            assert!(Instant::now() < deadline, "no {text}:\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// What the server of a volume says of itself; `None` while nobody answers.
    pub(crate) async fn statistics(&self, id: &str) -> Option<StatisticsResponse> {
        let path = self.path("state/servers").join(id).join("control");
        let channel = socket::connect(&path).await.ok()?;
        let answer = ControlClient::new(channel)
            .statistics(StatisticsRequest {})
            .await;
        Some(answer.ok()?.into_inner())
    }

    /// Waits for a server whose process is not `before`.
    pub(crate) async fn next_server(&self, id: &str, before: u32) -> StatisticsResponse {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(found) = self.statistics(id).await
                && found.process_id != before
            {
                return found;
            }
            assert!(Instant::now() < deadline, "no server:\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// The processes that serve a volume of this machine.
    pub(crate) fn server_processes(&self) -> Vec<i32> {
        let ours = self.directory.path().as_os_str().as_encoded_bytes();
        let mut processes = Vec::new();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let Ok(id) = entry.file_name().to_string_lossy().parse::<i32>() else {
                continue;
            };
            let words = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let mut words = words.split(|byte| *byte == 0);
            if words.any(|word| word == b"serve") && words.any(|word| word.starts_with(ours)) {
                processes.push(id);
            }
        }
        processes
    }

    /// Everything that belongs to any volume, but for certificate authority and locks.
    pub(crate) fn leftovers(&self) -> Vec<String> {
        let mut left = Vec::new();
        for (directory, own) in [
            ("pool/volumes", ""),
            ("secrets", "ca"),
            ("state/servers", ""),
        ] {
            for entry in fs::read_dir(self.path(directory)).unwrap() {
                let name = entry.unwrap().file_name().into_string().unwrap();
                if name != own {
                    left.push(format!("{directory}/{name}"));
                }
            }
        }
        let servers = self.server_processes();
        left.extend(servers.iter().map(|process| format!("process {process}")));
        left
    }

    /// Waits until nothing of any volume is left.
    pub(crate) async fn assert_clean(&self) {
        let deadline = Instant::now() + PATIENCE;
        while !self.leftovers().is_empty() {
            let left = self.leftovers();
            assert!(Instant::now() < deadline, "{left:?}\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        for process in self.server_processes() {
            send(process, rustix::process::Signal::KILL);
        }
    }
}

impl Parent {
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// A path as this process sees it, in whose mounts it may be another file.
    pub(crate) fn sees(&self, path: &Path) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.child.id()));
        root.join(path.strip_prefix("/").unwrap())
    }

    /// Sends SIGTERM and waits for the end.
    pub(crate) fn terminate(mut self) -> ExitStatus {
        let id = i32::try_from(self.child.id()).unwrap();
        send(id, rustix::process::Signal::TERM);
        self.child.wait().unwrap()
    }
}

impl Deref for Parent {
    type Target = Controller;

    fn deref(&self) -> &Controller {
        &self.controller
    }
}

impl Drop for Parent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn send(process: i32, signal: rustix::process::Signal) {
    let process = rustix::process::Pid::from_raw(process).unwrap();
    let _ = rustix::process::kill_process(process, signal);
}

pub(crate) fn process_of(statistics: &StatisticsResponse) -> i32 {
    i32::try_from(statistics.process_id).unwrap()
}

pub(crate) fn mode(path: &Path) -> u32 {
    use std::os::unix::fs::PermissionsExt;
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}
