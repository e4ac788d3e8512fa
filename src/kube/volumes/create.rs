//! CreateVolume: the object, in its place, with what others made of it.

use kube::ResourceExt;
use kube::api::{DeleteParams, PostParams, Preconditions};
use tokio::time::Instant;

use super::place::Placed;
use super::{Inner, PATIENCE, backing, refused, to_volume, unavailable};
use crate::admission::{check_name, check_same};
use crate::kube::api::{
    self, BACKING_FINALIZER, BACKING_READY, CERTIFICATES_READY, CONTROLLER, Issuer, NO_ROOM,
    NbdVolume, NbdVolumeSpec, SERVER_FINALIZER, Source, VOLUME_LABEL,
};
use crate::kube::apply::is_conflict;
use crate::storage::size;
use crate::volumes::{Certificates, CreateRequest, VolumeId, VolumesError};

impl Inner {
    pub(super) async fn create(&self, request: CreateRequest) -> Result<NbdVolume, VolumesError> {
        let deadline = Instant::now() + PATIENCE;
        check_name(&request.name)?;
        let size = size::settle(request.required_bytes, request.limit_bytes)
            .map_err(|error| VolumesError::OutOfRange(error.to_string()))?;
        let id = VolumeId::of_name(&request.name);
        let object = match self.read(&id).await? {
            Some(object) => object,
            None => self.make(&id, size, &request).await?,
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
            let no_room = backing(object)
                .filter(|condition| condition.status == "False" && condition.reason == NO_ROOM);
            match no_room {
                _ if is_ready => Some(Ok(object.clone())),
                Some(condition) => Some(Err(VolumesError::NoRoom(condition.message.clone()))),
                None => None,
            }
        };
        let waits = |object: &NbdVolume| self.view.creation_waits_for(object);
        let made = self.wait(&object, deadline, made, waits).await;
        if matches!(made, Err(VolumesError::NoRoom(_))) {
            self.take_back(&object).await;
        }
        made
    }

    async fn make(
        &self,
        id: &VolumeId,
        size: u64,
        request: &CreateRequest,
    ) -> Result<NbdVolume, VolumesError> {
        let mut placed = self.placed.lock().await;
        placed.retain(|id, placed| self.view.volume(id.as_str()).is_none() && placed.is_recent());
        let (pool, node) = self
            .view
            .choose(&request.placement, size, placed.values())?;
        let mut object = NbdVolume::new(
            id.as_str(),
            NbdVolumeSpec {
                name: request.name.clone(),
                size_bytes: size,
                pool: pool.clone(),
                node: node.clone(),
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
        let params = PostParams {
            field_manager: Some(CONTROLLER.to_owned()),
            ..PostParams::default()
        };
        match self.volumes.create(&params, &object).await {
            Ok(made) => {
                placed.insert(id.clone(), Placed::new(pool, node, size));
                Ok(made)
            }
            // Another controller was faster.
            Err(error) if is_conflict(&error) => {
                drop(placed);
                self.existing(id).await
            }
            Err(error) => Err(refused(id.as_str(), "cannot make its object", error)),
        }
    }

    /// Deletes a volume that nobody got to know, so that the next try finds another place for it.
    async fn take_back(&self, object: &NbdVolume) {
        let params = DeleteParams {
            preconditions: Some(Preconditions {
                uid: object.uid(),
                resource_version: None,
            }),
            ..DeleteParams::default()
        };
        let name = object.name_any();
        if let Err(error) = self.volumes.delete(&name, &params).await {
            tracing::warn!(volume = name, %error, "a volume that has no room cannot be taken back");
        }
    }
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
