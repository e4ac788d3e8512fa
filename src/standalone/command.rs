//! `hawser standalone`: from the command line to the end of the process.

use std::collections::BTreeSet;
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use rustix::fs::Mode;

use crate::attach::{self, Attacher};
use crate::csi::{self, NodeServices};
use crate::daemon::{self, Endpoint, Stop};
use crate::metrics::Calls;
use crate::proto::socket;
use crate::storage::Overcommit;
use crate::tls;
use crate::volumes::NodeVolumes;

use super::{Installation, Settings};

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
    #[arg(long, value_name = "NAME", value_parser = daemon::node_name)]
    node_id: String,
    /// Serve the Controller service only: this machine attaches no volumes.
    #[arg(long)]
    no_node: bool,
    /// Further nodes to which volumes can be attached. May be repeated.
    #[arg(long, value_name = "NAME", value_parser = daemon::node_name)]
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

/// Serves until told to stop.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    // Nothing that is made here is for others.
    rustix::process::umask(Mode::RWXG | Mode::RWXO);
    daemon::run(serve(args))
}

async fn serve(args: Args) -> anyhow::Result<()> {
    let stop = Stop::listen().context("listen to signals")?;
    tls::warm_up();
    let installation = Installation::open(settings(&args)?)?;
    let renewal = {
        let installation = installation.clone();
        tokio::spawn(async move { installation.renew_certificates().await })
    };
    let path = args.endpoint.path();
    let listener = socket::listen(path)
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
        calls: Calls::default(),
    });
    let _ = writeln!(
        std::io::stdout(),
        "serving CSI on unix://{}",
        path.display()
    );
    let served = daemon::serve_until(router, listener, stop.told()).await;
    served.context("serve CSI")?;
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
