//! The kernel's devices, as far as the Node service needs to know them.

use std::path::PathBuf;

use tonic::Status;

use crate::csi::Parameters;
use crate::tls;
use crate::volumes::{AttachmentId, VolumeId};

/// A volume to attach.
pub struct Attach {
    pub volume: VolumeId,
    pub attachment: AttachmentId,
    /// The client's certificate, key and authorities.
    pub secret: tls::Secret,
    pub read_only: bool,
    pub parameters: Parameters,
}

/// A volume's block device on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// `/dev/nbd7`, say.
    pub path: PathBuf,
    pub size_bytes: u64,
    pub read_only: bool,
}

/// The block devices of this machine's volumes. Every call may be repeated.
#[tonic::async_trait]
pub trait Devices: Send + Sync + 'static {
    /// Attaches and verifies a volume, or finds it attached with the same attachment.
    async fn attach(&self, attach: Attach) -> Result<Device, Status>;

    /// The device of a volume, as the kernel has it now.
    async fn find(&self, volume: &VolumeId) -> Result<Option<Device>, Status>;

    /// Disconnects a volume's device; of a volume that is not attached, does nothing.
    async fn detach(&self, volume: &VolumeId) -> Result<(), Status>;

    /// Tells the kernel that a volume has grown to `size_bytes`, and returns the device's size.
    async fn grow(&self, volume: &VolumeId, size_bytes: u64) -> Result<u64, Status>;
}
