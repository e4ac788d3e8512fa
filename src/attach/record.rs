//! What this node durably knows of each device it made: enough to look after it when the process that made it is
//! gone, and nothing secret.
//!
//! A record is on disk before its device exists, and goes only after it: a device without a record is therefore
//! not ours to touch, and a record without a device is an attach or a detach that was interrupted.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::Transport;
use super::backend::Backend;
use super::foreign::Foreign;
use super::session::Peer;
use crate::nbd::TransmissionFlags;
use crate::storage::replace;
use crate::volumes::{AttachmentId, VolumeId};

/// A record is some hundred bytes long, a foreign export's name some thousand at most; each of at most 16 connections
/// adds some twenty.
const LIMIT: u64 = 64 << 10;

/// One device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) volume: VolumeId,
    pub(super) attachment: AttachmentId,
    /// Where the volume is, if its server is not Hawser's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) foreign: Option<Foreign>,
    /// Where the server was when the last socket was made: for people, since each new socket asks again.
    pub(super) server: SocketAddr,
    pub(super) transport: Transport,
    pub(super) read_only: bool,
    /// The transmission flags that the server sent and the kernel relies on.
    #[serde(with = "flags")]
    pub(super) flags: TransmissionFlags,
    /// The epoch in the server's description; servers that are not Hawser's have none.
    pub(super) epoch: Option<u64>,
    pub(super) maximum_payload: Option<u32>,
    #[serde(default = "usual_block_size")]
    pub(super) block_size_bytes: u64,
    /// The least that the server offered on any of the connections: a foreign server may keep each at the size that the
    /// export had when it began.
    #[serde(default)]
    pub(super) served_bytes: u64,
    /// Sockets the device has; less than asked for where the server does not offer CAN_MULTI_CONN.
    pub(super) connections: u8,
    pub(super) timeout_seconds: u64,
    pub(super) dead_timeout_seconds: u64,
    /// The inodes of the sockets that were given to the kernel, dead ones perhaps among them. A socket is named here
    /// before the kernel gets it.
    pub(super) sockets: Vec<u64>,
    /// Why the device was given up.
    pub(super) failed: Option<String>,
}

/// Of devices that were made before it was recorded: most servers take any.
fn usual_block_size() -> u64 {
    super::session::BLOCK_SIZE
}

mod flags {
    use serde::{Deserialize, Deserializer, Serializer};

    use crate::nbd::TransmissionFlags;

    #[allow(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
    pub(super) fn serialize<S: Serializer>(
        flags: &TransmissionFlags,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_u16(flags.0)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<TransmissionFlags, D::Error> {
        u16::deserialize(deserializer).map(TransmissionFlags)
    }
}

impl Record {
    pub(super) fn peer(&self) -> Peer {
        Peer {
            backend: self.backend(),
            foreign: self.foreign.clone(),
        }
    }

    pub(super) fn backend(&self) -> Backend {
        Backend {
            volume: self.volume.clone(),
            attachment: self.attachment.clone(),
        }
    }
}

/// The directory of the records, locked for as long as this process looks after their devices.
#[derive(Debug)]
pub(super) struct Records {
    directory: PathBuf,
    _lock: File,
}

impl Records {
    /// Opens the directory, made where there is none. Fails if another process has it.
    pub(super) fn open(directory: &Path) -> io::Result<Self> {
        fs::create_dir_all(directory)?;
        let lock = File::create(directory.join("lock"))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|error| {
            io::Error::new(
                io::Error::from(error).kind(),
                "another process looks after these devices",
            )
        })?;
        Ok(Self {
            directory: directory.to_owned(),
            _lock: lock,
        })
    }

    pub(super) fn find(&self, volume: &VolumeId) -> io::Result<Option<Record>> {
        read(&self.path(volume))
    }

    /// Every record that can be read; of the others only the log speaks, since one must not keep the rest from being
    /// looked after.
    pub(super) fn all(&self) -> io::Result<Vec<Record>> {
        let mut records = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            let name = entry?.file_name();
            let volume = name.to_str().and_then(|name| name.strip_suffix(".json"));
            let Some(volume) = volume.and_then(|volume| volume.parse().ok()) else {
                continue;
            };
            match self.find(&volume) {
                Ok(record) => records.extend(record),
                Err(error) => tracing::error!("{error}"),
            }
        }
        records.sort_by(|a, b| a.volume.cmp(&b.volume));
        Ok(records)
    }

    /// Writes the record; it is durable when this returns.
    pub(super) fn save(&self, record: &Record) -> io::Result<()> {
        let bytes = serde_json::to_vec_pretty(record)?;
        replace(&self.directory.join(file_name(&record.volume)), &bytes)
    }

    /// Removes the record, if there is one.
    pub(super) fn remove(&self, volume: &VolumeId) -> io::Result<()> {
        match fs::remove_file(self.path(volume)) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            removed => removed.and_then(|()| File::open(&self.directory)?.sync_all()),
        }
    }

    fn path(&self, volume: &VolumeId) -> PathBuf {
        self.directory.join(file_name(volume))
    }
}

fn file_name(volume: &VolumeId) -> String {
    format!("{volume}.json")
}

fn read(path: &Path) -> io::Result<Option<Record>> {
    let length = match fs::metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        metadata => metadata?.len(),
    };
    let wrong = |problem: String| {
        let message = format!("{} is not a device's record: {problem}", path.display());
        io::Error::new(ErrorKind::InvalidData, message)
    };
    if length > LIMIT {
        return Err(wrong(format!("it has {length} bytes")));
    }
    serde_json::from_slice(&fs::read(path)?)
        .map(Some)
        .map_err(|error| wrong(error.to_string()))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::attach) fn record(volume: u8, attachment: u8) -> Record {
        Record {
            volume: VolumeId::from_bytes([volume; 16]),
            attachment: AttachmentId::from_bytes([attachment; 16]),
            foreign: None,
            server: ([192, 0, 2, 1], 10809).into(),
            transport: Transport::KernelTls,
            read_only: false,
            flags: TransmissionFlags::HAS_FLAGS.with(TransmissionFlags::SEND_FLUSH),
            epoch: Some(7),
            maximum_payload: Some(32 << 20),
            block_size_bytes: 512,
            served_bytes: 1 << 30,
            connections: 2,
            timeout_seconds: 5,
            dead_timeout_seconds: 60,
            sockets: vec![4711, 4712],
            failed: None,
        }
    }

    #[test]
    fn a_record_outlives_its_process() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("devices");
        let records = Records::open(&path).unwrap();
        let mut kept = record(1, 1);
        records.save(&kept).unwrap();
        records.save(&record(2, 1)).unwrap();
        kept.sockets.push(4713);
        records.save(&kept).unwrap();
        drop(records);

        let records = Records::open(&path).unwrap();
        assert_eq!(records.all().unwrap(), [kept.clone(), record(2, 1)]);
        assert_eq!(records.find(&kept.volume).unwrap(), Some(kept.clone()));
        records.remove(&kept.volume).unwrap();
        records.remove(&kept.volume).unwrap();
        assert_eq!(records.find(&kept.volume).unwrap(), None);
    }

    #[test]
    fn a_damaged_record_is_named_and_keeps_no_other_back() {
        let directory = tempfile::tempdir().unwrap();
        let records = Records::open(directory.path()).unwrap();
        records.save(&record(2, 1)).unwrap();
        let volume = record(1, 1).volume;
        let path = records.path(&volume);
        fs::write(&path, b"{}").unwrap();
        let error = records.find(&volume).unwrap_err().to_string();
        assert!(error.contains(path.to_str().unwrap()), "{error}");
        fs::write(&path, vec![b' '; 70_000]).unwrap();
        let error = records.find(&volume).unwrap_err().to_string();
        assert!(error.contains("70000"), "{error}");
        assert_eq!(records.all().unwrap(), [record(2, 1)]);
    }

    #[test]
    fn two_processes_never_look_after_the_same_devices() {
        let directory = tempfile::tempdir().unwrap();
        let first = Records::open(directory.path()).unwrap();
        assert!(Records::open(directory.path()).is_err());
        drop(first);
        assert!(Records::open(directory.path()).is_ok());
    }
}
