//! A connection in TLS 1.3, after its handshake, whose records are opened and sealed where they lie.
//!
//! Nothing is opened before what was opened last has been taken: a session that stops reading holds no more than one
//! record of plaintext.

use std::os::fd::{AsFd, BorrowedFd};

use rustls::{AlertDescription, ContentType, Error, InvalidMessage, PeerMisbehaved};

use super::buffer::Buffer;
use super::staged::Staged;
use super::wire::{Filled, Wire};
use super::{ChannelError, OUTGOING, Progress, Received, Sink};
use crate::tls::records::{self, CONTENT, HEAD, Records};

/// A KeyUpdate that asks for none in return (RFC 8446, 4.6.3), and one that does.
const KEY_UPDATE: [u8; 5] = [24, 0, 0, 1, 0];
const KEY_UPDATE_REQUESTED: [u8; 5] = [24, 0, 0, 1, 1];

const FATAL: u8 = 2;
const WARNING: u8 = 1;

/// How often the socket is read before the session looks at what else there is to do.
const READS: usize = 16;

pub(in crate::server) struct RecordChannel {
    wire: Wire,
    tls: Records,
    /// Plaintext that was not taken when rustls handed the connection over.
    rest: Buffer,
    /// Bytes at the beginning of what was received that are plaintext and not taken, and those behind them that end
    /// their record.
    plain: usize,
    tail: usize,
    /// The peer said that it will send nothing more.
    closed: bool,
    update: Update,
    /// What the peer is told before the connection ends.
    alert: Option<AlertDescription>,
}

/// Where the next change of our keys stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Update {
    Never,
    Wanted,
    /// The KeyUpdate is staged. From its sealing on, the new keys are used.
    Staged,
}

impl RecordChannel {
    pub(super) fn new(mut wire: Wire, tls: Records, rest: Buffer, closed: bool) -> Self {
        // rustls may have stopped at a record that is whole.
        wire.searched = wire.incoming.is_empty();
        Self {
            wire,
            tls,
            rest,
            plain: 0,
            tail: 0,
            closed,
            update: Update::Never,
            alert: None,
        }
    }

    #[cfg(test)]
    pub(super) fn tls(&mut self) -> &mut Records {
        &mut self.tls
    }

    pub(super) fn wire(&mut self) -> &mut Wire {
        &mut self.wire
    }

    /// Gives back the memory that is not in use.
    pub(super) fn shrink(&mut self) {
        self.wire.incoming.shrink();
        self.rest.shrink();
    }

    /// Looks for plaintext, first in what is here already, and hands it to `sink`.
    pub(super) fn receive<S: Sink>(&mut self, sink: &mut S) -> Result<Received, S::Error> {
        let (mut drained, mut reads) = (false, 0);
        loop {
            if !sink.wants() {
                return Ok(Received::Enough);
            }
            if !self.rest.is_empty() {
                let taken = sink.take(self.rest.filled())?;
                self.rest.consume(taken);
            } else if self.plain > 0 {
                let taken = sink.take(&self.wire.incoming.filled()[..self.plain])?;
                self.consume(taken);
            } else if self.closed {
                return Ok(Received::End);
            } else if !self.wire.searched {
                self.open()?;
            } else if drained {
                return Ok(Received::Nothing);
            } else if reads == READS {
                return Ok(Received::Enough);
            } else {
                reads += 1;
                match self.wire.fill().map_err(ChannelError::Io)? {
                    Filled::Some { drained: all } => {
                        drained = all;
                        sink.arrived();
                    }
                    Filled::Nothing => return Ok(Received::Nothing),
                    Filled::End => return Ok(Received::End),
                    // A record fits, or its length was refused.
                    Filled::Full => return Err(ChannelError::Endless.into()),
                }
            }
        }
    }

    /// Whether [`RecordChannel::receive`] has something to say without the socket.
    pub(super) fn has_buffered(&self) -> bool {
        !self.wire.searched || self.closed || self.plain > 0 || !self.rest.is_empty()
    }

    /// Opens the next record, if it is there.
    fn open(&mut self) -> Result<(), ChannelError> {
        self.next_record().map_err(|error| {
            self.alert = alert(&error);
            ChannelError::Tls(error)
        })
    }

    fn next_record(&mut self) -> Result<(), Error> {
        let received = self.wire.incoming.filled_mut();
        let length = records::length(received)?;
        let Some(record) = length.and_then(|length| received.get_mut(..length)) else {
            self.wire.searched = true;
            return Ok(());
        };
        let length = record.len();
        let (kind, content) = self.tls.open(record)?;
        let content = &record[HEAD..HEAD + content];
        match kind {
            ContentType::ApplicationData => {
                self.plain = content.len();
                self.tail = length - HEAD - content.len();
                self.wire.incoming.consume(HEAD);
                self.consume(0);
                return Ok(());
            }
            ContentType::Alert => self.closed |= is_end(content)?,
            ContentType::Handshake => {
                if content == KEY_UPDATE_REQUESTED {
                    self.update = match self.update {
                        Update::Never => Update::Wanted,
                        other => other,
                    };
                } else if content != KEY_UPDATE {
                    return Err(unexpected(ContentType::Handshake));
                }
                self.tls.change_opener()?;
            }
            other => return Err(unexpected(other)),
        }
        self.wire.incoming.consume(length);
        Ok(())
    }

    /// Lets go of plaintext, and of its record with the last of it.
    fn consume(&mut self, taken: usize) {
        self.plain -= taken;
        self.wire.incoming.consume(taken);
        if self.plain == 0 {
            self.wire.incoming.consume(std::mem::take(&mut self.tail));
        }
    }

    /// Seals and sends what is staged, as much as it can without waiting.
    pub(super) fn transmit(&mut self, staged: &mut Staged) -> Result<Progress, ChannelError> {
        if self.update == Update::Never && self.tls.are_worn() {
            self.update = Update::Wanted;
        }
        // A peer that asks for KeyUpdates and takes none gets no second one.
        if self.update == Update::Wanted && staged.sealed().is_empty() {
            staged.control(ContentType::Handshake, &KEY_UPDATE);
            self.update = Update::Staged;
        }
        let mut progress = Progress::default();
        loop {
            if staged.sealed().is_empty() {
                self.seal(staged).map_err(ChannelError::Tls)?;
            }
            if staged.sealed().is_empty() {
                return Ok(progress);
            }
            match self.wire.write(staged.sealed())? {
                0 => {
                    progress.blocked = true;
                    return Ok(progress);
                }
                written => staged.sent(written),
            }
            progress.sent = true;
        }
    }

    /// Seals as much as is sent at a time.
    fn seal(&mut self, staged: &mut Staged) -> Result<(), Error> {
        // A short end is not left for a packet of its own.
        while staged.sealed().len() < OUTGOING || staged.left() < CONTENT {
            let Some((content, record)) = staged.unsealed() else {
                break;
            };
            self.tls.seal(content, record)?;
            staged.seal();
            if content == ContentType::Handshake {
                self.tls.change_sealer()?;
                self.update = Update::Never;
            }
        }
        Ok(())
    }

    /// Tells the peer what it did wrong, if it did.
    pub(super) fn give_up(&mut self, staged: &mut Staged) {
        if self.alert.is_some() {
            self.close(staged);
        }
    }

    /// Ends the connection, with an alert where the peer is to blame, or else with close_notify.
    pub(super) fn close(&mut self, staged: &mut Staged) {
        let last = match self.alert.take() {
            Some(alert) => [FATAL, alert.into()],
            None => [WARNING, AlertDescription::CloseNotify.into()],
        };
        staged.control(ContentType::Alert, &last);
        // Nothing goes behind it (RFC 8446, 6.1), also no KeyUpdate that was asked for.
        self.update = Update::Staged;
        // A peer that cannot be told sees the connection end.
        let _ = self.transmit(staged);
        self.wire.hang_up();
    }
}

impl AsFd for RecordChannel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wire.as_fd()
    }
}

/// Whether an alert says that the peer will send nothing more. All but two mean that it gave up (RFC 8446, 6.1).
fn is_end(alert: &[u8]) -> Result<bool, Error> {
    let &[_, description] = alert else {
        return Err(InvalidMessage::MessageTooShort.into());
    };
    match AlertDescription::from(description) {
        AlertDescription::CloseNotify => Ok(true),
        AlertDescription::UserCanceled => Ok(false),
        other => Err(Error::AlertReceived(other)),
    }
}

fn unexpected(got_type: ContentType) -> Error {
    Error::InappropriateMessage {
        expect_types: vec![ContentType::ApplicationData],
        got_type,
    }
}

/// What the peer is told of an error, if it is the one who made it (RFC 8446, 6.2).
fn alert(error: &Error) -> Option<AlertDescription> {
    Some(match error {
        Error::DecryptError => AlertDescription::BadRecordMac,
        Error::PeerSentOversizedRecord => AlertDescription::RecordOverflow,
        Error::InappropriateMessage { .. } => AlertDescription::UnexpectedMessage,
        Error::InvalidMessage(_) => AlertDescription::DecodeError,
        Error::PeerMisbehaved(
            PeerMisbehaved::IllegalTlsInnerPlaintext
            | PeerMisbehaved::IllegalMiddleboxChangeCipherSpec,
        ) => AlertDescription::UnexpectedMessage,
        Error::AlertReceived(_) => return None,
        _ => AlertDescription::InternalError,
    })
}
