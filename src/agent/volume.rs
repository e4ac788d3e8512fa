//! One volume on its storage node: what is decided is done here, on disk and at the volume's server.

use std::path::Path;
use std::sync::Arc;

use rustix::fs::{CWD, Mode, OFlags, openat};

use super::decide::{Access, Disk};
use crate::control::{Control, ControlError};
use crate::daemon::chain;
use crate::kube::api::NbdVolume;
use crate::storage::{self, Pool, StorageError, Vacancy};
use crate::volumes::{Format, Volume, VolumeId, VolumeOptions};

/// The user and group that volumes' servers run as: the image's.
const SERVER: u32 = 65532;

/// What a server's socket is called in its volume's directory.
const CONTROL: &str = "control";

/// Why a volume is not as it is to be.
#[derive(Debug, thiserror::Error)]
pub(super) enum VolumeError {
    #[error("{}", chain(.0))]
    Storage(#[from] StorageError),
    #[error("cannot {doing}: {source}")]
    Io {
        doing: &'static str,
        source: std::io::Error,
    },
    #[error("its server does not do what it is told: {}", chain(.0))]
    Control(#[from] ControlError),
    #[error("its server holds it and does not answer on its control socket")]
    Held,
    #[error("this process is shutting down")]
    ShuttingDown,
}

fn io(doing: &'static str) -> impl FnOnce(std::io::Error) -> VolumeError {
    move |source| VolumeError::Io { doing, source }
}

/// A volume's place in a pool of this node. Cheap to clone.
#[derive(Clone)]
pub(super) struct Site {
    pub(super) id: VolumeId,
    pub(super) pool: Arc<Pool>,
}

/// What a server, or the next one, was brought into line with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Served {
    /// Of a server that runs.
    pub(super) epoch: Option<u64>,
}

impl Site {
    /// Does what may block where that may be done.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<T, VolumeError> + Send + 'static,
    ) -> Result<T, VolumeError> {
        let site = self.clone();
        tokio::task::spawn_blocking(move || work(&site))
            .await
            .map_err(|_| VolumeError::ShuttingDown)?
    }

    /// What the disk has. A volume whose files are not as its record says counts as damaged.
    pub(super) async fn disk(&self) -> Result<Disk, VolumeError> {
        self.blocking(|site| {
            site.pool.refresh(&site.id);
            let record = match site.pool.find(&site.id) {
                Err(StorageError::NotFound(_)) => return Ok(Disk::Absent),
                Err(StorageError::Damaged { problem, .. }) => return Ok(Disk::Damaged(problem)),
                record => record?,
            };
            match site.pool.check(&site.id) {
                Ok(()) => Ok(Disk::Whole {
                    name: record.volume.name.clone(),
                    size_bytes: record.volume.size_bytes,
                }),
                Err(StorageError::Damaged { problem, .. }) => Ok(Disk::Damaged(problem)),
                Err(error) => Err(error.into()),
            }
        })
        .await
    }

    /// Makes the backing store that the object asks for.
    pub(super) async fn make(&self, object: &NbdVolume) -> Result<(), VolumeError> {
        let spec = &object.spec;
        let format = object
            .status
            .as_ref()
            .and_then(|status| status.format.as_ref());
        let volume = Volume {
            id: self.id.clone(),
            name: spec.name.clone(),
            size_bytes: spec.size_bytes,
            options: VolumeOptions {
                content: spec.content,
                context: spec.context.clone(),
            },
            format: format.map_or(Format::Never, Format::from),
            attachments: Vec::new(),
        };
        self.blocking(|site| match site.pool.create(volume) {
            Ok(_) | Err(StorageError::Exists(_)) => Ok(()),
            Err(error) => Err(error.into()),
        })
        .await
    }

    /// Gives the volume's files to its server, and records how far formatting has come: should the API server's data be
    /// lost, the pool still knows. Returns what the pool knows of the format, and the size.
    pub(super) async fn settle(
        &self,
        format: Option<Format>,
    ) -> Result<(Format, u64), VolumeError> {
        self.blocking(move |site| {
            storage::give(&site.pool.directory(&site.id), SERVER)
                .map_err(io("give its files to its server"))?;
            let record = site.pool.update(&site.id, |record| {
                if let Some(format) = format
                    && is_forward(&record.volume.format, &format)
                {
                    record.volume.format = format;
                }
                Ok::<_, VolumeError>(())
            })?;
            Ok((record.volume.format.clone(), record.volume.size_bytes))
        })
        .await
    }

    pub(super) async fn grow(&self, size_bytes: u64) -> Result<(), VolumeError> {
        self.blocking(move |site| {
            site.pool.grow(&site.id, size_bytes)?;
            Ok(())
        })
        .await
    }

    /// Brings the server into line with what is asked or, where none is alive, the file that the next one reads. When
    /// this returns, no write of what is revoked can land any more.
    pub(super) async fn enforce(
        &self,
        access: &Access,
        size_bytes: u64,
    ) -> Result<Served, VolumeError> {
        match self.control().await {
            Ok((control, _directory)) => {
                let found = control.describe(&self.id).await?;
                for id in access.to_revoke(&found.allowed) {
                    control.revoke(&id).await?;
                }
                let unknown = access.allowed.iter();
                for (id, read_only) in unknown.filter(|(id, _)| !found.allowed.contains(id)) {
                    control.allow(id, *read_only).await?;
                }
                if found.size_bytes < size_bytes {
                    control.grow(size_bytes).await?;
                }
                Ok(Served {
                    epoch: Some(found.epoch),
                })
            }
            Err(VolumeError::Control(ControlError::Absent)) => {
                let access = access.clone();
                self.blocking(move |site| site.allow_only(&access)).await?;
                Ok(Served::default())
            }
            Err(error) => Err(error),
        }
    }

    /// Connects to the server by its directory's descriptor: the path of a pool may be too long for a socket's. The
    /// descriptor has to outlive the connection.
    async fn control(&self) -> Result<(Control, std::os::fd::OwnedFd), VolumeError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = openat(CWD, self.pool.directory(&self.id), flags, Mode::empty())
            .map_err(|errno| io("open its directory")(errno.into()))?;
        let descriptor = std::os::fd::AsRawFd::as_raw_fd(&directory);
        let path = format!("/proc/self/fd/{descriptor}/{CONTROL}");
        let control = Control::connect(Path::new(&path)).await?;
        Ok((control, directory))
    }

    fn allow_only(&self, access: &Access) -> Result<(), VolumeError> {
        let directory = self.pool.directory(&self.id);
        let vacancy = Vacancy::of(&directory)
            .map_err(io("lock it"))?
            .map_err(|_| VolumeError::Held)?;
        let allowed = access.allowed.iter();
        vacancy
            .allow_only(allowed.map(|(id, read_only)| (id, *read_only)))
            .map_err(io("write its attachments"))?;
        // While it is locked: the next server must be able to read them.
        storage::give(&directory, SERVER).map_err(io("give its files to its server"))
    }

    /// Deletes the volume, its data with it; refused while a server is alive.
    pub(super) async fn delete(&self) -> Result<(), VolumeError> {
        self.blocking(|site| {
            let vacancy = Vacancy::of(&site.pool.directory(&site.id))
                .map_err(io("lock it"))?
                .map_err(|_| VolumeError::Held)?;
            site.pool.delete(&site.id)?;
            drop(vacancy);
            Ok(())
        })
        .await
    }
}

fn is_forward(known: &Format, next: &Format) -> bool {
    match (known, next) {
        (Format::Done { .. }, _) | (_, Format::Never) => false,
        (Format::Never | Format::Started { .. }, _) => true,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::storage::Overcommit;
    use crate::volumes::{AttachmentId, Content};

    fn volume(id: &VolumeId) -> Volume {
        Volume {
            id: id.clone(),
            name: "pvc-1".to_owned(),
            size_bytes: 8192,
            options: VolumeOptions {
                content: Content::Block,
                context: BTreeMap::new(),
            },
            format: Format::Never,
            attachments: Vec::new(),
        }
    }

    fn site(home: &Path) -> Site {
        let id = VolumeId::from_bytes([1; 16]);
        let pool = Pool::open(home, Overcommit::NONE).unwrap();
        pool.create(volume(&id)).unwrap();
        let pool = Arc::new(pool);
        Site { id, pool }
    }

    #[tokio::test]
    async fn without_a_server_the_file_of_the_next_one_is_written_under_the_lock() {
        let home = tempfile::tempdir().unwrap();
        let site = site(home.path());
        let directory = site.pool.directory(&site.id);
        let id = AttachmentId::from_bytes([2; 16]);
        let access = Access {
            allowed: vec![(id.clone(), true)],
            revoked: vec![AttachmentId::from_bytes([3; 16])],
        };
        let written = || std::fs::read_to_string(directory.join("attachments.json")).unwrap();
        assert_eq!(
            site.enforce(&access, 8192).await.unwrap(),
            Served::default()
        );
        assert_eq!(
            written(),
            format!(r#"{{"attachments":{{"{id}":{{"read_only":true}}}}}}"#)
        );
        // A server that starts, and has no socket yet.
        let server = Vacancy::of(&directory).unwrap().unwrap();
        let nobody = Access::default();
        assert!(matches!(
            site.enforce(&nobody, 8192).await,
            Err(VolumeError::Held)
        ));
        assert!(matches!(site.delete().await, Err(VolumeError::Held)));
        assert!(written().contains(id.as_str()));
        drop(server);
        site.enforce(&nobody, 8192).await.unwrap();
        assert_eq!(written(), r#"{"attachments":{}}"#);
        site.delete().await.unwrap();
        assert_eq!(site.disk().await.unwrap(), Disk::Absent);
        assert!(!directory.exists());
    }

    #[tokio::test]
    async fn the_pool_remembers_the_format_and_never_goes_back() {
        let home = tempfile::tempdir().unwrap();
        let site = site(home.path());
        let done = Format::Done {
            fs: "ext4".to_owned(),
        };
        for (told, known) in [
            (None, Format::Never),
            (Some(done.clone()), done.clone()),
            (Some(Format::Never), done.clone()),
            (None, done.clone()),
        ] {
            assert_eq!(site.settle(told).await.unwrap(), (known, 8192));
        }
    }
}
