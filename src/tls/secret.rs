//! One Secret, parsed and checked: who we are, and whom we trust.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{CertificateError as Refusal, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::error::CertificateError;
use super::{AUTHORITIES, CERTIFICATE, KEY, files, names, provider};

/// Bytes that one part of a Secret may have: a bundle of some dozen authorities fits.
const PART_LIMIT: usize = 256 << 10;

/// The authorities of a `ca.crt`, for whoever trusts them and has no certificate. `origin` names them in errors.
pub fn authorities(origin: &str, pem: &[u8]) -> Result<Arc<RootCertStore>, CertificateError> {
    if pem.len() > PART_LIMIT {
        return Err(CertificateError::TooLong {
            origin: origin.to_owned(),
            part: AUTHORITIES,
            limit: PART_LIMIT,
        });
    }
    roots(origin, pem)
}

fn roots(origin: &str, pem: &[u8]) -> Result<Arc<RootCertStore>, CertificateError> {
    let mut roots = RootCertStore::empty();
    for authority in certificates(origin, AUTHORITIES, pem)? {
        roots
            .add(authority)
            .map_err(|source| unusable(origin, source))?;
    }
    Ok(Arc::new(roots))
}

/// What is wanted of a certificate's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Term {
    Running,
    Over,
}

/// Which side of a connection a Secret is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Side {
    Server,
    Client,
}

impl Side {
    /// The extended key usage in words.
    const fn usage(self) -> &'static str {
        match self {
            Self::Server => "serverAuth",
            Self::Client => "clientAuth",
        }
    }

    /// What each part may be called: the kubernetes.io/tls name, then libnbd's and QEMU's.
    pub(super) const fn parts(self) -> [(&'static str, &'static str); 3] {
        match self {
            Self::Server => [
                (CERTIFICATE, "server-cert.pem"),
                (KEY, "server-key.pem"),
                (AUTHORITIES, "ca-cert.pem"),
            ],
            Self::Client => [
                (CERTIFICATE, "client-cert.pem"),
                (KEY, "client-key.pem"),
                (AUTHORITIES, "ca-cert.pem"),
            ],
        }
    }
}

/// A certificate chain, its private key and the trusted authorities; valid now, fit for its side, and the key is the
/// certificate's. Cheap to clone. Its `Debug` shows no key.
#[derive(Clone)]
pub struct Secret(Arc<Parts>);

struct Parts {
    origin: String,
    side: Side,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    roots: Arc<RootCertStore>,
    names: Vec<String>,
    not_before: i64,
    not_after: i64,
    /// As they came, for whoever passes the Secret on.
    pem: [Vec<u8>; 3],
}

impl Secret {
    /// Reads a directory with the files `tls.crt`, `tls.key` and `ca.crt`, or libnbd's and QEMU's names for them.
    pub fn load(directory: &Path, side: Side) -> Result<Self, CertificateError> {
        let parts = files::read_secret(directory, side, PART_LIMIT)?;
        Self::from_map(&directory.display().to_string(), &parts, side)
    }

    /// The same for a certificate that has ended, which servers are to refuse.
    pub fn load_expired(directory: &Path, side: Side) -> Result<Self, CertificateError> {
        let parts = files::read_secret(directory, side, PART_LIMIT)?;
        Self::parse(&directory.display().to_string(), &parts, side, Term::Over)
    }

    /// Takes a Secret's content. `origin` names it in errors.
    pub fn from_map(
        origin: &str,
        parts: &BTreeMap<String, Vec<u8>>,
        side: Side,
    ) -> Result<Self, CertificateError> {
        Self::parse(origin, parts, side, Term::Running)
    }

    fn parse(
        origin: &str,
        parts: &BTreeMap<String, Vec<u8>>,
        side: Side,
        term: Term,
    ) -> Result<Self, CertificateError> {
        let origin = origin.to_owned();
        let [certificate, key, authorities] = side.parts();
        let pem = [
            part(&origin, parts, certificate)?.to_owned(),
            part(&origin, parts, key)?.to_owned(),
            part(&origin, parts, authorities)?.to_owned(),
        ];
        let chain = certificates(&origin, CERTIFICATE, &pem[0])?;
        let key = PrivateKeyDer::from_pem_slice(&pem[1]).map_err(|_| CertificateError::NotPem {
            origin: origin.clone(),
            part: KEY,
            wanted: "private key",
        })?;
        let roots = roots(&origin, &pem[2])?;
        let (names, not_before, not_after) = check(&origin, &chain[0], side, term)?;
        let signing = provider()
            .key_provider
            .load_private_key(key.clone_key())
            .map_err(|source| unusable(&origin, source))?;
        match CertifiedKey::new(chain.clone(), signing).keys_match() {
            Ok(()) | Err(rustls::Error::InconsistentKeys(rustls::InconsistentKeys::Unknown)) => {}
            Err(rustls::Error::InconsistentKeys(_)) => {
                return Err(CertificateError::KeyMismatch { origin });
            }
            Err(source) => return Err(unusable(&origin, source)),
        }
        Ok(Self(Arc::new(Parts {
            origin,
            side,
            chain,
            key,
            roots,
            names,
            not_before,
            not_after,
            pem,
        })))
    }

    /// Refuses a certificate that does not name `identity`: that of another volume, say.
    pub fn check_identity(&self, identity: &str) -> Result<(), CertificateError> {
        if self.0.names.iter().any(|name| name == identity) {
            return Ok(());
        }
        Err(CertificateError::WrongName {
            origin: self.0.origin.clone(),
            wanted: identity.to_owned(),
            found: match self.0.names.as_slice() {
                [] => "nobody".to_owned(),
                names => names.join(", "),
            },
        })
    }

    /// Refuses a certificate that its own `ca.crt` does not vouch for. It must hold where one authority issues for both
    /// sides, as the managed one does; certificates of one's own may come from two.
    pub fn check_issuer(&self) -> Result<(), CertificateError> {
        let provider = provider();
        let now = UnixTime::now();
        let (leaf, intermediates) = (&self.0.chain[0], &self.0.chain[1..]);
        let verified = match self.0.side {
            Side::Client => {
                WebPkiClientVerifier::builder_with_provider(self.roots(), provider.clone())
                    .build()
                    .map_err(|error| rustls::Error::General(error.to_string()))
                    .and_then(|verifier| verifier.verify_client_cert(leaf, intermediates, now))
                    .map(|_| ())
            }
            Side::Server => ParsedCertificate::try_from(leaf).and_then(|parsed| {
                verify_server_cert_signed_by_trust_anchor(
                    &parsed,
                    &self.0.roots,
                    intermediates,
                    now,
                    provider.signature_verification_algorithms.all,
                )
            }),
        };
        verified.map_err(|source| match source {
            rustls::Error::InvalidCertificate(Refusal::UnknownIssuer | Refusal::BadSignature) => {
                CertificateError::WrongAuthority {
                    origin: self.0.origin.clone(),
                }
            }
            source => unusable(&self.0.origin, source),
        })
    }

    /// This certificate and key, with the authorities that `other` trusts.
    #[must_use]
    pub fn trusting(&self, other: &Self) -> Self {
        let [certificate, key, _] = self.0.pem.clone();
        Self(Arc::new(Parts {
            origin: self.0.origin.clone(),
            side: self.0.side,
            chain: self.0.chain.clone(),
            key: self.0.key.clone_key(),
            roots: other.0.roots.clone(),
            names: self.0.names.clone(),
            not_before: self.0.not_before,
            not_after: self.0.not_after,
            pem: [certificate, key, other.0.pem[2].clone()],
        }))
    }

    /// Where it came from, for errors and logs.
    #[must_use]
    pub fn origin(&self) -> &str {
        &self.0.origin
    }

    /// Whom the certificate names.
    #[must_use]
    pub fn names(&self) -> &[String] {
        &self.0.names
    }

    /// When the certificate began, in seconds since 1970.
    #[must_use]
    pub fn not_before(&self) -> i64 {
        self.0.not_before
    }

    /// When the certificate ends, in seconds since 1970.
    #[must_use]
    pub fn not_after(&self) -> i64 {
        self.0.not_after
    }

    /// The content, as [`Secret::from_map`] takes it. It has the key: for memory only.
    #[must_use]
    pub fn parts(&self) -> BTreeMap<String, Vec<u8>> {
        let names = [CERTIFICATE, KEY, AUTHORITIES].map(str::to_owned);
        names.into_iter().zip(self.0.pem.clone()).collect()
    }

    pub(super) fn side(&self) -> Side {
        self.0.side
    }

    pub(super) fn chain(&self) -> Vec<CertificateDer<'static>> {
        self.0.chain.clone()
    }

    pub(super) fn key(&self) -> PrivateKeyDer<'static> {
        self.0.key.clone_key()
    }

    pub(super) fn roots(&self) -> Arc<RootCertStore> {
        self.0.roots.clone()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Secret")
            .field("origin", &self.0.origin)
            .field("side", &self.0.side)
            .field("names", &self.0.names)
            .field("not_after", &self.0.not_after)
            .finish_non_exhaustive()
    }
}

pub(super) fn unusable(origin: &str, source: rustls::Error) -> CertificateError {
    CertificateError::Unusable {
        origin: origin.to_owned(),
        source,
    }
}

fn part<'a>(
    origin: &str,
    parts: &'a BTreeMap<String, Vec<u8>>,
    (name, alias): (&'static str, &'static str),
) -> Result<&'a [u8], CertificateError> {
    let bytes = parts
        .get(name)
        .or_else(|| parts.get(alias))
        .filter(|bytes| !bytes.is_empty())
        .ok_or_else(|| CertificateError::Missing {
            origin: origin.to_owned(),
            part: name,
            accepted: vec![name, alias],
        })?;
    if bytes.len() > PART_LIMIT {
        return Err(CertificateError::TooLong {
            origin: origin.to_owned(),
            part: name,
            limit: PART_LIMIT,
        });
    }
    Ok(bytes)
}

fn certificates(
    origin: &str,
    part: &'static str,
    pem: &[u8],
) -> Result<Vec<CertificateDer<'static>>, CertificateError> {
    CertificateDer::pem_slice_iter(pem)
        .collect::<Result<Vec<_>, _>>()
        .ok()
        .filter(|certificates| !certificates.is_empty())
        .ok_or_else(|| CertificateError::NotPem {
            origin: origin.to_owned(),
            part,
            wanted: "certificate",
        })
}

/// When the first certificate in `pem` ends, in seconds since 1970, whether it has already or not.
#[must_use]
pub fn end_of(pem: &[u8]) -> Option<i64> {
    let (_, pem) = x509_parser::pem::parse_x509_pem(pem).ok()?;
    let certificate = pem.parse_x509().ok()?;
    Some(certificate.validity().not_after.timestamp())
}

/// What the handshake would refuse too, but with words that name the file. Returns names, begin and end.
fn check(
    origin: &str,
    leaf: &CertificateDer<'_>,
    side: Side,
    term: Term,
) -> Result<(Vec<String>, i64, i64), CertificateError> {
    let malformed = |problem: String| CertificateError::Malformed {
        origin: origin.to_owned(),
        problem,
    };
    let (_, parsed) = X509Certificate::from_der(leaf).map_err(|e| malformed(e.to_string()))?;
    let now = OffsetDateTime::now_utc().unix_timestamp();
    let (not_before, not_after) = (
        parsed.validity().not_before.timestamp(),
        parsed.validity().not_after.timestamp(),
    );
    match term {
        Term::Running if now > not_after => {
            return Err(CertificateError::Expired {
                origin: origin.to_owned(),
                not_after,
            });
        }
        Term::Over if now <= not_after => {
            return Err(CertificateError::NotExpired {
                origin: origin.to_owned(),
                not_after,
            });
        }
        _ => {}
    }
    if now < not_before {
        return Err(CertificateError::NotYetValid {
            origin: origin.to_owned(),
            not_before,
        });
    }
    let usage = parsed
        .extended_key_usage()
        .map_err(|e| malformed(e.to_string()))?;
    let allowed = usage.is_none_or(|usage| {
        usage.value.any
            || match side {
                Side::Server => usage.value.server_auth,
                Side::Client => usage.value.client_auth,
            }
    });
    if !allowed {
        return Err(CertificateError::WrongUsage {
            origin: origin.to_owned(),
            wanted: side.usage(),
        });
    }
    Ok((names::names(&parsed), not_before, not_after))
}
