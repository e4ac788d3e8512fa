//! A server's configuration, which follows its files: new sessions use the new certificate, live ones go on.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::version::{TLS12, TLS13};
use rustls::{
    CertificateError as Refusal, DigitallySignedStruct, DistinguishedName, OtherError,
    ServerConfig, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, UnixTime};
use time::OffsetDateTime;

use super::error::CertificateError;
use super::files::Stamp;
use super::names::certificate_names;
use super::provider;
use super::secret::{Secret, Side, unusable};

/// What a server accepts.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// TLS 1.2 with AEAD suites besides 1.3, for clients that have nothing newer (C28).
    pub tls12: bool,
    /// A client's certificate must name one of these, besides being issued by an authority in `ca.crt`.
    pub clients: Vec<String>,
}

/// A server's TLS configuration, made from a Secret-shaped directory and remade when that changes.
#[derive(Debug)]
pub struct ServerTls {
    directory: PathBuf,
    options: ServerOptions,
    current: ArcSwap<Current>,
    files: Mutex<Files>,
}

#[derive(Debug)]
struct Current {
    config: Arc<ServerConfig>,
    not_after: i64,
}

#[derive(Debug)]
struct Files {
    seen: Stamp,
    problem: Option<String>,
}

/// What [`ServerTls::refresh`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refresh {
    Unchanged,
    /// New sessions use the new files.
    Reloaded,
    /// The new files cannot be used, for this reason; new sessions go on with the old ones.
    Kept(String),
}

impl ServerTls {
    /// Reads the directory; it must hold a Secret that can be used now.
    pub fn load(directory: &Path, options: ServerOptions) -> Result<Self, CertificateError> {
        let seen = Stamp::of(directory, Side::Server);
        let current = Current::load(directory, &options)?;
        Ok(Self {
            directory: directory.to_owned(),
            options,
            current: ArcSwap::from_pointee(current),
            files: Mutex::new(Files {
                seen,
                problem: None,
            }),
        })
    }

    /// The configuration for a new session.
    #[must_use]
    pub fn config(&self) -> Arc<ServerConfig> {
        self.current.load().config.clone()
    }

    /// When the certificate in use ends, in seconds since 1970.
    #[must_use]
    pub fn not_after(&self) -> i64 {
        self.current.load().not_after
    }

    /// Why the files on disk are not in use, or that the certificate in use has ended.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        let problem = self.files().problem.clone();
        problem.or_else(|| {
            let ended = self.not_after();
            (OffsetDateTime::now_utc().unix_timestamp() > ended).then(|| {
                CertificateError::Expired {
                    origin: self.directory.display().to_string(),
                    not_after: ended,
                }
                .to_string()
            })
        })
    }

    /// Reads the directory again if its files changed. Cheap otherwise.
    pub fn refresh(&self) -> Refresh {
        let mut files = self.files();
        let stamp = Stamp::of(&self.directory, Side::Server);
        if stamp == files.seen {
            return Refresh::Unchanged;
        }
        files.seen = stamp;
        match Current::load(&self.directory, &self.options) {
            Ok(current) => {
                self.current.store(Arc::new(current));
                files.problem = None;
                Refresh::Reloaded
            }
            Err(error) => {
                let problem = error.to_string();
                files.problem = Some(problem.clone());
                Refresh::Kept(problem)
            }
        }
    }

    fn files(&self) -> MutexGuard<'_, Files> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Current {
    fn load(directory: &Path, options: &ServerOptions) -> Result<Self, CertificateError> {
        let secret = Secret::load(directory, Side::Server)?;
        let refused = |source| unusable(secret.origin(), source);
        let chain = WebPkiClientVerifier::builder_with_provider(secret.roots(), provider())
            .build()
            .map_err(|error| refused(rustls::Error::General(error.to_string())))?;
        let verifier = NamedClients {
            chain,
            clients: options.clients.clone(),
        };
        let versions: &[_] = if options.tls12 {
            &[&TLS13, &TLS12]
        } else {
            &[&TLS13]
        };
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(versions)
            .map_err(refused)?
            .with_client_cert_verifier(Arc::new(verifier))
            .with_single_cert(secret.chain(), secret.key())
            .map_err(refused)?;
        // A ticket kills a kernel session (K3), and a resumed one would skip the checks above.
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        // For `records`, which seals and opens with the keys itself.
        config.enable_secret_extraction = true;
        Ok(Self {
            config: Arc::new(config),
            not_after: secret.not_after(),
        })
    }
}

/// Accepts clients that chain to the authorities *and* are named: an authority alone would open every volume to
/// every certificate it ever issued.
#[derive(Debug)]
struct NamedClients {
    chain: Arc<dyn ClientCertVerifier>,
    clients: Vec<String>,
}

/// A client whose certificate is sound, but somebody else's.
#[derive(Debug, thiserror::Error)]
#[error("the client's certificate is for {}, but {} is needed", .found.join(", "), .wanted.join(" or "))]
struct AnotherClient {
    found: Vec<String>,
    wanted: Vec<String>,
}

impl ClientCertVerifier for NamedClients {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self.chain.verify_client_cert(leaf, intermediates, now)?;
        let found = certificate_names(leaf);
        if found.iter().any(|name| self.clients.contains(name)) {
            return Ok(verified);
        }
        let other = AnotherClient {
            found,
            wanted: self.clients.clone(),
        };
        Err(Refusal::Other(OtherError(Arc::new(other))).into())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}
