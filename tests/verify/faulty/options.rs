//! Options that are answered: inside TLS, and in plaintext by a server that does not force it.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use hawser::nbd::codec::Put;
use hawser::nbd::option::{GoRequest, OptionHeader};
use hawser::nbd::option_reply::{Information, put_reply, reply};
use hawser::nbd::{BlockSizes, OptionCode, ReplyCode, TransmissionFlags};
use hawser::tls::certificate_names;
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use super::{BLOCK, EXPORT, Fault, OPTION, OPTIONS, OTHER, SIZE, Shared};

/// What was negotiated.
#[derive(Debug, Default, Clone)]
pub(crate) struct State {
    pub(super) structured: bool,
    /// For which export, and which contexts by id.
    pub(super) selection: Option<(String, Vec<(u32, &'static str)>)>,
    pub(super) zeroes: bool,
    pub(super) in_pieces: bool,
}

/// A connection at the options.
pub(crate) struct Options<S> {
    pub(crate) stream: S,
    pub(super) shared: Arc<Shared>,
    pub(super) state: State,
    /// Whether this client may know of the export.
    pub(super) visible: bool,
    /// Whether it would if it used TLS.
    pub(super) tls_only: bool,
}

pub(crate) type Tls = StreamOwned<ServerConnection, TcpStream>;

impl Options<Tls> {
    /// Makes the handshake, and looks who it is.
    pub(crate) fn secured(
        socket: TcpStream,
        config: Arc<ServerConfig>,
        shared: Arc<Shared>,
    ) -> io::Result<Self> {
        let tls = ServerConnection::new(config).map_err(io::Error::other)?;
        let mut stream = StreamOwned::new(tls, socket);
        while stream.conn.is_handshaking() {
            if let Err(error) = stream.conn.complete_io(&mut stream.sock) {
                // The alert, and time to read it.
                let _ = stream.conn.write_tls(&mut stream.sock);
                stream.sock.shutdown(std::net::Shutdown::Write)?;
                let _ = stream.sock.read(&mut [0; 4096]);
                return Err(error);
            }
        }
        let names: Vec<_> = stream
            .conn
            .peer_certificates()
            .and_then(|chain| chain.first().map(certificate_names))
            .unwrap_or_default();
        let visible = shared.has(Fault::OtherIdentity)
            || names.is_empty()
            || names.iter().any(|name| name == "volume.client.test");
        Ok(Self {
            visible,
            ..Self::new(stream, shared)
        })
    }
}

impl<S: Read + Write> Options<S> {
    pub(super) fn new(stream: S, shared: Arc<Shared>) -> Self {
        Self {
            stream,
            shared,
            state: State::default(),
            visible: true,
            tls_only: false,
        }
    }

    pub(super) fn has(&self, fault: Fault) -> bool {
        self.shared.has(fault)
    }

    pub(super) fn serve(mut self) -> io::Result<()> {
        for _ in 0..OPTIONS {
            let (code, payload) = self.next()?;
            if self.step(code, &payload)? {
                return self.transmit();
            }
        }
        Ok(())
    }

    /// Whether STARTTLS was asked, which is not answered yet.
    pub(super) fn serve_until_starttls(&mut self) -> io::Result<bool> {
        for _ in 0..OPTIONS / 10 {
            let (code, payload) = self.next()?;
            if code == OptionCode::STARTTLS {
                let refusal = match payload.is_empty() {
                    _ if self.has(Fault::NoTls) => ReplyCode::ERR_POLICY,
                    false => ReplyCode::ERR_INVALID,
                    true => return Ok(true),
                };
                self.stream.write_all(&reply(code, refusal, &[]))?;
                continue;
            }
            if self.step(code, &payload)? {
                self.transmit()?;
                return Ok(false);
            }
        }
        Ok(false)
    }

    fn next(&mut self) -> io::Result<(OptionCode, Vec<u8>)> {
        let mut bytes = [0; OptionHeader::LENGTH];
        let read = self.stream.read_exact(&mut bytes);
        self.mourn(read)?;
        if self.has(Fault::OptionMagicIgnored) {
            bytes[..8].copy_from_slice(b"IHAVEOPT");
        }
        let header = OptionHeader::parse(&bytes).map_err(io::Error::other)?;
        if header.length > OPTION {
            if self.has(Fault::HugeOptionAwaited) {
                let mut rest = (&mut self.stream).take(u64::from(header.length));
                io::copy(&mut rest, &mut io::sink())?;
            }
            return Err(io::Error::other("an option without end"));
        }
        let mut payload = vec![0; header.length as usize];
        let read = self.stream.read_exact(&mut payload);
        self.mourn(read)?;
        Ok((header.code, payload))
    }

    /// A server that does not survive a client that goes away.
    pub(super) fn mourn(&self, read: io::Result<()>) -> io::Result<()> {
        if read.is_err() && self.has(Fault::DiesOfTruncation) {
            self.shared.dead.store(true, Ordering::Relaxed);
        }
        read
    }

    /// Whether transmission begins.
    fn step(&mut self, code: OptionCode, payload: &[u8]) -> io::Result<bool> {
        let end = || Err(io::ErrorKind::ConnectionAborted.into());
        let closes = match code {
            OptionCode::STARTTLS => self.has(Fault::SecondStartTlsCloses),
            OptionCode::ABORT => self.has(Fault::AbortSilent),
            OptionCode::STRUCTURED_REPLY => {
                self.has(Fault::StructuredTwiceCloses) && self.state.structured
            }
            OptionCode::INFO => {
                self.has(Fault::LongNameCloses) && payload.len() > 4000
                    || self.has(Fault::UnknownExportCloses) && payload.ends_with(b"-other\0\0")
            }
            OptionCode(0x7fff_ffff) => self.has(Fault::UnknownOptionCloses),
            _ => false,
        };
        if closes {
            return end();
        }
        if code == OptionCode::EXPORT_NAME {
            if payload != EXPORT.as_bytes() || !self.visible {
                return end();
            }
            let answer = self.export_name();
            self.stream.write_all(&answer)?;
            return Ok(true);
        }
        let answer = self.answer(code, payload);
        self.stream.write_all(&answer)?;
        if code == OptionCode::ABORT {
            return end();
        }
        let accepted = answer[answer.len().saturating_sub(20)..][12..16] == [0, 0, 0, 1];
        Ok(code == OptionCode::GO && accepted)
    }

    fn export_name(&mut self) -> Vec<u8> {
        self.state.selection.take_if(|(export, _)| export != EXPORT);
        let size = if self.has(Fault::ExportNameWrongSize) {
            SIZE / 2
        } else {
            SIZE
        };
        let mut out = Vec::new();
        out.put_u64(size);
        out.put_u16(flags(&self.shared, self.state.structured).0);
        if self.state.zeroes && !self.has(Fault::ExportNameWithoutZeroes) {
            out.resize(134, 0);
        }
        out
    }

    pub(crate) fn answer(&mut self, code: OptionCode, payload: &[u8]) -> Vec<u8> {
        let refuse = |with| reply(code, with, &[]);
        match code {
            OptionCode::ABORT if !payload.is_empty() && self.has(Fault::AbortDataRefused) => {
                refuse(ReplyCode::ERR_INVALID)
            }
            OptionCode::ABORT => refuse(ReplyCode::ACK),
            OptionCode::STARTTLS => refuse(match self.shared.fault {
                Fault::SecondStartTls => ReplyCode::ACK,
                Fault::SecondStartTlsWrongCode => ReplyCode::ERR_TLS_REQD,
                _ => ReplyCode::ERR_INVALID,
            }),
            OptionCode::LIST | OptionCode::STRUCTURED_REPLY
                if !payload.is_empty() && !self.has(Fault::PayloadIgnored) =>
            {
                refuse(ReplyCode::ERR_INVALID)
            }
            OptionCode::STRUCTURED_REPLY if self.has(Fault::NoStructuredReplies) => {
                refuse(ReplyCode::ERR_UNSUP)
            }
            OptionCode::STRUCTURED_REPLY => {
                self.state.structured = true;
                refuse(ReplyCode::ACK)
            }
            OptionCode::LIST if self.has(Fault::ListWantsTls) && self.tls_only => {
                refuse(ReplyCode::ERR_TLS_REQD)
            }
            OptionCode::LIST if self.has(Fault::ListWantsTlsInside) => {
                refuse(ReplyCode::ERR_TLS_REQD)
            }
            OptionCode::LIST => {
                let mut out = Vec::new();
                if self.visible || self.has(Fault::OtherIdentityLists) {
                    let other = self.has(Fault::ContextOfListedExport).then_some(OTHER);
                    for export in [EXPORT].into_iter().chain(other) {
                        let mut name = Vec::new();
                        name.put_string(export);
                        put_reply(&mut out, code, ReplyCode::SERVER, &name);
                    }
                }
                put_reply(&mut out, code, ReplyCode::ACK, &[]);
                out
            }
            OptionCode::INFO | OptionCode::GO => self.go(code, payload),
            OptionCode::LIST_META_CONTEXT | OptionCode::SET_META_CONTEXT => {
                self.contexts(code, payload)
            }
            _ if self.has(Fault::UnknownOptionAccepted) && code.0 > 100 => refuse(ReplyCode::ACK),
            _ => refuse(ReplyCode::ERR_UNSUP),
        }
    }

    fn go(&mut self, code: OptionCode, payload: &[u8]) -> Vec<u8> {
        let refuse = |with| reply(code, with, &[]);
        let unknown = match self.shared.fault {
            Fault::UnknownExportWrongCode => ReplyCode::ERR_POLICY,
            _ if self.tls_only => ReplyCode::ERR_TLS_REQD,
            _ => ReplyCode::ERR_UNKNOWN,
        };
        let request = GoRequest::parse(payload);
        let taken = match (self.shared.fault, &request) {
            (Fault::LengthsUnchecked, Err(_)) => payload.ends_with(&[0, 7]),
            (Fault::TooLongNameAccepted, Err(_)) => payload.len() == 4097 + 6,
            (Fault::NulAccepted, Err(_)) => payload.contains(&b'x') && payload.len() < 100,
            _ => false,
        };
        match request {
            Err(_) if !taken => refuse(ReplyCode::ERR_INVALID),
            Ok(request) if request.export.as_str() != EXPORT || !self.visible => refuse(unknown),
            Ok(request)
                if self.has(Fault::UnknownInformationRefused)
                    && request.information.iter().any(|kind| kind.0 > 100) =>
            {
                refuse(ReplyCode::ERR_INVALID)
            }
            _ if code == OptionCode::GO && self.has(Fault::GoWantsBlockSizes) => {
                refuse(ReplyCode::ERR_BLOCK_SIZE_REQD)
            }
            _ => {
                let kept =
                    self.has(Fault::ContextOfOtherExport) || self.has(Fault::ContextOfListedExport);
                if code == OptionCode::GO && !kept {
                    self.state.selection.take_if(|(export, _)| export != EXPORT);
                }
                information(&self.shared, code, self.state.structured)
            }
        }
    }
}

fn flags(shared: &Shared, structured: bool) -> TransmissionFlags {
    let mut flags = [
        TransmissionFlags::SEND_FLUSH,
        TransmissionFlags::SEND_FUA,
        TransmissionFlags::SEND_TRIM,
        TransmissionFlags::SEND_WRITE_ZEROES,
        TransmissionFlags::SEND_FAST_ZERO,
        TransmissionFlags::SEND_CACHE,
        TransmissionFlags::CAN_MULTI_CONN,
    ]
    .into_iter()
    .fold(TransmissionFlags::HAS_FLAGS, TransmissionFlags::with);
    if structured || shared.has(Fault::DfWithoutStructured) {
        flags = flags.with(TransmissionFlags::SEND_DF);
    }
    match shared.fault {
        Fault::ReadOnly | Fault::ReadOnlyWritable | Fault::ReadOnlyWrongErrno => {
            flags.with(TransmissionFlags::READ_ONLY)
        }
        Fault::NoHasFlags => flags.without(TransmissionFlags::HAS_FLAGS),
        _ => flags,
    }
}

pub(super) fn information(shared: &Shared, code: OptionCode, structured: bool) -> Vec<u8> {
    let mut flags = flags(shared, structured);
    if code == OptionCode::GO && shared.has(Fault::GoUnlikeInfo) {
        flags = flags.without(TransmissionFlags::SEND_CACHE);
    }
    let block_sizes = BlockSizes {
        minimum: BLOCK,
        preferred: if shared.has(Fault::BlockSizesWrong) {
            3000
        } else {
            4096
        },
        maximum_payload: if shared.has(Fault::SmallPayloads) {
            512 << 10
        } else {
            1 << 25
        },
    };
    let mut out = Vec::new();
    let mut all = vec![Information::Export { size: SIZE, flags }];
    if shared.has(Fault::NoExportInformation) {
        all.clear();
    }
    all.push(Information::BlockSize(block_sizes));
    for information in all {
        put_reply(&mut out, code, ReplyCode::INFO, &information.encode());
    }
    put_reply(&mut out, code, ReplyCode::ACK, &[]);
    out
}
