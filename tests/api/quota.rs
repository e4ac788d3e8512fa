//! A namespace whose quota is used up.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hawser::kube::api::NbdVolume;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, ResourceQuota};
use kube::Api;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use serde_json::json;

use crate::claims::{Claim, Sidecar, bound, make_class, told};
use crate::server::ApiServer;
use crate::until;
use crate::world::{SOON, World};

/// Sets how many objects of that kind there may be, and waits until that is in force.
async fn limit(world: &World<'_>, kind: &str, most: usize) -> Result<()> {
    let quotas: Api<ResourceQuota> = world.api();
    let kind = format!("count/{kind}");
    let quota = json!({
        "apiVersion": "v1", "kind": "ResourceQuota", "metadata": { "name": "test" },
        "spec": { "hard": { kind.clone(): most.to_string() } },
    });
    let params = PatchParams::apply("test").force();
    quotas.patch("test", &params, &Patch::Apply(quota)).await?;
    until("the quota is counted", SOON, async || {
        let status = quotas.get("test").await?.status.unwrap_or_default();
        let hard = status.hard.unwrap_or_default();
        let is_set = hard
            .get(&kind)
            .is_some_and(|hard| hard.0 == most.to_string());
        let is_counted = status.used.unwrap_or_default().contains_key(&kind);
        Ok((is_set && is_counted).then_some(()))
    })
    .await
}

pub(crate) async fn a_quota_is_told_and_waited_for(
    server: &ApiServer,
    namespace: &str,
) -> Result<()> {
    let world = World::new(server, namespace).await?;
    make_class(&world, namespace, &[("pool", namespace)]).await?;
    let provisioner = Sidecar::start(&world, "csi-provisioner")?;
    let log = || format!("{}\n{}", world.controller.told(), provisioner.told());
    let claim = async |name: &str| Claim::new(name, namespace).make(&world).await;
    let is_bound = async |name: &str| {
        until(
            &format!("{name} is bound"),
            Duration::from_secs(60),
            async || Ok(bound(&world, name).await.ok()),
        )
        .await
        .with_context(log)
    };
    limit(&world, "nbdvolumes.hawser.dev", 1).await?;
    claim("first").await?;
    let first = bound(&world, "first").await.with_context(log)?;
    claim("second").await?;
    let words = [
        "ResourceExhausted",
        "exceeded quota",
        "raise the ResourceQuota",
    ];
    told(&world, "PersistentVolumeClaim", "second", &words).await?;
    let volumes: Api<NbdVolume> = world.api();
    ensure!(volumes.list(&ListParams::default()).await?.items.len() == 1);
    limit(&world, "nbdvolumes.hawser.dev", 10).await?;
    is_bound("second").await?;

    // No Secret more than there are: each of two volumes has two, and there is the authority.
    limit(&world, "secrets", 5).await?;
    claim("third").await?;
    let words = ["certificates", "exceeded quota", "raise the ResourceQuota"];
    told(&world, "PersistentVolumeClaim", "third", &words).await?;
    limit(&world, "secrets", 50).await?;
    is_bound("third").await?;

    limit(&world, "statefulsets.apps", 3).await?;
    claim("fourth").await?;
    let fourth = is_bound("fourth").await?;
    let words = ["Refused", "exceeded quota"];
    told(&world, "PersistentVolumeClaim", "fourth", &words)
        .await
        .with_context(log)?;
    limit(&world, "statefulsets.apps", 50).await?;
    for volume in [first, fourth] {
        let id = hawser::volumes::VolumeId::of_name(&volume);
        world.ready(id.as_str()).await?;
    }
    let claims: Api<PersistentVolumeClaim> = world.api();
    let everything = ListParams::default();
    claims
        .delete_collection(&DeleteParams::default(), &everything)
        .await?;
    until("nothing is left", Duration::from_secs(60), async || {
        let left = volumes.list(&everything).await?.items;
        Ok(left.is_empty().then_some(()))
    })
    .await
    .with_context(log)
}
