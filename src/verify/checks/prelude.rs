//! What nearly every check uses.

pub(super) use crate::client::{OwnedChunk, Reason, Refusal, Reply, Step};
pub(super) use crate::nbd::codec::Put;
pub(super) use crate::nbd::option::OptionHeader;
pub(super) use crate::nbd::{
    Command, CommandFlags, Errno, ExportInfo, ExportName, OptionCode, ReplyCode, TransmissionFlags,
};
pub(super) use crate::verify::check::{
    Check, Group, Needs, Scope, Severity, Stop, broke, broke_or_slow, require,
};
pub(super) use crate::verify::failure::Failure;
pub(super) use crate::verify::mode::Mode;
pub(super) use crate::verify::session::Session;
pub(super) use crate::verify::subject::{
    Subject, a_block, content, content_or, one_block, require_no_contexts, require_read,
    require_simple_read, shape,
};
pub(super) use crate::verify::transmission::Transmission;
