//! Before TLS: the greeting, and STARTTLS. Nothing else is ever said in plaintext (C4).

use super::{Fault, Handshake};
use crate::nbd::codec::{Malformed, Reader};
use crate::nbd::option::OptionHeader;
use crate::nbd::option_reply::OptionReplyHeader;
use crate::nbd::{HandshakeFlags, MAX_STRING, OptionCode, ReplyCode, magic};

/// A connection in plaintext.
#[derive(Debug)]
pub struct Plain {
    state: State,
}

#[derive(Debug)]
enum State {
    Greeting,
    Reply(Handshake),
    Refusal { code: ReplyCode, length: usize },
}

/// What follows from the bytes a [`Plain`] was given.
#[derive(Debug)]
pub enum PlainStep {
    /// More is wanted.
    Continue(Plain),
    /// Send this, then go on.
    Send(Plain, Vec<u8>),
    /// Start TLS on the socket, which must have nothing more to read: the plaintext state is gone.
    Upgrade(Handshake),
}

impl Default for Plain {
    fn default() -> Self {
        Self::new()
    }
}

impl Plain {
    #[must_use]
    pub fn new() -> Self {
        Self {
            state: State::Greeting,
        }
    }

    /// How many bytes to read before the next [`Plain::receive`]: not one more, or an injected byte could pass
    /// for the beginning of TLS.
    #[must_use]
    pub fn wanted(&self) -> usize {
        match self.state {
            State::Greeting => 18,
            State::Reply(_) => OptionReplyHeader::LENGTH,
            State::Refusal { length, .. } => length,
        }
    }

    /// Takes exactly the wanted bytes.
    pub fn receive(self, bytes: &[u8]) -> Result<PlainStep, Fault> {
        if bytes.len() != self.wanted() {
            return Err(Fault::Misfed {
                wanted: self.wanted(),
                given: bytes.len(),
            });
        }
        match self.state {
            State::Greeting => {
                let (handshake, answer) = greeting(bytes)?;
                Ok(PlainStep::Send(
                    Self {
                        state: State::Reply(handshake),
                    },
                    answer,
                ))
            }
            State::Reply(handshake) => starttls_reply(handshake, bytes),
            State::Refusal { code, .. } => {
                let message = String::from_utf8_lossy(bytes).into_owned();
                Err(Fault::TlsRefused { code, message })
            }
        }
    }
}

/// Reads the greeting; unknown flags are ignored (C4). Answers with our flags and STARTTLS.
fn greeting(bytes: &[u8]) -> Result<(Handshake, Vec<u8>), Fault> {
    let mut reader = Reader::new("greeting", bytes);
    if reader.u64()? != magic::NBDMAGIC {
        return Err(Fault::NotNbd);
    }
    match reader.u64()? {
        magic::IHAVEOPT => {}
        magic::OLDSTYLE => return Err(Fault::Oldstyle),
        _ => return Err(Fault::NotNbd),
    }
    let offered = HandshakeFlags(u32::from(reader.u16()?));
    reader.finish()?;
    if !offered.contains(HandshakeFlags::FIXED_NEWSTYLE) {
        return Err(Fault::NotFixedNewstyle);
    }
    let no_zeroes = offered.contains(HandshakeFlags::NO_ZEROES);
    let mut flags = HandshakeFlags::FIXED_NEWSTYLE;
    if no_zeroes {
        flags = flags.with(HandshakeFlags::NO_ZEROES);
    }
    let mut answer = flags.0.to_be_bytes().to_vec();
    answer.extend_from_slice(&OptionHeader::encode(OptionCode::STARTTLS, &[]));
    Ok((Handshake { no_zeroes }, answer))
}

fn starttls_reply(handshake: Handshake, bytes: &[u8]) -> Result<PlainStep, Fault> {
    let asked = OptionCode::STARTTLS;
    let header = OptionReplyHeader::parse(bytes)?;
    if header.option != asked {
        return Err(Fault::WrongOption {
            asked,
            answered: header.option,
        });
    }
    let length = header.length as usize;
    match header.code {
        ReplyCode::ACK if length == 0 => Ok(PlainStep::Upgrade(handshake)),
        ReplyCode::ACK => Err(Malformed::new("STARTTLS reply", "an ACK with payload").into()),
        code if code.is_error() && length > MAX_STRING => Err(Fault::TlsRefused {
            code,
            message: String::new(),
        }),
        code if code.is_error() && length == 0 => Err(Fault::TlsRefused {
            code,
            message: String::new(),
        }),
        code if code.is_error() => Ok(PlainStep::Continue(Plain {
            state: State::Refusal { code, length },
        })),
        code => Err(Fault::UnexpectedReply { asked, code }),
    }
}
