//! Places that go: a node's labels, the node, the pool; and data that nobody names.

use anyhow::{Context, Result, ensure};
use hawser::kube::api::{NbdPool, NbdVolume, now};
use hawser::volumes::VolumeId;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use tonic::Code;

use crate::certificates::{bind, condition};
use crate::claims::told;
use crate::parts::report_share;
use crate::server::ApiServer;
use crate::until;
use crate::world::{GIB, SOON, World, refusal};

async fn make_node(server: &ApiServer, name: &str, pool: Option<&str>) -> Result<()> {
    let nodes: Api<Node> = Api::all(server.client.clone());
    let node = serde_json::from_value(json!({
        "metadata": { "name": name, "labels": { "pool": pool } },
    }))?;
    nodes.create(&PostParams::default(), &node).await?;
    Ok(())
}

async fn label(server: &ApiServer, name: &str, pool: Option<&str>) -> Result<()> {
    let nodes: Api<Node> = Api::all(server.client.clone());
    let patch = Patch::Merge(json!({ "metadata": { "labels": { "pool": pool } } }));
    nodes.patch(name, &PatchParams::default(), &patch).await?;
    Ok(())
}

pub(crate) async fn a_place_that_goes_is_told_and_nothing_is_forgotten(
    server: &ApiServer,
    namespace: &str,
) -> Result<()> {
    let mut world = World::new(server, namespace).await?;
    let pool = &format!("{namespace}-own");
    let pools: Api<NbdPool> = Api::all(server.client.clone());
    let object: NbdPool = serde_json::from_value(json!({
        "apiVersion": "hawser.dev/v1alpha1", "kind": "NbdPool", "metadata": { "name": pool },
        "spec": {
            "nodeSelector": { "pool": pool }, "backend": { "directory": { "path": "/var/lib/hawser" } },
        },
    }))?;
    pools.create(&PostParams::default(), &object).await?;
    let [one, two] = &["one", "two"].map(|node| format!("{namespace}-{node}"));
    for (node, room) in [(one, 10), (two, 9)] {
        make_node(server, node, Some(pool)).await?;
        world.agent.keeps(pool, node, room * GIB);
    }
    let wanted = |name: &str| {
        let mut wanted = world.wanted(name);
        wanted.parameters.insert("pool".to_owned(), pool.clone());
        wanted
    };
    let create = async |name: &str| {
        until(&format!("{name} is made"), SOON, async || {
            let made = world
                .controller
                .csi
                .clone()
                .create_volume(wanted(name))
                .await;
            Ok(made.ok().and_then(|made| made.into_inner().volume))
        })
        .await
        .with_context(|| world.controller.told())
    };
    let first = format!("pvc-{namespace}-first");
    let id = create(&first).await?.volume_id;
    bind(&world, &first, &id, &format!("{first}-hawser-client")).await?;
    let volume = world.ready(&id).await?;
    ensure!(volume.spec.node == *one, "{}", volume.spec.node);

    // The label goes: the volume stays and is served, and the next one goes elsewhere.
    label(server, one, None).await?;
    let is = |reason: &'static str| move |one: &Condition| one.reason == reason;
    condition(&world, &id, "AgentReady", is("NodeNotSelected")).await?;
    let words = ["NodeNotSelected", one.as_str(), "no new ones"];
    told(&world, "PersistentVolumeClaim", &first, &words).await?;
    world.ready(&id).await?;
    let second = create("pvc-second").await?.volume_id;
    let volumes: Api<NbdVolume> = world.api();
    ensure!(volumes.get(&second).await?.spec.node == *two);
    label(server, one, Some(pool)).await?;
    condition(&world, &id, "AgentReady", is("Attended")).await?;

    // The node goes, and its pods with it.
    let nodes: Api<Node> = Api::all(server.client.clone());
    nodes.delete(one, &DeleteParams::default()).await?;
    world.agent.sleeps(true);
    condition(&world, &id, "AgentReady", is("NodeGone")).await?;
    condition(&world, &id, "ServerReady", |one| one.status == "False").await?;
    let ready = condition(&world, &id, "Ready", |one| one.status == "False").await?;
    ensure!(ready.message.contains("is not in the cluster"), "{ready:?}");
    for (kind, about) in [("NbdVolume", &id), ("PersistentVolumeClaim", &first)] {
        told(
            &world,
            kind,
            about,
            &["NodeGone", one, "is not in the cluster"],
        )
        .await?;
    }
    // It is deleted when the data is; until then it says what it waits for.
    let refused = refusal(world.delete(&id).await)?;
    ensure!(
        refused.code() == Code::Unavailable && refused.message().contains("is not in the cluster"),
        "{refused}"
    );
    let waiting = condition(&world, &id, "Ready", is("Deleting")).await?;
    ensure!(
        waiting.message.contains("is not in the cluster"),
        "{waiting:?}"
    );
    make_node(server, one, Some(pool)).await?;
    world.agent.sleeps(false);
    world.delete_at_last(&id).await?;

    // The pool is deleted: not before its volumes.
    until("the pool is held", SOON, async || {
        let held = pools
            .get(pool)
            .await?
            .metadata
            .finalizers
            .unwrap_or_default();
        Ok((!held.is_empty()).then_some(()))
    })
    .await?;
    pools.delete(pool, &DeleteParams::default()).await?;
    condition(&world, &second, "AgentReady", is("PoolLeaving")).await?;
    told(&world, "NbdPool", pool, &["HasVolumes", "1 are left"]).await?;
    let mut third = world.wanted("pvc-third");
    third.parameters.insert("pool".to_owned(), pool.clone());
    let refused = refusal(world.controller.csi.create_volume(third).await)?;
    ensure!(
        refused.code() == Code::ResourceExhausted && refused.message().contains("is being deleted"),
        "{refused}"
    );
    world.publish(&second, two).await?;
    world.unpublish(&second, two).await?;
    world.delete_at_last(&second).await?;
    until("the pool is gone", SOON, async || {
        Ok(pools.get_opt(pool).await?.is_none().then_some(()))
    })
    .await
}

pub(crate) async fn data_that_nobody_names_is_told_where_people_look(
    server: &ApiServer,
    namespace: &str,
) -> Result<()> {
    let world = World::new(server, namespace).await?;
    let name = format!("pvc-{namespace}-lost");
    let id = VolumeId::of_name(&name).to_string();
    bind(&world, &name, &id, "none").await?;
    let share: Value = json!({
        "name": "node-1", "capacityBytes": GIB, "availableBytes": GIB, "maximumVolumeBytes": GIB,
        "healthy": true, "lastSeen": now(), "orphans": [id],
    });
    report_share(&server.client, namespace, "node-1", &share).await?;
    told(
        &world,
        "NbdPool",
        namespace,
        &["Orphans", "node-1", &id, "restore"],
    )
    .await
    .with_context(|| world.controller.told())?;
    told(
        &world,
        "PersistentVolumeClaim",
        &name,
        &["NbdVolumeMissing", &id, "restore"],
    )
    .await?;
    Ok(())
}
