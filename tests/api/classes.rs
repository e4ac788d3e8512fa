//! StorageClasses and claims that ask for what cannot be: the claim's Event says what, and what could.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hawser::kube::api::NbdVolume;
use hawser::volumes::VolumeId;
use kube::Api;
use kube::api::ListParams;

use crate::claims::{Claim, Sidecar, bound, make_class, told};
use crate::server::ApiServer;
use crate::until;
use crate::world::World;

pub(crate) async fn a_wrong_class_is_told_on_the_claim(
    server: &ApiServer,
    namespace: &str,
) -> Result<()> {
    let world = World::new(server, namespace).await?;
    let provisioner = Sidecar::start(&world, "csi-provisioner")?;
    let pool = namespace;
    // What the class has beside its pool, what the claim asks for, and what the Event says.
    type Case<'a> = (
        &'a str,
        &'a [(&'a str, &'a str)],
        &'a [(&'a str, &'a str)],
        &'a [&'a str],
    );
    let cases: &[Case<'_>] = &[
        (
            "unknown-key",
            &[("conections", "2")],
            &[],
            &["\"conections\" is unknown", "there are connections, verify"],
        ),
        (
            "bad-number",
            &[("connections", "17"), ("ioTimeout", "10s")],
            &[],
            &[
                "connections \"17\" is not a whole number from 1 to 16",
                "ioTimeout \"10s\" is not a whole number from 2 to 300",
            ],
        ),
        (
            "bad-word",
            &[("verify", "Strict")],
            &[],
            &["verify: \"Strict\" is not", "strict, warn or off"],
        ),
        (
            "bad-source",
            &[("certificates", "cert-manager")],
            &[],
            &["certificates: \"cert-manager\" is none of managed, certManager, secret"],
        ),
        (
            "no-issuer",
            &[("certificates", "certManager")],
            &[],
            &["certManager needs issuer"],
        ),
        (
            "no-cert-manager",
            &[("certificates", "certManager"), ("issuer", "mine")],
            &[],
            &[
                "cert-manager's API is not there",
                "another source of certificates",
            ],
        ),
        (
            "unknown-pool",
            &[("pool", "nowhere")],
            &[],
            &["there is no NbdPool nowhere; there are: ", pool],
        ),
        (
            "bad-fstype",
            &[("csi.storage.k8s.io/fstype", "zfs")],
            &[],
            &["\"zfs\" is none of ext4, xfs, btrfs"],
        ),
        (
            "many-writers",
            &[],
            &[("mode", "ReadWriteMany")],
            &[
                "MULTI_NODE_MULTI_WRITER is not supported",
                "one writing node",
            ],
        ),
        (
            "too-large",
            &[],
            &[("size", "101Gi")],
            &["has 108447924224 bytes left", " are the most"],
        ),
        (
            "no-secrets",
            &[("certificates", "secret")],
            &[],
            &[
                "Secret vol-",
                "-server is not there yet",
                "kubernetes.io/tls",
                ".server.hawser.dev",
            ],
        ),
    ];
    for (name, parameters, asked, _) in cases {
        let class = format!("{namespace}-{name}");
        let mut all = vec![("pool", pool)];
        for parameter in *parameters {
            all.retain(|(key, _)| *key != parameter.0);
            all.push(*parameter);
        }
        make_class(&world, &class, &all).await?;
        let mut claim = Claim::new(name, &class);
        for (what, value) in *asked {
            match *what {
                "mode" => claim.mode = value,
                _ => claim.size = value,
            }
        }
        claim.make(&world).await?;
    }
    for (name, _, _, words) in cases {
        told(&world, "PersistentVolumeClaim", name, words)
            .await
            .with_context(|| format!("{}\n{}", world.controller.told(), provisioner.told()))?;
    }
    // Of what was refused nothing is left; what waits for its Secrets waits.
    let volumes: Api<NbdVolume> = world.api();
    let left = volumes.list(&ListParams::default()).await?.items;
    let waiting: Vec<_> = left
        .iter()
        .map(|one| one.spec.certificates.source)
        .collect();
    ensure!(
        waiting == [hawser::kube::api::Source::Secret],
        "{waiting:?}"
    );
    // Once its Secret is there, it goes on.
    let name = &left[0].spec.name;
    let id = VolumeId::of_name(name);
    let authority = hawser::tls::Authority::temporary()?;
    world
        .put_secret(&format!("{id}-server"), &authority.issue_server(&id, &[])?)
        .await?;
    let volume = until("its claim is bound", Duration::from_secs(60), async || {
        Ok(bound(&world, "no-secrets").await.ok())
    })
    .await?;
    ensure!(volume == *name, "{volume} is not {name}");
    Ok(())
}
