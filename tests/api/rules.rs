//! What the API server itself refuses.

use anyhow::{Result, ensure};
use hawser::kube::api::{NbdPool, NbdVolume};
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::{Value, json};

use crate::server::ApiServer;

pub(crate) const VOLUME: &str = "vol-00000000000000000000000000000001";
const ATTACHMENT: &str = "att-00000000000000000000000000000001";

fn volume() -> Value {
    json!({
        "apiVersion": "hawser.dev/v1alpha1", "kind": "NbdVolume",
        "metadata": { "name": VOLUME },
        "spec": {
            "name": "pvc-1", "sizeBytes": 8192, "pool": "rules", "node": "node-1", "content": "filesystem",
            "attachments": [{ "id": ATTACHMENT, "node": "node-1", "mode": "single-node-writer", "revoked": true }],
        },
    })
}

async fn is_refused(api: &Api<NbdVolume>, is_status: bool, patch: Value) -> Result<Option<String>> {
    let params = PatchParams::default();
    let patch = Patch::Merge(patch);
    let patched = match is_status {
        true => api.patch_status(VOLUME, &params, &patch).await,
        false => api.patch(VOLUME, &params, &patch).await,
    };
    match patched {
        Ok(_) => Ok(None),
        Err(kube::Error::Api(refusal)) if refusal.code == 422 => Ok(Some(refusal.message.clone())),
        Err(error) => Err(error.into()),
    }
}

pub(crate) async fn the_crds_are_taken_and_their_rules_hold(
    server: &ApiServer,
    namespace: &str,
) -> Result<()> {
    let client: &Client = &server.client;
    let api: Api<NbdVolume> = Api::namespaced(client.clone(), namespace);
    let mut misnamed = volume();
    misnamed["metadata"]["name"] = "pvc-1".into();
    let misnamed: NbdVolume = serde_json::from_value(misnamed)?;
    ensure!(api.create(&PostParams::default(), &misnamed).await.is_err());
    let good: NbdVolume = serde_json::from_value(volume())?;
    api.create(&PostParams::default(), &good).await?;

    let one = |number: &str, node: &str, revoked: bool| {
        let id = format!("att-{number:0>32}");
        json!({ "id": id, "node": node, "mode": "single-node-writer", "revoked": revoked })
    };
    let attachment =
        |node: &str, revoked: bool| json!({ "spec": { "attachments": [one("1", node, revoked)] } });
    for (change, told) in [
        (json!({ "spec": { "name": "pvc-2" } }), "name is immutable"),
        (json!({ "spec": { "node": "node-2" } }), "node is immutable"),
        (json!({ "spec": { "pool": "other" } }), "pool is immutable"),
        (
            json!({ "spec": { "content": "block" } }),
            "content is immutable",
        ),
        (
            json!({ "spec": { "context": { "verify": "off" } } }),
            "context is immutable",
        ),
        (json!({ "spec": { "sizeBytes": 4096 } }), "never shrinks"),
        (
            json!({ "spec": { "certificates": { "source": "certManager" } } }),
            "needs issuer",
        ),
        (json!({ "spec": { "attachments": [] } }), "revoked: true"),
        (json!({ "spec": { "attachments": null } }), "revoked: true"),
        (
            json!({ "spec": { "attachments": [
                one("1", "node-1", true), one("2", "node-1", false), one("3", "node-2", false),
            ]}}),
            "one node at a time",
        ),
        (attachment("node-1", false), "stays so"),
        (attachment("node-2", true), "immutable"),
    ] {
        let refusal = is_refused(&api, false, change.clone()).await?;
        ensure!(
            refusal.as_ref().is_some_and(|text| text.contains(told)),
            "{change}: {refusal:?}"
        );
    }
    ensure!(
        is_refused(&api, false, json!({ "spec": { "sizeBytes": 12288 } }))
            .await?
            .is_none()
    );

    let format = |state: &str| json!({ "status": { "format": { "state": state, "fs": "ext4" } } });
    let mark = |state: &str| json!({ "status": { "attachments": [{ "id": ATTACHMENT, "state": state }] } });
    for (change, told) in [
        (format("started"), None),
        (format("never"), Some("moves forward")),
        (format("done"), None),
        (format("started"), Some("moves forward")),
        (
            json!({ "status": { "format": null } }),
            Some("never forgotten"),
        ),
        (mark("Allowed"), None),
        (mark("Revoked"), None),
        (mark("Allowed"), Some("stays so")),
    ] {
        let refusal = is_refused(&api, true, change.clone()).await?;
        match told {
            None => ensure!(refusal.is_none(), "{change}: {refusal:?}"),
            Some(told) => ensure!(
                refusal.as_ref().is_some_and(|text| text.contains(told)),
                "{change}: {refusal:?}"
            ),
        }
    }

    // Once the agent has said so, it may leave.
    let gone = json!({ "spec": { "attachments": [] } });
    ensure!(is_refused(&api, false, gone).await?.is_none());

    let pools: Api<NbdPool> = Api::all(client.clone());
    let pool = |path: &str| {
        serde_json::from_value::<NbdPool>(json!({
            "apiVersion": "hawser.dev/v1alpha1", "kind": "NbdPool", "metadata": { "name": "rules" },
            "spec": { "backend": { "directory": { "path": path } } },
        }))
    };
    for bad in ["pool", "/", "/a/../b", "/a//b", "/a/"] {
        ensure!(
            pools
                .create(&PostParams::default(), &pool(bad)?)
                .await
                .is_err(),
            "{bad}"
        );
    }
    pools
        .create(&PostParams::default(), &pool("/var/lib/hawser/pool.d/.x")?)
        .await?;
    let moved =
        Patch::Merge(json!({ "spec": { "backend": { "directory": { "path": "/other" } } } }));
    ensure!(
        pools
            .patch("rules", &PatchParams::default(), &moved)
            .await
            .is_err()
    );
    pools.delete("rules", &Default::default()).await?;
    Ok(())
}
