//! Before TLS: the greeting, and the refusal of everything but STARTTLS and ABORT.

use super::{Fault, Handshake, Limits};
use crate::nbd::codec::{Put, Reader};
use crate::nbd::option::OptionHeader;
use crate::nbd::option_reply::reply;
use crate::nbd::{HandshakeFlags, OptionCode, ReplyCode, magic};

/// How much of a refused option's payload is asked for at a time.
const DRAIN: usize = 4096;

/// A connection in plaintext. It holds no option's content, ever: it counts them and refuses them.
#[derive(Debug)]
pub struct Plain {
    limits: Limits,
    options: u32,
    shutting_down: bool,
    state: State,
}

#[derive(Debug)]
enum State {
    Flags,
    Option(Handshake),
    /// The payload of an option, thrown away as it arrives.
    Payload {
        handshake: Handshake,
        header: OptionHeader,
        left: usize,
    },
}

/// What follows from the bytes a [`Plain`] was given.
#[derive(Debug)]
pub enum PlainStep {
    /// More is wanted.
    Continue(Plain),
    /// Send this, then go on.
    Reply(Plain, Vec<u8>),
    /// Send `ack`, then start TLS on the socket: the plaintext state is gone.
    StartTls { ack: Vec<u8>, handshake: Handshake },
    /// Send this, which may be nothing, and close.
    Close(Vec<u8>),
}

impl Plain {
    /// A new connection, and the greeting to send on it (C1).
    #[must_use]
    pub fn new(limits: Limits) -> (Self, Vec<u8>) {
        let mut greeting = Vec::with_capacity(18);
        greeting.put_u64(magic::NBDMAGIC);
        greeting.put_u64(magic::IHAVEOPT);
        greeting.put_u16(0b11); // FIXED_NEWSTYLE and NO_ZEROES
        (
            Self {
                limits,
                options: 0,
                shutting_down: false,
                state: State::Flags,
            },
            greeting,
        )
    }

    /// Refuses every further option with ERR_SHUTDOWN (C60).
    pub fn shut_down(&mut self) {
        self.shutting_down = true;
    }

    /// How many bytes to read before the next [`Plain::receive`]: not one more.
    #[must_use]
    pub fn wanted(&self) -> usize {
        match &self.state {
            State::Flags => 4,
            State::Option(_) => OptionHeader::LENGTH,
            State::Payload { left, .. } => (*left).min(DRAIN),
        }
    }

    /// Takes exactly the wanted bytes.
    pub fn receive(mut self, bytes: &[u8]) -> Result<PlainStep, Fault> {
        let wanted = self.wanted();
        if bytes.len() != wanted {
            return Err(Fault::Misfed {
                wanted,
                given: bytes.len(),
            });
        }
        match self.state {
            State::Flags => {
                self.state = State::Option(read_flags(bytes)?);
                Ok(PlainStep::Continue(self))
            }
            State::Option(handshake) => {
                let header = OptionHeader::parse(bytes)?;
                self.options += 1;
                if self.options > self.limits.plain_options {
                    return Err(Fault::TooManyOptions(self.limits.plain_options));
                }
                if header.length > self.limits.option_length {
                    return Err(Fault::TooLong {
                        option: header.code,
                        length: header.length,
                        limit: self.limits.option_length,
                    });
                }
                self.drained(handshake, header, header.length as usize)
            }
            State::Payload {
                handshake,
                header,
                left,
            } => self.drained(handshake, header, left - bytes.len()),
        }
    }

    fn drained(
        mut self,
        handshake: Handshake,
        header: OptionHeader,
        left: usize,
    ) -> Result<PlainStep, Fault> {
        if left > 0 {
            self.state = State::Payload {
                handshake,
                header,
                left,
            };
            return Ok(PlainStep::Continue(self));
        }
        self.state = State::Option(handshake);
        let answer = |code, text: &str| reply(header.code, code, text.as_bytes());
        Ok(match header.code {
            OptionCode::ABORT => PlainStep::Close(answer(ReplyCode::ACK, "")),
            // No reply could carry an error (C23).
            OptionCode::EXPORT_NAME => PlainStep::Close(Vec::new()),
            _ if self.shutting_down => PlainStep::Reply(
                self,
                answer(ReplyCode::ERR_SHUTDOWN, "the server is shutting down"),
            ),
            OptionCode::STARTTLS if header.length == 0 => PlainStep::StartTls {
                ack: answer(ReplyCode::ACK, ""),
                handshake,
            },
            OptionCode::STARTTLS => PlainStep::Reply(
                self,
                answer(ReplyCode::ERR_INVALID, "STARTTLS has no payload"),
            ),
            // One answer for all, whatever was asked of whichever export (C15 to C22).
            _ => PlainStep::Reply(self, answer(ReplyCode::ERR_TLS_REQD, "send STARTTLS first")),
        })
    }
}

/// The client's answer to the greeting (C2, C3).
fn read_flags(bytes: &[u8]) -> Result<Handshake, Fault> {
    let flags = HandshakeFlags(Reader::new("client flags", bytes).u32()?);
    let offered = HandshakeFlags::FIXED_NEWSTYLE.with(HandshakeFlags::NO_ZEROES);
    if flags.without(offered) != HandshakeFlags(0) {
        return Err(Fault::Flags(flags));
    }
    if !flags.contains(HandshakeFlags::FIXED_NEWSTYLE) {
        return Err(Fault::NotFixedNewstyle);
    }
    Ok(Handshake {
        no_zeroes: flags.contains(HandshakeFlags::NO_ZEROES),
    })
}
