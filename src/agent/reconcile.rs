//! Looking at a volume: from its object to the disk and its server, and back into its status.

use std::sync::Arc;
use std::time::Duration;

use kube::ResourceExt;
use kube::api::{Patch, PatchParams};
use serde_json::json;

use super::Agent;
use super::decide::{Access, Asked, Backing, access, backing, confirmed, states};
use super::queue::Looked;
use super::volume::{Site, VolumeError};
use crate::daemon::chain;
use crate::kube::api::{
    AGENT, AttachmentStatus, BACKING_FINALIZER, BACKING_READY, FormatStatus, NbdVolume,
    NbdVolumeStatus, condition, find_condition,
};
use crate::kube::apply::{apply_status, is_conflict, is_not_found};
use crate::volumes::{Format, VolumeId};

/// How often a volume is looked at when nothing changes: a server may have been restarted, or its files been touched.
const RESYNC: Duration = Duration::from_secs(60);

/// How long the API server may take to answer.
const ANSWER: Duration = Duration::from_secs(20);

/// What is to be written into a volume's status.
#[derive(Debug, Clone, PartialEq)]
struct Outcome {
    /// `None`: as it was.
    size_bytes: Option<u64>,
    epoch: Option<u64>,
    /// Whether the server, or the file of the next one, is in line with the object.
    settled: bool,
    ready: bool,
    reason: &'static str,
    message: String,
}

impl Outcome {
    fn refused(reason: &'static str, message: String) -> Self {
        Self {
            size_bytes: None,
            epoch: None,
            settled: false,
            ready: false,
            reason,
            message,
        }
    }
}

impl Agent {
    /// Looks at a volume, and does what is to be done.
    pub(super) async fn look(self: Arc<Self>, id: VolumeId) -> Looked {
        let Some(object) = self.volume(&id) else {
            return Looked::Nothing;
        };
        let looked = self.look_at(&id, &object).await;
        self.metrics.looked(looked != Looked::Badly);
        looked
    }

    async fn look_at(self: &Arc<Self>, id: &VolumeId, object: &NbdVolume) -> Looked {
        match tokio::time::timeout(super::LOOK, self.reconcile(id, object)).await {
            Ok(Ok(looked)) => looked,
            Ok(Err(error)) if is_conflict(&error) => Looked::Badly,
            Ok(Err(error)) => {
                let error = chain(&error);
                tracing::warn!(volume = %id, error, "the API server did not take its status");
                Looked::Badly
            }
            Err(_) => {
                tracing::warn!(volume = %id, "this takes too long; trying again");
                Looked::Badly
            }
        }
    }

    async fn reconcile(
        self: &Arc<Self>,
        id: &VolumeId,
        object: &NbdVolume,
    ) -> kube::Result<Looked> {
        let outcome = match self.pool_of(object).await {
            Err(error) => Outcome::refused("PoolUnavailable", error.to_string()),
            Ok(pool) => {
                let site = Site {
                    id: id.clone(),
                    pool,
                };
                match self.work(&site, object).await {
                    Ok(Work::Gone) => {
                        self.release(object).await?;
                        self.changed.notify_one();
                        return Ok(Looked::Nothing);
                    }
                    Ok(Work::Done(outcome, format)) => {
                        self.restore_format(object, &format).await?;
                        outcome
                    }
                    Ok(Work::Refused(outcome)) => outcome,
                    Err(error) => {
                        let known = object.status.as_ref().and_then(|status| status.size_bytes);
                        Outcome {
                            // A server that does not answer does not make the data any less there.
                            ready: known.is_some() && error.is_of_the_server(),
                            ..Outcome::refused(error.reason(), error.to_string())
                        }
                    }
                }
            }
        };
        let is_well = outcome.settled && outcome.message.is_empty();
        let looked = match is_well {
            true => Looked::Well(RESYNC),
            false => Looked::Badly,
        };
        if !is_well {
            let (reason, message) = (outcome.reason, &outcome.message);
            tracing::warn!(volume = %id, reason, message, "not as it is to be");
        }
        self.report(object, &outcome).await?;
        Ok(looked)
    }

    async fn work(&self, site: &Site, object: &NbdVolume) -> Result<Work, VolumeError> {
        let id = &site.id;
        let asked = Asked::of(object);
        let disk = site.disk().await?;
        let mut problem = None;
        match backing(asked, &disk) {
            Backing::Refuse { reason, message } => {
                return Ok(Work::Refused(Outcome::refused(reason, message)));
            }
            Backing::Forget => return Ok(Work::Gone),
            Backing::Delete => {
                site.delete().await?;
                tracing::info!(volume = %id, name = asked.name, "deleted, its data with it");
                return Ok(Work::Gone);
            }
            Backing::Make => {
                if !object
                    .finalizers()
                    .iter()
                    .any(|name| name == BACKING_FINALIZER)
                {
                    return Ok(Work::Refused(Outcome::refused(
                        "NoFinalizer",
                        format!(
                            "finalizer {BACKING_FINALIZER} is missing: its data would be left behind"
                        ),
                    )));
                }
                site.make(object).await?;
                self.changed.notify_one();
                tracing::info!(volume = %id, name = asked.name, bytes = asked.size_bytes, "made");
            }
            // A volume that cannot grow is as good as it was: who may connect must be settled all the same.
            Backing::Grow => match site.grow(asked.size_bytes).await {
                Ok(()) => {
                    self.changed.notify_one();
                    tracing::info!(volume = %id, bytes = asked.size_bytes, "grown");
                }
                Err(error) => problem = Some(error),
            },
            Backing::Keep if disk == super::decide::Disk::Absent => {
                // It is to be deleted, and nothing is left to which somebody could write.
                return Ok(Work::Done(
                    Outcome {
                        settled: true,
                        ..Outcome::refused("Deleting", String::new())
                    },
                    Format::Never,
                ));
            }
            Backing::Keep => {}
        }
        let told = object
            .status
            .as_ref()
            .and_then(|status| status.format.as_ref());
        let (format, size_bytes) = site.settle(told.map(Format::from)).await?;
        let access: Access = access(object);
        let served = site.enforce(&access, size_bytes).await;
        let (epoch, settled) = match &served {
            Ok(served) => (served.epoch, true),
            Err(_) => (None, false),
        };
        // The backing store is there, whatever its server does: whoever waits for it need not wait for the server.
        let problem = served.err().or(problem);
        let (reason, message) = problem.map_or(("Present", String::new()), |error| {
            (error.reason(), error.to_string())
        });
        let outcome = Outcome {
            size_bytes: Some(size_bytes),
            epoch,
            settled,
            ready: true,
            reason,
            message,
        };
        Ok(Work::Done(outcome, format))
    }

    /// Says in the object's status what came of it, if that is anything new.
    async fn report(&self, object: &NbdVolume, outcome: &Outcome) -> kube::Result<()> {
        let Some(status) = status(object, outcome) else {
            return Ok(());
        };
        match answered(apply_status(&self.volumes, object, AGENT, &status)).await {
            Err(error) if is_not_found(&error) => Ok(()),
            applied => applied.map(drop),
        }
    }

    /// Tells the object how far formatting had come, where it has lost that and the pool has not.
    async fn restore_format(&self, object: &NbdVolume, format: &Format) -> kube::Result<()> {
        let known = object
            .status
            .as_ref()
            .and_then(|status| status.format.as_ref());
        if known.is_some() || *format == Format::Never {
            return Ok(());
        }
        tracing::warn!(volume = %object.name_any(), ?format, "the pool knows of its format, the API server does not");
        let patch = json!({
            "metadata": { "resourceVersion": object.resource_version() },
            "status": { "format": FormatStatus::from(format) },
        });
        let params = by_agent();
        let patch = Patch::Merge(patch);
        let name = object.name_any();
        answered(self.volumes.patch_status(&name, &params, &patch))
            .await
            .map(drop)
    }

    /// Lets the object go: nothing of the volume is left here.
    async fn release(&self, object: &NbdVolume) -> kube::Result<()> {
        let finalizers = object.finalizers();
        let left: Vec<_> = finalizers
            .iter()
            .filter(|name| *name != BACKING_FINALIZER)
            .collect();
        if left.len() == finalizers.len() {
            return Ok(());
        }
        let patch = json!({ "metadata": {
            "resourceVersion": object.resource_version(),
            "finalizers": left,
        }});
        let name = object.name_any();
        let params = by_agent();
        let patch = Patch::Merge(patch);
        match answered(self.volumes.patch(&name, &params, &patch)).await {
            Err(error) if is_not_found(&error) => Ok(()),
            released => released.map(drop),
        }
    }
}

/// What came of the work on a volume.
enum Work {
    /// Nothing of it is left.
    Gone,
    /// What it is now, and how far formatting has come.
    Done(Outcome, Format),
    Refused(Outcome),
}

fn by_agent() -> PatchParams {
    PatchParams {
        field_manager: Some(AGENT.to_owned()),
        ..PatchParams::default()
    }
}

async fn answered<T>(call: impl Future<Output = kube::Result<T>>) -> kube::Result<T> {
    tokio::time::timeout(ANSWER, call)
        .await
        .unwrap_or_else(|late| Err(kube::Error::Service(late.into())))
}

impl VolumeError {
    /// Whether the data is there, and only the server is not as it is to be.
    fn is_of_the_server(&self) -> bool {
        matches!(self, Self::Control(_) | Self::Held)
    }

    /// The reason of a condition.
    fn reason(&self) -> &'static str {
        use crate::storage::StorageError;
        match self {
            Self::Control(_) | Self::Held => "ServerSilent",
            Self::Storage(StorageError::NoRoom { .. } | StorageError::Full { .. }) => "NoRoom",
            Self::Storage(_) | Self::Io { .. } => "StorageFailed",
            Self::ShuttingDown => "ShuttingDown",
        }
    }
}

/// The agent's part of the status, if it differs from what is there. What it confirmed of attachments that are not asked
/// for any more is the controller's to remove.
fn status(object: &NbdVolume, outcome: &Outcome) -> Option<NbdVolumeStatus> {
    let before = object.status.clone().unwrap_or_default();
    let message = outcome.message.chars().take(1024).collect::<String>();
    let ready = condition(
        &before.conditions,
        BACKING_READY,
        Some(outcome.ready),
        outcome.reason,
        message,
        object.metadata.generation,
    );
    let status = NbdVolumeStatus {
        size_bytes: outcome.size_bytes.or(before.size_bytes),
        epoch: outcome.epoch.or(before.epoch),
        conditions: vec![ready],
        attachments: states(object, outcome.settled),
        ..NbdVolumeStatus::default()
    };
    let asked = object.spec.attachments.iter();
    let told: Vec<AttachmentStatus> = asked
        .filter_map(|one| confirmed(object).iter().find(|status| status.id == one.id))
        .filter(|status| status.state.is_some())
        .map(|status| AttachmentStatus {
            id: status.id.clone(),
            state: status.state,
            ..AttachmentStatus::default()
        })
        .collect();
    let is_same = status.size_bytes == before.size_bytes
        && status.epoch == before.epoch
        && status.attachments == told
        && find_condition(&before.conditions, BACKING_READY) == status.conditions.first();
    (!is_same).then_some(status)
}
