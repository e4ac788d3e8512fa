//! What is to be done with a volume: pure decisions, from what is asked, what is on disk and what was confirmed.

use crate::kube::api::{
    AttachmentState, AttachmentStatus, NEW, NbdVolume, SERVER_FINALIZER, VolumeAttachment,
};
use crate::volumes::AttachmentId;

/// What the disk has of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Disk {
    Absent,
    /// A volume of that CSI name and so many bytes.
    Whole {
        name: String,
        size_bytes: u64,
    },
    Damaged(String),
}

/// What becomes of the backing store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Backing {
    Make,
    Keep,
    Grow,
    /// Nothing is to be done any more, and only the finalizer is left.
    Forget,
    Delete,
    /// Nothing is touched, and a person has to know why.
    Refuse {
        reason: &'static str,
        message: String,
    },
}

/// What is asked of the agent for one volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Asked<'a> {
    pub(super) name: &'a str,
    pub(super) size_bytes: u64,
    /// Whether the object is being deleted.
    pub(super) deleting: bool,
    /// Whether the controller's part is still there: server, Secrets, attachments.
    pub(super) has_server: bool,
    /// Whether the backing store was there once, as far as is known.
    pub(super) was_made: bool,
    /// Whether some attachment is not confirmed as revoked.
    pub(super) is_attached: bool,
}

impl<'a> Asked<'a> {
    pub(super) fn of(object: &'a NbdVolume) -> Self {
        let attachments = &object.spec.attachments;
        let finalizers = object.metadata.finalizers.as_deref().unwrap_or_default();
        Self {
            name: &object.spec.name,
            size_bytes: object.spec.size_bytes,
            deleting: object.metadata.deletion_timestamp.is_some(),
            has_server: finalizers.iter().any(|name| name == SERVER_FINALIZER),
            was_made: was_made(object),
            is_attached: !attachments.iter().all(|one| is_revoked(object, one)),
        }
    }
}

/// Whether the backing store was there once: that was confirmed, or it is not said that it is new. An object that was
/// restored from a backup has no status.
pub(super) fn was_made(object: &NbdVolume) -> bool {
    let status = object.status.as_ref();
    let annotations = object.metadata.annotations.as_ref();
    status.is_some_and(|status| status.size_bytes.is_some())
        || !annotations.is_some_and(|annotations| annotations.contains_key(NEW))
}

/// What is to become of the backing store. In doubt nothing is made and nothing is deleted: data that is not where it
/// was must not come back as an empty volume.
pub(super) fn backing(asked: Asked<'_>, disk: &Disk) -> Backing {
    if asked.deleting && !asked.has_server {
        return match disk {
            Disk::Absent => Backing::Forget,
            _ if asked.is_attached => Backing::Refuse {
                reason: "StillAttached",
                message: "it is to be deleted, but an attachment was not revoked: its data stays"
                    .to_owned(),
            },
            Disk::Whole { name, .. } if name != asked.name => another(name),
            Disk::Whole { .. } => Backing::Delete,
            Disk::Damaged(problem) => Backing::Refuse {
                reason: "Damaged",
                message: format!("{problem}; remove its directory by hand, and the object goes"),
            },
        };
    }
    match disk {
        Disk::Absent if asked.deleting => Backing::Keep,
        Disk::Absent if asked.was_made => Backing::Refuse {
            reason: "Lost",
            message: "its directory is not in the pool any more, and no empty one takes its place: is the right disk \
                      mounted? If it is lost for good, delete the NbdVolume"
                .to_owned(),
        },
        Disk::Absent => Backing::Make,
        Disk::Damaged(problem) => Backing::Refuse {
            reason: "Damaged",
            message: problem.clone(),
        },
        Disk::Whole { name, .. } if name != asked.name => another(name),
        Disk::Whole { size_bytes, .. } if *size_bytes < asked.size_bytes && !asked.deleting => {
            Backing::Grow
        }
        Disk::Whole { .. } => Backing::Keep,
    }
}

fn another(name: &str) -> Backing {
    Backing::Refuse {
        reason: "AnotherVolume",
        message: format!("its directory holds the volume {name:?}: it is left alone"),
    }
}

/// Who may connect, and who must not any more.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Access {
    /// Each with whether it only reads.
    pub(super) allowed: Vec<(AttachmentId, bool)>,
    /// To be refused, and not confirmed as such yet.
    pub(super) revoked: Vec<AttachmentId>,
}

/// What the object asks for. An entry whose id is none is neither allowed nor confirmed.
pub(super) fn access(object: &NbdVolume) -> Access {
    let mut access = Access::default();
    for one in &object.spec.attachments {
        let Ok(id) = one.id.parse() else {
            continue;
        };
        if one.revoked {
            if !is_revoked(object, one) {
                access.revoked.push(id);
            }
        } else {
            access.allowed.push((id, one.read_only));
        }
    }
    access
}

impl Access {
    /// What a server that allows `known` has to be told to refuse: everything that is not allowed, and what is to be
    /// confirmed as revoked also where the server does not know it any more. It may have heard of it before, and not
    /// have closed the sessions yet.
    pub(super) fn to_revoke(&self, known: &[AttachmentId]) -> Vec<AttachmentId> {
        let is_allowed = |id: &AttachmentId| self.allowed.iter().any(|(one, _)| one == id);
        let stale = known.iter().filter(|id| !is_allowed(id));
        let mut ids: Vec<_> = stale.chain(&self.revoked).cloned().collect();
        ids.sort_unstable();
        ids.dedup();
        ids
    }
}

/// What was confirmed before.
pub(super) fn confirmed(object: &NbdVolume) -> &[AttachmentStatus] {
    let status = object.status.as_ref();
    status.map_or(&[], |status| &status.attachments)
}

/// Whether that was confirmed.
fn is_revoked(object: &NbdVolume, one: &VolumeAttachment) -> bool {
    let status = confirmed(object).iter().find(|status| status.id == one.id);
    status.and_then(|status| status.state) == Some(AttachmentState::Revoked)
}

/// The states to confirm for what the object asks: `settled` says whether the server, or the file of the next one, is
/// in line with it now. Otherwise what was confirmed before stays.
pub(super) fn states(object: &NbdVolume, settled: bool) -> Vec<AttachmentStatus> {
    let before = confirmed(object);
    let state = |one: &VolumeAttachment| {
        if settled {
            return Some(match one.revoked {
                true => AttachmentState::Revoked,
                false => AttachmentState::Allowed,
            });
        }
        before.iter().find(|status| status.id == one.id)?.state
    };
    let attachments = object.spec.attachments.iter();
    attachments
        .filter(|one| one.id.parse::<AttachmentId>().is_ok())
        .filter_map(|one| {
            Some(AttachmentStatus {
                id: one.id.clone(),
                state: Some(state(one)?),
                ..AttachmentStatus::default()
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kube::api::{NbdVolumeSpec, NbdVolumeStatus};
    use crate::volumes::{AccessMode, Content, VolumeId};

    const ASKED: Asked<'static> = Asked {
        name: "pvc-1",
        size_bytes: 8192,
        deleting: false,
        has_server: true,
        was_made: true,
        is_attached: false,
    };

    fn whole(name: &str, size_bytes: u64) -> Disk {
        Disk::Whole {
            name: name.to_owned(),
            size_bytes,
        }
    }

    fn kind(asked: Asked<'_>, disk: &Disk) -> &'static str {
        match backing(asked, disk) {
            Backing::Make => "make",
            Backing::Keep => "keep",
            Backing::Grow => "grow",
            Backing::Forget => "forget",
            Backing::Delete => "delete",
            Backing::Refuse { reason, .. } => reason,
        }
    }

    #[test]
    fn a_volume_is_made_once_and_never_again() {
        let fresh = Asked {
            was_made: false,
            ..ASKED
        };
        assert_eq!(kind(fresh, &Disk::Absent), "make");
        assert_eq!(kind(ASKED, &Disk::Absent), "Lost");
        for asked in [fresh, ASKED] {
            assert_eq!(kind(asked, &whole("pvc-1", 4096)), "grow");
            assert_eq!(kind(asked, &whole("pvc-1", 8192)), "keep");
            assert_eq!(kind(asked, &whole("pvc-1", 1 << 20)), "keep");
            assert_eq!(kind(asked, &whole("pvc-2", 8192)), "AnotherVolume");
            assert_eq!(kind(asked, &Disk::Damaged("bad".to_owned())), "Damaged");
        }
    }

    #[test]
    fn data_goes_only_when_server_and_attachments_are_gone() {
        let deleting = Asked {
            deleting: true,
            ..ASKED
        };
        let doomed = Asked {
            has_server: false,
            ..deleting
        };
        let attached = Asked {
            is_attached: true,
            ..doomed
        };
        let disk = whole("pvc-1", 4096);
        assert_eq!(kind(deleting, &disk), "keep");
        assert_eq!(kind(deleting, &Disk::Absent), "keep");
        assert_eq!(kind(doomed, &disk), "delete");
        assert_eq!(kind(doomed, &Disk::Absent), "forget");
        assert_eq!(kind(doomed, &whole("pvc-2", 4096)), "AnotherVolume");
        assert_eq!(kind(doomed, &Disk::Damaged("bad".to_owned())), "Damaged");
        assert_eq!(kind(attached, &disk), "StillAttached");
        assert_eq!(kind(attached, &Disk::Absent), "forget");
        let without_server = Asked {
            has_server: false,
            ..ASKED
        };
        assert_eq!(kind(without_server, &disk), "grow");
    }

    fn id(number: u8) -> AttachmentId {
        AttachmentId::from_bytes([number; 16])
    }

    fn attachment(number: u8, revoked: bool) -> VolumeAttachment {
        VolumeAttachment {
            id: id(number).to_string(),
            node: "worker".to_owned(),
            read_only: number == 2,
            mode: AccessMode::SingleNodeWriter,
            revoked,
        }
    }

    fn object(attachments: Vec<VolumeAttachment>, states: &[(u8, AttachmentState)]) -> NbdVolume {
        let spec = NbdVolumeSpec {
            name: "pvc-1".to_owned(),
            size_bytes: 8192,
            pool: "pool".to_owned(),
            node: "node".to_owned(),
            content: Content::Block,
            context: Default::default(),
            certificates: Default::default(),
            port: None,
            attachments,
        };
        let mut object = NbdVolume::new(VolumeId::from_bytes([1; 16]).as_str(), spec);
        object.status = Some(NbdVolumeStatus {
            attachments: states
                .iter()
                .map(|(number, state)| AttachmentStatus {
                    id: id(*number).to_string(),
                    state: Some(*state),
                    ..AttachmentStatus::default()
                })
                .collect(),
            ..NbdVolumeStatus::default()
        });
        object
    }

    #[test]
    fn what_was_used_is_not_made_again_though_its_status_is_lost() {
        let mut restored = object(Vec::new(), &[]);
        assert!(was_made(&restored));
        let annotations = restored.metadata.annotations.get_or_insert_default();
        annotations.insert(NEW.to_owned(), "true".to_owned());
        assert!(!was_made(&restored));
        let status = restored.status.get_or_insert_default();
        status.size_bytes = Some(8192);
        assert!(was_made(&restored));
    }

    #[test]
    fn a_server_allows_what_is_asked_and_nothing_else() {
        let attachments = vec![
            attachment(1, false),
            attachment(2, false),
            attachment(3, true),
            attachment(5, true),
        ];
        let asked = access(&object(attachments, &[(5, AttachmentState::Revoked)]));
        assert_eq!(asked.allowed, [(id(1), false), (id(2), true)]);
        assert_eq!(asked.to_revoke(&[]), [id(3)]);
        let known = [id(1), id(3), id(4), id(5)];
        assert_eq!(asked.to_revoke(&known), [id(3), id(4), id(5)]);
        let mut odd = attachment(1, false);
        odd.id = "att-of-somebody".to_owned();
        assert_eq!(access(&object(vec![odd], &[])), Access::default());
    }

    #[test]
    fn only_what_is_settled_is_confirmed_and_what_was_confirmed_stays() {
        use AttachmentState::{Allowed, Revoked};
        let object = object(
            vec![
                attachment(1, false),
                attachment(2, true),
                attachment(3, true),
            ],
            &[(2, Revoked), (3, Allowed), (4, Revoked)],
        );
        let told = |settled| -> Vec<_> {
            states(&object, settled)
                .into_iter()
                .map(|status| (status.id.parse().unwrap(), status.state.unwrap()))
                .collect()
        };
        assert_eq!(
            told(true),
            [(id(1), Allowed), (id(2), Revoked), (id(3), Revoked)]
        );
        assert_eq!(told(false), [(id(2), Revoked), (id(3), Allowed)]);
        assert!(Asked::of(&object).is_attached);
    }
}
