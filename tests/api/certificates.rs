//! Certificates that end, authorities that are replaced, and those that others make.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hawser::kube::api::NbdVolume;
use hawser::tls::{Authority, Leaf, Secret as Parsed, Side, client_identity, server_identity};
use hawser::volumes::VolumeId;
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim, Secret};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::api::{
    ApiResource, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams, PostParams,
};
use kube::{Api, ResourceExt};
use serde_json::json;
use time::OffsetDateTime;
use tonic::Code;

use crate::claims::{Claim, told};
use crate::server::ApiServer;
use crate::until;
use crate::world::{SOON, World, refusal};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

fn parts(secret: &Secret) -> BTreeMap<String, Vec<u8>> {
    let data = secret.data.iter().flatten();
    data.map(|(key, value)| (key.clone(), value.0.clone()))
        .collect()
}

/// Waits until a condition of the volume is so; returns it.
pub(crate) async fn condition(
    world: &World<'_>,
    id: &str,
    kind: &str,
    is_so: impl Fn(&Condition) -> bool,
) -> Result<Condition> {
    let volumes: Api<NbdVolume> = world.api();
    let mut last = None;
    let found = until(
        &format!("{kind} of {id} is as it should be"),
        SOON,
        async || {
            let status = volumes.get(id).await?.status.unwrap_or_default();
            let mut conditions = status.conditions.into_iter();
            last = conditions.find(|one| one.type_ == kind);
            Ok(last.clone().filter(&is_so))
        },
    )
    .await;
    found.with_context(|| format!("it is {last:?}; {}", world.controller.told()))
}

pub(crate) async fn the_authority_is_replaced_without_an_outage(
    server: &ApiServer,
    namespace: &str,
) -> Result<()> {
    let mut world = World::new(server, namespace).await?;
    // One that is in its last year.
    let (_, old) = Authority::make_for(200 * DAY)?;
    world.put_secret("hawser-ca", &old).await?;
    let id = world.create("pvc-ca").await?.volume_id;
    world.ready(&id).await?;
    let first = replaced(&world, &id, "pvc-ca-hawser-client", &old).await?;
    // Somebody asks for another one.
    let secrets: Api<Secret> = world.api();
    let ask = json!({ "metadata": { "annotations": { "hawser.dev/rotate": "it leaked" } } });
    secrets
        .patch("hawser-ca", &PatchParams::default(), &Patch::Merge(ask))
        .await?;
    replaced(&world, &id, "pvc-ca-hawser-client", &first).await?;
    // Whatever comes later is issued by the new one alone.
    let id = world.create("pvc-later").await?.volume_id;
    world.ready(&id).await?;
    Ok(())
}

/// Follows the replacement of an authority until its end; at each moment, both sides understand whoever has what was
/// there the moment before. Returns the new one.
async fn replaced(
    world: &World<'_>,
    id: &str,
    client: &str,
    old: &BTreeMap<String, Vec<u8>>,
) -> Result<BTreeMap<String, Vec<u8>>> {
    let secrets: Api<Secret> = world.api();
    let side = async |name: &str, side| -> Result<Parsed> {
        Ok(Parsed::from_map(
            name,
            &parts(&secrets.get(name).await?),
            side,
        )?)
    };
    let accepts = |one: &Parsed, other: &Parsed| one.trusting(other).check_issuer();
    let mut before: Option<(Parsed, Parsed)> = None;
    until(
        "another authority is at rest",
        Duration::from_secs(60),
        async || {
            let now = (
                side(&format!("{id}-server"), Side::Server).await?,
                side(client, Side::Client).await?,
            );
            let before = before.replace(now.clone()).unwrap_or_else(|| now.clone());
            for (one, other) in [(&now.0, &now.1), (&now.0, &before.1), (&before.0, &now.1)] {
                accepts(one, other).context("a client does not trust a server")?;
                accepts(other, one).context("a server does not trust a client")?;
            }
            let kept = parts(&secrets.get("hawser-ca").await?);
            let is_new = kept.get("tls.crt") != old.get("tls.crt");
            let is_told = parts(&secrets.get(client).await?).get("ca.crt") == kept.get("tls.crt");
            let is_at_rest =
                kept.get("ca.crt") == kept.get("tls.crt") && !kept.contains_key("next.key");
            Ok((is_new && is_told && is_at_rest).then_some(kept))
        },
    )
    .await
    .with_context(|| world.controller.told())
}

/// A leaf that began a month ago.
fn leaf(
    authority: &Authority,
    side: Side,
    name: String,
    days_left: i64,
) -> Result<BTreeMap<String, Vec<u8>>> {
    let now = OffsetDateTime::now_utc();
    Ok(authority.issue(&Leaf {
        not_before: now - 30 * DAY,
        not_after: now + time::Duration::days(days_left),
        ..Leaf::new(side, vec![name])
    })?)
}

/// A claim and its PersistentVolume, as csi-provisioner makes it.
pub(crate) async fn bind(world: &World<'_>, volume: &str, id: &str, client: &str) -> Result<()> {
    let claim = Claim {
        size: "1Gi",
        ..Claim::new(volume, "")
    };
    let claim: PersistentVolumeClaim = claim.make(world).await?;
    let volumes: Api<PersistentVolume> = Api::all(world.server.client.clone());
    let secret = json!({ "name": client, "namespace": world.namespace });
    let volume = serde_json::from_value(json!({
        "metadata": { "name": volume },
        "spec": {
            "capacity": { "storage": "1Gi" }, "accessModes": ["ReadWriteOnce"],
            "persistentVolumeReclaimPolicy": "Retain",
            "claimRef": {
                "kind": "PersistentVolumeClaim", "apiVersion": "v1", "name": volume,
                "namespace": world.namespace, "uid": claim.uid(),
            },
            "csi": { "driver": "csi.hawser.dev", "volumeHandle": id, "nodeStageSecretRef": secret },
        },
    }))?;
    volumes.create(&PostParams::default(), &volume).await?;
    Ok(())
}

pub(crate) async fn certificates_of_ones_own_that_end_are_told(
    server: &ApiServer,
    namespace: &str,
) -> Result<()> {
    let world = World::new(server, namespace).await?;
    let name = &format!("pvc-{namespace}-own");
    let id = VolumeId::of_name(name);
    let (side, client) = (format!("{id}-server"), format!("{name}-hawser-client"));
    let authority = Authority::temporary()?;
    let mut wanted = world.wanted(name);
    wanted
        .parameters
        .insert("certificates".to_owned(), "secret".to_owned());
    let refused = refusal(
        world
            .controller
            .csi
            .clone()
            .create_volume(wanted.clone())
            .await,
    )?;
    ensure!(
        refused.code() == Code::Unavailable
            && refused
                .message()
                .contains(&format!("Secret {side} is not there yet")),
        "{refused}"
    );
    let fine = leaf(&authority, Side::Server, server_identity(&id), 300)?;
    world.put_secret(&side, &fine).await?;
    until("it is made", SOON, async || {
        let made = world
            .controller
            .csi
            .clone()
            .create_volume(wanted.clone())
            .await;
        Ok(made.ok().map(|_| ()))
    })
    .await?;
    bind(&world, name, id.as_str(), &client).await?;
    // The clients' is missing: the server runs all the same, and it is said.
    let said = "CertificatesReady";
    let soon = leaf(&authority, Side::Server, server_identity(&id), 5)?;
    world.put_secret(&side, &soon).await?;
    condition(&world, id.as_str(), said, |one| {
        one.status == "False"
            && one
                .message
                .contains(&format!("Secret {client} is not there yet"))
    })
    .await?;
    let fine = leaf(&authority, Side::Client, client_identity(&id), 300)?;
    world.put_secret(&client, &fine).await?;
    let ends = condition(&world, id.as_str(), said, |one| one.reason == "EndsSoon").await?;
    ensure!(
        ends.status == "True" && ends.message.contains(&side),
        "{ends:?}"
    );
    for kind in ["NbdVolume", "PersistentVolumeClaim"] {
        let about = match kind {
            "NbdVolume" => id.as_str(),
            _ => name,
        };
        told(&world, kind, about, &["EndsSoon", &side, "ends at 20"]).await?;
    }
    // One that has ended.
    let over = leaf(&authority, Side::Client, client_identity(&id), -1)?;
    world.put_secret(&client, &over).await?;
    condition(&world, id.as_str(), said, |one| {
        one.reason == "SecretExpired"
    })
    .await?;
    told(
        &world,
        "PersistentVolumeClaim",
        name,
        &[&client, "ended at 20", "renew it"],
    )
    .await?;
    Ok(())
}

/// As much of cert-manager's definition as is asked for.
fn definition() -> Result<CustomResourceDefinition> {
    let any = json!({ "type": "object", "x-kubernetes-preserve-unknown-fields": true });
    Ok(serde_json::from_value(json!({
        "metadata": { "name": "certificates.cert-manager.io" },
        "spec": {
            "group": "cert-manager.io", "scope": "Namespaced",
            "names": { "kind": "Certificate", "plural": "certificates" },
            "versions": [{
                "name": "v1", "served": true, "storage": true,
                "schema": { "openAPIV3Schema": { "type": "object", "properties": {
                    "spec": {
                        "type": "object", "required": ["secretName", "issuerRef"],
                        "properties": {
                            "secretName": { "type": "string" }, "issuerRef": any,
                            "dnsNames": { "type": "array", "items": { "type": "string" } },
                            "usages": { "type": "array", "items": { "type": "string" } },
                            "privateKey": any,
                        },
                    },
                }}},
            }],
        },
    }))?)
}

pub(crate) async fn cert_manager_is_asked_and_may_go(
    server: &ApiServer,
    namespace: &str,
) -> Result<()> {
    let mut world = World::new(server, namespace).await?;
    let mut wanted = world.wanted("pvc-asked");
    for (key, value) in [("certificates", "certManager"), ("issuer", "storage")] {
        wanted.parameters.insert(key.to_owned(), value.to_owned());
    }
    let create = async || {
        world
            .controller
            .csi
            .clone()
            .create_volume(wanted.clone())
            .await
    };
    let refused = refusal(create().await)?;
    ensure!(refused.code() == Code::InvalidArgument, "{refused}");
    let definitions: Api<CustomResourceDefinition> = Api::all(server.client.clone());
    definitions
        .create(&PostParams::default(), &definition()?)
        .await?;
    let kind = GroupVersionKind::gvk("cert-manager.io", "v1", "Certificate");
    let resource = ApiResource::from_gvk_with_plural(&kind, "certificates");
    let requests: Api<DynamicObject> =
        Api::namespaced_with(server.client.clone(), namespace, &resource);
    until("the definition is served", SOON, async || {
        Ok(requests.list(&ListParams::default()).await.ok().map(|_| ()))
    })
    .await?;
    // Nobody issues yet: it waits, and says for whom.
    let refused = refusal(create().await)?;
    ensure!(
        refused.code() == Code::Unavailable
            && refused.message().contains("cert-manager has not issued it"),
        "{refused}"
    );
    // The part of cert-manager is played here.
    let authority = Authority::temporary()?;
    let volume = until("it is made", Duration::from_secs(60), async || {
        for request in requests.list(&ListParams::default()).await? {
            let spec = &request.data["spec"];
            ensure!(spec["issuerRef"]["name"] == "storage", "{spec}");
            let name = spec["dnsNames"][0].as_str().context("no name")?.to_owned();
            let side = match spec["usages"].to_string().contains("server auth") {
                true => Side::Server,
                false => Side::Client,
            };
            let issued = leaf(&authority, side, name, 300)?;
            let secret = spec["secretName"].as_str().context("no Secret")?;
            world.put_secret(secret, &issued).await?;
        }
        Ok(create()
            .await
            .ok()
            .and_then(|made| made.into_inner().volume))
    })
    .await?;
    let id = volume.volume_id;
    world.ready(&id).await?;
    let asked = requests.list(&ListParams::default()).await?.items.len();
    ensure!(asked == 2, "{asked} Certificates");
    // cert-manager goes: it is said, and what it issued is used until its end.
    definitions
        .delete("certificates.cert-manager.io", &Default::default())
        .await?;
    let sets: Api<k8s_openapi::api::apps::v1::StatefulSet> = world.api();
    until("the definition is gone", SOON, async || {
        Ok(requests
            .list(&ListParams::default())
            .await
            .err()
            .map(|_| ()))
    })
    .await?;
    sets.delete(&id, &Default::default()).await?;
    condition(&world, &id, "CertificatesReady", |one| {
        one.reason == "CertManagerMissing"
    })
    .await?;
    condition(&world, &id, "ServerReady", |one| one.status == "True").await?;
    // So it is deleted like any other.
    world.delete_at_last(&id).await
}
