//! A real API server with its etcd and those controllers of Kubernetes' own that volumes have to do with: no
//! scheduler, no kubelet.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::core::v1::Namespace;
use k8s_openapi::jiff::Timestamp;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client};
use serde_json::Value;

use crate::chart::{self, Chart};

const STARTS: Duration = Duration::from_secs(90);

/// A process that ends with its value.
pub(crate) struct Process(Child);

impl Process {
    pub(crate) fn start(log: &Path, command: &mut Command) -> Result<Self> {
        let log = fs::File::create(log)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("start {:?}", command.get_program()))?;
        Ok(Self(child))
    }

    pub(crate) fn id(&self) -> u32 {
        self.0.id()
    }

    /// The most memory that it had, in MiB.
    pub(crate) fn peak_memory(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.id()))?;
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = peak.and_then(|text| text.trim().strip_suffix(" kB"));
        Ok(kib.context("no VmHWM")?.parse::<u64>()? >> 10)
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, name: &str) -> Result<()> {
        let status = Command::new("kill")
            .args(["-s", name, &self.id().to_string()])
            .status()?;
        ensure!(status.success(), "SIG{name} does not reach {}", self.id());
        Ok(())
    }

    pub(crate) fn wait(&mut self) -> Result<std::process::ExitStatus> {
        Ok(self.0.wait()?)
    }

    fn has_ended(&mut self) -> Result<bool> {
        Ok(self.0.try_wait()?.is_some())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What kube-controller-manager runs: it binds claims, counts quotas, and removes what belongs to nobody.
const CONTROLLERS: &str = "persistentvolume-binder-controller,persistentvolume-protection-controller,\
    persistentvolumeclaim-protection-controller,garbage-collector-controller,resourcequota-controller";

pub(crate) struct ApiServer {
    // They end in this order.
    _manager: Process,
    _api: Process,
    _etcd: Process,
    folder: PathBuf,
    url: String,
    pub(crate) client: Client,
    pub(crate) chart: Chart,
}

/// Who asks the API server: each has a token of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Who<'a> {
    Admin,
    /// The ServiceAccount of the controller in that namespace; replicas are told apart by the name that the audit log
    /// has for them.
    Controller {
        namespace: &'a str,
        replica: &'a str,
    },
}

impl Who<'_> {
    fn token(self) -> String {
        match self {
            Self::Admin => "admin".to_owned(),
            Self::Controller { namespace, replica } => format!("{namespace}-{replica}"),
        }
    }
}

/// The names of a controller's replicas.
pub(crate) const REPLICAS: [&str; 2] = ["a", "b"];

/// The tokens of the administrator, and of the controllers in these namespaces.
fn tokens(namespaces: &[String]) -> String {
    let mut tokens = "admin,admin,admin,system:masters\n".to_owned();
    for namespace in namespaces {
        let account = chart::account(namespace);
        for replica in REPLICAS {
            let token = Who::Controller { namespace, replica }.token();
            tokens += &format!(
                "{token},system:serviceaccount:{namespace}:{account},{token},\
                 \"system:serviceaccounts,system:serviceaccounts:{namespace}\"\n"
            );
        }
    }
    tokens
}

/// Every change that a controller asks for is in the audit log.
const AUDIT: &str = "apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
  - level: Metadata
    userGroups: [system:serviceaccounts]
    verbs: [create, update, patch, delete]
  - level: None
";

fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// Where `tests/support/install` keeps what it makes.
pub(crate) fn cache() -> Result<PathBuf> {
    let cache = match std::env::var_os("HAWSER_CACHE") {
        Some(cache) => PathBuf::from(cache),
        None => PathBuf::from(std::env::var_os("HOME").context("HOME is not set")?)
            .join(".cache/hawser"),
    };
    Ok(cache.join("cluster"))
}

impl ApiServer {
    pub(crate) async fn start(folder: &Path, namespaces: &[String]) -> Result<Self> {
        let cache = cache()?;
        let program = cache.join("bin/kube-apiserver");
        let manager = cache.join("bin/kube-controller-manager");
        ensure!(
            program.exists(),
            "{} is missing: run `tests/support/install e2e`",
            program.display()
        );
        let (etcd_port, peers, port) = (free_port()?, free_port()?, free_port()?);
        let root = cache.join("root");
        let etcd_url = format!("http://127.0.0.1:{etcd_port}");
        let etcd = Process::start(
            &folder.join("etcd.log"),
            Command::new(root.join("lib64/ld-linux-x86-64.so.2"))
                .arg("--library-path")
                .arg(root.join("lib/x86_64-linux-gnu"))
                .arg(root.join("usr/bin/etcd"))
                .args(["--unsafe-no-fsync", "--log-level=warn"])
                .arg(format!("--data-dir={}", folder.join("etcd").display()))
                .arg(format!("--listen-client-urls={etcd_url}"))
                .arg(format!("--advertise-client-urls={etcd_url}"))
                .arg(format!("--listen-peer-urls=http://127.0.0.1:{peers}")),
        )?;
        let key = folder.join("accounts.key");
        let made = Command::new("openssl")
            .args(["genrsa", "-out"])
            .arg(&key)
            .arg("2048")
            .stderr(Stdio::null())
            .status()?;
        ensure!(made.success(), "openssl made no key");
        let tokens = folder.join("tokens.csv");
        fs::write(&tokens, self::tokens(namespaces))?;
        let audit = folder.join("audit.yaml");
        fs::write(&audit, AUDIT)?;
        let mut api = Process::start(
            &folder.join("kube-apiserver.log"),
            Command::new(&program)
                .arg(format!("--etcd-servers={etcd_url}"))
                .arg(format!("--secure-port={port}"))
                .args(["--bind-address=127.0.0.1", "--advertise-address=192.0.2.1"])
                .arg(format!("--cert-dir={}", folder.display()))
                .arg(format!("--token-auth-file={}", tokens.display()))
                .arg(format!("--service-account-key-file={}", key.display()))
                .arg(format!(
                    "--service-account-signing-key-file={}",
                    key.display()
                ))
                .arg(format!("--audit-policy-file={}", audit.display()))
                .arg(format!("--audit-log-path={}", audit_log(folder).display()))
                .args([
                    "--service-account-issuer=https://cluster.test",
                    "--service-cluster-ip-range=198.19.0.0/16",
                    "--authorization-mode=RBAC",
                    // Nobody makes accounts here.
                    "--disable-admission-plugins=ServiceAccount",
                    "--shutdown-delay-duration=0s",
                ]),
        )?;
        let url = format!("https://127.0.0.1:{port}");
        let kubeconfig = write_kubeconfig(folder, &url, Who::Admin)?;
        let config = kube::Config::from_custom_kubeconfig(
            Kubeconfig::read_from(&kubeconfig)?,
            &KubeConfigOptions::default(),
        )
        .await?;
        let client = Client::try_from(config)?;
        let begun = Instant::now();
        while !is_ready(&client).await {
            if api.has_ended()? || begun.elapsed() > STARTS {
                bail!(
                    "the API server does not start:\n{}",
                    fs::read_to_string(folder.join("kube-apiserver.log"))?
                );
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        let manager = Process::start(
            &folder.join("kube-controller-manager.log"),
            Command::new(manager)
                .arg(format!("--kubeconfig={}", kubeconfig.display()))
                .arg(format!("--controllers={CONTROLLERS}"))
                // Its own limits are not what is measured.
                .args(["--kube-api-qps=500", "--kube-api-burst=1000"])
                .args(["--leader-elect=false", "--secure-port=0"]),
        )?;
        Ok(Self {
            _manager: manager,
            _api: api,
            _etcd: etcd,
            folder: folder.to_owned(),
            url,
            client,
            chart: Chart::render()?,
        })
    }

    /// A kubeconfig for somebody.
    pub(crate) fn kubeconfig(&self, who: Who<'_>) -> Result<PathBuf> {
        write_kubeconfig(&self.folder, &self.url, who)
    }

    /// The changes that somebody asked for since that time: when, and what.
    pub(crate) fn changes_of(
        &self,
        who: Who<'_>,
        since: Timestamp,
    ) -> Result<Vec<(Timestamp, String)>> {
        let log = fs::read_to_string(audit_log(&self.folder)).unwrap_or_default();
        let mut changes = Vec::new();
        for line in log.lines() {
            // The last line may be half written.
            let Ok(entry) = serde_json::from_str::<Value>(line) else {
                continue;
            };
            let time: Timestamp = entry["requestReceivedTimestamp"]
                .as_str()
                .context("no time in the audit log")?
                .parse()?;
            if entry["user"]["uid"] == who.token() && time > since {
                let (verb, uri) = (entry["verb"].as_str(), entry["requestURI"].as_str());
                let code = &entry["responseStatus"]["code"];
                let what = format!("{} {} {code}", verb.unwrap_or("?"), uri.unwrap_or("?"));
                changes.push((time, what));
            }
        }
        Ok(changes)
    }
}

fn audit_log(folder: &Path) -> PathBuf {
    folder.join("audit.log")
}

fn write_kubeconfig(folder: &Path, url: &str, who: Who<'_>) -> Result<PathBuf> {
    let token = who.token();
    let path = folder.join(format!("kubeconfig-{token}"));
    let text = serde_json::json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "test",
        "clusters": [{"name": "test", "cluster": {
            "server": url, "insecure-skip-tls-verify": true,
        }}],
        "users": [{"name": "user", "user": {"token": token}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "user"}}],
    });
    fs::write(&path, text.to_string())?;
    Ok(path)
}

async fn is_ready(client: &Client) -> bool {
    let namespaces: Api<Namespace> = Api::all(client.clone());
    namespaces.get("default").await.is_ok()
}
