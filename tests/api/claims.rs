//! Claims, as their owners make them, and csi-provisioner beside the controller.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::{Event, PersistentVolumeClaim};
use k8s_openapi::api::storage::v1::StorageClass;
use kube::api::{ListParams, PostParams};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};

use crate::server::{Process, Who, cache};
use crate::until;
use crate::world::{SOON, World, tail};

/// One of the chart's sidecars beside the world's controller, with the chart's arguments and rights.
pub(crate) struct Sidecar {
    _process: Process,
    log: PathBuf,
}

impl Sidecar {
    pub(crate) fn start(world: &World<'_>, name: &str) -> Result<Self> {
        let log = world.folder.path().join(format!("{name}.log"));
        let who = Who::Controller {
            namespace: &world.namespace,
            replica: "a",
        };
        let mut command = Command::new(cache()?.join("bin").join(name));
        command
            .args(world.server.chart.sidecar(name, &world.namespace)?)
            .arg(format!(
                "--csi-address={}",
                world.controller.socket.display()
            ))
            .arg(format!(
                "--kubeconfig={}",
                world.server.kubeconfig(who)?.display()
            ));
        if name == "csi-provisioner" {
            // There is no pod to which its objects could belong.
            command.arg("--capacity-ownerref-level=-1");
        }
        command
            .env("NAMESPACE", &world.namespace)
            .env("POD_NAME", "controller-a");
        Ok(Self {
            _process: Process::start(&log, &mut command)?,
            log,
        })
    }

    pub(crate) fn told(&self) -> String {
        tail(&self.log)
    }
}

/// A StorageClass of that name with these parameters.
pub(crate) async fn make_class(
    world: &World<'_>,
    name: &str,
    parameters: &[(&str, &str)],
) -> Result<()> {
    let classes: Api<StorageClass> = Api::all(world.server.client.clone());
    let parameters: serde_json::Map<String, Value> = parameters
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).into()))
        .collect();
    let class = serde_json::from_value(json!({
        "metadata": { "name": name }, "provisioner": "csi.hawser.dev", "parameters": parameters,
        "allowVolumeExpansion": true,
    }))?;
    classes.create(&PostParams::default(), &class).await?;
    Ok(())
}

/// What a claim asks for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Claim<'a> {
    pub(crate) name: &'a str,
    pub(crate) class: &'a str,
    pub(crate) mode: &'a str,
    pub(crate) content: &'a str,
    pub(crate) size: &'a str,
}

impl<'a> Claim<'a> {
    pub(crate) fn new(name: &'a str, class: &'a str) -> Self {
        Self {
            name,
            class,
            mode: "ReadWriteOnce",
            content: "Filesystem",
            size: "1Gi",
        }
    }

    pub(crate) async fn make(self, world: &World<'_>) -> Result<PersistentVolumeClaim> {
        let claim = serde_json::from_value(json!({
            "metadata": { "name": self.name },
            "spec": {
                "storageClassName": self.class, "accessModes": [self.mode], "volumeMode": self.content,
                "resources": { "requests": { "storage": self.size } },
            },
        }))?;
        let claims: Api<PersistentVolumeClaim> = world.api();
        Ok(claims.create(&PostParams::default(), &claim).await?)
    }
}

pub(crate) fn is_bound(claim: &PersistentVolumeClaim) -> bool {
    let phase = claim
        .status
        .as_ref()
        .and_then(|status| status.phase.as_deref());
    phase == Some("Bound")
}

/// Waits until the claim is bound; returns the name of its volume.
pub(crate) async fn bound(world: &World<'_>, name: &str) -> Result<String> {
    let claims: Api<PersistentVolumeClaim> = world.api();
    let claim = until(&format!("claim {name} is bound"), SOON, async || {
        Ok(Some(claims.get(name).await?).filter(is_bound))
    })
    .await;
    let claim = match claim {
        Ok(claim) => claim,
        Err(error) => {
            let events = events(world, name).await?.join("\n");
            return Err(error.context(events));
        }
    };
    claim
        .spec
        .and_then(|spec| spec.volume_name)
        .with_context(|| format!("claim {name} is bound to nothing"))
}

/// What the Events about an object say.
pub(crate) async fn events(world: &World<'_>, name: &str) -> Result<Vec<String>> {
    events_in(world, &world.namespace, name).await
}

pub(crate) async fn events_in(
    world: &World<'_>,
    namespace: &str,
    name: &str,
) -> Result<Vec<String>> {
    let api: Api<Event> = Api::namespaced(world.server.client.clone(), namespace);
    let about = ListParams::default().fields(&format!("involvedObject.name={name}"));
    let listed = api.list(&about).await?;
    let say = |event: &Event| {
        let kind = event.involved_object.kind.as_deref().unwrap_or_default();
        let (type_, reason) = (event.type_.as_deref(), event.reason.as_deref());
        format!(
            "{kind} {} {} {}: {}",
            event.involved_object.name.as_deref().unwrap_or_default(),
            type_.unwrap_or_default(),
            reason.unwrap_or_default(),
            event.message.as_deref().unwrap_or_default()
        )
    };
    Ok(listed.items.iter().map(say).collect())
}

/// Waits until an Event about an object of that kind and name says all of `words`; returns it.
pub(crate) async fn told(
    world: &World<'_>,
    kind: &str,
    name: &str,
    words: &[&str],
) -> Result<String> {
    let mut last = Vec::new();
    let namespace = match kind {
        "NbdPool" => "default",
        _ => &world.namespace,
    };
    let found = until(
        &format!("an Event on {kind} {name} says {words:?}"),
        SOON,
        async || {
            last = events_in(world, namespace, name).await?;
            let about = format!("{kind} ");
            let says = |event: &&String| {
                event.starts_with(&about) && words.iter().all(|word| event.contains(word))
            };
            Ok(last.iter().find(says).cloned())
        },
    )
    .await;
    found.with_context(|| format!("there are: {last:#?}"))
}

/// The PersistentVolumes' names, and the claims of this world that have them.
pub(crate) async fn all_claims(world: &World<'_>) -> Result<Vec<PersistentVolumeClaim>> {
    let claims: Api<PersistentVolumeClaim> = world.api();
    let mut all = claims.list(&ListParams::default()).await?.items;
    all.sort_by_key(ResourceExt::name_any);
    Ok(all)
}
