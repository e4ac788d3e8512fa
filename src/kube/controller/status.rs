//! What the controller says of a volume: pure, from what it found.

use kube::ResourceExt;

use super::server::Server;
use crate::kube::api::{
    self, AGENT_READY, BACKING_READY, CERTIFICATES_READY, NO_ROOM, NbdVolume, NbdVolumeStatus,
    Phase, READY, SERVER_FINALIZER, SERVER_READY,
};
use crate::kube::volumes::Standing;

/// What was found about a volume's certificates: all is well, maybe not for long, or a reason and a message.
pub(super) type Certified = Result<Option<String>, (&'static str, String)>;

/// Reason of a true condition CertificatesReady whose message says what will end it.
pub(super) const ENDS_SOON: &str = "EndsSoon";

/// The controller's part of a volume's status.
pub(super) fn status(
    volume: &NbdVolume,
    certified: &Certified,
    server: &Server,
    standing: &Standing,
) -> NbdVolumeStatus {
    let old = volume.status.clone().unwrap_or_default();
    let generation = volume.metadata.generation;
    let condition = |kind, holds: bool, reason: &str, message: String| {
        api::condition(
            &old.conditions,
            kind,
            Some(holds),
            reason,
            message,
            generation,
        )
    };
    let backing = api::find_condition(&old.conditions, BACKING_READY);
    let certificates = match certified {
        Ok(None) => condition(CERTIFICATES_READY, true, "Valid", String::new()),
        Ok(Some(end)) => condition(CERTIFICATES_READY, true, ENDS_SOON, end.clone()),
        Err((reason, message)) => condition(CERTIFICATES_READY, false, reason, message.clone()),
    };
    let served = match server {
        Server::Listening(_) => condition(SERVER_READY, true, "Listening", String::new()),
        Server::Away { reason, message } => condition(SERVER_READY, false, reason, message.clone()),
    };
    let place = standing.message(&volume.spec.pool, &volume.spec.node);
    let attended = condition(
        AGENT_READY,
        *standing == Standing::Good,
        standing.reason(),
        place.clone(),
    );
    let waits: Vec<String> = [
        match backing {
            Some(backing) if backing.status == "True" => None,
            Some(backing) => Some(backing.message.clone()),
            None => Some(format!(
                "the agent on node {} has not made its data yet",
                volume.spec.node
            )),
        },
        (certificates.status != "True").then(|| certificates.message.clone()),
        (served.status != "True").then(|| served.message.clone()),
        (served.status != "True" || !standing.is_attended())
            .then(|| place.clone())
            .filter(|place| !place.is_empty()),
    ]
    .into_iter()
    .flatten()
    .collect();
    let is_deleting = volume.metadata.deletion_timestamp.is_some();
    let broken = backing.is_some_and(|one| one.status == "False" && one.reason != NO_ROOM)
        || matches!(certified, Err((reason, _)) if *reason != "SecretMissing");
    let (phase, reason) = match (is_deleting, waits.is_empty(), broken) {
        (true, _, _) => (Phase::Deleting, "Deleting"),
        (false, true, _) => (Phase::Ready, "Ready"),
        (false, false, true) => (Phase::Failed, "Failed"),
        (false, false, false) => (Phase::Pending, "Pending"),
    };
    let message = match is_deleting {
        true => deleting(volume, &place),
        false if waits.is_empty() => place,
        false => waits.join("; "),
    };
    let ready = condition(READY, phase == Phase::Ready, reason, message);
    let endpoint = match server {
        Server::Listening(address) => Some(address.to_string()),
        Server::Away { .. } => None,
    };
    NbdVolumeStatus {
        phase: Some(phase),
        conditions: vec![certificates, attended, served, ready],
        size: Some(size(old.size_bytes.unwrap_or(volume.spec.size_bytes))),
        endpoint,
        attached_to: attached_to(volume),
        encryption: distinct(volume, |one| one.encryption.clone()),
        verified: distinct(volume, |one| {
            Some(one.verification.as_ref()?.result.clone())
        }),
        ..NbdVolumeStatus::default()
    }
}

fn deleting(volume: &NbdVolume, place: &str) -> String {
    let mut attachments = volume.spec.attachments.iter();
    if let Some(one) = attachments.find(|one| !one.revoked) {
        return format!(
            "volume {} is attached to node {} still, and is deleted when it was detached",
            volume.name_any(),
            one.node
        );
    }
    let holds = volume
        .finalizers()
        .iter()
        .any(|held| held == SERVER_FINALIZER);
    let what = match holds {
        true => "its server is being ended".to_owned(),
        false => format!(
            "its data is being deleted by the agent on node {}",
            volume.spec.node
        ),
    };
    match place {
        "" => what,
        place => format!("{what}; {place}"),
    }
}

fn attached_to(volume: &NbdVolume) -> Option<String> {
    let attachments = volume.spec.attachments.iter();
    let nodes: Vec<String> = attachments
        .map(|one| match one.revoked {
            true => format!("{} (leaving)", one.node),
            false => one.node.clone(),
        })
        .collect();
    (!nodes.is_empty()).then(|| nodes.join(", "))
}

/// What is said of the attachments that are there, each thing once.
fn distinct(
    volume: &NbdVolume,
    said: impl Fn(&api::AttachmentStatus) -> Option<String>,
) -> Option<String> {
    let status = volume.status.as_ref()?;
    let is_there = |id: &str| volume.spec.attachments.iter().any(|one| one.id == id);
    let present = status.attachments.iter().filter(|one| is_there(&one.id));
    let mut all: Vec<String> = present.filter_map(said).collect();
    all.sort_unstable();
    all.dedup();
    (!all.is_empty()).then(|| all.join(", "))
}

/// Bytes as Kubernetes' quantities are written, in the largest unit that keeps two digits after the point.
pub(super) fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["", "Ki", "Mi", "Gi", "Ti", "Pi"];
    let unit = (0..UNITS.len() - 1)
        .find(|unit| bytes >> (10 * (unit + 1)) == 0)
        .unwrap_or(UNITS.len() - 1);
    let one = 1_u64 << (10 * unit);
    let (whole, rest) = (bytes / one, bytes % one);
    let hundredths = u128::from(rest) * 100 / u128::from(one);
    let digits = match hundredths {
        0 => whole.to_string(),
        part => format!("{whole}.{part:02}")
            .trim_end_matches('0')
            .to_owned(),
    };
    format!("{digits}{}", UNITS[unit])
}

/// Whether the object says that already.
pub(super) fn is_said(volume: &NbdVolume, said: &NbdVolumeStatus) -> bool {
    let Some(now) = &volume.status else {
        return false;
    };
    let mut conditions = said.conditions.iter();
    (now.phase, &now.size, &now.endpoint) == (said.phase, &said.size, &said.endpoint)
        && (&now.attached_to, &now.encryption, &now.verified)
            == (&said.attached_to, &said.encryption, &said.verified)
        && conditions.all(|one| now.conditions.contains(one))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_like_quantities() {
        for (bytes, text) in [
            (0, "0"),
            (4096, "4Ki"),
            (1 << 30, "1Gi"),
            ((1 << 30) + (1 << 29), "1.5Gi"),
            ((1 << 30) - 4096, "1023.99Mi"),
            (u64::MAX, "16383.99Pi"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }
}
