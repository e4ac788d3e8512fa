//! A real API server with its etcd, as bare as they can be, for tests that ask nothing of the rest of a cluster.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::core::v1::Namespace;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client};

const STARTS: Duration = Duration::from_secs(90);

/// A process that ends with its value.
pub(crate) struct Process(pub(crate) Child);

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

pub(crate) struct ApiServer {
    _api: Process,
    _etcd: Process,
    pub(crate) url: String,
    pub(crate) client: Client,
}

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
    /// Everything of it is in the folder. The administrator's token is `admin`; more users are lines of `tokens`, and more
    /// options of the API server are `options`.
    pub(crate) async fn start(folder: &Path, tokens: &str, options: &[String]) -> Result<Self> {
        let cache = cache()?;
        let program = cache.join("bin/kube-apiserver");
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
        let users = folder.join("tokens.csv");
        fs::write(
            &users,
            format!("admin,admin,admin,system:masters\n{tokens}"),
        )?;
        let mut api = Process::start(
            &folder.join("kube-apiserver.log"),
            Command::new(&program)
                .arg(format!("--etcd-servers={etcd_url}"))
                .arg(format!("--secure-port={port}"))
                .args(["--bind-address=127.0.0.1", "--advertise-address=192.0.2.1"])
                .arg(format!("--cert-dir={}", folder.display()))
                .arg(format!("--token-auth-file={}", users.display()))
                .arg(format!("--service-account-key-file={}", key.display()))
                .arg(format!(
                    "--service-account-signing-key-file={}",
                    key.display()
                ))
                .args([
                    "--service-account-issuer=https://cluster.test",
                    "--service-cluster-ip-range=198.19.0.0/16",
                    "--authorization-mode=RBAC",
                    // Nobody makes accounts here.
                    "--disable-admission-plugins=ServiceAccount",
                    "--shutdown-delay-duration=0s",
                ])
                .args(options),
        )?;
        let url = format!("https://127.0.0.1:{port}");
        let kubeconfig = write_kubeconfig(folder, &url, "admin")?;
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
        Ok(Self {
            _api: api,
            _etcd: etcd,
            url,
            client,
        })
    }
}

/// A kubeconfig for who has that token.
pub(crate) fn write_kubeconfig(folder: &Path, url: &str, token: &str) -> Result<PathBuf> {
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
