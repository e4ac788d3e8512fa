//! What people see of a pool at a glance.

use std::time::Duration;

use kube::{Api, Client};

use super::status::size;
use crate::kube::api::{CONTROLLER, NbdPool, NbdPoolStatus};
use crate::kube::apply::apply_status;
use crate::kube::volumes::View;

/// How often pools are looked at: agents write theirs once a minute.
const EVERY: Duration = Duration::from_secs(10);

/// Nodes that are named with what is wrong with them: a person begins with some.
const NAMED: usize = 5;

/// What is said of a pool: healthy nodes of all nodes, what may still be promised there, and why the others are not.
fn summary(pool: &NbdPool, view: &View) -> NbdPoolStatus {
    let nodes = pool.status.as_ref().map(|status| status.nodes.as_slice());
    let nodes = nodes.unwrap_or_default();
    let closed: Vec<_> = nodes.iter().map(|node| view.closed(pool, node)).collect();
    let healthy = nodes.iter().zip(&closed).filter(|(_, why)| why.is_none());
    let available = healthy.clone().map(|(node, _)| node.available_bytes).sum();
    let mut why: Vec<_> = closed.iter().flatten().cloned().collect();
    if why.len() > NAMED {
        let more = format!("and {} nodes more", why.len() - NAMED);
        why.truncate(NAMED);
        why.push(more);
    }
    NbdPoolStatus {
        healthy: Some(format!("{}/{}", healthy.count(), nodes.len())),
        available: Some(size(available)),
        message: (!why.is_empty()).then(|| why.join("; ")),
        ..NbdPoolStatus::default()
    }
}

/// Keeps the summaries of all pools, for ever.
pub(super) async fn keep(client: Client, view: View) {
    let api: Api<NbdPool> = Api::all(client);
    loop {
        for pool in view.pools() {
            let said = summary(&pool, &view);
            let is_said = pool.status.as_ref().is_some_and(|now| {
                (&now.healthy, &now.available, &now.message)
                    == (&said.healthy, &said.available, &said.message)
            });
            if is_said {
                continue;
            }
            if let Err(error) = apply_status(&api, &pool, CONTROLLER, &said).await {
                tracing::warn!(%error, "cannot write the summary of a pool");
            }
        }
        tokio::time::sleep(EVERY).await;
    }
}
