//! One volume's certificates, and servers that look at a client's as they should, or do not.

use std::sync::Arc;
use std::time::Duration;

use hawser::nbd::ExportName;
use hawser::tls::{self, Authority, Leaf, Profile, Secret, Side};
use hawser::verify::Target;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig, SignatureScheme,
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
    /// Everyone: no certificate is asked for.
    Everyone,
}

/// A server's configuration, and the target that reaches it with a genuine client's certificate once its address is
/// known.
pub(crate) fn volume(clients: Clients) -> (Arc<ServerConfig>, Target) {
    let authority = Authority::temporary().unwrap();
    let leaf = Leaf::new(Side::Server, vec!["volume.server.test".into()]);
    let server = authority.issue(&leaf).unwrap();
    let leaf = Leaf::new(Side::Client, vec!["volume.client.test".into()]);
    let client = authority.issue(&leaf).unwrap();
    let secret = Secret::from_map("the client Secret", &client, Side::Client).unwrap();
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
    let builder = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap();
    let builder = match clients {
        Clients::Genuine | Clients::AlsoAnonymous => builder.with_client_cert_verifier(verifier),
        Clients::AnyCertificate => {
            builder.with_client_cert_verifier(Arc::new(AnyCertificate(verifier)))
        }
        Clients::Everyone => builder.with_no_client_auth(),
    };
    let chain = CertificateDer::pem_slice_iter(&server[tls::CERTIFICATE])
        .map(Result::unwrap)
        .collect();
    let key = PrivateKeyDer::from_pem_slice(&server[tls::KEY]).unwrap();
    let mut config = builder.with_single_cert(chain, key).unwrap();
    config.send_tls13_tickets = 0;
    (Arc::new(config), target)
}

/// Checks that the client has the key it shows, and not where its certificate comes from.
#[derive(Debug)]
struct AnyCertificate(Arc<dyn ClientCertVerifier>);

impl ClientCertVerifier for AnyCertificate {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.0.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
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
