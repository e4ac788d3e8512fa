//! A volume capability, parsed: how a volume is to be used, by how many, and whether Hawser can do that.

use tonic::{Code, Status};

use super::status::status;
use crate::filesystem::Kind;
use crate::proto::csi::VolumeCapability;
use crate::proto::csi::volume_capability::access_mode::Mode;
use crate::proto::csi::volume_capability::{AccessType, MountVolume};
use crate::volumes::{AccessMode, Content, Volume};

/// Mount flags, and bytes of one: the specification's limits for a string and a map.
const FLAGS_LIMIT: usize = 64;
const FLAG_LIMIT: usize = 128;

/// Options of mount(8) that would make another mount than the one that is asked for.
const FOREIGN_FLAGS: [&str; 7] = [
    "bind",
    "rbind",
    "move",
    "remount",
    "loop",
    "offset",
    "sizelimit",
];

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Capability {
    pub(super) access: Access,
    pub(super) mode: AccessMode,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Access {
    Block,
    Mount(Mount),
}

/// How a file system is to be mounted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Mount {
    /// `None` leaves the choice to what the volume is formatted with, or to the StorageClass.
    pub(super) kind: Option<Kind>,
    pub(super) flags: Vec<String>,
    /// The group that is to own the files.
    pub(super) group: Option<u32>,
}

/// Why a capability is not accepted.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    /// It makes no sense, to any driver.
    #[error("volume_capability: {0}")]
    Malformed(String),
    /// It makes sense, but Hawser or the volume cannot do it.
    #[error("volume_capability: {0}")]
    Unsupported(String),
}

impl From<Refusal> for Status {
    /// As the controller's tables have it.
    fn from(refusal: Refusal) -> Self {
        status(Code::InvalidArgument, refusal.to_string())
    }
}

impl Refusal {
    /// As the tables of NodeStageVolume and NodePublishVolume have it: "Exceeds capabilities".
    pub(super) fn on_node(self) -> Status {
        match self {
            Self::Malformed(_) => self.into(),
            Self::Unsupported(_) => status(Code::FailedPrecondition, self.to_string()),
        }
    }
}

impl Capability {
    pub(super) fn parse(capability: Option<VolumeCapability>) -> Result<Self, Refusal> {
        let malformed = |what: &str| Refusal::Malformed(what.to_owned());
        let capability = capability.ok_or_else(|| malformed("it is missing"))?;
        let mode = capability
            .access_mode
            .ok_or_else(|| malformed("access_mode is missing"))?;
        let access = match capability.access_type {
            None => return Err(malformed("it says neither block nor mount")),
            Some(AccessType::Block(_)) => Access::Block,
            Some(AccessType::Mount(mount)) => Access::Mount(Mount::parse(mount)?),
        };
        Ok(Self {
            access,
            mode: parse_mode(mode.mode)?,
        })
    }

    pub(super) fn content(&self) -> Content {
        match self.access {
            Access::Block => Content::Block,
            Access::Mount(_) => Content::Filesystem,
        }
    }

    /// Whether `volume` can be used so.
    pub(super) fn fits(&self, volume: &Volume) -> Result<(), Refusal> {
        if self.content() == volume.options.content {
            return Ok(());
        }
        Err(Refusal::Unsupported(match volume.options.content {
            Content::Block => format!("volume {} is a raw block volume", volume.id),
            Content::Filesystem => format!("volume {} holds a file system", volume.id),
        }))
    }
}

fn parse_mode(mode: i32) -> Result<AccessMode, Refusal> {
    match Mode::try_from(mode) {
        Ok(Mode::SingleNodeWriter) => Ok(AccessMode::SingleNodeWriter),
        Ok(Mode::SingleNodeReaderOnly) => Ok(AccessMode::SingleNodeReaderOnly),
        Ok(Mode::MultiNodeReaderOnly) => Ok(AccessMode::MultiNodeReaderOnly),
        Ok(Mode::SingleNodeSingleWriter) => Ok(AccessMode::SingleNodeSingleWriter),
        Ok(Mode::SingleNodeMultiWriter) => Ok(AccessMode::SingleNodeMultiWriter),
        Ok(mode @ (Mode::MultiNodeSingleWriter | Mode::MultiNodeMultiWriter)) => {
            Err(Refusal::Unsupported(format!(
                "access mode {} is not supported: a volume has one writing node",
                mode.as_str_name()
            )))
        }
        Ok(Mode::Unknown) | Err(_) => {
            Err(Refusal::Malformed(format!("access mode {mode} is unknown")))
        }
    }
}

impl Mount {
    fn parse(mount: MountVolume) -> Result<Self, Refusal> {
        let kind = match mount.fs_type.as_str() {
            "" => None,
            text => Some(
                text.parse()
                    .map_err(|error: crate::filesystem::UnknownKind| {
                        Refusal::Malformed(error.to_string())
                    })?,
            ),
        };
        if mount.mount_flags.len() > FLAGS_LIMIT {
            return Err(Refusal::Malformed(format!(
                "{} mount flags, the limit is {FLAGS_LIMIT}",
                mount.mount_flags.len()
            )));
        }
        mount.mount_flags.iter().try_for_each(|flag| check(flag))?;
        let group = match mount.volume_mount_group.as_str() {
            "" => None,
            text => Some(text.parse().map_err(|_| {
                Refusal::Malformed(format!("volume_mount_group {text:?} is not a group id"))
            })?),
        };
        Ok(Self {
            kind,
            flags: mount.mount_flags,
            group,
        })
    }

    /// Whether the flags themselves ask for a mount that nobody can write through.
    pub(super) fn is_read_only(&self) -> bool {
        self.flags
            .iter()
            .flat_map(|flag| flag.split(','))
            .any(|option| option == "ro")
    }
}

/// A flag goes to mount(8) as one argument of `-o`, and may be sensitive: it is not repeated in the refusal.
fn check(flag: &str) -> Result<(), Refusal> {
    let foreign = |option: &str| {
        let name = option.split('=').next().unwrap_or_default();
        FOREIGN_FLAGS.contains(&name) || name.starts_with("X-mount.")
    };
    let why = if flag.is_empty() || flag.len() > FLAG_LIMIT {
        "has no or too many bytes"
    } else if flag.chars().any(char::is_control) {
        "has control characters"
    } else if flag.split(',').any(foreign) {
        "would make another kind of mount"
    } else {
        return Ok(());
    };
    Err(Refusal::Malformed(format!("a mount flag {why}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::csi::volume_capability::{self, BlockVolume};

    fn capability(mode: Mode, access_type: Option<AccessType>) -> VolumeCapability {
        VolumeCapability {
            access_mode: Some(volume_capability::AccessMode { mode: mode.into() }),
            access_type,
        }
    }

    fn mount(fs_type: &str, flags: &[&str], group: &str) -> VolumeCapability {
        let mount = MountVolume {
            fs_type: fs_type.into(),
            mount_flags: flags.iter().map(|&flag| flag.into()).collect(),
            volume_mount_group: group.into(),
        };
        capability(Mode::SingleNodeWriter, Some(AccessType::Mount(mount)))
    }

    #[test]
    fn what_hawser_can_do() {
        let parsed = Capability::parse(Some(mount("xfs", &["noatime", "ro"], "1000"))).unwrap();
        let Access::Mount(mount) = &parsed.access else {
            panic!("{parsed:?}")
        };
        assert_eq!((mount.kind, mount.group), (Some(Kind::Xfs), Some(1000)));
        assert!(mount.is_read_only());
        let block = AccessType::Block(BlockVolume {});
        for mode in [
            Mode::SingleNodeWriter,
            Mode::SingleNodeReaderOnly,
            Mode::MultiNodeReaderOnly,
            Mode::SingleNodeSingleWriter,
            Mode::SingleNodeMultiWriter,
        ] {
            assert!(Capability::parse(Some(capability(mode, Some(block.clone())))).is_ok());
        }
        for mode in [Mode::MultiNodeSingleWriter, Mode::MultiNodeMultiWriter] {
            let refused =
                Capability::parse(Some(capability(mode, Some(block.clone())))).unwrap_err();
            assert!(matches!(refused, Refusal::Unsupported(_)), "{mode:?}");
            assert_eq!(refused.on_node().code(), Code::FailedPrecondition);
        }
    }

    #[test]
    fn what_makes_no_sense() {
        let long = "x".repeat(129);
        let many = vec!["noatime"; 65];
        for bad in [
            None,
            Some(capability(Mode::SingleNodeWriter, None)),
            Some(capability(
                Mode::Unknown,
                Some(AccessType::Block(BlockVolume {})),
            )),
            Some(mount("ntfs", &[], "")),
            Some(mount("", &[""], "")),
            Some(mount("", &[&long], "")),
            Some(mount("", &["a\nb"], "")),
            Some(mount("", &["noatime,bind"], "")),
            Some(mount("", &["X-mount.mkdir"], "")),
            Some(mount("", &["offset=5"], "")),
            Some(mount("", &many, "")),
            Some(mount("", &[], "wheel")),
            Some(mount("", &[], "-1")),
        ] {
            let refused = Capability::parse(bad.clone()).unwrap_err();
            assert!(matches!(refused, Refusal::Malformed(_)), "{bad:?}");
        }
        let secret = Capability::parse(Some(mount("", &["bind,password=hunter2"], "")));
        assert!(!secret.unwrap_err().to_string().contains("hunter2"));
    }
}
