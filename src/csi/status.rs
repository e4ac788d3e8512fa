//! The one place where an error becomes a gRPC status: its code, and a message that tells the whole story.
//!
//! Codes are those of the specification's tables. A message is the chain of sources; none of them holds key
//! material, because the errors of `tls` name a Secret and its part, never its content.

use std::error::Error;

use tonic::{Code, Status};

use super::node::RecordError;
use crate::attach::{AttachError, ErrorKind};
use crate::filesystem::FilesystemError;
use crate::tls::CertificateError;
use crate::volumes::{InvalidName, VolumesError};

/// Bytes of a message: gRPC sends it in a header, percent-encoded, and peers limit headers to 8 KiB.
const MESSAGE_LIMIT: usize = 2048;

/// An error and its sources in one line, without saying twice what a message already repeats from its source.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        let source_text = source.to_string();
        if !text.contains(&source_text) {
            text.push_str(": ");
            text.push_str(&source_text);
        }
        next = source.source();
    }
    text
}

/// A status whose message fits.
pub(super) fn status(code: Code, message: impl Into<String>) -> Status {
    let mut message = message.into();
    if message.len() > MESSAGE_LIMIT {
        let end = message.floor_char_boundary(MESSAGE_LIMIT);
        message.truncate(end);
        message.push('…');
    }
    Status::new(code, message)
}

pub(super) fn invalid(message: impl Into<String>) -> Status {
    status(Code::InvalidArgument, message)
}

pub(super) fn precondition(message: impl Into<String>) -> Status {
    status(Code::FailedPrecondition, message)
}

pub(super) fn not_found(message: impl Into<String>) -> Status {
    status(Code::NotFound, message)
}

pub(super) fn exists(message: impl Into<String>) -> Status {
    status(Code::AlreadyExists, message)
}

pub(super) fn out_of_range(message: impl Into<String>) -> Status {
    status(Code::OutOfRange, message)
}

impl From<VolumesError> for Status {
    fn from(error: VolumesError) -> Self {
        let code = match &error {
            VolumesError::NotFound(_) | VolumesError::NodeNotFound(_) => Code::NotFound,
            VolumesError::Incompatible { .. } => Code::AlreadyExists,
            VolumesError::AttachedElsewhere { .. } | VolumesError::InUse { .. } => {
                Code::FailedPrecondition
            }
            VolumesError::OutOfRange(_) => Code::OutOfRange,
            VolumesError::NoRoom(_) | VolumesError::NodeFull { .. } => Code::ResourceExhausted,
            VolumesError::Invalid(_) => Code::InvalidArgument,
            VolumesError::Unavailable { .. } => Code::Unavailable,
            // As if the request had carried it.
            VolumesError::Secret { .. } => Code::Unauthenticated,
            VolumesError::Internal { .. } => Code::Internal,
        };
        status(code, chain(&error))
    }
}

impl From<CertificateError> for Status {
    /// The specification has UNAUTHENTICATED for secrets that do not let the call do its work.
    fn from(error: CertificateError) -> Self {
        status(Code::Unauthenticated, chain(&error))
    }
}

impl From<AttachError> for Status {
    fn from(error: AttachError) -> Self {
        let code = match (&error, error.kind()) {
            (AttachError::Certificate { .. }, _) => Code::Unauthenticated,
            (_, ErrorKind::Unavailable) => Code::Unavailable,
            (_, ErrorKind::Precondition) => Code::FailedPrecondition,
            (_, ErrorKind::NotFound) => Code::NotFound,
            (_, ErrorKind::Internal) => Code::Internal,
        };
        status(code, chain(&error))
    }
}

impl From<FilesystemError> for Status {
    fn from(error: FilesystemError) -> Self {
        let code = match &error {
            FilesystemError::ToolMissing { .. } | FilesystemError::Busy { .. } => {
                Code::FailedPrecondition
            }
            FilesystemError::Timeout { .. } => Code::DeadlineExceeded,
            FilesystemError::Unreadable { .. } | FilesystemError::NoDevice { .. } => {
                Code::Unavailable
            }
            FilesystemError::Damaged { .. } => Code::DataLoss,
            FilesystemError::Tool { .. } | FilesystemError::Io { .. } => Code::Internal,
        };
        status(code, chain(&error))
    }
}

impl From<RecordError> for Status {
    fn from(error: RecordError) -> Self {
        status(Code::Internal, chain(&error))
    }
}

impl From<InvalidName> for Status {
    fn from(error: InvalidName) -> Self {
        status(Code::InvalidArgument, chain(&error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_tells_the_whole_chain_once() {
        let disk = std::io::Error::other("disk on fire");
        let error = VolumesError::Internal {
            doing: "volume vol-1: write volume.json".into(),
            source: Some(Box::new(disk)),
        };
        let status = Status::from(error);
        assert_eq!(status.code(), Code::Internal);
        assert_eq!(
            status.message(),
            "volume vol-1: write volume.json: disk on fire"
        );
        let repeated = VolumesError::Internal {
            doing: "cannot write: disk on fire".into(),
            source: Some(Box::new(std::io::Error::other("disk on fire"))),
        };
        assert_eq!(
            Status::from(repeated).message(),
            "cannot write: disk on fire"
        );
    }

    #[test]
    fn a_message_fits_a_header_and_ends_between_characters() {
        let status = invalid("é".repeat(5000));
        assert!(status.message().len() <= MESSAGE_LIMIT + 3);
        assert!(status.message().ends_with('…'));
    }

    #[test]
    fn each_refusal_has_the_code_of_the_specification() {
        let cases = [
            (VolumesError::NotFound("v".into()), Code::NotFound),
            (VolumesError::NodeNotFound("n".into()), Code::NotFound),
            (
                VolumesError::Incompatible {
                    volume: "v".into(),
                    difference: "d".into(),
                },
                Code::AlreadyExists,
            ),
            (
                VolumesError::AttachedElsewhere {
                    volume: "v".into(),
                    node: "n".into(),
                },
                Code::FailedPrecondition,
            ),
            (
                VolumesError::InUse {
                    volume: "v".into(),
                    node: "n".into(),
                },
                Code::FailedPrecondition,
            ),
            (VolumesError::OutOfRange("x".into()), Code::OutOfRange),
            (VolumesError::NoRoom("x".into()), Code::ResourceExhausted),
            (
                VolumesError::NodeFull {
                    node: "n".into(),
                    limit: 1,
                },
                Code::ResourceExhausted,
            ),
            (VolumesError::Invalid("x".into()), Code::InvalidArgument),
        ];
        for (error, code) in cases {
            let text = error.to_string();
            assert_eq!(Status::from(error).code(), code, "{text}");
        }
    }
}
