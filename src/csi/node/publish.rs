//! NodePublishVolume and NodeUnpublishVolume: a staged volume at the places where pods see it.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use tonic::{Code, Status};

use super::Inner;
use super::mounts::Mounts;
use super::record::{Staged, Target};
use super::stage::{Stage, is_staged};
use crate::attach::Device;
use crate::csi::capability::{Access, Capability};
use crate::csi::status::{exists, precondition, status};
use crate::volumes::{AccessMode, Content, VolumeId};

/// A checked request to publish: what it takes to stage the volume once more, and the target.
pub(super) struct Publish {
    pub(super) stage: Stage,
    pub(super) target: PathBuf,
    pub(super) read_only: bool,
}

impl Inner {
    pub(super) async fn publish(&self, publish: Publish) -> Result<(), Status> {
        let Publish {
            stage,
            target,
            read_only,
        } = publish;
        let volume = stage.volume.clone();
        let capability = stage.capability.clone();
        self.name(&stage, &target);
        // The kubelet publishes again and again, to bring what it finds in the Secret now.
        self.renew_secret(&stage).await;
        let mut staged = self.staged(stage).await?;
        if staged.content != capability.content() {
            return Err(precondition(format!(
                "volume {volume} was not staged as what it is to be published as"
            )));
        }
        let wanted = wanted(&capability, &staged, &target, read_only);
        let device = self.devices.find(&volume).await?.ok_or_else(|| {
            status(
                Code::Unavailable,
                format!("volume {volume}: its device vanished; try again"),
            )
        })?;
        let mounts = Mounts::look(self.host.as_ref(), Some(&device))?;
        check_writable(&staged, &mounts)?;
        if is_published(&staged, &wanted, &mounts)? {
            return Ok(());
        }
        check_alone(&staged, &wanted, &mounts)?;

        if mounts.at(&target).is_none() {
            make(&target, staged.content)?;
        }
        staged.targets.retain(|other| other.path != target);
        staged.targets.push(wanted.clone());
        self.records.save(&staged)?;
        if let Err(status) = self.bind(&staged, &wanted, &device, &capability).await {
            self.withdraw(&mut staged, &target, &device).await;
            return Err(status);
        }
        tracing::info!(target = %target.display(), read_only = wanted.read_only, "published");
        Ok(())
    }

    /// The record of the volume as it is staged. After a reboot of the node, it is staged once more.
    async fn staged(&self, stage: Stage) -> Result<Staged, Status> {
        let volume = &stage.volume;
        let record = self.records.load(volume)?;
        let device = self.devices.find(volume).await?;
        if record.is_none() && device.is_none() {
            // Whether there is such a volume is for the installation to say, or for nobody.
            if stage.foreign.is_none() {
                self.volumes.find(volume).await?;
            }
            return Err(precondition(format!(
                "volume {volume} is not staged on this node; NodeStageVolume comes first"
            )));
        }
        if let (Some(record), Some(device)) = (record, &device) {
            let mounts = Mounts::look(self.host.as_ref(), Some(device))?;
            let is_asked = record.path == stage.path
                && record.attachment == stage.attachment
                && record.foreign == stage.foreign;
            if is_asked && is_staged(&record, &mounts) {
                return Ok(record);
            }
        }
        self.stage(stage).await
    }

    async fn bind(
        &self,
        staged: &Staged,
        wanted: &Target,
        device: &Device,
        capability: &Capability,
    ) -> Result<(), Status> {
        if let Access::Mount(mount) = &capability.access {
            self.give_to_group(mount, &staged.path, wanted.read_only)
                .await?;
        }
        let source = match staged.content {
            Content::Filesystem => &staged.path,
            Content::Block => &device.path,
        };
        Ok(self
            .host
            .bind(source, &wanted.path, wanted.read_only)
            .await?)
    }

    /// Takes back a publication that failed; what cannot be, NodeUnpublishVolume will.
    async fn withdraw(&self, staged: &mut Staged, target: &Path, device: &Device) {
        let undone = async {
            let mounts = Mounts::look(self.host.as_ref(), Some(device))?;
            if mounts.ours_at(target).is_some() {
                self.host.unmount(target).await?;
            }
            remove(target)?;
            staged.targets.retain(|other| other.path != target);
            self.records.save(staged)?;
            Ok::<(), Status>(())
        };
        if let Err(status) = undone.await {
            tracing::warn!(
                target = %target.display(),
                reason = status.message(),
                "a failed publication could not be taken back; unpublishing will do it"
            );
        }
    }

    pub(super) async fn unpublish(&self, volume: &VolumeId, target: &Path) -> Result<(), Status> {
        let record = self.records.load(volume)?;
        let is_recorded = record.as_ref().is_some_and(|r| r.target(target).is_some());
        let device = match self.devices.find(volume).await {
            Ok(device) => device,
            Err(status) => {
                tracing::warn!(%volume, reason = status.message(), "its device cannot be described");
                None
            }
        };
        let mounts = Mounts::look(self.host.as_ref(), device.as_ref())?;
        let is_ours = (is_recorded || device.is_some()) && mounts.ours_at(target).is_some();
        match mounts.at(target) {
            Some(_) if is_ours => self.host.unmount(target).await?,
            Some(other) if !is_recorded => {
                return Err(precondition(format!(
                    "{} is mounted at {}, which is not volume {volume}",
                    other.source.display(),
                    target.display()
                )));
            }
            // Something else is on top of what was recorded: it is left, and the target with it.
            Some(_) => {}
            None => remove(target)?,
        }
        if is_ours {
            remove(target)?;
        }
        if let Some(mut record) = record
            && is_recorded
        {
            record.targets.retain(|other| other.path != target);
            self.records.save(&record)?;
        }
        tracing::info!(target = %target.display(), "unpublished");
        Ok(())
    }
}

fn wanted(capability: &Capability, staged: &Staged, target: &Path, read_only: bool) -> Target {
    let (kind, flags, group, flagged) = match &capability.access {
        Access::Block => (None, Vec::new(), None, false),
        Access::Mount(mount) => (
            mount.kind,
            mount.flags.clone(),
            mount.group,
            mount.is_read_only(),
        ),
    };
    Target {
        path: target.to_owned(),
        kind,
        flags,
        group,
        mode: capability.mode,
        read_only: read_only || flagged || staged.read_only || capability.mode.is_read_only(),
    }
}

/// ext4 turns itself read-only after an error; a pod that is to write must not start on it.
fn check_writable(staged: &Staged, mounts: &Mounts) -> Result<(), Status> {
    let mount = mounts.ours_at(&staged.path);
    if staged.read_only || !mount.is_some_and(|mount| mount.is_filesystem_read_only()) {
        return Ok(());
    }
    Err(precondition(format!(
        "volume {}: its file system turned read-only after an error; unpublish and unstage it, then staging checks \
         and repairs it",
        staged.volume
    )))
}

/// Spec NodePublishVolume, first two columns: the same again is a success, otherwise ALREADY_EXISTS.
fn is_published(staged: &Staged, wanted: &Target, mounts: &Mounts) -> Result<bool, Status> {
    let path = wanted.path.display();
    let Some(mounted) = mounts.at(&wanted.path) else {
        return Ok(false);
    };
    if mounts.ours_at(&wanted.path).is_none() {
        return Err(precondition(format!(
            "{} is mounted at {path} already; it is no place to publish volume {}",
            mounted.source.display(),
            staged.volume
        )));
    }
    match staged.target(&wanted.path) {
        Some(same) if same == wanted => Ok(mounted.is_read_only() || !wanted.read_only),
        None if mounted.is_read_only() == wanted.read_only => Ok(false),
        _ => Err(exists(format!(
            "volume {} is published at {path} already, with another capability or readonly",
            staged.volume
        ))),
    }
}

/// Spec NodePublishVolume, last two columns: elsewhere as well only where several may have it.
fn check_alone(staged: &Staged, wanted: &Target, mounts: &Mounts) -> Result<(), Status> {
    if wanted.mode != staged.mode {
        return Err(precondition(format!(
            "volume {} was staged with another access mode than it is to be published with",
            staged.volume
        )));
    }
    let is_shared = matches!(
        wanted.mode,
        AccessMode::SingleNodeMultiWriter | AccessMode::MultiNodeReaderOnly
    );
    let mut others = staged
        .targets
        .iter()
        .filter(|other| other.path != wanted.path && mounts.ours_at(&other.path).is_some());
    match others.next() {
        Some(other) if !is_shared => Err(precondition(format!(
            "volume {} is published at {} already, and its access mode allows one place",
            staged.volume,
            other.path.display()
        ))),
        _ => Ok(()),
    }
}

/// Makes the target, a directory or, for a device, a file; one that is there must be empty.
fn make(target: &Path, content: Content) -> Result<(), Status> {
    let made = match content {
        Content::Filesystem => DirBuilder::new().mode(0o750).create(target),
        Content::Block => OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(target)
            .map(drop),
    };
    let problem = match made {
        Ok(()) => return Ok(()),
        Err(error) if error.kind() != ErrorKind::AlreadyExists => error.to_string(),
        Err(_) => match fs::symlink_metadata(target) {
            Err(error) => error.to_string(),
            Ok(found) if content == Content::Block => {
                if found.is_file() && found.len() == 0 {
                    return Ok(());
                }
                "it is there, but is not an empty file".into()
            }
            Ok(found) if !found.is_dir() => "it is there, but is not a directory".into(),
            Ok(_) => match fs::read_dir(target).map(|mut entries| entries.next().is_none()) {
                Ok(true) => return Ok(()),
                Ok(false) => "the directory is not empty".into(),
                Err(error) => error.to_string(),
            },
        },
    };
    Err(precondition(format!(
        "target_path {}: {problem}",
        target.display()
    )))
}

/// Removes a target that nothing is mounted at. Never more than an empty directory or an empty file.
fn remove(target: &Path) -> Result<(), Status> {
    let removed = match fs::symlink_metadata(target) {
        Ok(found) if found.is_dir() => fs::remove_dir(target),
        Ok(found) if found.is_file() && found.len() == 0 => fs::remove_file(target),
        Ok(_) => {
            return Err(precondition(format!(
                "target_path {} is neither a directory nor an empty file; it is left there",
                target.display()
            )));
        }
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(precondition(format!(
            "target_path {} cannot be removed: {error}",
            target.display()
        ))),
        _ => Ok(()),
    }
}
