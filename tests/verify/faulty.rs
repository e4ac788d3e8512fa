//! An NBD server that is right in all but one thing.
//!
//! It shares the wire format with Hawser and nothing of its negotiation, so that a mistake there is not made twice.

use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use hawser::nbd::codec::Put;
use hawser::nbd::option::{GoRequest, MetaContextQuery, OptionHeader};
use hawser::nbd::option_reply::{Information, MetaContextReply, put_reply, reply};
use hawser::nbd::reply::{Extent, block_status, error, none, offset_data, simple};
use hawser::nbd::request::RawRequest;
use hawser::nbd::{
    BlockSizes, Command, CommandFlags, Errno, OptionCode, ReplyCode, TransmissionFlags, magic,
};
use hawser::verify::Target;
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use super::certificates::{Clients, volume};

/// Bytes of the export, and of its runs of data and holes.
const SIZE: u64 = 4 << 20;
const RUN: u64 = 64 << 10;
const BLOCK: u32 = 512;
const EXPORT: &str = "volume/attachment";
const CONTEXTS: [&str; 2] = ["base:allocation", "test:dirty"];

/// The one thing that is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Fault {
    Nothing,
    /// Not faults: features that a server need not have.
    NoStructuredReplies,
    NoContexts,
    // Before TLS.
    ListsInPlaintext,
    GoInPlaintext,
    StructuredInPlaintext,
    WrongCodeInPlaintext,
    RefusesTwice,
    ClosesAfterARefusal,
    NoTlsAfterRefusals,
    RefusalNamesExport,
    RefusalTellsMissing,
    ExportNameAnswered,
    ExportNameRefusedAloud,
    ExportNameIgnored,
    // The step into TLS.
    BuffersInjected,
    BuffersInjectedQuietly,
    AnswersInjectedInPlaintext,
    StructuredSurvives,
    ContextsSurvive,
    // Certificates.
    AnonymousClients,
    ForeignClients,
    EveryClient,
    // Inside TLS.
    SecondStartTls,
    SecondStartTlsWrongCode,
    SecondStartTlsCloses,
    StatusWithoutContexts,
    StatusWrongErrno,
    ReadAlwaysStructured,
    // Contexts.
    SameIds,
    SelectsTwice,
    SelectsUnasked,
    OneContextUnanswered,
    ContextOfOtherExport,
    FailedSelectionKept,
    OverlongQueryAccepted,
    EmptySelectionKept,
    EmptySelectionSelectsAll,
    // Extents.
    ChunkTwice,
    WrongContextId,
    NoExtents,
    EmptyExtent,
    ExtentsBeyondRequest,
    ExtentBeyondEnd,
    UnalignedExtent,
    ReqOneIgnored,
    ReqOneTooLong,
    StatusSimple,
}

/// Starts the server for the rest of the test's life.
pub(crate) fn start(fault: Fault) -> Target {
    let clients = match fault {
        Fault::AnonymousClients => Clients::AlsoAnonymous,
        Fault::ForeignClients => Clients::AnyCertificate,
        Fault::EveryClient => Clients::Everyone,
        _ => Clients::Genuine,
    };
    let (config, mut target) = volume(clients);
    let listener = TcpListener::bind(target.address).unwrap();
    target.address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for socket in listener.incoming() {
            let (socket, config) = (socket.unwrap(), config.clone());
            // A client that goes away ends its session: that is no failure of the test.
            std::thread::spawn(move || Plain::new(socket, fault).serve(config));
        }
    });
    target
}

/// What was negotiated.
#[derive(Debug, Default)]
struct State {
    structured: bool,
    /// For which export, and which contexts by id.
    selection: Option<(String, Vec<(u32, &'static str)>)>,
}

pub(crate) fn option(from: &mut impl Read) -> io::Result<(OptionCode, Vec<u8>)> {
    let mut header = [0; OptionHeader::LENGTH];
    from.read_exact(&mut header)?;
    let header = OptionHeader::parse(&header).map_err(io::Error::other)?;
    let mut payload = vec![0; header.length as usize];
    from.read_exact(&mut payload)?;
    Ok((header.code, payload))
}

/// A connection before TLS.
struct Plain {
    socket: TcpStream,
    fault: Fault,
    refused: usize,
    state: State,
}

impl Plain {
    fn new(socket: TcpStream, fault: Fault) -> Self {
        Self {
            socket,
            fault,
            refused: 0,
            state: State::default(),
        }
    }

    fn serve(mut self, config: Arc<ServerConfig>) -> io::Result<()> {
        let mut greeting = Vec::new();
        greeting.put_u64(magic::NBDMAGIC);
        greeting.put_u64(magic::IHAVEOPT);
        greeting.put_u16(3);
        self.socket.write_all(&greeting)?;
        self.socket.read_exact(&mut [0; 4])?;
        loop {
            let (code, payload) = option(&mut self.socket)?;
            match code {
                OptionCode::STARTTLS
                    if self.fault == Fault::NoTlsAfterRefusals && self.refused > 2 =>
                {
                    let refusal = reply(code, ReplyCode::ERR_POLICY, b"too late");
                    self.socket.write_all(&refusal)?;
                }
                OptionCode::STARTTLS => return self.upgrade(config),
                OptionCode::EXPORT_NAME => match self.fault {
                    Fault::ExportNameAnswered => self.socket.write_all(&[0; 10])?,
                    Fault::ExportNameIgnored => {}
                    Fault::ExportNameRefusedAloud => {
                        let refusal = reply(code, ReplyCode::ERR_TLS_REQD, b"");
                        return self.socket.write_all(&refusal);
                    }
                    _ => return Ok(()),
                },
                _ => {
                    let answer = self.refusal(code, &payload);
                    self.socket.write_all(&answer)?;
                    self.refused += 1;
                    if self.fault == Fault::ClosesAfterARefusal && code.0 > 100 {
                        return Ok(());
                    }
                }
            }
        }
    }

    fn refusal(&mut self, code: OptionCode, payload: &[u8]) -> Vec<u8> {
        let ours = payload
            .windows(EXPORT.len() + 1)
            .any(|part| part.starts_with(EXPORT.as_bytes()) && !part.ends_with(b"-"));
        let proper = reply(code, ReplyCode::ERR_TLS_REQD, b"use TLS");
        match (self.fault, code) {
            (Fault::ListsInPlaintext, OptionCode::LIST) => {
                let mut name = Vec::new();
                name.put_string(EXPORT);
                let mut out = reply(code, ReplyCode::SERVER, &name);
                put_reply(&mut out, code, ReplyCode::ACK, &[]);
                out
            }
            (Fault::GoInPlaintext, OptionCode::GO) if ours => information(code),
            (Fault::StructuredInPlaintext, OptionCode::STRUCTURED_REPLY) => {
                reply(code, ReplyCode::ACK, &[])
            }
            (Fault::WrongCodeInPlaintext, OptionCode(0x7fff_ffff)) => {
                reply(code, ReplyCode::ERR_UNSUP, &[])
            }
            (Fault::RefusesTwice, OptionCode::LIST) => [proper.clone(), proper].concat(),
            (Fault::RefusalNamesExport, OptionCode::INFO) if ours => {
                reply(code, ReplyCode::ERR_TLS_REQD, b"this export wants TLS")
            }
            (Fault::RefusalTellsMissing, OptionCode::SET_META_CONTEXT) if !ours => {
                reply(code, ReplyCode::ERR_UNKNOWN, b"")
            }
            (Fault::StructuredSurvives, OptionCode::STRUCTURED_REPLY) => {
                self.state.structured = true;
                proper
            }
            (Fault::ContextsSurvive, OptionCode::SET_META_CONTEXT) => {
                self.state.selection = Some((EXPORT.into(), vec![(1, CONTEXTS[0])]));
                proper
            }
            _ => proper,
        }
    }

    fn upgrade(mut self, config: Arc<ServerConfig>) -> io::Result<()> {
        let mut injected = Vec::new();
        if matches!(
            self.fault,
            Fault::BuffersInjected
                | Fault::BuffersInjectedQuietly
                | Fault::AnswersInjectedInPlaintext
        ) {
            injected = self.buffered()?;
        }
        let ack = reply(OptionCode::STARTTLS, ReplyCode::ACK, &[]);
        self.socket.write_all(&ack)?;
        let mut secured = Secured::new(self.socket, config, self.fault)?;
        secured.state = self.state;
        let mut injected = injected.as_slice();
        while !injected.is_empty() {
            let (code, payload) = option(&mut injected)?;
            let answer = secured.answer(code, &payload);
            match self.fault {
                Fault::AnswersInjectedInPlaintext => secured.stream.sock.write_all(&answer)?,
                Fault::BuffersInjected => secured.stream.write_all(&answer)?,
                _ => {}
            }
        }
        secured.serve()
    }

    /// What a reader with a buffer takes out of the socket together with STARTTLS. An honest client has sent nothing
    /// yet: it waits for the ACK.
    fn buffered(&mut self) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.socket
            .set_read_timeout(Some(Duration::from_millis(20)))?;
        loop {
            let mut piece = [0; 4096];
            match self.socket.read(&mut piece) {
                Ok(count) if count > 0 => bytes.extend_from_slice(&piece[..count]),
                _ => break,
            }
        }
        self.socket.set_read_timeout(None)?;
        Ok(bytes)
    }
}

fn information(code: OptionCode) -> Vec<u8> {
    let flags = TransmissionFlags::HAS_FLAGS.with(TransmissionFlags::SEND_FLUSH);
    let sizes = BlockSizes {
        minimum: BLOCK,
        preferred: 4096,
        maximum_payload: 1 << 25,
    };
    let mut out = Vec::new();
    for information in [
        Information::Export { size: SIZE, flags },
        Information::BlockSize(sizes),
    ] {
        put_reply(&mut out, code, ReplyCode::INFO, &information.encode());
    }
    put_reply(&mut out, code, ReplyCode::ACK, &[]);
    out
}

/// A connection inside TLS.
pub(crate) struct Secured {
    pub(crate) stream: StreamOwned<ServerConnection, TcpStream>,
    fault: Fault,
    state: State,
}

impl Secured {
    pub(crate) fn new(
        socket: TcpStream,
        config: Arc<ServerConfig>,
        fault: Fault,
    ) -> io::Result<Self> {
        let tls = ServerConnection::new(config).map_err(io::Error::other)?;
        Ok(Self {
            stream: StreamOwned::new(tls, socket),
            fault,
            state: State::default(),
        })
    }

    fn serve(mut self) -> io::Result<()> {
        loop {
            let (code, payload) = option(&mut self.stream)?;
            if code == OptionCode::STARTTLS && self.fault == Fault::SecondStartTlsCloses {
                return Ok(());
            }
            let answer = self.answer(code, &payload);
            self.stream.write_all(&answer)?;
            match code {
                OptionCode::ABORT => return Ok(()),
                OptionCode::GO => return self.transmit(),
                _ => {}
            }
        }
    }

    pub(crate) fn answer(&mut self, code: OptionCode, payload: &[u8]) -> Vec<u8> {
        let refuse = |with| reply(code, with, &[]);
        match code {
            OptionCode::ABORT => refuse(ReplyCode::ACK),
            OptionCode::STARTTLS => refuse(match self.fault {
                Fault::SecondStartTls => ReplyCode::ACK,
                Fault::SecondStartTlsWrongCode => ReplyCode::ERR_TLS_REQD,
                _ => ReplyCode::ERR_INVALID,
            }),
            OptionCode::STRUCTURED_REPLY if self.fault == Fault::NoStructuredReplies => {
                refuse(ReplyCode::ERR_UNSUP)
            }
            OptionCode::STRUCTURED_REPLY => {
                self.state.structured = true;
                refuse(ReplyCode::ACK)
            }
            OptionCode::LIST => {
                let mut name = Vec::new();
                name.put_string(EXPORT);
                let mut out = reply(code, ReplyCode::SERVER, &name);
                put_reply(&mut out, code, ReplyCode::ACK, &[]);
                out
            }
            OptionCode::INFO | OptionCode::GO => match GoRequest::parse(payload) {
                Ok(request) if request.export.as_str() == EXPORT => {
                    if code == OptionCode::GO && self.fault != Fault::ContextOfOtherExport {
                        self.state.selection.take_if(|(export, _)| export != EXPORT);
                    }
                    information(code)
                }
                _ => refuse(ReplyCode::ERR_UNKNOWN),
            },
            OptionCode::LIST_META_CONTEXT | OptionCode::SET_META_CONTEXT => {
                self.contexts(code, payload)
            }
            _ => refuse(ReplyCode::ERR_UNSUP),
        }
    }

    fn contexts(&mut self, code: OptionCode, payload: &[u8]) -> Vec<u8> {
        let set = code == OptionCode::SET_META_CONTEXT;
        if self.fault == Fault::NoContexts {
            return reply(code, ReplyCode::ERR_UNSUP, &[]);
        }
        let before = if set {
            self.state.selection.take()
        } else {
            None
        };
        let refused = match MetaContextQuery::parse(payload) {
            _ if !self.state.structured => Err(ReplyCode::ERR_INVALID),
            Err(_) if self.fault == Fault::OverlongQueryAccepted => {
                return reply(code, ReplyCode::ACK, &[]);
            }
            Err(_) => Err(ReplyCode::ERR_INVALID),
            Ok(query)
                if query.export.as_str() != EXPORT && self.fault != Fault::ContextOfOtherExport =>
            {
                Err(ReplyCode::ERR_UNKNOWN)
            }
            Ok(query) => Ok(query),
        };
        let query = match refused {
            Ok(query) => query,
            Err(code_of_error) => {
                if self.fault == Fault::FailedSelectionKept {
                    self.state.selection = before;
                }
                return reply(code, code_of_error, &[]);
            }
        };
        let all =
            query.queries.is_empty() && (!set || self.fault == Fault::EmptySelectionSelectsAll);
        if set && query.queries.is_empty() && self.fault == Fault::EmptySelectionKept {
            self.state.selection = before;
            return reply(code, ReplyCode::ACK, &[]);
        }
        let mut selected: Vec<(u32, &'static str)> = (1..)
            .zip(CONTEXTS)
            .filter(|(_, name)| all || query.queries.iter().any(|query| query == name))
            .collect();
        let several = selected.len() > 1;
        match self.fault {
            Fault::SameIds if set && several => selected[1].0 = selected[0].0,
            Fault::SelectsTwice if set && several => selected.push((3, CONTEXTS[1])),
            Fault::SelectsUnasked if set && several => selected.push((3, "test:unasked")),
            _ => {}
        }
        let mut out = Vec::new();
        for (id, name) in &selected {
            let context = MetaContextReply {
                id: if set { *id } else { 0 },
                name: (*name).into(),
            };
            put_reply(&mut out, code, ReplyCode::META_CONTEXT, &context.encode());
        }
        put_reply(&mut out, code, ReplyCode::ACK, &[]);
        if set && !selected.is_empty() {
            self.state.selection = Some((query.export.as_str().into(), selected));
        }
        out
    }

    fn transmit(mut self) -> io::Result<()> {
        loop {
            let mut bytes = [0; RawRequest::LENGTH];
            self.stream.read_exact(&mut bytes)?;
            let request = RawRequest::parse(&bytes).map_err(io::Error::other)?;
            let answer = match request.command {
                Command::DISC => return Ok(()),
                Command::READ => self.read(&request),
                Command::BLOCK_STATUS => self.status(&request),
                _ => self.refuse(&request, Errno::EINVAL),
            };
            self.stream.write_all(&answer)?;
        }
    }

    fn refuse(&self, request: &RawRequest, errno: Errno) -> Vec<u8> {
        if self.state.structured {
            return error(request.cookie, errno, "no");
        }
        simple(request.cookie, errno).to_vec()
    }

    fn read(&self, request: &RawRequest) -> Vec<u8> {
        let mut out = if self.state.structured || self.fault == Fault::ReadAlwaysStructured {
            offset_data(request.cookie, true, request.offset, request.length).to_vec()
        } else {
            simple(request.cookie, Errno::OK).to_vec()
        };
        out.resize(out.len() + request.length as usize, 0);
        out
    }

    fn status(&self, request: &RawRequest) -> Vec<u8> {
        let contexts = match &self.state.selection {
            Some((_, contexts)) => contexts.clone(),
            None if !self.state.structured && self.fault == Fault::StatusWithoutContexts => {
                vec![(1, CONTEXTS[0])]
            }
            None if !self.state.structured && self.fault == Fault::StatusWrongErrno => {
                return self.refuse(request, Errno::ENOTSUP);
            }
            None => return self.refuse(request, Errno::EINVAL),
        };
        if self.fault == Fault::StatusSimple {
            return simple(request.cookie, Errno::OK).to_vec();
        }
        let one = request.flags.contains(CommandFlags::REQ_ONE);
        let extents = self.extents(request, one);
        let mut out = Vec::new();
        let mut answered = BTreeSet::new();
        for (id, _) in &contexts {
            if !answered.insert(*id) || self.fault == Fault::OneContextUnanswered && *id > 1 {
                continue;
            }
            let id = if self.fault == Fault::WrongContextId {
                id + 7
            } else {
                *id
            };
            out.extend(block_status(request.cookie, false, id, &extents));
            if self.fault == Fault::ChunkTwice {
                out.extend(block_status(request.cookie, false, id, &extents));
            }
        }
        out.extend(none(request.cookie));
        out
    }

    /// Data and holes by turns.
    fn extents(&self, request: &RawRequest, one: bool) -> Vec<Extent> {
        let end = request.offset + u64::from(request.length);
        let mut offset = request.offset;
        let mut extents = Vec::new();
        while offset < end {
            let run = (offset / RUN + 1) * RUN;
            let length = u32::try_from(run.min(end) - offset).unwrap();
            let flags = if (offset / RUN).is_multiple_of(2) {
                0
            } else {
                3
            };
            extents.push(Extent { length, flags });
            offset += u64::from(length);
        }
        let last = extents.len() - 1;
        match self.fault {
            Fault::NoExtents => extents.clear(),
            Fault::EmptyExtent => extents[last].length = 0,
            Fault::ExtentsBeyondRequest if !one => extents.push(Extent {
                length: BLOCK,
                flags: 0,
            }),
            Fault::ExtentBeyondEnd if !one => extents[last].length += BLOCK,
            Fault::UnalignedExtent if !one => extents[last].length -= 1,
            Fault::ReqOneIgnored if one => extents.insert(0, extents[0]),
            Fault::ReqOneTooLong if one => extents[0].length = request.length + BLOCK,
            _ => {}
        }
        if one && self.fault != Fault::ReqOneIgnored {
            extents.truncate(1);
        }
        extents
    }
}
