//! Reading objects from the API server without a process for each look: what is awaited is looked at often.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kube::api::{ApiResource, DynamicObject, ListParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config};
use serde_json::Value;
use tokio::runtime::Runtime;

/// How long one answer may take.
const ANSWER: Duration = Duration::from_secs(20);

/// Kinds by the names that kubectl takes: group, version, kind, plural, and whether they are in a namespace.
const KINDS: &[(&str, &str, &str, &str, &str, bool)] = &[
    ("pod", "", "v1", "Pod", "pods", true),
    (
        "pvc",
        "",
        "v1",
        "PersistentVolumeClaim",
        "persistentvolumeclaims",
        true,
    ),
    (
        "pv",
        "",
        "v1",
        "PersistentVolume",
        "persistentvolumes",
        false,
    ),
    ("node", "", "v1", "Node", "nodes", false),
    ("secret", "", "v1", "Secret", "secrets", true),
    ("event", "", "v1", "Event", "events", true),
    (
        "statefulset",
        "apps",
        "v1",
        "StatefulSet",
        "statefulsets",
        true,
    ),
    (
        "lease",
        "coordination.k8s.io",
        "v1",
        "Lease",
        "leases",
        true,
    ),
    (
        "csinode",
        "storage.k8s.io",
        "v1",
        "CSINode",
        "csinodes",
        false,
    ),
    (
        "volumeattachment",
        "storage.k8s.io",
        "v1",
        "VolumeAttachment",
        "volumeattachments",
        false,
    ),
    (
        "nbdvolume",
        "hawser.dev",
        "v1alpha1",
        "NbdVolume",
        "nbdvolumes",
        true,
    ),
    (
        "nbdpool",
        "hawser.dev",
        "v1alpha1",
        "NbdPool",
        "nbdpools",
        false,
    ),
];

#[derive(Clone)]
pub(crate) struct Reader {
    runtime: Arc<Runtime>,
    client: Client,
}

impl Reader {
    pub(crate) fn new(kubeconfig: &Path) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let kubeconfig = Kubeconfig::read_from(kubeconfig)?;
        let client = runtime.block_on(async {
            let options = KubeConfigOptions::default();
            let config = Config::from_custom_kubeconfig(kubeconfig, &options).await?;
            Client::try_from(config).context("a client of the API server")
        })?;
        Ok(Self {
            runtime: Arc::new(runtime),
            client,
        })
    }

    fn api(&self, kind: &str, namespace: &str) -> Result<Api<DynamicObject>> {
        let (_, group, version, kind, plural, is_namespaced) = KINDS
            .iter()
            .find(|known| known.0 == kind)
            .with_context(|| format!("no kind is called {kind} here"))?;
        let api_version = match *group {
            "" => (*version).to_owned(),
            group => format!("{group}/{version}"),
        };
        let resource = ApiResource {
            group: (*group).to_owned(),
            version: (*version).to_owned(),
            api_version,
            kind: (*kind).to_owned(),
            plural: (*plural).to_owned(),
        };
        Ok(match is_namespaced {
            true => Api::namespaced_with(self.client.clone(), namespace, &resource),
            false => Api::all_with(self.client.clone(), &resource),
        })
    }

    fn answer<T>(&self, asked: impl Future<Output = kube::Result<T>>) -> Result<T> {
        let answered = self
            .runtime
            .block_on(async { tokio::time::timeout(ANSWER, asked).await });
        ensure!(answered.is_ok(), "the API server does not answer");
        Ok(answered??)
    }

    /// An object, or None where there is none.
    pub(crate) fn object(&self, kind: &str, namespace: &str, name: &str) -> Result<Option<Value>> {
        let object = self.answer(self.api(kind, namespace)?.get_opt(name))?;
        Ok(object.map(serde_json::to_value).transpose()?)
    }

    /// All objects of a kind, with a selector of labels that may be empty.
    pub(crate) fn objects(
        &self,
        kind: &str,
        namespace: &str,
        selector: &str,
    ) -> Result<Vec<Value>> {
        let params = ListParams::default().labels(selector);
        let list = self.answer(self.api(kind, namespace)?.list(&params))?;
        list.items
            .into_iter()
            .map(|object| Ok(serde_json::to_value(object)?))
            .collect()
    }
}
