//! `hawser hook`: what the Helm chart runs before an upgrade and before an uninstall.

use std::collections::BTreeMap;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Subcommand;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::ListParams;
use kube::{Api, Client, ResourceExt};

use super::api::{self, NbdVolume};
use super::apply::{apply, is_not_found};

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
            .with_context(|| format!("bring the definition {name} to this version"))?;
        tracing::info!(name, "this definition is of this version now");
    }
    Ok(())
}

/// Refuses where pods would be left with volumes that nobody reconnects or detaches.
async fn guard_uninstall(client: Client, namespace: &str) -> anyhow::Result<()> {
    let volumes: Api<NbdVolume> = Api::namespaced(client, namespace);
    let volumes = match volumes.list(&ListParams::default()).await {
        Ok(volumes) => volumes,
        // Without a definition there is no volume.
        Err(error) if is_not_found(&error) => return Ok(()),
        Err(error) => return Err(error).context("list the volumes"),
    };
    let mut used = BTreeMap::new();
    for volume in volumes {
        let nodes: Vec<_> = volume
            .spec
            .attachments
            .iter()
            .map(|at| at.node.as_str())
            .collect();
        if !nodes.is_empty() {
            used.insert(volume.spec.name.clone(), nodes.join(", "));
        }
    }
    if used.is_empty() {
        return Ok(());
    }
    let mut list = String::new();
    for (name, nodes) in used.iter().take(NAMED) {
        list += &format!("\n  {name} on {nodes}");
    }
    if used.len() > NAMED {
        list += &format!("\n  and {} more", used.len() - NAMED);
    }
    bail!(
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

    /// A cluster that answers every request with `answer`, and the requests that it got.
    fn cluster(status: StatusCode, answer: Value) -> (Client, Arc<Mutex<Vec<String>>>) {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let requests = Arc::clone(&seen);
        let service = tower::service_fn(move |request: Request<Body>| {
            let line = format!("{} {}", request.method(), request.uri());
            requests.lock().unwrap().push(line);
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
