//! The Secrets of a volume's two sides, from whichever source.
//!
//! What was issued here carries its fingerprint. A Secret whose content is another was put there by somebody: it is
//! used if it can be, and never written to.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{PersistentVolume, Secret as SecretObject};
use kube::api::{
    ApiResource, DeleteParams, DynamicObject, GroupVersionKind, Patch, PatchParams, PostParams,
    Preconditions,
};
use kube::{Api, Client, ResourceExt};
use rustls::crypto::aws_lc_rs::cipher_suite;
use serde_json::json;
use time::OffsetDateTime;
use tokio::sync::watch;

use super::authority::{self, Marks};
use super::rotation::{TRUSTED, is_of, mark};
use super::server::metadata;
use crate::csi::chain;
use crate::kube::api::{CONTROLLER, Issuer, NbdVolume, Source, VOLUME_LABEL};
use crate::kube::apply::{is_not_found, is_quota};
use crate::tls::{
    AUTHORITIES, CERTIFICATE, CertificateError, Secret, Side, client_identity, date,
    server_identity,
};
use crate::volumes::VolumeId;

/// Annotation on what was issued here: the SHA-256 of its `tls.crt`.
pub(super) const FINGERPRINT: &str = "hawser.dev/fingerprint";

/// A leaf is renewed when less than this is left of it, in seconds: a third of its 90 days.
const RENEW_BEFORE: i64 = 30 * 24 * 60 * 60;

/// Why a volume has not the Secrets it needs.
#[derive(Debug, thiserror::Error)]
pub(super) enum SecretsError {
    #[error(
        "Secret {name} with the authority is missing, although Secrets that it issued are there: restore it, or \
         delete those Secrets too (label {VOLUME_LABEL}) to have a new authority issue all of them",
        name = authority::NAME
    )]
    AuthorityMissing,
    #[error("the authority cannot be used")]
    Authority(#[source] CertificateError),
    #[error("{0}")]
    Unusable(String),
    #[error("{0}; until then no new session begins, and those that are open go on")]
    Expired(CertificateError),
    #[error("{0}; raise the ResourceQuota of the driver's namespace, or delete Secrets there")]
    Quota(String),
    #[error("Secret {0} is not there yet: {1}")]
    Awaited(String, String),
    #[error(
        "cert-manager's API is not there; install cert-manager, or use another source of certificates"
    )]
    NoCertManager,
    #[error("cannot {doing}")]
    Api {
        doing: String,
        #[source]
        source: kube::Error,
    },
}

impl SecretsError {
    /// The reason of the condition that tells it.
    pub(super) fn reason(&self) -> &'static str {
        match self {
            Self::AuthorityMissing => "AuthorityMissing",
            Self::Authority(_) => "AuthorityUnusable",
            Self::Unusable(_) => "SecretUnusable",
            Self::Expired(_) => "SecretExpired",
            Self::Quota(_) => "QuotaExceeded",
            Self::Awaited(..) => "SecretMissing",
            Self::NoCertManager => "CertManagerMissing",
            Self::Api { .. } => "ApiError",
        }
    }
}

pub(super) fn api(doing: impl Into<String>) -> impl FnOnce(kube::Error) -> SecretsError {
    let doing = doing.into();
    move |source| match &source {
        kube::Error::Api(status) if is_quota(&source) => {
            SecretsError::Quota(format!("cannot {doing}: {}", status.message))
        }
        _ => SecretsError::Api { doing, source },
    }
}

/// What a volume's certificates come to.
#[derive(Debug)]
pub(super) struct Ready {
    /// The server's Secret.
    pub(super) server: String,
    /// When the first of them ends, in seconds since 1970.
    pub(super) end: i64,
    /// When the first of them has to be looked at again, in seconds since 1970.
    pub(super) look_at: i64,
    /// What somebody has to do, where one that is not renewed here ends soon.
    pub(super) ends_soon: Option<String>,
    /// What is wrong, though not with what the server needs now.
    pub(super) problem: Option<SecretsError>,
}

/// A certificate's time.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Term {
    secret: String,
    not_before: i64,
    not_after: i64,
    /// Whether it is renewed here.
    is_renewed: bool,
}

impl Term {
    /// When it ends soon: a third of its time is left, or a month of a long one.
    fn soon(&self) -> i64 {
        self.not_after - RENEW_BEFORE.min((self.not_after - self.not_before) / 3)
    }

    fn warning(&self) -> String {
        format!(
            "the certificate in Secret {} ends at {}, and no new session begins after that: put the next one there",
            self.secret,
            date(self.not_after)
        )
    }
}

/// What to do about a Secret of one's own that is not there.
fn make_it(wanted: &Wanted) -> String {
    format!(
        "make it, of type kubernetes.io/tls with ca.crt, for {}",
        wanted.identity
    )
}

/// One side's Secret, and whom it must name.
pub(super) struct Wanted {
    pub(super) side: Side,
    name: String,
    identity: String,
}

/// The name of the clients' Secret: StorageClasses can say it by the PersistentVolume's name alone.
pub(super) fn client_secret(volume: &NbdVolume) -> String {
    let name = &volume.spec.name;
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    let is_edge = |b: &u8| *b != b'-';
    if name.bytes().all(plain) && name.as_bytes().first().is_some_and(is_edge) {
        return format!("{name}-hawser-client");
    }
    // Such a name is no PersistentVolume's.
    format!("{}-client", volume.name_any())
}

/// Whether a Secret of that name is one that somebody made for the volume, as far as its object says.
pub(super) fn is_own(volume: &NbdVolume, name: &str) -> bool {
    let source = &volume.spec.certificates;
    let server = match &source.server_secret {
        Some(named) => named == name,
        None => format!("{}-server", volume.name_any()) == name,
    };
    source.source == Source::Secret && (server || client_secret(volume) == name)
}

/// Issues, renews and checks.
pub(super) struct Certificates {
    client: Client,
    pub(super) secrets: Api<SecretObject>,
    persistent_volumes: Api<PersistentVolume>,
    pub(super) namespace: String,
    /// Seconds that everybody is given to read what was written for a change of the authority.
    pub(super) overlap: i64,
    /// What volumes' Secrets are to have, once that is known; told to whoever has to write them anew.
    pub(super) marks: watch::Sender<Option<Marks>>,
}

impl Certificates {
    pub(super) fn new(client: Client, namespace: &str, overlap: Duration) -> Self {
        Self {
            overlap: i64::try_from(overlap.as_secs()).unwrap_or(i64::MAX),
            marks: watch::Sender::new(None),
            secrets: Api::namespaced(client.clone(), namespace),
            persistent_volumes: Api::all(client.clone()),
            client,
            namespace: namespace.to_owned(),
        }
    }

    /// Sees to it that both Secrets of a volume are there, right, and not about to end.
    pub(super) async fn ensure(
        &self,
        volume: &NbdVolume,
        id: &VolumeId,
    ) -> Result<Ready, SecretsError> {
        let usual = format!("{id}-server");
        let source = &volume.spec.certificates;
        let named = source
            .server_secret
            .clone()
            .filter(|_| source.source == Source::Secret);
        let server = Wanted {
            side: Side::Server,
            name: named.unwrap_or(usual),
            identity: server_identity(id),
        };
        let client = Wanted {
            side: Side::Client,
            name: client_secret(volume),
            identity: client_identity(id),
        };
        let mut terms = Vec::new();
        let mut problem = None;
        // The clients' Secret of one's own is the StorageClass's.
        let sides = match source.source {
            Source::Secret => vec![&server],
            _ => vec![&server, &client],
        };
        for wanted in sides {
            terms.push(match (source.source, &source.issuer) {
                (Source::Managed, _) => self.managed(volume, wanted).await?,
                (Source::CertManager, Some(issuer)) => {
                    let asked = self.request(volume, wanted, issuer).await;
                    let given = self.given(wanted, "cert-manager has not issued it");
                    match (asked, given.await) {
                        // What it issued before is good for as long as it is.
                        (Err(error @ SecretsError::NoCertManager), Ok(term)) => {
                            problem = Some(error);
                            term
                        }
                        (asked, given) => asked.and(given)?,
                    }
                }
                (Source::CertManager, None) => {
                    return Err(SecretsError::Unusable(
                        "spec.certificates names no issuer".into(),
                    ));
                }
                (Source::Secret, _) => self.given(wanted, &make_it(wanted)).await?,
            });
        }
        if source.source == Source::Secret {
            match self.clients_own(volume, id).await {
                Ok(term) => terms.extend(term),
                Err(error) => problem = Some(error),
            }
        }
        let now = OffsetDateTime::now_utc().unix_timestamp();
        let ends: Vec<_> = terms
            .iter()
            .filter(|term| !term.is_renewed && term.soon() <= now)
            .map(Term::warning)
            .collect();
        let look_at = terms.iter().map(|term| match term.soon() {
            soon if soon > now => soon,
            _ => term.not_after,
        });
        Ok(Ready {
            server: server.name,
            end: terms
                .iter()
                .map(|term| term.not_after)
                .min()
                .unwrap_or(i64::MAX),
            look_at: look_at.min().unwrap_or(i64::MAX),
            ends_soon: (!ends.is_empty()).then(|| ends.join("; ")),
            problem,
        })
    }

    /// The clients' Secret that the volume's PersistentVolume names, where we may see it.
    async fn clients_own(
        &self,
        volume: &NbdVolume,
        id: &VolumeId,
    ) -> Result<Option<Term>, SecretsError> {
        let name = &volume.spec.name;
        let read = self.persistent_volumes.get_opt(name).await;
        let spec = read
            .map_err(api(format!("read PersistentVolume {name}")))?
            .and_then(|volume| volume.spec?.csi);
        let Some(named) = spec.and_then(|csi| csi.node_stage_secret_ref) else {
            return Ok(None);
        };
        let (Some(name), Some(namespace)) = (named.name, named.namespace) else {
            return Ok(None);
        };
        if namespace != self.namespace {
            return Ok(None);
        }
        let wanted = Wanted {
            side: Side::Client,
            name,
            identity: client_identity(id),
        };
        self.given(&wanted, &make_it(&wanted)).await.map(Some)
    }

    /// When the managed authority ends, in seconds since 1970, if there is one.
    pub(super) async fn authority_end(&self) -> Result<Option<i64>, SecretsError> {
        let object = self.read(authority::NAME).await?;
        let data = object.and_then(|object| object.data).unwrap_or_default();
        Ok(data
            .get(CERTIFICATE)
            .and_then(|pem| crate::tls::end_of(&pem.0)))
    }

    pub(super) async fn read(&self, name: &str) -> Result<Option<SecretObject>, SecretsError> {
        let read = self.secrets.get_opt(name).await;
        read.map_err(api(format!("read Secret {name}")))
    }

    /// A Secret that somebody else makes.
    async fn given(&self, wanted: &Wanted, missing: &str) -> Result<Term, SecretsError> {
        let Some(object) = self.read(&wanted.name).await? else {
            return Err(SecretsError::Awaited(
                wanted.name.clone(),
                missing.to_owned(),
            ));
        };
        check(&object, wanted).map_err(|error| match error {
            CertificateError::Expired { .. } => SecretsError::Expired(error),
            error => SecretsError::Unusable(chain(&error)),
        })
    }

    /// A Secret that the managed authority issues. Returns when its certificate ends.
    async fn managed(&self, volume: &NbdVolume, wanted: &Wanted) -> Result<Term, SecretsError> {
        let now = OffsetDateTime::now_utc().unix_timestamp();
        let Some(object) = self.read(&wanted.name).await? else {
            return self.issue(volume, wanted, None).await;
        };
        let is_ours = object.annotations().get(FINGERPRINT) == Some(&fingerprint(&object));
        let term = match check(&object, wanted) {
            Ok(term) => term,
            Err(CertificateError::Expired { .. }) if is_ours => {
                return self.issue(volume, wanted, Some(&object)).await;
            }
            Err(error @ CertificateError::Expired { .. }) => {
                return Err(SecretsError::Expired(error));
            }
            Err(error) => {
                return Err(SecretsError::Unusable(format!(
                    "{}; put the right one there, or delete the Secret to have it issued again",
                    chain(&error)
                )));
            }
        };
        if !is_ours {
            return Ok(term);
        }
        let known = self.marks.borrow().clone();
        let marks = match known {
            Some(marks) => marks,
            None => self.authority().await?.marks(hash),
        };
        if term.not_after - now <= RENEW_BEFORE || !is_of(&object, wanted, &marks) {
            return self.issue(volume, wanted, Some(&object)).await;
        }
        if object.annotations().get(TRUSTED) != Some(&marks.trusted) {
            self.tell_trusted(&object).await?;
        }
        Ok(Term {
            is_renewed: true,
            ..term
        })
    }

    /// Writes whom to trust now into a Secret whose certificate stays.
    async fn tell_trusted(&self, object: &SecretObject) -> Result<(), SecretsError> {
        let kept = self.authority().await?;
        let mut object = object.clone();
        let trusted = ByteString(kept.trusted().to_owned());
        let data = object.data.get_or_insert_default();
        data.insert(AUTHORITIES.to_owned(), trusted);
        mark(&mut object, &kept.marks(hash));
        let name = object.name_any();
        let written = self.secrets.replace(&name, &by_controller(), &object).await;
        written.map_err(api(format!("write Secret {name}")))?;
        tracing::info!(secret = name, "told whom to trust");
        Ok(())
    }

    async fn issue(
        &self,
        volume: &NbdVolume,
        wanted: &Wanted,
        old: Option<&SecretObject>,
    ) -> Result<Term, SecretsError> {
        let id = volume.name_any();
        let parsed: VolumeId = id
            .parse()
            .map_err(|error| SecretsError::Unusable(format!("{error}")))?;
        let kept = self.authority().await?;
        let authority = kept.authority().map_err(SecretsError::Authority)?;
        let issued = match wanted.side {
            Side::Server => authority.issue_server(&parsed, &[]),
            Side::Client => authority.issue_client(&parsed),
        };
        let mut data = to_data(issued.map_err(SecretsError::Authority)?);
        data.insert(
            AUTHORITIES.to_owned(),
            ByteString(kept.trusted().to_owned()),
        );
        let mut object = SecretObject {
            metadata: metadata(volume, wanted.name.clone()),
            type_: Some("kubernetes.io/tls".to_owned()),
            data: Some(data),
            ..SecretObject::default()
        };
        let fingerprint = fingerprint(&object);
        object
            .annotations_mut()
            .insert(FINGERPRINT.to_owned(), fingerprint);
        mark(&mut object, &kept.marks(hash));
        let term = check(&object, wanted).map_err(SecretsError::Authority)?;
        let doing = format!("write Secret {}", wanted.name);
        let params = by_controller();
        let written = match old {
            None => self.secrets.create(&params, &object).await,
            Some(old) => {
                object.metadata.resource_version = old.resource_version();
                self.secrets.replace(&wanted.name, &params, &object).await
            }
        };
        written.map_err(api(doing))?;
        tracing::info!(volume = id, secret = wanted.name, "issued a certificate");
        Ok(Term {
            is_renewed: true,
            ..term
        })
    }

    /// Asks cert-manager for one side's Secret.
    async fn request(
        &self,
        volume: &NbdVolume,
        wanted: &Wanted,
        issuer: &Issuer,
    ) -> Result<(), SecretsError> {
        let (usage, side) = match wanted.side {
            Side::Server => ("server auth", "server"),
            Side::Client => ("client auth", "client"),
        };
        let name = format!("{}-{side}", volume.name_any());
        let certificate = json!({
            "apiVersion": "cert-manager.io/v1",
            "kind": "Certificate",
            "metadata": metadata(volume, name.clone()),
            "spec": {
                "secretName": wanted.name,
                "dnsNames": [wanted.identity],
                "usages": ["digital signature", usage],
                "privateKey": { "algorithm": "ECDSA", "size": 256, "rotationPolicy": "Always" },
                "issuerRef": { "name": issuer.name, "kind": issuer.kind, "group": issuer.group },
            },
        });
        let params = PatchParams::apply(CONTROLLER).force();
        let applied = self
            .requests()
            .patch(&name, &params, &Patch::Apply(certificate))
            .await;
        match applied {
            Ok(_) => Ok(()),
            Err(error) if is_not_found(&error) => Err(SecretsError::NoCertManager),
            Err(error) => Err(api(format!("apply Certificate {name}"))(error)),
        }
    }

    fn requests(&self) -> Api<DynamicObject> {
        let kind = GroupVersionKind::gvk("cert-manager.io", "v1", "Certificate");
        let resource = ApiResource::from_gvk_with_plural(&kind, "certificates");
        Api::namespaced_with(self.client.clone(), &self.namespace, &resource)
    }

    /// Removes what a volume's sides had; a Secret that somebody made by hand stays.
    pub(super) async fn remove(&self, volume: &NbdVolume) -> Result<(), SecretsError> {
        let id = volume.name_any();
        if volume.spec.certificates.source == Source::CertManager {
            for side in ["server", "client"] {
                let name = format!("{id}-{side}");
                match self.requests().delete(&name, &Default::default()).await {
                    Err(error) if !is_not_found(&error) => {
                        return Err(api(format!("delete Certificate {name}"))(error));
                    }
                    _ => {}
                }
            }
        }
        for name in [format!("{id}-server"), client_secret(volume)] {
            let Some(object) = self.read(&name).await? else {
                continue;
            };
            let is_ours = object.annotations().contains_key(FINGERPRINT)
                || volume.spec.certificates.source == Source::CertManager;
            if !is_ours {
                continue;
            }
            let params = DeleteParams {
                preconditions: Some(Preconditions {
                    uid: object.uid(),
                    resource_version: object.resource_version(),
                }),
                ..DeleteParams::default()
            };
            match self.secrets.delete(&name, &params).await {
                Err(error) if !is_not_found(&error) => {
                    return Err(api(format!("delete Secret {name}"))(error));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

pub(super) fn by_controller() -> PostParams {
    PostParams {
        field_manager: Some(CONTROLLER.to_owned()),
        ..PostParams::default()
    }
}

pub(super) fn origin(object: &SecretObject) -> String {
    format!("Secret {}", object.name_any())
}

pub(super) fn from_data(object: &SecretObject) -> BTreeMap<String, Vec<u8>> {
    let data = object.data.iter().flatten();
    data.map(|(key, value)| (key.clone(), value.0.clone()))
        .collect()
}

pub(super) fn to_data(parts: BTreeMap<String, Vec<u8>>) -> BTreeMap<String, ByteString> {
    parts
        .into_iter()
        .map(|(key, value)| (key, ByteString(value)))
        .collect()
}

/// The hash of a Secret's certificate.
fn fingerprint(object: &SecretObject) -> String {
    let certificate = object.data.as_ref().and_then(|data| data.get(CERTIFICATE));
    certificate.map_or_else(String::new, |certificate| hash(&certificate.0))
}

/// SHA-256, in hex.
pub(super) fn hash(bytes: &[u8]) -> String {
    // rustls names its hash functions by the cipher suites that use them.
    let Some(suite) = cipher_suite::TLS13_CHACHA20_POLY1305_SHA256.tls13() else {
        return String::new();
    };
    let hash = suite.common.hash_provider.hash(bytes);
    hash.as_ref()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Checks a Secret as the other side of the connection will. Returns its certificate's time.
fn check(object: &SecretObject, wanted: &Wanted) -> Result<Term, CertificateError> {
    let secret = Secret::from_map(&origin(object), &from_data(object), wanted.side)?;
    let is_for_all = wanted.side == Side::Server
        && wanted
            .identity
            .split_once('.')
            .is_some_and(|(_, parent)| secret.names().contains(&format!("*.{parent}")));
    if !is_for_all {
        secret.check_identity(&wanted.identity)?;
    }
    Ok(Term {
        secret: wanted.name.clone(),
        not_before: secret.not_before(),
        not_after: secret.not_after(),
        is_renewed: false,
    })
}
