//! What the Node service does to this machine: in one place, so that its logic can be tested without mounting anything.

use std::path::Path;

use crate::filesystem::{self, FilesystemError, Kind, MountPoint, Usage};

/// This machine's mounts.
#[tonic::async_trait]
pub(super) trait Host: Send + Sync + 'static {
    fn mount_points(&self) -> Result<Vec<MountPoint>, FilesystemError>;

    async fn mount(
        &self,
        device: &Path,
        kind: Kind,
        point: &Path,
        options: &[String],
        read_only: bool,
    ) -> Result<(), FilesystemError>;

    async fn bind(
        &self,
        source: &Path,
        target: &Path,
        read_only: bool,
    ) -> Result<(), FilesystemError>;

    async fn unmount(&self, point: &Path) -> Result<(), FilesystemError>;

    async fn grow(&self, device: &Path, kind: Kind, point: &Path) -> Result<(), FilesystemError>;

    async fn usage(&self, point: &Path) -> Result<Usage, FilesystemError>;

    async fn give_to_group(&self, root: &Path, group: u32) -> Result<(), FilesystemError>;

    /// Whether somebody, in whatever mount namespace, holds the device for himself.
    async fn is_in_use(&self, device: &Path) -> Result<bool, FilesystemError>;
}

/// The machine itself.
pub(super) struct Machine;

/// Runs what may block, on a thread for that.
async fn blocking<T: Send + 'static>(
    path: &Path,
    work: impl FnOnce(&Path) -> Result<T, FilesystemError> + Send + 'static,
) -> Result<T, FilesystemError> {
    let owned = path.to_owned();
    match tokio::task::spawn_blocking(move || work(&owned)).await {
        Ok(result) => result,
        Err(broken) => Err(FilesystemError::Io {
            doing: "work on",
            path: path.to_owned(),
            source: std::io::Error::other(broken),
        }),
    }
}

#[tonic::async_trait]
impl Host for Machine {
    fn mount_points(&self) -> Result<Vec<MountPoint>, FilesystemError> {
        filesystem::mount_points()
    }

    async fn mount(
        &self,
        device: &Path,
        kind: Kind,
        point: &Path,
        options: &[String],
        read_only: bool,
    ) -> Result<(), FilesystemError> {
        filesystem::mount(device, kind, point, options, read_only).await
    }

    async fn bind(
        &self,
        source: &Path,
        target: &Path,
        read_only: bool,
    ) -> Result<(), FilesystemError> {
        let source = source.to_owned();
        blocking(target, move |target| {
            filesystem::bind(&source, target, read_only)
        })
        .await
    }

    async fn unmount(&self, point: &Path) -> Result<(), FilesystemError> {
        filesystem::unmount(point).await
    }

    async fn grow(&self, device: &Path, kind: Kind, point: &Path) -> Result<(), FilesystemError> {
        filesystem::grow(device, kind, point).await
    }

    async fn usage(&self, point: &Path) -> Result<Usage, FilesystemError> {
        blocking(point, filesystem::usage).await
    }

    async fn give_to_group(&self, root: &Path, group: u32) -> Result<(), FilesystemError> {
        blocking(root, move |root| filesystem::give_to_group(root, group)).await
    }

    async fn is_in_use(&self, device: &Path) -> Result<bool, FilesystemError> {
        blocking(device, filesystem::is_in_use).await
    }
}
