//! `hawser agent`: from the command line to the end of the process.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use kube::Client;
use kube::runtime::watcher;
use rustix::fs::Mode;
use tokio::sync::mpsc;

use super::{Agent, queue};
use crate::daemon::{self, Stop};
use crate::kube::follow::follow;
use crate::listen::Listen;
use crate::metrics;

/// The keeper of the pools on a storage node: makes, grows and deletes volumes, and tells their servers who may connect.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// This node's name.
    #[arg(long, value_name = "NAME", env = "NODE_NAME", value_parser = daemon::node_name)]
    node: String,
    /// The namespace of the driver's objects.
    #[arg(long, value_name = "NAME", env = "POD_NAMESPACE")]
    namespace: String,
    /// Where the node's directories are seen: a pool's is looked for there, by its path on the node.
    #[arg(long, value_name = "DIR", default_value = "/")]
    host_root: PathBuf,
    /// Where to answer health checks, over HTTP.
    #[arg(long, value_name = "[ADDRESS]:PORT")]
    health: Option<Listen>,
    #[command(flatten)]
    metrics: metrics::Args,
}

/// Works until told to stop.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    // Nothing that is made here is for others.
    rustix::process::umask(Mode::RWXG | Mode::RWXO);
    daemon::run(work(args))
}

async fn work(args: Args) -> anyhow::Result<()> {
    let stop = Stop::listen().context("listen to signals")?;
    let client = Client::try_default()
        .await
        .context("find out how to reach the API server")?;
    let (ask, asked) = mpsc::unbounded_channel();
    let agent = Arc::new(Agent::new(
        &client,
        &args.namespace,
        &args.node,
        &args.host_root,
        ask,
    ));
    args.metrics.serve(agent.metrics.exposition()).await?;
    if let Some(listen) = args.health {
        let heard = agent.heard.subscribe();
        let ready = move || {
            let heard = *heard.borrow();
            async move {
                match heard.everything() {
                    true => Ok(()),
                    false => Err("the API server was not heard yet".to_owned()),
                }
            }
        };
        daemon::serve_health(listen, || async { Ok(()) }, ready)
            .await
            .with_context(|| format!("answer health checks on {listen}"))?;
    }
    let this_node = watcher::Config::default().fields(&format!("metadata.name={}", args.node));
    let (one, two, three) = (Arc::clone(&agent), Arc::clone(&agent), Arc::clone(&agent));
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(follow(agent.nodes.clone(), this_node, move |seen| {
        one.see_node(seen);
    }));
    tasks.spawn(follow(
        agent.pool_objects.clone(),
        watcher::Config::default(),
        move |seen| two.see_pools(seen),
    ));
    tasks.spawn(follow(
        agent.volumes.clone(),
        watcher::Config::default(),
        move |seen| three.see_volumes(seen),
    ));
    tasks.spawn(Arc::clone(&agent).survey());
    tracing::info!(node = args.node, "looking after this node's pools");
    tokio::select! {
        () = attend(&agent, asked) => {}
        // None of them ends, unless it breaks.
        ended = tasks.join_next() => anyhow::bail!("a task broke: {ended:?}"),
        () = stop.told() => tracing::info!("shutting down"),
    }
    Ok(())
}

/// Looks at volumes once everything was heard: a volume whose pool is not known yet is not one without a pool.
async fn attend(agent: &Arc<Agent>, asked: mpsc::UnboundedReceiver<crate::volumes::VolumeId>) {
    let mut heard = agent.heard.subscribe();
    if heard.wait_for(|heard| heard.everything()).await.is_err() {
        return;
    }
    queue::run(asked, |id| Arc::clone(agent).look(id)).await;
}
