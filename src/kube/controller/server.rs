//! A volume's server as Kubernetes runs it: a StatefulSet of one pod that may do nothing but serve its volume.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use anyhow::Context;
use k8s_openapi::api::apps::v1::{
    StatefulSet, StatefulSetPersistentVolumeClaimRetentionPolicy, StatefulSetSpec,
    StatefulSetUpdateStrategy,
};
use k8s_openapi::api::core::v1::{
    Affinity, Capabilities, Container, ContainerPort, HostPathVolumeSource, LocalObjectReference,
    NodeAffinity, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, Pod, PodSecurityContext,
    PodSpec, PodTemplateSpec, ResourceRequirements, SeccompProfile, SecretVolumeSource,
    SecurityContext, Toleration, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use kube::{Resource, ResourceExt};
use serde::Deserialize;

use crate::kube::api::{COMPONENT_LABEL, NbdPool, NbdVolume, SERVER, VOLUME_LABEL};

/// The server's port in the pods' network.
pub(super) const PORT: u16 = 10809;

/// The user that serves, and owns the volumes' directories.
const USER: i64 = 65532;

/// The server makes everything durable when it is told to end, and its disk may be slow.
const GRACE: i64 = 60;

/// What users may set on every server's pod. All of it may be left out.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct ServerPods {
    image_pull_policy: Option<String>,
    image_pull_secrets: Vec<LocalObjectReference>,
    service_account_name: Option<String>,
    priority_class_name: Option<String>,
    resources: Option<ResourceRequirements>,
    tolerations: Vec<Toleration>,
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
    node_selector: BTreeMap<String, String>,
    log_level: Option<String>,
    log_format: Option<String>,
}

impl ServerPods {
    /// Reads the file that the chart makes; without one, the defaults.
    pub(super) fn load(path: Option<&Path>) -> anyhow::Result<Self> {
        let Some(path) = path else {
            return Ok(Self::default());
        };
        let text = std::fs::read(path).with_context(|| format!("read {}", path.display()))?;
        serde_json::from_slice(&text)
            .with_context(|| format!("understand {} (--server-pods)", path.display()))
    }
}

/// The name of the only pod of a volume's StatefulSet.
pub(super) fn pod_name(volume: &str) -> String {
    format!("{volume}-0")
}

/// Labels of everything that belongs to a volume.
pub(super) fn labels(volume: &str) -> BTreeMap<String, String> {
    [
        ("app.kubernetes.io/name", "hawser"),
        ("app.kubernetes.io/managed-by", "hawser-controller"),
        (COMPONENT_LABEL, SERVER),
        (VOLUME_LABEL, volume),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .into()
}

/// Metadata of an object that belongs to the volume, and goes with it.
pub(super) fn metadata(volume: &NbdVolume, name: String) -> ObjectMeta {
    ObjectMeta {
        name: Some(name),
        namespace: volume.namespace(),
        labels: Some(labels(&volume.name_any())),
        owner_references: volume.controller_owner_ref(&()).map(|owner| vec![owner]),
        ..ObjectMeta::default()
    }
}

/// The StatefulSet of a volume. `secret` is the server's Secret.
pub(super) fn stateful_set(
    volume: &NbdVolume,
    pool: &NbdPool,
    secret: &str,
    image: &str,
    pods: &ServerPods,
) -> StatefulSet {
    let name = volume.name_any();
    let own = labels(&name);
    let mut pod_labels = pods.labels.clone();
    pod_labels.extend(own.clone());
    StatefulSet {
        metadata: metadata(volume, name.clone()),
        spec: Some(StatefulSetSpec {
            replicas: Some(1),
            // Nobody resolves its name: clients find the server by the volume's status.
            service_name: Some(name),
            selector: LabelSelector {
                match_labels: Some(own),
                match_expressions: None,
            },
            pod_management_policy: Some("Parallel".to_owned()),
            update_strategy: Some(StatefulSetUpdateStrategy {
                type_: Some("OnDelete".to_owned()),
                rolling_update: None,
            }),
            revision_history_limit: Some(1),
            persistent_volume_claim_retention_policy: None::<
                StatefulSetPersistentVolumeClaimRetentionPolicy,
            >,
            template: PodTemplateSpec {
                metadata: Some(ObjectMeta {
                    labels: Some(pod_labels),
                    annotations: Some(pods.annotations.clone()).filter(|all| !all.is_empty()),
                    ..ObjectMeta::default()
                }),
                spec: Some(pod(volume, pool, secret, image, pods)),
            },
            ..StatefulSetSpec::default()
        }),
        status: None,
    }
}

fn pod(
    volume: &NbdVolume,
    pool: &NbdPool,
    secret: &str,
    image: &str,
    pods: &ServerPods,
) -> PodSpec {
    let name = volume.name_any();
    let directory = format!(
        "{}/volumes/{name}",
        pool.spec.backend.directory.path.trim_end_matches('/')
    );
    PodSpec {
        affinity: Some(on_node(&volume.spec.node)),
        automount_service_account_token: Some(false),
        enable_service_links: Some(false),
        host_network: pool.spec.host_network.then_some(true),
        dns_policy: Some("Default".to_owned()),
        image_pull_secrets: Some(pods.image_pull_secrets.clone()).filter(|all| !all.is_empty()),
        node_selector: Some(pods.node_selector.clone()).filter(|all| !all.is_empty()),
        priority_class_name: pods
            .priority_class_name
            .clone()
            .filter(|name| !name.is_empty()),
        security_context: Some(PodSecurityContext {
            run_as_non_root: Some(true),
            run_as_user: Some(USER),
            run_as_group: Some(USER),
            fs_group: Some(USER),
            fs_group_change_policy: Some("OnRootMismatch".to_owned()),
            seccomp_profile: Some(SeccompProfile {
                type_: "RuntimeDefault".to_owned(),
                localhost_profile: None,
            }),
            ..PodSecurityContext::default()
        }),
        service_account_name: pods
            .service_account_name
            .clone()
            .filter(|name| !name.is_empty()),
        termination_grace_period_seconds: Some(GRACE),
        tolerations: Some(pods.tolerations.clone()).filter(|all| !all.is_empty()),
        containers: vec![container(volume, image, pods)],
        volumes: Some(vec![
            Volume {
                name: "volume".to_owned(),
                host_path: Some(HostPathVolumeSource {
                    path: directory,
                    // An empty directory in its place would be served as an empty volume.
                    type_: Some("Directory".to_owned()),
                }),
                ..Volume::default()
            },
            Volume {
                name: "certificates".to_owned(),
                secret: Some(SecretVolumeSource {
                    secret_name: Some(secret.to_owned()),
                    default_mode: Some(0o440),
                    ..SecretVolumeSource::default()
                }),
                ..Volume::default()
            },
        ]),
        ..PodSpec::default()
    }
}

fn container(volume: &NbdVolume, image: &str, pods: &ServerPods) -> Container {
    let port = volume.spec.port.unwrap_or(PORT);
    let mut arguments = vec![
        "serve".to_owned(),
        format!("--volume={}", volume.name_any()),
        "--directory=/volume".to_owned(),
        "--certificates=/certificates".to_owned(),
        format!("--listen=:{port}"),
        "--control=/volume/control".to_owned(),
    ];
    let log = [
        ("--log", &pods.log_level),
        ("--log-format", &pods.log_format),
    ];
    for (flag, value) in log {
        arguments.extend(value.as_ref().map(|value| format!("{flag}={value}")));
    }
    let mount = |name: &str, path: &str, read_only: bool| VolumeMount {
        name: name.to_owned(),
        mount_path: path.to_owned(),
        read_only: read_only.then_some(true),
        ..VolumeMount::default()
    };
    Container {
        name: "server".to_owned(),
        image: Some(image.to_owned()),
        image_pull_policy: pods
            .image_pull_policy
            .clone()
            .filter(|policy| !policy.is_empty()),
        args: Some(arguments),
        ports: Some(vec![ContainerPort {
            name: Some("nbd".to_owned()),
            container_port: port.into(),
            protocol: Some("TCP".to_owned()),
            ..ContainerPort::default()
        }]),
        resources: pods.resources.clone(),
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            read_only_root_filesystem: Some(true),
            run_as_non_root: Some(true),
            capabilities: Some(Capabilities {
                add: None,
                drop: Some(vec!["ALL".to_owned()]),
            }),
            ..SecurityContext::default()
        }),
        volume_mounts: Some(vec![
            mount("volume", "/volume", false),
            mount("certificates", "/certificates", true),
        ]),
        ..Container::default()
    }
}

/// Exactly that node, by its name and not by a label that somebody may change.
fn on_node(node: &str) -> Affinity {
    Affinity {
        node_affinity: Some(NodeAffinity {
            required_during_scheduling_ignored_during_execution: Some(NodeSelector {
                node_selector_terms: vec![NodeSelectorTerm {
                    match_fields: Some(vec![NodeSelectorRequirement {
                        key: "metadata.name".to_owned(),
                        operator: "In".to_owned(),
                        values: Some(vec![node.to_owned()]),
                    }]),
                    match_expressions: None,
                }],
            }),
            ..NodeAffinity::default()
        }),
        ..Affinity::default()
    }
}

/// How the server's pod is: where it listens, or why it does not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Server {
    Listening(SocketAddr),
    Away {
        reason: &'static str,
        message: String,
    },
}

/// Looks at the pod of a volume's server.
pub(super) fn look(pod: Option<&Pod>, port: u16) -> Server {
    let away = |reason, message: String| Server::Away { reason, message };
    let Some(pod) = pod else {
        return away("NoPod", "its server's pod is not there yet".to_owned());
    };
    let name = pod.name_any();
    if pod.metadata.deletion_timestamp.is_some() {
        return away("Ending", format!("pod {name} is ending"));
    }
    let status = pod.status.as_ref();
    let container = status
        .and_then(|status| status.container_statuses.as_ref())
        .and_then(|all| all.first());
    let address = status
        .and_then(|status| status.pod_ip.as_ref())
        .and_then(|text| text.parse::<IpAddr>().ok());
    let is_ready = container.is_some_and(|container| container.ready);
    if let (true, Some(address)) = (is_ready, address) {
        return Server::Listening(SocketAddr::new(address, port));
    }
    let state = container.and_then(|container| container.state.as_ref());
    let last = container.and_then(|container| container.last_state.as_ref());
    let ended = [state, last]
        .into_iter()
        .flatten()
        .find_map(|state| state.terminated.as_ref());
    let why = state
        .and_then(|state| state.waiting.as_ref())
        .map(|waiting| {
            let reason = waiting.reason.as_deref().unwrap_or("waiting");
            match &waiting.message {
                Some(message) => format!("{reason}: {message}"),
                None => reason.to_owned(),
            }
        });
    let ended = ended.map(|ended| {
        let message = ended.message.as_deref().unwrap_or_default().trim();
        format!("it ended with status {} {message}", ended.exit_code)
    });
    // The scheduler and the kubelet say in the conditions what keeps a pod from running at all.
    let kept = status
        .and_then(|status| status.conditions.as_ref())
        .into_iter()
        .flatten()
        .find(|condition| condition.status == "False" && condition.message.is_some())
        .and_then(|condition| condition.message.clone());
    let parts: Vec<_> = [why, ended].into_iter().flatten().collect();
    let message = match (parts.is_empty(), kept) {
        (false, _) => parts.join("; "),
        (true, Some(kept)) => kept,
        (true, None) => "it is being started".to_owned(),
    };
    away("NotReady", format!("pod {name}: {}", message.trim_end()))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn volume() -> NbdVolume {
        let volume = json!({
            "apiVersion": "hawser.dev/v1alpha1", "kind": "NbdVolume",
            "metadata": { "name": "vol-1", "namespace": "storage", "uid": "1" },
            "spec": { "name": "pvc-1", "sizeBytes": 4096, "pool": "p", "node": "n", "content": "block" },
        });
        serde_json::from_value(volume).unwrap()
    }

    fn set(spec: Value, pods: &ServerPods) -> Value {
        let mut pool = json!({
            "apiVersion": "hawser.dev/v1alpha1", "kind": "NbdPool", "metadata": { "name": "p" },
            "spec": { "backend": { "directory": { "path": "/pool" } } },
        });
        for (key, value) in spec.as_object().unwrap() {
            pool["spec"][key] = value.clone();
        }
        let pool = serde_json::from_value(pool).unwrap();
        serde_json::to_value(stateful_set(
            &volume(),
            &pool,
            "vol-1-server",
            "hawser:1",
            pods,
        ))
        .unwrap()
    }

    #[test]
    fn a_server_may_do_nothing_but_serve_its_volume() {
        let set = set(json!({}), &ServerPods::default());
        let pod = &set["spec"]["template"]["spec"];
        let container = &pod["containers"][0];
        for (found, expected) in [
            (&pod["automountServiceAccountToken"], json!(false)),
            (&pod["hostNetwork"], Value::Null),
            (&pod["securityContext"]["runAsNonRoot"], json!(true)),
            (&pod["securityContext"]["runAsUser"], json!(65532)),
            (
                &pod["securityContext"]["seccompProfile"]["type"],
                json!("RuntimeDefault"),
            ),
            (
                &container["securityContext"]["readOnlyRootFilesystem"],
                json!(true),
            ),
            (
                &container["securityContext"]["allowPrivilegeEscalation"],
                json!(false),
            ),
            (
                &container["securityContext"]["capabilities"],
                json!({ "drop": ["ALL"] }),
            ),
            (
                &pod["volumes"],
                json!([
                    { "name": "volume", "hostPath": { "path": "/pool/volumes/vol-1", "type": "Directory" } },
                    { "name": "certificates", "secret": { "secretName": "vol-1-server", "defaultMode": 0o440 } },
                ]),
            ),
            (&set["spec"]["updateStrategy"]["type"], json!("OnDelete")),
            (&set["spec"]["replicas"], json!(1)),
            (&set["metadata"]["ownerReferences"][0]["uid"], json!("1")),
        ] {
            assert_eq!(*found, expected);
        }
        let affinity =
            &pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"];
        let field = &affinity["nodeSelectorTerms"][0]["matchFields"][0];
        assert_eq!(
            (&field["key"], &field["values"]),
            (&json!("metadata.name"), &json!(["n"]))
        );
    }

    #[test]
    fn what_users_set_is_there_and_what_they_must_not_is_not() {
        let pods: ServerPods = serde_json::from_value(json!({
            "labels": { "team": "a", "hawser.dev/volume": "other" },
            "priorityClassName": "high", "serviceAccountName": "hawser-server", "logLevel": "debug",
        }))
        .unwrap();
        let set = set(json!({ "hostNetwork": true }), &pods);
        let template = &set["spec"]["template"];
        assert_eq!(template["metadata"]["labels"]["team"], json!("a"));
        assert_eq!(template["metadata"]["labels"][VOLUME_LABEL], json!("vol-1"));
        assert_eq!(template["spec"]["priorityClassName"], json!("high"));
        assert_eq!(template["spec"]["hostNetwork"], json!(true));
        let arguments = template["spec"]["containers"][0]["args"]
            .as_array()
            .unwrap();
        assert!(arguments.contains(&json!("--log=debug")));
        // Whichever family the pods' network is of.
        assert!(arguments.contains(&json!("--listen=:10809")));
        assert!(serde_json::from_value::<ServerPods>(json!({ "privileged": true })).is_err());
    }

    #[test]
    fn a_pod_listens_when_it_is_ready_and_else_says_why_not() {
        let pod = |status: Value| -> Pod {
            let pod = json!({ "metadata": { "name": "vol-1-0" }, "status": status });
            serde_json::from_value(pod).unwrap()
        };
        let container = |ready: bool, state: Value| {
            json!({ "podIP": "10.0.0.1", "containerStatuses": [{
                "name": "server", "ready": ready, "restartCount": 1, "image": "", "imageID": "", "state": state,
            }]})
        };
        let ready = pod(container(true, json!({ "running": {} })));
        assert_eq!(
            look(Some(&ready), 7),
            Server::Listening(([10, 0, 0, 1], 7).into())
        );
        let ipv6 = pod(
            json!({ "podIP": "2001:db8::1", "containerStatuses": ready.status.as_ref().unwrap()
            .container_statuses }),
        );
        match look(Some(&ipv6), 7) {
            Server::Listening(address) => assert_eq!(address.to_string(), "[2001:db8::1]:7"),
            away => panic!("{away:?}"),
        }
        let unscheduled = json!({ "conditions": [
            { "type": "PodScheduled", "status": "False", "message": "0/2 nodes are available" },
        ]});
        for (status, told) in [
            (
                container(
                    false,
                    json!({ "waiting": { "reason": "ErrImagePull", "message": "no such image" } }),
                ),
                "ErrImagePull: no such image",
            ),
            (
                container(
                    false,
                    json!({ "terminated": { "exitCode": 1, "message": "it broke" } }),
                ),
                "status 1 it broke",
            ),
            (unscheduled, "0/2 nodes"),
            (json!({}), "is being started"),
        ] {
            match look(Some(&pod(status)), 7) {
                Server::Away { message, .. } => assert!(message.contains(told), "{message}"),
                listening => panic!("{listening:?}"),
            }
        }
        let mut ending = ready;
        ending.metadata.deletion_timestamp = Some(crate::kube::api::now());
        for pod in [Some(&ending), None] {
            assert!(matches!(look(pod, 7), Server::Away { .. }));
        }
    }
}
