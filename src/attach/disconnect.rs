//! Removing a device, and growing it.

use std::fs::File;
use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;

use super::backend::Backend;
use super::error::AttachError;
use super::kernel::Driver;
use super::session::offered;
use super::system::{detached, wait};
use super::{Inner, blocking, modules};
use crate::tls::Profile;
use crate::volumes::VolumeId;

/// Teardown is asynchronous, and udev may still look at the device (K30).
const TEARDOWN: Duration = Duration::from_secs(15);

/// The driver takes a new size at once; a system under load may show it a little later.
const RESIZE: Duration = Duration::from_secs(5);

impl Inner {
    pub(super) async fn detach(self: Arc<Self>, volume: &VolumeId) -> Result<(), AttachError> {
        self.unwatch(volume);
        let _lock = self.lock(volume).await;
        let (inner, volume) = (self.clone(), volume.clone());
        blocking(move || {
            while let Some((index, backend)) = inner.device_of(&volume)? {
                let mut driver = modules::driver()?;
                inner.check_unused(index, &volume)?;
                inner.flush(index, &backend);
                inner.disconnect(&mut driver, index, &backend)?;
                tracing::info!(%volume, device = %inner.system.path(index).display(), "detached");
            }
            inner.forget(&volume)
        })
        .await
    }

    /// Disconnects a device that has this backend identifier, and waits until nothing of it is left.
    pub(super) fn disconnect(
        &self,
        driver: &mut Driver,
        index: u32,
        backend: &Backend,
    ) -> Result<(), AttachError> {
        let shown = self
            .system
            .backend(index)
            .map_err(AttachError::system("read the device's backend identifier"))?;
        // The driver does not compare, and an index is used again as soon as it is free (K10).
        if shown.as_ref() == Some(backend) {
            driver.disconnect(index)?;
        }
        let left = self
            .system
            .wait_until_gone(index, TEARDOWN)
            .map_err(AttachError::system("see the device go"))?;
        match left {
            None => Ok(()),
            Some(problem) => Err(AttachError::InUse {
                volume: backend.volume.clone(),
                device: self.system.path(index),
                problem,
            }),
        }
    }

    /// A device that is mounted, or below another, is never taken away.
    fn check_unused(&self, index: u32, volume: &VolumeId) -> Result<(), AttachError> {
        let in_use = |problem| AttachError::InUse {
            volume: volume.clone(),
            device: self.system.path(index),
            problem,
        };
        let mounted = self
            .system
            .mounted_at(index)
            .map_err(AttachError::system("read the mount table"))?;
        if let Some(target) = mounted {
            return Err(in_use(format!("it is mounted at {target}")));
        }
        // udev opens a device after its last close; what it stacks goes again by itself.
        let holders = || {
            let holders = self.system.holders(index)?;
            Ok(holders.is_empty().then_some(()))
        };
        if wait(TEARDOWN, holders)
            .map_err(AttachError::system("list what is stacked on the device"))?
            .is_none()
        {
            return Err(in_use("another device is stacked on it".into()));
        }
        Ok(())
    }

    /// Asks the server to write out what it has, while there is one to ask. Whoever wrote to the device and cared has
    /// done so before; this is for those who only closed it.
    fn flush(&self, index: u32, backend: &Backend) {
        let live = self
            .record_for(index, backend)
            .and_then(|record| self.live_sockets(&record));
        if !live.is_ok_and(|live| !live.is_empty()) {
            return;
        }
        let path = self.system.path(index);
        let device = path.clone();
        let flushed = detached(move || File::open(device).and_then(|device| device.sync_all()))
            .recv_timeout(TEARDOWN)
            .unwrap_or_else(|_| Err(ErrorKind::TimedOut.into()));
        if let Err(error) = flushed {
            tracing::warn!(volume = %backend.volume, "{}: the last flush failed: {error}", path.display());
        }
    }

    pub(super) async fn grow(
        self: Arc<Self>,
        volume: &VolumeId,
        wanted: u64,
    ) -> Result<u64, AttachError> {
        let _lock = self.lock(volume).await;
        let (inner, name) = (self.clone(), volume.clone());
        let (index, record, size) = blocking(move || {
            let (index, backend) = inner
                .device_of(&name)?
                .ok_or(AttachError::NotAttached(name))?;
            let device = inner.describe(index, &backend)?;
            Ok((index, inner.record_for(index, &backend)?, device.size_bytes))
        })
        .await?;
        let peer = record.peer();
        // What a foreign server offers, nobody knows but that server.
        if size >= wanted && peer.foreign.is_none() {
            return Ok(size);
        }
        let (address, secret) = self.whereabouts(&peer).await?;
        let target = peer.target(address, &secret, Profile::Probe)?;
        let served = offered(&peer, target).await?.size_bytes;
        let unsuitable = |problem| {
            Err(AttachError::Unsuitable {
                volume: volume.clone(),
                problem,
            })
        };
        if served < wanted.max(size) {
            return unsuitable(format!(
                "its server offers {served} bytes, but {} are wanted",
                wanted.max(size)
            ));
        }
        // Hawser's own server lets every connection reach the export's end as it is now.
        let reached = match peer.foreign {
            Some(_) => served.min(record.served_bytes),
            None => served,
        };
        if reached < wanted {
            return unsuitable(format!(
                "its server offers {served} bytes now, but its connections were made when it offered {reached}, and a \
                 server need not let them reach further; unstage the volume and stage it again"
            ));
        }
        if reached <= size {
            return Ok(size);
        }
        let inner = self.clone();
        blocking(move || inner.resize(index, &peer.backend, reached)).await
    }

    fn resize(&self, index: u32, backend: &Backend, size: u64) -> Result<u64, AttachError> {
        let record = self.record_for(index, backend)?;
        if self.live_sockets(&record)?.len() < usize::from(record.connections) {
            // From 6.14 on the driver waits here for the requests under way, and lets no socket be replaced meanwhile.
            return Err(AttachError::InUse {
                volume: backend.volume.clone(),
                device: self.system.path(index),
                problem: "its connections are being replaced".into(),
            });
        }
        let mut driver = modules::driver()?;
        driver.resize(index, &backend.to_string(), size)?;
        let shown = || {
            let shown = self.system.size_bytes(index)?;
            Ok((shown == size).then_some(shown))
        };
        wait(RESIZE, shown)
            .map_err(AttachError::system("read the device's size"))?
            .ok_or_else(|| AttachError::Unsuitable {
                volume: backend.volume.clone(),
                problem: format!(
                    "{} does not become {size} bytes long",
                    self.system.path(index).display()
                ),
            })
    }
}
