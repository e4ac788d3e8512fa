//! A client with verbs: each method is one thing said or heard on the wire, and nothing is checked that the test did
//! not ask for.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;

use hawser::nbd::option::{GoRequest, MetaContextQuery, OptionHeader};
use hawser::nbd::option_reply::{Information, MetaContextReply, OptionReplyHeader};
use hawser::nbd::reply::{Chunk, Extent, ReplyHeader};
use hawser::nbd::request::RawRequest;
use hawser::nbd::{
    ChunkType, Command, CommandFlags, Cookie, Errno, ExportName, HandshakeFlags, InfoType,
    OptionCode, ReplyCode, TransmissionFlags,
};
use rustls::{ClientConfig, ClientConnection, StreamOwned};

use crate::bench::PATIENCE;

/// The name under which the bench's servers have certificates besides their own.
const SERVER: &str = "localhost";

/// A connection, in plaintext or inside TLS.
pub(crate) struct Wire<S: Read + Write> {
    pub(crate) stream: S,
}

pub(crate) type Plain = Wire<TcpStream>;
pub(crate) type Tls = Wire<StreamOwned<ClientConnection, TcpStream>>;

/// What GO or INFO said.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Said {
    pub(crate) information: Vec<Information>,
}

impl Said {
    pub(crate) fn export(&self) -> (u64, TransmissionFlags) {
        let export = self
            .information
            .iter()
            .find_map(|information| match information {
                Information::Export { size, flags } => Some((*size, *flags)),
                _ => None,
            });
        export.expect("INFO_EXPORT")
    }
}

/// One reply to READ, put together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Content {
    pub(crate) data: Vec<u8>,
    pub(crate) chunks: Vec<(ChunkType, u64, u32)>,
}

impl Plain {
    /// Connects and reads the greeting, but says nothing.
    pub(crate) fn silent(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        let mut wire = Self { stream };
        wire.hear(18)?;
        Ok(wire)
    }

    /// Connects and answers the greeting.
    pub(crate) fn connect(address: SocketAddr) -> Self {
        let mut wire = Self::silent(address).unwrap();
        let flags = HandshakeFlags::FIXED_NEWSTYLE.with(HandshakeFlags::NO_ZEROES);
        wire.say(&flags.0.to_be_bytes());
        wire
    }

    /// STARTTLS and the handshake, which under TLS 1.3 ends before the server has looked at the certificate.
    pub(crate) fn starttls(mut self, config: &Arc<ClientConfig>) -> io::Result<Tls> {
        self.option(OptionCode::STARTTLS, &[]);
        let (code, payload) = self.answer(OptionCode::STARTTLS)?;
        assert_eq!((code, payload), (ReplyCode::ACK, Vec::new()));
        self.tls(config)
    }

    /// The handshake alone.
    pub(crate) fn tls(self, config: &Arc<ClientConfig>) -> io::Result<Tls> {
        let name = SERVER.try_into().unwrap();
        let mut connection = ClientConnection::new(Arc::clone(config), name).unwrap();
        let mut socket = self.stream;
        while connection.is_handshaking() {
            connection.complete_io(&mut socket)?;
        }
        Ok(Wire {
            stream: StreamOwned::new(connection, socket),
        })
    }
}

impl Tls {
    /// A client inside TLS.
    pub(crate) fn connect(address: SocketAddr, config: &Arc<ClientConfig>) -> Self {
        Plain::connect(address).starttls(config).unwrap()
    }

    /// A client in transmission with simple replies, as the kernel is.
    pub(crate) fn simple(address: SocketAddr, config: &Arc<ClientConfig>, export: &str) -> Self {
        let mut wire = Self::connect(address, config);
        wire.go(export).unwrap();
        wire
    }

    /// A client in transmission with structured replies, and `base:allocation` with the id that is returned.
    pub(crate) fn structured(
        address: SocketAddr,
        config: &Arc<ClientConfig>,
        export: &str,
    ) -> (Self, u32) {
        let mut wire = Self::connect(address, config);
        assert_eq!(
            wire.ask(OptionCode::STRUCTURED_REPLY, &[]).0,
            ReplyCode::ACK
        );
        let contexts = wire.set_meta_context(export, &["base:allocation"]).unwrap();
        let id = contexts[0].id;
        wire.go(export).unwrap();
        (wire, id)
    }

    /// Closes the socket without a word.
    pub(crate) fn cut(self) {
        let _ = self.stream.sock.shutdown(Shutdown::Both);
    }
}

impl<S: Read + Write> Wire<S> {
    pub(crate) fn say(&mut self, bytes: &[u8]) {
        self.try_say(bytes).unwrap();
    }

    pub(crate) fn try_say(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)?;
        self.stream.flush()
    }

    pub(crate) fn hear(&mut self, length: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// Hears the end of the connection, after nothing else.
    pub(crate) fn hears_the_end(&mut self) {
        match self.hear(1) {
            Ok(byte) => panic!("{byte:?} instead of the end"),
            Err(error) if is_end(&error) => {}
            Err(error) => panic!("{error} instead of the end"),
        }
    }

    // Options.

    pub(crate) fn option(&mut self, code: OptionCode, payload: &[u8]) {
        self.say(&OptionHeader::encode(code, payload));
    }

    /// One reply to an option.
    pub(crate) fn answer(&mut self, to: OptionCode) -> io::Result<(ReplyCode, Vec<u8>)> {
        let header = self.hear(OptionReplyHeader::LENGTH)?;
        let header = OptionReplyHeader::parse(&header).unwrap();
        assert_eq!(header.option, to);
        let payload = self.hear(header.length as usize)?;
        Ok((header.code, payload))
    }

    /// An option with one reply.
    pub(crate) fn ask(&mut self, code: OptionCode, payload: &[u8]) -> (ReplyCode, Vec<u8>) {
        self.option(code, payload);
        self.answer(code).unwrap()
    }

    /// An option's replies up to the final one: that must be ACK, else it is returned.
    pub(crate) fn replies(&mut self, to: OptionCode) -> Result<Vec<Vec<u8>>, ReplyCode> {
        let mut all = Vec::new();
        loop {
            match self.answer(to).unwrap() {
                (ReplyCode::ACK, payload) => {
                    assert!(payload.is_empty());
                    return Ok(all);
                }
                (code, _) if code.is_error() => {
                    assert!(all.is_empty(), "an error after {all:?}");
                    return Err(code);
                }
                (_, payload) => all.push(payload),
            }
        }
    }

    pub(crate) fn go(&mut self, export: &str) -> Result<Said, ReplyCode> {
        let all = [InfoType::NAME, InfoType::DESCRIPTION, InfoType::BLOCK_SIZE];
        self.go_or_info(OptionCode::GO, export, &all)
    }

    pub(crate) fn go_or_info(
        &mut self,
        code: OptionCode,
        export: &str,
        information: &[InfoType],
    ) -> Result<Said, ReplyCode> {
        self.option(code, &go_payload(export, information));
        let information = self
            .replies(code)?
            .iter()
            .map(|payload| Information::parse(payload).unwrap())
            .collect();
        Ok(Said { information })
    }

    pub(crate) fn set_meta_context(
        &mut self,
        export: &str,
        queries: &[&str],
    ) -> Result<Vec<MetaContextReply>, ReplyCode> {
        self.meta_context(OptionCode::SET_META_CONTEXT, export, queries)
    }

    pub(crate) fn meta_context(
        &mut self,
        code: OptionCode,
        export: &str,
        queries: &[&str],
    ) -> Result<Vec<MetaContextReply>, ReplyCode> {
        self.option(code, &meta_payload(export, queries));
        let replies = self.replies(code)?;
        Ok(replies
            .iter()
            .map(|payload| MetaContextReply::parse(payload).unwrap())
            .collect())
    }

    // Transmission.

    pub(crate) fn request(
        &mut self,
        command: Command,
        flags: CommandFlags,
        cookie: u64,
        offset: u64,
        length: u32,
    ) {
        self.say(&request(command, flags, cookie, offset, length));
    }

    /// A simple reply's header.
    pub(crate) fn status(&mut self) -> io::Result<(u64, Errno)> {
        let header = self.hear(16)?;
        match ReplyHeader::parse(&header).unwrap() {
            ReplyHeader::Simple { cookie, errno } => Ok((cookie.0, errno)),
            other => panic!("{other:?} instead of a simple reply"),
        }
    }

    /// A request without payload, in a session with simple replies.
    pub(crate) fn carry_out(
        &mut self,
        command: Command,
        flags: CommandFlags,
        offset: u64,
        length: u32,
    ) -> Errno {
        self.request(command, flags, 7, offset, length);
        let (cookie, errno) = self.status().unwrap();
        assert_eq!(cookie, 7);
        errno
    }

    pub(crate) fn write(&mut self, flags: CommandFlags, offset: u64, data: &[u8]) -> Errno {
        self.send_write(flags, 8, offset, data);
        let (cookie, errno) = self.status().unwrap();
        assert_eq!(cookie, 8);
        errno
    }

    pub(crate) fn send_write(
        &mut self,
        flags: CommandFlags,
        cookie: u64,
        offset: u64,
        data: &[u8],
    ) {
        let length = u32::try_from(data.len()).unwrap();
        let mut bytes = request(Command::WRITE, flags, cookie, offset, length).to_vec();
        bytes.extend_from_slice(data);
        self.say(&bytes);
    }

    /// READ in a session with simple replies.
    pub(crate) fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, Errno> {
        match self.carry_out(Command::READ, CommandFlags(0), offset, length) {
            Errno::OK => Ok(self.hear(length as usize).unwrap()),
            errno => Err(errno),
        }
    }

    pub(crate) fn flush(&mut self) -> Errno {
        self.carry_out(Command::FLUSH, CommandFlags(0), 0, 0)
    }

    /// One chunk: cookie, kind, whether it is the last, payload.
    pub(crate) fn chunk(&mut self) -> io::Result<(u64, ChunkType, bool, Vec<u8>)> {
        let header = self.hear(20)?;
        match ReplyHeader::parse(&header).unwrap() {
            ReplyHeader::Chunk {
                cookie,
                kind,
                done,
                length,
            } => Ok((cookie.0, kind, done, self.hear(length as usize)?)),
            other => panic!("{other:?} instead of a chunk"),
        }
    }

    /// A structured reply without content.
    pub(crate) fn structured_status(&mut self) -> (u64, Errno) {
        let (cookie, kind, done, payload) = self.chunk().unwrap();
        assert!(done, "C58: DONE on the only chunk");
        match Chunk::parse(kind, &payload).unwrap() {
            Chunk::None => (cookie, Errno::OK),
            Chunk::Error { errno, .. } => (cookie, errno),
            other => panic!("{other:?}"),
        }
    }

    /// READ in a session with structured replies; the chunks are in bounds and do not overlap (C58).
    pub(crate) fn read_chunks(
        &mut self,
        flags: CommandFlags,
        offset: u64,
        length: u32,
    ) -> Result<Content, Errno> {
        self.request(Command::READ, flags, 9, offset, length);
        let mut data = vec![None; length as usize];
        let mut chunks = Vec::new();
        loop {
            let (cookie, kind, done, payload) = self.chunk().unwrap();
            assert_eq!(cookie, 9);
            let (at, bytes) = match Chunk::parse(kind, &payload).unwrap() {
                Chunk::Data { offset, data } => (offset, data.to_vec()),
                Chunk::Hole { offset, length } => (offset, vec![0; length as usize]),
                Chunk::None => (offset, Vec::new()),
                Chunk::Error { errno, .. } => {
                    assert!(done);
                    return Err(errno);
                }
                other => panic!("{other:?}"),
            };
            chunks.push((kind, at, u32::try_from(bytes.len()).unwrap()));
            let start = usize::try_from(at - offset).unwrap();
            for (place, byte) in data[start..start + bytes.len()].iter_mut().zip(bytes) {
                assert_eq!(place.replace(byte), None, "chunks overlap");
            }
            if done {
                let data = data.into_iter().map(|byte| byte.expect("all of it"));
                return Ok(Content {
                    data: data.collect(),
                    chunks,
                });
            }
        }
    }

    /// BLOCK_STATUS with one context.
    pub(crate) fn block_status(
        &mut self,
        flags: CommandFlags,
        offset: u64,
        length: u32,
    ) -> Result<(u32, Vec<Extent>), Errno> {
        self.request(Command::BLOCK_STATUS, flags, 10, offset, length);
        let (cookie, kind, done, payload) = self.chunk().unwrap();
        assert!(cookie == 10 && done);
        match Chunk::parse(kind, &payload).unwrap() {
            Chunk::BlockStatus { context, extents } => Ok((context, extents)),
            Chunk::Error { errno, .. } => Err(errno),
            other => panic!("{other:?}"),
        }
    }
}

/// Whether a connection was closed, in whatever way.
pub(crate) fn is_end(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionAborted
    )
}

pub(crate) fn go_payload(export: &str, information: &[InfoType]) -> Vec<u8> {
    let export = ExportName::try_from(export).unwrap();
    let information = information.to_vec();
    GoRequest {
        export,
        information,
    }
    .encode()
}

pub(crate) fn meta_payload(export: &str, queries: &[&str]) -> Vec<u8> {
    let export = ExportName::try_from(export).unwrap();
    let queries = queries.iter().map(|query| (*query).to_owned()).collect();
    MetaContextQuery { export, queries }.encode()
}

pub(crate) fn request(
    command: Command,
    flags: CommandFlags,
    cookie: u64,
    offset: u64,
    length: u32,
) -> [u8; RawRequest::LENGTH] {
    RawRequest {
        flags,
        command,
        cookie: Cookie(cookie),
        offset,
        length,
    }
    .encode()
}
