//! The claim of a volume: where its user looks.

use k8s_openapi::api::core::v1::{ObjectReference, PersistentVolume};
use kube::Api;

/// The claim that the PersistentVolume of that name is bound to, as an Event regards it. `None` where there is no such
/// volume, it has no claim, or nobody may know.
pub async fn claim_of(
    volumes: &Api<PersistentVolume>,
    name: &str,
) -> kube::Result<Option<ObjectReference>> {
    match volumes.get(name).await {
        Err(kube::Error::Api(status)) if [403, 404].contains(&status.code) => Ok(None),
        Err(error) => Err(error),
        Ok(volume) => Ok(claim(&volume)),
    }
}

/// The claim that a PersistentVolume is bound to.
#[must_use]
pub fn claim(volume: &PersistentVolume) -> Option<ObjectReference> {
    let claim = volume.spec.as_ref()?.claim_ref.clone()?;
    Some(ObjectReference {
        kind: Some("PersistentVolumeClaim".to_owned()),
        api_version: Some("v1".to_owned()),
        ..claim
    })
}
