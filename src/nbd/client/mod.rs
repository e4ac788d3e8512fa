//! The client's side of negotiation: [`Plain`] until STARTTLS is accepted, [`Secured`] after it.
//!
//! What a session may ask for is a matter of its type. A [`Kernel`] session becomes a block device, whose driver
//! understands simple replies only, so it has no way to ask for more (K1); a [`Probe`] session may ask for
//! everything.

mod plain;
mod secured;
#[cfg(test)]
mod tests;

pub use self::plain::{Plain, PlainStep};
pub use self::secured::{Answer, Kernel, Probe, Secured, Transmission};

use super::codec::Malformed;
use super::{OptionCode, ReplyCode};

/// The little that passes STARTTLS; see [`super::server::Handshake`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Handshake {
    pub(super) no_zeroes: bool,
}

/// A server with which no session is possible.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    #[error("this is not an NBD server: it does not begin with NBDMAGIC")]
    NotNbd,
    #[error("the server speaks oldstyle NBD, which has no TLS")]
    Oldstyle,
    #[error("the server does not offer fixed newstyle, without which there is no TLS")]
    NotFixedNewstyle,
    #[error("the server refused STARTTLS with {code}{}", sentence(.message))]
    TlsRefused { code: ReplyCode, message: String },
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error("the server answered {answered} where {asked} was asked")]
    WrongOption {
        asked: OptionCode,
        answered: OptionCode,
    },
    #[error("the server answered {asked} with {code}, which does not belong there")]
    UnexpectedReply { asked: OptionCode, code: ReplyCode },
    #[error("the server's reply to {asked} claims {length} bytes, the limit is {limit}")]
    TooLong {
        asked: OptionCode,
        length: u32,
        limit: u32,
    },
    #[error("the server sent more than {limit} replies to {asked}")]
    TooManyReplies { asked: OptionCode, limit: u32 },
    #[error("the server accepted {asked} without saying the export's size")]
    NoExportInformation { asked: OptionCode },
    #[error("the server's block sizes break the rules: {0:?}")]
    BlockSizes(super::BlockSizes),
    #[error("{given} bytes given where {wanted} were wanted")]
    Misfed { wanted: usize, given: usize },
}

/// Bytes of a server's words that are repeated: a sentence, where up to 4096 bytes may come.
const SENTENCE: usize = 256;

/// A server's words for people, if it had any, made short and harmless to print.
pub(crate) fn sentence(message: &str) -> String {
    if message.is_empty() {
        return String::new();
    }
    let mut words = message.escape_debug().to_string();
    if words.len() > SENTENCE {
        words.truncate(words.floor_char_boundary(SENTENCE));
        words.push('…');
    }
    format!(" ({words})")
}
