//! `hawser node`: from the command line to the end of the process.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use kube::{Api, Client};
use rustix::fs::Mode;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::directory::Directory;
use super::keyring::Keyring;
use super::metrics::Metrics;
use super::notes::{Herald, Notes};
use super::registration::{Registered, Registrar, RegistrationSocket};
use super::volumes::ClusterVolumes;
use crate::attach::{self, Attacher};
use crate::csi::{self, DRIVER_NAME, NodeServices};
use crate::daemon::{self, Endpoint, Stop, chain};
use crate::listen::Listen;
use crate::metrics::{self, Calls};
use crate::proto::csi::ProbeRequest;
use crate::proto::csi::identity_client::IdentityClient;
use crate::proto::socket;
use crate::tls;
use crate::volumes::{NodeVolumes, VolumeId};

/// The plugin on a node of a cluster: makes devices of volumes, and mounts them.
///
/// Devices and mounts go on when this process ends or is killed, and are found again when it starts.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The CSI socket to make.
    #[arg(long, value_name = "unix:///SOCKET")]
    endpoint: Endpoint,
    /// The kubelet's directory of plugins to register, plugins_registry.
    #[arg(long, value_name = "DIR")]
    registration: PathBuf,
    /// The kubelet's own directory, as the kubelet sees it.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/kubelet")]
    kubelet_path: PathBuf,
    /// This node's name.
    #[arg(long, value_name = "NAME", env = "NODE_NAME", value_parser = daemon::node_name)]
    node: String,
    /// The namespace of the driver's objects.
    #[arg(long, value_name = "NAME", env = "POD_NAMESPACE")]
    namespace: String,
    /// Where this node's records are. They must outlive the process.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/hawser")]
    state: PathBuf,
    /// Where client keys are kept until a restarted plugin gets them anew: in memory, such as a tmpfs.
    #[arg(long, value_name = "DIR", default_value = "/run/hawser")]
    run: PathBuf,
    /// Where to answer health checks, over HTTP.
    #[arg(long, value_name = "[ADDRESS]:PORT")]
    health: Option<Listen>,
    #[command(flatten)]
    metrics: metrics::Args,
    /// Volumes that can be attached here at one time; without it, as many as the kernel can have devices.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_volumes: Option<u32>,
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
    let client = Client::try_default()
        .await
        .context("find out how to reach the API server")?;
    let (directory, moved) = Directory::new();
    let (notes, taken) = Notes::new();
    let (keyring, metrics) = (Arc::new(keyring(&args.run)), Metrics::default());
    let volumes: Arc<dyn NodeVolumes> = Arc::new(ClusterVolumes::new(
        &client,
        &args.namespace,
        &args.node,
        directory.clone(),
        Arc::clone(&keyring),
        notes,
        metrics.clone(),
    ));
    let objects = Api::namespaced(client.clone(), &args.namespace);
    tokio::spawn(directory.follow(objects));
    tokio::spawn(Herald::new(&client, &args.namespace, &args.node).say(taken));

    let maximum_volumes = args.max_volumes.unwrap_or_else(most_devices);
    let attacher = attacher(&args.state, Arc::clone(&volumes)).await?;
    tokio::spawn(follow_servers(attacher.clone(), moved));
    let calls = Calls::default();
    let router = csi::router(csi::Services {
        controller: None,
        node: Some(NodeServices {
            node_id: args.node.clone(),
            maximum_volumes,
            volumes,
            devices: Arc::new(attacher.clone()),
            state: args.state.join("volumes"),
        }),
        calls: calls.clone(),
    });
    let path = args.endpoint.path();
    let listener = socket::listen(path)
        .await
        .with_context(|| format!("listen on {}", path.display()))?;

    let (registered, registration) = watch::channel(Registered::default());
    let is_registered = {
        let registration = registration.clone();
        move || *registration.borrow() == Registered::Yes
    };
    let links = move || attacher.links().unwrap_or_default();
    let told = metrics.exposition(&calls, maximum_volumes, keyring, is_registered, links);
    args.metrics.serve(told).await?;
    if let Some(listen) = args.health {
        answer_health(listen, path, registration).await?;
    }
    let ending = CancellationToken::new();
    let told = ending.clone();
    tokio::spawn(async move {
        stop.told().await;
        told.cancel();
    });
    let served = daemon::serve_until(router, listener, ending.clone().cancelled_owned());
    let served = tokio::spawn(served);
    let socket = RegistrationSocket::make(&args.registration)
        .await
        .with_context(|| format!("listen in {}", args.registration.display()))?;
    let plugin = args.kubelet_path.join("plugins").join(DRIVER_NAME);
    let registrar = Registrar::new(&plugin.join("csi.sock"), registered);
    tracing::info!(node = args.node, maximum_volumes, "serving");
    let announced = socket.serve(registrar, ending.clone().cancelled_owned());
    let announced = announced.await.context("answer the kubelet");
    ending.cancel();
    served
        .await
        .context("serve CSI")?
        .context("serve CSI")
        .and(announced)?;
    std::fs::remove_file(path).with_context(|| format!("remove {}", path.display()))
}

fn keyring(directory: &Path) -> Keyring {
    Keyring::open(directory).unwrap_or_else(|error| {
        tracing::error!(
            error = chain(&error),
            "client keys are not kept beyond this process: after a restart, connections that break are mended only \
             when the kubelet brings the keys anew, in a minute or two"
        );
        Keyring::forgetful()
    })
}

/// The kernel's devices, those first that an earlier process left.
async fn attacher(state: &Path, volumes: Arc<dyn NodeVolumes>) -> anyhow::Result<Attacher> {
    let config = attach::Config {
        state: state.join("devices"),
        proxy_allowed: true,
    };
    let proxy_allowed = config.proxy_allowed;
    let surveyed = tokio::task::spawn_blocking(move || attach::survey(proxy_allowed)).await?;
    match surveyed {
        Ok(transport) => tracing::info!(?transport, "this node can have devices"),
        // It is tried again with each attach: somebody may load the module until then.
        Err(error) => tracing::error!(error = chain(&error), "no volume can be attached here"),
    }
    let attacher = Attacher::new(config, volumes)?;
    if let Err(error) = attacher.recover().await {
        let error = chain(&error);
        tracing::error!(
            error,
            "the devices of earlier processes cannot be looked after"
        );
    }
    Ok(attacher)
}

fn most_devices() -> u32 {
    attach::most_devices()
}

async fn follow_servers(attacher: Attacher, mut moved: mpsc::UnboundedReceiver<VolumeId>) {
    while let Some(volume) = moved.recv().await {
        attacher.server_moved(&volume);
    }
}

/// Alive is a plugin that answers on its socket and was not refused by the kubelet, ready one that was registered.
async fn answer_health(
    listen: Listen,
    socket: &Path,
    registration: watch::Receiver<Registered>,
) -> anyhow::Result<()> {
    let live = {
        let (socket, registration) = (socket.to_owned(), registration.clone());
        move || {
            let (socket, registered) = (socket.clone(), registration.borrow().check());
            async move {
                registered?;
                probe(&socket).await
            }
        }
    };
    let ready = move || {
        let registered = registration.borrow().clone();
        async move {
            match registered {
                Registered::Awaited => Err("the kubelet has not called yet".to_owned()),
                registered => registered.check(),
            }
        }
    };
    daemon::serve_health(listen, live, ready)
        .await
        .with_context(|| format!("answer health checks on {listen}"))
}

/// Asks the plugin on its own socket, as a kubelet would.
async fn probe(path: &Path) -> Result<(), String> {
    let channel = socket::connect(path).await.map_err(|error| chain(&error))?;
    let answer = IdentityClient::new(channel).probe(ProbeRequest {}).await;
    match answer.map(|answer| answer.into_inner().ready) {
        Ok(Some(false)) => Err("the plugin is not ready".to_owned()),
        Ok(_) => Ok(()),
        Err(status) => Err(format!("the plugin does not answer: {}", status.message())),
    }
}
