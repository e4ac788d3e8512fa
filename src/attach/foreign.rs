//! Exports of servers that are not Hawser's: where they are, what their certificates must say, and the Secrets to
//! show there.
//!
//! Nobody but the request that makes the device knows any of it. So the device's record has the export, and the Secret
//! is kept for as long as the device is there: in memory and, for a process that comes after this one, in a directory
//! that lives in memory too. It is never on a disk.

use std::collections::HashMap;
use std::fs::{self, DirBuilder};
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::error::AttachError;
use crate::tls::{self, Secret, Side};
use crate::volumes::VolumeId;

/// How long the resolver may take. It cannot be interrupted, only left alone.
const RESOLVE: Duration = Duration::from_secs(10);

/// Names that are looked up at a time, those that were left alone included.
static LOOKUPS: Semaphore = Semaphore::const_new(16);

/// Addresses of one name that are tried, and how long each may take to accept a connection.
const ADDRESSES: usize = 8;
const ACCEPT: Duration = Duration::from_secs(2);

/// An export of a server that is not Hawser's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Foreign {
    /// A DNS name, or an address.
    pub host: String,
    pub port: u16,
    pub export: String,
    /// The DNS name or address that the server's certificate must bear.
    pub server_name: String,
}

impl Foreign {
    /// Where the server is now: the first address of its name that accepts a connection.
    pub(super) async fn address(&self, volume: &VolumeId) -> Result<SocketAddr, AttachError> {
        let failed = |problem: String| AttachError::NoAddress {
            volume: volume.clone(),
            host: self.host.clone(),
            problem,
        };
        if let Ok(address) = self.host.parse::<IpAddr>() {
            return Ok((address, self.port).into());
        }
        let found = timeout(RESOLVE, look_up(self.host.clone(), self.port))
            .await
            .map_err(|_| failed(format!("the resolver did not answer within {RESOLVE:?}")))?;
        let addresses = found.map_err(|error| failed(error.to_string()))?;
        if let [address] = addresses[..] {
            return Ok(address);
        }
        let mut problem = "it has no address".to_owned();
        for address in addresses {
            problem = match timeout(ACCEPT, TcpStream::connect(address)).await {
                Ok(Ok(_)) => return Ok(address),
                Ok(Err(error)) => format!("{address}: {error}"),
                Err(_) => format!("{address} did not answer within {ACCEPT:?}"),
            };
        }
        Err(failed(problem))
    }
}

/// Asks the system's resolver, which blocks a thread; its permit goes back when that thread is free again.
async fn look_up(host: String, port: u16) -> io::Result<Vec<SocketAddr>> {
    let permit = LOOKUPS.acquire().await.map_err(io::Error::other)?;
    let found = tokio::task::spawn_blocking(move || {
        let _permit = permit;
        let found = std::net::ToSocketAddrs::to_socket_addrs(&(host.as_str(), port))?;
        Ok(found.take(ADDRESSES).collect())
    });
    found.await.unwrap_or_else(|end| Err(io::Error::other(end)))
}

/// The Secrets of the foreign volumes that are attached.
#[derive(Debug)]
pub(super) struct Secrets {
    directory: PathBuf,
    known: Mutex<HashMap<VolumeId, Secret>>,
}

impl Secrets {
    /// `directory` is used only if it is in memory.
    pub(super) fn new(directory: PathBuf) -> Self {
        Self {
            directory,
            known: Mutex::default(),
        }
    }

    fn path(&self, volume: &VolumeId) -> PathBuf {
        self.directory.join(volume.as_str())
    }

    fn known(&self) -> MutexGuard<'_, HashMap<VolumeId, Secret>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a volume's Secret in the place of the one before.
    pub(super) fn keep(&self, volume: &VolumeId, secret: &Secret) -> Result<(), AttachError> {
        let doing = "keep the volume's Secret";
        self.known().insert(volume.clone(), secret.clone());
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.directory)
            .map_err(AttachError::system(doing))?;
        if !is_in_memory(&self.directory).map_err(AttachError::system(doing))? {
            tracing::warn!(
                %volume,
                "{} is not in memory, so no Secret is written there: if this process ends, the volume's connections \
                 are replaced only when its Secret comes again",
                self.directory.display()
            );
            return Ok(());
        }
        tls::write_secret(&self.path(volume), &secret.parts()).map_err(|source| {
            AttachError::Certificate {
                volume: volume.clone(),
                source,
            }
        })
    }

    /// The Secret that was kept last, by this process or one before.
    pub(super) fn find(&self, volume: &VolumeId) -> Result<Secret, AttachError> {
        if let Some(secret) = self.known().get(volume) {
            return Ok(secret.clone());
        }
        let path = self.path(volume);
        if !path.exists() {
            return Err(AttachError::NoSecret {
                volume: volume.clone(),
            });
        }
        let secret =
            Secret::load(&path, Side::Client).map_err(|source| AttachError::Certificate {
                volume: volume.clone(),
                source,
            })?;
        self.known().insert(volume.clone(), secret.clone());
        Ok(secret)
    }

    pub(super) fn forget(&self, volume: &VolumeId) -> io::Result<()> {
        self.known().remove(volume);
        match fs::remove_dir_all(self.path(volume)) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            removed => removed,
        }
    }
}

fn is_in_memory(directory: &Path) -> io::Result<bool> {
    // tmpfs and ramfs.
    Ok([0x0102_1994, 0x8584_58f6].contains(&rustix::fs::statfs(directory)?.f_type))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::{Authority, Leaf};

    fn foreign(host: &str, port: u16) -> Foreign {
        Foreign {
            host: host.into(),
            port,
            export: "disk".into(),
            server_name: host.into(),
        }
    }

    #[tokio::test]
    async fn a_name_is_looked_up_and_an_address_is_taken_as_it_is() {
        let volume = VolumeId::foreign("disk");
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let found = foreign("localhost", address.port()).address(&volume).await;
        assert_eq!(found.unwrap(), address);
        let found = foreign("2001:db8::1", 7).address(&volume).await.unwrap();
        assert_eq!(found, "[2001:db8::1]:7".parse().unwrap());
        let refused = foreign("nowhere.invalid", 7).address(&volume).await;
        let error = refused.unwrap_err();
        assert!(error.to_string().contains("nowhere.invalid"), "{error}");
        assert_eq!(error.kind(), super::super::ErrorKind::Unavailable);
    }

    #[test]
    fn a_secret_is_kept_for_the_next_process_and_never_on_a_disk() {
        let issued = Authority::temporary()
            .unwrap()
            .issue(&Leaf::new(Side::Client, vec!["node.example".into()]))
            .unwrap();
        let secret = Secret::from_map("the request", &issued, Side::Client).unwrap();
        let volume = VolumeId::foreign("disk");
        // This program lies on a disk, on most machines.
        let program = std::env::current_exe().unwrap();
        let memory = Path::new("/dev/shm");
        for place in [memory, program.parent().unwrap()] {
            let outlives = is_in_memory(place).unwrap();
            assert!(outlives || place != memory);
            let directory = tempfile::tempdir_in(place).unwrap();
            let path = directory.path().join("secrets");
            let secrets = Secrets::new(path.clone());
            assert!(matches!(
                secrets.find(&volume),
                Err(AttachError::NoSecret { .. })
            ));
            secrets.keep(&volume, &secret).unwrap();
            assert_eq!(secrets.find(&volume).unwrap().names(), ["node.example"]);
            let next = Secrets::new(path.clone());
            assert_eq!(next.find(&volume).is_ok(), outlives, "{place:?}");
            assert_eq!(path.join(volume.as_str()).exists(), outlives, "{place:?}");
            next.forget(&volume).unwrap();
            next.forget(&volume).unwrap();
            assert!(Secrets::new(path).find(&volume).is_err());
        }
    }
}
