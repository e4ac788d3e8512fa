//! The NBD protocol, pure: codec, options, requests, replies, and both sides' negotiation as state machines.
//!
//! Nothing here opens, reads or waits; section names in comments are those of the specification, `doc/proto.md`.
//! The rule at its heart is a matter of types: what was said in plaintext lives in [`server::Plain`] and
//! [`client::Plain`], and those values are consumed when STARTTLS is accepted.

pub mod client;
pub mod codec;
mod export;
mod numbers;
pub mod option;
pub mod option_reply;
pub mod reply;
pub mod request;
pub mod server;
pub mod uri;

pub use self::export::{BlockSizes, ExportInfo, ExportName, InvalidExportName, MetaContext};
pub use self::numbers::{
    ChunkType, Command, CommandFlags, Cookie, Errno, HandshakeFlags, InfoType, OptionCode,
    ReplyCode, TransmissionFlags, magic,
};
pub use self::uri::Uri;

/// The longest string the protocol allows (export names, meta context names, descriptions), in bytes.
pub const MAX_STRING: usize = 4096;

/// The largest payload a peer may be expected to carry, whatever was advertised ("Size constraints"): 32 MiB.
pub const MAX_PAYLOAD: u32 = 1 << 25;
