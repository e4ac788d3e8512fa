//! CreateVolume: the object, in its place, with what others made of it.

use kube::ResourceExt;
use kube::api::{DeleteParams, PostParams, Preconditions};

use super::place::Placed;
use super::{Inner, backing, deadline, refused, to_volume, unavailable};
use crate::admission::{check_name, check_same};
use crate::kube::api::{
    self, BACKING_FINALIZER, BACKING_READY, CERTIFICATES_READY, CONTROLLER, Issuer, NEW, NO_ROOM,
    NbdVolume, NbdVolumeSpec, SERVER_FINALIZER, Source, VOLUME_LABEL,
};
use crate::kube::apply::{is_conflict, is_not_found};
use crate::storage::size;
use crate::volumes::{Certificates, CreateRequest, Placement, VolumeId, VolumesError};

/// cert-manager's API, as it is asked for certificates.
const CERT_MANAGER: &str = "cert-manager.io/v1";

impl Inner {
    pub(super) async fn create(&self, request: CreateRequest) -> Result<NbdVolume, VolumesError> {
        let deadline = deadline();
        check_name(&request.name)?;
        let size = size::settle(request.required_bytes, request.limit_bytes)
            .map_err(|error| VolumesError::OutOfRange(error.to_string()))?;
        let id = VolumeId::of_name(&request.name);
        let object = match self.read(&id).await? {
            Some(object) => object,
            None => {
                self.check_issuer(&request.certificates).await?;
                self.make(&id, size, &request).await?
            }
        };
        if object.metadata.deletion_timestamp.is_some() {
            return Err(unavailable(
                id.as_str(),
                format!(
                    "one of that name is being deleted, {}",
                    self.view.deletion_waits_for(&object)
                ),
            ));
        }
        check_same(&to_volume(&object)?, &request)?;
        check_place(&object, &request)?;
        let made = |object: &NbdVolume| {
            let conditions = &object.status.as_ref()?.conditions;
            let is_ready =
                api::holds(conditions, BACKING_READY) && api::holds(conditions, CERTIFICATES_READY);
            match no_room(object) {
                _ if is_ready => Some(Ok(object.clone())),
                Some(message) => Some(Err(VolumesError::NoRoom(message.to_owned()))),
                None => None,
            }
        };
        let waits = |object: &NbdVolume| self.view.creation_waits_for(object);
        let made = self.wait(&object, deadline, made, waits).await;
        // It is in the view by now, or was for long enough.
        self.placed.lock().await.remove(&id);
        if matches!(made, Err(VolumesError::NoRoom(_))) {
            self.take_back(&id).await;
        }
        made
    }

    /// Refuses, before anything is made, to wait for certificates that nobody would issue.
    async fn check_issuer(&self, wanted: &Certificates) -> Result<(), VolumesError> {
        if !matches!(wanted, Certificates::CertManager { .. }) {
            return Ok(());
        }
        match self.client.list_api_group_resources(CERT_MANAGER).await {
            Ok(_) => Ok(()),
            Err(error) if is_not_found(&error) => Err(VolumesError::Invalid(
                "parameters: certificates is certManager, but cert-manager's API is not there; install cert-manager, \
                 or use another source of certificates: managed, secret"
                    .to_owned(),
            )),
            Err(error) => Err(refused("new", "cannot ask for cert-manager's API", error)),
        }
    }

    async fn make(
        &self,
        id: &VolumeId,
        size: u64,
        request: &CreateRequest,
    ) -> Result<NbdVolume, VolumesError> {
        let (pool, node) = self.place(id, size, &request.placement).await?;
        let mut object = NbdVolume::new(
            id.as_str(),
            NbdVolumeSpec {
                name: request.name.clone(),
                size_bytes: size,
                pool,
                node,
                content: request.options.content,
                context: request.options.context.clone(),
                certificates: certificates(&request.certificates),
                port: None,
                attachments: Vec::new(),
            },
        );
        object.metadata.finalizers = Some(vec![BACKING_FINALIZER.into(), SERVER_FINALIZER.into()]);
        object
            .labels_mut()
            .insert(VOLUME_LABEL.into(), id.to_string());
        object.annotations_mut().insert(NEW.into(), "true".into());
        let params = PostParams {
            field_manager: Some(CONTROLLER.to_owned()),
            ..PostParams::default()
        };
        let made = self.volumes.create(&params, &object).await;
        if matches!(made, Err(kube::Error::Api(_))) {
            self.placed.lock().await.remove(id);
        }
        match made {
            // Another controller was faster.
            Err(error) if is_conflict(&error) => self.existing(id).await,
            made => made.map_err(|error| refused(id.as_str(), "cannot make its object", error)),
        }
    }

    /// The pool and node for a new volume, whose room counts as taken from now on.
    async fn place(
        &self,
        id: &VolumeId,
        size: u64,
        wanted: &Placement,
    ) -> Result<(String, String), VolumesError> {
        let mut placed = self.placed.lock().await;
        placed.retain(|id, placed| self.view.volume(id.as_str()).is_none() && placed.is_recent());
        let others = placed.iter().filter(|(other, _)| *other != id);
        let (pool, node) = self
            .view
            .choose(wanted, size, others.map(|(_, placed)| placed))?;
        placed.insert(id.clone(), Placed::new(pool.clone(), node.clone(), size));
        Ok((pool, node))
    }

    /// Deletes a volume that nobody got to know, so that the next try finds another place for it; if there is no room
    /// for it still.
    async fn take_back(&self, id: &VolumeId) {
        let Ok(Some(object)) = self.read(id).await else {
            return;
        };
        let is_misplaced = no_room(&object).is_some() && object.spec.attachments.is_empty();
        if !is_misplaced || object.metadata.deletion_timestamp.is_some() {
            return;
        }
        let params = DeleteParams {
            preconditions: Some(Preconditions {
                uid: object.uid(),
                resource_version: object.resource_version(),
            }),
            ..DeleteParams::default()
        };
        if let Err(error) = self.volumes.delete(id.as_str(), &params).await {
            tracing::warn!(volume = %id, %error, "a volume that has no room cannot be taken back");
        }
    }
}

/// What the agent says where it has not the room for a volume that was never made.
fn no_room(object: &NbdVolume) -> Option<&str> {
    let condition = backing(object)?;
    let is_made = object
        .status
        .as_ref()
        .is_some_and(|status| status.size_bytes.is_some());
    (condition.status == "False" && condition.reason == NO_ROOM && !is_made)
        .then_some(condition.message.as_str())
}

/// Refuses a volume of that name that was asked for elsewhere, or with certificates of another source.
fn check_place(object: &NbdVolume, request: &CreateRequest) -> Result<(), VolumesError> {
    let spec = &object.spec;
    let difference = if request
        .placement
        .pool
        .as_ref()
        .is_some_and(|pool| *pool != spec.pool)
    {
        format!("it is in pool {}", spec.pool)
    } else if certificates(&request.certificates) != spec.certificates {
        "with certificates of another source".to_owned()
    } else {
        return Ok(());
    };
    Err(VolumesError::Incompatible {
        volume: object.name_any(),
        difference,
    })
}

fn certificates(wanted: &Certificates) -> api::Certificates {
    match wanted {
        Certificates::Managed => api::Certificates::default(),
        Certificates::CertManager {
            issuer,
            kind,
            group,
        } => api::Certificates {
            source: Source::CertManager,
            issuer: Some(Issuer {
                name: issuer.clone(),
                kind: kind.clone(),
                group: group.clone(),
            }),
            server_secret: None,
        },
        Certificates::Secret { server } => api::Certificates {
            source: Source::Secret,
            issuer: None,
            server_secret: server.clone(),
        },
    }
}
