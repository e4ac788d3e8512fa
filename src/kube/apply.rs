//! Server-side apply, with one owner a field.

use std::fmt::Debug;

use kube::api::{Patch, PatchParams};
use kube::{Api, Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;

/// Applies `manager`'s part of the status of `object`: what it applied before and leaves out now goes away.
///
/// Only fields that the manager owns may be in `status`. It fails with a conflict when an object of that name is
/// another one by now (its uid differs).
pub async fn apply_status<K>(
    api: &Api<K>,
    object: &K,
    manager: &str,
    status: &(impl Serialize + ?Sized),
) -> kube::Result<K>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned,
{
    write_status(api, object, manager, status, None).await
}

/// The same, if the object is still the one that `status` was made from: a conflict otherwise.
pub async fn apply_status_of<K>(
    api: &Api<K>,
    object: &K,
    manager: &str,
    status: &(impl Serialize + ?Sized),
) -> kube::Result<K>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned,
{
    write_status(api, object, manager, status, object.resource_version()).await
}

async fn write_status<K>(
    api: &Api<K>,
    object: &K,
    manager: &str,
    status: &(impl Serialize + ?Sized),
    version: Option<String>,
) -> kube::Result<K>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned,
{
    let name = object.name_any();
    let mut metadata = json!({ "name": name, "uid": object.uid() });
    if let Some(version) = version {
        metadata["resourceVersion"] = version.into();
    }
    let patch = json!({
        "apiVersion": K::api_version(&()),
        "kind": K::kind(&()),
        "metadata": metadata,
        "status": status,
    });
    let params = PatchParams::apply(manager).force();
    api.patch_status(&name, &params, &Patch::Apply(patch)).await
}

/// Applies a whole object as `manager`: fields of others stay.
pub async fn apply<K>(api: &Api<K>, manager: &str, object: &K) -> kube::Result<K>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Serialize,
{
    let params = PatchParams::apply(manager).force();
    let patch = json_object(object)?;
    api.patch(&object.name_any(), &params, &Patch::Apply(patch))
        .await
}

/// An object as JSON with its `apiVersion` and `kind`.
fn json_object<K>(object: &K) -> kube::Result<serde_json::Value>
where
    K: Resource<DynamicType = ()> + Serialize,
{
    let mut value = serde_json::to_value(object).map_err(kube::Error::SerdeError)?;
    value["apiVersion"] = K::api_version(&()).into();
    value["kind"] = K::kind(&()).into();
    Ok(value)
}

/// Whether the API server says that there is no such object.
#[must_use]
pub fn is_not_found(error: &kube::Error) -> bool {
    has_code(error, 404)
}

/// Whether somebody else changed or made the object first.
#[must_use]
pub fn is_conflict(error: &kube::Error) -> bool {
    has_code(error, 409)
}

/// Whether the API server would not have the object so; a patch whose test failed is told so too.
#[must_use]
pub fn is_invalid(error: &kube::Error) -> bool {
    has_code(error, 422)
}

/// Whether a quota of the namespace does not allow another such object.
#[must_use]
pub fn is_quota(error: &kube::Error) -> bool {
    // The API server has no reason of its own for it (k8s.io/apiserver, pkg/admission/plugin/resourcequota).
    matches!(error, kube::Error::Api(status) if status.code == 403 && status.message.contains("quota:"))
}

fn has_code(error: &kube::Error, code: u16) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == code)
}
