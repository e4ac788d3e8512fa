//! The parts of a cluster that are played here: the agent, and what makes pods of StatefulSets.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Result;
use hawser::kube::api::{
    AGENT, AttachmentState, AttachmentStatus, BACKING_FINALIZER, BACKING_READY, NbdPool, NbdVolume,
    NbdVolumeStatus, SERVER_FINALIZER, agent_manager, condition, now,
};
use hawser::kube::apply::apply_status;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, Client, ResourceExt};
use serde_json::json;
use tokio::task::JoinHandle;

const TURN: Duration = Duration::from_millis(100);

/// What the agents of all nodes do, one look after the other.
pub(crate) struct Agent {
    /// Whether it does anything.
    pub(crate) is_awake: Arc<AtomicBool>,
    task: JoinHandle<()>,
}

impl Agent {
    pub(crate) fn start(client: Client, namespace: &str) -> Self {
        let is_awake = Arc::new(AtomicBool::new(true));
        let awake = Arc::clone(&is_awake);
        let api: Api<NbdVolume> = Api::namespaced(client, namespace);
        let task = tokio::spawn(async move {
            loop {
                if awake.load(Ordering::SeqCst)
                    && let Ok(all) = api.list(&ListParams::default()).await
                {
                    for volume in all {
                        // Overtaken or not, the next look is near.
                        let _ = look_after(&api, &volume).await;
                    }
                }
                tokio::time::sleep(TURN).await;
            }
        });
        Self { is_awake, task }
    }

    pub(crate) fn sleeps(&self, asleep: bool) {
        self.is_awake.store(!asleep, Ordering::SeqCst);
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn look_after(api: &Api<NbdVolume>, volume: &NbdVolume) -> Result<()> {
    let held = |name: &str| volume.finalizers().iter().any(|held| held == name);
    if volume.metadata.deletion_timestamp.is_some() && !held(SERVER_FINALIZER) {
        if held(BACKING_FINALIZER) {
            let patch = json!({ "metadata": { "finalizers": null } });
            api.patch(
                &volume.name_any(),
                &PatchParams::default(),
                &Patch::Merge(patch),
            )
            .await?;
        }
        return Ok(());
    }
    let old = volume.status.clone().unwrap_or_default();
    let attachments = volume.spec.attachments.iter().map(|one| AttachmentStatus {
        id: one.id.clone(),
        state: Some(match one.revoked {
            true => AttachmentState::Revoked,
            false => AttachmentState::Allowed,
        }),
        ..AttachmentStatus::default()
    });
    let status = NbdVolumeStatus {
        size_bytes: Some(volume.spec.size_bytes),
        epoch: Some(1),
        conditions: vec![condition(
            &old.conditions,
            BACKING_READY,
            Some(true),
            "Made",
            "",
            None,
        )],
        attachments: attachments.collect(),
        ..NbdVolumeStatus::default()
    };
    apply_status(api, volume, AGENT, &status).await?;
    Ok(())
}

/// Has a node report its share of a pool.
pub(crate) async fn report(client: &Client, pool: &str, node: &str, bytes: u64) -> Result<()> {
    let api: Api<NbdPool> = Api::all(client.clone());
    let pool = api.get(pool).await?;
    let share = json!({ "nodes": [{
        "name": node, "capacityBytes": bytes, "availableBytes": bytes,
        "maximumVolumeBytes": bytes, "healthy": true, "lastSeen": now(),
    }]});
    apply_status(&api, &pool, &agent_manager(node), &share).await?;
    Ok(())
}

/// Makes pods of StatefulSets, and ends those whose StatefulSet is gone.
pub(crate) fn kubelet(client: Client, namespace: &str) -> JoinHandle<()> {
    let sets: Api<StatefulSet> = Api::namespaced(client.clone(), namespace);
    let pods: Api<Pod> = Api::namespaced(client, namespace);
    tokio::spawn(async move {
        loop {
            // Whatever fails is tried again.
            let _ = run_pods(&sets, &pods).await;
            tokio::time::sleep(TURN).await;
        }
    })
}

async fn run_pods(sets: &Api<StatefulSet>, pods: &Api<Pod>) -> Result<()> {
    let wanted = sets.list(&ListParams::default()).await?;
    let there = pods.list(&ListParams::default()).await?;
    for set in &wanted {
        let name = format!("{}-0", set.name_any());
        if there.iter().any(|pod| pod.name_any() == name) {
            continue;
        }
        let Some(spec) = &set.spec else { continue };
        let template = &spec.template;
        let mut pod = Pod {
            metadata: template.metadata.clone().unwrap_or_default(),
            spec: template.spec.clone(),
            status: None,
        };
        pod.metadata.name = Some(name.clone());
        if let Some(spec) = &mut pod.spec {
            spec.node_name = Some("node-1".to_owned());
        }
        pods.create(&PostParams::default(), &pod).await?;
        let status = json!({ "status": {
            "phase": "Running", "podIP": "198.18.0.7", "podIPs": [{ "ip": "198.18.0.7" }],
            "containerStatuses": [{
                "name": "server", "ready": true, "restartCount": 0, "image": "x", "imageID": "x",
                "state": { "running": {} },
            }],
        }});
        pods.patch_status(&name, &PatchParams::default(), &Patch::Merge(status))
            .await?;
    }
    for pod in &there {
        let name = pod.name_any();
        if wanted
            .iter()
            .all(|set| format!("{}-0", set.name_any()) != name)
        {
            pods.delete(&name, &DeleteParams::default().grace_period(0))
                .await?;
        }
    }
    Ok(())
}
