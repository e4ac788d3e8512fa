//! What is examined, and as whom.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::ServerName;
use serde::{Serialize, Serializer};

use super::Target;
use crate::nbd::ExportName;
use crate::tls::{self, CertificateError, Profile, Secret};

/// A server to examine: where it is, which export is looked at, and which certificates there are to try it with.
#[derive(Debug, Clone)]
pub struct Server {
    pub address: Address,
    pub export: ExportName,
    /// Where there is none, what lies behind TLS cannot be examined.
    pub identity: Option<Identity>,
    /// The name that the server's certificate must bear. Without one, TLS is not tried.
    pub server_name: Option<ServerName<'static>>,
    /// Another client's certificate of the same authority, one that the server should *not* let in to this export.
    pub other: Option<Identity>,
    /// A certificate of the right authority that has ended.
    pub expired: Option<Identity>,
    /// For each check.
    pub timeout: Duration,
}

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

/// A client's certificate, or none, and the authorities it trusts, ready for each TLS version.
#[derive(Clone)]
pub struct Identity {
    /// Whatever the two sides agree upon.
    pub(super) any: Arc<ClientConfig>,
    pub(super) tls12: Option<Arc<ClientConfig>>,
    pub(super) tls13: Option<Arc<ClientConfig>>,
}

impl Identity {
    /// A client with this Secret's certificate.
    pub fn new(secret: &Secret) -> Result<Self, CertificateError> {
        Ok(Self {
            any: tls::client_config(secret, Profile::Any)?,
            tls12: Some(tls::client_config(secret, Profile::Tls12)?),
            tls13: Some(tls::client_config(secret, Profile::Probe)?),
        })
    }

    /// A client without a certificate that trusts these authorities.
    pub fn anonymous(authorities: &Arc<RootCertStore>) -> Result<Self, CertificateError> {
        let config = |profile| tls::trusting_client_config(authorities.clone(), profile);
        Ok(Self {
            any: config(Profile::Any)?,
            tls12: Some(config(Profile::Tls12)?),
            tls13: Some(config(Profile::Probe)?),
        })
    }

    /// A client that is configured already, for whatever TLS versions.
    #[must_use]
    pub fn of(config: Arc<ClientConfig>) -> Self {
        Self {
            any: config,
            tls12: None,
            tls13: None,
        }
    }

    /// Whether it has a certificate to show.
    #[must_use]
    pub fn has_certificate(&self) -> bool {
        self.any.client_auth_cert_resolver.has_certs()
    }
}

/// Without the configurations, which have the key.
impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("has_certificate", &self.has_certificate())
            .finish_non_exhaustive()
    }
}

impl From<&Target> for Server {
    fn from(target: &Target) -> Self {
        Self {
            address: Address::Tcp(target.address),
            export: target.export.clone(),
            identity: Some(Identity::of(target.tls.clone())),
            server_name: Some(target.server_name.clone()),
            other: None,
            expired: None,
            timeout: target.timeout,
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl Serialize for Address {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}
