//! `hawser standalone`: from the command line to the end of the process.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use rustix::fs::Mode;
use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::net::UnixListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{Instant, sleep};
use tokio_stream::wrappers::UnixListenerStream;

use crate::attach::{self, Attacher};
use crate::csi::{self, NodeServices};
use crate::proto::socket;
use crate::storage::Overcommit;
use crate::tls;
use crate::volumes::NodeVolumes;

use super::{Installation, Settings};

/// How long CSI calls that are under way may take to be answered at the end.
const ANSWERS: Duration = Duration::from_secs(30);

/// How long the socket of an owner that was just killed may take to go, and how often it is asked for.
const LET_GO: Duration = Duration::from_secs(1);
const ASK_AGAIN: Duration = Duration::from_millis(20);

/// Serve volumes over CSI on one machine, without a cluster.
///
/// Each volume has a server process of its own. Servers go on when this process ends or is killed, and are found again
/// when it starts: attached volumes do not notice. A service manager must not end them with it: with systemd, set
/// KillMode=process.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where this machine's state is: sockets and logs of the servers.
    #[arg(long, value_name = "DIR")]
    state: PathBuf,
    /// Where the certificate authority and the volumes' Secrets are.
    #[arg(long, value_name = "DIR")]
    secrets: PathBuf,
    /// Where the volumes' data is.
    #[arg(long, value_name = "DIR")]
    pool: PathBuf,
    /// The CSI socket to make.
    #[arg(long, value_name = "unix:///SOCKET")]
    endpoint: Endpoint,
    /// What this machine is called as a node.
    #[arg(long, value_name = "NAME", value_parser = node_name)]
    node_id: String,
    /// Serve the Controller service only: this machine attaches no volumes.
    #[arg(long)]
    no_node: bool,
    /// Further nodes to which volumes can be attached. May be repeated.
    #[arg(long, value_name = "NAME", value_parser = node_name)]
    other_node: Vec<String>,
    /// How many times its room the pool may promise.
    #[arg(long, value_name = "RATIO", default_value_t = Overcommit::NONE)]
    overcommit: Overcommit,
    /// Volumes that can be attached to one node at a time; 0 sets no limit.
    #[arg(long, value_name = "N", default_value_t = 0)]
    max_volumes_per_node: u32,
    /// Where the volumes' servers listen; with port 0 each takes a free one.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// End the servers too when this process is told to end.
    #[arg(long)]
    stop_servers: bool,
}

/// A unix socket as CSI's tools name it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Endpoint(PathBuf);

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let path = text
            .strip_prefix("unix://")
            .or_else(|| text.strip_prefix("unix:"));
        match path.map(Path::new) {
            Some(path) if path.is_absolute() => Ok(Self(path.to_owned())),
            _ => Err("expected unix:// and the absolute path of a socket".to_owned()),
        }
    }
}

/// CSI's limit on a node's id.
fn node_name(text: &str) -> Result<String, String> {
    match text.len() {
        1..=256 => Ok(text.to_owned()),
        length => Err(format!(
            "a node's name has 1 to 256 bytes, and this one has {length}"
        )),
    }
}

/// Serves until told to stop.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    // Nothing that is made here is for others.
    rustix::process::umask(Mode::RWXG | Mode::RWXO);
    allow_many_files();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("start the runtime")?;
    let ended = runtime.block_on(serve(args));
    runtime.shutdown_timeout(Duration::from_secs(5));
    ended.map(|()| ExitCode::SUCCESS)
}

/// A volume takes up to four open files here, and login sessions often start with 1024.
fn allow_many_files() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}

async fn serve(args: Args) -> anyhow::Result<()> {
    let stop = Stop::listen().context("listen to signals")?;
    tls::warm_up();
    let installation = Installation::open(settings(&args)?)?;
    let renewal = {
        let installation = installation.clone();
        tokio::spawn(async move { installation.renew_certificates().await })
    };
    let Endpoint(path) = &args.endpoint;
    let listener = listen(path)
        .await
        .with_context(|| format!("listen on {}", path.display()))?;
    let node = if args.no_node {
        None
    } else {
        Some(node(&args, &installation).await?)
    };
    let router = csi::router(csi::Services {
        controller: Some(Arc::new(installation.clone())),
        node,
    });
    let _ = writeln!(
        std::io::stdout(),
        "serving CSI on unix://{}",
        path.display()
    );
    let (told, answered) = tokio::sync::oneshot::channel();
    let served = router.serve_with_incoming_shutdown(UnixListenerStream::new(listener), async {
        stop.told().await;
        tracing::info!("shutting down");
        let _ = told.send(());
    });
    tokio::select! {
        served = served => served.context("serve CSI")?,
        () = too_long(answered) => tracing::warn!("calls that are under way are not answered any more"),
    }
    renewal.abort();
    installation.close(args.stop_servers).await;
    std::fs::remove_file(path).with_context(|| format!("remove {}", path.display()))
}

/// The node part: first of all it looks after the devices that an earlier process left.
async fn node(args: &Args, installation: &Installation) -> anyhow::Result<NodeServices> {
    let volumes: Arc<dyn NodeVolumes> = Arc::new(installation.clone());
    let state = std::path::absolute(args.state.join("node")).context("find the state directory")?;
    let config = attach::Config {
        state: state.join("devices"),
        proxy_allowed: true,
    };
    let attacher = Attacher::new(config, Arc::clone(&volumes))?;
    match attacher.recover().await {
        Ok(devices) => {
            for device in devices {
                tracing::info!(?device, "a device of an earlier process");
            }
        }
        // The volumes' servers and the Controller service do not need the kernel.
        Err(error) => tracing::warn!(
            error = &error as &dyn std::error::Error,
            "the devices of earlier processes cannot be looked after"
        ),
    }
    Ok(NodeServices {
        node_id: args.node_id.clone(),
        maximum_volumes: args.max_volumes_per_node,
        volumes,
        devices: Arc::new(attacher),
        state: state.join("volumes"),
    })
}

/// An owner that was just killed may seem to listen still, through a server that it was starting at that moment.
async fn listen(path: &Path) -> std::io::Result<UnixListener> {
    let deadline = Instant::now() + LET_GO;
    loop {
        match socket::bind(path) {
            Err(error) if error.kind() == ErrorKind::AddrInUse && Instant::now() < deadline => {
                sleep(ASK_AGAIN).await;
            }
            bound => return bound,
        }
    }
}

fn settings(args: &Args) -> anyhow::Result<Settings> {
    let absolute = |path: &Path| {
        std::path::absolute(path).with_context(|| format!("make {} absolute", path.display()))
    };
    let nodes = std::iter::once(&args.node_id).chain(&args.other_node);
    Ok(Settings {
        // Servers outlive the directory that this process was started in.
        state: absolute(&args.state)?,
        secrets: absolute(&args.secrets)?,
        pool: absolute(&args.pool)?,
        overcommit: args.overcommit,
        program: std::env::current_exe().context("find this program")?,
        listen: args.listen,
        nodes: nodes.cloned().collect::<BTreeSet<_>>(),
        volumes_per_node: (args.max_volumes_per_node > 0)
            .then_some(args.max_volumes_per_node.into()),
    })
}

async fn too_long(answered: tokio::sync::oneshot::Receiver<()>) {
    match answered.await {
        Ok(()) => sleep(ANSWERS).await,
        Err(_) => std::future::pending().await,
    }
}

/// The signals that end this process.
struct Stop {
    signals: [Signal; 3],
}

impl Stop {
    fn listen() -> std::io::Result<Self> {
        Ok(Self {
            signals: [
                signal(SignalKind::terminate())?,
                signal(SignalKind::interrupt())?,
                signal(SignalKind::hangup())?,
            ],
        })
    }

    async fn told(mut self) {
        let [terminate, interrupt, hang_up] = &mut self.signals;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            _ = hang_up.recv() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_absolute_unix_sockets() {
        for text in ["unix:///run/csi.sock", "unix:/run/csi.sock"] {
            assert_eq!(text.parse(), Ok(Endpoint("/run/csi.sock".into())));
        }
        for text in [
            "",
            "unix://",
            "unix://csi.sock",
            "tcp://1.2.3.4:5",
            "/run/csi.sock",
        ] {
            assert!(text.parse::<Endpoint>().is_err(), "{text}");
        }
    }
}
