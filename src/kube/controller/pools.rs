//! What people see of a pool at a glance.

use std::time::Duration;

use kube::{Api, Client};
use serde_json::json;

use super::status::size;
use crate::kube::api::{CONTROLLER, NbdPool, NbdPoolStatus};
use crate::kube::apply::apply_status;
use crate::kube::volumes::View;

/// How often pools are looked at: agents write theirs once a minute.
const EVERY: Duration = Duration::from_secs(10);

/// Healthy nodes of all nodes, and what may still be promised there.
fn summary(status: &NbdPoolStatus) -> (String, String) {
    let healthy: Vec<_> = status.nodes.iter().filter(|node| node.healthy).collect();
    let available = healthy.iter().map(|node| node.available_bytes).sum();
    (
        format!("{}/{}", healthy.len(), status.nodes.len()),
        size(available),
    )
}

/// Keeps the summaries of all pools, for ever.
pub(super) async fn keep(client: Client, view: View) {
    let api: Api<NbdPool> = Api::all(client);
    loop {
        for pool in view.pools() {
            let status = pool.status.clone().unwrap_or_default();
            let (healthy, available) = summary(&status);
            if status.healthy.as_ref() == Some(&healthy)
                && status.available.as_ref() == Some(&available)
            {
                continue;
            }
            let said = json!({ "healthy": healthy, "available": available });
            if let Err(error) = apply_status(&api, &pool, CONTROLLER, &said).await {
                tracing::warn!(%error, "cannot write the summary of a pool");
            }
        }
        tokio::time::sleep(EVERY).await;
    }
}
