//! `hawser hook`: what the Helm chart runs before an upgrade and before an uninstall.

use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Subcommand;
use k8s_openapi::api::storage::v1::VolumeAttachment;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::ListParams;
use kube::{Api, Client, ResourceExt};

use super::api::{self, NbdVolume};
use super::apply::{apply, is_not_found};
use crate::csi::DRIVER_NAME;

/// Helm itself never changes a definition after the first install; this does it in its name.
const MANAGER: &str = "helm";

/// Volumes that are named at most: a person reads them.
const NAMED: usize = 20;

/// Run what belongs to one step of the chart's life.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    hook: Hook,
}

#[derive(Debug, Clone, Subcommand)]
enum Hook {
    /// Bring the cluster's CustomResourceDefinitions to this version.
    UpgradeCrds,
    /// Fail while a volume is attached, and say which.
    GuardUninstall {
        /// The driver's namespace.
        #[arg(long, value_name = "NAME")]
        namespace: String,
    },
}

/// Runs the hook in the cluster that we are in, or that the current kubeconfig names.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the runtime")?
        .block_on(async {
            let client = Client::try_default().await.context("find the cluster")?;
            match &args.hook {
                Hook::UpgradeCrds => upgrade_crds(client).await,
                Hook::GuardUninstall { namespace } => guard_uninstall(client, namespace).await,
            }
        })?;
    Ok(ExitCode::SUCCESS)
}

async fn upgrade_crds(client: Client) -> anyhow::Result<()> {
    let definitions: Api<CustomResourceDefinition> = Api::all(client);
    for definition in api::definitions() {
        let name = definition.name_any();
        apply(&definitions, MANAGER, &definition)
            .await
            .with_context(|| {
                format!(
                    "the definition {name} is not of this version: nothing else was changed yet. Do it by hand, with \
                     `kubectl apply --server-side --force-conflicts -f` and the file in the chart's crds/, and upgrade \
                     again with hooks.upgradeCRDs=false"
                )
            })?;
        tracing::info!(name, "this definition is of this version now");
    }
    Ok(())
}

/// Refuses where pods would be left with volumes that nobody reconnects or detaches.
async fn guard_uninstall(client: Client, namespace: &str) -> anyhow::Result<()> {
    let mut used: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let volumes: Api<NbdVolume> = Api::namespaced(client.clone(), namespace);
    let volumes = match volumes.list(&ListParams::default()).await {
        Ok(volumes) => volumes.items,
        // Without a definition there is no volume.
        Err(error) if is_not_found(&error) => Vec::new(),
        Err(error) => return Err(error).context("list the volumes"),
    };
    for NbdVolume { spec, .. } in volumes {
        for attachment in spec.attachments {
            let nodes = used.entry(spec.name.clone()).or_default();
            nodes.insert(attachment.node);
        }
    }
    // Volumes on other servers are Kubernetes' alone.
    let attachments: Api<VolumeAttachment> = Api::all(client);
    let attachments = attachments.list(&ListParams::default()).await;
    for VolumeAttachment { spec, .. } in attachments.context("list the VolumeAttachments")? {
        if spec.attacher == DRIVER_NAME
            && let Some(volume) = spec.source.persistent_volume_name
        {
            used.entry(volume).or_default().insert(spec.node_name);
        }
    }
    match used.is_empty() {
        true => Ok(()),
        false => bail!("{}", refusal(&used)),
    }
}

/// Why an uninstall is refused, and what to do: `used` are PersistentVolumes, and the nodes that have them.
fn refusal(used: &BTreeMap<String, BTreeSet<String>>) -> String {
    let mut list = String::new();
    for (name, nodes) in used.iter().take(NAMED) {
        let nodes: Vec<_> = nodes.iter().map(String::as_str).collect();
        list += &format!("\n  {name} on {}", nodes.join(", "));
    }
    if used.len() > NAMED {
        list += &format!("\n  and {} more", used.len() - NAMED);
    }
    format!(
        "volumes are attached, and their pods would lose them for good when a connection breaks: {}{list}\nDelete the \
         pods that use these PersistentVolumes, and uninstall again; or keep the driver: `helm rollback` to the newest \
         revision. `helm uninstall --no-hooks` goes on all the same; no data is deleted, and installing the chart again \
         takes the volumes over",
        used.len()
    )
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use axum::http::{Request, Response, StatusCode};
    use kube::client::Body;
    use serde_json::{Value, json};

    use super::*;

    /// A cluster that answers every request with `answer`, and the requests that it got. Nothing is attached in it,
    /// other than what `answer` says of NbdVolumes.
    fn cluster(status: StatusCode, answer: Value) -> (Client, Arc<Mutex<Vec<String>>>) {
        cluster_with(status, answer, &[])
    }

    /// One with these VolumeAttachments: driver, PersistentVolume, node.
    fn cluster_with(
        status: StatusCode,
        answer: Value,
        attached: &[[&str; 3]],
    ) -> (Client, Arc<Mutex<Vec<String>>>) {
        let attachments: Vec<_> = attached
            .iter()
            .map(|[attacher, volume, node]| {
                json!({
                    "metadata": {"name": volume},
                    "spec": {"attacher": attacher, "nodeName": node, "source": {"persistentVolumeName": volume}},
                })
            })
            .collect();
        let attachments = json!({
            "apiVersion": "storage.k8s.io/v1", "kind": "VolumeAttachmentList", "metadata": {}, "items": attachments,
        });
        let seen = Arc::new(Mutex::new(Vec::new()));
        let requests = Arc::clone(&seen);
        let service = tower::service_fn(move |request: Request<Body>| {
            let line = format!("{} {}", request.method(), request.uri());
            let is_of_kubernetes = line.contains("/volumeattachments");
            requests.lock().unwrap().push(line);
            let (status, answer) = match is_of_kubernetes {
                true => (StatusCode::OK, &attachments),
                false => (status, &answer),
            };
            let body = Body::from(answer.to_string().into_bytes());
            let response = Response::builder().status(status).body(body).unwrap();
            async move { Ok::<_, std::convert::Infallible>(response) }
        });
        (Client::new(service, "hawser-system"), seen)
    }

    fn volume(name: &str, nodes: &[&str]) -> Value {
        let attachments: Vec<_> = nodes
            .iter()
            .enumerate()
            .map(|(i, node)| json!({"id": format!("att-{i:032x}"), "node": node, "mode": "single-node-writer"}))
            .collect();
        json!({
            "apiVersion": "hawser.dev/v1alpha1",
            "kind": "NbdVolume",
            "metadata": {"name": name},
            "spec": {
                "name": name, "sizeBytes": 4096, "pool": "p", "node": "n", "content": "block", "attachments": attachments,
            },
        })
    }

    fn list(volumes: &[Value]) -> Value {
        json!({
            "apiVersion": "hawser.dev/v1alpha1", "kind": "NbdVolumeList", "metadata": {}, "items": volumes,
        })
    }

    #[tokio::test]
    async fn each_definition_is_applied() {
        let answer = serde_json::to_value(&api::definitions()[0]).unwrap();
        let (client, seen) = cluster(StatusCode::OK, answer);
        upgrade_crds(client).await.unwrap();
        let seen = seen.lock().unwrap();
        assert_eq!(seen.len(), 3, "{seen:?}");
        for (request, name) in seen.iter().zip(["nbdpools", "nbdvolumes", "nbdsnapshots"]) {
            let path = format!(
                "PATCH /apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}.hawser.dev?"
            );
            assert!(request.starts_with(&path), "{request}");
            assert!(request.contains("fieldManager=helm"), "{request}");
        }
    }

    #[tokio::test]
    async fn an_uninstall_is_refused_while_a_volume_is_attached() {
        let volumes = [volume("idle", &[]), volume("pvc-1", &["node-a", "node-b"])];
        let (client, _) = cluster(StatusCode::OK, list(&volumes));
        let refused = guard_uninstall(client, "hawser-system")
            .await
            .unwrap_err()
            .to_string();
        assert!(refused.contains("pvc-1 on node-a, node-b"), "{refused}");
        assert!(!refused.contains("idle"), "{refused}");
    }

    #[tokio::test]
    async fn a_volume_on_a_server_that_is_not_ours_is_in_use_too() {
        let attached = [
            ["csi.hawser.dev", "legacy", "node-a"],
            ["csi.example.org", "theirs", "node-b"],
        ];
        let (client, _) = cluster_with(StatusCode::OK, list(&[]), &attached);
        let refused = guard_uninstall(client, "hawser-system").await.unwrap_err();
        let refused = refused.to_string();
        assert!(refused.contains("legacy on node-a"), "{refused}");
        assert!(!refused.contains("theirs"), "{refused}");
    }

    #[tokio::test]
    async fn a_refusal_says_what_to_do() {
        let attached = [["csi.hawser.dev", "pvc-1", "node-a"]];
        let (client, _) = cluster_with(
            StatusCode::OK,
            list(&[volume("pvc-1", &["node-a"])]),
            &attached,
        );
        let refused = guard_uninstall(client, "hawser-system").await.unwrap_err();
        let refused = refused.to_string();
        // One volume, though both tell of it.
        assert!(
            refused.contains("breaks: 1\n  pvc-1 on node-a\n"),
            "{refused}"
        );
        for way in ["Delete the pods", "helm rollback", "--no-hooks"] {
            assert!(refused.contains(way), "{way}: {refused}");
        }

        let denied = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": "not for you",
            "reason": "Forbidden", "code": 403,
        });
        let (client, _) = cluster(StatusCode::FORBIDDEN, denied);
        let failed = format!("{:#}", upgrade_crds(client).await.unwrap_err());
        for word in [
            "nbdpools.hawser.dev",
            "kubectl apply --server-side",
            "hooks.upgradeCRDs=false",
            "not for you",
        ] {
            assert!(failed.contains(word), "{word}: {failed}");
        }
    }

    #[tokio::test]
    async fn a_long_list_is_cut() {
        let volumes: Vec<_> = (0..25)
            .map(|i| volume(&format!("pvc-{i:02}"), &["n"]))
            .collect();
        let (client, _) = cluster(StatusCode::OK, list(&volumes));
        let refused = guard_uninstall(client, "hawser-system")
            .await
            .unwrap_err()
            .to_string();
        assert!(
            refused.contains("pvc-19") && !refused.contains("pvc-20"),
            "{refused}"
        );
        assert!(refused.contains("and 5 more"), "{refused}");
    }

    #[tokio::test]
    async fn an_uninstall_goes_on_where_nothing_is_attached() {
        let (client, seen) = cluster(StatusCode::OK, list(&[volume("idle", &[])]));
        guard_uninstall(client, "hawser-system").await.unwrap();
        assert!(seen.lock().unwrap()[0].contains("/namespaces/hawser-system/nbdvolumes"));
        let missing = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": "not found",
            "reason": "NotFound", "code": 404,
        });
        let (client, _) = cluster(StatusCode::NOT_FOUND, missing);
        guard_uninstall(client, "hawser-system").await.unwrap();
    }
}
