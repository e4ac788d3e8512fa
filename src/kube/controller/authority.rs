//! The managed authority: one Secret, and how another takes its place without an outage.
//!
//! | stage | issues | `ca.crt` of each volume's Secrets |
//! |---|---|---|
//! | at rest | the authority | it |
//! | announced | it still | it, and the next |
//! | replaced | the next | the next, and the former |
//!
//! and then at rest again. The next stage begins when every Secret that was issued here has what this one asks for, and
//! everybody had the time to read it: so no certificate is shown to somebody who does not trust its issuer yet.

use std::collections::BTreeMap;

use crate::tls::{AUTHORITIES, Authority, CERTIFICATE, CertificateError, KEY};

/// The Secret of the managed authority.
pub(super) const NAME: &str = "hawser-ca";

/// Annotation by which somebody asks for another authority; its value does not matter.
pub(super) const ROTATE: &str = "hawser.dev/rotate";

/// Annotation that says the stage: "announced" or "replaced".
const STAGE: &str = "hawser.dev/stage";

/// Annotation that says since when every Secret has what the stage asks for, in seconds since 1970.
const COMPLETE: &str = "hawser.dev/complete-since";

const NEXT_CERTIFICATE: &str = "next.crt";
const NEXT_KEY: &str = "next.key";

/// An authority is replaced when less than this is left of it, in seconds: a tenth of its 10 years.
const REPLACE_BEFORE: i64 = 365 * 24 * 60 * 60;

/// The authority's Secret: its content, and what its annotations say.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Kept {
    pub(super) data: BTreeMap<String, Vec<u8>>,
    pub(super) annotations: BTreeMap<String, String>,
}

/// Whom the volumes' Secrets are to trust, and by whom their certificates are to be; told apart by their hashes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Marks {
    pub(super) issuer: String,
    pub(super) trusted: String,
}

impl Kept {
    /// A new authority's.
    pub(super) fn new() -> Result<Self, CertificateError> {
        let (_, data) = Authority::make()?;
        Ok(Self {
            data,
            annotations: BTreeMap::new(),
        })
    }

    fn part(&self, name: &str) -> &[u8] {
        self.data.get(name).map_or(&[], Vec::as_slice)
    }

    pub(super) fn authority(&self) -> Result<Authority, CertificateError> {
        Authority::from_map(&format!("Secret {NAME}"), &self.data)
    }

    /// The certificate of the authority that issues.
    pub(super) fn certificate(&self) -> &[u8] {
        self.part(CERTIFICATE)
    }

    /// All that is to be trusted: the `ca.crt` of each volume's Secrets.
    pub(super) fn trusted(&self) -> &[u8] {
        match self.part(AUTHORITIES) {
            // Somebody's own authority may come without.
            [] => self.certificate(),
            bundle => bundle,
        }
    }

    pub(super) fn marks(&self, hash: impl Fn(&[u8]) -> String) -> Marks {
        Marks {
            issuer: hash(self.certificate()),
            trusted: hash(self.trusted()),
        }
    }

    pub(super) fn stage(&self) -> Option<&str> {
        self.annotations.get(STAGE).map(String::as_str)
    }

    fn complete_since(&self) -> Option<i64> {
        self.annotations.get(COMPLETE)?.parse().ok()
    }

    /// What the Secret becomes next, if anything: `is_complete` says whether every volume's Secret has what the stage
    /// asks for, `overlap` how many seconds everybody is given to read them.
    pub(super) fn next(
        &self,
        now: i64,
        is_complete: bool,
        overlap: i64,
    ) -> Result<Option<Self>, CertificateError> {
        let not_after = match self.authority() {
            Ok(authority) => authority.not_after(),
            // Nothing that it issued is good any more: there is nobody to be considerate of.
            Err(CertificateError::Expired { .. }) => return Self::new().map(Some),
            Err(error) => return Err(error),
        };
        let Some(stage) = self.stage() else {
            let is_due = self.annotations.contains_key(ROTATE) || not_after - now < REPLACE_BEFORE;
            return match is_due {
                true => self.announce().map(Some),
                false => Ok(None),
            };
        };
        let since = self.complete_since();
        Ok(match (is_complete, since) {
            (false, None) => None,
            (false, Some(_)) => Some(self.with(COMPLETE, None)),
            (true, None) => Some(self.with(COMPLETE, Some(now.to_string()))),
            (true, Some(since)) if now - since < overlap => None,
            (true, Some(_)) if stage == "announced" => Some(self.replace()),
            (true, Some(_)) => Some(self.retire()),
        })
    }

    fn with(&self, annotation: &str, value: Option<String>) -> Self {
        let mut next = self.clone();
        match value {
            Some(value) => next.annotations.insert(annotation.to_owned(), value),
            None => next.annotations.remove(annotation),
        };
        next
    }

    /// The next authority is there, and to be trusted beside this one.
    fn announce(&self) -> Result<Self, CertificateError> {
        let (_, mut made) = Authority::make()?;
        let mut next = self.with(STAGE, Some("announced".to_owned()));
        next.annotations.remove(ROTATE);
        let certificate = made.remove(CERTIFICATE).unwrap_or_default();
        next.trust(&[self.certificate(), &certificate]);
        next.data.insert(NEXT_CERTIFICATE.to_owned(), certificate);
        let key = made.remove(KEY).unwrap_or_default();
        next.data.insert(NEXT_KEY.to_owned(), key);
        Ok(next)
    }

    /// The next authority issues from now on; the former is trusted as long as something of it may be shown.
    fn replace(&self) -> Self {
        let mut next = self.with(STAGE, Some("replaced".to_owned()));
        next.annotations.remove(COMPLETE);
        let certificate = next.data.remove(NEXT_CERTIFICATE).unwrap_or_default();
        let key = next.data.remove(NEXT_KEY).unwrap_or_default();
        next.trust(&[&certificate, self.certificate()]);
        next.data.insert(CERTIFICATE.to_owned(), certificate);
        next.data.insert(KEY.to_owned(), key);
        next
    }

    /// The former authority is trusted no more.
    fn retire(&self) -> Self {
        let mut next = self.with(STAGE, None);
        next.annotations.remove(COMPLETE);
        next.trust(&[self.certificate()]);
        next
    }

    fn trust(&mut self, certificates: &[&[u8]]) {
        self.data
            .insert(AUTHORITIES.to_owned(), certificates.concat());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::{Secret, Side};
    use crate::volumes::VolumeId;

    const HOUR: i64 = 3600;

    /// What a volume's two sides have: issued by `kept`, trusting what it trusts.
    fn sides(kept: &Kept) -> [Secret; 2] {
        let (authority, volume) = (kept.authority().unwrap(), VolumeId::of_name("pvc-1"));
        let server = authority.issue_server(&volume, &[]).unwrap();
        let client = authority.issue_client(&volume).unwrap();
        [(server, Side::Server), (client, Side::Client)].map(|(mut parts, side)| {
            parts.insert(AUTHORITIES.to_owned(), kept.trusted().to_owned());
            Secret::from_map("here", &parts, side).unwrap()
        })
    }

    fn accept(one: &[Secret; 2], other: &[Secret; 2]) -> bool {
        let ([server, client], [other_server, other_client]) = (one, other);
        // Each side's certificate against what the other's Secret trusts.
        client.trusting(other_server).check_issuer().is_ok()
            && server.trusting(other_client).check_issuer().is_ok()
    }

    #[test]
    fn whoever_is_a_stage_behind_is_understood() {
        let now = 1_800_000_000;
        let first = Kept::new().unwrap();
        assert!(first.next(now, true, HOUR).unwrap().is_none());
        let asked = first.with(ROTATE, Some("please".to_owned()));
        let announced = asked.next(now, true, HOUR).unwrap().unwrap();
        assert!(!announced.annotations.contains_key(ROTATE));
        assert_eq!(announced.certificate(), first.certificate());
        // Not before everybody has it, and had the time to read it.
        assert!(announced.next(now, false, HOUR).unwrap().is_none());
        let complete = announced.next(now, true, HOUR).unwrap().unwrap();
        assert!(complete.next(now + HOUR - 1, true, HOUR).unwrap().is_none());
        // A Secret came that has it not: the time begins again.
        let again = complete.next(now + HOUR, false, HOUR).unwrap().unwrap();
        assert!(again == announced);
        let replaced = complete.next(now + HOUR, true, HOUR).unwrap().unwrap();
        assert_ne!(replaced.certificate(), first.certificate());
        assert!(!replaced.data.contains_key(NEXT_KEY));
        let complete = replaced.next(now, true, HOUR).unwrap().unwrap();
        let rest = complete.next(now + HOUR, true, HOUR).unwrap().unwrap();
        assert_eq!((rest.stage(), rest.trusted()), (None, rest.certificate()));
        assert!(rest.next(now, true, HOUR).unwrap().is_none());

        let stages = [&first, &announced, &replaced, &rest].map(sides);
        for pair in stages.windows(2) {
            for (one, other) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                assert!(accept(&pair[one], &pair[other]));
            }
        }
        // What the next one issued is not shown before it is trusted.
        assert!(!accept(&stages[2], &stages[0]));
        assert!(!accept(&stages[3], &stages[0]));
    }

    #[test]
    fn an_authority_is_replaced_in_its_last_year() {
        let kept = Kept::new().unwrap();
        let end = kept.authority().unwrap().not_after();
        let early = kept.next(end - REPLACE_BEFORE, true, HOUR).unwrap();
        assert!(early.is_none());
        let due = kept.next(end - REPLACE_BEFORE + 1, true, HOUR).unwrap();
        assert_eq!(due.unwrap().stage(), Some("announced"));
    }
}
