//! What a user does with volumes.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};

use super::Scenario;
use crate::driver::{self, NAMESPACE};
use crate::kubectl::Kubectl;
use crate::process::{Process, output};
use crate::testbed::Testbed;
use crate::workload::{self, CLASS, Usage};
use crate::{network, step};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario::new("volumes::a_pod_moves_and_reads", a_pod_moves_and_reads),
    Scenario::new("volumes::raw_block", raw_block),
    Scenario::new("volumes::read_write_once_pod", read_write_once_pod),
    Scenario::new("volumes::expanded_online", expanded_online),
    Scenario::new("volumes::own_certificates", own_certificates),
    Scenario::new("volumes::on_a_foreign_server", on_a_foreign_server),
    Scenario::new("volumes::nothing_is_left", nothing_is_left),
];

fn a_pod_moves_and_reads(testbed: &mut Testbed) -> Result<()> {
    let kubectl = testbed.namespace("moves")?;
    moves(&kubectl, CLASS, Usage::FileSystem)?;
    testbed.delete_namespace(&kubectl)
}

fn raw_block(testbed: &mut Testbed) -> Result<()> {
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

fn read_write_once_pod(testbed: &mut Testbed) -> Result<()> {
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

fn expanded_online(testbed: &mut Testbed) -> Result<()> {
    let kubectl = testbed.namespace("grows")?;
    for (claim, usage) in [("files", Usage::FileSystem), ("blocks", Usage::Block)] {
        kubectl.apply(&workload::claim(claim, CLASS, usage))?;
        kubectl.apply(&workload::pod(claim, "node2", claim, usage))?;
    }
    for claim in ["files", "blocks"] {
        step("a pod has its volume", || kubectl.until_pod_ready(claim))?;
        let patch = r#"{"spec":{"resources":{"requests":{"storage":"128Mi"}}}}"#;
        kubectl.run(&["patch", "pvc", claim, "--patch", patch])?;
    }
    step("the file system has grown in its pod", || {
        crate::until("df says so", crate::kubectl::PATIENCE, || {
            let kib = kubectl.exec("files", "df -k /data | tail -n 1 | awk '{print $2}'")?;
            Ok((kib.trim().parse::<u64>()? > 100 << 10).then_some(()))
        })
    })?;
    step("the block device has grown in its pod", || {
        crate::until("its size says so", crate::kubectl::PATIENCE, || {
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

fn own_certificates(testbed: &mut Testbed) -> Result<()> {
    let kubectl = testbed.namespace("own-certificates")?;
    let ours = kubectl.in_namespace(NAMESPACE);
    kubectl.apply(&format!(
        "---
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {{name: own-certificates}}
provisioner: csi.hawser.dev
volumeBindingMode: WaitForFirstConsumer
parameters:
  certificates: secret
  csi.storage.k8s.io/node-stage-secret-name: ${{pv.name}}-hawser-client
  csi.storage.k8s.io/node-stage-secret-namespace: {NAMESPACE}
  csi.storage.k8s.io/node-publish-secret-name: ${{pv.name}}-hawser-client
  csi.storage.k8s.io/node-publish-secret-namespace: {NAMESPACE}
"
    ))?;
    kubectl.apply(&workload::claim(
        "data",
        "own-certificates",
        Usage::FileSystem,
    ))?;
    let claim = kubectl.object("pvc", "data")?.unwrap_or_default();
    let volume = format!(
        "pvc-{}",
        claim["metadata"]["uid"].as_str().unwrap_or_default()
    );
    let digest =
        output(Command::new("sh").args(["-c", "printf %s \"$1\" | sha256sum", "sh", &volume]))?;
    let id = format!("vol-{}", &digest[..32]);
    let folder = tempfile::tempdir()?;
    let (server, client) = (
        format!("DNS:{id}.server.hawser.dev"),
        format!("DNS:{id}.client.hawser.dev"),
    );
    make_certificates(folder.path(), &server, &client)?;
    let secrets = [
        (format!("{id}-server"), "server"),
        (format!("{volume}-hawser-client"), "client"),
    ];
    for (secret, who) in &secrets {
        create_secret(&ours, secret, folder.path(), who)?;
    }
    kubectl.apply(&workload::pod("pod", "node2", "data", Usage::FileSystem))?;
    step("a pod has its volume", || kubectl.until_pod_ready("pod"))?;
    workload::write_something(&kubectl, "pod", Usage::FileSystem)?;
    ensure!(
        workload::volume_id(&kubectl, "data")? == id,
        "the volume has another id"
    );
    testbed.delete_namespace(&kubectl)?;
    kubectl.run(&["delete", "storageclass", "own-certificates"])?;
    step("the volume is gone, and the Secrets are not", || {
        ours.until_gone("nbdvolume", &id)
    })?;
    for (secret, _) in &secrets {
        ours.run(&["delete", "secret", secret])?;
    }
    Ok(())
}

/// An authority, a server's certificate and a client's, for the names given.
const CERTIFICATES: &str = r#"
set -e
cd "$1"
new() { openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes "$@" 2>/dev/null; }
new -x509 -days 2 -subj /CN=authority -keyout ca.key -out ca-cert.pem
certify() {
    new -subj "/CN=$1" -keyout "$1-key.pem" -out "$1.csr"
    printf 'subjectAltName=%s\nextendedKeyUsage=%sAuth\n' "$2" "$1" >"$1.ext"
    openssl x509 -req -days 2 -in "$1.csr" -CA ca-cert.pem -CAkey ca.key -CAcreateserial -extfile "$1.ext" \
        -out "$1-cert.pem" 2>/dev/null
}
certify server "$2"
certify client "$3"
"#;

fn make_certificates(folder: &Path, server: &str, client: &str) -> Result<()> {
    output(
        Command::new("sh")
            .args(["-c", CERTIFICATES, "sh"])
            .arg(folder)
            .args([server, client]),
    )
    .map(drop)
}

fn create_secret(kubectl: &Kubectl, name: &str, folder: &Path, who: &str) -> Result<()> {
    let file = |key: &str, name: &str| format!("--from-file={key}={}", folder.join(name).display());
    kubectl
        .run(&[
            "create",
            "secret",
            "generic",
            name,
            "--type=kubernetes.io/tls",
            &file("tls.key", &format!("{who}-key.pem")),
            &file("tls.crt", &format!("{who}-cert.pem")),
            &file("ca.crt", "ca-cert.pem"),
        ])
        .map(drop)
}

fn on_a_foreign_server(testbed: &mut Testbed) -> Result<()> {
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
    create_secret(&ours, "foreign-client", folder.path(), "client")?;
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
    testbed.delete_namespace(&kubectl)?;
    kubectl.run(&["delete", "pv", "foreign"])?;
    ours.delete("secret", "foreign-client")?;
    drop(server);
    Ok(())
}

fn nothing_is_left(testbed: &mut Testbed) -> Result<()> {
    let kubectl = testbed.namespace("nothing")?;
    let ours = kubectl.in_namespace(NAMESPACE);
    kubectl.apply(&workload::claim("data", CLASS, Usage::FileSystem))?;
    kubectl.apply(&workload::pod("pod", "node2", "data", Usage::FileSystem))?;
    step("a pod has its volume", || kubectl.until_pod_ready("pod"))?;
    let volume = workload::volume_id(&kubectl, "data")?;
    ensure!(
        driver::backing(&mut testbed.nodes, &volume)?.contains(&volume),
        "{volume} has no directory while it is in use"
    );
    kubectl.delete("pod", "pod")?;
    kubectl.delete("pvc", "data")?;
    let selector = format!("hawser.dev/volume={volume}");
    step("the volume is gone", || {
        kubectl.until_gone("pvc", "data")?;
        ours.until_gone("nbdvolume", &volume)?;
        crate::until(
            &format!("nothing is labelled {selector}"),
            crate::kubectl::PATIENCE,
            || {
                let left = ours.run(&[
                    "get",
                    "pods,statefulsets,secrets,services",
                    "--selector",
                    &selector,
                    "-o",
                    "name",
                ])?;
                let volumes = kubectl.run(&["get", "pv,volumeattachments", "-o", "json"])?;
                Ok((left.trim().is_empty() && !volumes.contains(&volume)).then_some(()))
            },
        )
    })?;
    let left = driver::backing(&mut testbed.nodes, &volume)?;
    ensure!(left.is_empty(), "on the storage node is left: {left}");
    for node in &mut testbed.nodes {
        let left = node.shell(&format!(
            "grep -r -l -s '{volume}' /var/lib/hawser /proc/mounts /sys/block/nbd*/backend || true"
        ))?;
        ensure!(left.is_empty(), "on {} is left: {left}", node.name);
    }
    testbed.delete_namespace(&kubectl)
}
