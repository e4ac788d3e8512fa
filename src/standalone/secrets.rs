//! The Secrets directory: on one machine it plays API server and kubelet.
//!
//! `ca` holds the managed authority, `<volume>-server` and `<volume>-client` what it issued. A Secret that is missing,
//! ended or due is issued again; one that is there but wrong was put there by somebody, and is refused and left alone.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use time::OffsetDateTime;

use crate::tls::{
    AUTHORITIES, Authority, CERTIFICATE, CertificateError, KEY, Secret, Side, client_identity,
    read_secret, server_identity, write_secret,
};
use crate::volumes::{VolumeId, VolumesError};

use crate::daemon::chain;

/// A leaf is renewed when less than this is left of it, in seconds: a third of its 90 days.
const RENEW_BEFORE: i64 = 30 * 24 * 60 * 60;

/// Bytes of one file: some dozen authorities fit.
const FILE_LIMIT: usize = 256 << 10;

const SIDES: [Side; 2] = [Side::Server, Side::Client];

/// Why a volume's Secrets cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SecretsError {
    #[error(
        "the authority is missing from {}, although Secrets it issued are there: restore it, or remove those \
         Secrets too to have a new authority issue all of them", .0.display()
    )]
    AuthorityMissing(PathBuf),
    #[error("the authority in {} cannot be used", .directory.display())]
    Authority {
        directory: PathBuf,
        #[source]
        source: Box<CertificateError>,
    },
    #[error(
        "volume {volume}: the Secret in {} cannot be used; put the right one there, or remove the directory and \
         restart hawser standalone to have it issued again", .directory.display()
    )]
    Unusable {
        volume: VolumeId,
        directory: PathBuf,
        #[source]
        source: Box<CertificateError>,
    },
    #[error("cannot {doing} {}", .path.display())]
    Io {
        doing: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl SecretsError {
    fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::Io {
            doing,
            path,
            source,
        }
    }

    fn is_full_disk(&self) -> bool {
        let source = match self {
            Self::Io { source, .. } => source,
            Self::Authority { source, .. } | Self::Unusable { source, .. } => match &**source {
                CertificateError::File { source, .. } => source,
                _ => return false,
            },
            Self::AuthorityMissing(_) => return false,
        };
        matches!(
            source.kind(),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
        )
    }
}

impl From<SecretsError> for VolumesError {
    fn from(error: SecretsError) -> Self {
        if error.is_full_disk() {
            return Self::NoRoom(format!("the disk is full: {error}"));
        }
        let text = error.to_string();
        let source = std::error::Error::source(&error).map(|source| chain(source).into());
        match error {
            SecretsError::Unusable { .. } => Self::Secret {
                problem: text,
                source,
            },
            _ => Self::Internal {
                doing: text,
                source,
            },
        }
    }
}

/// The Secrets of this machine, and the authority that issues them.
#[derive(Debug)]
pub(super) struct Secrets {
    directory: PathBuf,
    authority: Authority,
}

impl Secrets {
    /// Opens the directory, and makes it and an authority where there is none.
    pub(super) fn open(directory: &Path) -> Result<Self, SecretsError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(SecretsError::io("create", directory))?;
        let ca = directory.join("ca");
        let secrets = |authority| Self {
            directory: directory.to_owned(),
            authority,
        };
        if !ca.join(KEY).exists() && !issued(directory)?.is_empty() {
            return Err(SecretsError::AuthorityMissing(ca));
        }
        Authority::open(&ca)
            .map(secrets)
            .map_err(|source| SecretsError::Authority {
                directory: ca,
                source: Box::new(source),
            })
    }

    /// Where the Secret of one side of a volume is.
    #[must_use]
    pub(super) fn directory(&self, volume: &VolumeId, side: Side) -> PathBuf {
        let side = match side {
            Side::Server => "server",
            Side::Client => "client",
        };
        self.directory.join(format!("{volume}-{side}"))
    }

    /// Sees to it that both Secrets of a volume are there, right, and not about to end.
    pub(super) fn ensure(&self, volume: &VolumeId) -> Result<(), SecretsError> {
        SIDES
            .into_iter()
            .try_for_each(|side| self.ensure_side(volume, side))
    }

    fn ensure_side(&self, volume: &VolumeId, side: Side) -> Result<(), SecretsError> {
        let directory = self.directory(volume, side);
        let why = match self.load(volume, side) {
            Ok(secret) if !is_due(secret.not_after()) => return Ok(()),
            Ok(_) => "it ends soon",
            Err(error) => match &error {
                SecretsError::Unusable { source, .. } if is_missing(source, &directory) => {
                    "it is missing"
                }
                SecretsError::Unusable { source, .. } if is_over(source) => "it has ended",
                _ => return Err(error),
            },
        };
        tracing::info!(%volume, secret = %directory.display(), why, "issuing a certificate");
        self.issue(volume, side)
    }

    fn issue(&self, volume: &VolumeId, side: Side) -> Result<(), SecretsError> {
        let directory = self.directory(volume, side);
        let issued = match side {
            Side::Server => self.authority.issue_server(volume, &[]),
            Side::Client => self.authority.issue_client(volume),
        };
        issued
            .and_then(|parts| write_secret(&directory, &parts))
            .map_err(|source| SecretsError::Unusable {
                volume: volume.clone(),
                directory,
                source: Box::new(source),
            })
    }

    /// Checks the Secret of one side of a volume as the other side of the connection will.
    pub(super) fn load(&self, volume: &VolumeId, side: Side) -> Result<Secret, SecretsError> {
        let directory = self.directory(volume, side);
        self.check(volume, side, |origin| {
            let parts = read_secret(&directory, side, FILE_LIMIT)?;
            Secret::from_map(origin, &parts, side)
        })
    }

    /// The client Secret of a volume, checked.
    pub(super) fn client(
        &self,
        volume: &VolumeId,
    ) -> Result<BTreeMap<String, Vec<u8>>, SecretsError> {
        let directory = self.directory(volume, Side::Client);
        let mut parts = BTreeMap::new();
        self.check(volume, Side::Client, |origin| {
            parts = read_secret(&directory, Side::Client, FILE_LIMIT)?;
            Secret::from_map(origin, &parts, Side::Client)
        })?;
        parts.retain(|name, _| [CERTIFICATE, KEY, AUTHORITIES].contains(&name.as_str()));
        Ok(parts)
    }

    fn check(
        &self,
        volume: &VolumeId,
        side: Side,
        read: impl FnOnce(&str) -> Result<Secret, CertificateError>,
    ) -> Result<Secret, SecretsError> {
        let directory = self.directory(volume, side);
        let identity = match side {
            Side::Server => server_identity(volume),
            Side::Client => client_identity(volume),
        };
        read(&directory.display().to_string())
            .and_then(|secret| {
                secret.check_identity(&identity)?;
                secret.check_issuer()?;
                Ok(secret)
            })
            .map_err(|source| SecretsError::Unusable {
                volume: volume.clone(),
                directory,
                source: Box::new(source),
            })
    }

    /// Removes both Secrets of a volume; what is not there is removed already.
    pub(super) fn remove(&self, volume: &VolumeId) -> Result<(), SecretsError> {
        for side in SIDES {
            let directory = self.directory(volume, side);
            match fs::remove_dir_all(&directory) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(SecretsError::io("remove", &directory)(error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The volumes that have a Secret here.
    pub(super) fn volumes(&self) -> Result<Vec<VolumeId>, SecretsError> {
        issued(&self.directory)
    }
}

/// Whether a certificate that ends then is to be renewed now.
fn is_due(not_after: i64) -> bool {
    not_after - OffsetDateTime::now_utc().unix_timestamp() < RENEW_BEFORE
}

fn is_over(error: &CertificateError) -> bool {
    matches!(error, CertificateError::Expired { .. })
}

/// Whether nothing was ever written there, or not to the end. A single file that is gone was taken away.
fn is_missing(error: &CertificateError, directory: &Path) -> bool {
    match error {
        CertificateError::File { path, source } => {
            path == directory && source.kind() == io::ErrorKind::NotFound
        }
        CertificateError::Missing { .. } => !directory.join("..data").exists(),
        _ => false,
    }
}

fn issued(directory: &Path) -> Result<Vec<VolumeId>, SecretsError> {
    let mut volumes = Vec::new();
    for entry in fs::read_dir(directory).map_err(SecretsError::io("read", directory))? {
        let name = entry
            .map_err(SecretsError::io("read", directory))?
            .file_name();
        let name = name.to_string_lossy();
        let id = ["-server", "-client"]
            .into_iter()
            .find_map(|side| name.strip_suffix(side)?.parse().ok());
        volumes.extend(id);
    }
    volumes.sort_unstable();
    volumes.dedup();
    Ok(volumes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::time::Duration;

    use tempfile::TempDir;

    use super::*;
    use crate::tls::Leaf;

    fn id(n: u8) -> VolumeId {
        VolumeId::from_bytes([n; 16])
    }

    fn content(secrets: &Secrets, side: Side) -> Vec<u8> {
        fs::read(secrets.directory(&id(1), side).join(CERTIFICATE)).unwrap()
    }

    #[test]
    fn secrets_are_private_and_kept() {
        let home = TempDir::new().unwrap();
        let secrets = Secrets::open(home.path()).unwrap();
        secrets.ensure(&id(1)).unwrap();
        let before = content(&secrets, Side::Server);
        let secrets = Secrets::open(home.path()).unwrap();
        secrets.ensure(&id(1)).unwrap();
        assert_eq!(content(&secrets, Side::Server), before);
        let client = secrets.client(&id(1)).unwrap();
        assert_eq!(
            client.keys().collect::<Vec<_>>(),
            [AUTHORITIES, CERTIFICATE, KEY]
        );
        for side in SIDES {
            let directory = secrets.directory(&id(1), side);
            let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
            assert_eq!(mode(&directory), 0o700);
            assert_eq!(mode(&directory.join(KEY)), 0o600);
        }
        assert_eq!(secrets.volumes().unwrap(), [id(1)]);
        secrets.remove(&id(1)).unwrap();
        secrets.remove(&id(1)).unwrap();
        assert_eq!(secrets.volumes().unwrap(), []);
    }

    #[test]
    fn certificates_are_renewed_before_they_end_and_after() {
        let home = TempDir::new().unwrap();
        let secrets = Secrets::open(home.path()).unwrap();
        let day = Duration::from_secs(24 * 60 * 60);
        let now = OffsetDateTime::now_utc();
        for (ends, renewed) in [
            (now + 31 * day, false),
            (now + 29 * day, true),
            (now - day, true),
        ] {
            let mut leaf = Leaf::new(Side::Client, vec![client_identity(&id(1))]);
            leaf.not_before = now - 2 * day;
            leaf.not_after = ends;
            let parts = secrets.authority.issue(&leaf).unwrap();
            write_secret(&secrets.directory(&id(1), Side::Client), &parts).unwrap();
            secrets.ensure(&id(1)).unwrap();
            assert_eq!(
                content(&secrets, Side::Client) != parts[CERTIFICATE],
                renewed,
                "{ends}"
            );
            secrets.load(&id(1), Side::Client).unwrap();
        }
    }

    #[test]
    fn wrong_secrets_are_named_and_left_alone() {
        let home = TempDir::new().unwrap();
        let secrets = Secrets::open(home.path()).unwrap();
        for n in 1..=2 {
            secrets.ensure(&id(n)).unwrap();
        }
        let client = secrets.directory(&id(1), Side::Client);
        let stranger = Authority::temporary()
            .unwrap()
            .issue_client(&id(1))
            .unwrap();
        let mut mixed = secrets.client(&id(1)).unwrap();
        mixed.insert(AUTHORITIES.to_owned(), stranger[AUTHORITIES].clone());
        let mut keyless = secrets.client(&id(1)).unwrap();
        keyless.insert(KEY.to_owned(), b"none".to_vec());
        let server = secrets.authority.issue_server(&id(1), &[]).unwrap();
        for (parts, problem) in [
            (secrets.client(&id(2)).unwrap(), "is for vol-0202"),
            (mixed, "was not issued by an authority in its ca.crt"),
            (keyless, "tls.key of"),
            (server, "extended key usage"),
        ] {
            write_secret(&client, &parts).unwrap();
            let error = secrets.ensure(&id(1)).unwrap_err();
            let text = chain(&error);
            for part in [
                id(1).as_str(),
                &client.display().to_string(),
                problem,
                "restart",
            ] {
                assert!(text.contains(part), "{text}\nlacks {part}");
            }
            assert_eq!(content(&secrets, Side::Client), parts[CERTIFICATE]);
            assert_eq!(chain(&secrets.client(&id(1)).unwrap_err()), text);
        }
    }

    #[test]
    fn a_secret_that_was_lost_is_issued_again_and_a_lost_file_is_named() {
        let home = TempDir::new().unwrap();
        let secrets = Secrets::open(home.path()).unwrap();
        secrets.ensure(&id(1)).unwrap();
        let client = secrets.directory(&id(1), Side::Client);
        fs::remove_dir_all(&client).unwrap();
        assert!(
            chain(&secrets.client(&id(1)).unwrap_err()).contains(&client.display().to_string())
        );
        secrets.ensure(&id(1)).unwrap();
        secrets.client(&id(1)).unwrap();
        fs::remove_file(client.join(KEY).canonicalize().unwrap()).unwrap();
        assert!(chain(&secrets.ensure(&id(1)).unwrap_err()).contains("has no tls.key"));
    }

    #[test]
    fn a_lost_authority_is_not_replaced_behind_the_secrets_it_issued() {
        let home = TempDir::new().unwrap();
        Secrets::open(home.path()).unwrap().ensure(&id(1)).unwrap();
        fs::remove_dir_all(home.path().join("ca")).unwrap();
        let error = Secrets::open(home.path()).unwrap_err();
        assert!(
            matches!(error, SecretsError::AuthorityMissing(_)),
            "{error}"
        );
    }
}
