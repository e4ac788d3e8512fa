//! What this node has to say of its volumes: the outcome of each attach, in the volume's status and as an Event on the
//! claim.
//!
//! Nothing waits for it. What cannot be said now is said when the API server is there again; of each volume, the newest.

use std::collections::HashMap;
use std::time::Duration;

use k8s_openapi::api::core::v1::{ObjectReference, PersistentVolume};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Api, Client, Resource};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::attach::Transport;
use crate::csi::DRIVER_NAME;
use crate::daemon::chain;
use crate::kube::api::{
    self, AttachmentStatus, NbdVolume, NbdVolumeStatus, VerificationStatus, node_manager,
};
use crate::kube::apply::{apply_status, is_not_found};
use crate::kube::claim::{claim, claim_of};
use crate::verify::{Policy, Report};
use crate::volumes::{AttachNote, AttachmentId, VolumeId};

/// Notes that wait to be said. More than volumes on a node; what is beyond is dropped, and said in the log only.
const WAITING: usize = 4096;

/// The pause after the API server did not take a note.
const PAUSE: Duration = Duration::from_secs(5);

/// How long a note is worth saying.
const STALE: Duration = Duration::from_secs(3600);

/// Bytes of an Event's note, and of one finding (api/events/v1, and to keep objects small).
const NOTE: usize = 1000;
const FINDING: usize = 400;

/// Findings in a volume's status: as many as the API takes.
const FINDINGS: usize = 64;

/// Something to say of a volume.
#[derive(Debug, Clone)]
pub(super) enum Note {
    /// The PersistentVolume that it is said to be, of one that is not Hawser's.
    Named(String),
    Attached(Box<Attached>),
    RefusedSecret(String),
    Detached,
}

/// An attach, and when it was.
#[derive(Debug, Clone)]
pub(super) struct Attached {
    attachment: AttachmentId,
    encryption: Option<String>,
    verification: VerificationStatus,
    at: Option<String>,
}

impl Note {
    /// What verification came to, if this is of an attach.
    pub(super) fn verification(&self) -> Option<&str> {
        match self {
            Self::Attached(attached) => Some(&attached.verification.result),
            Self::Named(_) | Self::RefusedSecret(_) | Self::Detached => None,
        }
    }

    pub(super) fn attached(note: AttachNote) -> Self {
        let report = note.report.as_deref();
        Self::Attached(Box::new(Attached {
            encryption: note.transport.map(encryption),
            verification: verification(&note, report, api::now()),
            at: report.map(|report| report.address.to_string()),
            attachment: note.attachment,
        }))
    }

    pub(super) fn refused_secret(problem: &str) -> Self {
        Self::RefusedSecret(problem.to_owned())
    }
}

/// How the data travels, in the words of NbdVolume.status.
fn encryption(transport: Transport) -> String {
    let words = match transport {
        Transport::KernelTls => "TLS 1.3 in the kernel",
        Transport::Proxy => "TLS 1.3 in a proxy of the node plugin's",
    };
    words.to_owned()
}

/// What verification came to, in the words of NbdVolume.status.
fn verification(
    note: &AttachNote,
    report: Option<&Report>,
    checked_at: Time,
) -> VerificationStatus {
    let failing: Vec<String> = report.map_or_else(Vec::new, |report| {
        report
            .findings()
            .chain(report.not_run())
            .take(FINDINGS)
            .map(|one| shortened(&format!("{}: {}", one.check.id, one.text()), FINDING))
            .collect()
    });
    let result = match (note.policy, failing.is_empty()) {
        (Policy::Off, _) => "off",
        (_, true) => "passed",
        (_, false) if note.transport.is_some() => "warnings",
        (_, false) => "failed",
    };
    VerificationStatus {
        result: result.to_owned(),
        findings: failing,
        checked_at,
        server: report.map(|report| shortened(&report.address.to_string(), 512)),
    }
}

fn shortened(text: &str, most: usize) -> String {
    text[..text.floor_char_boundary(most)].to_owned()
}

/// The Event that tells a claim's owner.
fn event(note: &Note, node: &str) -> Option<Event> {
    let (type_, reason, text) = match note {
        Note::Attached(attached) => {
            let verified = &attached.verification;
            let at = attached.at.as_deref().unwrap_or("its server");
            let findings = verified.findings.join("; ");
            match verified.result.as_str() {
                "passed" => (
                    EventType::Normal,
                    "Verified",
                    format!(
                        "{at} passed every check of its encryption; attached to node {node} with {}",
                        attached.encryption.as_deref().unwrap_or("TLS")
                    ),
                ),
                "off" => return None,
                "warnings" => (
                    EventType::Warning,
                    "VerificationWarning",
                    format!(
                        "attached to node {node}, although {at} is not as it should be: {findings}"
                    ),
                ),
                _ => (
                    EventType::Warning,
                    "VerificationFailed",
                    format!("not attached to node {node}: {at} failed verification: {findings}"),
                ),
            }
        }
        Note::RefusedSecret(problem) => (
            EventType::Warning,
            "CertificateRefused",
            format!("node {node} keeps the certificate that it has: {problem}"),
        ),
        Note::Named(_) | Note::Detached => return None,
    };
    Some(Event {
        type_,
        reason: reason.to_owned(),
        note: Some(shortened(&text, NOTE)),
        action: "Attach".to_owned(),
        secondary: None,
    })
}

/// Takes notes. Cheap to clone.
#[derive(Clone)]
pub(super) struct Notes(mpsc::Sender<(VolumeId, Note)>);

impl Notes {
    pub(super) fn new() -> (Self, mpsc::Receiver<(VolumeId, Note)>) {
        let (sender, receiver) = mpsc::channel(WAITING);
        (Self(sender), receiver)
    }

    pub(super) fn take(&self, volume: &VolumeId, note: Note) {
        if self.0.try_send((volume.clone(), note)).is_err() {
            tracing::warn!(%volume, "its status and its Events do not tell what came of this");
        }
    }
}

/// Says what it is given, one after the other.
pub(super) struct Herald {
    node: String,
    volumes: Api<NbdVolume>,
    persistent_volumes: Api<PersistentVolume>,
    recorder: Recorder,
    /// The last Secret that was refused, of each volume: the kubelet brings it again every minute.
    refused: HashMap<VolumeId, String>,
    /// The PersistentVolumes of volumes that have no NbdVolume.
    named: HashMap<VolumeId, String>,
    /// What is to be told of a volume as soon as it has a name: the kubelet says it when it publishes the volume, after the
    /// attach.
    unnamed: HashMap<VolumeId, Note>,
}

impl Herald {
    pub(super) fn new(client: &Client, namespace: &str, node: &str) -> Self {
        let reporter = Reporter {
            controller: DRIVER_NAME.to_owned(),
            instance: Some(node.to_owned()),
        };
        Self {
            node: node.to_owned(),
            volumes: Api::namespaced(client.clone(), namespace),
            persistent_volumes: Api::all(client.clone()),
            recorder: Recorder::new(client.clone(), reporter),
            refused: HashMap::new(),
            named: HashMap::new(),
            unnamed: HashMap::new(),
        }
    }

    /// Says what comes, until nobody takes notes any more.
    pub(super) async fn say(mut self, mut notes: mpsc::Receiver<(VolumeId, Note)>) {
        let mut pending: HashMap<VolumeId, (Note, Instant)> = HashMap::new();
        loop {
            let next = if pending.is_empty() {
                notes.recv().await
            } else {
                match tokio::time::timeout(PAUSE, notes.recv()).await {
                    Ok(next) => next,
                    Err(_) => {
                        self.say_pending(&mut pending).await;
                        continue;
                    }
                }
            };
            let Some((volume, note)) = next else {
                return;
            };
            let note = match note {
                Note::Named(name) => {
                    self.named.insert(volume.clone(), name);
                    match self.unnamed.remove(&volume) {
                        Some(note) => note,
                        None => continue,
                    }
                }
                note => note,
            };
            if let Err(error) = self.say_one(&volume, &note).await {
                let error = chain(&error);
                tracing::warn!(%volume, error, "the API server did not take note of this; trying again");
                pending.insert(volume, (note, Instant::now()));
            } else {
                pending.remove(&volume);
            }
        }
    }

    async fn say_pending(&mut self, pending: &mut HashMap<VolumeId, (Note, Instant)>) {
        pending.retain(|_, (_, since)| since.elapsed() < STALE);
        let waiting: Vec<_> = pending
            .iter()
            .map(|(id, (note, _))| (id.clone(), note.clone()))
            .collect();
        for (volume, note) in waiting {
            if self.say_one(&volume, &note).await.is_err() {
                // It is away still: the others would fare the same.
                return;
            }
            pending.remove(&volume);
        }
    }

    async fn say_one(&mut self, volume: &VolumeId, note: &Note) -> kube::Result<()> {
        if let Note::RefusedSecret(problem) = note
            && self
                .refused
                .insert(volume.clone(), problem.clone())
                .as_ref()
                == Some(problem)
        {
            return Ok(());
        }
        let object = match self.volumes.get(volume.as_str()).await {
            Err(error) if is_not_found(&error) => return self.say_of_foreign(volume, note).await,
            object => object?,
        };
        let attachments = match note {
            Note::Attached(attached) => Some(vec![AttachmentStatus {
                id: attached.attachment.to_string(),
                encryption: attached.encryption.clone(),
                verification: Some(attached.verification.clone()),
                ..AttachmentStatus::default()
            }]),
            // Nothing here any more: the entry is the others'.
            Note::Detached => {
                self.refused.remove(volume);
                Some(Vec::new())
            }
            Note::Named(_) | Note::RefusedSecret(_) => None,
        };
        if let Some(attachments) = attachments {
            let status = NbdVolumeStatus {
                attachments,
                ..NbdVolumeStatus::default()
            };
            let manager = node_manager(&self.node);
            match apply_status(&self.volumes, &object, &manager, &status).await {
                Err(error) if is_not_found(&error) => return Ok(()),
                applied => drop(applied?),
            }
        }
        if let Some(event) = event(note, &self.node) {
            let about = self.claim(&object).await?;
            self.recorder.publish(&event, &about).await?;
        }
        Ok(())
    }

    /// Tells of a volume that has no NbdVolume: on a foreign server, or gone.
    async fn say_of_foreign(&mut self, volume: &VolumeId, note: &Note) -> kube::Result<()> {
        let name = match note {
            Note::Detached => {
                self.refused.remove(volume);
                self.named.remove(volume);
                self.unnamed.remove(volume);
                return Ok(());
            }
            _ => self.named.get(volume),
        };
        let Some(event) = event(note, &self.node) else {
            return Ok(());
        };
        let Some(name) = name else {
            self.unnamed.insert(volume.clone(), note.clone());
            return Ok(());
        };
        let found = match self.persistent_volumes.get(name).await {
            Err(kube::Error::Api(status)) if [403, 404].contains(&status.code) => return Ok(()),
            found => found?,
        };
        // What the node was told, the API server has to confirm.
        if !is_of(&found, volume) {
            return Ok(());
        }
        let about = claim(&found).unwrap_or_else(|| found.object_ref(&()));
        self.recorder.publish(&event, &about).await
    }

    /// The claim that the volume is bound to; the volume itself where there is none.
    async fn claim(&self, object: &NbdVolume) -> kube::Result<ObjectReference> {
        // Told where it is of less use, rather than not at all.
        let bound = claim_of(&self.persistent_volumes, &object.spec.name).await?;
        Ok(bound.unwrap_or_else(|| object.object_ref(&())))
    }
}

/// Whether the PersistentVolume is this volume of ours.
fn is_of(found: &PersistentVolume, volume: &VolumeId) -> bool {
    let source = found.spec.as_ref().and_then(|spec| spec.csi.as_ref());
    source.is_some_and(|source| {
        source.driver == DRIVER_NAME && VolumeId::of_handle(&source.volume_handle) == *volume
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_name_is_believed_only_where_the_persistent_volume_is_of_that_volume() {
        let found = |driver: &str, handle: &str| -> PersistentVolume {
            serde_json::from_value(json!({
                "metadata": { "name": "disk" },
                "spec": { "csi": { "driver": driver, "volumeHandle": handle } },
            }))
            .unwrap()
        };
        let volume = VolumeId::of_handle("nas-disk-7");
        assert!(is_of(&found(DRIVER_NAME, "nas-disk-7"), &volume));
        assert!(!is_of(&found(DRIVER_NAME, "nas-disk-8"), &volume));
        assert!(!is_of(&found("other.example.org", "nas-disk-7"), &volume));
        assert!(!is_of(&PersistentVolume::default(), &volume));
    }

    fn attached(policy: Policy, transport: Option<Transport>) -> Note {
        Note::attached(AttachNote {
            attachment: AttachmentId::from_bytes([1; 16]),
            policy,
            report: None,
            transport,
        })
    }

    #[test]
    fn an_attach_is_told_in_the_words_of_the_api() {
        let Note::Attached(off) = attached(Policy::Off, Some(Transport::Proxy)) else {
            unreachable!();
        };
        assert_eq!(off.verification.result, "off");
        assert!(off.encryption.unwrap().contains("proxy"));
        let passed = attached(Policy::Strict, Some(Transport::KernelTls));
        let told = event(&passed, "worker").unwrap();
        assert_eq!(told.type_, EventType::Normal);
        assert!(told.note.unwrap().contains("worker"));
        assert!(event(&attached(Policy::Off, None), "worker").is_none());
        assert!(event(&Note::Detached, "worker").is_none());
        let refused = event(&Note::refused_secret(&"ü".repeat(2000)), "worker").unwrap();
        assert_eq!(refused.type_, EventType::Warning);
        assert!(refused.note.unwrap().len() <= NOTE);
    }
}
