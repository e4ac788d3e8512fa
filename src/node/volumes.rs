//! The volumes of the installation as a node sees them: over the API server, with what the kubelet brings, and nothing
//! that the node has no need of.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Node;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client, ResourceExt};
use serde_json::json;

use super::directory::{Directory, Place};
use super::keyring::Keyring;
use super::metrics::Metrics;
use super::notes::{Note, Notes};
use crate::admission::check_format;
use crate::kube::api::{self, NODE, NbdVolume};
use crate::kube::{apply, convert};

use crate::volumes::{AttachNote, Format, NodeVolumes, Volume, VolumeId, VolumesError};

/// How long the API server may take to answer. The kubelet waits two minutes for a call.
const ANSWER: Duration = Duration::from_secs(20);

/// How long a call waits for the volume's server to be somewhere.
const PATIENCE: Duration = Duration::from_secs(5);

/// How often a change is made anew because somebody else changed the volume meanwhile.
const ATTEMPTS: u32 = 8;

/// Implements what the CSI Node service and the kernel's devices ask of an installation.
pub(super) struct ClusterVolumes {
    node: String,
    nodes: Api<Node>,
    volumes: Api<NbdVolume>,
    directory: Directory,
    keyring: Arc<Keyring>,
    notes: Notes,
    metrics: Metrics,
}

impl ClusterVolumes {
    pub(super) fn new(
        client: &Client,
        namespace: &str,
        node: &str,
        directory: Directory,
        keyring: Arc<Keyring>,
        notes: Notes,
        metrics: Metrics,
    ) -> Self {
        Self {
            node: node.to_owned(),
            nodes: Api::all(client.clone()),
            volumes: Api::namespaced(client.clone(), namespace),
            directory,
            keyring,
            notes,
            metrics,
        }
    }

    async fn object(&self, id: &VolumeId) -> Result<NbdVolume, VolumesError> {
        let doing = "the API server does not tell of it";
        answered(self.volumes.get(id.as_str()))
            .await
            .map_err(|failure| failed(id, doing, failure))
    }

    /// Does what may block where that may be done.
    async fn on_keyring<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Keyring) -> T + Send + 'static,
    ) -> Option<T> {
        let keyring = Arc::clone(&self.keyring);
        tokio::task::spawn_blocking(move || work(&keyring))
            .await
            .ok()
    }
}

/// No answer in time, or one that is an error.
enum Failure {
    Late,
    Error(kube::Error),
}

async fn answered<T>(call: impl Future<Output = kube::Result<T>>) -> Result<T, Failure> {
    match tokio::time::timeout(ANSWER, call).await {
        Ok(answer) => answer.map_err(Failure::Error),
        Err(_) => Err(Failure::Late),
    }
}

fn failed(id: &VolumeId, doing: &str, failure: Failure) -> VolumesError {
    let source: Box<dyn std::error::Error + Send + Sync> = match failure {
        Failure::Error(error) if apply::is_not_found(&error) => {
            return VolumesError::NotFound(id.to_string());
        }
        Failure::Error(error) => error.into(),
        Failure::Late => format!("no answer within {} s", ANSWER.as_secs()).into(),
    };
    VolumesError::Unavailable {
        volume: id.to_string(),
        doing: doing.to_owned(),
        source: Some(source),
    }
}

fn unavailable(id: &VolumeId, doing: &str) -> VolumesError {
    VolumesError::Unavailable {
        volume: id.to_string(),
        doing: doing.to_owned(),
        source: None,
    }
}

#[tonic::async_trait]
impl NodeVolumes for ClusterVolumes {
    async fn find(&self, id: &VolumeId) -> Result<Volume, VolumesError> {
        let object = self.object(id).await?;
        convert::volume(&object).map_err(|source| VolumesError::Internal {
            doing: format!("NbdVolume {id} cannot be understood"),
            source: Some(source.into()),
        })
    }

    async fn endpoint(&self, id: &VolumeId) -> Result<SocketAddr, VolumesError> {
        match self.directory.place(id, PATIENCE).await {
            Place::At(address) => {
                let id = id.clone();
                self.on_keyring(move |keyring| keyring.keep_place(&id, address))
                    .await;
                Ok(address)
            }
            Place::Nowhere => Err(unavailable(id, "its server does not run")),
            Place::Unheard => {
                let last = id.clone();
                let last = self.on_keyring(move |keyring| keyring.place(&last)).await;
                last.flatten()
                    .ok_or_else(|| unavailable(id, "the API server does not answer"))
            }
        }
    }

    async fn client_secret(
        &self,
        id: &VolumeId,
    ) -> Result<BTreeMap<String, Vec<u8>>, VolumesError> {
        let volume = id.clone();
        let kept = self
            .on_keyring(move |keyring| keyring.secret(&volume))
            .await;
        kept.flatten().ok_or_else(|| {
            unavailable(
                id,
                "nobody brought its client Secret: the kubelet does, where the PersistentVolume names one for \
                 node-stage and node-publish",
            )
        })
    }

    async fn set_format(&self, id: &VolumeId, format: Format) -> Result<(), VolumesError> {
        let doing = "the API server did not record its format";
        for _ in 0..ATTEMPTS {
            let object = self.object(id).await?;
            let volume = convert::volume(&object).map_err(|error| {
                VolumesError::Invalid(format!("NbdVolume {id} cannot be understood: {error}"))
            })?;
            check_format(&volume, &format)?;
            if volume.format == format {
                return Ok(());
            }
            // Only what was read is changed: a format that somebody else recorded meanwhile is not overwritten.
            let patch = json!({
                "metadata": { "resourceVersion": object.resource_version() },
                "status": { "format": api::FormatStatus::from(&format) },
            });
            let params = PatchParams {
                field_manager: Some(NODE.to_owned()),
                ..PatchParams::default()
            };
            let patch = Patch::Merge(patch);
            let call = self.volumes.patch_status(id.as_str(), &params, &patch);
            match answered(call).await {
                Ok(_) => return Ok(()),
                Err(Failure::Error(error)) if apply::is_conflict(&error) => {}
                Err(failure) => return Err(failed(id, doing, failure)),
            }
        }
        Err(unavailable(id, doing))
    }

    async fn topology(&self) -> Result<BTreeMap<String, String>, VolumesError> {
        let node = match answered(self.nodes.get(&self.node)).await {
            Ok(node) => node,
            Err(Failure::Error(error)) if apply::is_not_found(&error) => {
                return Err(VolumesError::NodeNotFound(self.node.clone()));
            }
            Err(failure) => {
                let source: Option<Box<dyn std::error::Error + Send + Sync>> = match failure {
                    Failure::Error(error) => Some(error.into()),
                    Failure::Late => None,
                };
                return Err(VolumesError::Internal {
                    doing: format!("the API server does not tell of node {}", self.node),
                    source,
                });
            }
        };
        let zone = node.labels().get(api::ZONE_LABEL);
        let zone = zone.map_or(api::NO_ZONE, String::as_str);
        Ok(BTreeMap::from([(
            api::ZONE_KEY.to_owned(),
            zone.to_owned(),
        )]))
    }

    async fn keep_client_secret(
        &self,
        id: &VolumeId,
        secret: BTreeMap<String, Vec<u8>>,
    ) -> Result<(), VolumesError> {
        let volume = id.clone();
        let kept = self.on_keyring(move |keyring| keyring.keep(&volume, secret));
        match kept.await {
            Some(Ok(())) => Ok(()),
            Some(Err(error)) => Err(VolumesError::Secret {
                problem: format!("volume {id}: its client Secret cannot be kept"),
                source: Some(error.into()),
            }),
            None => Err(unavailable(id, "this process is shutting down")),
        }
    }

    fn note_name(&self, id: &VolumeId, name: &str) {
        self.notes.take(id, Note::Named(name.to_owned()));
    }

    fn note_attach(&self, id: &VolumeId, note: AttachNote) {
        let note = Note::attached(note);
        if let Some(result) = note.verification() {
            self.metrics.verified(result);
        }
        self.notes.take(id, note);
    }

    fn note_reconnect(&self, _: &VolumeId, mended: bool) {
        self.metrics.reconnected(mended);
    }

    fn note_refused_secret(&self, id: &VolumeId, problem: &str) {
        self.notes.take(id, Note::refused_secret(problem));
    }

    fn note_detached(&self, id: &VolumeId) {
        self.notes.take(id, Note::Detached);
        let (volume, keyring) = (id.clone(), Arc::clone(&self.keyring));
        tokio::task::spawn_blocking(move || keyring.forget(&volume));
    }
}
