//! Objects that somebody edits, wipes and restores by hand.

use anyhow::{Context, Result, ensure};
use hawser::kube::api::{NbdVolume, Phase};
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::{Api, ResourceExt};
use serde_json::json;

use crate::server::ApiServer;
use crate::until;
use crate::world::{SOON, World};

pub(crate) async fn what_was_wiped_or_restored_is_put_right(
    server: &ApiServer,
    namespace: &str,
) -> Result<()> {
    let mut world = World::new(server, namespace).await?;
    let id = world.create("pvc-wiped").await?.volume_id;
    let fresh = world.ready(&id).await?;
    ensure!(fresh.annotations().contains_key("hawser.dev/new"));
    let attachment = world.publish(&id, "node-1").await?;
    let volumes: Api<NbdVolume> = world.api();
    let used = volumes.get(&id).await?;
    ensure!(!used.annotations().contains_key("hawser.dev/new"));
    // Attachments are not emptied behind the server's back.
    let params = PatchParams::default();
    let empty = Patch::Merge(json!({ "spec": { "attachments": [] } }));
    let refused = volumes.patch(&id, &params, &empty).await;
    ensure!(
        refused
            .as_ref()
            .is_err_and(|error| error.to_string().contains("revoked: true")),
        "{refused:?}"
    );
    // The status is wiped.
    let wipe = Patch::Merge(json!({ "status": null }));
    volumes.patch_status(&id, &params, &wipe).await?;
    let again = until("its status is there again", SOON, async || {
        let volume = volumes.get(&id).await?;
        let status = volume.status.clone().unwrap_or_default();
        let is_told = status.phase == Some(Phase::Ready)
            && status.endpoint.is_some()
            && status
                .attachments
                .iter()
                .any(|one| one.id == attachment && one.state.is_some());
        Ok(is_told.then_some(volume))
    })
    .await
    .with_context(|| world.controller.told())?;
    ensure!(again.spec == used.spec);
    // The object is lost, finalizers and all, and comes back from a backup.
    let mut backup = again;
    let bare = Patch::Merge(json!({ "metadata": { "finalizers": null } }));
    volumes.delete(&id, &DeleteParams::default()).await?;
    until("it is gone", SOON, async || {
        // The controller puts finalizers back where it can.
        match volumes.patch(&id, &params, &bare).await {
            Ok(_) => Ok(volumes.get_opt(&id).await?.is_none().then_some(())),
            Err(_) => Ok(volumes.get_opt(&id).await?.is_none().then_some(())),
        }
    })
    .await?;
    backup.metadata.uid = None;
    backup.metadata.resource_version = None;
    backup.metadata.creation_timestamp = None;
    backup.metadata.managed_fields = None;
    backup.metadata.finalizers = None;
    backup.status = None;
    volumes.create(&PostParams::default(), &backup).await?;
    let restored = world.ready(&id).await?;
    ensure!(
        restored.finalizers().len() == 2,
        "{:?}",
        restored.finalizers()
    );
    ensure!(restored.spec.attachments == used.spec.attachments);
    ensure!(!restored.annotations().contains_key("hawser.dev/new"));
    world.unpublish(&id, "node-1").await?;
    world.delete_at_last(&id).await
}
