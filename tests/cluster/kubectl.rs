//! What a person does with kubectl, and waiting for what comes of it.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::process::output;
use super::reader::Reader;
use super::tools::Tools;
use super::until;

/// For anything that the cluster does by itself; a node has one slow processor.
pub(crate) const PATIENCE: Duration = Duration::from_secs(240);

/// kubectl in one namespace.
#[derive(Clone)]
pub(crate) struct Kubectl {
    tools: Tools,
    kubeconfig: PathBuf,
    reader: Reader,
    pub(crate) namespace: String,
}

impl Kubectl {
    pub(crate) fn new(tools: &Tools, kubeconfig: PathBuf) -> Result<Self> {
        Ok(Self {
            tools: tools.clone(),
            reader: Reader::new(&kubeconfig)?,
            kubeconfig,
            namespace: "default".to_owned(),
        })
    }

    pub(crate) fn in_namespace(&self, namespace: &str) -> Self {
        Self {
            namespace: namespace.to_owned(),
            ..self.clone()
        }
    }

    /// A new namespace whose pods may do anything.
    pub(crate) fn create_namespace(&self, namespace: &str) -> Result<Self> {
        self.run(&["create", "namespace", namespace])?;
        Ok(self.in_namespace(namespace))
    }

    pub(crate) fn command(&self) -> Command {
        let mut command = self.tools.kubernetes("kubectl");
        command
            .env("KUBECONFIG", &self.kubeconfig)
            .arg(format!("--namespace={}", self.namespace));
        command
    }

    pub(crate) fn helm(&self) -> Command {
        let mut command = self.tools.kubernetes("helm");
        command
            .env("KUBECONFIG", &self.kubeconfig)
            .arg(format!("--namespace={}", self.namespace));
        command
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Result<String> {
        output(self.command().args(arguments))
    }

    pub(crate) fn apply(&self, manifests: &str) -> Result<()> {
        let mut child = self
            .command()
            .args(["apply", "--server-side", "--force-conflicts", "-f", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("running kubectl")?;
        child
            .stdin
            .take()
            .context("no pipe")?
            .write_all(manifests.as_bytes())?;
        let result = child.wait_with_output()?;
        ensure!(
            result.status.success(),
            "kubectl apply: {}\n{manifests}",
            String::from_utf8_lossy(&result.stderr)
        );
        Ok(())
    }

    /// An object, or None where there is none.
    pub(crate) fn object(&self, kind: &str, name: &str) -> Result<Option<Value>> {
        self.reader.object(kind, &self.namespace, name)
    }

    /// All objects of a kind, with a selector of labels that may be empty.
    pub(crate) fn objects(&self, kind: &str, selector: &str) -> Result<Vec<Value>> {
        self.reader.objects(kind, &self.namespace, selector)
    }

    /// Waits until an Event on an object of this namespace says all of this, in its reason or its message.
    pub(crate) fn until_event(&self, kind: &str, name: &str, words: &[&str]) -> Result<String> {
        until(
            &format!("an Event on {kind} {name} says {words:?}"),
            PATIENCE,
            || {
                let says = |event: &Value| {
                    let about = &event["involvedObject"];
                    let text = format!(
                        "{}: {}",
                        event["reason"].as_str().unwrap_or_default(),
                        event["message"].as_str().unwrap_or_default()
                    );
                    (about["kind"] == kind
                        && about["name"] == name
                        && words.iter().all(|word| text.contains(word)))
                    .then_some(text)
                };
                Ok(self.objects("event", "")?.iter().find_map(says))
            },
        )
    }

    /// Waits until an object is as wanted; its absence is not.
    pub(crate) fn until(
        &self,
        kind: &str,
        name: &str,
        what: &str,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        until(&format!("{kind} {name} {what}"), PATIENCE, || {
            Ok(self.object(kind, name)?.filter(&wanted))
        })
    }

    pub(crate) fn until_gone(&self, kind: &str, name: &str) -> Result<()> {
        until(&format!("{kind} {name} is gone"), PATIENCE, || {
            Ok(self.object(kind, name)?.is_none().then_some(()))
        })
    }

    pub(crate) fn until_pod_ready(&self, name: &str) -> Result<Value> {
        self.until("pod", name, "is ready", is_ready)
    }

    /// Waits until as many pods as said are ready, and no others are there.
    pub(crate) fn until_pods_ready(&self, selector: &str, count: usize) -> Result<Vec<Value>> {
        until(
            &format!("{count} pods with {selector} are ready"),
            PATIENCE,
            || {
                let pods = self.objects("pod", selector)?;
                Ok((pods.len() == count && pods.iter().all(is_ready)).then_some(pods))
            },
        )
    }

    /// What a command in a pod prints.
    pub(crate) fn exec(&self, pod: &str, script: &str) -> Result<String> {
        self.run(&["exec", pod, "--", "/bin/sh", "-c", script])
    }

    pub(crate) fn delete(&self, kind: &str, name: &str) -> Result<()> {
        self.run(&["delete", kind, name, "--wait=false"]).map(drop)
    }
}

/// Whether a pod's or a node's condition Ready is true, and it is not being deleted.
pub(crate) fn is_ready(object: &Value) -> bool {
    let ready = |condition: &Value| condition["type"] == "Ready" && condition["status"] == "True";
    object["metadata"]["deletionTimestamp"].is_null()
        && object["status"]["conditions"]
            .as_array()
            .is_some_and(|conditions| conditions.iter().any(ready))
}
