//! What a volume allows to happen next: pure decisions, made before anything is changed.

use crate::volumes::{
    AccessMode, Attachment, AttachmentId, CreateRequest, Format, Volume, VolumesError,
};

/// The longest name of a volume, in bytes: CSI's limit on strings.
const NAME: usize = 128;

/// Refuses names that CSI does not allow.
pub(crate) fn check_name(name: &str) -> Result<(), VolumesError> {
    match name.len() {
        1..=NAME => Ok(()),
        length => Err(VolumesError::Invalid(format!(
            "a volume's name has 1 to {NAME} bytes, and this one has {length}"
        ))),
    }
}

/// Refuses to take `volume` for what `request` asks, unless it is that.
pub(crate) fn check_same(volume: &Volume, request: &CreateRequest) -> Result<(), VolumesError> {
    let size = volume.size_bytes;
    let (ours, theirs) = (&volume.options, &request.options);
    let difference = if volume.name != request.name {
        Some(format!("under the name {:?}", volume.name))
    } else if size < request.required_bytes {
        let required = request.required_bytes;
        Some(format!("it has {size} bytes, and {required} are required"))
    } else if let Some(limit) = request.limit_bytes.filter(|limit| size > *limit) {
        Some(format!("it has {size} bytes, and the limit is {limit}"))
    } else if ours.content != theirs.content {
        Some(format!("it is a {:?} volume", ours.content).to_lowercase())
    } else if ours.context != theirs.context {
        let keys = ours.context.keys().chain(theirs.context.keys());
        let key = keys
            .into_iter()
            .find(|key| ours.context.get(*key) != theirs.context.get(*key));
        Some(format!(
            "with another {}",
            key.map_or("parameter", String::as_str)
        ))
    } else {
        None
    };
    match difference {
        None => Ok(()),
        Some(difference) => Err(VolumesError::Incompatible {
            volume: volume.id.to_string(),
            difference,
        }),
    }
}

/// What becomes of a request to attach.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Admission {
    /// It is attached like that already.
    Present(Attachment),
    /// It may be attached, as `wanted` under a new id.
    Granted,
}

/// An attachment that somebody asks for.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    pub(crate) node: String,
    pub(crate) mode: AccessMode,
    pub(crate) read_only: bool,
}

impl Wanted {
    /// What nobody may write under this mode is attached for reading.
    pub(crate) fn new(node: &str, mode: AccessMode, read_only: bool) -> Self {
        Self {
            node: node.to_owned(),
            mode,
            read_only: read_only || mode.is_read_only(),
        }
    }

    pub(crate) fn granted(self, id: AttachmentId) -> Attachment {
        Attachment {
            id,
            node: self.node,
            read_only: self.read_only,
            mode: self.mode,
        }
    }
}

/// One node holds a volume, unless every mode that is in force is for many.
pub(super) fn admit(
    volume: &str,
    attachments: &[Attachment],
    wanted: &Wanted,
) -> Result<Admission, VolumesError> {
    let volume = volume.to_owned();
    if let Some(present) = attachments.iter().find(|one| one.node == wanted.node) {
        if present.mode == wanted.mode && present.read_only == wanted.read_only {
            return Ok(Admission::Present(present.clone()));
        }
        return Err(VolumesError::Incompatible {
            volume,
            difference: format!(
                "it is attached to node {} with mode {:?}, read-only {}",
                present.node, present.mode, present.read_only
            ),
        });
    }
    let in_the_way = |one: &&Attachment| wanted.mode.is_single_node() || one.mode.is_single_node();
    match attachments.iter().find(in_the_way) {
        None => Ok(Admission::Granted),
        Some(other) => Err(VolumesError::AttachedElsewhere {
            volume,
            node: other.node.clone(),
        }),
    }
}

/// Formatting only moves forward; what was finished stays as it is.
pub(crate) fn check_format(volume: &Volume, next: &Format) -> Result<(), VolumesError> {
    let forward = match (&volume.format, next) {
        (Format::Done { .. }, _) => volume.format == *next,
        (Format::Started { .. }, Format::Never) => false,
        (Format::Started { .. } | Format::Never, _) => true,
    };
    if forward {
        return Ok(());
    }
    Err(VolumesError::Invalid(format!(
        "volume {}: its format is {:?}, and cannot become {next:?}",
        volume.id, volume.format
    )))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::volumes::{Certificates, Content, Placement, VolumeId, VolumeOptions};

    fn volume() -> Volume {
        Volume {
            id: VolumeId::from_bytes([1; 16]),
            name: "pvc-1".to_owned(),
            size_bytes: 8192,
            options: VolumeOptions {
                content: Content::Filesystem,
                context: BTreeMap::from([("fsType".to_owned(), "ext4".to_owned())]),
            },
            format: Format::Never,
            attachments: Vec::new(),
        }
    }

    #[test]
    fn names_have_1_to_128_bytes() {
        for (name, allowed) in [
            (String::new(), false),
            ("a".repeat(128), true),
            ("a".repeat(129), false),
            ("ü".repeat(65), false),
            ("../\u{1}%\"'*".to_owned(), true),
        ] {
            assert_eq!(check_name(&name).is_ok(), allowed, "{name}");
        }
    }

    #[test]
    fn the_same_name_is_the_same_volume_only_if_it_is_what_was_asked() {
        let same = CreateRequest {
            name: "pvc-1".to_owned(),
            required_bytes: 8000,
            limit_bytes: Some(8192),
            options: volume().options,
            placement: Placement::default(),
            certificates: Certificates::default(),
        };
        let required = |bytes| CreateRequest {
            required_bytes: bytes,
            limit_bytes: None,
            ..same.clone()
        };
        let mut block = same.clone();
        block.options.content = Content::Block;
        let mut xfs = same.clone();
        xfs.options
            .context
            .insert("fsType".to_owned(), "xfs".to_owned());
        let mut more = same.clone();
        more.options
            .context
            .insert("cipher".to_owned(), "x".to_owned());
        let limited = CreateRequest {
            limit_bytes: Some(8191),
            ..same.clone()
        };
        let renamed = CreateRequest {
            name: "pvc-2".to_owned(),
            ..same.clone()
        };
        for (request, difference) in [
            (same.clone(), None),
            (required(1), None),
            (required(8192), None),
            (required(8193), Some("8193 are required")),
            (limited, Some("the limit is 8191")),
            (block, Some("it is a filesystem volume")),
            (xfs, Some("another fsType")),
            (more, Some("another cipher")),
            (renamed, Some("the name \"pvc-1\"")),
        ] {
            let error = check_same(&volume(), &request)
                .err()
                .map(|error| error.to_string());
            match difference {
                None => assert_eq!(error, None),
                Some(text) => assert!(error.clone().unwrap().contains(text), "{error:?} {text}"),
            }
        }
    }

    #[test]
    fn one_node_holds_a_volume_unless_all_only_read() {
        use AccessMode::{
            MultiNodeReaderOnly as Many, SingleNodeMultiWriter as Multi,
            SingleNodeReaderOnly as Reader, SingleNodeSingleWriter as Single,
            SingleNodeWriter as Writer,
        };
        for (held, wanted, node, outcome) in [
            (None, Writer, "a", "granted"),
            (Some(Writer), Writer, "a", "present"),
            (Some(Writer), Writer, "b", "elsewhere"),
            (Some(Writer), Multi, "a", "incompatible"),
            (Some(Single), Many, "b", "elsewhere"),
            (Some(Many), Writer, "b", "elsewhere"),
            (Some(Many), Reader, "b", "elsewhere"),
            (Some(Many), Many, "b", "granted"),
            (Some(Many), Many, "a", "present"),
        ] {
            let id = AttachmentId::from_bytes([2; 16]);
            let held = held.map(|mode| Wanted::new("a", mode, false).granted(id));
            let held: Vec<_> = held.into_iter().collect();
            let found = match admit("v", &held, &Wanted::new(node, wanted, false)) {
                Ok(Admission::Granted) => "granted",
                Ok(Admission::Present(_)) => "present",
                Err(VolumesError::AttachedElsewhere { .. }) => "elsewhere",
                Err(VolumesError::Incompatible { .. }) => "incompatible",
                Err(error) => panic!("{error}"),
            };
            assert_eq!(found, outcome, "{wanted:?} {node}");
        }
    }

    #[test]
    fn another_readonly_is_another_attachment() {
        let id = AttachmentId::from_bytes([2; 16]);
        let mode = AccessMode::SingleNodeWriter;
        let held = [Wanted::new("a", mode, false).granted(id)];
        assert!(matches!(
            admit("v", &held, &Wanted::new("a", mode, true)),
            Err(VolumesError::Incompatible { .. })
        ));
        assert!(Wanted::new("a", AccessMode::MultiNodeReaderOnly, false).read_only);
    }

    #[test]
    fn formatting_only_moves_forward() {
        let started = |fs: &str| Format::Started { fs: fs.to_owned() };
        let done = |fs: &str| Format::Done { fs: fs.to_owned() };
        for (from, to, allowed) in [
            (Format::Never, started("ext4"), true),
            (Format::Never, done("ext4"), true),
            (started("ext4"), started("ext4"), true),
            (started("ext4"), started("xfs"), true),
            (started("ext4"), done("ext4"), true),
            (started("ext4"), Format::Never, false),
            (done("ext4"), done("ext4"), true),
            (done("ext4"), done("xfs"), false),
            (done("ext4"), started("ext4"), false),
            (done("ext4"), Format::Never, false),
        ] {
            let volume = Volume {
                format: from.clone(),
                ..volume()
            };
            assert_eq!(
                check_format(&volume, &to).is_ok(),
                allowed,
                "{from:?} {to:?}"
            );
        }
    }
}
