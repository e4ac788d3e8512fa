//! Claims and pods as a user writes them.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::kubectl::{Kubectl, PATIENCE};
use super::until;

/// What the chart's own StorageClass is called.
pub(crate) const CLASS: &str = "hawser";

/// How a claim is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Usage {
    FileSystem,
    Block,
}

impl Usage {
    /// Where a pod finds the volume.
    pub(crate) fn path(self) -> &'static str {
        match self {
            Self::FileSystem => "/data",
            Self::Block => "/dev/data",
        }
    }
}

pub(crate) fn claim(name: &str, class: &str, usage: Usage) -> String {
    claim_as(name, class, usage, "ReadWriteOnce")
}

pub(crate) fn claim_as(name: &str, class: &str, usage: Usage, access: &str) -> String {
    let mode = match usage {
        Usage::FileSystem => "Filesystem",
        Usage::Block => "Block",
    };
    format!(
        "---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {{name: {name}}}
spec:
  storageClassName: '{class}'
  volumeMode: {mode}
  accessModes: [{access}]
  resources: {{requests: {{storage: 64Mi}}}}
"
    )
}

/// A pod that waits to be told what to do.
pub(crate) fn pod(name: &str, node: &str, claim: &str, usage: Usage) -> String {
    pod_that(name, node, claim, usage, "exec sleep 1000000")
}

/// A pod that writes, reads back and compares, round after round, until something is wrong.
pub(crate) fn loaded_pod(name: &str, node: &str, claim: &str) -> String {
    let script = "while fio --name=verify --directory=/data --rw=randwrite --bs=64k --size=8m --direct=1 \
        --ioengine=psync --verify=crc32c --verify_fatal=1 --fsync=16 >/tmp/fio 2>&1; do echo round >>/tmp/rounds; done; \
        cat /tmp/fio; echo FAILED >>/tmp/rounds; exec sleep 1000000";
    pod_that(name, node, claim, Usage::FileSystem, script)
}

fn pod_that(name: &str, node: &str, claim: &str, usage: Usage, script: &str) -> String {
    let path = usage.path();
    let volume = match usage {
        Usage::FileSystem => format!("volumeMounts: [{{name: data, mountPath: {path}}}]"),
        Usage::Block => format!("volumeDevices: [{{name: data, devicePath: {path}}}]"),
    };
    format!(
        "---
apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  nodeSelector: {{kubernetes.io/hostname: {node}}}
  terminationGracePeriodSeconds: 0
  containers:
  - name: pod
    image: hawser.test/pod:1
    imagePullPolicy: Never
    command: [/bin/sh, -c, '{script}']
    {volume}
  volumes: [{{name: data, persistentVolumeClaim: {{claimName: {claim}}}}}]
"
    )
}

/// How many rounds of a loaded pod were right.
fn rounds(kubectl: &Kubectl, pod: &str) -> Result<usize> {
    let rounds = kubectl.exec(pod, "cat /tmp/rounds 2>/dev/null || true")?;
    ensure!(
        !rounds.contains("FAILED"),
        "{pod} read other than it wrote, or could not: {}",
        kubectl.run(&["logs", pod])?
    );
    Ok(rounds.lines().count())
}

/// Waits until a loaded pod has done as many rounds as said, from now on.
pub(crate) fn until_rounds(kubectl: &Kubectl, pod: &str, more: usize) -> Result<()> {
    let started = until(&format!("{pod} can be asked"), PATIENCE, || {
        rounds(kubectl, pod).map(Some)
    })?;
    let deadline = std::time::Instant::now() + PATIENCE;
    loop {
        // A round that failed is no reason to wait for it to be right.
        let done = rounds(kubectl, pod)?;
        if done >= started + more {
            return Ok(());
        }
        ensure!(
            std::time::Instant::now() < deadline,
            "{pod} has done no more than {} of {more} rounds in {} s",
            done - started,
            PATIENCE.as_secs()
        );
        std::thread::sleep(Duration::from_millis(500));
    }
}

/// Writes something that nobody can guess, durably and to the blocks that are there, and returns its digest.
pub(crate) fn write_something(kubectl: &Kubectl, pod: &str, usage: Usage) -> Result<String> {
    let path = usage.path();
    let script = match usage {
        Usage::FileSystem => {
            format!(
                "dd if=/dev/urandom of={path}/file bs=1M count=4 conv=notrunc,fsync 2>/dev/null"
            )
        }
        Usage::Block => {
            format!("dd if=/dev/urandom of={path} bs=1M count=4 conv=fsync 2>/dev/null")
        }
    };
    kubectl.exec(pod, &script)?;
    digest(kubectl, pod, usage)
}

pub(crate) fn digest(kubectl: &Kubectl, pod: &str, usage: Usage) -> Result<String> {
    let path = usage.path();
    let script = match usage {
        Usage::FileSystem => format!("sha256sum <{path}/file"),
        Usage::Block => format!("dd if={path} bs=1M count=4 2>/dev/null | sha256sum"),
    };
    kubectl.exec(pod, &script)
}

/// The id of the volume that a claim is bound to.
pub(crate) fn volume_id(kubectl: &Kubectl, claim: &str) -> Result<String> {
    let bound = kubectl.until("pvc", claim, "is bound", |claim| {
        claim["status"]["phase"] == "Bound"
    })?;
    let volume = bound["spec"]["volumeName"].as_str().unwrap_or_default();
    let volume = kubectl.until("pv", volume, "is there", |_| true)?;
    Ok(volume["spec"]["csi"]["volumeHandle"]
        .as_str()
        .unwrap_or_default()
        .to_owned())
}
