//! A machine and its devices that are files, for the tests: mounts are rows of a table.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use tonic::{Code, Status};

use super::devices::Devices;
use super::host::Host;
use crate::attach::{Device, Foreign, Request, Transport};
use crate::filesystem::{FilesystemError, Kind, MountPoint, Usage};
use crate::tls::Secret;
use crate::volumes::VolumeId;

/// What happens at the step that is to go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// It fails and does nothing.
    Fails,
    /// The process ends right after it: nothing more happens, not even what would undo.
    Dies,
}

/// The machine, which outlives the process.
#[derive(Default)]
pub(super) struct Fake {
    directory: Option<PathBuf>,
    attached: Mutex<BTreeMap<VolumeId, Device>>,
    mounts: Mutex<Vec<MountPoint>>,
    /// Which step goes wrong, counted down.
    fault: Mutex<Option<(usize, Fault)>>,
    died: tokio::sync::Notify,
    pub(super) groups: Mutex<Vec<u32>>,
    pub(super) grown: AtomicUsize,
    pub(super) renewed: AtomicUsize,
    /// Of the last attach.
    pub(super) foreign: Mutex<Option<Foreign>>,
    pub(super) held_elsewhere: AtomicBool,
}

impl Fake {
    pub(super) fn new(directory: &Path) -> Arc<Self> {
        Arc::new(Self {
            directory: Some(directory.to_owned()),
            ..Self::default()
        })
    }

    pub(super) fn device_path(&self, volume: &VolumeId) -> PathBuf {
        self.directory.as_ref().unwrap().join(volume.as_str())
    }

    pub(super) fn fault_at(&self, step: usize, fault: Fault) {
        *self.fault.lock().unwrap() = Some((step, fault));
    }

    /// Whether the fault came about; it does not happen again.
    pub(super) fn cleared_fault(&self) -> bool {
        self.fault.lock().unwrap().take().is_none()
    }

    pub(super) fn mounted(&self) -> Vec<PathBuf> {
        let mounts = self.mounts.lock().unwrap();
        mounts.iter().map(|mount| mount.point.clone()).collect()
    }

    pub(super) fn attached(&self) -> usize {
        self.attached.lock().unwrap().len()
    }

    pub(super) fn options_at(&self, point: &Path) -> Vec<String> {
        let mounts = self.mounts.lock().unwrap();
        let mount = mounts.iter().rev().find(|mount| mount.point == point);
        mount.map(|mount| mount.options.clone()).unwrap_or_default()
    }

    /// A reboot: nothing is attached, nothing mounted.
    pub(super) fn reboot(&self) {
        self.attached.lock().unwrap().clear();
        self.mounts.lock().unwrap().clear();
    }

    /// The file system of a volume turns itself read-only.
    pub(super) fn turn_read_only(&self) {
        for mount in self.mounts.lock().unwrap().iter_mut() {
            mount.super_options = vec!["ro".into()];
        }
    }

    pub(super) fn mount_something(&self, source: &str, point: &Path) {
        self.push(Path::new(source), "ext4", point, &[], false);
    }

    fn push(&self, source: &Path, kind: &str, point: &Path, options: &[String], read_only: bool) {
        let mut all = vec![if read_only { "ro" } else { "rw" }.to_owned()];
        all.extend_from_slice(options);
        self.mounts.lock().unwrap().push(MountPoint {
            device: (0, 0),
            root: "/".into(),
            point: point.to_owned(),
            options: all.clone(),
            kind: kind.into(),
            source: source.to_owned(),
            super_options: vec![all[0].clone()],
        });
    }

    async fn die(&self) -> ! {
        self.died.notify_one();
        std::future::pending().await
    }

    /// Waits for the end of the process.
    pub(super) async fn died(&self) {
        self.died.notified().await;
    }

    /// Does a step, or what is to go wrong with it.
    async fn step<T>(&self, work: impl FnOnce() -> T) -> Result<T, Status> {
        let fault = {
            let mut fault = self.fault.lock().unwrap();
            match fault.take() {
                Some((0, fault)) => Some(fault),
                Some((left, kind)) => {
                    *fault = Some((left - 1, kind));
                    None
                }
                None => None,
            }
        };
        match fault {
            None => Ok(work()),
            Some(Fault::Fails) => Err(Status::new(Code::Unavailable, "planted")),
            Some(Fault::Dies) => {
                work();
                self.die().await
            }
        }
    }

    async fn host_step<T>(&self, work: impl FnOnce() -> T) -> Result<T, FilesystemError> {
        self.step(work).await.map_err(|_| FilesystemError::Io {
            doing: "planted",
            path: PathBuf::new(),
            source: std::io::Error::other("planted"),
        })
    }
}

#[tonic::async_trait]
impl Devices for Fake {
    async fn attach(&self, request: Request) -> Result<Device, Status> {
        let path = self.device_path(&request.volume);
        self.foreign.lock().unwrap().clone_from(&request.foreign);
        self.step(|| {
            let device = Device {
                index: 0,
                transport: Transport::KernelTls,
                report: None,
                size_bytes: File::open(&path).unwrap().metadata().unwrap().len(),
                path,
                read_only: request.read_only,
            };
            let mut attached = self.attached.lock().unwrap();
            attached.entry(request.volume).or_insert(device).clone()
        })
        .await
    }

    async fn find(&self, volume: &VolumeId) -> Result<Option<Device>, Status> {
        Ok(self.attached.lock().unwrap().get(volume).cloned())
    }

    async fn detach(&self, volume: &VolumeId) -> Result<(), Status> {
        let path = self.device_path(volume);
        let mounts = self.mounts.lock().unwrap().clone();
        assert!(
            mounts.iter().all(|mount| mount.source != path),
            "detached while mounted"
        );
        self.step(|| {
            self.attached.lock().unwrap().remove(volume);
        })
        .await
    }

    async fn renew_secret(&self, _: &VolumeId, _: Secret) -> Result<(), Status> {
        self.renewed.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    async fn grow(&self, volume: &VolumeId, size_bytes: u64) -> Result<u64, Status> {
        let path = self.device_path(volume);
        File::options()
            .write(true)
            .open(path)
            .unwrap()
            .set_len(size_bytes)
            .unwrap();
        Ok(size_bytes)
    }
}

#[tonic::async_trait]
impl Host for Arc<Fake> {
    fn mount_points(&self) -> Result<Vec<MountPoint>, FilesystemError> {
        Ok(self.mounts.lock().unwrap().clone())
    }

    async fn mount(
        &self,
        device: &Path,
        kind: Kind,
        point: &Path,
        options: &[String],
        read_only: bool,
    ) -> Result<(), FilesystemError> {
        self.host_step(|| self.push(device, kind.as_str(), point, options, read_only))
            .await
    }

    async fn bind(
        &self,
        source: &Path,
        target: &Path,
        read_only: bool,
    ) -> Result<(), FilesystemError> {
        let mounts = self.mounts.lock().unwrap().clone();
        let mounted = mounts.iter().rev().find(|mount| mount.point == source);
        let (device, kind) = match mounted {
            Some(mount) => (mount.source.clone(), mount.kind.clone()),
            None => (source.to_owned(), "devtmpfs".into()),
        };
        self.host_step(|| self.push(&device, &kind, target, &[], read_only))
            .await
    }

    async fn unmount(&self, point: &Path) -> Result<(), FilesystemError> {
        self.host_step(|| {
            self.mounts
                .lock()
                .unwrap()
                .retain(|mount| mount.point != point);
        })
        .await
    }

    async fn grow(&self, _: &Path, _: Kind, _: &Path) -> Result<(), FilesystemError> {
        self.grown.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    async fn usage(&self, _: &Path) -> Result<Usage, FilesystemError> {
        Ok(Usage {
            total_bytes: 100,
            available_bytes: 50,
            used_bytes: 40,
            total_inodes: 10,
            free_inodes: 9,
        })
    }

    async fn give_to_group(&self, _: &Path, group: u32) -> Result<(), FilesystemError> {
        self.groups.lock().unwrap().push(group);
        Ok(())
    }

    async fn is_in_use(&self, device: &Path) -> Result<bool, FilesystemError> {
        let mounts = self.mounts.lock().unwrap();
        Ok(self.held_elsewhere.load(Ordering::Relaxed)
            || mounts
                .iter()
                .any(|mount| mount.source == device && mount.kind != "devtmpfs"))
    }
}
