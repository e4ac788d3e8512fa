//! Identities and certificates: Secret-shaped directories, the managed certificate authority, rustls
//! configurations, reload.
//!
//! Everything else takes what is made here, so that "TLS 1.3, both sides authenticated, no tickets, no resumption"
//! is decided in one place.

mod authority;
mod client;
mod error;
mod files;
mod names;
mod secret;
mod server;
#[cfg(test)]
mod tests;

pub use self::authority::{Authority, Leaf};
pub use self::client::{Profile, anonymous_client_config, client_config, trusting_client_config};
pub use self::error::{CertificateError, date, explain};
pub use self::files::{read_secret, write_secret};
pub use self::names::{certificate_names, client_identity, server_identity};
pub use self::secret::{Secret, Side, authorities, end_of};
pub use self::server::{Refresh, ServerOptions, ServerTls};

use std::sync::Arc;

use rustls::crypto::{CryptoProvider, aws_lc_rs};

/// The names of a Secret's parts, as kubernetes.io/tls has them.
pub const CERTIFICATE: &str = "tls.crt";
/// See [`CERTIFICATE`].
pub const KEY: &str = "tls.key";
/// The authorities that the other side's certificate must come from.
pub const AUTHORITIES: &str = "ca.crt";

/// The provider is always named: rustls' process-wide default is for libraries that cannot be told.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

/// Begins to collect the randomness that the first handshake would otherwise wait for.
///
/// The first random number of a process costs aws-lc 50 to 130 ms of measuring the processor's jitter. A thread does
/// that now; whoever needs a random number before it has, waits as long as without it.
pub fn warm_up() {
    let warm = || {
        // Where this fails, so will whoever needs randomness, and say so.
        let _ = aws_lc_rs::default_provider()
            .secure_random
            .fill(&mut [0; 8]);
    };
    // Without a thread nothing is lost but time.
    let _ = std::thread::Builder::new()
        .name("warm-up".into())
        .spawn(warm);
}
