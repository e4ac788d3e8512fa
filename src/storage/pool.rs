//! The pool: its volumes, its promises, and the order of writes that makes each change all or nothing.
//!
//! A volume is built beside the others under a name that is none (`.creating-`), and appears by a rename; it disappears
//! by a rename (`.deleting-`) before anything of it is removed. What a crash leaves under such names is removed at the
//! next start.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::ops::Bound;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::OFlags;

use crate::volumes::{Capacity, Volume, VolumeId};

use super::size::{GRANULE, MAXIMUM};
use super::{Overcommit, Record, StorageError, durable, own};

const CREATING: &str = ".creating-";
const DELETING: &str = ".deleting-";
const DATA: &str = "data";
const IDENTITY: &str = "pool.json";

/// Bytes that are never promised, so that a volume that was still created can also be served.
const HEADROOM: u64 = 1 << 20;

/// Who a pool is, in `pool.json`: an empty mount point is not the pool that is missing from it.
#[derive(Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct Identity {
    version: u32,
    id: String,
}

/// A directory of volumes, owned by this process alone.
pub struct Pool {
    volumes: PathBuf,
    identity: String,
    overcommit: Mutex<Overcommit>,
    index: Mutex<BTreeMap<VolumeId, Slot>>,
    /// Held for as long as the pool is open.
    _lock: File,
}

/// What is known of one volume.
struct Slot {
    /// Bytes promised: the size, or the size it is growing to.
    promised: u64,
    state: State,
    /// Held while the volume's record is replaced or the volume removed, so that no change is lost.
    writing: Arc<Mutex<()>>,
}

/// Bytes of the pool's file system, as far as they are the pool's.
#[derive(Default)]
struct Room {
    free: u64,
    taken: u64,
    promised: u64,
}

enum State {
    /// The name is taken; the volume is not visible yet.
    Creating,
    Whole(Arc<Record>),
    /// There, but unreadable: it is neither served nor removed.
    Damaged(String),
}

impl Slot {
    fn new(promised: u64, state: State) -> Self {
        Self {
            promised,
            state,
            writing: Arc::default(),
        }
    }

    fn record(&self, id: &VolumeId) -> Result<Arc<Record>, StorageError> {
        match &self.state {
            State::Whole(record) => Ok(record.clone()),
            State::Creating => Err(StorageError::NotFound(id.clone())),
            State::Damaged(problem) => Err(StorageError::Damaged {
                volume: id.clone(),
                problem: problem.clone(),
            }),
        }
    }
}

impl Pool {
    /// Opens the pool in `directory`, makes it where there is none, and clears away what a crash left half done.
    pub fn open(directory: &Path, overcommit: Overcommit) -> Result<Self, StorageError> {
        let volumes = directory.join("volumes");
        make_directories(&volumes)?;
        let lock = lock(directory)?;
        let identity = match Self::identity_of(directory)? {
            Some(identity) => identity,
            None => make_identity(directory)?,
        };
        let index = Mutex::new(read_volumes(&volumes)?);
        Ok(Self {
            volumes,
            identity,
            overcommit: Mutex::new(overcommit),
            index,
            _lock: lock,
        })
    }

    /// The identity of the pool in `directory`; `None` where none was ever made there.
    pub fn identity_of(directory: &Path) -> Result<Option<String>, StorageError> {
        let path = directory.join(IDENTITY);
        let json = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            json => json.map_err(StorageError::io("read", &path))?,
        };
        let identity: Identity =
            serde_json::from_slice(&json).map_err(|error| StorageError::DamagedPool {
                problem: format!("{}: {error}", path.display()),
                path: directory.to_owned(),
            })?;
        Ok(Some(identity.id))
    }

    #[must_use]
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// The directory of one volume, whether it exists or not.
    #[must_use]
    pub fn directory(&self, id: &VolumeId) -> PathBuf {
        self.volumes.join(id.as_str())
    }

    pub fn find(&self, id: &VolumeId) -> Result<Arc<Record>, StorageError> {
        let index = self.index();
        let slot = index.get(id);
        slot.ok_or_else(|| StorageError::NotFound(id.clone()))?
            .record(id)
    }

    /// The volumes after `after`, in the order of their ids. Damaged ones are left out: nothing is known of them.
    #[must_use]
    pub fn list(&self, after: Option<&VolumeId>, most: usize) -> Vec<Arc<Record>> {
        let start = after.map_or(Bound::Unbounded, Bound::Excluded);
        self.index()
            .range::<VolumeId, _>((start, Bound::Unbounded))
            .filter_map(|(id, slot)| slot.record(id).ok())
            .take(most)
            .collect()
    }

    /// Whether anything of that name is there, readable or not.
    #[must_use]
    pub fn holds(&self, id: &VolumeId) -> bool {
        self.index().contains_key(id)
    }

    /// The ids of all whose directories are there, readable or not.
    #[must_use]
    pub fn ids(&self) -> Vec<VolumeId> {
        let known: Vec<_> = self.index().keys().cloned().collect();
        let is_there = |id: &VolumeId| self.directory(id).exists();
        known.into_iter().filter(is_there).collect()
    }

    /// Looks at a volume's directory anew: somebody may have put it into the pool, mended it or deleted it since the pool
    /// was opened. A volume that can be read stays as it is.
    pub fn refresh(&self, id: &VolumeId) {
        let directory = self.directory(id);
        let mut index = self.index();
        let is_there = directory.is_dir();
        match index.get(id).map(|slot| &slot.state) {
            None if is_there => {
                tracing::info!(volume = %id, "found in the pool, and taken in");
                index.insert(id.clone(), read_volume(&directory, id));
            }
            Some(State::Whole(_) | State::Damaged(_)) if !is_there => {
                tracing::error!(volume = %id, "somebody deleted its directory: its data is lost");
                index.remove(id);
            }
            Some(State::Damaged(_)) => {
                index.insert(id.clone(), read_volume(&directory, id));
            }
            None | Some(State::Whole(_) | State::Creating) => {}
        }
    }

    /// Promises as much from now on; what was promised stays.
    pub fn set_overcommit(&self, overcommit: Overcommit) {
        *self.ratio() = overcommit;
    }

    /// Bytes that may be promised altogether, to the volumes that are there and to new ones.
    pub fn promisable(&self) -> Result<u64, StorageError> {
        let room = self.room(&self.index())?;
        Ok(self.ratio().whole(room.free, room.taken))
    }

    /// Room for new volumes.
    pub fn capacity(&self) -> Result<Capacity, StorageError> {
        let available_bytes = self.available(&self.index())?;
        Ok(Capacity {
            available_bytes,
            maximum_volume_bytes: available_bytes.min(MAXIMUM),
        })
    }

    /// Makes an empty volume of `volume.size_bytes`, a multiple of 4096.
    pub fn create(&self, volume: Volume) -> Result<Arc<Record>, StorageError> {
        let (id, size) = (volume.id.clone(), volume.size_bytes);
        {
            let mut index = self.index();
            match index.get(&id).map(|slot| slot.record(&id)) {
                None => {}
                Some(Ok(_)) => return Err(StorageError::Exists(id)),
                Some(Err(StorageError::NotFound(_))) => return Err(StorageError::InFlight(id)),
                Some(Err(damaged)) => return Err(damaged),
            }
            self.check_room(&index, &id, size)?;
            index.insert(id.clone(), Slot::new(size, State::Creating));
        }
        let record = Arc::new(Record::new(volume));
        match self.build(&record) {
            Ok(()) => {
                if let Some(slot) = self.index().get_mut(&id) {
                    slot.state = State::Whole(record.clone());
                }
                Ok(record)
            }
            Err(error) => {
                self.index().remove(&id);
                Err(error)
            }
        }
    }

    fn build(&self, record: &Record) -> Result<(), StorageError> {
        let id = &record.volume.id;
        let fresh = self.volumes.join(format!("{CREATING}{id}"));
        let built = remove_tree(&fresh).and_then(|()| {
            DirBuilder::new()
                .mode(0o700)
                .create(&fresh)
                .map_err(StorageError::io("create", &fresh))?;
            make_data(&fresh, id, record.volume.size_bytes)?;
            record.write(&fresh)?;
            self.rename(&fresh, &self.directory(id))
        });
        if built.is_err() {
            // The error that counts is the first one. The rename may have happened, and only its durability failed.
            let _ = remove_tree(&fresh).and(remove_tree(&self.directory(id)));
        }
        built
    }

    /// Changes a volume's record, durably. What `change` refuses, or returns unchanged, is not written.
    pub fn update<E: From<StorageError>>(
        &self,
        id: &VolumeId,
        change: impl FnOnce(&mut Record) -> Result<(), E>,
    ) -> Result<Arc<Record>, E> {
        self.exclusively(id, |before| {
            let mut record = Record::clone(&before);
            change(&mut record)?;
            if record == *before {
                return Ok(before);
            }
            Ok(self.store(record)?)
        })
    }

    /// Grows the volume to `size` bytes, a multiple of 4096; it never shrinks. Returns the record as it is then.
    ///
    /// The file is grown first and the record after it: a file that is shorter than its record says is then always a
    /// truncated one, and never mistaken for one that was growing when the process died.
    pub fn grow(&self, id: &VolumeId, size: u64) -> Result<Arc<Record>, StorageError> {
        self.exclusively(id, |before| {
            let present = before.volume.size_bytes;
            if size <= present {
                return Ok(before);
            }
            self.check(id)?;
            {
                let mut index = self.index();
                self.check_room(&index, id, size - present)?;
                if let Some(slot) = index.get_mut(id) {
                    slot.promised = size;
                }
            }
            let grown = grow_data(&self.directory(id), id, size).and_then(|()| {
                let mut record = Record::clone(&before);
                record.volume.size_bytes = size;
                self.store(record)
            });
            if grown.is_err()
                && let Some(slot) = self.index().get_mut(id)
            {
                slot.promised = present;
            }
            grown
        })
    }

    /// Removes the volume and its data. Removing what is not there finishes a removal that failed half way.
    pub fn delete(&self, id: &VolumeId) -> Result<(), StorageError> {
        let doomed = self.volumes.join(format!("{DELETING}{id}"));
        let removed = self.exclusively(id, |_| {
            remove_tree(&doomed)?;
            let directory = self.directory(id);
            // Somebody may have removed it by hand.
            if directory.exists() {
                self.rename(&directory, &doomed)?;
            }
            self.index().remove(id);
            Ok(())
        });
        match removed {
            Ok(()) | Err(StorageError::NotFound(_)) => remove_tree(&doomed),
            Err(error) => Err(error),
        }
    }

    /// Makes the directory of a volume again, empty, where somebody deleted it: so the volume, which is lost and never
    /// served, can still be detached and deleted. Refused where the whole pool is not there, for it may come back.
    pub fn restore_directory(&self, id: &VolumeId) -> Result<(), StorageError> {
        let directory = self.directory(id);
        if !self.holds(id)
            || fs::exists(&directory).map_err(StorageError::io("find", &directory))?
        {
            return Ok(());
        }
        let pool = self.volumes.parent().unwrap_or(&self.volumes);
        if Self::identity_of(pool)?.as_ref() != Some(&self.identity) {
            return Err(StorageError::DamagedPool {
                path: pool.to_owned(),
                problem: format!("{IDENTITY} is missing or another; is the pool mounted?"),
            });
        }
        tracing::error!(volume = %id, "somebody deleted its directory: its data is lost");
        match DirBuilder::new().mode(0o700).create(&directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                Err(StorageError::io("create", &directory)(error))
            }
            _ => Ok(()),
        }
    }

    /// Refuses a volume whose data is not as its record says: served, it would answer with what was never written.
    pub fn check(&self, id: &VolumeId) -> Result<(), StorageError> {
        let size = self.find(id)?.volume.size_bytes;
        let path = self.directory(id).join(DATA);
        let damaged = |problem: String| StorageError::Damaged {
            volume: id.clone(),
            problem: format!("{}: {problem}", path.display()),
        };
        let data = fs::symlink_metadata(&path).map_err(|error| damaged(error.to_string()))?;
        if !data.is_file() {
            return Err(damaged("it is not a file".to_owned()));
        }
        if data.len() < size {
            return Err(damaged(format!(
                "it was truncated to {} bytes, and the volume has {size}",
                data.len()
            )));
        }
        Ok(())
    }

    /// Runs `change` while nobody else changes that volume.
    fn exclusively<T, E: From<StorageError>>(
        &self,
        id: &VolumeId,
        change: impl FnOnce(Arc<Record>) -> Result<T, E>,
    ) -> Result<T, E> {
        let missing = || StorageError::NotFound(id.clone());
        let writing = {
            let index = self.index();
            index.get(id).ok_or_else(missing)?.writing.clone()
        };
        let _writing = writing.lock().unwrap_or_else(PoisonError::into_inner);
        let record = self.find(id)?;
        change(record)
    }

    fn store(&self, record: Record) -> Result<Arc<Record>, StorageError> {
        let id = record.volume.id.clone();
        record.write(&self.directory(&id))?;
        let record = Arc::new(record);
        if let Some(slot) = self.index().get_mut(&id) {
            slot.promised = record.volume.size_bytes;
            slot.state = State::Whole(record.clone());
        }
        Ok(record)
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<(), StorageError> {
        fs::rename(from, to)
            .and_then(|()| durable::sync(&self.volumes))
            .map_err(StorageError::io("rename", from))
    }

    fn check_room(
        &self,
        index: &BTreeMap<VolumeId, Slot>,
        id: &VolumeId,
        wanted: u64,
    ) -> Result<(), StorageError> {
        let available = self.available(index)?;
        if wanted <= available {
            return Ok(());
        }
        Err(StorageError::NoRoom {
            volume: id.clone(),
            wanted,
            available,
        })
    }

    /// Bytes that may still be promised.
    fn available(&self, index: &BTreeMap<VolumeId, Slot>) -> Result<u64, StorageError> {
        let room = self.room(index)?;
        let left = self.ratio().left(room.free, room.taken, room.promised);
        Ok(left / GRANULE * GRANULE)
    }

    /// The pool's own room is what is free and what its volumes have taken: other files on the same file system take
    /// theirs out of it.
    fn room(&self, index: &BTreeMap<VolumeId, Slot>) -> Result<Room, StorageError> {
        let file_system = rustix::fs::statvfs(&self.volumes)
            .map_err(|error| StorageError::io("inspect", &self.volumes)(error.into()))?;
        let free = file_system.f_bavail.saturating_mul(file_system.f_frsize);
        let mut room = Room {
            free: free.saturating_sub(HEADROOM),
            ..Room::default()
        };
        for (id, slot) in index {
            room.promised = room.promised.saturating_add(slot.promised);
            if let Ok(data) = fs::metadata(self.directory(id).join(DATA)) {
                room.taken = room.taken.saturating_add(data.blocks().saturating_mul(512));
            }
        }
        Ok(room)
    }

    fn ratio(&self) -> MutexGuard<'_, Overcommit> {
        self.overcommit
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn index(&self) -> MutexGuard<'_, BTreeMap<VolumeId, Slot>> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn make_directories(path: &Path) -> Result<(), StorageError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(StorageError::io("create", path))
}

fn lock(directory: &Path) -> Result<File, StorageError> {
    let path = directory.join("lock");
    own(&path)
        .map_err(StorageError::io("lock", &path))?
        .ok_or_else(|| StorageError::Busy(directory.to_owned()))
}

fn make_identity(directory: &Path) -> Result<String, StorageError> {
    let failed = StorageError::io("write", &directory.join(IDENTITY));
    let identity = || {
        let id = fs::read_to_string("/proc/sys/kernel/random/uuid")?;
        let identity = Identity {
            version: 1,
            id: id.trim().to_owned(),
        };
        let json = serde_json::to_vec(&identity).map_err(io::Error::other)?;
        durable::replace(&directory.join(IDENTITY), &json)?;
        Ok(identity.id)
    };
    identity().map_err(failed)
}

fn read_volumes(volumes: &Path) -> Result<BTreeMap<VolumeId, Slot>, StorageError> {
    let mut index = BTreeMap::new();
    for entry in fs::read_dir(volumes).map_err(StorageError::io("read", volumes))? {
        let path = entry.map_err(StorageError::io("read", volumes))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with(CREATING) || name.starts_with(DELETING) {
            tracing::info!(path = %path.display(), "removing what an interrupted call left");
            remove_tree(&path)?;
        } else if let Ok(id) = name.parse::<VolumeId>() {
            let slot = read_volume(&path, &id);
            index.insert(id, slot);
        } else {
            tracing::warn!(path = %path.display(), "not a volume: left alone");
        }
    }
    durable::sync(volumes).map_err(StorageError::io("write", volumes))?;
    Ok(index)
}

/// Reads one volume, and completes a growth that was interrupted between file and record.
fn read_volume(directory: &Path, id: &VolumeId) -> Slot {
    let length = fs::metadata(directory.join(DATA)).map_or(0, |data| data.len());
    let read = Record::read(directory, id).and_then(|mut record| {
        if length > record.volume.size_bytes && length.is_multiple_of(GRANULE) {
            tracing::info!(volume = %id, bytes = length, "completing an interrupted growth");
            record.volume.size_bytes = length;
            record.write(directory)?;
        }
        Ok(record)
    });
    match read {
        Ok(record) => Slot::new(record.volume.size_bytes, State::Whole(Arc::new(record))),
        Err(error) => {
            tracing::error!(volume = %id, %error, "the volume is out of use");
            let problem = match error {
                StorageError::Damaged { problem, .. } => problem,
                other => other.to_string(),
            };
            Slot::new(length, State::Damaged(problem))
        }
    }
}

fn make_data(directory: &Path, id: &VolumeId, size: u64) -> Result<(), StorageError> {
    let path = directory.join(DATA);
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)
        .map_err(StorageError::io("create", &path))?;
    set_length(&file, &path, id, size)
}

fn grow_data(directory: &Path, id: &VolumeId, size: u64) -> Result<(), StorageError> {
    let path = directory.join(DATA);
    let failed = || StorageError::io("open", &path);
    let file = OpenOptions::new()
        .write(true)
        .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
        .open(&path)
        .map_err(failed())?;
    if file.metadata().map_err(failed())?.len() > size {
        // A growth that was given up after the file had grown: what is served must never shrink.
        return Ok(());
    }
    set_length(&file, &path, id, size)
}

fn set_length(file: &File, path: &Path, id: &VolumeId, size: u64) -> Result<(), StorageError> {
    file.set_len(size).map_err(|error| match error.kind() {
        io::ErrorKind::FileTooLarge | io::ErrorKind::InvalidInput => StorageError::TooLarge {
            volume: id.clone(),
            size,
        },
        _ => StorageError::io("set the length of", path)(error),
    })?;
    file.sync_all().map_err(StorageError::io("write", path))
}

/// Removes a directory and everything in it; what is not there is removed already.
fn remove_tree(path: &Path) -> Result<(), StorageError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(StorageError::io("remove", path)(error))
        }
        _ => Ok(()),
    }
}
