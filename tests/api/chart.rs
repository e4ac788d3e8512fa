//! What the chart gives the controller and its sidecars: their rights, and their arguments.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding};
use kube::api::PostParams;
use kube::{Api, Client};
use serde_json::Value;

use crate::server::cache;

/// The name of the release in what is rendered: each namespace has a release of its own name.
const RELEASE: &str = "test-release";

/// The ServiceAccount of the controller of the release in that namespace.
pub(crate) fn account(namespace: &str) -> String {
    format!("{namespace}-hawser-controller")
}

/// The rendered chart.
pub(crate) struct Chart(Vec<Value>);

impl Chart {
    pub(crate) fn render() -> Result<Self> {
        let helm = Command::new(cache()?.join("bin/helm"))
            .args(["template", RELEASE, "--namespace", RELEASE])
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/charts/hawser"))
            .args(["--set", "tls.certManager.enabled=true"])
            // ClusterRoles of several releases have names of their own.
            .args(["--set", &format!("fullnameOverride={RELEASE}-hawser")])
            .output()
            .context("run helm: `tests/support/install e2e` brings it")?;
        let said = String::from_utf8_lossy(&helm.stderr);
        ensure!(helm.status.success(), "the chart is not rendered: {said}");
        let mut objects: Vec<Value> =
            serde_saphyr::from_multiple(&String::from_utf8(helm.stdout)?)?;
        objects.retain(|object| !object.is_null());
        Ok(Self(objects))
    }

    /// The objects of a kind, for the release in `namespace`.
    fn of_kind<K: serde::de::DeserializeOwned>(
        &self,
        kind: &str,
        namespace: &str,
    ) -> Result<Vec<K>> {
        let chosen = self.0.iter().filter(|object| object["kind"] == kind);
        chosen
            .map(|object| {
                let text = object.to_string().replace(RELEASE, namespace);
                Ok(serde_json::from_str(&text)?)
            })
            .collect()
    }

    /// Gives the roles in `namespace` the rights that they have in a cluster.
    pub(crate) async fn grant(&self, client: &Client, namespace: &str) -> Result<()> {
        let params = PostParams::default();
        let (all, here) = (client.clone(), client.clone());
        for one in self.of_kind::<ClusterRole>("ClusterRole", namespace)? {
            Api::all(all.clone()).create(&params, &one).await?;
        }
        for one in self.of_kind::<ClusterRoleBinding>("ClusterRoleBinding", namespace)? {
            Api::all(all.clone()).create(&params, &one).await?;
        }
        for one in self.of_kind::<Role>("Role", namespace)? {
            Api::namespaced(here.clone(), namespace)
                .create(&params, &one)
                .await?;
        }
        for one in self.of_kind::<RoleBinding>("RoleBinding", namespace)? {
            Api::namespaced(here.clone(), namespace)
                .create(&params, &one)
                .await?;
        }
        Ok(())
    }

    /// The arguments of a sidecar, but where its socket is.
    pub(crate) fn sidecar(&self, name: &str, namespace: &str) -> Result<Vec<String>> {
        let deployments: Vec<Value> = self.of_kind("Deployment", namespace)?;
        let containers = deployments.iter().flat_map(|deployment| {
            let all = deployment["spec"]["template"]["spec"]["containers"].as_array();
            all.cloned().unwrap_or_default()
        });
        let container = containers
            .into_iter()
            .find(|container| container["name"] == name)
            .with_context(|| format!("the chart has no {name}"))?;
        let arguments = container["args"].as_array().context("no arguments")?;
        let arguments = arguments.iter().filter_map(Value::as_str);
        let arguments = arguments.filter(|one| !one.starts_with("--csi-address"));
        Ok(arguments
            .map(|one| one.replace("$(NAMESPACE)", namespace))
            .collect())
    }
}
