//! The Secrets of a volume's two sides, from whichever source.
//!
//! What was issued here carries its fingerprint. A Secret whose content is another was put there by somebody: it is
//! used if it can be, and never written to.

use std::collections::BTreeMap;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret as SecretObject;
use kube::api::{
    ApiResource, DynamicObject, GroupVersionKind, ListParams, ObjectMeta, Patch, PatchParams,
    PostParams,
};
use kube::{Api, Client, ResourceExt};
use rustls::crypto::aws_lc_rs::cipher_suite;
use serde_json::json;
use time::OffsetDateTime;

use super::server::metadata;
use crate::csi::chain;
use crate::kube::api::{CONTROLLER, Issuer, NbdVolume, Source, VOLUME_LABEL};
use crate::kube::apply::{is_conflict, is_not_found};
use crate::tls::{
    Authority, CERTIFICATE, CertificateError, Secret, Side, client_identity, server_identity,
};
use crate::volumes::VolumeId;

/// The Secret of the managed authority.
const AUTHORITY: &str = "hawser-ca";

/// Annotation on what was issued here: the SHA-256 of its `tls.crt`.
const FINGERPRINT: &str = "hawser.dev/fingerprint";

/// A leaf is renewed when less than this is left of it, in seconds: a third of its 90 days.
const RENEW_BEFORE: i64 = 30 * 24 * 60 * 60;

/// Why a volume has not the Secrets it needs.
#[derive(Debug, thiserror::Error)]
pub(super) enum SecretsError {
    #[error(
        "Secret {AUTHORITY} with the authority is missing, although Secrets that it issued are there: restore it, or \
         delete those Secrets too (label {VOLUME_LABEL}) to have a new authority issue all of them"
    )]
    AuthorityMissing,
    #[error("the authority cannot be used")]
    Authority(#[source] CertificateError),
    #[error("{0}")]
    Unusable(String),
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
            Self::Awaited(..) => "SecretMissing",
            Self::NoCertManager => "CertManagerMissing",
            Self::Api { .. } => "ApiError",
        }
    }
}

fn api(doing: impl Into<String>) -> impl FnOnce(kube::Error) -> SecretsError {
    let doing = doing.into();
    move |source| SecretsError::Api { doing, source }
}

/// What a volume's certificates come to.
#[derive(Debug)]
pub(super) struct Ready {
    /// The server's Secret.
    pub(super) server: String,
    /// When the first of them ends, in seconds since 1970.
    pub(super) end: i64,
    /// When the first of them has to be looked at again, in seconds since 1970.
    pub(super) renew_at: i64,
}

/// One side's Secret, and whom it must name.
struct Wanted {
    side: Side,
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

/// Issues, renews and checks.
pub(super) struct Certificates {
    client: Client,
    secrets: Api<SecretObject>,
    namespace: String,
}

impl Certificates {
    pub(super) fn new(client: Client, namespace: &str) -> Self {
        Self {
            secrets: Api::namespaced(client.clone(), namespace),
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
        let mut end = i64::MAX;
        // The clients' Secret of one's own is the StorageClass's, which only the kubelet reads.
        let sides = match source.source {
            Source::Secret => vec![&server],
            _ => vec![&server, &client],
        };
        for wanted in sides {
            let not_after = match (source.source, &source.issuer) {
                (Source::Managed, _) => self.managed(volume, wanted).await?,
                (Source::CertManager, Some(issuer)) => {
                    self.request(volume, wanted, issuer).await?;
                    self.given(wanted, "cert-manager has not issued it").await?
                }
                (Source::CertManager, None) => {
                    return Err(SecretsError::Unusable(
                        "spec.certificates names no issuer".into(),
                    ));
                }
                (Source::Secret, _) => {
                    let what = format!(
                        "make it, of type kubernetes.io/tls with ca.crt, for {}",
                        wanted.identity
                    );
                    self.given(wanted, &what).await?
                }
            };
            end = end.min(not_after);
        }
        Ok(Ready {
            server: server.name,
            end,
            renew_at: end - RENEW_BEFORE,
        })
    }

    /// When the managed authority ends, in seconds since 1970, if there is one.
    pub(super) async fn authority_end(&self) -> Result<Option<i64>, SecretsError> {
        let object = self.read(AUTHORITY).await?;
        let data = object.and_then(|object| object.data).unwrap_or_default();
        Ok(data
            .get(CERTIFICATE)
            .and_then(|pem| crate::tls::end_of(&pem.0)))
    }

    async fn read(&self, name: &str) -> Result<Option<SecretObject>, SecretsError> {
        let read = self.secrets.get_opt(name).await;
        read.map_err(api(format!("read Secret {name}")))
    }

    /// A Secret that somebody else makes.
    async fn given(&self, wanted: &Wanted, missing: &str) -> Result<i64, SecretsError> {
        let Some(object) = self.read(&wanted.name).await? else {
            return Err(SecretsError::Awaited(
                wanted.name.clone(),
                missing.to_owned(),
            ));
        };
        check(&object, wanted).map_err(|error| SecretsError::Unusable(chain(&error)))
    }

    /// A Secret that the managed authority issues. Returns when its certificate ends.
    async fn managed(&self, volume: &NbdVolume, wanted: &Wanted) -> Result<i64, SecretsError> {
        let now = OffsetDateTime::now_utc().unix_timestamp();
        let Some(object) = self.read(&wanted.name).await? else {
            return self.issue(volume, wanted, None).await;
        };
        let is_ours = object.annotations().get(FINGERPRINT) == Some(&fingerprint(&object));
        match check(&object, wanted) {
            Ok(not_after) if !is_ours || not_after - now > RENEW_BEFORE => Ok(not_after),
            Ok(_) | Err(CertificateError::Expired { .. }) if is_ours => {
                self.issue(volume, wanted, Some(&object)).await
            }
            Ok(not_after) => Ok(not_after),
            Err(error) => Err(SecretsError::Unusable(format!(
                "{}; put the right one there, or delete the Secret to have it issued again",
                chain(&error)
            ))),
        }
    }

    async fn issue(
        &self,
        volume: &NbdVolume,
        wanted: &Wanted,
        old: Option<&SecretObject>,
    ) -> Result<i64, SecretsError> {
        let id = volume.name_any();
        let parsed: VolumeId = id
            .parse()
            .map_err(|error| SecretsError::Unusable(format!("{error}")))?;
        let authority = self.authority().await?;
        let issued = match wanted.side {
            Side::Server => authority.issue_server(&parsed, &[]),
            Side::Client => authority.issue_client(&parsed),
        };
        let data = to_data(issued.map_err(SecretsError::Authority)?);
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
        let not_after = check(&object, wanted).map_err(SecretsError::Authority)?;
        let doing = format!("write Secret {}", wanted.name);
        let params = PostParams {
            field_manager: Some(CONTROLLER.to_owned()),
            ..PostParams::default()
        };
        let written = match old {
            None => self.secrets.create(&params, &object).await,
            Some(old) => {
                object.metadata.resource_version = old.resource_version();
                self.secrets.replace(&wanted.name, &params, &object).await
            }
        };
        written.map_err(api(doing))?;
        tracing::info!(volume = id, secret = wanted.name, "issued a certificate");
        Ok(not_after)
    }

    /// The managed authority: made once. One that is lost is never replaced behind what it issued.
    async fn authority(&self) -> Result<Authority, SecretsError> {
        for _ in 0..2 {
            if let Some(object) = self.read(AUTHORITY).await? {
                return Authority::from_map(&origin(&object), &from_data(&object))
                    .map_err(SecretsError::Authority);
            }
            let issued = ListParams::default().labels(VOLUME_LABEL);
            let listed = self.secrets.list_metadata(&issued).await;
            let listed = listed.map_err(api("list the Secrets that were issued"))?;
            if listed
                .items
                .iter()
                .any(|one| one.annotations().contains_key(FINGERPRINT))
            {
                return Err(SecretsError::AuthorityMissing);
            }
            let (_, parts) = Authority::make().map_err(SecretsError::Authority)?;
            let object = SecretObject {
                metadata: ObjectMeta {
                    name: Some(AUTHORITY.to_owned()),
                    namespace: Some(self.namespace.clone()),
                    labels: Some(
                        [
                            ("app.kubernetes.io/name", "hawser"),
                            ("app.kubernetes.io/managed-by", "hawser-controller"),
                        ]
                        .map(|(key, value)| (key.to_owned(), value.to_owned()))
                        .into(),
                    ),
                    ..ObjectMeta::default()
                },
                type_: Some("kubernetes.io/tls".to_owned()),
                data: Some(to_data(parts)),
                ..SecretObject::default()
            };
            match self.secrets.create(&PostParams::default(), &object).await {
                Ok(_) => tracing::info!(secret = AUTHORITY, "made the certificate authority"),
                // Another volume's reconciliation was faster: theirs counts.
                Err(error) if is_conflict(&error) => {}
                Err(error) => return Err(api(format!("make Secret {AUTHORITY}"))(error)),
            }
        }
        Err(SecretsError::AuthorityMissing)
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
            match self.secrets.delete(&name, &Default::default()).await {
                Err(error) if !is_not_found(&error) => {
                    return Err(api(format!("delete Secret {name}"))(error));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fn origin(object: &SecretObject) -> String {
    format!("Secret {}", object.name_any())
}

fn from_data(object: &SecretObject) -> BTreeMap<String, Vec<u8>> {
    let data = object.data.iter().flatten();
    data.map(|(key, value)| (key.clone(), value.0.clone()))
        .collect()
}

fn to_data(parts: BTreeMap<String, Vec<u8>>) -> BTreeMap<String, ByteString> {
    parts
        .into_iter()
        .map(|(key, value)| (key, ByteString(value)))
        .collect()
}

/// The SHA-256 of the certificate, in hex.
fn fingerprint(object: &SecretObject) -> String {
    let certificate = object.data.as_ref().and_then(|data| data.get(CERTIFICATE));
    // rustls names its hash functions by the cipher suites that use them.
    let suite = cipher_suite::TLS13_CHACHA20_POLY1305_SHA256.tls13();
    let (Some(certificate), Some(suite)) = (certificate, suite) else {
        return String::new();
    };
    let hash = suite.common.hash_provider.hash(&certificate.0);
    hash.as_ref()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Checks a Secret as the other side of the connection will. Returns when its certificate ends.
fn check(object: &SecretObject, wanted: &Wanted) -> Result<i64, CertificateError> {
    let secret = Secret::from_map(&origin(object), &from_data(object), wanted.side)?;
    let is_for_all = wanted.side == Side::Server
        && wanted
            .identity
            .split_once('.')
            .is_some_and(|(_, parent)| secret.names().contains(&format!("*.{parent}")));
    if !is_for_all {
        secret.check_identity(&wanted.identity)?;
    }
    Ok(secret.not_after())
}
