//! A session at the options, in plaintext or inside TLS: says whatever it is told to say, and reads every answer
//! without believing it.

use std::sync::Arc;

use rustls::ClientConfig;
use rustls_pki_types::ServerName;

use super::failure::Failure;
use super::link::Link;
use super::transmission::Transmission;
use crate::client::{Reason, Refusal, Step};
use crate::nbd::client::Fault;
use crate::nbd::codec::{Malformed, Reader};
use crate::nbd::option::{GoRequest, MetaContextQuery, OptionHeader};
use crate::nbd::option_reply::{Information, MetaContextReply, OptionReplyHeader, parse_server};
use crate::nbd::{
    ExportInfo, ExportName, HandshakeFlags, InfoType, OptionCode, ReplyCode, TransmissionFlags,
    magic,
};

/// Bytes of one reply that are read: a name and a text of 4096 bytes each fit.
const REPLY: u32 = 16 << 10;

/// Replies to one option.
const REPLIES: u32 = 4096;

/// Bytes of all replies to one option.
const ANSWER: usize = 4 << 20;

/// What an honest client asks about an export.
pub(super) const USUAL: [InfoType; 2] = [InfoType::DESCRIPTION, InfoType::BLOCK_SIZE];

/// A connection at the options.
#[derive(Debug)]
pub(super) struct Session {
    link: Link,
    /// Whether EXPORT_NAME is answered with 124 zeroes.
    zeroes: bool,
}

/// One reply to an option, whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct OptionReply {
    pub(super) option: OptionCode,
    pub(super) code: ReplyCode,
    pub(super) payload: Vec<u8>,
}

/// All replies to one option.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Answer {
    /// Those before the last one.
    pub(super) replies: Vec<OptionReply>,
    pub(super) last: OptionReply,
}

/// What INFO or GO said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Told {
    pub(super) info: ExportInfo,
    pub(super) name: Option<String>,
    /// Each kind of information, in order.
    pub(super) kinds: Vec<InfoType>,
}

/// Reads the greeting, and returns the server's flags.
pub(super) fn greeting(link: &mut Link) -> Result<u16, Failure> {
    let failed = Failure::at::<Reason>(Step::Greeting);
    let mut bytes = [0; 18];
    // The oldstyle greeting is longer, and is told by its first half.
    link.read_exact(&mut bytes[..16]).map_err(&failed)?;
    let mut reader = Reader::new("greeting", &bytes[..16]);
    let words = reader
        .u64()
        .and_then(|first| Ok((first, reader.u64()?)))
        .map_err(|error| failed(error.into()))?;
    match words {
        (magic::NBDMAGIC, magic::IHAVEOPT) => {}
        (magic::NBDMAGIC, magic::OLDSTYLE) => return Err(failed(Fault::Oldstyle.into())),
        _ => return Err(failed(Fault::NotNbd.into())),
    }
    link.read_exact(&mut bytes[16..]).map_err(&failed)?;
    Ok(u16::from_be_bytes([bytes[16], bytes[17]]))
}

impl Session {
    /// Answers the greeting with the flags that it offers, of those in `mask`.
    pub(super) fn begin(mut link: Link, mask: HandshakeFlags) -> Result<Self, Failure> {
        let offered = HandshakeFlags(u32::from(greeting(&mut link)?));
        if !offered.contains(HandshakeFlags::FIXED_NEWSTYLE) {
            return Err(Failure::new(Step::Greeting, Fault::NotFixedNewstyle));
        }
        let flags = HandshakeFlags(offered.0 & mask.0);
        link.write_all(&flags.0.to_be_bytes())
            .map_err(Failure::at(Step::Greeting))?;
        Ok(Self {
            zeroes: !flags.contains(HandshakeFlags::NO_ZEROES),
            ..Self::at_options(link)
        })
    }

    /// A connection whose flags were exchanged.
    pub(super) fn at_options(link: Link) -> Self {
        Self {
            link,
            zeroes: false,
        }
    }

    pub(super) fn has_zeroes(&self) -> bool {
        self.zeroes
    }

    pub(super) fn link(&mut self) -> &mut Link {
        &mut self.link
    }

    pub(super) fn into_link(self) -> Link {
        self.link
    }

    fn step(&self, option: OptionCode) -> Step {
        if option == OptionCode::STARTTLS && !self.link.is_secured() {
            return Step::StartTls;
        }
        if self.link.is_secured() {
            Step::Option(option)
        } else {
            Step::Plaintext(option)
        }
    }

    pub(super) fn send(&mut self, option: OptionCode, payload: &[u8]) -> Result<(), Failure> {
        self.send_raw(option, &OptionHeader::encode(option, payload))
    }

    /// Sends any bytes; `option` only names the step in errors.
    pub(super) fn send_raw(&mut self, option: OptionCode, bytes: &[u8]) -> Result<(), Failure> {
        let failed = Failure::at(self.step(option));
        self.link.write_all(bytes).map_err(failed)
    }

    /// Whether the connection ends here, without another byte.
    pub(super) fn ends(&mut self, asked: OptionCode) -> Result<bool, Failure> {
        let failed = Failure::at(self.step(asked));
        self.link.ends().map_err(failed)
    }

    /// Reads one reply, to whatever option; `asked` only names the step in errors.
    pub(super) fn reply(&mut self, asked: OptionCode) -> Result<OptionReply, Failure> {
        let failed = Failure::at(self.step(asked));
        self.read_reply().map_err(failed)
    }

    fn read_reply(&mut self) -> Result<OptionReply, Reason> {
        let mut header = [0; OptionReplyHeader::LENGTH];
        self.link.read_exact(&mut header)?;
        let header = OptionReplyHeader::parse(&header)?;
        if header.length > REPLY {
            return Err(Reason::TooLong { limit: REPLY });
        }
        Ok(OptionReply {
            option: header.option,
            code: header.code,
            payload: self.link.take(header.length)?,
        })
    }

    /// An option and every reply to it.
    pub(super) fn ask(&mut self, option: OptionCode, payload: &[u8]) -> Result<Answer, Failure> {
        self.send(option, payload)?;
        self.answer(option)
    }

    pub(super) fn answer(&mut self, asked: OptionCode) -> Result<Answer, Failure> {
        let failed = Failure::at::<Reason>(self.step(asked));
        let mut replies = Vec::new();
        let mut left = ANSWER;
        for _ in 0..REPLIES {
            let reply = self.reply(asked)?;
            if reply.option != asked {
                let answered = reply.option;
                return Err(failed(Fault::WrongOption { asked, answered }.into()));
            }
            left = left
                .checked_sub(reply.payload.len())
                .ok_or_else(|| failed(Reason::TooLong { limit: 4 << 20 }))?;
            if reply.code == ReplyCode::ACK || reply.code.is_error() {
                return Ok(Answer {
                    replies,
                    last: reply,
                });
            }
            let belongs = match reply.code {
                ReplyCode::SERVER => asked == OptionCode::LIST,
                ReplyCode::INFO => matches!(asked, OptionCode::INFO | OptionCode::GO),
                ReplyCode::META_CONTEXT => matches!(
                    asked,
                    OptionCode::LIST_META_CONTEXT | OptionCode::SET_META_CONTEXT
                ),
                _ => false,
            };
            if !belongs {
                let code = reply.code;
                return Err(failed(Fault::UnexpectedReply { asked, code }.into()));
            }
            replies.push(reply);
        }
        let limit = REPLIES;
        Err(failed(Fault::TooManyReplies { asked, limit }.into()))
    }

    /// Sends STARTTLS with `behind` it in the same segment, and goes on as if nothing were there.
    pub(super) fn upgrade(
        mut self,
        config: Arc<ClientConfig>,
        name: ServerName<'static>,
        behind: &[u8],
    ) -> Result<Self, Failure> {
        let asked = OptionCode::STARTTLS;
        let mut bytes = OptionHeader::encode(asked, &[]);
        bytes.extend_from_slice(behind);
        self.send_raw(asked, &bytes)?;
        self.accepted(asked)?;
        self.handshake(config, name)
    }

    /// Reads the empty ACK after which TLS begins.
    pub(super) fn accepted(&mut self, asked: OptionCode) -> Result<(), Failure> {
        let failed = Failure::at::<Reason>(Step::StartTls);
        let reply = self.reply(asked)?;
        if reply.option != asked {
            let answered = reply.option;
            return Err(failed(Fault::WrongOption { asked, answered }.into()));
        }
        match reply.code {
            ReplyCode::ACK if reply.payload.is_empty() => Ok(()),
            ReplyCode::ACK => Err(failed(
                Malformed::new("STARTTLS reply", "an ACK with payload").into(),
            )),
            code if code.is_error() => {
                let message = reply.message();
                Err(failed(Fault::TlsRefused { code, message }.into()))
            }
            code => Err(failed(Fault::UnexpectedReply { asked, code }.into())),
        }
    }

    pub(super) fn handshake(
        self,
        config: Arc<ClientConfig>,
        name: ServerName<'static>,
    ) -> Result<Self, Failure> {
        let zeroes = self.zeroes;
        let mut link = self.link;
        link.start_tls(config, name)
            .map_err(Failure::at(Step::Handshake))?;
        Ok(Self {
            zeroes,
            ..Self::at_options(link)
        })
    }

    /// Asks for structured replies.
    pub(super) fn structured_reply(&mut self) -> Result<Result<(), Refusal>, Failure> {
        let answer = self.ask(OptionCode::STRUCTURED_REPLY, &[])?;
        Ok(answer.accepted().map(|_| ()))
    }

    /// Asks for the names of all exports.
    pub(super) fn list(&mut self) -> Result<Result<Vec<String>, Refusal>, Failure> {
        let failed = Failure::at::<Malformed>(self.step(OptionCode::LIST));
        match self.ask(OptionCode::LIST, &[])?.accepted() {
            Err(refusal) => Ok(Err(refusal)),
            Ok(replies) => replies
                .iter()
                .map(|reply| parse_server(&reply.payload).map_err(&failed))
                .collect::<Result<_, _>>()
                .map(Ok),
        }
    }

    /// Asks what GO would say.
    pub(super) fn info(
        &mut self,
        export: &ExportName,
    ) -> Result<Result<ExportInfo, Refusal>, Failure> {
        let told = self.told(OptionCode::INFO, export, &USUAL)?;
        Ok(told.map(|told| told.info))
    }

    /// INFO or GO, with any requests.
    pub(super) fn told(
        &mut self,
        option: OptionCode,
        export: &ExportName,
        requests: &[InfoType],
    ) -> Result<Result<Told, Refusal>, Failure> {
        let failed = Failure::at::<Reason>(self.step(option));
        match self.ask(option, &go(export, requests))?.accepted() {
            Err(refusal) => Ok(Err(refusal)),
            Ok(replies) => tell(option, &replies).map(Ok).map_err(failed),
        }
    }

    /// Asks which contexts there are; no query means all.
    pub(super) fn list_meta_context(
        &mut self,
        export: &ExportName,
        queries: &[&str],
    ) -> Result<Result<Vec<MetaContextReply>, Refusal>, Failure> {
        self.contexts(OptionCode::LIST_META_CONTEXT, &query(export, queries))
    }

    /// Selects contexts, in the place of all that were selected before.
    pub(super) fn set_meta_context(
        &mut self,
        export: &ExportName,
        queries: &[&str],
    ) -> Result<Result<Vec<MetaContextReply>, Refusal>, Failure> {
        self.contexts(OptionCode::SET_META_CONTEXT, &query(export, queries))
    }

    pub(super) fn contexts(
        &mut self,
        option: OptionCode,
        payload: &[u8],
    ) -> Result<Result<Vec<MetaContextReply>, Refusal>, Failure> {
        let failed = Failure::at::<Malformed>(self.step(option));
        match self.ask(option, payload)?.accepted() {
            Err(refusal) => Ok(Err(refusal)),
            Ok(replies) => replies
                .iter()
                .map(|reply| MetaContextReply::parse(&reply.payload).map_err(&failed))
                .collect::<Result<_, _>>()
                .map(Ok),
        }
    }

    /// Begins transmission; a refusal is an error, which ends the session.
    pub(super) fn go(mut self, export: &ExportName) -> Result<Transmission, Failure> {
        let step = self.step(OptionCode::GO);
        match self.told(OptionCode::GO, export, &USUAL)? {
            Ok(told) => Ok(self.transmit(told.info)),
            Err(refusal) => Err(Failure::new(step, Reason::Refused(refusal))),
        }
    }

    /// Transmission has begun.
    pub(super) fn transmit(self, info: ExportInfo) -> Transmission {
        Transmission::new(self.link, info)
    }

    /// Ends the session politely, without waiting for an answer.
    pub(super) fn abort(mut self) {
        if self.send(OptionCode::ABORT, &[]).is_ok() {
            self.link.close();
        }
    }
}

impl OptionReply {
    /// The server's words for people, where it refused.
    pub(super) fn message(&self) -> String {
        String::from_utf8_lossy(&self.payload).into_owned()
    }
}

impl Answer {
    /// The replies before an ACK; or the refusal.
    pub(super) fn accepted(self) -> Result<Vec<OptionReply>, Refusal> {
        if self.last.code == ReplyCode::ACK {
            return Ok(self.replies);
        }
        Err(Refusal {
            code: self.last.code,
            message: self.last.message(),
        })
    }
}

/// The payload of INFO or GO.
pub(super) fn go(export: &ExportName, requests: &[InfoType]) -> Vec<u8> {
    GoRequest {
        export: export.clone(),
        information: requests.to_vec(),
    }
    .encode()
}

/// The payload of LIST_META_CONTEXT or SET_META_CONTEXT.
pub(super) fn query(export: &ExportName, queries: &[&str]) -> Vec<u8> {
    MetaContextQuery {
        export: export.clone(),
        queries: queries.iter().map(|query| (*query).to_owned()).collect(),
    }
    .encode()
}

fn tell(asked: OptionCode, replies: &[OptionReply]) -> Result<Told, Reason> {
    let mut size: Option<(u64, TransmissionFlags)> = None;
    let (mut name, mut description, mut block_sizes) = (None, None, None);
    let mut kinds = Vec::new();
    for reply in replies {
        let information = Information::parse(&reply.payload)?;
        kinds.push(match &information {
            Information::Export { .. } => InfoType::EXPORT,
            Information::Name(_) => InfoType::NAME,
            Information::Description(_) => InfoType::DESCRIPTION,
            Information::BlockSize(_) => InfoType::BLOCK_SIZE,
            Information::Unknown(kind) => *kind,
        });
        match information {
            Information::Export { size: bytes, flags } => size = Some((bytes, flags)),
            Information::BlockSize(sizes) => block_sizes = Some(sizes),
            Information::Description(text) => description = Some(text),
            Information::Name(text) => name = Some(text),
            Information::Unknown(_) => {}
        }
    }
    let (size, flags) = size.ok_or(Fault::NoExportInformation { asked })?;
    Ok(Told {
        info: ExportInfo {
            size,
            flags,
            block_sizes,
            description,
        },
        name,
        kinds,
    })
}
