//! The volumes of a cluster: what CSI asks for, written into NbdVolume objects, and awaited in their status.
//!
//! Any number of controllers may do this at a time. A change is made to the object that was read, or not at all
//! (`resourceVersion`); what others have to do is awaited on a watch that all calls share, for less time than a sidecar
//! waits. A call that was not finished in time says whom it waits for, and its repetition goes on where it was.

mod attach;
mod create;
mod place;
mod standing;
mod view;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::{Api, Client, ResourceExt};
use serde_json::{Value, json};
use tokio::sync::{Mutex, watch};
use tokio::time::Instant;

use super::api::{self, BACKING_READY, CONTROLLER, NEW, NbdVolume, Reach};
use super::apply::{is_conflict, is_not_found, is_quota};
use crate::patience::Patience;
use crate::storage::size;
use crate::volumes::{
    AccessMode, Attachment, Capacity, CreateRequest, Placement, Topology, Volume, VolumeId,
    VolumeOptions, Volumes, VolumesError,
};

pub(super) use self::attach::{prune, without_ended};
pub use self::standing::Standing;
pub use self::view::View;

/// How long a call waits for others, where its caller did not say how long it waits itself. csi-provisioner's usual patience
/// is 10 s, and the answer has to get there.
const USUAL: Duration = Duration::from_secs(8);

/// How long a call waits for others at most: what does not come is to be told some time.
const MOST: Duration = Duration::from_secs(60);

/// How often a change is tried again that somebody else was faster with.
const TRIES: usize = 8;

/// The volumes of this cluster. Cheap to clone.
#[derive(Clone)]
pub struct ClusterVolumes(Arc<Inner>);

struct Inner {
    client: Client,
    volumes: Api<NbdVolume>,
    view: View,
    /// What was placed and may not be in the view yet. Held while a place is chosen.
    placed: Mutex<HashMap<VolumeId, place::Placed>>,
}

impl ClusterVolumes {
    /// The volumes in `namespace`, seen through `view`.
    #[must_use]
    pub fn new(client: Client, namespace: &str, view: View) -> Self {
        Self(Arc::new(Inner {
            volumes: Api::namespaced(client.clone(), namespace),
            client,
            view,
            placed: Mutex::default(),
        }))
    }
}

/// What the API server's refusal means to whoever asked for the volume.
fn refused(volume: &str, doing: &str, error: kube::Error) -> VolumesError {
    let text = match &error {
        kube::Error::Api(status) => format!("{doing}: {}", status.message),
        _ => doing.to_owned(),
    };
    match &error {
        kube::Error::Api(status) => match status.code {
            // A quota of the namespace, or of objects of this kind.
            403 if is_quota(&error) => VolumesError::NoRoom(format!(
                "volume {volume}: {text}; raise the ResourceQuota of the driver's namespace, or delete volumes"
            )),
            400 | 422 => VolumesError::Invalid(format!("volume {volume}: {text}")),
            401 | 403 => VolumesError::Internal {
                doing: format!("volume {volume}: {text}"),
                source: None,
            },
            _ => unavailable(volume, text),
        },
        _ => VolumesError::Unavailable {
            volume: volume.to_owned(),
            doing: text,
            source: Some(error.into()),
        },
    }
}

fn unavailable(volume: &str, doing: String) -> VolumesError {
    VolumesError::Unavailable {
        volume: volume.to_owned(),
        doing,
        source: None,
    }
}

/// The object in the terms of [`Volumes`]; an attachment that is being revoked counts: it is published still.
fn to_volume(object: &NbdVolume) -> Result<Volume, VolumesError> {
    let name = object.name_any();
    let broken = |error: &dyn std::fmt::Display| VolumesError::Internal {
        doing: format!("NbdVolume {name} makes no sense: {error}"),
        source: None,
    };
    let spec = &object.spec;
    let attachments = spec.attachments.iter().map(Attachment::try_from);
    Ok(Volume {
        id: name.parse().map_err(|error| broken(&error))?,
        name: spec.name.clone(),
        size_bytes: spec.size_bytes,
        options: VolumeOptions {
            content: spec.content,
            context: spec.context.clone(),
        },
        format: object
            .status
            .as_ref()
            .and_then(|status| status.format.as_ref())
            .map(Into::into)
            .unwrap_or_default(),
        attachments: attachments
            .collect::<Result<_, _>>()
            .map_err(|error| broken(&error))?,
    })
}

impl Inner {
    /// The object now, not as it was seen last.
    async fn read(&self, id: &VolumeId) -> Result<Option<NbdVolume>, VolumesError> {
        let read = self.volumes.get_opt(id.as_str()).await;
        read.map_err(|error| refused(id.as_str(), "cannot read its object", error))
    }

    async fn existing(&self, id: &VolumeId) -> Result<NbdVolume, VolumesError> {
        let read = self.read(id).await?;
        read.ok_or_else(|| VolumesError::NotFound(id.to_string()))
    }

    /// Changes the object's spec, if it is still as it was read: `None` if it is not.
    async fn change(
        &self,
        object: &NbdVolume,
        spec: Value,
    ) -> Result<Option<NbdVolume>, VolumesError> {
        let id = object.name_any();
        let mut patch = json!({
            "metadata": { "resourceVersion": object.resource_version(), "uid": object.uid() },
            "spec": spec,
        });
        let status = object.status.as_ref();
        if object.annotations().contains_key(NEW)
            && status.is_some_and(|status| status.size_bytes.is_some())
        {
            patch["metadata"]["annotations"] = json!({ NEW: null });
        }
        let params = PatchParams {
            field_manager: Some(CONTROLLER.to_owned()),
            ..PatchParams::default()
        };
        match self.volumes.patch(&id, &params, &Patch::Merge(patch)).await {
            Ok(changed) => Ok(Some(changed)),
            Err(error) if is_conflict(&error) => Ok(None),
            Err(error) if is_not_found(&error) => Err(VolumesError::NotFound(id)),
            Err(error) => Err(refused(&id, "cannot change its object", error)),
        }
    }

    /// Waits until `check` is satisfied with the object of that uid, or until patience ends: then `waits_for` is told.
    async fn wait<T>(
        &self,
        object: &NbdVolume,
        deadline: Instant,
        check: impl Fn(&NbdVolume) -> Option<Result<T, VolumesError>>,
        waits_for: impl Fn(&NbdVolume) -> String,
    ) -> Result<T, VolumesError> {
        let id = object.name_any();
        let uid = object.uid();
        if let Some(found) = check(object) {
            return found;
        }
        let mut changes = self.view.changes();
        loop {
            // Marked before it is looked at: a change meanwhile wakes the wait.
            changes.mark_unchanged();
            let seen = self.view.volume(&id).filter(|seen| seen.uid() == uid);
            if let Some(found) = seen.as_deref().and_then(&check) {
                return found;
            }
            if !changed_until(deadline, &mut changes).await {
                let last = seen.as_deref().unwrap_or(object);
                return Err(unavailable(&id, waits_for(last)));
            }
        }
    }

    async fn delete(&self, id: &VolumeId) -> Result<(), VolumesError> {
        let deadline = deadline();
        for _ in 0..TRIES {
            let Some(object) = self.read(id).await? else {
                return Ok(());
            };
            let mut attachments = object.spec.attachments.iter();
            if let Some(attachment) = attachments.find(|attachment| !attachment.revoked) {
                return Err(VolumesError::InUse {
                    volume: id.to_string(),
                    node: attachment.node.clone(),
                });
            }
            let object = self.forget_revoked(object, deadline).await?;
            if object.metadata.deletion_timestamp.is_none() {
                let params = DeleteParams {
                    preconditions: Some(Preconditions {
                        resource_version: object.resource_version(),
                        uid: object.uid(),
                    }),
                    ..DeleteParams::default()
                };
                match self.volumes.delete(id.as_str(), &params).await {
                    Ok(_) => {}
                    Err(error) if is_not_found(&error) => return Ok(()),
                    // Somebody attached it meanwhile, say.
                    Err(error) if is_conflict(&error) => continue,
                    Err(error) => {
                        return Err(refused(id.as_str(), "cannot delete its object", error));
                    }
                }
            }
            return self.wait_gone(&object, deadline).await;
        }
        Err(unavailable(
            id.as_str(),
            "its object changes all the time".into(),
        ))
    }

    /// Waits until the object is gone: first in the view, and then really.
    async fn wait_gone(&self, object: &NbdVolume, deadline: Instant) -> Result<(), VolumesError> {
        let id = object.name_any();
        let mut changes = self.view.changes();
        loop {
            changes.mark_unchanged();
            let seen = self
                .view
                .volume(&id)
                .filter(|seen| seen.uid() == object.uid());
            if seen.is_none() {
                let read = self.volumes.get_opt(&id).await;
                let now = read.map_err(|error| refused(&id, "cannot read its object", error))?;
                if now.is_none_or(|now| now.uid() != object.uid()) {
                    return Ok(());
                }
            }
            if !changed_until(deadline, &mut changes).await {
                let last = seen.as_deref().unwrap_or(object);
                return Err(unavailable(&id, self.view.deletion_waits_for(last)));
            }
        }
    }

    async fn grow(
        &self,
        id: &VolumeId,
        required: u64,
        limit: Option<u64>,
    ) -> Result<u64, VolumesError> {
        let deadline = deadline();
        let wanted = size::settle(required, limit)
            .map_err(|error| VolumesError::OutOfRange(error.to_string()))?;
        for _ in 0..TRIES {
            let object = self.existing(id).await?;
            let present = object.spec.size_bytes;
            if let Some(limit) = limit.filter(|limit| *limit < present) {
                return Err(VolumesError::OutOfRange(format!(
                    "volume {id} has {present} bytes, above the limit of {limit}: volumes never shrink"
                )));
            }
            let object = if wanted > present {
                // Once asked for, a size stays asked for.
                self.view.check_room_to_grow(&object, wanted - present)?;
                match self.change(&object, json!({ "sizeBytes": wanted })).await? {
                    Some(changed) => changed,
                    None => continue,
                }
            } else {
                object
            };
            let wanted = wanted.max(present);
            let grown = |object: &NbdVolume| {
                let size = object.status.as_ref()?.size_bytes?;
                (size >= wanted).then_some(Ok(size))
            };
            let waits = |object: &NbdVolume| {
                format!(
                    "it is to grow to {wanted} bytes, {}",
                    self.view.agent_says(object)
                )
            };
            return self.wait(&object, deadline, grown, waits).await;
        }
        Err(unavailable(
            id.as_str(),
            "its object changes all the time".into(),
        ))
    }
}

/// Until when a call is to wait for others.
fn deadline() -> Instant {
    Patience::of_caller().until(USUAL, MOST)
}

/// Waits for the next change; `false` if it did not come in time, or the caller does not wait for it any more.
async fn changed_until(deadline: Instant, changes: &mut watch::Receiver<()>) -> bool {
    let caller = Patience::of_caller();
    tokio::select! {
        changed = tokio::time::timeout_at(deadline, changes.changed()) => matches!(changed, Ok(Ok(()))),
        () = caller.ends() => false,
    }
}

/// The agent's own word on the backing store.
fn backing(
    object: &NbdVolume,
) -> Option<&k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition> {
    let status = object.status.as_ref()?;
    api::find_condition(&status.conditions, BACKING_READY)
}

#[tonic::async_trait]
impl Volumes for ClusterVolumes {
    async fn create(&self, request: CreateRequest) -> Result<Volume, VolumesError> {
        to_volume(&self.0.create(request).await?)
    }

    async fn find(&self, id: &VolumeId) -> Result<Volume, VolumesError> {
        to_volume(&self.0.existing(id).await?)
    }

    async fn list(
        &self,
        after: Option<&VolumeId>,
        most: usize,
    ) -> Result<Vec<Volume>, VolumesError> {
        let listed = self.0.volumes.list(&kube::api::ListParams::default()).await;
        let mut objects = listed
            .map_err(|error| refused("list", "cannot list the objects", error))?
            .items;
        objects
            .retain(|object| after.is_none_or(|after| object.name_any().as_str() > after.as_str()));
        objects.sort_unstable_by_key(ResourceExt::name_any);
        objects.iter().take(most).map(to_volume).collect()
    }

    async fn delete(&self, id: &VolumeId) -> Result<(), VolumesError> {
        self.0.delete(id).await
    }

    async fn attach(
        &self,
        id: &VolumeId,
        node: &str,
        mode: AccessMode,
        read_only: bool,
    ) -> Result<Attachment, VolumesError> {
        self.0.attach(id, node, mode, read_only).await
    }

    async fn detach(&self, id: &VolumeId, node: Option<&str>) -> Result<(), VolumesError> {
        self.0.detach(id, node).await
    }

    async fn grow(
        &self,
        id: &VolumeId,
        required_bytes: u64,
        limit_bytes: Option<u64>,
    ) -> Result<u64, VolumesError> {
        self.0.grow(id, required_bytes, limit_bytes).await
    }

    async fn capacity(&self, place: &Placement) -> Result<Capacity, VolumesError> {
        Ok(self.0.view.capacity(place))
    }

    fn has_topology(&self) -> bool {
        true
    }

    async fn accessible_from(&self, id: &VolumeId) -> Result<Vec<Topology>, VolumesError> {
        let object = self.0.existing(id).await?;
        let pool = self.0.view.pool(&object.spec.pool).ok_or_else(|| {
            unavailable(
                id.as_str(),
                format!("its NbdPool {} is gone", object.spec.pool),
            )
        })?;
        Ok(match pool.spec.reachable {
            Reach::Everywhere => Vec::new(),
            Reach::Zone => {
                let zone = self.0.view.zone(&object.spec.node);
                vec![Topology::from([(api::ZONE_KEY.to_owned(), zone)])]
            }
        })
    }
}
