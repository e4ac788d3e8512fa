//! The part of the kubelet: a pod for each StatefulSet as soon as there is one, and none when it is gone.
//!
//! It watches, so that it costs the API server the same whatever the number of volumes, and counts what it asks.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Result;
use futures::StreamExt;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, ResourceExt};
use serde_json::json;
use tokio::task::JoinHandle;

pub(crate) struct Kubelet {
    task: JoinHandle<()>,
    /// Requests so far.
    pub(crate) asked: Arc<AtomicU64>,
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Kubelet {
    pub(crate) fn start(client: &Client, namespace: &str) -> Self {
        let sets: Api<StatefulSet> = Api::namespaced(client.clone(), namespace);
        let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
        let asked = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&asked);
        let task = tokio::spawn(async move {
            let events = watcher(sets, watcher::Config::default());
            events
                .for_each_concurrent(8, |event| {
                    let (pods, asked) = (pods.clone(), Arc::clone(&counted));
                    async move {
                        let done = match event {
                            Ok(Event::Apply(set) | Event::InitApply(set)) => {
                                run(&pods, &set, &asked).await
                            }
                            Ok(Event::Delete(set)) => end(&pods, &set, &asked).await,
                            _ => Ok(()),
                        };
                        if let Err(error) = done {
                            eprintln!("the played kubelet: {error:#}");
                        }
                    }
                })
                .await;
        });
        Self { task, asked }
    }
}

fn name(set: &StatefulSet) -> String {
    format!("{}-0", set.name_any())
}

async fn run(pods: &Api<Pod>, set: &StatefulSet, asked: &AtomicU64) -> Result<()> {
    let Some(spec) = &set.spec else {
        return Ok(());
    };
    let name = name(set);
    let mut pod = Pod {
        metadata: spec.template.metadata.clone().unwrap_or_default(),
        spec: spec.template.spec.clone(),
        status: None,
    };
    pod.metadata.name = Some(name.clone());
    if let Some(spec) = &mut pod.spec {
        spec.node_name = Some("node-1".to_owned());
    }
    asked.fetch_add(1, Ordering::Relaxed);
    match pods.create(&PostParams::default(), &pod).await {
        // The StatefulSet was changed, and has its pod.
        Err(kube::Error::Api(status)) if status.code == 409 => return Ok(()),
        made => made?,
    };
    let status = json!({ "status": {
        "phase": "Running", "podIP": "198.18.0.7", "podIPs": [{ "ip": "198.18.0.7" }],
        "containerStatuses": [{
            "name": "server", "ready": true, "restartCount": 0, "image": "x", "imageID": "x",
            "state": { "running": {} },
        }],
    }});
    asked.fetch_add(1, Ordering::Relaxed);
    pods.patch_status(&name, &PatchParams::default(), &Patch::Merge(status))
        .await?;
    Ok(())
}

async fn end(pods: &Api<Pod>, set: &StatefulSet, asked: &AtomicU64) -> Result<()> {
    asked.fetch_add(1, Ordering::Relaxed);
    let at_once = DeleteParams::default().grace_period(0);
    pods.delete(&name(set), &at_once).await?;
    Ok(())
}
