//! NodeStageVolume and NodeUnstageVolume: from a certificate to a mounted file system, and back.
//!
//! Staging may end at any point, by an error or with the process. It is written so that doing it again goes on from
//! there, and that unstaging works from there: each step first looks whether it has been done.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use tonic::{Code, Status};

use super::format::{decide, decide_foreign};
use super::mounts::Mounts;
use super::record::Staged;
use super::steps::Steps;
use super::{Inner, kubelet};
use crate::attach::{Device, Foreign, Request};
use crate::csi::capability::{Access, Capability, Mount};
use crate::csi::parameters::Parameters;
use crate::csi::status::{exists, invalid, precondition, status};
use crate::daemon::chain;
use crate::filesystem::{self, Kind};
use crate::patience::Patience;
use crate::tls::{self, CertificateError, Secret, Side};
use crate::volumes::{AttachmentId, Content, Format, Volume, VolumeId, VolumeOptions};

/// A checked request for a staged volume.
pub(super) struct Stage {
    /// What the orchestrator calls the volume, and what we do.
    pub(super) handle: String,
    pub(super) volume: VolumeId,
    /// Where the volume is, if its server is not Hawser's.
    pub(super) foreign: Option<Foreign>,
    pub(super) attachment: AttachmentId,
    /// Whether the attachment may not write.
    pub(super) read_only: bool,
    pub(super) path: PathBuf,
    pub(super) capability: Capability,
    pub(super) secrets: HashMap<String, String>,
    /// `None` if the request carried no volume_context.
    pub(super) context: Option<Parameters>,
}

impl Stage {
    /// The Secret that the request carries, if it carries one. An orchestrator may hand one map of secrets to every call;
    /// others than ours are none.
    pub(super) fn secret(&self) -> Result<Option<Secret>, CertificateError> {
        let ours = [tls::CERTIFICATE, tls::KEY, tls::AUTHORITIES];
        if !ours.iter().any(|&key| self.secrets.contains_key(key)) {
            return Ok(None);
        }
        let parts: BTreeMap<_, _> = self
            .secrets
            .iter()
            .map(|(key, value)| (key.clone(), value.clone().into_bytes()))
            .collect();
        let origin = format!(
            "the client's Secret of {} (the node-stage Secret of its StorageClass or PersistentVolume)",
            self.handle
        );
        Secret::from_map(&origin, &parts, Side::Client).map(Some)
    }
}

impl Inner {
    /// Stages a volume, or finds it staged as asked, and returns the record of it.
    pub(super) async fn stage(&self, stage: Stage) -> Result<Staged, Status> {
        let (volume, parameters) = self.volume(&stage).await?;
        let old = self.records.load(&volume.id)?;
        let mut wanted = wanted(&stage, &volume, &parameters)?;
        let device = self.devices.find(&volume.id).await?;
        let mounts = Mounts::look(self.host.as_ref(), device.as_ref())?;
        if let Some(old) = &old {
            if device.is_some() && is_staged(old, &mounts) {
                check_same(old, &wanted)?;
                return Ok(old.clone());
            }
            // What was published before a reboot is published no more.
            wanted.targets = old.targets.clone();
            wanted.targets.retain(|t| mounts.ours_at(&t.path).is_some());
        }
        if volume.options.content == Content::Filesystem {
            check_directory(&wanted.path)?;
            if let Some(other) = mounts.at(&wanted.path)
                && mounts.ours_at(&wanted.path).is_none()
            {
                return Err(precondition(format!(
                    "{} is mounted at {} already; it is no place to stage volume {}",
                    other.source.display(),
                    wanted.path.display(),
                    volume.id
                )));
            }
        }
        // On disk before there is anything to be found again.
        self.records.save(&wanted)?;
        let staged = self.connect(&stage, &wanted, volume, parameters).await;
        if let Err(status) = staged {
            if device.is_none() {
                self.undo(&wanted, old.is_some()).await;
            }
            return Err(status);
        }
        Ok(wanted)
    }

    /// The volume, as the installation has recorded it or, of a foreign one, as the request describes it.
    async fn volume(&self, stage: &Stage) -> Result<(Volume, Parameters), Status> {
        if stage.foreign.is_some() {
            let volume = Volume {
                id: stage.volume.clone(),
                name: stage.handle.clone(),
                size_bytes: 0,
                options: VolumeOptions {
                    content: stage.capability.content(),
                    context: BTreeMap::new(),
                },
                format: self.formats.load(&stage.volume)?,
                attachments: Vec::new(),
            };
            return Ok((volume, stage.context.clone().unwrap_or_default()));
        }
        let volume = self.volumes.find(&stage.volume).await?;
        stage
            .capability
            .fits(&volume)
            .map_err(|refusal| refusal.on_node())?;
        let parameters = Parameters::recorded(&volume.options.context)?;
        if stage.context.as_ref().is_some_and(|c| *c != parameters) {
            return Err(invalid(format!(
                "volume_context is not that of volume {}",
                volume.id
            )));
        }
        Ok((volume, parameters))
    }

    async fn set_format(&self, stage: &Stage, format: Format) -> Result<(), Status> {
        match &stage.foreign {
            Some(_) => self.formats.save(&stage.volume, &format),
            None => Ok(self.volumes.set_format(&stage.volume, format).await?),
        }
    }

    /// Takes note of what the kubelet calls a foreign volume, where that is known by now.
    pub(super) fn name(&self, stage: &Stage, path: &Path) {
        if stage.foreign.is_some()
            && let Some(name) = kubelet::persistent_volume(path)
        {
            self.volumes.note_name(&stage.volume, name);
        }
    }

    /// Attaches the volume and, where it is a file system, mounts it.
    async fn connect(
        &self,
        stage: &Stage,
        wanted: &Staged,
        volume: Volume,
        parameters: Parameters,
    ) -> Result<(), Status> {
        let mut steps = Steps::begin();
        let secret = self.client_secret(stage).await?;
        steps.done("secret");
        self.name(stage, &stage.path);
        let device = self
            .devices
            .attach(Request {
                volume: volume.id.clone(),
                attachment: stage.attachment.clone(),
                secret,
                read_only: stage.read_only,
                options: parameters.options.clone(),
                foreign: stage.foreign.clone(),
                patience: Patience::of_caller(),
            })
            .await?;
        steps.done("attach");
        if let (Some(kind), Access::Mount(mount)) = (wanted.kind, &stage.capability.access) {
            let mounts = Mounts::look(self.host.as_ref(), Some(&device))?;
            if mounts.ours_at(&wanted.path).is_none() {
                self.mount(
                    stage,
                    &volume,
                    &parameters,
                    &device,
                    kind,
                    wanted,
                    &mut steps,
                )
                .await?;
            }
            self.give_to_group(mount, &wanted.path, wanted.read_only || device.read_only)
                .await?;
            steps.done("group");
        }
        tracing::info!(
            device = %device.path.display(),
            path = %wanted.path.display(),
            steps = %steps,
            "staged"
        );
        Ok(())
    }

    /// Probe, format if that was never done, check, mount, grow.
    #[allow(
        clippy::too_many_arguments,
        reason = "one step of `connect`, with all that it has found"
    )]
    async fn mount(
        &self,
        stage: &Stage,
        volume: &Volume,
        parameters: &Parameters,
        device: &Device,
        kind: Kind,
        wanted: &Staged,
        steps: &mut Steps,
    ) -> Result<(), Status> {
        if self.host.is_in_use(&device.path).await? {
            return Err(precondition(format!(
                "volume {}: {} is in use by something that is not Hawser, or in another mount namespace",
                volume.id,
                device.path.display()
            )));
        }
        let probe = filesystem::probe(&device.path).await?;
        steps.done("probe");
        let may_write = !device.read_only;
        let decision = match stage.foreign {
            Some(_) => decide_foreign(
                volume,
                kind,
                &probe.content,
                may_write,
                parameters.formatting,
            )?,
            None => decide(volume, kind, &probe.content, may_write)?,
        };
        let fs = kind.to_string();
        if let Some(before) = decision {
            let started = Format::Started { fs: fs.clone() };
            self.set_format(stage, started).await?;
            filesystem::format(&device.path, kind, before).await?;
            self.set_format(stage, Format::Done { fs }).await?;
            steps.done("format");
        } else if may_write && wanted.mode.is_single_node() {
            // The device is ours alone: no other node is attached, and nobody here has it open for himself.
            filesystem::check(&device.path, kind).await?;
            steps.done("check");
        }
        let read_only = wanted.read_only || device.read_only;
        self.host
            .mount(&device.path, kind, &wanted.path, &wanted.flags, read_only)
            .await?;
        steps.done("mount");
        if stage.foreign.is_some() {
            // Others may have made it; what counts is that something is there now.
            self.set_format(
                stage,
                Format::Done {
                    fs: kind.to_string(),
                },
            )
            .await?;
        }
        if decision.is_none() && !read_only && probe.has_room_to_grow(kind) {
            self.host.grow(&device.path, kind, &wanted.path).await?;
            steps.done("grow");
        }
        Ok(())
    }

    pub(super) async fn give_to_group(
        &self,
        mount: &Mount,
        path: &Path,
        read_only: bool,
    ) -> Result<(), Status> {
        match mount.group {
            Some(group) if !read_only && !mount.is_read_only() => {
                Ok(self.host.give_to_group(path, group).await?)
            }
            _ => Ok(()),
        }
    }

    /// The client's certificate: from the request or, where that carries none, from the installation.
    async fn client_secret(&self, stage: &Stage) -> Result<Secret, Status> {
        let volume = &stage.volume;
        match (stage.secret()?, &stage.foreign) {
            (Some(secret), Some(_)) => Ok(secret),
            (None, Some(_)) => Err(status(
                Code::Unauthenticated,
                format!(
                    "volume {}: its server is not Hawser's, so the request must carry a client's Secret with {}, {} and {}: \
                     name one in the PersistentVolume's nodeStageSecretRef and nodePublishSecretRef",
                    stage.handle,
                    tls::CERTIFICATE,
                    tls::KEY,
                    tls::AUTHORITIES
                ),
            )),
            (Some(secret), None) => {
                secret.check_identity(&tls::client_identity(volume))?;
                self.keep(volume, &secret).await;
                Ok(secret)
            }
            (None, None) => {
                let parts = self.volumes.client_secret(volume).await?;
                let origin = format!("the client Secret of {volume}");
                let secret = Secret::from_map(&origin, &parts, Side::Client)?;
                secret.check_identity(&tls::client_identity(volume))?;
                Ok(secret)
            }
        }
    }

    /// Takes the certificate that a request for a volume that is in use brought. One that is no good changes nothing:
    /// were the request to fail, an older kubelet would take the volume from its pod.
    pub(super) async fn renew_secret(&self, stage: &Stage) {
        let volume = &stage.volume;
        let renewed = async {
            let Some(secret) = stage.secret()? else {
                return Ok(());
            };
            if stage.foreign.is_some() {
                return self.devices.renew_secret(volume, secret).await;
            }
            secret.check_identity(&tls::client_identity(volume))?;
            self.keep(volume, &secret).await;
            Ok(())
        };
        let renewed: Result<(), Status> = renewed.await;
        if let Err(status) = renewed {
            let problem = status.message();
            tracing::warn!(%volume, problem, "the certificate before stays in use");
            self.volumes.note_refused_secret(volume, problem);
        }
    }

    async fn keep(&self, volume: &VolumeId, secret: &Secret) {
        let kept = self.volumes.keep_client_secret(volume, secret.parts());
        if let Err(error) = kept.await {
            let error = chain(&error);
            tracing::warn!(%volume, error, "its certificate may be missing after a restart");
        }
    }

    /// Takes back what a failed staging left. Whatever cannot be undone now is undone by NodeUnstageVolume, which the
    /// record makes possible. A record from before, of a volume that a reboot detached, stays.
    async fn undo(&self, wanted: &Staged, was_recorded: bool) {
        let undone = async {
            if wanted.content == Content::Filesystem {
                let device = self.devices.find(&wanted.volume).await?;
                let mounts = Mounts::look(self.host.as_ref(), device.as_ref())?;
                if device.is_some() && mounts.ours_at(&wanted.path).is_some() {
                    self.host.unmount(&wanted.path).await?;
                }
            }
            self.devices.detach(&wanted.volume).await?;
            if !was_recorded {
                self.records.remove(&wanted.volume)?;
            }
            Ok::<(), Status>(())
        };
        if let Err(status) = undone.await {
            tracing::warn!(
                volume = %wanted.volume,
                reason = status.message(),
                "a failed staging could not be taken back; unstaging will do it"
            );
        }
    }

    /// Unmounts and detaches a volume. One that is not staged at `path` stays as it is.
    pub(super) async fn unstage(&self, volume: &VolumeId, path: &Path) -> Result<(), Status> {
        let record = self.records.load(volume)?;
        let device = match self.devices.find(volume).await {
            Ok(device) => device,
            Err(status) => {
                tracing::warn!(%volume, reason = status.message(), "its device cannot be described");
                None
            }
        };
        let mounts = Mounts::look(self.host.as_ref(), device.as_ref())?;
        let is_here = match &record {
            Some(record) => record.path == path,
            // A lost record: the kernel has to say so. A device that is mounted nowhere is a leftover.
            None if device.is_some() => {
                mounts.ours_at(path).is_some() || mounts.ours().next().is_none()
            }
            None => false,
        };
        if !is_here {
            return Ok(());
        }
        let targets = record.iter().flat_map(|record| &record.targets);
        let published: Vec<_> = targets
            .map(|target| target.path.as_path())
            .chain(mounts.ours().map(|mount| mount.point.as_path()))
            .filter(|&point| point != path && mounts.ours_at(point).is_some())
            .map(|point| point.display().to_string())
            .collect();
        if device.is_some() && !published.is_empty() {
            return Err(precondition(format!(
                "volume {volume} is still published at {}; unpublish it there first",
                published.join(", ")
            )));
        }
        let mut steps = Steps::begin();
        if mounts.ours_at(path).is_some() {
            self.host.unmount(path).await?;
            steps.done("unmount");
        }
        if let Some(device) = &device {
            // Unmounted here is not unmounted in a container's namespace, where it may still be written to.
            if self.host.is_in_use(&device.path).await? {
                return Err(precondition(format!(
                    "volume {volume}: {} is still in use, in another mount namespace perhaps",
                    device.path.display()
                )));
            }
        }
        self.devices.detach(volume).await?;
        steps.done("detach");
        self.volumes.note_detached(volume);
        self.records.remove(volume)?;
        tracing::info!(path = %path.display(), steps = %steps, "unstaged");
        Ok(())
    }
}

/// Whether a record is of something that is there: of a file system, its mount; of a raw device, the device itself.
pub(super) fn is_staged(record: &Staged, mounts: &Mounts) -> bool {
    match record.content {
        Content::Filesystem => mounts.ours_at(&record.path).is_some(),
        Content::Block => true,
    }
}

/// The record of what a request asks for.
fn wanted(stage: &Stage, volume: &Volume, parameters: &Parameters) -> Result<Staged, Status> {
    let (kind, flags, read_only) = match &stage.capability.access {
        Access::Block => (None, Vec::new(), stage.read_only),
        Access::Mount(mount) => {
            let asked = mount.kind.or(parameters.kind);
            let kind = match &volume.format {
                Format::Never => asked.unwrap_or_default(),
                // Whoever runs the server may have put something else there meanwhile.
                Format::Started { fs } | Format::Done { fs } if stage.foreign.is_some() => {
                    asked.or_else(|| fs.parse().ok()).unwrap_or_default()
                }
                Format::Started { fs } | Format::Done { fs } => {
                    let recorded = fs.parse().map_err(|error| {
                        precondition(format!("volume {} is recorded with a {error}", volume.id))
                    })?;
                    if mount.kind.is_some_and(|asked| asked != recorded) {
                        return Err(precondition(format!(
                            "volume {} was formatted with {recorded}, which is not what is asked for now",
                            volume.id
                        )));
                    }
                    recorded
                }
            };
            let read_only = stage.read_only || mount.is_read_only();
            (Some(kind), mount.flags.clone(), read_only)
        }
    };
    let mode = stage.capability.mode;
    Ok(Staged {
        volume: volume.id.clone(),
        foreign: stage.foreign.clone(),
        attachment: stage.attachment.clone(),
        path: stage.path.clone(),
        content: stage.capability.content(),
        kind,
        flags,
        mode,
        read_only: read_only || mode.is_read_only(),
        targets: Vec::new(),
    })
}

/// Spec NodeStageVolume: staged as asked is a success, staged otherwise is ALREADY_EXISTS.
fn check_same(staged: &Staged, wanted: &Staged) -> Result<(), Status> {
    if staged.path != wanted.path {
        return Err(precondition(format!(
            "volume {} is staged at {} already; unstage it there first",
            staged.volume,
            staged.path.display()
        )));
    }
    if staged.attachment != wanted.attachment {
        return Err(precondition(format!(
            "volume {} is staged with an earlier attachment; unstage it first",
            staged.volume
        )));
    }
    if staged.is_same_stage(wanted) {
        return Ok(());
    }
    Err(exists(format!(
        "volume {} is staged at {} already, with another capability or from another server",
        staged.volume,
        staged.path.display()
    )))
}

/// The specification has the orchestrator make the staging directory.
fn check_directory(path: &Path) -> Result<(), Status> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => Ok(()),
        Ok(_) => Err(invalid(format!(
            "staging_target_path {} is not a directory",
            path.display()
        ))),
        Err(error) => Err(precondition(format!(
            "staging_target_path {}: {error}",
            path.display()
        ))),
    }
}
