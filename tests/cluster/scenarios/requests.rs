//! Claims that cannot be satisfied: the Events on them say why.

use anyhow::{Result, ensure};

use super::{Scenario, When};
use crate::driver::NAMESPACE;
use crate::kubectl::PATIENCE;
use crate::report::step;
use crate::testbed::Testbed;
use crate::until;
use crate::workload::{self, Usage};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario::new(
        "requests::wrong_parameters",
        When::SideBySide,
        wrong_parameters,
    ),
    Scenario::new("requests::quota_exceeded", When::Alone, quota_exceeded),
];

const CLAIM: &str = "PersistentVolumeClaim";

fn wrong_parameters(testbed: &Testbed) -> Result<()> {
    let kubectl = testbed.namespace("wrong")?;
    let wrong: [(&str, &str, &[&str]); 4] = [
        ("unknown", "pools: default", &["pools"]),
        ("value", "verify: maybe", &["verify", "maybe", "strict"]),
        ("no-pool", "pool: elsewhere", &["elsewhere", "default"]),
        ("no-issuer", "certificates: certManager", &["issuer"]),
    ];
    for (name, parameters, _) in wrong {
        kubectl.apply(&workload::class(name, parameters))?;
        kubectl.apply(&workload::claim(name, name, Usage::FileSystem))?;
    }
    for (name, _, words) in wrong {
        step(&format!("an Event on the claim tells of {name}"), || {
            let words = [&["ProvisioningFailed"][..], words].concat();
            kubectl.until_event(CLAIM, name, &words)
        })?;
        let claim = kubectl.object("pvc", name)?.unwrap_or_default();
        ensure!(
            claim["status"]["phase"] == "Pending",
            "the claim is {claim}"
        );
    }
    testbed.delete_namespace(&kubectl)?;
    for (name, ..) in wrong {
        kubectl.run(&["delete", "storageclass", name])?;
    }
    Ok(())
}

/// Of the driver's namespace: that of the claim's own is the API server's to refuse.
fn quota_exceeded(testbed: &Testbed) -> Result<()> {
    let kubectl = testbed.namespace("quota")?;
    let ours = kubectl.in_namespace(NAMESPACE);
    let kind = "count/nbdvolumes.hawser.dev";
    ours.run(&["create", "quota", "volumes", &format!("--hard={kind}=0")])?;
    step("the quota is counted", || {
        until("it is", PATIENCE, || {
            let used = ours.run(&[
                "get",
                "quota",
                "volumes",
                "--output=jsonpath={.status.used}",
            ])?;
            Ok(used.contains(kind).then_some(()))
        })
    })?;
    kubectl.apply(&workload::class("at-once", "pool: default"))?;
    kubectl.apply(&workload::claim("data", "at-once", Usage::FileSystem))?;
    step("an Event on the claim tells of the quota", || {
        kubectl.until_event(
            CLAIM,
            "data",
            &["ProvisioningFailed", "exceeded quota: volumes"],
        )
    })?;
    ours.run(&["delete", "quota", "volumes"])?;
    step("the claim is bound when there is none any more", || {
        workload::volume_id(&kubectl, "data")
    })?;
    testbed.delete_namespace(&kubectl)?;
    kubectl
        .run(&["delete", "storageclass", "at-once"])
        .map(drop)
}
