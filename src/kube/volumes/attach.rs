//! ControllerPublish and ControllerUnpublish: who may use a volume, and the fence behind those who may no longer.
//!
//! An attachment's id is never used again, and the agent's Revoked mark on it never goes back. So a mark that was seen
//! is true, however old the view is in which it was seen; that something is missing from a view proves nothing, and is
//! never taken for an answer.

use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::storage::v1::CSINode;
use kube::api::{Patch, PatchParams};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::{Inner, TRIES, deadline, refused, to_volume, unavailable};
use crate::admission::{Admission, Wanted, admit};
use crate::csi::DRIVER_NAME;
use crate::kube::api::{AttachmentState, NbdVolume, VolumeAttachment};
use crate::kube::apply::{is_conflict, is_invalid, is_not_found};
use crate::volumes::{AccessMode, Attachment, AttachmentId, VolumeId, VolumesError};

/// What the agent said of an attachment.
pub(in crate::kube) fn state(object: &NbdVolume, id: &str) -> Option<AttachmentState> {
    let attachments = &object.status.as_ref()?.attachments;
    attachments.iter().find(|one| one.id == id)?.state
}

/// Whether every attachment that is to end is known to have ended.
fn all_revoked(object: &NbdVolume) -> bool {
    let mut revoked = object.spec.attachments.iter().filter(|one| one.revoked);
    revoked.all(|one| state(object, &one.id) == Some(AttachmentState::Revoked))
}

/// The spec without the attachments that are known to have ended; `None` where there are none.
pub(in crate::kube) fn without_ended(object: &NbdVolume) -> Option<Value> {
    let is_over = |one: &&VolumeAttachment| {
        one.revoked && state(object, &one.id) == Some(AttachmentState::Revoked)
    };
    let attachments = &object.spec.attachments;
    attachments.iter().any(|one| is_over(&one)).then(|| {
        let left: Vec<_> = attachments.iter().filter(|one| !is_over(one)).collect();
        json!({ "attachments": left })
    })
}

impl Inner {
    pub(super) async fn attach(
        &self,
        id: &VolumeId,
        node: &str,
        mode: AccessMode,
        read_only: bool,
    ) -> Result<Attachment, VolumesError> {
        let deadline = deadline();
        let wanted = Wanted::new(node, mode, read_only);
        for _ in 0..TRIES {
            let object = self.existing(id).await?;
            if object.metadata.deletion_timestamp.is_some() {
                return Err(unavailable(id.as_str(), "it is being deleted".into()));
            }
            let limit = self.node_limit(node).await?;
            // Whoever held the volume before must be gone before somebody else comes.
            let object = self.forget_revoked(object, deadline).await?;
            let granted = match admit(id.as_str(), &to_volume(&object)?.attachments, &wanted)? {
                Admission::Present(present) => {
                    return self.wait_allowed(&object, present, deadline).await;
                }
                Admission::Granted => wanted.clone().granted(AttachmentId::random()?),
            };
            if let Some(limit) = limit.filter(|limit| self.view.attached_to(node) >= *limit) {
                return Err(VolumesError::NodeFull {
                    node: node.to_owned(),
                    limit,
                });
            }
            let mut attachments = object.spec.attachments.clone();
            attachments.push(VolumeAttachment {
                id: granted.id.to_string(),
                node: granted.node.clone(),
                read_only: granted.read_only,
                mode: granted.mode,
                revoked: false,
            });
            let changed = self.change(&object, json!({ "attachments": attachments }));
            if let Some(object) = changed.await? {
                return self.wait_allowed(&object, granted, deadline).await;
            }
        }
        Err(unavailable(
            id.as_str(),
            "its object changes all the time".into(),
        ))
    }

    /// Waits until the server lets the attachment in, and is somewhere.
    async fn wait_allowed(
        &self,
        object: &NbdVolume,
        attachment: Attachment,
        deadline: Instant,
    ) -> Result<Attachment, VolumesError> {
        let id = attachment.id.as_str();
        let allowed = |object: &NbdVolume| {
            let is_served = object.status.as_ref()?.endpoint.is_some();
            let is_allowed = state(object, id) == Some(AttachmentState::Allowed);
            (is_served && is_allowed).then(|| Ok(attachment.clone()))
        };
        let waits = |object: &NbdVolume| self.view.attachment_waits_for(object, id);
        self.wait(object, deadline, allowed, waits).await
    }

    /// The most volumes the node takes, where it says so; an error if there is no such node.
    async fn node_limit(&self, node: &str) -> Result<Option<u64>, VolumesError> {
        if self.view.node(node).is_none() {
            let nodes: Api<Node> = Api::all(self.client.clone());
            let read = nodes.get_opt(node).await;
            let read = read.map_err(|error| refused(node, "cannot read the Node", error))?;
            if read.is_none() {
                return Err(VolumesError::NodeNotFound(node.to_owned()));
            }
        }
        let nodes: Api<CSINode> = Api::all(self.client.clone());
        let read = nodes.get_opt(node).await;
        let read = read.map_err(|error| refused(node, "cannot read the CSINode", error))?;
        let drivers = read.map(|node| node.spec.drivers).unwrap_or_default();
        let ours = drivers
            .into_iter()
            .find(|driver| driver.name == DRIVER_NAME);
        let count = ours.and_then(|driver| driver.allocatable?.count);
        Ok(count.and_then(|count| u64::try_from(count).ok()))
    }

    pub(super) async fn detach(
        &self,
        id: &VolumeId,
        node: Option<&str>,
    ) -> Result<(), VolumesError> {
        let deadline = deadline();
        let leaves = |one: &VolumeAttachment| node.is_none_or(|node| one.node == node);
        for _ in 0..TRIES {
            // What is not there is attached to nobody.
            let Some(object) = self.read(id).await? else {
                return Ok(());
            };
            let mut attachments = object.spec.attachments.clone();
            if !attachments.iter().any(leaves) {
                return Ok(());
            }
            if attachments.iter().any(|one| leaves(one) && !one.revoked) {
                for one in attachments.iter_mut().filter(|one| leaves(one)) {
                    one.revoked = true;
                }
                let changed = self.change(&object, json!({ "attachments": attachments }));
                match changed.await {
                    Ok(Some(changed)) => {
                        self.forget_revoked(changed, deadline).await?;
                        return Ok(());
                    }
                    Ok(None) => continue,
                    Err(VolumesError::NotFound(_)) => return Ok(()),
                    Err(error) => return Err(error),
                }
            }
            self.forget_revoked(object, deadline).await?;
            return Ok(());
        }
        Err(unavailable(
            id.as_str(),
            "its object changes all the time".into(),
        ))
    }

    /// Waits until every attachment that is to end is known to have ended, and then forgets them. Returns the object
    /// without them.
    pub(super) async fn forget_revoked(
        &self,
        object: NbdVolume,
        deadline: Instant,
    ) -> Result<NbdVolume, VolumesError> {
        if !object.spec.attachments.iter().any(|one| one.revoked) {
            return Ok(object);
        }
        let asked: Vec<&str> = object
            .spec
            .attachments
            .iter()
            .filter(|one| one.revoked)
            .map(|one| one.id.as_str())
            .collect();
        let ended = |seen: &NbdVolume| {
            let over = |id: &&str| state(seen, id) == Some(AttachmentState::Revoked);
            asked.iter().all(over).then_some(Ok(()))
        };
        let waits = |object: &NbdVolume| self.view.revocation_waits_for(object);
        let waited = self.wait(&object, deadline, ended, waits).await;
        for _ in 0..TRIES {
            // Another controller may have seen the marks and forgotten the attachments; only the truth can say so.
            let id: VolumeId = object
                .name_any()
                .parse()
                .map_err(|_| VolumesError::NotFound(object.name_any()))?;
            let Some(now) = self.read(&id).await? else {
                return Err(VolumesError::NotFound(object.name_any()));
            };
            let mut present = now.spec.attachments.iter();
            if !present.any(|one| asked.contains(&one.id.as_str())) {
                self.prune(&now).await;
                return Ok(now);
            }
            if !all_revoked(&now) {
                waited?;
                return Err(unavailable(
                    id.as_str(),
                    self.view.revocation_waits_for(&now),
                ));
            }
            if let Some(spec) = without_ended(&now)
                && let Some(changed) = self.change(&now, spec).await?
            {
                self.prune(&changed).await;
                return Ok(changed);
            }
        }
        Err(unavailable(
            &object.name_any(),
            "its object changes all the time".into(),
        ))
    }

    /// Removes what is said of attachments that are no more. Only order depends on it, so it may fail.
    async fn prune(&self, object: &NbdVolume) {
        if let Err(error) = prune(&self.volumes, object).await {
            tracing::debug!(volume = object.name_any(), %error, "the status of former attachments stays");
        }
    }
}

/// Removes the status of attachments that are not in the spec.
pub(in crate::kube) async fn prune(api: &Api<NbdVolume>, object: &NbdVolume) -> kube::Result<()> {
    let Some(status) = &object.status else {
        return Ok(());
    };
    let is_known = |id: &str| object.spec.attachments.iter().any(|one| one.id == id);
    let all = status.attachments.iter().enumerate();
    // From the end, so that those before keep their places. A patch that only removes makes nobody else an owner.
    let gone = all.rev().filter(|(_, one)| !is_known(&one.id));
    let mut steps: Vec<Value> = gone
        .map(|(place, _)| json!({ "op": "remove", "path": format!("/status/attachments/{place}") }))
        .collect();
    if steps.is_empty() {
        return Ok(());
    }
    let version = object.resource_version();
    steps.insert(
        0,
        json!({ "op": "test", "path": "/metadata/resourceVersion", "value": version }),
    );
    let patch = serde_json::from_value(steps.into()).map_err(kube::Error::SerdeError)?;
    let patched = api
        .patch_status(
            &object.name_any(),
            &PatchParams::default(),
            &Patch::<()>::Json(patch),
        )
        .await;
    match patched {
        // Who changed it meanwhile brings it here again.
        Err(error) if is_conflict(&error) || is_not_found(&error) || is_invalid(&error) => Ok(()),
        patched => patched.map(|_| ()),
    }
}
