//! What the controller makes of CSI's calls, and of what happens to its objects.

use anyhow::{Context, Result, bail, ensure};
use hawser::kube::api::{NbdVolume, Phase, ZONE_KEY};
use hawser::proto::csi;
use hawser::volumes::VolumeId;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{Pod, Secret};
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::{Api, ResourceExt};
use serde_json::json;
use tonic::Code;

use crate::parts::report;
use crate::server::ApiServer;
use crate::until;
use crate::world::{GIB, SOON, World, make_pool, refusal};

pub(crate) async fn a_volume_lives_and_goes(server: &ApiServer, namespace: &str) -> Result<()> {
    let mut world = World::new(server, namespace).await?;
    let made = world.create("pvc-life").await?;
    let id = made.volume_id.clone();
    ensure!(id == VolumeId::of_name("pvc-life").as_str());
    ensure!(made.accessible_topology.is_empty());
    // Again, it is the same; another size is another volume.
    ensure!(world.create("pvc-life").await?.volume_id == id);
    let mut larger = world.wanted("pvc-life");
    larger.capacity_range = Some(csi::CapacityRange {
        required_bytes: 2 << 30,
        limit_bytes: 0,
    });
    let refused = refusal(world.controller.csi.create_volume(larger).await)?;
    ensure!(refused.code() == Code::AlreadyExists, "{refused}");

    let volume = world.ready(&id).await?;
    let status = volume.status.clone().context("no status")?;
    ensure!(
        status.endpoint.as_deref() == Some("198.18.0.7:10809"),
        "{status:?}"
    );
    ensure!(status.size.as_deref() == Some("1Gi"));
    let secrets: Api<Secret> = world.api();
    for name in [
        "hawser-ca".to_owned(),
        format!("{id}-server"),
        "pvc-life-hawser-client".to_owned(),
    ] {
        secrets.get(&name).await.with_context(|| name)?;
    }
    let set = world.api::<StatefulSet>().get(&id).await?;
    let spec = set
        .spec
        .context("no spec")?
        .template
        .spec
        .context("no pod")?;
    ensure!(spec.automount_service_account_token == Some(false));

    let refused = refusal(world.publish(&id, "node-9").await)?;
    ensure!(refused.code() == Code::NotFound, "{refused}");
    let attachment = world.publish(&id, "node-2").await?;
    ensure!(world.publish(&id, "node-2").await? == attachment);
    let refused = refusal(world.publish(&id, "node-1").await)?;
    ensure!(refused.code() == Code::FailedPrecondition, "{refused}");
    let refused = refusal(world.delete(&id).await)?;
    ensure!(refused.code() == Code::FailedPrecondition, "{refused}");
    until("kubectl shows who has it", SOON, async || {
        let volume = world.api::<NbdVolume>().get(&id).await?;
        let attached = volume.status.and_then(|status| status.attached_to);
        Ok((attached.as_deref() == Some("node-2")).then_some(()))
    })
    .await?;

    let request = csi::ControllerExpandVolumeRequest {
        volume_id: id.clone(),
        capacity_range: Some(csi::CapacityRange {
            required_bytes: 2 << 30,
            limit_bytes: 0,
        }),
        ..csi::ControllerExpandVolumeRequest::default()
    };
    let grown = world
        .controller
        .csi
        .controller_expand_volume(request)
        .await?
        .into_inner();
    ensure!(grown.capacity_bytes == 2 << 30);

    world.unpublish(&id, "node-2").await?;
    world.unpublish(&id, "node-2").await?;
    let next = world.publish(&id, "node-1").await?;
    ensure!(next != attachment);
    world.unpublish(&id, "").await?;
    let left = world.api::<NbdVolume>().get(&id).await?;
    ensure!(left.spec.attachments.is_empty());
    world.delete(&id).await?;
    world.delete(&id).await?;
    ensure!(world.api::<NbdVolume>().get_opt(&id).await?.is_none());
    ensure!(world.api::<StatefulSet>().get_opt(&id).await?.is_none());
    ensure!(
        world
            .api::<Pod>()
            .get_opt(&format!("{id}-0"))
            .await?
            .is_none()
    );
    for name in [format!("{id}-server"), "pvc-life-hawser-client".to_owned()] {
        ensure!(secrets.get_opt(&name).await?.is_none(), "{name} is left");
    }
    Ok(())
}

pub(crate) async fn a_detachment_waits_for_the_agents_mark(
    server: &ApiServer,
    namespace: &str,
) -> Result<()> {
    let mut world = World::new(server, namespace).await?;
    let id = world.create("pvc-fence").await?.volume_id;
    world.ready(&id).await?;
    let attachment = world.publish(&id, "node-1").await?;
    world.agent.sleeps(true);
    let refused = refusal(world.unpublish(&id, "node-1").await)?;
    ensure!(refused.code() == Code::Unavailable, "{refused}");
    ensure!(
        refused.message().contains("agent on node node-1"),
        "{refused}"
    );
    // That the agent says nothing of it proves nothing.
    let api: Api<NbdVolume> = world.api();
    let forget = Patch::Merge(json!({ "status": { "attachments": [] } }));
    api.patch_status(&id, &PatchParams::default(), &forget)
        .await?;
    let refused = refusal(world.unpublish(&id, "node-1").await)?;
    ensure!(refused.code() == Code::Unavailable, "{refused}");
    // Nor may anybody else come meanwhile.
    let refused = refusal(world.publish(&id, "node-2").await)?;
    ensure!(refused.code() == Code::Unavailable, "{refused}");
    world.agent.sleeps(false);
    world.unpublish(&id, "node-1").await?;
    ensure!(world.publish(&id, "node-2").await? != attachment);
    // One that was never confirmed as allowed is revoked all the same.
    world.unpublish(&id, "node-2").await?;
    world.agent.sleeps(true);
    let refused = refusal(world.publish(&id, "node-1").await)?;
    ensure!(refused.code() == Code::Unavailable, "{refused}");
    let refused = refusal(world.unpublish(&id, "node-1").await)?;
    ensure!(refused.code() == Code::Unavailable, "{refused}");
    ensure!(!api.get(&id).await?.spec.attachments.is_empty());
    world.agent.sleeps(false);
    world.unpublish(&id, "node-1").await?;
    ensure!(api.get(&id).await?.spec.attachments.is_empty());
    Ok(())
}

pub(crate) async fn secrets_are_issued_again_and_never_overwritten(
    server: &ApiServer,
    namespace: &str,
) -> Result<()> {
    let mut world = World::new(server, namespace).await?;
    let id = world.create("pvc-keys").await?.volume_id;
    world.ready(&id).await?;
    let secrets: Api<Secret> = world.api();
    let client = "pvc-keys-hawser-client";
    let certificate = async |name: &str| -> Result<Option<Vec<u8>>> {
        let secret = secrets.get_opt(name).await?;
        Ok(secret.and_then(|secret| Some(secret.data?.get("tls.crt")?.0.clone())))
    };
    let before = certificate(client).await?;
    secrets.delete(client, &DeleteParams::default()).await?;
    until("it is issued again", SOON, async || {
        let now = certificate(client).await?;
        Ok((now.is_some() && now != before).then_some(()))
    })
    .await?;
    // Somebody's own, for another volume: it cannot be used, and stays.
    let stranger =
        hawser::tls::Authority::temporary()?.issue_client(&VolumeId::of_name("other"))?;
    let data: std::collections::BTreeMap<_, _> = stranger
        .iter()
        .map(|(key, value)| (key.clone(), k8s_openapi::ByteString(value.clone())))
        .collect();
    let mut secret = secrets.get(client).await?;
    secret.data = Some(data);
    secrets
        .replace(client, &PostParams::default(), &secret)
        .await?;
    until("the condition says so", SOON, async || {
        let volume = world.api::<NbdVolume>().get(&id).await?;
        let conditions = volume
            .status
            .map(|status| status.conditions)
            .unwrap_or_default();
        let wrong = conditions
            .iter()
            .find(|one| one.type_ == "CertificatesReady" && one.status == "False");
        Ok(wrong
            .filter(|one| one.message.contains("is for vol-"))
            .map(|_| ()))
    })
    .await?;
    ensure!(certificate(client).await? == stranger.get("tls.crt").cloned());
    // A lost authority is not replaced behind what it issued.
    secrets
        .delete("hawser-ca", &DeleteParams::default())
        .await?;
    secrets.delete(client, &DeleteParams::default()).await?;
    until("the condition says so", SOON, async || {
        let volume = world.api::<NbdVolume>().get(&id).await?;
        let conditions = volume
            .status
            .map(|status| status.conditions)
            .unwrap_or_default();
        Ok(conditions
            .iter()
            .any(|one| one.reason == "AuthorityMissing")
            .then_some(()))
    })
    .await?;
    ensure!(secrets.get_opt("hawser-ca").await?.is_none());
    Ok(())
}

pub(crate) async fn what_somebody_changed_by_hand_is_put_right(
    server: &ApiServer,
    namespace: &str,
) -> Result<()> {
    let mut world = World::new(server, namespace).await?;
    let id = world.create("pvc-hand").await?.volume_id;
    world.ready(&id).await?;
    let sets: Api<StatefulSet> = world.api();
    let changed = Patch::Merge(json!({ "spec": { "replicas": 0 } }));
    sets.patch(&id, &PatchParams::default(), &changed).await?;
    until("it has one replica again", SOON, async || {
        let replicas = sets.get(&id).await?.spec.and_then(|spec| spec.replicas);
        Ok((replicas == Some(1)).then_some(()))
    })
    .await?;
    sets.delete(&id, &DeleteParams::default()).await?;
    until("it is there again", SOON, async || {
        Ok(sets.get_opt(&id).await?)
    })
    .await?;
    let volumes: Api<NbdVolume> = world.api();
    let bare = Patch::Merge(json!({ "metadata": { "finalizers": null } }));
    volumes.patch(&id, &PatchParams::default(), &bare).await?;
    until("the finalizers are there again", SOON, async || {
        Ok((volumes.get(&id).await?.finalizers().len() == 2).then_some(()))
    })
    .await?;
    world.ready(&id).await?;
    // Deleted by hand while it is attached: it is served until it was detached.
    world.publish(&id, "node-1").await?;
    volumes.delete(&id, &DeleteParams::default()).await?;
    until("it says what it waits for", SOON, async || {
        let volume = volumes.get(&id).await?;
        let status = volume.status.unwrap_or_default();
        let says = status
            .conditions
            .iter()
            .any(|one| one.message.contains("is attached to node node-1 still"));
        Ok((says && status.phase == Some(Phase::Deleting)).then_some(()))
    })
    .await?;
    ensure!(sets.get_opt(&id).await?.is_some());
    world.unpublish(&id, "node-1").await?;
    until("it is gone", SOON, async || {
        Ok(volumes.get_opt(&id).await?.is_none().then_some(()))
    })
    .await
}

pub(crate) async fn volumes_go_where_there_is_room_and_reach(
    server: &ApiServer,
    namespace: &str,
) -> Result<()> {
    let mut world = World::new(server, namespace).await?;
    let zoned = format!("{namespace}-zoned");
    make_pool(server, &zoned, "Zone").await?;
    report(&server.client, &zoned, "node-1", 10 * GIB).await?;
    report(&server.client, &zoned, "node-2", 4 * GIB).await?;
    let place = |zone: &str| csi::Topology {
        segments: [(ZONE_KEY.to_owned(), zone.to_owned())].into(),
    };
    let capacity = async |zone: &str| -> Result<i64> {
        let request = csi::GetCapacityRequest {
            parameters: [("pool".to_owned(), zoned.clone())].into(),
            accessible_topology: Some(place(zone)),
            ..csi::GetCapacityRequest::default()
        };
        let answer = world.controller.csi.clone().get_capacity(request).await?;
        Ok(answer.into_inner().available_capacity)
    };
    until("the capacity is known", SOON, async || {
        Ok((capacity("one").await? == 10 << 30 && capacity("two").await? == 4 << 30).then_some(()))
    })
    .await?;
    ensure!(capacity("three").await? == 0);

    let mut wanted = world.wanted("pvc-zone");
    wanted.parameters.insert("pool".to_owned(), zoned.clone());
    wanted.accessibility_requirements = Some(csi::TopologyRequirement {
        requisite: vec![place("one"), place("two")],
        preferred: vec![place("two"), place("one")],
    });
    let made = until("it is made", SOON, async || {
        match world
            .controller
            .csi
            .clone()
            .create_volume(wanted.clone())
            .await
        {
            Ok(made) => Ok(made.into_inner().volume),
            Err(status) if status.code() == Code::Unavailable => Ok(None),
            Err(status) => bail!("{status}"),
        }
    })
    .await?;
    ensure!(made.accessible_topology == [place("two")], "{made:?}");
    let volume = world.api::<NbdVolume>().get(&made.volume_id).await?;
    ensure!(volume.spec.node == "node-2");

    wanted.name = "pvc-large".to_owned();
    wanted.capacity_range = Some(csi::CapacityRange {
        required_bytes: 11 << 30,
        limit_bytes: 0,
    });
    let refused = refusal(world.controller.csi.create_volume(wanted.clone()).await)?;
    ensure!(refused.code() == Code::ResourceExhausted, "{refused}");
    wanted
        .parameters
        .insert("pool".to_owned(), "nowhere".to_owned());
    let refused = refusal(world.controller.csi.create_volume(wanted.clone()).await)?;
    ensure!(
        refused.code() == Code::InvalidArgument && refused.message().contains(&zoned),
        "{refused}"
    );
    wanted.parameters.remove("pool");
    let refused = refusal(world.controller.csi.create_volume(wanted).await)?;
    ensure!(refused.message().contains("several"), "{refused}");
    Ok(())
}
