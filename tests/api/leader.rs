//! Two controllers: who leads, and what a leader that is gone, or was only stopped, leaves behind.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use futures::StreamExt;
use hawser::kube::api::NbdVolume;
use hawser::proto::csi::{self, controller_client::ControllerClient};
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Pod, Secret};
use k8s_openapi::jiff::Timestamp;
use kube::api::ListParams;
use kube::{Api, ResourceExt};
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::server::{ApiServer, Who};
use crate::until;
use crate::world::{Controller, SOON, World, capability};

/// Volumes that are worked on while a leader goes.
const VOLUMES: usize = 50;

/// How long a Lease lasts, and is looked at.
const TAKEOVER: Duration = Duration::from_secs(40);

async fn holder(world: &World<'_>) -> Result<Option<String>> {
    let leases: Api<Lease> = world.api();
    let lease = leases.get_opt("hawser-controller").await?;
    Ok(lease.and_then(|lease| lease.spec?.holder_identity))
}

async fn leads(world: &World<'_>, name: &str) -> Result<()> {
    let mark = format!("{name}_");
    until(&format!("{name} leads"), TAKEOVER, async || {
        let holder = holder(world).await?;
        Ok(holder
            .filter(|holder| holder.starts_with(&mark))
            .map(|_| ()))
    })
    .await
}

/// Calls as a sidecar does, until it is done.
async fn insist<T>(what: &str, call: impl AsyncFn() -> Result<T, Status>) -> Result<T> {
    until(what, Duration::from_secs(90), async || match call().await {
        Ok(done) => Ok(Some(done)),
        Err(status) if matches!(status.code(), Code::Unavailable | Code::Aborted) => Ok(None),
        Err(status) => bail!("{what}: {status}"),
    })
    .await
}

type Csi = ControllerClient<Channel>;

async fn create(csi: &Csi, wanted: &csi::CreateVolumeRequest) -> Result<String> {
    let made = insist(&wanted.name, async || {
        csi.clone().create_volume(wanted.clone()).await
    });
    let volume = made.await?.into_inner().volume;
    Ok(volume.context("no volume")?.volume_id)
}

async fn publish(csi: &Csi, id: &str, node: &str) -> Result<String> {
    let request = csi::ControllerPublishVolumeRequest {
        volume_id: id.to_owned(),
        node_id: node.to_owned(),
        volume_capability: Some(capability()),
        ..csi::ControllerPublishVolumeRequest::default()
    };
    let call = async || csi.clone().controller_publish_volume(request.clone()).await;
    let published = insist(&format!("{id} is published"), call).await?;
    Ok(published.into_inner().publish_context["attachment"].clone())
}

async fn unpublish_and_delete(csi: &Csi, id: &str, node: &str) -> Result<()> {
    let request = csi::ControllerUnpublishVolumeRequest {
        volume_id: id.to_owned(),
        node_id: node.to_owned(),
        ..csi::ControllerUnpublishVolumeRequest::default()
    };
    insist(&format!("{id} is unpublished"), async || {
        csi.clone()
            .controller_unpublish_volume(request.clone())
            .await
    })
    .await?;
    let request = csi::DeleteVolumeRequest {
        volume_id: id.to_owned(),
        ..csi::DeleteVolumeRequest::default()
    };
    insist(&format!("{id} is deleted"), async || {
        csi.clone().delete_volume(request.clone()).await
    })
    .await?;
    Ok(())
}

/// Does something for all, some at a time, as sidecars do.
async fn for_all<I, T>(
    all: impl IntoIterator<Item = I>,
    work: impl AsyncFn(I) -> Result<T>,
) -> Result<Vec<T>> {
    let done: Vec<_> = futures::stream::iter(all)
        .map(|one| work(one))
        .buffer_unordered(25)
        .collect()
        .await;
    done.into_iter().collect()
}

fn node(number: usize) -> &'static str {
    ["node-1", "node-2"][number % 2]
}

pub(crate) async fn two_controllers_make_one_volume_and_hand_over(
    server: &ApiServer,
    namespace: &str,
) -> Result<()> {
    let mut world = World::new(server, namespace).await?;
    leads(&world, "a").await?;
    let second = Controller::start(server, world.folder.path(), namespace, "b").await?;
    let wanted = world.wanted("pvc-race");
    let (mut one, mut other) = (world.controller.csi.clone(), second.csi.clone());
    let (one, other) = tokio::join!(
        one.create_volume(wanted.clone()),
        other.create_volume(wanted)
    );
    for made in [one, other] {
        match made {
            Ok(_) => {}
            Err(status) => ensure!(status.code() == Code::Unavailable, "{status}"),
        }
    }
    let id = world.create("pvc-race").await?.volume_id;
    world.ready(&id).await?;
    // It is told to end: it lets the Lease go, and the other need not wait for its end.
    let mut first = std::mem::replace(&mut world.controller, second);
    first.process.signal("TERM")?;
    let ended = first.process.wait()?;
    ensure!(ended.success(), "{ended}: {}", first.told());
    ensure!(
        !holder(&world)
            .await?
            .is_some_and(|holder| holder.starts_with("a_"))
    );
    let begun = std::time::Instant::now();
    leads(&world, "b").await?;
    ensure!(
        begun.elapsed() < Duration::from_secs(10),
        "{:?}",
        begun.elapsed()
    );
    let id = world.create("pvc-after").await?.volume_id;
    world.ready(&id).await?;
    Ok(())
}

pub(crate) async fn a_killed_leader_leaves_nothing_half_made(
    server: &ApiServer,
    namespace: &str,
) -> Result<()> {
    let mut world = World::new(server, namespace).await?;
    leads(&world, "a").await?;
    let second = Controller::start(server, world.folder.path(), namespace, "b").await?;
    let first = std::mem::replace(&mut world.controller, second);
    let csi = &world.controller.csi;
    let wanted: Vec<_> = (0..VOLUMES)
        .map(|number| world.wanted(&format!("pvc-{number}")))
        .collect();
    let creating = for_all(&wanted, async |wanted| create(csi, wanted).await);
    let kill = async {
        let volumes: Api<NbdVolume> = world.api();
        until("some are made", SOON, async || {
            let listed = volumes.list_metadata(&ListParams::default()).await?;
            Ok((listed.items.len() > VOLUMES / 3).then_some(()))
        })
        .await?;
        drop(first.process);
        anyhow::Ok(())
    };
    let (made, killed) = tokio::join!(creating, kill);
    killed?;
    let ids: BTreeSet<_> = made
        .with_context(|| world.controller.told())?
        .into_iter()
        .collect();
    ensure!(ids.len() == VOLUMES, "{} volumes", ids.len());
    leads(&world, "b").await?;
    let ids: Vec<_> = ids.into_iter().collect();
    let published = for_all(ids.iter().enumerate(), async |(number, id)| {
        publish(csi, id, node(number)).await
    });
    let published: BTreeSet<_> = published.await?.into_iter().collect();
    ensure!(
        published.len() == VOLUMES,
        "{} attachments",
        published.len()
    );
    let volumes: Api<NbdVolume> = world.api();
    let everything = ListParams::default();
    let objects = volumes.list(&everything).await?.items;
    ensure!(objects.len() == VOLUMES);
    for object in &objects {
        let attachments = &object.spec.attachments;
        ensure!(
            attachments.len() == 1,
            "{}: {attachments:?}",
            object.name_any()
        );
    }
    let ours = ListParams::default().labels("hawser.dev/volume");
    let sets: Api<StatefulSet> = world.api();
    let secrets: Api<Secret> = world.api();
    let (sets_there, secrets_there) = (
        sets.list_metadata(&ours).await?.items.len(),
        secrets.list_metadata(&ours).await?.items.len(),
    );
    ensure!(
        (sets_there, secrets_there) == (VOLUMES, 2 * VOLUMES),
        "{sets_there} {secrets_there}"
    );
    // The other way round: the leader goes in the middle of the deletions, and with it the calls that it answered.
    let third = Controller::start(server, world.folder.path(), namespace, "a").await?;
    let second = std::mem::replace(&mut world.controller, third);
    let csi = &world.controller.csi;
    let deleting = for_all(ids.iter().enumerate(), async |(number, id)| {
        unpublish_and_delete(csi, id, node(number)).await
    });
    let kill = async {
        until("some are gone", SOON, async || {
            let listed = volumes.list_metadata(&everything).await?;
            Ok((listed.items.len() < VOLUMES - VOLUMES / 5).then_some(()))
        })
        .await?;
        drop(second.process);
        anyhow::Ok(())
    };
    let (deleted, killed) = tokio::join!(deleting, kill);
    killed?;
    deleted.with_context(|| world.controller.told())?;
    let pods: Api<Pod> = world.api();
    until("nothing is left", SOON, async || {
        let left = volumes.list_metadata(&everything).await?.items.len()
            + sets.list_metadata(&ours).await?.items.len()
            + secrets.list_metadata(&ours).await?.items.len()
            + pods.list_metadata(&ours).await?.items.len();
        Ok((left == 0).then_some(()))
    })
    .await
    .with_context(|| world.controller.told())
}

pub(crate) async fn a_leader_that_was_stopped_writes_nothing_afterwards(
    server: &ApiServer,
    namespace: &str,
) -> Result<()> {
    let mut world = World::new(server, namespace).await?;
    leads(&world, "a").await?;
    let second = Controller::start(server, world.folder.path(), namespace, "b").await?;
    let first = std::mem::replace(&mut world.controller, second);
    let csi = &world.controller.csi;
    let wanted: Vec<_> = (0..20)
        .map(|number| world.wanted(&format!("pvc-{number}")))
        .collect();
    let creating = for_all(&wanted, async |wanted| create(csi, wanted).await);
    let stop = async {
        let volumes: Api<NbdVolume> = world.api();
        until("some are made", SOON, async || {
            let listed = volumes.list_metadata(&ListParams::default()).await?;
            Ok((listed.items.len() > 5).then_some(()))
        })
        .await?;
        // In the middle of Secrets, StatefulSets and statuses.
        first.process.signal("STOP")
    };
    let (made, stopped) = tokio::join!(creating, stop);
    stopped?;
    let ids = made.with_context(|| world.controller.told())?;
    leads(&world, "b").await?;
    // What the first knows is old now: some volumes are gone, some were made again, and are somebody's.
    for_all(&ids[..10], async |id| {
        unpublish_and_delete(csi, id, "").await
    })
    .await?;
    let wanted_again: Vec<_> = wanted
        .iter()
        .filter(|wanted| {
            let id = hawser::volumes::VolumeId::of_name(&wanted.name);
            ids[..5].contains(&id.to_string())
        })
        .collect();
    for_all(wanted_again, async |wanted| create(csi, wanted).await).await?;
    for id in &ids[..5] {
        world.ready(id).await?;
    }
    let volumes: Api<NbdVolume> = world.api();
    let state = async || -> Result<Vec<_>> {
        let listed = volumes.list(&ListParams::default()).await?.items;
        Ok(listed
            .into_iter()
            .map(|one| (one.name_any(), one.uid(), one.spec))
            .collect())
    };
    let before = state().await?;
    let woken = Timestamp::now();
    first.process.signal("CONT")?;
    tokio::time::sleep(Duration::from_secs(6)).await;
    let who = Who::Controller {
        namespace,
        replica: "a",
    };
    let sent = server.changes_of(who, woken)?;
    let others: Vec<_> = sent
        .iter()
        .filter(|(_, what)| !what.contains("/leases/"))
        .collect();
    ensure!(others.is_empty(), "the former leader sent {others:#?}");
    // The log has what is looked for: the new leader's changes are there.
    let who = Who::Controller {
        namespace,
        replica: "b",
    };
    let leader = server.changes_of(who, Timestamp::UNIX_EPOCH)?;
    ensure!(
        leader
            .iter()
            .any(|(_, what)| what.contains("/statefulsets")),
        "{leader:#?}"
    );
    ensure!(state().await? == before);
    ensure!(
        holder(&world)
            .await?
            .is_some_and(|holder| holder.starts_with("b_"))
    );
    // It answers CSI as ever, for that it need not lead.
    let id = create(&first.csi, &world.wanted("pvc-later")).await?;
    world.ready(&id).await?;
    Ok(())
}
