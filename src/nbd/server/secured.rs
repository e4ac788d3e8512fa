//! After TLS: option haggling with an authenticated client, up to transmission.

use super::{Fault, Handshake, Limits};
use crate::nbd::codec::{Put, text};
use crate::nbd::option::{GoRequest, MetaContextQuery, OptionHeader};
use crate::nbd::option_reply::{Information, MetaContextReply, put_reply, reply};
use crate::nbd::{
    ExportInfo, ExportName, InfoType, MetaContext, OptionCode, ReplyCode, TransmissionFlags,
};

/// The exports this client may know of: already narrowed to what its certificate allows, so that no option can
/// tell more than another (C33).
pub trait Exports {
    fn find(&self, name: &ExportName) -> Option<ExportInfo>;
    fn names(&self) -> Vec<ExportName>;
}

/// A connection inside TLS, at the options.
#[derive(Debug)]
pub struct Secured {
    limits: Limits,
    handshake: Handshake,
    options: u32,
    shutting_down: bool,
    /// The header whose payload is awaited.
    awaited: Option<OptionHeader>,
    structured: bool,
    selection: Option<Selection>,
}

/// What the last successful SET_META_CONTEXT chose.
#[derive(Debug)]
struct Selection {
    export: ExportName,
    contexts: Vec<(u32, MetaContext)>,
}

/// What negotiation settled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Session {
    /// The name the client used.
    pub export: ExportName,
    /// With SEND_DF where structured replies were negotiated.
    pub info: ExportInfo,
    pub structured: bool,
    /// Ids and contexts that BLOCK_STATUS answers for; empty where none are valid for this export.
    pub contexts: Vec<(u32, MetaContext)>,
}

/// What follows from the bytes a [`Secured`] was given.
#[derive(Debug)]
pub enum Step {
    /// More is wanted.
    Continue,
    /// Send this, then go on.
    Reply(Vec<u8>),
    /// Send `reply`: transmission begins.
    Transmit { reply: Vec<u8>, session: Session },
    /// Send this, which may be nothing, and close.
    Close(Vec<u8>),
}

impl Secured {
    #[must_use]
    pub fn new(handshake: Handshake, limits: Limits) -> Self {
        Self {
            limits,
            handshake,
            options: 0,
            shutting_down: false,
            awaited: None,
            structured: false,
            selection: None,
        }
    }

    /// Refuses every further option with ERR_SHUTDOWN (C60).
    pub fn shut_down(&mut self) {
        self.shutting_down = true;
    }

    /// How many bytes the next [`Secured::receive`] takes; at most the limit of an option's length.
    #[must_use]
    pub fn wanted(&self) -> usize {
        self.awaited
            .map_or(OptionHeader::LENGTH, |header| header.length as usize)
    }

    /// Takes exactly the wanted bytes.
    pub fn receive(&mut self, bytes: &[u8], exports: &dyn Exports) -> Result<Step, Fault> {
        let wanted = self.wanted();
        if bytes.len() != wanted {
            return Err(Fault::Misfed {
                wanted,
                given: bytes.len(),
            });
        }
        let Some(header) = self.awaited.take() else {
            return self.header(OptionHeader::parse(bytes)?, exports);
        };
        Ok(self.option(header.code, bytes, exports))
    }

    fn header(&mut self, header: OptionHeader, exports: &dyn Exports) -> Result<Step, Fault> {
        self.options += 1;
        if self.options > self.limits.secured_options {
            return Err(Fault::TooManyOptions(self.limits.secured_options));
        }
        if header.length > self.limits.option_length {
            let too_big = reply(
                header.code,
                ReplyCode::ERR_TOO_BIG,
                b"the option is too long",
            );
            return Ok(Step::Close(too_big));
        }
        if header.length == 0 {
            return Ok(self.option(header.code, &[], exports));
        }
        self.awaited = Some(header);
        Ok(Step::Continue)
    }

    fn option(&mut self, code: OptionCode, payload: &[u8], exports: &dyn Exports) -> Step {
        let refuse = |with, why: &str| Step::Reply(reply(code, with, why.as_bytes()));
        match code {
            OptionCode::ABORT => Step::Close(reply(code, ReplyCode::ACK, &[])),
            OptionCode::EXPORT_NAME if self.shutting_down => Step::Close(Vec::new()),
            _ if self.shutting_down => {
                refuse(ReplyCode::ERR_SHUTDOWN, "the server is shutting down")
            }
            OptionCode::EXPORT_NAME => self.export_name(payload, exports),
            OptionCode::LIST if payload.is_empty() => list(exports),
            OptionCode::LIST => refuse(ReplyCode::ERR_INVALID, "LIST has no payload"),
            OptionCode::STARTTLS => refuse(ReplyCode::ERR_INVALID, "TLS is in use already"),
            OptionCode::INFO | OptionCode::GO => self.go(code, payload, exports),
            OptionCode::STRUCTURED_REPLY if !payload.is_empty() => {
                refuse(ReplyCode::ERR_INVALID, "STRUCTURED_REPLY has no payload")
            }
            OptionCode::STRUCTURED_REPLY if self.structured => refuse(
                ReplyCode::ERR_INVALID,
                "structured replies were negotiated already",
            ),
            OptionCode::STRUCTURED_REPLY => {
                self.structured = true;
                Step::Reply(reply(code, ReplyCode::ACK, &[]))
            }
            OptionCode::LIST_META_CONTEXT | OptionCode::SET_META_CONTEXT => {
                self.meta_context(code, payload, exports)
            }
            _ => refuse(ReplyCode::ERR_UNSUP, "the option is not known"),
        }
    }

    /// EXPORT_NAME has no way to say no but to close (C36).
    fn export_name(&mut self, payload: &[u8], exports: &dyn Exports) -> Step {
        let found = ExportName::try_from(payload)
            .ok()
            .and_then(|export| exports.find(&export).map(|info| (export, info)));
        let Some((export, info)) = found else {
            return Step::Close(Vec::new());
        };
        let session = self.session(export, info);
        let mut reply = Vec::with_capacity(134);
        reply.put_u64(session.info.size);
        reply.put_u16(session.info.flags.0);
        if !self.handshake.no_zeroes {
            reply.resize(134, 0);
        }
        Step::Transmit { reply, session }
    }

    fn go(&mut self, code: OptionCode, payload: &[u8], exports: &dyn Exports) -> Step {
        let request = match GoRequest::parse(payload) {
            Ok(request) => request,
            Err(problem) => {
                return Step::Reply(reply(
                    code,
                    ReplyCode::ERR_INVALID,
                    problem.to_string().as_bytes(),
                ));
            }
        };
        let Some(info) = exports.find(&request.export) else {
            return Step::Reply(unknown_export(code));
        };
        let session = self.session(request.export, info);
        let mut out = Vec::new();
        for information in information(&session, &request.information) {
            put_reply(&mut out, code, ReplyCode::INFO, &information.encode());
        }
        put_reply(&mut out, code, ReplyCode::ACK, &[]);
        if code == OptionCode::INFO {
            return Step::Reply(out);
        }
        Step::Transmit {
            reply: out,
            session,
        }
    }

    /// What a session on `export` would be, were it to begin now.
    fn session(&self, export: ExportName, mut info: ExportInfo) -> Session {
        info.flags = info.flags.with(TransmissionFlags::HAS_FLAGS);
        info.flags = if self.structured {
            info.flags.with(TransmissionFlags::SEND_DF)
        } else {
            info.flags.without(TransmissionFlags::SEND_DF)
        };
        // Contexts chosen for another export are not valid for this one (C42).
        let contexts = self
            .selection
            .as_ref()
            .filter(|selection| selection.export == export)
            .map_or_else(Vec::new, |selection| selection.contexts.clone());
        Session {
            export,
            info,
            structured: self.structured,
            contexts,
        }
    }

    fn meta_context(&mut self, code: OptionCode, payload: &[u8], exports: &dyn Exports) -> Step {
        let set = code == OptionCode::SET_META_CONTEXT;
        if set {
            // "SET replaces the whole earlier selection", also when it fails (C41, C42).
            self.selection = None;
        }
        let refuse = |with, why: &str| Step::Reply(reply(code, with, why.as_bytes()));
        if !self.structured {
            return refuse(ReplyCode::ERR_INVALID, "negotiate structured replies first");
        }
        let query = match MetaContextQuery::parse(payload) {
            Ok(query) => query,
            Err(problem) => return refuse(ReplyCode::ERR_INVALID, &problem.to_string()),
        };
        if exports.find(&query.export).is_none() {
            return Step::Reply(unknown_export(code));
        }
        let mut contexts: Vec<MetaContext> = Vec::new();
        if !set && query.queries.is_empty() {
            contexts.extend(MetaContext::ALL);
        }
        for context in query
            .queries
            .iter()
            .flat_map(|text| MetaContext::selected_by(text, !set))
        {
            if !contexts.contains(&context) {
                contexts.push(context);
            }
        }
        let numbered: Vec<_> = (1_u32..)
            .zip(contexts)
            .map(|(id, context)| (if set { id } else { 0 }, context))
            .collect();
        let mut out = Vec::new();
        for (id, context) in &numbered {
            let answer = MetaContextReply {
                id: *id,
                name: context.name().to_owned(),
            };
            put_reply(&mut out, code, ReplyCode::META_CONTEXT, &answer.encode());
        }
        put_reply(&mut out, code, ReplyCode::ACK, &[]);
        if set && !numbered.is_empty() {
            self.selection = Some(Selection {
                export: query.export,
                contexts: numbered,
            });
        }
        Step::Reply(out)
    }
}

/// The same words for an export that is not there and one that is not for this client (C33, C34).
fn unknown_export(code: OptionCode) -> Vec<u8> {
    reply(
        code,
        ReplyCode::ERR_UNKNOWN,
        b"no such export for this client",
    )
}

fn list(exports: &dyn Exports) -> Step {
    let mut out = Vec::new();
    for name in exports.names() {
        let mut payload = Vec::new();
        payload.put_string(name.as_str());
        put_reply(&mut out, OptionCode::LIST, ReplyCode::SERVER, &payload);
    }
    put_reply(&mut out, OptionCode::LIST, ReplyCode::ACK, &[]);
    Step::Reply(out)
}

/// INFO_EXPORT always, the others where they were asked for; unknown requests are ignored (C35, C38).
fn information(session: &Session, requested: &[InfoType]) -> Vec<Information> {
    let Session { export, info, .. } = session;
    let mut all = vec![Information::Export {
        size: info.size,
        flags: info.flags,
    }];
    if requested.contains(&InfoType::NAME) {
        all.push(Information::Name(export.as_str().to_owned()));
    }
    if let Some(description) = &info.description
        && requested.contains(&InfoType::DESCRIPTION)
        && text("description", description.as_bytes()).is_ok()
    {
        all.push(Information::Description(description.clone()));
    }
    if let Some(sizes) = info.block_sizes
        && requested.contains(&InfoType::BLOCK_SIZE)
    {
        all.push(Information::BlockSize(sizes));
    }
    all
}
