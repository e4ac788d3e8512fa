//! `hawser controller`: answers CSI's Controller calls, and keeps each volume's server and Secrets.
//!
//! Every controller answers the sidecars of its own pod; the loops that keep things are the Lease's holder's.

mod authority;
mod certificates;
pub(crate) mod metrics;
mod news;
mod pools;
mod reconcile;
mod rotation;
mod server;
mod status;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use kube::Client;

use self::metrics::Metrics;
use self::reconcile::Keeper;
use self::server::ServerPods;
use super::lease::{self, Candidate, Tenure};
use super::volumes::{ClusterVolumes, View};
use crate::csi;
use crate::daemon::{self, Endpoint, Stop};
use crate::listen::Listen;
use crate::metrics::Calls;
use crate::proto::socket;
use crate::tls;
use crate::volumes::AttachmentId;

/// How long the Lease may take to be let go at the end.
const RELEASE: Duration = Duration::from_secs(3);

/// Answer the CSI sidecars, and keep the volumes' servers and certificates, in a cluster.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The CSI socket to make.
    #[arg(long, value_name = "unix:///SOCKET")]
    endpoint: Endpoint,
    /// The namespace of the volumes, their servers and Secrets.
    #[arg(long, value_name = "NAME")]
    namespace: String,
    /// The image that volumes are served with.
    #[arg(long, value_name = "IMAGE")]
    image: String,
    /// Where to answer health checks.
    #[arg(long, value_name = "[ADDRESS]:PORT")]
    health: Option<Listen>,
    #[command(flatten)]
    metrics: crate::metrics::Args,
    /// The Lease whose holder keeps servers and certificates.
    #[arg(long, value_name = "NAME", default_value = "hawser-controller")]
    lease: String,
    /// What every server's pod is to have, as JSON: resources, tolerations, priorityClassName, labels and so on.
    #[arg(long, value_name = "FILE")]
    server_pods: Option<PathBuf>,
    /// How long everybody is given to read what is written for a change of the managed authority.
    #[arg(long, value_name = "SECONDS", default_value = "3600", value_parser = seconds)]
    authority_overlap: Duration,
    /// What this controller is called in the Lease.
    #[arg(
        long,
        value_name = "NAME",
        env = "POD_NAME",
        default_value = "controller"
    )]
    name: String,
}

fn seconds(text: &str) -> Result<Duration, std::num::ParseIntError> {
    text.parse().map(Duration::from_secs)
}

/// Serves until told to stop.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    daemon::run(serve(args))
}

async fn serve(args: Args) -> anyhow::Result<()> {
    let stop = Stop::listen().context("listen to signals")?;
    tls::warm_up();
    let pods = ServerPods::load(args.server_pods.as_deref())?;
    let client = Client::try_default()
        .await
        .context("find the API server (run in a pod, or set KUBECONFIG)")?;
    let ready = Arc::new(AtomicBool::new(false));
    if let Some(listen) = args.health {
        let ready = Arc::clone(&ready);
        let check = move || {
            let is_ready = ready.load(Ordering::Relaxed);
            async move {
                match is_ready {
                    true => Ok(()),
                    false => Err("the API server has not told what there is yet".to_owned()),
                }
            }
        };
        daemon::serve_health(listen, || async { Ok(()) }, check)
            .await
            .with_context(|| format!("answer health checks on {listen}"))?;
    }
    let view = View::watch(&client, &args.namespace);
    let mut told = Box::pin(stop.told());
    // Before everything is known, the answers would be wrong.
    tokio::select! {
        () = view.complete() => {}
        () = &mut told => return Ok(()),
    }
    let volumes = ClusterVolumes::new(client.clone(), &args.namespace, view.clone());
    let (metrics, calls) = (Metrics::default(), Calls::default());
    let known = {
        let view = view.clone();
        move || view.volumes()
    };
    args.metrics
        .serve(metrics.exposition(&calls, known))
        .await?;
    let tenure = Tenure::default();
    let fenced = tenure.bind(client.clone());
    let keeper = Keeper::new(
        fenced,
        &args.namespace,
        view,
        args.image,
        pods,
        metrics.clone(),
        args.authority_overlap,
    );
    // A container that was restarted is another one, though its pod's name is the same.
    let me = format!("{}_{}", args.name, AttachmentId::random()?);
    let candidate = Candidate::new(
        client.clone(),
        &args.namespace,
        &args.lease,
        me.clone(),
        tenure,
    );
    let work = move || {
        let (keeper, metrics) = (keeper.clone(), metrics.clone());
        async move {
            let _leading = metrics.lead();
            keeper.run().await;
        }
    };
    let election = tokio::spawn(candidate.run(work));
    let path = args.endpoint.path();
    let listener = socket::bind(path).with_context(|| format!("listen on {}", path.display()))?;
    ready.store(true, Ordering::Relaxed);
    tracing::info!(endpoint = %path.display(), "serving CSI");
    let router = csi::router(csi::Services {
        controller: Some(Arc::new(volumes)),
        node: None,
        calls,
    });
    let served = daemon::serve_until(router, listener, told).await;
    election.abort();
    // Once the task is over, nothing is kept any more.
    let _ = election.await;
    let released = lease::release(client, &args.namespace, &args.lease, &me);
    match tokio::time::timeout(RELEASE, released).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(%error, "the Lease is not let go; it ends by itself"),
        Err(_) => tracing::warn!("the Lease is not let go in time; it ends by itself"),
    }
    served.context("serve CSI")?;
    std::fs::remove_file(path).with_context(|| format!("remove {}", path.display()))
}
