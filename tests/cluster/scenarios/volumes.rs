//! What a user does with volumes.

use std::fs;
use std::process::Command;

use anyhow::{Result, ensure};

use super::certificates::{make_certificates, put_secret};
use super::{Scenario, When};
use crate::driver::{self, NAMESPACE, STORAGE_NODE};
use crate::kubectl::{Kubectl, PATIENCE};
use crate::process::Process;
use crate::report::step;
use crate::testbed::Testbed;
use crate::workload::{self, CLASS, Usage};
use crate::{network, until};

pub(crate) const SCENARIOS: &[Scenario] = &[
    // The longest first.
    Scenario::new(
        "volumes::expanded_online",
        When::SideBySide,
        expanded_online,
    ),
    Scenario::new(
        "volumes::a_pod_moves_and_reads",
        When::SideBySide,
        a_pod_moves_and_reads,
    ),
    Scenario::new(
        "volumes::on_a_foreign_server",
        When::SideBySide,
        on_a_foreign_server,
    ),
    Scenario::new("volumes::raw_block", When::SideBySide, raw_block),
    Scenario::new(
        "volumes::claim_deleted_while_in_use",
        When::SideBySide,
        claim_deleted_while_in_use,
    ),
    Scenario::new(
        "volumes::read_write_once_pod",
        When::SideBySide,
        read_write_once_pod,
    ),
    Scenario::new("volumes::without_root", When::SideBySide, without_root),
];

fn a_pod_moves_and_reads(testbed: &Testbed) -> Result<()> {
    let kubectl = testbed.namespace("moves")?;
    moves(&kubectl, CLASS, Usage::FileSystem)?;
    let volume = workload::volume_id(&kubectl, "data")?;
    step("an Event on the claim tells what verification said", || {
        let kind = "PersistentVolumeClaim";
        kubectl.until_event(kind, "data", &["Verified", "passed every check", "node1"])
    })?;
    step(
        "kubectl get nbdvolumes tells where the data is, and how it travels",
        || {
            until("it does", PATIENCE, || {
                let row = kubectl.in_namespace(NAMESPACE).run(&[
                    "get",
                    "nbdvolume",
                    &volume,
                    "--no-headers",
                ])?;
                let tells = ["Ready", STORAGE_NODE, "TLS 1.3 in the kernel", "passed"];
                Ok(tells.iter().all(|words| row.contains(words)).then_some(()))
            })
        },
    )?;
    testbed.delete_namespace(&kubectl)
}

fn raw_block(testbed: &Testbed) -> Result<()> {
    let kubectl = testbed.namespace("block")?;
    moves(&kubectl, CLASS, Usage::Block)?;
    testbed.delete_namespace(&kubectl)
}

/// A claim is written to on one node and read on the other.
fn moves(kubectl: &Kubectl, class: &str, usage: Usage) -> Result<()> {
    kubectl.apply(&workload::claim("data", class, usage))?;
    kubectl.apply(&workload::pod("writer", "node2", "data", usage))?;
    step("a pod has its volume", || kubectl.until_pod_ready("writer"))?;
    let written = workload::write_something(kubectl, "writer", usage)?;
    kubectl.delete("pod", "writer")?;
    kubectl.apply(&workload::pod("reader", "node1", "data", usage))?;
    step("a pod on the other node has it", || {
        kubectl.until_pod_ready("reader")
    })?;
    let read = workload::digest(kubectl, "reader", usage)?;
    ensure!(read == written, "the second pod reads something else");
    Ok(())
}

fn read_write_once_pod(testbed: &Testbed) -> Result<()> {
    let kubectl = testbed.namespace("once-pod")?;
    kubectl.apply(&workload::claim_as(
        "data",
        CLASS,
        Usage::FileSystem,
        "ReadWriteOncePod",
    ))?;
    kubectl.apply(&workload::pod("first", "node2", "data", Usage::FileSystem))?;
    step("a pod has its volume", || kubectl.until_pod_ready("first"))?;
    kubectl.apply(&workload::pod("second", "node2", "data", Usage::FileSystem))?;
    step("a second pod must wait", || {
        kubectl.until(
            "pod",
            "second",
            "is not scheduled, for the claim is in use",
            |pod| {
                pod["status"]["conditions"]
                    .to_string()
                    .contains("ReadWriteOncePod")
            },
        )
    })?;
    kubectl.delete("pod", "first")?;
    step("it has it when the first is gone", || {
        kubectl.until_pod_ready("second")
    })?;
    testbed.delete_namespace(&kubectl)
}

fn expanded_online(testbed: &Testbed) -> Result<()> {
    let kubectl = testbed.namespace("grows")?;
    for (claim, usage) in [("files", Usage::FileSystem), ("blocks", Usage::Block)] {
        kubectl.apply(&workload::claim(claim, CLASS, usage))?;
        kubectl.apply(&workload::pod(claim, "node2", claim, usage))?;
    }
    for claim in ["files", "blocks"] {
        step("a pod has its volume", || kubectl.until_pod_ready(claim))?;
    }
    for claim in ["files", "blocks"] {
        let patch = r#"{"spec":{"resources":{"requests":{"storage":"128Mi"}}}}"#;
        kubectl.run(&["patch", "pvc", claim, "--patch", patch])?;
    }
    step("the file system has grown in its pod", || {
        until("df says so", PATIENCE, || {
            let kib = kubectl.exec("files", "df -k /data | tail -n 1 | awk '{print $2}'")?;
            Ok((kib.trim().parse::<u64>()? > 100 << 10).then_some(()))
        })
    })?;
    step("the block device has grown in its pod", || {
        until("its size says so", PATIENCE, || {
            let bytes = kubectl.exec("blocks", "blockdev --getsize64 /dev/data")?;
            Ok((bytes.trim() == (128 << 20).to_string()).then_some(()))
        })
    })?;
    for claim in ["files", "blocks"] {
        kubectl.until("pvc", claim, "says its new size", |claim| {
            claim["status"]["capacity"]["storage"] == "128Mi"
        })?;
    }
    testbed.delete_namespace(&kubectl)
}

fn on_a_foreign_server(testbed: &Testbed) -> Result<()> {
    let kubectl = testbed.namespace("foreign")?;
    let folder = tempfile::tempdir()?;
    let disk = folder.path().join("disk");
    fs::File::create(&disk)?.set_len(64 << 20)?;
    make_certificates(
        folder.path(),
        &format!("IP:{}", network::GATEWAY),
        "DNS:client.example.org",
    )?;
    let server = Process::start(
        "qemu-nbd",
        &testbed.logs,
        Command::new("qemu-nbd")
            .args([
                "--persistent",
                "--shared=8",
                "--format=raw",
                "--export-name=disk",
                "--port=10810",
            ])
            .arg(format!("--bind={}", network::GATEWAY))
            .arg("--object")
            .arg(format!(
                "tls-creds-x509,id=tls,endpoint=server,verify-peer=yes,dir={}",
                folder.path().display()
            ))
            .arg("--tls-creds=tls")
            .arg(&disk),
    )?;
    let ours = kubectl.in_namespace(NAMESPACE);
    put_secret(&ours, "foreign-client", folder.path(), "client")?;
    kubectl.apply(&format!(
        "---
apiVersion: v1
kind: PersistentVolume
metadata: {{name: foreign}}
spec:
  capacity: {{storage: 64Mi}}
  accessModes: [ReadWriteOnce]
  persistentVolumeReclaimPolicy: Retain
  claimRef: {{namespace: foreign, name: data}}
  csi:
    driver: csi.hawser.dev
    volumeHandle: foreign-disk
    fsType: ext4
    volumeAttributes: {{uri: 'nbds://{}:10810/disk', format: if-empty}}
    nodeStageSecretRef: {{name: foreign-client, namespace: {NAMESPACE}}}
    nodePublishSecretRef: {{name: foreign-client, namespace: {NAMESPACE}}}
",
        network::GATEWAY
    ))?;
    moves(&kubectl, "", Usage::FileSystem)?;
    step("its claim tells that the server was verified", || {
        let about = "involvedObject.kind=PersistentVolumeClaim,reason=Verified";
        let events = ["get", "events", "--field-selector", about, "-o", "name"];
        until("there is such an Event", PATIENCE, || {
            Ok((!kubectl.run(&events)?.is_empty()).then_some(()))
        })
    })?;
    testbed.delete_namespace(&kubectl)?;
    kubectl.run(&["delete", "pv", "foreign"])?;
    ours.delete("secret", "foreign-client")?;
    drop(server);
    Ok(())
}

/// The pod goes on; when it goes, the volume goes, and nothing of it is left.
fn claim_deleted_while_in_use(testbed: &Testbed) -> Result<()> {
    let kubectl = testbed.namespace("deleted")?;
    let ours = kubectl.in_namespace(NAMESPACE);
    kubectl.apply(&workload::claim("data", CLASS, Usage::FileSystem))?;
    kubectl.apply(&workload::pod("pod", "node2", "data", Usage::FileSystem))?;
    step("a pod has its volume", || kubectl.until_pod_ready("pod"))?;
    let volume = workload::volume_id(&kubectl, "data")?;
    ensure!(
        driver::backing(&testbed.nodes, &volume)?.contains(&volume),
        "{volume} has no directory while it is in use"
    );
    kubectl.delete("pvc", "data")?;
    step("the pod goes on when its claim is deleted", || {
        kubectl.until("pvc", "data", "is being deleted", |claim| {
            claim["metadata"]["deletionTimestamp"].is_string()
        })?;
        workload::write_something(&kubectl, "pod", Usage::FileSystem)
    })?;
    kubectl.delete("pod", "pod")?;
    let selector = format!("hawser.dev/volume={volume}");
    step("the volume is gone when the pod is", || {
        kubectl.until_gone("pvc", "data")?;
        ours.until_gone("nbdvolume", &volume)?;
        for kind in ["pod", "statefulset", "secret"] {
            until(
                &format!("no {kind} is labelled {selector}"),
                PATIENCE,
                || Ok(ours.objects(kind, &selector)?.is_empty().then_some(())),
            )?;
        }
        until("it is attached to nothing", PATIENCE, || {
            let mut left = kubectl.objects("pv", "")?;
            left.extend(kubectl.objects("volumeattachment", "")?);
            let left = serde_json::Value::from(left).to_string();
            Ok((!left.contains(&volume)).then_some(()))
        })
    })?;
    let left = driver::backing(&testbed.nodes, &volume)?;
    ensure!(left.is_empty(), "on the storage node is left: {left}");
    for node in &testbed.nodes {
        let left = node.shell(&format!(
            "grep -r -l -s '{volume}' /var/lib/hawser /proc/mounts /sys/block/nbd*/backend || true"
        ))?;
        ensure!(left.is_empty(), "on {} is left: {left}", node.name);
    }
    testbed.delete_namespace(&kubectl)
}

/// Who may write is the file system's to say, and a group given by the pod is given to the volume.
fn without_root(testbed: &Testbed) -> Result<()> {
    let kubectl = testbed.namespace("without-root")?;
    let pod = |name: &str, context: &str, mount: &str| {
        workload::pod("pod", "node2", "data", Usage::FileSystem)
            .replace(
                "metadata: {name: pod}",
                &format!("metadata: {{name: {name}}}"),
            )
            .replace(
                "spec:\n",
                &format!("spec:\n  securityContext: {{{context}}}\n"),
            )
            .replace("mountPath: /data", &format!("mountPath: /data{mount}"))
    };
    kubectl.apply(&workload::claim("data", CLASS, Usage::FileSystem))?;
    kubectl.apply(&pod("nobody", "runAsNonRoot: true, runAsUser: 1000", ""))?;
    let touch = |pod: &str| kubectl.exec(pod, "touch /data/file 2>&1 || true");
    step(
        "a user without rights is refused by the file system",
        || {
            kubectl.until_pod_ready("nobody")?;
            let said = touch("nobody")?;
            ensure!(said.contains("Permission denied"), "{said:?}");
            Ok(())
        },
    )?;
    let group = "runAsNonRoot: true, runAsUser: 1000, fsGroup: 2000";
    kubectl.apply(&pod("group", group, ""))?;
    kubectl.apply(&pod("reader", group, ", readOnly: true"))?;
    step("one of the group that the pod names is not", || {
        kubectl.until_pod_ready("group")?;
        let said = touch("group")?;
        ensure!(said.is_empty(), "{said:?}");
        Ok(())
    })?;
    step("a mount that is to be read-only is", || {
        kubectl.until_pod_ready("reader")?;
        let said = touch("reader")?;
        ensure!(said.contains("Read-only file system"), "{said:?}");
        Ok(())
    })?;
    testbed.delete_namespace(&kubectl)
}
