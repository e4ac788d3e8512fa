//! Userspace NBD sessions inside TLS: what `attach` and `verify` connect with.
//!
//! Sessions block, and each has one deadline for everything it does, so that a server which sends a byte a second
//! ends it just as one that never answers. What is said is decided by the pure machines in [`crate::nbd::client`];
//! here are only the socket, rustls and the clock.

mod error;
mod kernel;
mod plaintext;
mod probe;
mod secure;
#[cfg(test)]
mod tests;
mod transmission;
mod wire;

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;
use rustls_pki_types::ServerName;

pub use self::error::{ClientError, Reason, Refusal, Step};
pub use self::kernel::{KernelSession, ProxySession, kernel_session, proxy_session};
pub use self::probe::ProbeSession;
pub use self::transmission::{OwnedChunk, Reply, Transmitting};
use crate::nbd::ExportName;

/// What every session begins with.
#[derive(Clone)]
pub struct Target {
    pub address: SocketAddr,
    pub export: ExportName,
    /// Made for [`crate::tls::Profile::Kernel`] where the session becomes a device.
    pub tls: Arc<ClientConfig>,
    /// The name that the server's certificate must bear.
    pub server_name: ServerName<'static>,
    /// For connecting and negotiating; a probe session has it for all that it does.
    pub timeout: Duration,
}

/// Without the TLS configuration, which has the key.
impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Target")
            .field("address", &self.address)
            .field("export", &self.export)
            .field("server_name", &self.server_name)
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

impl Target {
    /// Puts a reason where it belongs.
    fn failed(&self, step: Step) -> impl FnOnce(Reason) -> ClientError + use<> {
        let (address, export) = (self.address, self.export.clone());
        move |reason| ClientError {
            address,
            export,
            step,
            reason: Box::new(reason),
        }
    }
}
