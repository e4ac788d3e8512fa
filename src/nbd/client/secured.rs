//! After TLS: one option at a time, each answered in full before the next is sent (C13).

use std::marker::PhantomData;

use super::{Fault, Handshake};
use crate::nbd::option::{GoRequest, MetaContextQuery, OptionHeader};
use crate::nbd::option_reply::{Information, MetaContextReply, OptionReplyHeader, parse_server};
use crate::nbd::{
    BlockSizes, ExportInfo, ExportName, InfoType, OptionCode, ReplyCode, TransmissionFlags,
};

/// Bytes of one reply's payload: a SERVER reply with a name and a text of 4096 bytes each fits.
const REPLY_LENGTH: u32 = 16 << 10;

/// Replies to one option: a LIST of a server with very many exports ends here.
const REPLIES: u32 = 4096;

/// A session whose socket is given to the kernel.
#[derive(Debug)]
pub struct Kernel(());

/// A session that stays in userspace.
#[derive(Debug)]
pub struct Probe(());

/// A connection inside TLS, at the options.
#[derive(Debug)]
pub struct Secured<Profile> {
    /// Only EXPORT_NAME's reply depends on it, which we never send.
    _handshake: Handshake,
    structured: bool,
    selection: Option<(ExportName, Vec<MetaContextReply>)>,
    pending: Option<Pending>,
    profile: PhantomData<fn() -> Profile>,
}

/// The option whose final reply has not come yet.
#[derive(Debug)]
struct Pending {
    option: OptionCode,
    export: Option<ExportName>,
    header: Option<OptionReplyHeader>,
    replies: u32,
    size: Option<(u64, TransmissionFlags)>,
    block_sizes: Option<BlockSizes>,
    description: Option<String>,
    contexts: Vec<MetaContextReply>,
    names: Vec<String>,
}

/// What the server's final reply to an option came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// ABORT or STRUCTURED_REPLY was accepted.
    Accepted,
    /// To INFO.
    Export(ExportInfo),
    /// To GO: the next byte is transmission's.
    Transmission(Transmission),
    /// To LIST_META_CONTEXT and SET_META_CONTEXT.
    Contexts(Vec<MetaContextReply>),
    /// To LIST.
    Names(Vec<String>),
    /// An error; the session can go on, except after ERR_SHUTDOWN, where ABORT is the only thing left (C14).
    Refused { code: ReplyCode, message: String },
}

/// What negotiation settled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transmission {
    pub export: ExportName,
    pub info: ExportInfo,
    pub structured: bool,
    /// Valid for this export; empty where none was selected for it.
    pub contexts: Vec<MetaContextReply>,
}

impl<Profile> Secured<Profile> {
    #[must_use]
    pub fn new(handshake: Handshake) -> Self {
        Self {
            _handshake: handshake,
            structured: false,
            selection: None,
            pending: None,
            profile: PhantomData,
        }
    }

    /// Asks to begin transmission, with block sizes and description.
    pub fn go(&mut self, export: &ExportName) -> Vec<u8> {
        self.ask_export(OptionCode::GO, export)
    }

    /// Asks what GO would say.
    pub fn info(&mut self, export: &ExportName) -> Vec<u8> {
        self.ask_export(OptionCode::INFO, export)
    }

    /// Ends the negotiation politely.
    pub fn abort(&mut self) -> Vec<u8> {
        self.ask(OptionCode::ABORT, None, &[])
    }

    /// Whether an option was sent whose final reply has not come yet.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        self.pending.is_some()
    }

    /// How many bytes the next [`Secured::receive`] takes.
    #[must_use]
    pub fn wanted(&self) -> usize {
        self.pending
            .as_ref()
            .and_then(|pending| pending.header)
            .map_or(OptionReplyHeader::LENGTH, |header| header.length as usize)
    }

    /// Takes exactly the wanted bytes; `None` means that the final reply has not come yet.
    pub fn receive(&mut self, bytes: &[u8]) -> Result<Option<Answer>, Fault> {
        let wanted = self.wanted();
        if bytes.len() != wanted {
            return Err(Fault::Misfed {
                wanted,
                given: bytes.len(),
            });
        }
        let Some(mut pending) = self.pending.take() else {
            return Err(Fault::Misfed {
                wanted: 0,
                given: bytes.len(),
            });
        };
        let header = match pending.header.take() {
            Some(header) => header,
            None => {
                let header = pending.accept(OptionReplyHeader::parse(bytes)?)?;
                if header.length > 0 {
                    pending.header = Some(header);
                    self.pending = Some(pending);
                    return Ok(None);
                }
                header
            }
        };
        let payload = if header.length == 0 { &[] } else { bytes };
        if header.code.is_error() {
            let message = String::from_utf8_lossy(payload).into_owned();
            return Ok(Some(Answer::Refused {
                code: header.code,
                message,
            }));
        }
        if header.code == ReplyCode::ACK {
            return self.accepted(pending).map(Some);
        }
        pending.collect(header, payload)?;
        self.pending = Some(pending);
        Ok(None)
    }

    fn ask_export(&mut self, option: OptionCode, export: &ExportName) -> Vec<u8> {
        let information = vec![InfoType::DESCRIPTION, InfoType::BLOCK_SIZE];
        let request = GoRequest {
            export: export.clone(),
            information,
        };
        self.ask(option, Some(export.clone()), &request.encode())
    }

    fn ask(&mut self, option: OptionCode, export: Option<ExportName>, payload: &[u8]) -> Vec<u8> {
        self.pending = Some(Pending {
            option,
            export,
            header: None,
            replies: 0,
            size: None,
            block_sizes: None,
            description: None,
            contexts: Vec::new(),
            names: Vec::new(),
        });
        OptionHeader::encode(option, payload)
    }

    fn accepted(&mut self, pending: Pending) -> Result<Answer, Fault> {
        match pending.option {
            OptionCode::INFO => Ok(Answer::Export(pending.export_info()?)),
            OptionCode::GO => {
                let info = pending.export_info()?;
                let export = pending.export.unwrap_or_default();
                let contexts = self
                    .selection
                    .take()
                    .filter(|(selected_for, _)| *selected_for == export)
                    .map_or_else(Vec::new, |(_, contexts)| contexts);
                let structured = self.structured;
                Ok(Answer::Transmission(Transmission {
                    export,
                    info,
                    structured,
                    contexts,
                }))
            }
            OptionCode::LIST => Ok(Answer::Names(pending.names)),
            OptionCode::LIST_META_CONTEXT => Ok(Answer::Contexts(pending.contexts)),
            OptionCode::SET_META_CONTEXT => {
                let export = pending.export.unwrap_or_default();
                self.selection = Some((export, pending.contexts.clone()));
                Ok(Answer::Contexts(pending.contexts))
            }
            OptionCode::STRUCTURED_REPLY => {
                self.structured = true;
                Ok(Answer::Accepted)
            }
            _ => Ok(Answer::Accepted),
        }
    }
}

impl Secured<Probe> {
    /// Asks for structured replies.
    pub fn structured_reply(&mut self) -> Vec<u8> {
        self.ask(OptionCode::STRUCTURED_REPLY, None, &[])
    }

    /// Asks for the names of all exports.
    pub fn list(&mut self) -> Vec<u8> {
        self.ask(OptionCode::LIST, None, &[])
    }

    /// Asks which contexts there are; no query means all.
    pub fn list_meta_context(&mut self, export: &ExportName, queries: &[&str]) -> Vec<u8> {
        self.ask_meta(OptionCode::LIST_META_CONTEXT, export, queries)
    }

    /// Selects contexts, in the place of all that were selected before.
    pub fn set_meta_context(&mut self, export: &ExportName, queries: &[&str]) -> Vec<u8> {
        self.selection = None;
        self.ask_meta(OptionCode::SET_META_CONTEXT, export, queries)
    }

    /// Sends any option at all: its answer is [`Answer::Accepted`] or [`Answer::Refused`]. For verification.
    pub fn other(&mut self, option: OptionCode, payload: &[u8]) -> Vec<u8> {
        self.ask(option, None, payload)
    }

    fn ask_meta(&mut self, option: OptionCode, export: &ExportName, queries: &[&str]) -> Vec<u8> {
        let queries = queries.iter().map(|query| (*query).to_owned()).collect();
        let payload = MetaContextQuery {
            export: export.clone(),
            queries,
        }
        .encode();
        self.ask(option, Some(export.clone()), &payload)
    }
}

impl Pending {
    fn accept(&mut self, header: OptionReplyHeader) -> Result<OptionReplyHeader, Fault> {
        let asked = self.option;
        if header.option != asked {
            return Err(Fault::WrongOption {
                asked,
                answered: header.option,
            });
        }
        if header.length > REPLY_LENGTH {
            let length = header.length;
            return Err(Fault::TooLong {
                asked,
                length,
                limit: REPLY_LENGTH,
            });
        }
        self.replies += 1;
        if self.replies > REPLIES {
            return Err(Fault::TooManyReplies {
                asked,
                limit: REPLIES,
            });
        }
        Ok(header)
    }

    /// A reply that is not the final one.
    fn collect(&mut self, header: OptionReplyHeader, payload: &[u8]) -> Result<(), Fault> {
        let asked = self.option;
        match (header.code, asked) {
            (ReplyCode::INFO, OptionCode::INFO | OptionCode::GO) => {
                match Information::parse(payload)? {
                    Information::Export { size, flags } => self.size = Some((size, flags)),
                    Information::BlockSize(sizes) if !sizes.is_valid() => {
                        return Err(Fault::BlockSizes(sizes));
                    }
                    Information::BlockSize(sizes) => self.block_sizes = Some(sizes),
                    Information::Description(text) => self.description = Some(text),
                    Information::Name(_) | Information::Unknown(_) => {}
                }
            }
            (
                ReplyCode::META_CONTEXT,
                OptionCode::LIST_META_CONTEXT | OptionCode::SET_META_CONTEXT,
            ) => self.contexts.push(MetaContextReply::parse(payload)?),
            (ReplyCode::SERVER, OptionCode::LIST) => self.names.push(parse_server(payload)?),
            (code, _) => return Err(Fault::UnexpectedReply { asked, code }),
        }
        Ok(())
    }

    fn export_info(&self) -> Result<ExportInfo, Fault> {
        let (size, flags) = self
            .size
            .ok_or(Fault::NoExportInformation { asked: self.option })?;
        Ok(ExportInfo {
            size,
            flags,
            block_sizes: self.block_sizes,
            description: self.description.clone(),
        })
    }
}
