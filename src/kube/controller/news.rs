//! What became of a volume, as Events where people look: on the volume, and on the claim that has it.

use std::collections::HashMap;

use k8s_openapi::api::core::v1::{ObjectReference, PersistentVolume};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::runtime::events::{Event, EventType, Recorder};
use kube::{Api, Client, Resource, ResourceExt};
use tokio::sync::Mutex;

use super::status::ENDS_SOON;
use crate::kube::api::{self, NbdVolume, NbdVolumeStatus};
use crate::kube::claim::claim_of;

/// Reasons that are no news: a volume that is new has nothing yet, and a server that is ending was told to.
const USUAL: [&str; 7] = [
    "NoPod",
    "NoData",
    "NoPort",
    "NoCertificates",
    "Ending",
    "Ended",
    "SecretMissing",
];

/// Tells.
pub(super) struct News {
    recorder: Recorder,
    persistent_volumes: Api<PersistentVolume>,
    /// What could not be told on a claim, because there was none yet; by the volumes' uids.
    untold: Mutex<HashMap<String, Vec<Condition>>>,
}

impl News {
    pub(super) fn new(client: Client, recorder: Recorder) -> Self {
        Self {
            recorder,
            persistent_volumes: Api::all(client),
            untold: Mutex::default(),
        }
    }

    /// The volume is no more: there is nothing left to tell.
    pub(super) async fn forget(&self, volume: &NbdVolume) {
        let uid = volume.uid().unwrap_or_default();
        self.untold.lock().await.remove(&uid);
    }

    /// Tells as Events what became wrong since the object was seen.
    pub(super) async fn publish(&self, volume: &NbdVolume, said: &NbdVolumeStatus) {
        let old = volume
            .status
            .as_ref()
            .map(|status| status.conditions.as_slice());
        let old = old.unwrap_or_default();
        for condition in &said.conditions {
            let before = api::find_condition(old, &condition.type_);
            let is_news = before.is_none_or(|before| {
                (&before.reason, &before.message) != (&condition.reason, &condition.message)
            });
            let is_wrong = (condition.status == "False" && condition.type_ != api::READY)
                || condition.reason == ENDS_SOON;
            // A volume that is new has nothing yet, and a server that is ending was told to.
            let is_usual = USUAL.contains(&condition.reason.as_str())
                || condition.message.ends_with("it is being started");
            if !is_news || !is_wrong || is_usual {
                continue;
            }
            let event = event(condition);
            self.announce(&event, &volume.object_ref(&())).await;
            match self.claim(volume).await {
                Some(claim) => self.announce(&event, &claim).await,
                None => {
                    let mut untold = self.untold.lock().await;
                    let of_it = untold.entry(volume.uid().unwrap_or_default()).or_default();
                    of_it.retain(|one| one.type_ != condition.type_);
                    of_it.push(condition.clone());
                }
            }
        }
    }

    /// Tells on the claim what was so before there was one, and is still.
    pub(super) async fn tell_late(&self, volume: &NbdVolume, said: &NbdVolumeStatus) {
        let uid = volume.uid().unwrap_or_default();
        let late = self.untold.lock().await.remove(&uid).unwrap_or_default();
        let still = |one: &Condition| {
            let now = api::find_condition(&said.conditions, &one.type_);
            now.is_some_and(|now| (&now.reason, &now.message) == (&one.reason, &one.message))
        };
        let late: Vec<_> = late.into_iter().filter(still).collect();
        if late.is_empty() {
            return;
        }
        let Some(claim) = self.claim(volume).await else {
            self.untold.lock().await.insert(uid, late);
            return;
        };
        for condition in &late {
            self.announce(&event(condition), &claim).await;
        }
    }

    /// The claim that has the volume: where its user looks.
    async fn claim(&self, volume: &NbdVolume) -> Option<ObjectReference> {
        let claim = claim_of(&self.persistent_volumes, &volume.spec.name).await;
        claim.unwrap_or_else(|error| {
            tracing::debug!(%error, "a volume's claim is not found");
            None
        })
    }

    async fn announce(&self, event: &Event, about: &ObjectReference) {
        if let Err(error) = self.recorder.publish(event, about).await {
            tracing::debug!(%error, "an Event is lost");
        }
    }
}

/// What a condition says, as an Event.
fn event(condition: &Condition) -> Event {
    Event {
        type_: EventType::Warning,
        reason: condition.reason.clone(),
        note: Some(condition.message.chars().take(1000).collect()),
        action: "Reconcile".to_owned(),
        secondary: None,
    }
}
