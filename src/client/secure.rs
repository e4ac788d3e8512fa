//! A TLS connection that takes exactly one record from the socket at a time.
//!
//! So rustls never holds the beginning of a record whose rest is still in the socket, and what it has not been
//! given can be read by the kernel with the sequence number that follows.

use std::net::TcpStream;

use rustls::{ClientConnection, ExtractedSecrets, ProtocolVersion};

use super::wire::{Wire, is_gone};
use super::{Reason, Target};

/// Bytes of a record's header: type, version, length.
const HEADER: usize = 5;

/// The most a record may hold; TLS 1.2 allows 2048 bytes beyond the 16 KiB, TLS 1.3 only 256.
const RECORD: usize = (16 << 10) + 2048;

/// The record types there are, change_cipher_spec to heartbeat. NBD's magics begin with none of them.
const TYPES: std::ops::RangeInclusive<u8> = 20..=24;

#[derive(Debug)]
pub(super) struct Secure {
    wire: Wire,
    tls: ClientConnection,
    /// Protected records taken since the handshake ended.
    records: u64,
    /// Whether the server has sent any data: before that, an end means that our certificate was not accepted.
    heard: bool,
}

impl Secure {
    /// Makes the handshake. In TLS 1.3 the server's verdict on our certificate comes only with the first read.
    pub(super) fn handshake(wire: Wire, target: &Target) -> Result<Self, Reason> {
        let tls = ClientConnection::new(target.tls.clone(), target.server_name.clone())
            .map_err(Reason::Tls)?;
        let mut secure = Self {
            wire,
            tls,
            records: 0,
            heard: false,
        };
        secure.flush()?;
        while secure.tls.is_handshaking() {
            secure.pull()?;
        }
        Ok(secure)
    }

    pub(super) fn read_exact(&mut self, bytes: &mut [u8]) -> Result<(), Reason> {
        self.fill(bytes).map_err(|reason| match reason {
            Reason::Closed if !self.heard => Reason::ClosedAfterHandshake,
            Reason::Io(error) if !self.heard && is_gone(&error) => Reason::ClosedAfterHandshake,
            reason => reason,
        })
    }

    pub(super) fn write_all(&mut self, mut bytes: &[u8]) -> Result<(), Reason> {
        while !bytes.is_empty() {
            let count = std::io::Write::write(&mut self.tls.writer(), bytes).map_err(Reason::Io)?;
            bytes = &bytes[count..];
            if let Err(reason) = self.flush() {
                return Err(self.last_words(reason));
            }
        }
        Ok(())
    }

    /// Says goodbye; a server that is gone already does not matter.
    pub(super) fn close(mut self) {
        self.tls.send_close_notify();
        let _ = self.flush();
    }

    /// Plaintext that rustls holds and nobody has read.
    pub(super) fn surplus(&mut self) -> Result<usize, Reason> {
        Ok(self
            .tls
            .process_new_packets()
            .map_err(Reason::Tls)?
            .plaintext_bytes_to_read())
    }

    /// The parts, for a session that stays in userspace.
    pub(super) fn into_parts(mut self) -> Result<(TcpStream, ClientConnection), Reason> {
        match self.surplus()? {
            0 => Ok((self.wire.release()?, self.tls)),
            surplus => Err(Reason::Surplus(surplus)),
        }
    }

    /// The parts, for a session that moves into the kernel (nbd.md 7.2).
    pub(super) fn into_secrets(self) -> Result<(TcpStream, ExtractedSecrets), Reason> {
        let version = self.tls.protocol_version();
        if version != Some(ProtocolVersion::TLSv1_3) {
            return Err(Reason::Version(version));
        }
        let records = self.records;
        let (socket, tls) = self.into_parts()?;
        let secrets = tls.dangerous_extract_secrets().map_err(Reason::Tls)?;
        // A KeyUpdate restarts the count, and its answer may still wait inside rustls for the next write.
        if secrets.rx.0 != records {
            return Err(Reason::KeysChanged);
        }
        Ok((socket, secrets))
    }

    pub(super) fn tls(&self) -> &ClientConnection {
        &self.tls
    }

    fn fill(&mut self, mut bytes: &mut [u8]) -> Result<(), Reason> {
        while !bytes.is_empty() {
            match std::io::Read::read(&mut self.tls.reader(), bytes) {
                Ok(0) => return Err(Reason::Closed),
                Ok(count) => {
                    self.heard = true;
                    bytes = &mut bytes[count..];
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => self.pull()?,
                Err(error) => return Err(Reason::Io(error)),
            }
        }
        Ok(())
    }

    /// Takes one record.
    fn pull(&mut self) -> Result<(), Reason> {
        let mut header = [0; HEADER];
        self.wire.read_exact(&mut header)?;
        let length = usize::from(u16::from_be_bytes([header[3], header[4]]));
        if !TYPES.contains(&header[0]) || length > RECORD {
            return Err(Reason::NotTls(header));
        }
        let mut record = header.to_vec();
        record.resize(HEADER + length, 0);
        self.wire.read_exact(&mut record[HEADER..])?;
        let protected = !self.tls.is_handshaking() && header[0] == 23;
        let mut rest = record.as_slice();
        while !rest.is_empty() {
            if self.tls.read_tls(&mut rest).map_err(Reason::Io)? == 0 {
                return Err(Reason::Closed);
            }
        }
        let processed = self.tls.process_new_packets();
        let flushed = self.flush();
        processed.map_err(Reason::Tls)?;
        self.records += u64::from(protected);
        flushed
    }

    fn flush(&mut self) -> Result<(), Reason> {
        let mut bytes = Vec::new();
        while self.tls.wants_write() {
            self.tls.write_tls(&mut bytes).map_err(Reason::Io)?;
        }
        self.wire.write_all(&bytes)
    }

    /// A server that closes while we write has often said why: an alert waits in the socket.
    fn last_words(&mut self, failure: Reason) -> Reason {
        match &failure {
            Reason::Io(error) if is_gone(error) => {}
            _ => return failure,
        }
        loop {
            match self.pull() {
                Ok(()) if self.surplus().is_ok_and(|surplus| surplus == 0) => {}
                Err(reason @ Reason::Tls(_)) => return reason,
                _ if self.heard => return failure,
                _ => return Reason::ClosedAfterHandshake,
            }
        }
    }
}
