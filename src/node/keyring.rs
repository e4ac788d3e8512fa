//! What this node was given to reach the servers of its volumes: client Secrets, and where the servers were last.
//!
//! The kubelet brings a Secret with each call, and again every minute or so. In between, and until a restarted plugin
//! hears the API server, what was brought is kept: in memory, and in files that are memory too.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, DirBuilder};
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::statfs;

use crate::storage;
use crate::tls::{self, CertificateError, Side};
use crate::volumes::VolumeId;

/// Bytes of one part of a Secret that is read back: Kubernetes allows no larger Secret.
const LIMIT: usize = 1 << 20;

/// File systems that are memory (statfs(2)).
const TMPFS: u64 = 0x0102_1994;
const RAMFS: u64 = 0x8584_58f6;

type Parts = BTreeMap<String, Vec<u8>>;

pub(super) struct Keyring {
    /// `None`: nothing is kept beyond this process.
    directory: Option<PathBuf>,
    secrets: Mutex<HashMap<VolumeId, Parts>>,
    places: Mutex<HashMap<VolumeId, SocketAddr>>,
}

/// A directory in which no key may be kept.
#[derive(Debug, thiserror::Error)]
pub(super) enum KeyringError {
    #[error("{} is on a disk: keys are kept in memory only, such as in a tmpfs", .0.display())]
    Disk(PathBuf),
    #[error("cannot make {}", path.display())]
    Io { path: PathBuf, source: io::Error },
}

impl Keyring {
    /// Keeps things in `directory`, if that is in memory.
    pub(super) fn open(directory: &Path) -> Result<Self, KeyringError> {
        let failed = |source| KeyringError::Io {
            path: directory.to_owned(),
            source,
        };
        // Before anything is made on what may be a disk.
        let existing = directory.ancestors().find(|path| path.exists());
        let found = statfs(existing.unwrap_or(directory)).map_err(|errno| failed(errno.into()))?;
        if ![TMPFS, RAMFS].contains(&u64::from_ne_bytes(found.f_type.to_ne_bytes())) {
            return Err(KeyringError::Disk(directory.to_owned()));
        }
        for part in ["secrets", "places"] {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(directory.join(part))
                .map_err(failed)?;
        }
        Ok(Self::on(Some(directory.to_owned())))
    }

    /// Keeps things for as long as this process lives.
    pub(super) fn forgetful() -> Self {
        Self::on(None)
    }

    fn on(directory: Option<PathBuf>) -> Self {
        Self {
            directory,
            secrets: Mutex::default(),
            places: Mutex::default(),
        }
    }

    fn secret_directory(&self, volume: &VolumeId) -> Option<PathBuf> {
        let directory = self.directory.as_ref()?;
        Some(directory.join("secrets").join(volume.as_str()))
    }

    fn place_file(&self, volume: &VolumeId) -> Option<PathBuf> {
        let directory = self.directory.as_ref()?;
        Some(directory.join("places").join(volume.as_str()))
    }

    /// Keeps a volume's Secret in the place of the one before. It can be used also where this fails.
    pub(super) fn keep(&self, volume: &VolumeId, parts: Parts) -> Result<(), CertificateError> {
        let ours = [tls::CERTIFICATE, tls::KEY, tls::AUTHORITIES];
        let parts: Parts = parts
            .into_iter()
            .filter(|(name, _)| ours.contains(&name.as_str()))
            .collect();
        let mut secrets = locked(&self.secrets);
        if secrets.get(volume) == Some(&parts) {
            return Ok(());
        }
        let written = match self.secret_directory(volume) {
            Some(directory) => tls::write_secret(&directory, &parts),
            None => Ok(()),
        };
        if written.is_ok() {
            secrets.insert(volume.clone(), parts);
        } else {
            // Not as if it were kept: the next time it is written again.
            secrets.remove(volume);
            let _ = self.remove_secret(volume);
            secrets.insert(volume.clone(), parts);
        }
        written
    }

    /// The volume's Secret, of this process' life or an earlier one's.
    pub(super) fn secret(&self, volume: &VolumeId) -> Option<Parts> {
        let mut secrets = locked(&self.secrets);
        if let Some(parts) = secrets.get(volume) {
            return Some(parts.clone());
        }
        let parts = tls::read_secret(&self.secret_directory(volume)?, Side::Client, LIMIT).ok()?;
        if parts.is_empty() {
            return None;
        }
        secrets.insert(volume.clone(), parts.clone());
        Some(parts)
    }

    /// When the first of the certificates that were brought to this process ends, in seconds since 1970.
    pub(super) fn first_end(&self) -> Option<i64> {
        let secrets = locked(&self.secrets);
        let certificates = secrets
            .values()
            .filter_map(|parts| parts.get(tls::CERTIFICATE));
        certificates.filter_map(|pem| tls::end_of(pem)).min()
    }

    /// Keeps where the volume's server is.
    pub(super) fn keep_place(&self, volume: &VolumeId, address: SocketAddr) {
        let before = locked(&self.places).insert(volume.clone(), address);
        if before != Some(address)
            && let Some(file) = self.place_file(volume)
            && let Err(error) = storage::replace(&file, address.to_string().as_bytes())
        {
            tracing::warn!(%volume, %error, "cannot keep where its server is");
        }
    }

    /// Where the volume's server was last.
    pub(super) fn place(&self, volume: &VolumeId) -> Option<SocketAddr> {
        if let Some(address) = locked(&self.places).get(volume) {
            return Some(*address);
        }
        let text = fs::read_to_string(self.place_file(volume)?).ok()?;
        text.parse().ok()
    }

    /// Removes what was kept for a volume.
    pub(super) fn forget(&self, volume: &VolumeId) {
        let mut secrets = locked(&self.secrets);
        secrets.remove(volume);
        locked(&self.places).remove(volume);
        let removed = self.remove_secret(volume).and_then(|()| {
            self.place_file(volume)
                .map_or(Ok(()), |file| gone(fs::remove_file(file)))
        });
        if let Err(error) = removed {
            tracing::warn!(%volume, %error, "what was kept of it stays until the node's next boot");
        }
    }

    fn remove_secret(&self, volume: &VolumeId) -> io::Result<()> {
        self.secret_directory(volume)
            .map_or(Ok(()), |directory| gone(fs::remove_dir_all(directory)))
    }
}

/// What is not there is removed.
fn gone(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Memory on every Linux.
    const MEMORY: &str = "/dev/shm";

    fn parts(certificate: &str) -> Parts {
        BTreeMap::from([
            (tls::CERTIFICATE.to_owned(), certificate.into()),
            (tls::KEY.to_owned(), b"key".to_vec()),
            (tls::AUTHORITIES.to_owned(), b"authorities".to_vec()),
        ])
    }

    #[test]
    fn what_was_brought_outlives_the_process_until_it_is_forgotten() {
        let home = tempfile::tempdir_in(MEMORY).unwrap();
        let directory = home.path().join("hawser");
        let (volume, other) = (VolumeId::from_bytes([1; 16]), VolumeId::from_bytes([2; 16]));
        let address = "10.0.0.1:10809".parse().unwrap();
        let keyring = Keyring::open(&directory).unwrap();
        assert_eq!(keyring.secret(&volume), None);
        assert_eq!(keyring.place(&volume), None);
        let mut surplus = parts("first");
        surplus.insert("password".to_owned(), b"of something else".to_vec());
        keyring.keep(&volume, surplus).unwrap();
        keyring.keep(&volume, parts("second")).unwrap();
        keyring.keep_place(&volume, address);
        assert_eq!(keyring.secret(&volume), Some(parts("second")));

        let keyring = Keyring::open(&directory).unwrap();
        assert_eq!(keyring.secret(&volume), Some(parts("second")));
        assert_eq!(keyring.place(&volume), Some(address));
        assert_eq!(keyring.secret(&other), None);
        keyring.forget(&volume);
        keyring.forget(&volume);
        assert_eq!(keyring.secret(&volume), None);
        let keyring = Keyring::open(&directory).unwrap();
        assert_eq!(keyring.secret(&volume), None);
        assert_eq!(keyring.place(&volume), None);
    }

    #[test]
    fn no_key_is_kept_on_a_disk() {
        let home = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let directory = home.path().join("hawser");
        assert!(matches!(
            Keyring::open(&directory),
            Err(KeyringError::Disk(_))
        ));
        assert!(!directory.exists());
        let keyring = Keyring::forgetful();
        let volume = VolumeId::from_bytes([1; 16]);
        keyring.keep(&volume, parts("first")).unwrap();
        assert_eq!(keyring.secret(&volume), Some(parts("first")));
    }
}
