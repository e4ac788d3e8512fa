//! NodeGetVolumeStats and NodeExpandVolume: of a volume that is staged or published here.

use std::path::Path;
use std::time::Duration;

use tonic::{Code, Status};

use super::Inner;
use super::mounts::{Mounts, resolve};
use super::steps::Steps;
use crate::attach::Device;
use crate::csi::request::Size;
use crate::csi::status::{not_found, out_of_range, status};
use crate::filesystem::{Kind, MountPoint, Usage};
use crate::volumes::{Content, VolumeId};

/// statvfs answers from memory; where it does not, the file system is stuck, and so would be who waits for it.
const USAGE_LIMIT: Duration = Duration::from_secs(30);

/// How full a volume is.
pub(super) enum Fill {
    Block(u64),
    Filesystem(Usage),
}

/// A place where a volume is, according to the kernel.
enum Place {
    Mounted(MountPoint),
    /// A raw device: bound to a file, or staged without being anywhere.
    Device,
}

impl Inner {
    /// The device of a volume that is at `path` on this node; NOT_FOUND is what the specification wants otherwise.
    async fn place(
        &self,
        volume: &VolumeId,
        path: &str,
    ) -> Result<(Device, Mounts, Place), Status> {
        let nowhere = || not_found(format!("volume {volume} is not at {path:?} on this node"));
        let path = Path::new(path);
        if !path.is_absolute() {
            return Err(nowhere());
        }
        let path = resolve(&path.components().collect::<std::path::PathBuf>());
        let device = self.devices.find(volume).await?.ok_or_else(nowhere)?;
        let mounts = Mounts::look(self.host.as_ref(), Some(&device))?;
        let place = match mounts.ours_at(&path) {
            Some(mount) if mount.kind.parse::<Kind>().is_ok() => Place::Mounted(mount.clone()),
            Some(_) => Place::Device,
            None => match self.records.load(volume)? {
                Some(record) if record.content == Content::Block && record.path == path => {
                    Place::Device
                }
                _ => return Err(nowhere()),
            },
        };
        Ok((device, mounts, place))
    }

    pub(super) async fn fill(&self, volume: &VolumeId, path: &str) -> Result<Fill, Status> {
        let (device, _, place) = self.place(volume, path).await?;
        let Place::Mounted(mount) = place else {
            return Ok(Fill::Block(device.size_bytes));
        };
        match tokio::time::timeout(USAGE_LIMIT, self.host.usage(&mount.point)).await {
            Ok(usage) => Ok(Fill::Filesystem(usage?)),
            Err(_) => Err(status(
                Code::DeadlineExceeded,
                format!("volume {volume}: the file system at {path} does not answer"),
            )),
        }
    }

    /// Gives the device the volume's size, and its file system the device's. Returns the size.
    pub(super) async fn expand(
        &self,
        volume: &VolumeId,
        path: &str,
        size: Option<Size>,
    ) -> Result<u64, Status> {
        let (device, mounts, place) = self.place(volume, path).await?;
        let required = size.map_or(0, |size| size.required);
        let staged = self.records.load(volume)?;
        let wanted = if staged.is_some_and(|staged| staged.foreign.is_some()) {
            // Its size is what its server says.
            required
        } else {
            let recorded = self.volumes.find(volume).await?.size_bytes;
            if required > recorded {
                return Err(out_of_range(format!(
                    "volume {volume} has {recorded} bytes, not {required}; ControllerExpandVolume comes first"
                )));
            }
            recorded
        };
        let mut steps = Steps::begin();
        let bytes = self.devices.grow(volume, wanted).await?;
        steps.done("device");
        if let Place::Mounted(mount) = place {
            // The file system grows through a mount that can be written to: the place itself may be read-only.
            let writable =
                |mount: &&MountPoint| !mount.is_read_only() && mount.kind.parse::<Kind>().is_ok();
            let through = [&mount].into_iter().chain(mounts.ours()).find(writable);
            match (through, mount.kind.parse::<Kind>()) {
                (Some(through), Ok(kind)) if !mount.is_filesystem_read_only() => {
                    self.host.grow(&device.path, kind, &through.point).await?;
                    steps.done("file system");
                }
                _ => tracing::info!("mounted read-only: the file system keeps its size"),
            }
        }
        tracing::info!(bytes, steps = %steps, "expanded");
        Ok(bytes)
    }
}
