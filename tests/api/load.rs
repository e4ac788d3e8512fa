//! Many claims at one time.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures::StreamExt;
use hawser::kube::api::NbdVolume;
use k8s_openapi::api::core::v1::{Event, PersistentVolume, PersistentVolumeClaim};
use kube::api::{DeleteParams, ListParams};
use kube::{Api, ResourceExt};

use crate::claims::{Claim, Sidecar, all_claims, events, is_bound, make_class};
use crate::server::ApiServer;
use crate::until;
use crate::world::{GIB, World};

/// Claims that are made, and those for which there is room: on each node half of them.
const CLAIMS: usize = 300;
const FIT: usize = 280;

/// What the controller may take, in MiB: the limit in the chart's values is 256.
const MEMORY: u64 = 160;

/// For how long a claim waits, on average, before csi-provisioner may be told to come again, which costs two Events each
/// time. The controller waits for as long as csi-provisioner does, but on a slow machine 300 claims keep it busy for longer.
const AGAIN_AFTER: Duration = Duration::from_secs(120);

/// How long it may take where much else goes on. What it took is printed.
const PATIENCE: Duration = Duration::from_secs(400);

/// How often an Event about a claim was written, by reason: repetitions are counted in the one that they repeat.
async fn written_about_claims(world: &World<'_>) -> Result<BTreeMap<String, i32>> {
    let events: Api<Event> = world.api();
    let about = ListParams::default().fields("involvedObject.kind=PersistentVolumeClaim");
    let mut written = BTreeMap::new();
    for event in events.list(&about).await? {
        let count = event.count.unwrap_or(1).max(1);
        let text = event.message.unwrap_or_default();
        if ["Unavailable", "Aborted", "DeadlineExceeded"]
            .iter()
            .any(|code| text.contains(code))
        {
            *written.entry("come again".to_owned()).or_default() += count;
        }
        *written.entry(event.reason.unwrap_or_default()).or_default() += count;
    }
    Ok(written)
}

pub(crate) async fn three_hundred_claims_at_once(
    server: &ApiServer,
    namespace: &str,
) -> Result<()> {
    let world = World::new(server, namespace).await?;
    let room = GIB * FIT as u64 / 2;
    for node in ["node-1", "node-2"] {
        world.agent.keeps(namespace, node, room);
    }
    make_class(&world, namespace, &[("pool", namespace)]).await?;
    let provisioner = Sidecar::start(&world, "csi-provisioner")?;
    let told = || format!("{}\n{}", world.controller.told(), provisioner.told());
    let begun = Instant::now();
    let names: Vec<String> = (0..CLAIMS)
        .map(|number| format!("claim-{number:03}"))
        .collect();
    let made: Vec<_> = futures::stream::iter(&names)
        .map(|name| Claim::new(name, namespace).make(&world))
        .buffer_unordered(20)
        .collect()
        .await;
    made.into_iter().collect::<Result<Vec<_>>>()?;
    let asked = begun.elapsed();
    until(
        "all for which there is room are bound",
        PATIENCE,
        async || {
            let claims = all_claims(&world).await?;
            let count = claims.iter().filter(|claim| is_bound(claim)).count();
            tokio::time::sleep(Duration::from_millis(450)).await;
            Ok((count >= FIT).then_some(()))
        },
    )
    .await
    .with_context(told)?;
    let all = begun.elapsed();
    let written = written_about_claims(&world).await?;
    println!("  until then Events were written about claims: {written:?}");
    let again = written.get("come again").copied().unwrap_or_default();
    let most = CLAIMS as f64 * all.as_secs_f64() / AGAIN_AFTER.as_secs_f64();
    ensure!(
        f64::from(again) < most,
        "{again} times in {:.0} s a claim was to come again, which is more than {most:.0}",
        all.as_secs_f64()
    );
    // The others say why, and nothing is promised twice.
    let claims = all_claims(&world).await?;
    let (bound, pending): (Vec<_>, Vec<_>) = claims.iter().partition(|claim| is_bound(claim));
    ensure!(bound.len() == FIT, "{} are bound", bound.len());
    for claim in &pending {
        let name = claim.name_any();
        until(
            &format!("{name} says why it waits"),
            Duration::from_secs(60),
            async || {
                let said = events(&world, &name).await?;
                let why =
                    |one: &String| one.contains("ResourceExhausted") && one.contains("bytes left");
                Ok(said.iter().any(why).then_some(()))
            },
        )
        .await
        .with_context(told)?;
    }
    let volumes: Api<NbdVolume> = world.api();
    let volumes = volumes.list(&ListParams::default()).await?.items;
    for node in ["node-1", "node-2"] {
        let there = volumes.iter().filter(|one| one.spec.node == node);
        let promised: u64 = there.map(|one| one.spec.size_bytes).sum();
        ensure!(
            promised <= room,
            "{promised} bytes are promised on {node} of {room}"
        );
    }
    let bound_to = |claim: &&PersistentVolumeClaim| claim.spec.as_ref()?.volume_name.clone();
    let names: BTreeSet<_> = bound.iter().filter_map(bound_to).collect();
    ensure!(
        names.len() == FIT,
        "{} volumes for {FIT} claims",
        names.len()
    );
    let kept: BTreeSet<_> = volumes.iter().map(|one| one.spec.name.clone()).collect();
    ensure!(
        names.is_subset(&kept),
        "{:?} are not kept",
        names.difference(&kept)
    );
    let memory = world.controller.process.peak_memory()?;
    println!(
        "  {CLAIMS} claims were made in {asked:.1?}, {FIT} bound in {all:.1?}; the controller took {memory} MiB at most"
    );
    ensure!(memory < MEMORY, "the controller took {memory} MiB");
    let begun = Instant::now();
    let api: Api<PersistentVolumeClaim> = world.api();
    let everything = ListParams::default();
    api.delete_collection(&DeleteParams::default(), &everything)
        .await?;
    let persistent: Api<PersistentVolume> = Api::all(server.client.clone());
    let volumes: Api<NbdVolume> = world.api();
    until("nothing is left", PATIENCE, async || {
        tokio::time::sleep(Duration::from_millis(450)).await;
        let left = persistent.list(&everything).await?.items;
        let ours = |one: &&PersistentVolume| {
            let spec = one.spec.as_ref();
            spec.and_then(|spec| spec.storage_class_name.as_deref()) == Some(namespace)
        };
        let volumes = volumes.list_metadata(&everything).await?.items;
        Ok((left.iter().filter(ours).count() + volumes.len() == 0).then_some(()))
    })
    .await
    .with_context(told)?;
    println!("  all were deleted in {:.1?}", begun.elapsed());
    Ok(())
}
