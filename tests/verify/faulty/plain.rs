//! A connection before TLS.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use hawser::nbd::codec::Put;
use hawser::nbd::option::OptionHeader;
use hawser::nbd::option_reply::{put_reply, reply};
use hawser::nbd::{OptionCode, ReplyCode, magic};
use rustls::ServerConfig;

use super::options::{Options, State, information};
use super::{EXPORT, Fault, OPTIONS, Shared, option};

/// How long a client may be silent.
const IDLE: Duration = Duration::from_secs(5);

pub(super) struct Plain {
    socket: TcpStream,
    shared: Arc<Shared>,
    refused: usize,
    state: State,
}

impl Plain {
    pub(super) fn new(socket: TcpStream, shared: Arc<Shared>) -> Self {
        Self {
            socket,
            shared,
            refused: 0,
            state: State::default(),
        }
    }

    fn has(&self, fault: Fault) -> bool {
        self.shared.has(fault)
    }

    pub(super) fn serve(mut self, config: Arc<ServerConfig>) -> io::Result<()> {
        if self.shared.dead.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.socket.set_nodelay(true)?;
        if !self.has(Fault::IdleForever) {
            self.socket.set_read_timeout(Some(IDLE))?;
        }
        let mut greeting = Vec::new();
        greeting.put_u64(magic::NBDMAGIC);
        greeting.put_u64(magic::IHAVEOPT);
        greeting.put_u16(match self.shared.fault {
            Fault::NotFixed => 2,
            Fault::UnknownServerFlag => 0x13,
            _ => 3,
        });
        self.socket.write_all(&greeting)?;
        let mut flags = [0; 4];
        self.socket.read_exact(&mut flags)?;
        let flags = u32::from_be_bytes(flags);
        let unknown = flags & !3 != 0 && !self.has(Fault::UnknownClientFlag);
        let unfixed = flags & 1 == 0 && !self.has(Fault::TlsWithoutFixed);
        if unknown || unfixed {
            return Ok(());
        }
        self.state.zeroes = flags & 2 == 0;
        match self.shared.fault {
            Fault::NoTls
            | Fault::Selective
            | Fault::AlsoInPlaintext
            | Fault::ListWantsTls
            | Fault::SelectiveStateSurvives => self.selective(config),
            _ => self.forced(config),
        }
    }

    /// Options are answered in plaintext too; the export is to be had there if that is the fault.
    fn selective(self, config: Arc<ServerConfig>) -> io::Result<()> {
        let open = self.has(Fault::NoTls) || self.has(Fault::AlsoInPlaintext);
        let socket = self.socket.try_clone()?;
        let mut options = Options::new(self.socket, self.shared.clone());
        options.state = self.state;
        options.visible = open;
        options.tls_only = !open;
        if !options.serve_until_starttls()? {
            return Ok(());
        }
        let ack = reply(OptionCode::STARTTLS, ReplyCode::ACK, &[]);
        options.stream.write_all(&ack)?;
        let mut state = State {
            zeroes: options.state.zeroes,
            ..State::default()
        };
        if self.shared.has(Fault::SelectiveStateSurvives) {
            state = options.state;
        }
        let mut secured = Options::secured(socket, config, self.shared)?;
        secured.state = state;
        secured.serve()
    }

    fn forced(mut self, config: Arc<ServerConfig>) -> io::Result<()> {
        let options = if self.has(Fault::OptionsUnbounded) {
            usize::MAX
        } else {
            OPTIONS / 10
        };
        for _ in 0..options {
            let (code, payload) = self.next()?;
            match code {
                OptionCode::STARTTLS if self.has(Fault::NoTlsAfterRefusals) && self.refused > 2 => {
                    let refusal = reply(code, ReplyCode::ERR_POLICY, b"too late");
                    self.socket.write_all(&refusal)?;
                }
                OptionCode::STARTTLS
                    if !payload.is_empty() && !self.has(Fault::StartTlsPayloadAccepted) =>
                {
                    let refusal = reply(code, ReplyCode::ERR_INVALID, b"no payload");
                    self.socket.write_all(&refusal)?;
                }
                OptionCode::STARTTLS => return self.upgrade(config),
                OptionCode::ABORT => {
                    return self.socket.write_all(&reply(code, ReplyCode::ACK, &[]));
                }
                OptionCode::EXPORT_NAME => match self.shared.fault {
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
                    if self.has(Fault::ClosesAfterARefusal) && code.0 > 100 {
                        return Ok(());
                    }
                }
            }
        }
        Ok(())
    }

    fn next(&mut self) -> io::Result<(OptionCode, Vec<u8>)> {
        if !matches!(
            self.shared.fault,
            Fault::WantsStartTlsWhole | Fault::BuffersInjectedInPieces
        ) {
            return option(&mut self.socket);
        }
        let mut header = [0; OptionHeader::LENGTH];
        let count = self.socket.read(&mut header)?;
        self.state.in_pieces = count < header.len();
        if count == 0 || self.state.in_pieces && self.has(Fault::WantsStartTlsWhole) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.socket.read_exact(&mut header[count..])?;
        option(&mut header.chain(&mut self.socket))
    }

    fn refusal(&mut self, code: OptionCode, payload: &[u8]) -> Vec<u8> {
        let ours = payload
            .windows(EXPORT.len() + 1)
            .any(|part| part.starts_with(EXPORT.as_bytes()) && !part.ends_with(b"-"));
        let proper = reply(code, ReplyCode::ERR_TLS_REQD, b"use TLS");
        match (self.shared.fault, code) {
            (Fault::ListsInPlaintext, OptionCode::LIST) => {
                let mut name = Vec::new();
                name.put_string(EXPORT);
                let mut out = reply(code, ReplyCode::SERVER, &name);
                put_reply(&mut out, code, ReplyCode::ACK, &[]);
                out
            }
            (Fault::GoInPlaintext, OptionCode::GO) if ours => {
                information(&self.shared, code, false)
            }
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
                self.state.selection =
                    Some((EXPORT.into(), vec![(1, super::contexts::CONTEXTS[0])]));
                proper
            }
            _ => proper,
        }
    }

    fn upgrade(mut self, config: Arc<ServerConfig>) -> io::Result<()> {
        let mut injected = Vec::new();
        let buffers = match self.shared.fault {
            Fault::BuffersInjected
            | Fault::BuffersInjectedQuietly
            | Fault::AnswersInjectedInPlaintext
            | Fault::TakesHelloForOption
            | Fault::PlaintextInTheWayOfTls => true,
            Fault::BuffersInjectedInPieces => self.state.in_pieces,
            _ => false,
        };
        if buffers {
            injected = self.buffered()?;
        }
        let ack = reply(OptionCode::STARTTLS, ReplyCode::ACK, &[]);
        match self.shared.fault {
            Fault::TakesHelloForOption if injected.first() == Some(&22) => {
                self.socket.write_all(&ack)?;
                let invalid = reply(OptionCode(0), ReplyCode::ERR_INVALID, &[]);
                return self.socket.write_all(&invalid);
            }
            Fault::PlaintextInTheWayOfTls | Fault::TakesHelloForOption if !injected.is_empty() => {
                return Ok(());
            }
            _ => self.socket.write_all(&ack)?,
        }
        self.peek()?;
        let zeroes = self.state.zeroes;
        let mut secured = Options::secured(self.socket, config, self.shared.clone())?;
        secured.state = self.state;
        secured.state.zeroes = zeroes;
        let mut injected = injected.as_slice();
        while !injected.is_empty() {
            let (code, payload) = option(&mut injected)?;
            let answer = secured.answer(code, &payload);
            match self.shared.fault {
                Fault::AnswersInjectedInPlaintext => secured.stream.sock.write_all(&answer)?,
                Fault::BuffersInjected => secured.stream.write_all(&answer)?,
                _ => {}
            }
        }
        secured.serve()
    }

    /// Looks at what comes in the place of a ClientHello.
    fn peek(&mut self) -> io::Result<()> {
        let mut first = [0; 11];
        match self.shared.fault {
            Fault::NoHandshake => {
                self.socket.peek(&mut first)?;
                Err(io::ErrorKind::Unsupported.into())
            }
            Fault::PlaintextInTheWayOfTls => {
                self.socket.peek(&mut first)?;
                if first[0] != b'I' {
                    return Ok(());
                }
                let (code, _) = option(&mut self.socket)?;
                self.socket.write_all(&reply(code, ReplyCode::ACK, &[]))
            }
            Fault::OldTls => {
                let count = self.socket.peek(&mut first)?;
                if count < first.len() || first[0] != 22 || first[10] > 2 {
                    return Ok(());
                }
                // A ServerHello, as far as anybody looks.
                self.socket
                    .write_all(&[22, 3, first[10], 0, 4, 2, 0, 0, 0])?;
                self.socket.read_exact(&mut [0; 64])
            }
            _ => Ok(()),
        }
    }

    /// What a reader with a buffer takes out of the socket together with STARTTLS. An honest client has sent nothing
    /// yet: it waits for the ACK.
    fn buffered(&mut self) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.socket
            .set_read_timeout(Some(Duration::from_millis(40)))?;
        loop {
            let mut piece = [0; 4096];
            match self.socket.read(&mut piece) {
                Ok(count) if count > 0 => bytes.extend_from_slice(&piece[..count]),
                _ => break,
            }
        }
        self.socket.set_read_timeout(Some(IDLE))?;
        Ok(bytes)
    }
}
