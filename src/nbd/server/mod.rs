//! The server's side of negotiation: [`Plain`] until STARTTLS, [`Secured`] after it, [`Session`] in transmission.
//!
//! Each machine says how many bytes it wants next and is given exactly those; a driver that reads no more than
//! that from the socket cannot have bytes left over when TLS starts (C25). `Plain` is consumed by accepting
//! STARTTLS, so nothing that was negotiated before can be there after it (C32).

mod plain;
mod secured;
#[cfg(test)]
mod tests;

pub use self::plain::{Plain, PlainStep};
pub use self::secured::{Exports, Secured, Session, Step};

use super::codec::Malformed;
use super::{HandshakeFlags, OptionCode};

/// What a peer may ask for before it is cut off. The deadline is the driver's: nothing here knows the time.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Options in plaintext; a client needs one.
    pub plain_options: u32,
    /// Options after TLS; a client needs a handful, a test suite some dozens.
    pub secured_options: u32,
    /// Bytes of one option's payload. GO with a name of 4096 bytes and meta-context queries need 4 KiB each (C7).
    pub option_length: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            plain_options: 32,
            secured_options: 1024,
            option_length: 64 << 10,
        }
    }
}

/// The little that passes STARTTLS: a client's greeting flags, which belong to the connection and not to what was
/// negotiated on it. All they can change is the padding of a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Handshake {
    pub(super) no_zeroes: bool,
}

/// A client that broke the protocol so that the two sides can no longer understand each other: the connection
/// ends without a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    #[error("client flags {0:?} have bits that were not offered")]
    Flags(HandshakeFlags),
    #[error("the client does not speak fixed newstyle, without which there is no TLS")]
    NotFixedNewstyle,
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error("option {option} claims {length} bytes, the limit is {limit}")]
    TooLong {
        option: OptionCode,
        length: u32,
        limit: u32,
    },
    #[error("more than {0} options")]
    TooManyOptions(u32),
    #[error("{given} bytes given where {wanted} were wanted")]
    Misfed { wanted: usize, given: usize },
}
