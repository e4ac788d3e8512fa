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
mod provider;
pub mod records;
mod secret;
mod server;
#[cfg(test)]
mod tests;

pub use self::authority::{Authority, Leaf};
pub use self::client::{Profile, anonymous_client_config, client_config, trusting_client_config};
pub use self::error::{CertificateError, date, explain};
pub use self::files::{read_secret, write_secret};
pub use self::names::{certificate_names, client_identity, server_identity};
pub use self::provider::warm_up;
pub use self::secret::{Secret, Side, authorities, end_of};
pub use self::server::{Refresh, ServerOptions, ServerTls};

use self::provider::{kernel_provider, provider};

/// The names of a Secret's parts, as kubernetes.io/tls has them.
pub const CERTIFICATE: &str = "tls.crt";
/// See [`CERTIFICATE`].
pub const KEY: &str = "tls.key";
/// The authorities that the other side's certificate must come from.
pub const AUTHORITIES: &str = "ca.crt";
