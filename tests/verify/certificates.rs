//! One volume's certificates, and servers that look at a client's as they should, or do not.

use std::sync::Arc;
use std::time::Duration;

use hawser::nbd::ExportName;
use hawser::tls::{self, Authority, Leaf, Profile, Secret, Side};
use hawser::verify::{Identity, Target};
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::version::{TLS12, TLS13};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig,
    SignatureScheme,
};

/// Which clients a server lets in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Clients {
    /// Those of the volume's authority.
    Genuine,
    /// Those too that present nothing.
    AlsoAnonymous,
    /// Whoever presents anything.
    AnyCertificate,
    /// Those too whose certificate has ended.
    AlsoExpired,
    /// Everyone: no certificate is asked for.
    Everyone,
}

/// Which versions of TLS a server speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Versions {
    Both,
    Only12,
    Only13,
}

/// A server's configuration, the target that reaches it with a genuine client's certificate once its address is known,
/// and all the certificates there are to try it with.
pub(crate) struct Volume {
    pub(crate) config: Arc<ServerConfig>,
    pub(crate) target: Target,
    pub(crate) identity: Identity,
    pub(crate) other: Identity,
    pub(crate) expired: Identity,
}

/// A volume whose server has a certificate with this name.
pub(crate) fn volume(clients: Clients, versions: Versions, name: &str) -> Volume {
    let authority = Authority::temporary().unwrap();
    let leaf = Leaf::new(Side::Server, vec![name.into()]);
    let server = authority.issue(&leaf).unwrap();
    let issue = |name: &str, ended: bool| {
        let mut leaf = Leaf::new(Side::Client, vec![name.into()]);
        if ended {
            leaf.not_after = leaf.not_before;
            leaf.not_before -= Duration::from_secs(24 * 60 * 60);
        }
        let directory = tempfile::tempdir().unwrap();
        tls::write_secret(directory.path(), &authority.issue(&leaf).unwrap()).unwrap();
        if ended {
            return Secret::load_expired(directory.path(), Side::Client).unwrap();
        }
        Secret::load(directory.path(), Side::Client).unwrap()
    };
    let secret = issue("volume.client.test", false);
    let target = Target {
        address: ([127, 0, 0, 1], 0).into(),
        export: ExportName::try_from("volume/attachment").unwrap(),
        tls: tls::client_config(&secret, Profile::Probe).unwrap(),
        server_name: ServerName::try_from("volume.server.test").unwrap(),
        timeout: Duration::from_secs(20),
    };
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&server[tls::AUTHORITIES]) {
        roots.add(certificate.unwrap()).unwrap();
    }
    let provider = Arc::new(default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone());
    let verifier = match clients {
        Clients::AlsoAnonymous => verifier.allow_unauthenticated().build().unwrap(),
        _ => verifier.build().unwrap(),
    };
    let versions: &[_] = match versions {
        Versions::Both => &[&TLS12, &TLS13],
        Versions::Only12 => &[&TLS12],
        Versions::Only13 => &[&TLS13],
    };
    let builder = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .unwrap();
    let builder = match clients {
        Clients::Genuine | Clients::AlsoAnonymous => builder.with_client_cert_verifier(verifier),
        Clients::AnyCertificate => {
            builder.with_client_cert_verifier(Arc::new(Lax(verifier, |_| true)))
        }
        Clients::AlsoExpired => {
            let expired = |refusal: &rustls::Error| {
                matches!(
                    refusal,
                    rustls::Error::InvalidCertificate(
                        CertificateError::Expired | CertificateError::ExpiredContext { .. }
                    )
                )
            };
            builder.with_client_cert_verifier(Arc::new(Lax(verifier, expired)))
        }
        Clients::Everyone => builder.with_no_client_auth(),
    };
    let chain = CertificateDer::pem_slice_iter(&server[tls::CERTIFICATE])
        .map(Result::unwrap)
        .collect();
    let key = PrivateKeyDer::from_pem_slice(&server[tls::KEY]).unwrap();
    let mut config = builder.with_single_cert(chain, key).unwrap();
    config.send_tls13_tickets = 0;
    Volume {
        config: Arc::new(config),
        target,
        identity: Identity::new(&secret).unwrap(),
        other: Identity::new(&issue("another.client.test", false)).unwrap(),
        expired: Identity::new(&issue("volume.client.test", true)).unwrap(),
    }
}

/// Checks that the client has the key it shows, and lets some pass whose certificate is refused.
#[derive(Debug)]
struct Lax(Arc<dyn ClientCertVerifier>, fn(&rustls::Error) -> bool);

impl ClientCertVerifier for Lax {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.0.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        match self.0.verify_client_cert(leaf, chain, now) {
            Err(refusal) if (self.1)(&refusal) => Ok(ClientCertVerified::assertion()),
            verdict => verdict,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0
            .verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0
            .verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}
