//! The sessions that become a device's sockets: opened in userspace, compared, and handed over.

use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use rustix::net::sockopt;
use rustls_pki_types::ServerName;

use super::backend::Backend;
use super::error::AttachError;
use super::foreign::Foreign;
use super::kernel::DeviceSocket;
use super::proxy::Proxies;
use super::record::Record;
use super::{Transport, blocking};
use crate::client::{self, KernelSession, ProbeSession, ProxySession, Reason, Target};
use crate::nbd::client::Transmission;
use crate::nbd::{ExportInfo, ExportName, TransmissionFlags};
use crate::sys::ktls::Encrypted;
use crate::tls::{self, Profile, Secret};
use crate::volumes::VolumeId;

/// For connecting and negotiating one session.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// The block size of every device, in bytes, unless the server asks for more.
///
/// It is both logical and physical block size to the kernel, so a larger one would shut out images and partition
/// tables made for 512-byte sectors, and file systems that once were made on them. File systems still write
/// blocks of 4096 bytes.
pub(super) const BLOCK_SIZE: u64 = 512;

/// Before kernel 6.15 a block may not be larger than a page (K28), and no machine's is smaller than this.
const LARGEST_BLOCK: u64 = 4096;

/// What a server says of an export, as far as a device depends on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Export {
    /// A multiple of the block size.
    pub(super) size_bytes: u64,
    pub(super) block_size_bytes: u64,
    pub(super) flags: TransmissionFlags,
    pub(super) maximum_payload: Option<u32>,
    /// Servers that are not Hawser's have none.
    pub(super) epoch: Option<u64>,
}

impl Export {
    /// Refuses what no device can be made of.
    pub(super) fn new(volume: &VolumeId, info: &ExportInfo) -> Result<Self, AttachError> {
        let unsuitable = |problem: String| AttachError::Unsuitable {
            volume: volume.clone(),
            problem,
        };
        let minimum = info.block_sizes.map_or(1, |sizes| sizes.minimum);
        let block_size_bytes = BLOCK_SIZE.max(minimum.into());
        if block_size_bytes > LARGEST_BLOCK {
            return Err(unsuitable(format!(
                "its server takes blocks of {minimum} bytes at least, the kernel {LARGEST_BLOCK} at most"
            )));
        }
        // The kernel counts in signed numbers.
        if i64::try_from(info.size).is_err() {
            let size = info.size;
            return Err(unsuitable(format!(
                "its server offers {size} bytes, more than a device can have"
            )));
        }
        let size_bytes = info.size - info.size % block_size_bytes;
        if size_bytes == 0 {
            return Err(unsuitable("its server exports no data at all".into()));
        }
        let described = info.description.as_deref().and_then(described);
        Ok(Self {
            size_bytes,
            block_size_bytes,
            flags: info.flags,
            maximum_payload: info.block_sizes.map(|sizes| sizes.maximum_payload),
            epoch: described.map(|(_, epoch)| epoch),
        })
    }

    /// Whether a session of this export may take the place of a dead one of the device (K20): the same data, and
    /// nothing gone that the kernel relies on. A server may have grown the export already.
    pub(super) fn check_against(
        &self,
        record: &Record,
        device_size_bytes: u64,
    ) -> Result<(), AttachError> {
        let volume = &record.volume;
        let unsuitable = |problem: String| AttachError::Unsuitable {
            volume: volume.clone(),
            problem,
        };
        match (record.epoch, self.epoch) {
            (Some(known), Some(found)) if known != found => {
                return Err(AttachError::EpochChanged {
                    volume: volume.clone(),
                    known,
                    found,
                });
            }
            (Some(_), None) | (None, Some(_)) => {
                return Err(unsuitable(
                    "another kind of server answers in the place of its own".into(),
                ));
            }
            _ => {}
        }
        if self.size_bytes < device_size_bytes {
            return Err(unsuitable(format!(
                "its server now offers {} bytes, but the device has {device_size_bytes}",
                self.size_bytes
            )));
        }
        if self.block_size_bytes > record.block_size_bytes {
            return Err(unsuitable(format!(
                "its server now takes blocks of {} bytes at least, but the device has blocks of {}",
                self.block_size_bytes, record.block_size_bytes
            )));
        }
        let mut relied_on = record.flags.without(TransmissionFlags::READ_ONLY);
        if record.connections == 1 {
            relied_on = relied_on.without(TransmissionFlags::CAN_MULTI_CONN);
        }
        let lacks = relied_on.without(self.flags);
        let writable = |flags: TransmissionFlags| !flags.contains(TransmissionFlags::READ_ONLY);
        if lacks != TransmissionFlags::default()
            || writable(record.flags) && !writable(self.flags)
            || self.maximum_payload < record.maximum_payload && self.maximum_payload.is_some()
        {
            return Err(unsuitable(format!(
                "its server now offers {:?}, but the device was made with {:?}",
                self.flags, record.flags
            )));
        }
        Ok(())
    }
}

/// Reads `hawser volume=<id> epoch=<n>`.
fn described(description: &str) -> Option<(&str, u64)> {
    let mut words = description.strip_prefix("hawser ")?.split(' ');
    let volume = words.next()?.strip_prefix("volume=")?;
    let epoch = words.next()?.strip_prefix("epoch=")?.parse().ok()?;
    words.next().is_none().then_some((volume, epoch))
}

/// Whose export a device is of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Peer {
    pub(super) backend: Backend,
    pub(super) foreign: Option<Foreign>,
}

impl Peer {
    pub(super) fn volume(&self) -> &VolumeId {
        &self.backend.volume
    }

    fn unsuitable(&self, problem: impl Into<String>) -> AttachError {
        AttachError::Unsuitable {
            volume: self.volume().clone(),
            problem: problem.into(),
        }
    }

    /// Where the sessions go, and as whom. Who may have a volume of Hawser's is settled by names in certificates on both
    /// sides; a foreign server has rules of its own for its clients.
    pub(super) fn target(
        &self,
        address: SocketAddr,
        secret: &Secret,
        profile: Profile,
    ) -> Result<Target, AttachError> {
        let volume = self.volume();
        let certificate = |source| AttachError::Certificate {
            volume: volume.clone(),
            source,
        };
        let (export, server_name) = match &self.foreign {
            Some(foreign) => (foreign.export.clone(), foreign.server_name.clone()),
            None => {
                secret
                    .check_identity(&tls::client_identity(volume))
                    .map_err(certificate)?;
                let export = format!("{volume}/{}", self.backend.attachment);
                (export, tls::server_identity(volume))
            }
        };
        Ok(Target {
            address,
            export: ExportName::try_from(export.as_str())
                .map_err(|error| self.unsuitable(error.to_string()))?,
            tls: tls::client_config(secret, profile).map_err(certificate)?,
            server_name: ServerName::try_from(server_name)
                .map_err(|_| self.unsuitable("its server's name cannot be in a certificate"))?,
            timeout: HANDSHAKE,
        })
    }

    /// What the server says of the export; refused, what no device of this volume can be made of.
    pub(super) fn export(&self, info: &ExportInfo) -> Result<Export, AttachError> {
        let described = info.description.as_deref().and_then(described);
        match described {
            Some((volume, _)) if self.foreign.is_none() && volume != self.volume().as_str() => {
                Err(self.unsuitable(format!("its server serves {volume}")))
            }
            _ => Export::new(self.volume(), info),
        }
    }
}

impl Transport {
    /// The sessions of the kernel's sockets have the one cipher that needs no new keys; the proxy can follow any.
    pub(super) fn profile(self) -> Profile {
        match self {
            Self::KernelTls => Profile::Kernel,
            Self::Proxy => Profile::Probe,
        }
    }
}

/// A session whose next byte is transmission's.
pub(super) enum Session {
    KernelTls(Box<KernelSession>),
    Proxy(Box<ProxySession>),
}

impl Session {
    pub(super) fn open(target: &Target, transport: Transport) -> Result<Self, client::ClientError> {
        match transport {
            Transport::KernelTls => {
                client::kernel_session(target).map(|session| Self::KernelTls(Box::new(session)))
            }
            Transport::Proxy => {
                client::proxy_session(target).map(|session| Self::Proxy(Box::new(session)))
            }
        }
    }

    pub(super) fn transmission(&self) -> &Transmission {
        match self {
            Self::KernelTls(session) => &session.transmission,
            Self::Proxy(session) => &session.transmission,
        }
    }

    /// Makes the session ready for the driver. On failure its connection is closed.
    pub(super) fn into_socket(
        self,
        volume: &VolumeId,
        timeout: Duration,
        proxies: &Proxies,
    ) -> Result<DeviceSocket, AttachError> {
        match self {
            Self::KernelTls(session) => {
                notice_silence(&session.socket, timeout)?;
                Encrypted::new(session.socket, session.secrets)
                    .map(DeviceSocket::KernelTls)
                    .map_err(|source| AttachError::KernelTls {
                        volume: volume.clone(),
                        source,
                    })
            }
            Self::Proxy(session) => {
                notice_silence(&session.socket, timeout)?;
                proxies
                    .start(*session)
                    .map(DeviceSocket::Proxy)
                    .map_err(AttachError::system("start the userspace proxy"))
            }
        }
    }
}

/// How much sooner than the driver TCP gives up.
const EARLIER: Duration = Duration::from_secs(1);

/// Lets TCP itself end a connection whose other side has vanished, so that the device loses the socket, and gets
/// another one, although no request is under way.
fn notice_silence(socket: &TcpStream, timeout: Duration) -> Result<(), AttachError> {
    const PROBES: u32 = 3;
    // What TCP could not deliver is thrown away before the driver asks for it on another connection: it must not arrive
    // behind what was written since.
    let unanswered = timeout.saturating_sub(EARLIER).max(timeout / 2);
    let probe = (timeout / PROBES).max(Duration::from_secs(1));
    let milliseconds = u32::try_from(unanswered.as_millis()).unwrap_or(u32::MAX);
    sockopt::set_tcp_user_timeout(socket, milliseconds)
        .and_then(|()| sockopt::set_tcp_keepidle(socket, probe))
        .and_then(|()| sockopt::set_tcp_keepintvl(socket, probe))
        .and_then(|()| sockopt::set_tcp_keepcnt(socket, PROBES))
        .and_then(|()| sockopt::set_socket_keepalive(socket, true))
        .map_err(|errno| AttachError::System {
            doing: "set the socket's timeouts",
            source: errno.into(),
        })
}

/// What the server says of the export now, on a session that ends with it. It is GO that counts: nbd-server 3.24 answers
/// INFO with a size of 0.
pub(super) async fn offered(peer: &Peer, target: Target) -> Result<Export, AttachError> {
    let peer = peer.clone();
    blocking(move || {
        let session = ProbeSession::connect(&target).and_then(|session| session.go(&target.export));
        match session {
            Ok(session) => {
                let export = peer.export(&session.transmission().info);
                session.disconnect();
                export
            }
            Err(error) => match &*error.reason {
                Reason::Refused(refusal) if !error.is_transient() => {
                    Err(peer.unsuitable(format!("its server does not offer it: {refusal}")))
                }
                _ => Err(AttachError::session(peer.volume(), error)),
            },
        }
    })
    .await
}

/// Opens as many sessions side by side; the outcome of each.
pub(super) async fn open_all(
    target: &Target,
    transport: Transport,
    volume: &VolumeId,
    count: usize,
) -> Result<Vec<Result<Session, AttachError>>, AttachError> {
    let tasks: Vec<_> = (0..count)
        .map(|_| {
            let (target, volume) = (target.clone(), volume.clone());
            tokio::spawn(blocking(move || {
                Session::open(&target, transport)
                    .map_err(|source| AttachError::session(&volume, source))
            }))
        })
        .collect();
    let mut sessions = Vec::with_capacity(count);
    for task in tasks {
        sessions.push(task.await.map_err(|_| AttachError::Interrupted)?);
    }
    Ok(sessions)
}

#[cfg(test)]
mod tests;
