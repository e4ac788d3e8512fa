//! Finding the managed authority, and taking it from stage to stage.

use std::time::Duration;

use futures::Stream;
use k8s_openapi::api::core::v1::Secret as SecretObject;
use kube::ResourceExt;
use kube::api::{ListParams, ObjectMeta};
use kube::core::PartialObjectMeta;
use time::OffsetDateTime;

use super::authority::{self, Kept, Marks};
use super::certificates::{
    Certificates, FINGERPRINT, SecretsError, Wanted, api, by_controller, from_data, hash, origin,
    to_data,
};
use crate::csi::chain;
use crate::kube::api::VOLUME_LABEL;
use crate::kube::apply::is_conflict;
use crate::tls::{AUTHORITIES, Secret};

/// Annotation on what was issued here: by which authority, and which ones its `ca.crt` has; by their hashes.
const ISSUER: &str = "hawser.dev/issuer";
pub(super) const TRUSTED: &str = "hawser.dev/trusted";

/// How often the authority is looked at.
const LOOK: Duration = Duration::from_secs(10);

/// Secrets that are named at most: a person begins with some.
const NAMED: usize = 8;

impl Certificates {
    /// The managed authority: made once. One that is lost is never replaced behind what it issued.
    pub(super) async fn authority(&self) -> Result<Kept, SecretsError> {
        for _ in 0..2 {
            if let Some(object) = self.read(authority::NAME).await? {
                let kept = kept(&object);
                let marks = kept.marks(hash);
                self.marks.send_if_modified(|before| {
                    let is_new = before.as_ref() != Some(&marks);
                    *before = Some(marks);
                    is_new
                });
                return Ok(kept);
            }
            if !self.issued().await?.is_empty() {
                return Err(SecretsError::AuthorityMissing);
            }
            let made = Kept::new().map_err(SecretsError::Authority)?;
            let object = SecretObject {
                metadata: ObjectMeta {
                    name: Some(authority::NAME.to_owned()),
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
                data: Some(to_data(made.data)),
                ..SecretObject::default()
            };
            match self.secrets.create(&by_controller(), &object).await {
                Ok(_) => tracing::info!(secret = authority::NAME, "made the certificate authority"),
                // Another volume's reconciliation was faster: theirs counts.
                Err(error) if is_conflict(&error) => {}
                Err(error) => return Err(api(format!("make Secret {}", authority::NAME))(error)),
            }
        }
        Err(SecretsError::AuthorityMissing)
    }

    /// What the authority issued, without its content.
    async fn issued(&self) -> Result<Vec<PartialObjectMeta<SecretObject>>, SecretsError> {
        let ours = ListParams::default().labels(VOLUME_LABEL);
        let listed = self.secrets.list_metadata(&ours).await;
        let mut listed = listed
            .map_err(api("list the Secrets that were issued"))?
            .items;
        listed.retain(|one| one.annotations().contains_key(FINGERPRINT));
        Ok(listed)
    }

    /// Yields when the Secrets of all volumes have to be looked at, for the authority is another.
    pub(super) fn changes(&self) -> impl Stream<Item = ()> + Send + 'static + use<> {
        futures::stream::unfold(self.marks.subscribe(), |mut marks| async move {
            marks.changed().await.ok().map(|()| ((), marks))
        })
    }

    /// Replaces the authority when that is due, stage by stage; for ever.
    pub(super) async fn keep_authority(&self) {
        loop {
            if let Err(error) = self.step().await {
                tracing::warn!(
                    error = chain(&error),
                    "the authority cannot be looked after"
                );
            }
            let overlap = Duration::from_secs(u64::try_from(self.overlap).unwrap_or(0).max(1));
            tokio::time::sleep(LOOK.min(overlap)).await;
        }
    }

    async fn step(&self) -> Result<(), SecretsError> {
        let Some(object) = self.read(authority::NAME).await? else {
            return Ok(());
        };
        // Also tells the marks, should somebody have changed it.
        let kept = self.authority().await?;
        let mut late = Vec::new();
        if kept.stage().is_some() {
            let marks = kept.marks(hash);
            for one in self.issued().await? {
                let has = |annotation: &str, mark: &String| {
                    one.annotations().get(annotation) == Some(mark)
                };
                if !has(TRUSTED, &marks.trusted) || !has(ISSUER, &marks.issuer) {
                    late.push(one.name_any());
                }
            }
        }
        if !late.is_empty() {
            late.truncate(NAMED);
            tracing::info!(
                ?late,
                "the next authority waits for these Secrets, among others"
            );
        }
        let now = OffsetDateTime::now_utc().unix_timestamp();
        let next = kept.next(now, late.is_empty(), self.overlap);
        let Some(next) = next.map_err(SecretsError::Authority)? else {
            return Ok(());
        };
        let mut changed = object;
        changed.data = Some(to_data(next.data.clone()));
        changed.metadata.annotations = Some(next.annotations.clone());
        let written = self
            .secrets
            .replace(authority::NAME, &by_controller(), &changed)
            .await;
        written.map_err(api(format!("write Secret {}", authority::NAME)))?;
        if next.stage() != kept.stage() {
            tracing::info!(stage = next.stage(), "the authority is being replaced");
        }
        self.marks.send_replace(Some(next.marks(hash)));
        Ok(())
    }
}

fn kept(object: &SecretObject) -> Kept {
    Kept {
        data: from_data(object),
        annotations: object.annotations().clone(),
    }
}

/// Notes on an issued Secret by whom it was issued, and whom it trusts.
pub(super) fn mark(object: &mut SecretObject, marks: &Marks) {
    let annotations = object.annotations_mut();
    annotations.insert(ISSUER.to_owned(), marks.issuer.clone());
    annotations.insert(TRUSTED.to_owned(), marks.trusted.clone());
}

/// Whether a Secret's certificate is of the authority that issues. Where no note says so, its own `ca.crt` does: there
/// was one authority only.
pub(super) fn is_of(object: &SecretObject, wanted: &Wanted, marks: &Marks) -> bool {
    if let Some(issuer) = object.annotations().get(ISSUER) {
        return *issuer == marks.issuer;
    }
    let data = from_data(object);
    let trusts = data.get(AUTHORITIES).map(|bundle| hash(bundle));
    let secret = Secret::from_map(&origin(object), &data, wanted.side);
    trusts.as_ref() == Some(&marks.issuer)
        && secret.is_ok_and(|secret| secret.check_issuer().is_ok())
}
