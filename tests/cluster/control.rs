//! The control plane: etcd, API server, controller manager and scheduler, as processes in the cluster's network.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use super::network::{GATEWAY, SERVICES};
use super::process::{Process, output};
use super::tools::Tools;
use super::until;

/// The user of all nodes' kube-proxy.
pub(crate) const PROXY: &str = "kube-proxy";

const STARTS: Duration = Duration::from_secs(120);

pub(crate) struct ControlPlane {
    tools: Tools,
    folder: PathBuf,
    logs: PathBuf,
    api: Option<Process>,
    others: Vec<Process>,
}

impl ControlPlane {
    /// Starts it with these nodes' names as users, and waits for the API server.
    pub(crate) fn start(
        tools: &Tools,
        folder: &Path,
        logs: &Path,
        nodes: &[String],
    ) -> Result<Self> {
        let folder = folder.join("control");
        fs::create_dir_all(&folder)?;
        let key = folder.join("accounts.key");
        output(
            Command::new("openssl")
                .args(["genrsa", "-out"])
                .arg(&key)
                .arg("2048"),
        )?;
        let mut tokens =
            format!("admin,admin,admin,system:masters\n{PROXY},system:{PROXY},{PROXY}\n");
        for node in nodes {
            tokens += &format!("{node},system:node:{node},{node},system:nodes\n");
        }
        fs::write(folder.join("tokens.csv"), tokens)?;
        let mut plane = Self {
            tools: tools.clone(),
            folder,
            logs: logs.to_owned(),
            api: None,
            others: Vec::new(),
        };
        plane.write_kubeconfig("admin", &plane.kubeconfig())?;
        let mut etcd = tools.debian("etcd");
        etcd.args(["--unsafe-no-fsync", "--log-level=warn"])
            .arg(format!(
                "--data-dir={}",
                plane.folder.join("etcd").display()
            ))
            .args([
                "--listen-client-urls=http://127.0.0.1:2379",
                "--advertise-client-urls=http://127.0.0.1:2379",
            ])
            .args(["--listen-peer-urls=http://127.0.0.1:2380"]);
        plane.other("etcd", &mut etcd)?;
        plane.start_api_server()?;
        plane.other(
            "kube-controller-manager",
            tools
                .kubernetes("kube-controller-manager")
                .arg(format!("--kubeconfig={}", plane.kubeconfig().display()))
                .arg(format!(
                    "--service-account-private-key-file={}",
                    key.display()
                ))
                .arg(format!(
                    "--root-ca-file={}",
                    plane.folder.join("apiserver.crt").display()
                ))
                .arg(format!(
                    "--cert-dir={}",
                    plane.folder.join("manager").display()
                ))
                // A dead node is noticed when it has missed five renewals of its Lease.
                .args([
                    "--use-service-account-credentials",
                    "--node-monitor-grace-period=16s",
                    "--node-monitor-period=2s",
                    "--leader-elect=false",
                ])
                .args(["--kube-api-qps=200", "--kube-api-burst=400"])
                .arg("--pvclaimbinder-sync-period=5s"),
        )?;
        plane.other(
            "kube-scheduler",
            tools
                .kubernetes("kube-scheduler")
                .arg(format!("--kubeconfig={}", plane.kubeconfig().display()))
                .arg(format!(
                    "--cert-dir={}",
                    plane.folder.join("scheduler").display()
                ))
                .arg("--leader-elect=false"),
        )?;
        Ok(plane)
    }

    /// The administrator's.
    pub(crate) fn kubeconfig(&self) -> PathBuf {
        self.folder.join("kubeconfig")
    }

    /// For a user by the token of that name.
    pub(crate) fn write_kubeconfig(&self, token: &str, path: &Path) -> Result<()> {
        let text = serde_json::json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "cluster",
            "clusters": [{"name": "cluster", "cluster": {
                "server": format!("https://{GATEWAY}:6443"), "insecure-skip-tls-verify": true,
            }}],
            "users": [{"name": "user", "user": {"token": token}}],
            "contexts": [{"name": "cluster", "context": {"cluster": "cluster", "user": "user"}}],
        });
        fs::write(path, text.to_string()).with_context(|| format!("writing {}", path.display()))
    }

    pub(crate) fn start_api_server(&mut self) -> Result<()> {
        let key = self.folder.join("accounts.key");
        let mut command = self.tools.kubernetes("kube-apiserver");
        command
            .args(["--etcd-servers=http://127.0.0.1:2379", "--secure-port=6443"])
            .arg(format!("--advertise-address={GATEWAY}"))
            .arg(format!("--service-cluster-ip-range={SERVICES}"))
            .arg(format!("--cert-dir={}", self.folder.display()))
            .arg(format!(
                "--token-auth-file={}",
                self.folder.join("tokens.csv").display()
            ))
            .arg(format!("--service-account-key-file={}", key.display()))
            .arg(format!(
                "--service-account-signing-key-file={}",
                key.display()
            ))
            .args([
                "--service-account-issuer=https://cluster.test",
                "--authorization-mode=Node,RBAC",
            ])
            .args([
                "--allow-privileged",
                "--enable-admission-plugins=NodeRestriction",
            ])
            // Names of nodes are in no DNS.
            .arg("--kubelet-preferred-address-types=InternalIP")
            .args([
                "--endpoint-reconciler-type=lease",
                "--shutdown-delay-duration=0s",
            ]);
        self.api = Some(Process::start("kube-apiserver", &self.logs, &mut command)?);
        until("the API server is ready", STARTS, || {
            if let Some(Err(dead)) = self.api.as_mut().map(Process::lives) {
                return Ok(Some(Err(dead)));
            }
            let ready = output(
                self.tools
                    .kubernetes("kubectl")
                    .arg(format!(
                        "--kubeconfig={}",
                        self.folder.join("kubeconfig").display()
                    ))
                    .args(["get", "--raw", "/readyz", "--request-timeout=5s"]),
            );
            Ok(ready.is_ok().then_some(Ok(())))
        })?
    }

    /// As a crash of it.
    pub(crate) fn stop_api_server(&mut self) {
        self.api = None;
    }

    fn other(&mut self, name: &str, command: &mut Command) -> Result<()> {
        self.others.push(Process::start(name, &self.logs, command)?);
        Ok(())
    }
}
