//! A client's configuration, in two profiles.

use std::sync::Arc;

use rustls::client::{Resumption, WantsClientCert};
use rustls::version::{TLS12, TLS13};
use rustls::{ClientConfig, RootCertStore};

use super::error::CertificateError;
use super::secret::{Secret, Side, unusable};
use super::{kernel_provider, provider};

/// What becomes of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// The kernel takes its keys: ChaCha20-Poly1305 only, which has no record limit, so neither side ever has a reason
    /// for the KeyUpdate that would kill the device (K4).
    Kernel,
    /// It stays in userspace: any cipher of TLS 1.3.
    Probe,
    /// Somebody else's server is examined: TLS 1.2 or 1.3, as the two sides agree.
    Any,
    /// The same, to see whether it speaks TLS 1.2.
    Tls12,
}

/// A configuration that presents the Secret's certificate and trusts its authorities. The server's name is checked
/// by every connection made with it.
pub fn client_config(
    secret: &Secret,
    profile: Profile,
) -> Result<Arc<ClientConfig>, CertificateError> {
    if secret.side() != Side::Client {
        return Err(CertificateError::WrongUsage {
            origin: secret.origin().to_owned(),
            wanted: "clientAuth",
        });
    }
    let config = builder(secret.origin(), secret.roots(), profile)?
        .with_client_auth_cert(secret.chain(), secret.key())
        .map_err(|source| unusable(secret.origin(), source))?;
    Ok(finish(config, profile))
}

/// The same without a certificate: a client that no server of ours may let in.
pub fn anonymous_client_config(secret: &Secret) -> Result<Arc<ClientConfig>, CertificateError> {
    trusting_client_config(secret.roots(), Profile::Probe)
}

/// A client without a certificate that trusts these authorities.
pub fn trusting_client_config(
    authorities: Arc<RootCertStore>,
    profile: Profile,
) -> Result<Arc<ClientConfig>, CertificateError> {
    let config = builder("the given authorities", authorities, profile)?.with_no_client_auth();
    Ok(finish(config, profile))
}

fn builder(
    origin: &str,
    authorities: Arc<RootCertStore>,
    profile: Profile,
) -> Result<rustls::ConfigBuilder<ClientConfig, WantsClientCert>, CertificateError> {
    let versions: &[_] = match profile {
        Profile::Kernel | Profile::Probe => &[&TLS13],
        Profile::Any => &[&TLS13, &TLS12],
        Profile::Tls12 => &[&TLS12],
    };
    let provider = match profile {
        Profile::Probe | Profile::Any | Profile::Tls12 => provider(),
        Profile::Kernel => kernel_provider(),
    };
    Ok(ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .map_err(|source| unusable(origin, source))?
        .with_root_certificates(authorities))
}

fn finish(mut config: ClientConfig, profile: Profile) -> Arc<ClientConfig> {
    config.resumption = Resumption::disabled();
    config.enable_secret_extraction = profile == Profile::Kernel;
    Arc::new(config)
}
