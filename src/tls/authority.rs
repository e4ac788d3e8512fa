//! The managed certificate authority: it issues each volume's server and client certificates.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use time::OffsetDateTime;

use super::error::CertificateError;
use super::files::{read_secret, write_secret};
use super::names::{client_identity, server_identity};
use super::secret::Side;
use super::{AUTHORITIES, CERTIFICATE, KEY};
use crate::volumes::VolumeId;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// How long a leaf is valid. It is renewed when a third of that is left.
const LEAF: Duration = DAY.saturating_mul(90);

/// How long the authority is valid: it cannot be replaced without touching every client.
const AUTHORITY: Duration = DAY.saturating_mul(3650);

/// How far apart two machines' clocks may be.
const CLOCK_SKEW: Duration = Duration::from_secs(5 * 60);

/// Bytes of a PEM file that is read back.
const FILE_LIMIT: usize = 64 << 10;

/// A certificate authority with its key.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: String,
    not_after: i64,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").finish_non_exhaustive()
    }
}

/// A certificate to issue.
#[derive(Debug, Clone)]
pub struct Leaf {
    pub side: Side,
    /// DNS names; the first is also the common name.
    pub names: Vec<String>,
    pub not_before: OffsetDateTime,
    pub not_after: OffsetDateTime,
}

impl Leaf {
    /// A leaf of the usual lifetime that names `names`.
    #[must_use]
    pub fn new(side: Side, names: Vec<String>) -> Self {
        let now = OffsetDateTime::now_utc();
        Self {
            side,
            names,
            not_before: now - CLOCK_SKEW,
            not_after: now + LEAF,
        }
    }
}

impl Authority {
    /// The authority kept in this directory; made and written there when there is none.
    pub fn open(directory: &Path) -> Result<Self, CertificateError> {
        let origin = directory.display().to_string();
        let parts = if directory.exists() {
            read_secret(directory, Side::Server, FILE_LIMIT)?
        } else {
            BTreeMap::new()
        };
        if parts.is_empty() {
            let (authority, parts) = Self::make()?;
            write_secret(directory, &parts)?;
            return Ok(authority);
        }
        Self::from_map(&origin, &parts)
    }

    /// The authority in a Secret. `origin` names it in errors.
    pub fn from_map(
        origin: &str,
        parts: &BTreeMap<String, Vec<u8>>,
    ) -> Result<Self, CertificateError> {
        let origin = origin.to_owned();
        let text = |part: &'static str, wanted| {
            let bytes = parts.get(part).ok_or_else(|| CertificateError::Missing {
                origin: origin.clone(),
                part,
                accepted: vec![part],
            })?;
            std::str::from_utf8(bytes).map_err(|_| CertificateError::NotPem {
                origin: origin.clone(),
                part,
                wanted,
            })
        };
        let (certificate, key) = (text(CERTIFICATE, "certificate")?, text(KEY, "private key")?);
        let key = KeyPair::from_pem(key).map_err(|_| CertificateError::NotPem {
            origin: origin.clone(),
            part: KEY,
            wanted: "private key",
        })?;
        let not_after = check_authority(&origin, certificate, &key)?;
        let issuer = Issuer::from_ca_cert_pem(certificate, key).map_err(issuing(&origin))?;
        Ok(Self {
            issuer,
            certificate: certificate.to_owned(),
            not_after,
        })
    }

    /// An authority that is kept nowhere and that nobody trusts.
    pub fn temporary() -> Result<Self, CertificateError> {
        Self::make().map(|(authority, _)| authority)
    }

    /// When its certificate ends, in seconds since 1970.
    #[must_use]
    pub fn not_after(&self) -> i64 {
        self.not_after
    }

    /// A new authority, and the Secret to keep it in.
    pub fn make() -> Result<(Self, BTreeMap<String, Vec<u8>>), CertificateError> {
        Self::make_for(AUTHORITY)
    }

    /// The same with another lifetime.
    pub fn make_for(
        lifetime: Duration,
    ) -> Result<(Self, BTreeMap<String, Vec<u8>>), CertificateError> {
        let key = KeyPair::generate().map_err(issuing("the authority"))?;
        // Two authorities of one name would be told apart by a bad signature only.
        let point = key.public_key_raw();
        let tail = &point[point.len().saturating_sub(8)..];
        let mark: String = tail.iter().map(|byte| format!("{byte:02x}")).collect();
        let subject = &format!("Hawser volumes {mark}");
        let issuing = issuing(subject);
        let now = OffsetDateTime::now_utc();
        let mut params = CertificateParams::default();
        params.distinguished_name = common_name(subject);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.not_before = now - CLOCK_SKEW;
        params.not_after = now + lifetime;
        let certificate = params.self_signed(&key).map_err(&issuing)?.pem();
        let parts = BTreeMap::from([
            (CERTIFICATE.to_owned(), certificate.clone().into_bytes()),
            (KEY.to_owned(), key.serialize_pem().into_bytes()),
            (AUTHORITIES.to_owned(), certificate.clone().into_bytes()),
        ]);
        let authority = Self {
            not_after: params.not_after.unix_timestamp(),
            issuer: Issuer::new(params, key),
            certificate,
        };
        Ok((authority, parts))
    }

    /// A Secret for a volume's server. `also` are further DNS names under which it is reached.
    pub fn issue_server(
        &self,
        volume: &VolumeId,
        also: &[String],
    ) -> Result<BTreeMap<String, Vec<u8>>, CertificateError> {
        let mut names = vec![server_identity(volume)];
        names.extend_from_slice(also);
        self.issue(&Leaf::new(Side::Server, names))
    }

    /// A Secret for a volume's clients.
    pub fn issue_client(
        &self,
        volume: &VolumeId,
    ) -> Result<BTreeMap<String, Vec<u8>>, CertificateError> {
        self.issue(&Leaf::new(Side::Client, vec![client_identity(volume)]))
    }

    /// A Secret with a new key: `tls.crt`, `tls.key`, `ca.crt`.
    pub fn issue(&self, leaf: &Leaf) -> Result<BTreeMap<String, Vec<u8>>, CertificateError> {
        let subject = leaf.names.first().map_or("nobody", String::as_str);
        let issuing = issuing(subject);
        let mut params = CertificateParams::default();
        params.distinguished_name = common_name(subject);
        for name in &leaf.names {
            let name = name.clone().try_into().map_err(&issuing)?;
            params.subject_alt_names.push(SanType::DnsName(name));
        }
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![match leaf.side {
            Side::Server => ExtendedKeyUsagePurpose::ServerAuth,
            Side::Client => ExtendedKeyUsagePurpose::ClientAuth,
        }];
        params.use_authority_key_identifier_extension = true;
        params.not_before = leaf.not_before;
        params.not_after = leaf.not_after;
        let key = KeyPair::generate().map_err(&issuing)?;
        let certificate = params.signed_by(&key, &self.issuer).map_err(&issuing)?;
        Ok(BTreeMap::from([
            (CERTIFICATE.to_owned(), certificate.pem().into_bytes()),
            (KEY.to_owned(), key.serialize_pem().into_bytes()),
            (
                AUTHORITIES.to_owned(),
                self.certificate.clone().into_bytes(),
            ),
        ]))
    }
}

fn common_name(name: &str) -> DistinguishedName {
    let mut subject = DistinguishedName::new();
    // X.520 allows a common name 64 characters; names that matter are in the alternative names.
    let end = name.floor_char_boundary(64);
    subject.push(DnType::CommonName, &name[..end]);
    subject
}

fn issuing(subject: &str) -> impl Fn(rcgen::Error) -> CertificateError + use<> {
    let subject = subject.to_owned();
    move |source| CertificateError::Issue {
        subject: subject.clone(),
        source,
    }
}

/// An authority that has ended, or whose key is another's, would issue certificates that nobody accepts. Returns its end.
fn check_authority(origin: &str, pem: &str, key: &KeyPair) -> Result<i64, CertificateError> {
    use x509_parser::prelude::{FromDer, X509Certificate};
    let malformed = |problem: String| CertificateError::Malformed {
        origin: origin.to_owned(),
        problem,
    };
    let (_, pem) =
        x509_parser::pem::parse_x509_pem(pem.as_bytes()).map_err(|_| CertificateError::NotPem {
            origin: origin.to_owned(),
            part: CERTIFICATE,
            wanted: "certificate",
        })?;
    let (_, parsed) =
        X509Certificate::from_der(&pem.contents).map_err(|e| malformed(e.to_string()))?;
    let not_after = parsed.validity().not_after.timestamp();
    if OffsetDateTime::now_utc().unix_timestamp() > not_after {
        return Err(CertificateError::Expired {
            origin: origin.to_owned(),
            not_after,
        });
    }
    if !parsed.is_ca() {
        return Err(malformed("it is not a certificate authority's".to_owned()));
    }
    if parsed.public_key().raw != rcgen::PublicKeyData::subject_public_key_info(key).as_slice() {
        return Err(CertificateError::KeyMismatch {
            origin: origin.to_owned(),
        });
    }
    Ok(not_after)
}
