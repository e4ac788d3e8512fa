//! A real API server with its etcd and those controllers of Kubernetes' own that volumes have to do with: no
//! scheduler, no kubelet.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use serde_json::Value;

use crate::api_server::{self, write_kubeconfig};
pub(crate) use crate::api_server::{Process, cache};
use crate::chart::{self, Chart};

impl Process {
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
}

/// What kube-controller-manager runs: it binds claims, counts quotas, and removes what belongs to nobody.
const CONTROLLERS: &str = "persistentvolume-binder-controller,persistentvolume-protection-controller,\
    persistentvolumeclaim-protection-controller,garbage-collector-controller,resourcequota-controller";

pub(crate) struct ApiServer {
    // They end in this order.
    _manager: Process,
    bare: api_server::ApiServer,
    folder: PathBuf,
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

/// The tokens of the controllers in these namespaces.
fn tokens(namespaces: &[String]) -> String {
    let mut tokens = String::new();
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

impl ApiServer {
    pub(crate) async fn start(folder: &Path, namespaces: &[String]) -> Result<Self> {
        let audit = folder.join("audit.yaml");
        fs::write(&audit, AUDIT)?;
        let options = [
            format!("--audit-policy-file={}", audit.display()),
            format!("--audit-log-path={}", audit_log(folder).display()),
        ];
        let bare = api_server::ApiServer::start(folder, &tokens(namespaces), &options).await?;
        let kubeconfig = write_kubeconfig(folder, &bare.url, &Who::Admin.token())?;
        let manager = Process::start(
            &folder.join("kube-controller-manager.log"),
            Command::new(cache()?.join("bin/kube-controller-manager"))
                .arg(format!("--kubeconfig={}", kubeconfig.display()))
                .arg(format!("--controllers={CONTROLLERS}"))
                // Its own limits are not what is measured.
                .args(["--kube-api-qps=500", "--kube-api-burst=1000"])
                .args(["--leader-elect=false", "--secure-port=0"]),
        )?;
        Ok(Self {
            _manager: manager,
            client: bare.client.clone(),
            bare,
            folder: folder.to_owned(),
            chart: Chart::render()?,
        })
    }

    /// A kubeconfig for somebody.
    pub(crate) fn kubeconfig(&self, who: Who<'_>) -> Result<PathBuf> {
        write_kubeconfig(&self.folder, &self.bare.url, &who.token())
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
