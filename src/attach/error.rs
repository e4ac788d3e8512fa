//! Why a kernel device could not be made, kept, grown or removed.

use std::io;
use std::path::PathBuf;

use super::kernel::KernelError;
use crate::client::{ClientError, Reason, Step};
use crate::nbd::ReplyCode;
use crate::sys::ktls::KernelTlsError;
use crate::tls::CertificateError;
use crate::verify::Refused;
use crate::volumes::{AttachmentId, VolumeId, VolumesError};

/// What the caller can do about an [`AttachError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// Try again: a server that is away, a device still in use.
    Unavailable,
    /// Change something on the node, at the server or in the request first; the message says what.
    Precondition,
    /// The volume has no device on this node.
    NotFound,
    /// A fault of this node or of Hawser.
    Internal,
}

/// Why an operation on a device failed. Unless the message says otherwise, nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    #[error(
        "the kernel module nbd is not loaded on this node, and loading it failed ({problem}); load it with \
         `modprobe nbd`"
    )]
    NoDriver { problem: String },
    #[error(
        "the kernel module tls is not loaded on this node, and loading it failed ({problem}); load it with \
         `modprobe tls`, or allow the userspace proxy"
    )]
    NoKernelTls { problem: String },
    #[error("volume {volume}: cannot tell where its server is")]
    Endpoint {
        volume: VolumeId,
        #[source]
        source: VolumesError,
    },
    #[error("volume {volume}: its server {host} cannot be found: {problem}")]
    NoAddress {
        volume: VolumeId,
        host: String,
        problem: String,
    },
    #[error(
        "volume {volume}: its client Secret is not known here any more, so its connections cannot be replaced; stage or \
         publish the volume once more, with its Secret"
    )]
    NoSecret { volume: VolumeId },
    #[error("volume {volume}: its client certificate cannot be used")]
    Certificate {
        volume: VolumeId,
        #[source]
        source: CertificateError,
    },
    #[error("volume {volume}: no session with its server")]
    Session {
        volume: VolumeId,
        #[source]
        source: ClientError,
    },
    #[error(
        "volume {volume}: no TLS with its server; it must offer TLS 1.3, and with it the cipher \
         TLS_CHACHA20_POLY1305_SHA256, which is the one that the kernel can keep up"
    )]
    Handshake {
        volume: VolumeId,
        #[source]
        source: ClientError,
    },
    #[error("volume {volume} is not attached")]
    Verification {
        volume: VolumeId,
        /// What is wrong with the server; none where something only could not be checked.
        findings: usize,
        #[source]
        source: Refused,
    },
    #[error("volume {volume}: {problem}")]
    Unsuitable { volume: VolumeId, problem: String },
    #[error(
        "volume {volume}: the server says epoch {found}, but its device was made in epoch {known}: the storage host \
         lost what it had not yet written to its disks"
    )]
    EpochChanged {
        volume: VolumeId,
        known: u64,
        found: u64,
    },
    #[error(
        "volume {volume}: its server does not know its attachment any more: it was revoked, since the volume was detached \
         or moved to another node"
    )]
    Revoked { volume: VolumeId },
    #[error(
        "volume {volume} is on {} already, for another attachment ({attachment}); unstage that one first", .device.display()
    )]
    OtherAttachment {
        volume: VolumeId,
        device: PathBuf,
        attachment: AttachmentId,
    },
    #[error("volume {volume}: {} is in use: {problem}", .device.display())]
    InUse {
        volume: VolumeId,
        device: PathBuf,
        problem: String,
    },
    #[error(
        "volume {volume}: {} was disconnected, but is still in use: {problem}; close it, then stage the volume again",
        .device.display()
    )]
    Disconnected {
        volume: VolumeId,
        device: PathBuf,
        problem: String,
    },
    #[error(
        "volume {volume}: nothing is recorded of {}, so its sockets cannot be replaced; unstage the volume, then \
         stage it again", .device.display()
    )]
    Unrecorded { volume: VolumeId, device: PathBuf },
    #[error("volume {0} has no device on this node")]
    NotAttached(VolumeId),
    #[error("volume {volume}: its sockets are not encrypted, so no device was made of them")]
    KernelTls {
        volume: VolumeId,
        #[source]
        source: KernelTlsError,
    },
    #[error(transparent)]
    Kernel(#[from] KernelError),
    #[error("cannot {doing}")]
    System {
        doing: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("volume {volume}: nobody waits for it to be attached any more")]
    Abandoned { volume: VolumeId },
    #[error("the operation was cut short by the end of this process")]
    Interrupted,
}

impl AttachError {
    /// Whether the server says that it has no such export for us.
    pub(super) fn is_unknown_export(&self) -> bool {
        let Self::Session { source, .. } = self else {
            return false;
        };
        matches!(&*source.reason, Reason::Refused(refusal) if refusal.code == ReplyCode::ERR_UNKNOWN)
    }

    /// Whether the server was not there to say anything.
    pub(super) fn is_away(&self) -> bool {
        match self {
            Self::Endpoint { .. } => self.kind() == ErrorKind::Unavailable,
            Self::Session { source, .. } => source.step == Step::Connect && source.is_transient(),
            _ => false,
        }
    }

    /// What the caller can do.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Endpoint { source, .. } => match source {
                VolumesError::NotFound(_) => ErrorKind::NotFound,
                _ => ErrorKind::Unavailable,
            },
            Self::Session { source, .. } | Self::Handshake { source, .. }
                if source.is_transient() =>
            {
                ErrorKind::Unavailable
            }
            Self::NoAddress { .. }
            | Self::InUse { .. }
            | Self::Disconnected { .. }
            | Self::Abandoned { .. }
            | Self::Interrupted
            | Self::Verification { findings: 0, .. } => ErrorKind::Unavailable,
            Self::NoDriver { .. }
            | Self::NoKernelTls { .. }
            | Self::NoSecret { .. }
            | Self::Certificate { .. }
            | Self::Session { .. }
            | Self::Handshake { .. }
            | Self::Verification { .. }
            | Self::Unsuitable { .. }
            | Self::EpochChanged { .. }
            | Self::Revoked { .. }
            | Self::OtherAttachment { .. }
            | Self::Unrecorded { .. }
            | Self::KernelTls { .. } => ErrorKind::Precondition,
            Self::NotAttached(_) => ErrorKind::NotFound,
            Self::Kernel(_) | Self::System { .. } => ErrorKind::Internal,
        }
    }

    /// Why there is no session. A server that has no version or cipher in common with us often just leaves.
    pub(super) fn session(volume: &VolumeId, source: ClientError) -> Self {
        use rustls::AlertDescription::{HandshakeFailure, InsufficientSecurity, ProtocolVersion};
        use rustls::Error::{AlertReceived, PeerIncompatible};

        let volume = volume.clone();
        let nothing_in_common = match &*source.reason {
            Reason::Closed => true,
            Reason::Tls(PeerIncompatible(_)) => true,
            Reason::Tls(AlertReceived(alert)) => {
                matches!(
                    alert,
                    HandshakeFailure | InsufficientSecurity | ProtocolVersion
                )
            }
            _ => false,
        };
        if source.step == Step::Handshake && nothing_in_common {
            return Self::Handshake { volume, source };
        }
        Self::Session { volume, source }
    }

    /// Names what could not be done with the system.
    pub(super) fn system(doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::System { doing, source }
    }
}

/// An error and all that caused it, for a log line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
