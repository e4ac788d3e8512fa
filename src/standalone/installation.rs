//! The volumes of one machine: the calls of [`Volumes`] and [`NodeVolumes`], each in steps that a crash may separate.
//!
//! A call that changes something runs in a task of its own, so that a caller who goes away does not leave it half done,
//! and holds its volume's lock meanwhile.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex as StdMutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{Mutex, OwnedMutexGuard};
use tokio_util::task::TaskTracker;

use crate::storage::{Overcommit, Record, StorageError, size};
use crate::volumes::{
    AccessMode, Attachment, AttachmentId, Capacity, CreateRequest, Format, NodeVolumes, Placement,
    Volume, VolumeId, Volumes, VolumesError,
};

use super::foreign::Foreign;
use super::server::Server;
use super::site::{Ground, Site};
use crate::admission::{Admission, Wanted, admit, check_format, check_name, check_same};

/// How long a call waits for another one on the same volume.
const TURN: Duration = Duration::from_secs(10);

/// How long CreateVolume waits for the server: behind hundreds of others, it starts late.
const CREATED: Duration = Duration::from_secs(120);

/// How long a node waits for a server that is being started again.
const ENDPOINT: Duration = Duration::from_secs(15);

/// Where everything is, and what is allowed.
#[derive(Debug, Clone)]
pub struct Settings {
    pub state: PathBuf,
    pub secrets: PathBuf,
    pub pool: PathBuf,
    pub overcommit: Overcommit,
    /// The program whose `serve` serves a volume: this one.
    pub program: PathBuf,
    /// Where servers listen; with port 0 each takes a free one.
    pub listen: SocketAddr,
    /// The nodes that volumes can be attached to.
    pub nodes: BTreeSet<String>,
    /// Volumes that may be attached to one node at a time.
    pub volumes_per_node: Option<u64>,
}

/// All volumes of this machine. Cheap to clone.
#[derive(Clone)]
pub struct Installation(pub(super) Arc<Inner>);

pub(super) struct Inner {
    pub(super) ground: Arc<Ground>,
    pub(super) foreign: Foreign,
    pub(super) nodes: BTreeSet<String>,
    pub(super) volumes_per_node: Option<u64>,
    pub(super) servers: StdMutex<HashMap<VolumeId, Arc<Server>>>,
    /// One lock for each volume on which a call is under way.
    pub(super) turns: StdMutex<HashMap<VolumeId, Weak<Mutex<()>>>>,
    /// Held while a node's attachments are counted and one is added.
    pub(super) admitting: Mutex<()>,
    pub(super) calls: TaskTracker,
    /// Held for as long as the state directory is ours.
    pub(super) _lock: File,
}

pub(super) fn internal(doing: &str) -> VolumesError {
    VolumesError::Internal {
        doing: doing.to_owned(),
        source: None,
    }
}

fn locked<T>(mutex: &StdMutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Inner {
    /// The task that looks after that volume's server, begun if there is none.
    pub(super) fn server(&self, id: &VolumeId) -> Arc<Server> {
        let mut servers = locked(&self.servers);
        let keep = || {
            Server::keep(Site {
                volume: id.clone(),
                ground: Arc::clone(&self.ground),
            })
        };
        Arc::clone(servers.entry(id.clone()).or_insert_with(keep))
    }

    pub(super) fn all_servers(&self) -> Vec<Arc<Server>> {
        locked(&self.servers).values().cloned().collect()
    }

    /// Waits for this volume's turn.
    pub(super) async fn turn(&self, id: &VolumeId) -> Result<OwnedMutexGuard<()>, VolumesError> {
        let turn = {
            let mut turns = locked(&self.turns);
            turns.retain(|_, turn| turn.strong_count() > 0);
            let known = turns.get(id).and_then(Weak::upgrade);
            let turn = known.unwrap_or_default();
            turns.insert(id.clone(), Arc::downgrade(&turn));
            turn
        };
        let turn = tokio::time::timeout(TURN, turn.lock_owned()).await;
        turn.map_err(|_| VolumesError::Unavailable {
            volume: id.to_string(),
            doing: "another operation on it is under way".to_owned(),
            source: None,
        })
    }

    /// Does what may block where that may be done.
    pub(super) async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Ground) -> Result<T, VolumesError> + Send + 'static,
    ) -> Result<T, VolumesError> {
        let ground = Arc::clone(&self.ground);
        let done = tokio::task::spawn_blocking(move || work(&ground)).await;
        done.unwrap_or_else(|_| Err(internal("the call was given up")))
    }

    async fn record(&self, id: &VolumeId) -> Result<Arc<Record>, VolumesError> {
        let id = id.clone();
        self.blocking(move |ground| Ok(ground.pool.find(&id)?))
            .await
    }

    async fn update(
        &self,
        id: &VolumeId,
        change: impl FnOnce(&mut Record) -> Result<(), VolumesError> + Send + 'static,
    ) -> Result<Arc<Record>, VolumesError> {
        let id = id.clone();
        self.blocking(move |ground| ground.pool.update(&id, change))
            .await
    }

    async fn create(&self, request: CreateRequest) -> Result<Volume, VolumesError> {
        check_name(&request.name)?;
        let size_bytes = size::settle(request.required_bytes, request.limit_bytes)
            .map_err(StorageError::from)?;
        let id = VolumeId::of_name(&request.name);
        let _turn = self.turn(&id).await?;
        let volume = id.clone();
        let record = self
            .blocking(move |ground| find_or_make(ground, volume, size_bytes, request))
            .await?;
        self.server(&id).endpoint(CREATED).await?;
        Ok(record.volume.clone())
    }

    async fn delete(&self, id: &VolumeId) -> Result<(), VolumesError> {
        let _turn = self.turn(id).await?;
        match self.record(id).await {
            Err(VolumesError::NotFound(_)) => return self.clear(id).await,
            record => {
                if let Some(attachment) = record?.volume.attachments.first() {
                    return Err(VolumesError::InUse {
                        volume: id.to_string(),
                        node: attachment.node.clone(),
                    });
                }
            }
        }
        self.restore_directory(id).await?;
        self.finish_revoking(id).await?;
        let server = locked(&self.servers).remove(id);
        let stopped = match server {
            Some(server) => server.stop().await,
            None => Ok(()),
        };
        let cleared = match stopped {
            Ok(()) => self.clear(id).await,
            Err(error) => Err(error),
        };
        if cleared.is_err() && self.ground.pool.holds(id) {
            // It is still there, so it is still served.
            self.server(id);
        }
        cleared
    }

    /// Removes everything a volume has; data first, so that a volume is never there without its Secrets.
    pub(super) async fn clear(&self, id: &VolumeId) -> Result<(), VolumesError> {
        let site = Site {
            volume: id.clone(),
            ground: Arc::clone(&self.ground),
        };
        self.blocking(move |ground| {
            ground.pool.delete(&site.volume)?;
            ground.secrets.remove(&site.volume)?;
            let directory = site.directory();
            match std::fs::remove_dir_all(&directory) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    Err(VolumesError::Internal {
                        doing: format!("cannot remove {}", directory.display()),
                        source: Some(error.into()),
                    })
                }
                _ => Ok(()),
            }
        })
        .await
    }

    async fn attach(&self, id: &VolumeId, wanted: Wanted) -> Result<Attachment, VolumesError> {
        let _turn = self.turn(id).await?;
        self.record(id).await?;
        if !self.nodes.contains(&wanted.node) {
            return Err(VolumesError::NodeNotFound(wanted.node));
        }
        // Whoever held the volume before must be gone before somebody else comes.
        self.finish_revoking(id).await?;
        let attachment = {
            let _admitting = self.admitting.lock().await;
            let record = self.record(id).await?;
            match admit(id.as_str(), &record.volume.attachments, &wanted)? {
                Admission::Present(present) => present,
                Admission::Granted => {
                    self.check_node(&wanted.node)?;
                    let granted = wanted.granted(AttachmentId::random()?);
                    let recorded = granted.clone();
                    let add = |record: &mut Record| {
                        record.volume.attachments.push(recorded);
                        Ok(())
                    };
                    self.update(id, add).await?;
                    granted
                }
            }
        };
        self.server(id).allow(&attachment).await?;
        Ok(attachment)
    }

    fn check_node(&self, node: &str) -> Result<(), VolumesError> {
        let Some(limit) = self.volumes_per_node else {
            return Ok(());
        };
        let is_there = |record: &&Arc<Record>| {
            let mut attachments = record.volume.attachments.iter();
            attachments.any(|attachment| attachment.node == node)
        };
        let volumes = self.ground.pool.list(None, usize::MAX);
        let foreign = self.foreign.attached_to(node)?;
        let attached = volumes.iter().filter(is_there).count() + foreign;
        if u64::try_from(attached).is_ok_and(|attached| attached < limit) {
            return Ok(());
        }
        Err(VolumesError::NodeFull {
            node: node.to_owned(),
            limit,
        })
    }

    async fn detach(&self, id: &VolumeId, node: Option<String>) -> Result<(), VolumesError> {
        let _turn = self.turn(id).await?;
        self.restore_directory(id).await?;
        let revoke = move |record: &mut Record| {
            let attachments = &mut record.volume.attachments;
            let leaves = |one: &mut Attachment| node.as_ref().is_none_or(|node| one.node == *node);
            record.revoking.extend(attachments.extract_if(.., leaves));
            Ok(())
        };
        match self.update(id, revoke).await {
            // What is not there is attached to nobody.
            Err(VolumesError::NotFound(_)) => Ok(()),
            Err(error) => Err(error),
            Ok(_) => self.finish_revoking(id).await,
        }
    }

    async fn attach_foreign(
        &self,
        handle: String,
        wanted: Wanted,
    ) -> Result<Attachment, VolumesError> {
        let id = VolumeId::foreign(&handle);
        let _turn = self.turn(&id).await?;
        if !self.nodes.contains(&wanted.node) {
            return Err(VolumesError::NodeNotFound(wanted.node));
        }
        let _admitting = self.admitting.lock().await;
        let mut used = self.foreign.find(&handle)?;
        match admit(&handle, &used, &wanted)? {
            Admission::Present(present) => Ok(present),
            Admission::Granted => {
                self.check_node(&wanted.node)?;
                let granted = wanted.granted(AttachmentId::random()?);
                used.push(granted.clone());
                self.foreign.set(&handle, used)?;
                Ok(granted)
            }
        }
    }

    async fn detach_foreign(&self, handle: &str, node: Option<String>) -> Result<(), VolumesError> {
        let _turn = self.turn(&VolumeId::foreign(handle)).await?;
        let mut used = self.foreign.find(handle)?;
        used.retain(|one| node.as_ref().is_some_and(|node| one.node != *node));
        self.foreign.set(handle, used)
    }

    async fn restore_directory(&self, id: &VolumeId) -> Result<(), VolumesError> {
        let id = id.clone();
        self.blocking(move |ground| Ok(ground.pool.restore_directory(&id)?))
            .await
    }

    /// Revokes what is recorded as revoked, and forgets it when no write of it can land any more.
    async fn finish_revoking(&self, id: &VolumeId) -> Result<(), VolumesError> {
        let revoking = self.record(id).await?.revoking.clone();
        if revoking.is_empty() {
            return Ok(());
        }
        let server = self.server(id);
        for attachment in &revoking {
            server.revoke(attachment).await?;
        }
        let forget = move |record: &mut Record| {
            record.revoking.retain(|one| !revoking.contains(one));
            Ok(())
        };
        self.update(id, forget).await?;
        Ok(())
    }

    async fn grow(
        &self,
        id: &VolumeId,
        required: u64,
        limit: Option<u64>,
    ) -> Result<u64, VolumesError> {
        let _turn = self.turn(id).await?;
        let wanted = size::settle(required, limit).map_err(StorageError::from)?;
        let present = self.record(id).await?.volume.size_bytes;
        if let Some(limit) = limit.filter(|limit| *limit < present) {
            return Err(VolumesError::OutOfRange(format!(
                "volume {id} has {present} bytes, above the limit of {limit}: volumes never shrink"
            )));
        }
        let volume = id.clone();
        let grow = move |ground: &Ground| Ok(ground.pool.grow(&volume, wanted)?);
        let size_bytes = self.blocking(grow).await?.volume.size_bytes;
        self.server(id).grow(size_bytes).await?;
        Ok(size_bytes)
    }
}

/// Secrets come before the volume, so that a volume that is there has them.
fn find_or_make(
    ground: &Ground,
    id: VolumeId,
    size_bytes: u64,
    request: CreateRequest,
) -> Result<Arc<Record>, VolumesError> {
    match ground.pool.find(&id) {
        Ok(record) => {
            check_same(&record.volume, &request)?;
            ground.secrets.ensure(&id)?;
            return Ok(record);
        }
        Err(StorageError::NotFound(_)) => {}
        Err(error) => return Err(error.into()),
    }
    let made = ground
        .secrets
        .ensure(&id)
        .map_err(VolumesError::from)
        .and_then(|()| {
            let volume = Volume {
                id: id.clone(),
                name: request.name,
                size_bytes,
                options: request.options,
                format: Format::Never,
                attachments: Vec::new(),
            };
            Ok(ground.pool.create(volume)?)
        });
    if made.is_err() && !ground.pool.holds(&id) {
        // The error that counts is the first one; the next start clears away what is left.
        let _ = ground.secrets.remove(&id);
    }
    made
}

impl Installation {
    /// Runs a call to its end, whether its caller waits for it or not.
    async fn call<T, F>(&self, work: impl FnOnce(Arc<Inner>) -> F) -> Result<T, VolumesError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, VolumesError>> + Send + 'static,
    {
        let done = self.0.calls.spawn(work(Arc::clone(&self.0))).await;
        done.unwrap_or_else(|_| Err(internal("the call was given up")))
    }
}

#[tonic::async_trait]
impl Volumes for Installation {
    async fn create(&self, request: CreateRequest) -> Result<Volume, VolumesError> {
        self.call(|inner| async move { inner.create(request).await })
            .await
    }

    async fn find(&self, id: &VolumeId) -> Result<Volume, VolumesError> {
        Ok(self.0.record(id).await?.volume.clone())
    }

    async fn list(
        &self,
        after: Option<&VolumeId>,
        most: usize,
    ) -> Result<Vec<Volume>, VolumesError> {
        let records = self.0.ground.pool.list(after, most);
        Ok(records.iter().map(|record| record.volume.clone()).collect())
    }

    async fn delete(&self, id: &VolumeId) -> Result<(), VolumesError> {
        let id = id.clone();
        self.call(|inner| async move { inner.delete(&id).await })
            .await
    }

    async fn attach(
        &self,
        id: &VolumeId,
        node: &str,
        mode: AccessMode,
        read_only: bool,
    ) -> Result<Attachment, VolumesError> {
        let (id, wanted) = (id.clone(), Wanted::new(node, mode, read_only));
        self.call(|inner| async move { inner.attach(&id, wanted).await })
            .await
    }

    async fn detach(&self, id: &VolumeId, node: Option<&str>) -> Result<(), VolumesError> {
        let (id, node) = (id.clone(), node.map(str::to_owned));
        self.call(|inner| async move { inner.detach(&id, node).await })
            .await
    }

    async fn grow(
        &self,
        id: &VolumeId,
        required_bytes: u64,
        limit_bytes: Option<u64>,
    ) -> Result<u64, VolumesError> {
        let id = id.clone();
        self.call(|inner| async move { inner.grow(&id, required_bytes, limit_bytes).await })
            .await
    }

    async fn attach_foreign(
        &self,
        handle: &str,
        node: &str,
        mode: AccessMode,
        read_only: bool,
    ) -> Result<Attachment, VolumesError> {
        let (handle, wanted) = (handle.to_owned(), Wanted::new(node, mode, read_only));
        self.call(|inner| async move { inner.attach_foreign(handle, wanted).await })
            .await
    }

    async fn detach_foreign(&self, handle: &str, node: Option<&str>) -> Result<(), VolumesError> {
        let (handle, node) = (handle.to_owned(), node.map(str::to_owned));
        self.call(|inner| async move { inner.detach_foreign(&handle, node).await })
            .await
    }

    async fn capacity(&self, _: &Placement) -> Result<Capacity, VolumesError> {
        self.0.blocking(|ground| Ok(ground.pool.capacity()?)).await
    }
}

#[tonic::async_trait]
impl NodeVolumes for Installation {
    async fn find(&self, id: &VolumeId) -> Result<Volume, VolumesError> {
        Ok(self.0.record(id).await?.volume.clone())
    }

    async fn endpoint(&self, id: &VolumeId) -> Result<SocketAddr, VolumesError> {
        self.0.record(id).await?;
        self.0.server(id).endpoint(ENDPOINT).await
    }

    async fn client_secret(
        &self,
        id: &VolumeId,
    ) -> Result<BTreeMap<String, Vec<u8>>, VolumesError> {
        self.0.record(id).await?;
        let id = id.clone();
        self.0
            .blocking(move |ground| Ok(ground.secrets.client(&id)?))
            .await
    }

    async fn set_format(&self, id: &VolumeId, format: Format) -> Result<(), VolumesError> {
        let id = id.clone();
        self.call(|inner| async move {
            let set = |record: &mut Record| {
                check_format(&record.volume, &format)?;
                record.volume.format = format;
                Ok(())
            };
            inner.update(&id, set).await.map(|_| ())
        })
        .await
    }
}
