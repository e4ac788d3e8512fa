//! Whom a certificate names: the identities that bind a client and a server to one volume.

use rustls_pki_types::CertificateDer;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::volumes::VolumeId;

/// The DNS name in the certificate of a volume's server.
#[must_use]
pub fn server_identity(volume: &VolumeId) -> String {
    format!("{volume}.server.hawser.dev")
}

/// The DNS name in the certificate of a volume's clients.
#[must_use]
pub fn client_identity(volume: &VolumeId) -> String {
    format!("{volume}.client.hawser.dev")
}

/// Everybody a certificate names: its DNS, URI and mail alternative names; the common name only where it has none of
/// them, as certificates made by hand often do. A certificate that cannot be read names nobody.
#[must_use]
pub fn certificate_names(certificate: &CertificateDer<'_>) -> Vec<String> {
    X509Certificate::from_der(certificate)
        .map(|(_, parsed)| names(&parsed))
        .unwrap_or_default()
}

pub(super) fn names(certificate: &X509Certificate<'_>) -> Vec<String> {
    let alternative: Vec<String> = certificate
        .subject_alternative_name()
        .ok()
        .flatten()
        .into_iter()
        .flat_map(|extension| &extension.value.general_names)
        .filter_map(|name| match name {
            GeneralName::DNSName(name) | GeneralName::URI(name) | GeneralName::RFC822Name(name) => {
                Some((*name).to_owned())
            }
            _ => None,
        })
        .collect();
    if !alternative.is_empty() {
        return alternative;
    }
    certificate
        .subject()
        .iter_common_name()
        .filter_map(|name| name.as_str().ok().map(str::to_owned))
        .collect()
}
