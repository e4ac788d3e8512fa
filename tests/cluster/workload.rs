//! Claims and pods as a user writes them.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::driver::NAMESPACE;
use super::kubectl::{Kubectl, PATIENCE};
use super::report::step;

/// Where the pod under load is: not where the volume is kept.
const LOAD_NODE: &str = "node2";

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

/// A StorageClass whose volumes are made as soon as they are claimed, with further parameters, one a line.
pub(crate) fn class(name: &str, parameters: &str) -> String {
    let parameters = parameters.replace('\n', "\n  ");
    format!(
        "---
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {{name: {name}}}
provisioner: csi.hawser.dev
volumeBindingMode: Immediate
parameters:
  csi.storage.k8s.io/node-stage-secret-name: ${{pv.name}}-hawser-client
  csi.storage.k8s.io/node-stage-secret-namespace: {NAMESPACE}
  csi.storage.k8s.io/node-publish-secret-name: ${{pv.name}}-hawser-client
  csi.storage.k8s.io/node-publish-secret-namespace: {NAMESPACE}
  {parameters}
"
    )
}

/// A pod that waits to be told what to do.
pub(crate) fn pod(name: &str, node: &str, claim: &str, usage: Usage) -> String {
    pod_that(name, node, claim, usage, "exec sleep 1000000")
}

/// A claim, and a pod that writes, reads back and compares, round after round, until something is wrong. It takes its time:
/// there is no need to fill a processor.
pub(crate) fn start_load(kubectl: &Kubectl) -> Result<()> {
    let script = "while fio --name=verify --directory=/data --rw=randwrite --bs=64k --size=1m --direct=1 \
        --ioengine=psync --verify=crc32c --verify_fatal=1 --fsync=16 >/tmp/fio 2>&1; do echo round; sleep 1; done; \
        cat /tmp/fio; echo FAILED; exec sleep 1000000";
    kubectl.apply(&claim("data", CLASS, Usage::FileSystem))?;
    kubectl.apply(&pod_that(
        "load",
        LOAD_NODE,
        "data",
        Usage::FileSystem,
        script,
    ))?;
    step("a pod works on its volume", || {
        kubectl.until_pod_ready("load").map(drop)
    })
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

/// What the pod under load has printed: read where its node puts it, so that it can be read whatever is the matter with
/// the API server.
pub(crate) fn load_printed(kubectl: &Kubectl, logs: &Path) -> Result<String> {
    let mut printed = String::new();
    for folder in fs::read_dir(logs.join(format!("{LOAD_NODE}-pods")))? {
        let folder = folder?.path();
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with(&format!("{}_load_", kubectl.namespace)) {
            for file in fs::read_dir(folder.join("pod"))? {
                printed += &fs::read_to_string(file?.path())?;
            }
        }
    }
    Ok(printed)
}

/// Waits until it has done two more rounds: the second began after now.
pub(crate) fn until_rounds(kubectl: &Kubectl, logs: &Path) -> Result<()> {
    let rounds = || {
        let printed = load_printed(kubectl, logs)?;
        // A round that failed is no reason to wait for it to be right.
        ensure!(
            !printed.contains("FAILED"),
            "the pod read other than it wrote, or could not: {printed}"
        );
        Ok(printed.matches(" F round").count())
    };
    let wanted = rounds()? + 2;
    let deadline = Instant::now() + PATIENCE;
    while rounds()? < wanted {
        ensure!(
            Instant::now() < deadline,
            "no two more rounds in {} s",
            PATIENCE.as_secs()
        );
        thread::sleep(Duration::from_millis(100));
    }
    Ok(())
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

/// The ids of the volumes that the namespace's claims are bound to.
pub(crate) fn volume_ids(kubectl: &Kubectl) -> Result<Vec<String>> {
    let claims = kubectl.objects("pvc", "")?;
    let bound = claims
        .iter()
        .filter(|claim| claim["status"]["phase"] == "Bound");
    bound
        .map(|claim| {
            volume_id(
                kubectl,
                claim["metadata"]["name"].as_str().unwrap_or_default(),
            )
        })
        .collect()
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
