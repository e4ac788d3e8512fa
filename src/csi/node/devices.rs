//! The kernel's devices, as far as the Node service needs them: a seam, so that its tests need no kernel.

use tonic::Status;

use crate::attach::{Attacher, Device, Request};
use crate::tls::Secret;
use crate::volumes::VolumeId;

/// The block devices of this machine's volumes. Every call may be repeated.
#[tonic::async_trait]
pub trait Devices: Send + Sync + 'static {
    /// Attaches and verifies a volume, or finds it attached with the same attachment.
    async fn attach(&self, request: Request) -> Result<Device, Status>;

    /// The device of a volume, as the kernel has it now.
    async fn find(&self, volume: &VolumeId) -> Result<Option<Device>, Status>;

    /// Disconnects a volume's device; of a volume that is not attached, does nothing.
    async fn detach(&self, volume: &VolumeId) -> Result<(), Status>;

    /// Shows this Secret to the foreign server of a volume that is attached, from now on.
    async fn renew_secret(&self, volume: &VolumeId, secret: Secret) -> Result<(), Status>;

    /// Tells the kernel that a volume has grown to `size_bytes` at least, and returns the device's size.
    async fn grow(&self, volume: &VolumeId, size_bytes: u64) -> Result<u64, Status>;
}

#[tonic::async_trait]
impl Devices for Attacher {
    async fn attach(&self, request: Request) -> Result<Device, Status> {
        Ok(Self::attach(self, request).await?)
    }

    async fn find(&self, volume: &VolumeId) -> Result<Option<Device>, Status> {
        Ok(Self::find(self, volume).await?)
    }

    async fn detach(&self, volume: &VolumeId) -> Result<(), Status> {
        Ok(Self::detach(self, volume).await?)
    }

    async fn renew_secret(&self, volume: &VolumeId, secret: Secret) -> Result<(), Status> {
        Ok(Self::renew_secret(self, volume, secret).await?)
    }

    async fn grow(&self, volume: &VolumeId, size_bytes: u64) -> Result<u64, Status> {
        Ok(Self::grow(self, volume, size_bytes).await?)
    }
}
