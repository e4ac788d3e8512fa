//! As whom the server is asked: certificates from files, from directories, or from where libnbd looks for them.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustls_pki_types::ServerName;

use crate::nbd::Uri;
use crate::tls::{self, CertificateError, Secret, Side};
use crate::verify::Identity;

/// Bytes of a file that are read: more than `tls` accepts, which says so.
const LIMIT: usize = 1 << 20;

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Certificates")]
pub(super) struct Certificates {
    /// A directory with our certificate, its key and the authorities: tls.crt, tls.key and ca.crt as in a Secret, or
    /// libnbd's and QEMU's client-cert.pem, client-key.pem and ca-cert.pem. With the authorities alone, no certificate
    /// is shown. Takes precedence over the URI's tls-certificates; without either, libnbd's own directories are tried.
    #[arg(long, value_name = "DIRECTORY", conflicts_with_all = ["ca", "cert", "key"])]
    certificates: Option<PathBuf>,
    /// The authorities that the server's certificate must come from, as PEM.
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// Our certificate, as PEM, and those between it and the authority.
    #[arg(long, value_name = "FILE", requires_all = ["ca", "key"])]
    cert: Option<PathBuf>,
    /// Our certificate's key, as PEM.
    #[arg(long, value_name = "FILE", requires = "cert")]
    key: Option<PathBuf>,
    /// A directory like --certificates, with a certificate of the same authority that has no right to this export.
    #[arg(long, value_name = "DIRECTORY")]
    other_certificates: Option<PathBuf>,
    /// A directory like --certificates, with a certificate of the same authority that has expired.
    #[arg(long, value_name = "DIRECTORY")]
    expired_certificates: Option<PathBuf>,
    /// Use no certificates, not even those in libnbd's directories.
    #[arg(long, conflicts_with_all = ["certificates", "ca", "other_certificates", "expired_certificates"])]
    no_certificates: bool,
}

/// Whom the server is to meet.
#[derive(Debug, Default)]
pub(super) struct Identities {
    pub(super) ours: Option<Identity>,
    pub(super) other: Option<Identity>,
    pub(super) expired: Option<Identity>,
    /// What the user should know of the choice.
    pub(super) notes: Vec<String>,
}

impl Certificates {
    /// Reads what there is; also says by what name the server must go.
    pub(super) fn load(&self, uri: &Uri) -> Result<(Option<ServerName<'static>>, Identities)> {
        let name = uri
            .server_name()
            .map(|name| {
                // An address with an interface is none in a certificate.
                let bare = name.split_once('%').map_or(name, |(bare, _)| bare);
                ServerName::try_from(bare.to_owned()).with_context(|| {
                    format!("{name:?} cannot be a name in a certificate: add tls-hostname=NAME")
                })
            })
            .transpose()?;
        let mut identities = Identities::default();
        if self.no_certificates {
            return Ok((name, identities));
        }
        identities.ours = self.ours(uri, &mut identities.notes)?;
        identities.other = load(self.other_certificates.as_deref(), Secret::load)?;
        identities.expired = load(self.expired_certificates.as_deref(), Secret::load_expired)?;
        if identities.ours.is_some() && name.is_none() {
            bail!(
                "a unix socket does not tell by what name the server's certificate must go: add \
                 tls-hostname=NAME to the URI, or --no-certificates to stay outside TLS"
            );
        }
        if identities.ours.is_none() {
            if self.other_certificates.is_some() || self.expired_certificates.is_some() {
                bail!(
                    "--other-certificates and --expired-certificates go with certificates that the server accepts"
                );
            }
            identities.notes.push(
                "no certificates were given or found, so what lies behind TLS cannot be examined"
                    .into(),
            );
        }
        Ok((name, identities))
    }

    fn ours(&self, uri: &Uri, notes: &mut Vec<String>) -> Result<Option<Identity>> {
        if let Some(ca) = &self.ca {
            return self.files(ca).map(Some);
        }
        if let Some(directory) = self.certificates.as_ref().or(uri.certificates.as_ref()) {
            return from_directory(directory).map(Some);
        }
        let found = usual_directories()
            .into_iter()
            .find(|directory| directory.join("ca-cert.pem").exists());
        let Some(directory) = found else {
            return Ok(None);
        };
        notes.push(format!("using the certificates in {}", directory.display()));
        from_directory(&directory).map(Some)
    }

    fn files(&self, ca: &Path) -> Result<Identity> {
        let authorities = read(ca)?;
        let (Some(cert), Some(key)) = (&self.cert, &self.key) else {
            return Ok(Identity::anonymous(&tls::authorities(
                &ca.display().to_string(),
                &authorities,
            )?)?);
        };
        let origin = format!("{}, {} and {}", cert.display(), key.display(), ca.display());
        let parts = BTreeMap::from([
            (tls::CERTIFICATE.to_owned(), read(cert)?),
            (tls::KEY.to_owned(), read(key)?),
            (tls::AUTHORITIES.to_owned(), authorities),
        ]);
        let secret = Secret::from_map(&origin, &parts, Side::Client)?;
        Ok(Identity::new(&secret)?)
    }
}

/// Where libnbd looks when nobody says where: nbd_set_tls_certificates(3).
fn usual_directories() -> Vec<PathBuf> {
    if rustix::process::geteuid().is_root() {
        return vec!["/etc/pki/libnbd".into()];
    }
    let home = std::env::var_os("HOME").map(PathBuf::from);
    home.map(|home| vec![home.join(".pki/libnbd"), home.join(".config/pki/libnbd")])
        .unwrap_or_default()
}

/// A directory may lack a certificate, as libnbd's may; half of one is a mistake.
fn from_directory(directory: &Path) -> Result<Identity> {
    let parts = tls::read_secret(directory, Side::Client, LIMIT)?;
    match parts.get(tls::AUTHORITIES) {
        Some(pem) if parts.len() == 1 => {
            let origin = directory.display().to_string();
            Ok(Identity::anonymous(&tls::authorities(&origin, pem)?)?)
        }
        _ => Ok(Identity::new(&Secret::load(directory, Side::Client)?)?),
    }
}

fn load(
    directory: Option<&Path>,
    how: fn(&Path, Side) -> Result<Secret, CertificateError>,
) -> Result<Option<Identity>> {
    directory
        .map(|directory| Ok(Identity::new(&how(directory, Side::Client)?)?))
        .transpose()
}

/// One byte more than is accepted shows that there is too much.
fn read(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(LIMIT as u64).read_to_end(&mut bytes))
        .with_context(|| format!("read {}", path.display()))?;
    Ok(bytes)
}
