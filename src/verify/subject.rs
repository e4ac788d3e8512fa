//! The server as one check sees it: the ways to a session with it, and what sessions are commonly asked.

use std::time::{Duration, Instant};

use rustls_pki_types::ServerName;

use super::check::{Stop, broke, require};
use super::failure::{Cancel, Failure};
use super::link::Link;
use super::mode::Mode;
use super::server::{Identity, Server};
use super::session::Session;
use super::transmission::{OwnedChunk, Reply, Transmission};
use crate::nbd::{Errno, ExportInfo, ExportName, HandshakeFlags, MAX_STRING, TransmissionFlags};

/// The server, and how long the check has.
#[derive(Debug)]
pub(super) struct Subject<'a> {
    pub(super) server: &'a Server,
    pub(super) mode: Mode,
    /// Whether it greets a second client while a first one is connected.
    pub(super) concurrent: bool,
    cancel: &'a Cancel,
    deadline: Instant,
}

impl<'a> Subject<'a> {
    pub(super) fn new(
        server: &'a Server,
        mode: Mode,
        cancel: &'a Cancel,
        deadline: Instant,
    ) -> Self {
        Self {
            server,
            mode,
            concurrent: true,
            cancel,
            deadline,
        }
    }

    /// The same, with less time.
    pub(super) fn hurried(&self, time: Duration) -> Self {
        Self {
            deadline: self.deadline.min(Instant::now() + time),
            ..*self
        }
    }

    pub(super) fn export(&self) -> &'a ExportName {
        &self.server.export
    }

    /// A name that is most likely no export; if it is one, it is another than ours.
    pub(super) fn other_export(&self) -> ExportName {
        let name = self.server.export.as_str();
        let end = name.floor_char_boundary(MAX_STRING - 6);
        ExportName::try_from(format!("{}-other", &name[..end]).as_str()).unwrap_or_default()
    }

    /// What is left of the check's time.
    pub(super) fn left(&self) -> Duration {
        let left = self.deadline.saturating_duration_since(Instant::now());
        // Connecting within no time at all is an error of the call, not a deadline.
        left.max(Duration::from_millis(1))
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.cancel.is_cancelled()
    }

    /// A connection that has said nothing yet.
    pub(super) fn link(&self) -> Result<Link, Failure> {
        Link::connect(&self.server.address, self.left(), self.cancel)
    }

    /// A session in plaintext, at the options.
    pub(super) fn plaintext(&self) -> Result<Session, Failure> {
        let both = HandshakeFlags::FIXED_NEWSTYLE.with(HandshakeFlags::NO_ZEROES);
        Session::begin(self.link()?, both)
    }

    /// Our certificate and the server's name.
    pub(super) fn credentials(&self) -> Result<(&'a Identity, ServerName<'static>), Stop> {
        match (&self.server.identity, &self.server.server_name) {
            (Some(identity), Some(name)) => Ok((identity, name.clone())),
            _ => Err(Stop::NotRun(NO_CERTIFICATES.into())),
        }
    }

    /// Goes on inside TLS, with `behind` sent in one segment with STARTTLS.
    pub(super) fn upgrade(&self, session: Session, behind: &[u8]) -> Result<Session, Stop> {
        let (identity, name) = self.credentials()?;
        Ok(session.upgrade(identity.any.clone(), name, behind)?)
    }

    /// Whether sessions on the export are to be had inside TLS.
    pub(super) fn is_secured(&self) -> bool {
        match self.mode {
            Mode::Forced => true,
            Mode::Selective => self.server.identity.is_some() && self.server.server_name.is_some(),
            _ => false,
        }
    }

    /// A session at the options from which the export is to be had.
    pub(super) fn session(&self) -> Result<Session, Stop> {
        self.go_on(self.plaintext()?)
    }

    /// The same, without NO_ZEROES.
    pub(super) fn session_with_zeroes(&self) -> Result<Session, Stop> {
        self.go_on(Session::begin(
            self.link()?,
            HandshakeFlags::FIXED_NEWSTYLE,
        )?)
    }

    fn go_on(&self, session: Session) -> Result<Session, Stop> {
        if self.is_secured() {
            return self.upgrade(session, &[]);
        }
        Ok(session)
    }

    /// A session that is past all doubt of our own certificate: the server has told us about the export.
    pub(super) fn admitted(&self) -> Result<(Session, ExportInfo), Stop> {
        let mut session = self.session()?;
        let info = self.info(&mut session)?;
        Ok((session, info))
    }

    /// What the server says of the export.
    pub(super) fn info(&self, session: &mut Session) -> Result<ExportInfo, Stop> {
        session
            .info(self.export())?
            .map_err(|refusal| Stop::Inapplicable(format!("INFO about the export: {refusal}")))
    }

    /// Begins transmission on a session that was admitted.
    pub(super) fn go(&self, session: Session) -> Result<Transmission, Stop> {
        session.go(self.export()).map_err(broke)
    }

    /// A session in transmission, without structured replies.
    pub(super) fn transmitting(&self) -> Result<Transmission, Stop> {
        let (session, _) = self.admitted()?;
        self.go(session)
    }

    /// The same, with structured replies.
    pub(super) fn structured(&self) -> Result<Transmission, Stop> {
        let (mut session, _) = self.admitted()?;
        if let Err(refusal) = session.structured_reply().map_err(broke)? {
            return Err(Stop::Inapplicable(format!(
                "the server has no structured replies: {refusal}"
            )));
        }
        self.go(session)
    }

    /// A session that may write, on an export with room for `length` bytes.
    pub(super) fn writing(&self, length: u64) -> Result<Transmission, Stop> {
        let session = self.transmitting()?;
        let info = &session.info;
        if info.flags.contains(TransmissionFlags::READ_ONLY) {
            return Err(Stop::Inapplicable("the export is read-only".into()));
        }
        if info.size < length {
            return Err(Stop::Inapplicable(format!(
                "the export is smaller than {length} bytes"
            )));
        }
        Ok(session)
    }
}

/// Why what lies inside TLS was not looked at.
pub(super) const NO_CERTIFICATES: &str =
    "no certificates were given, so TLS was not tried: give some, or those of the authority";

/// The length of a request that every export of that kind must answer; `None` for an empty one.
pub(super) fn one_block(info: &ExportInfo) -> Option<u32> {
    let minimum = info.block_sizes.map_or(512, |sizes| sizes.minimum.max(512));
    let length = u64::from(minimum).min(info.size);
    u32::try_from(length).ok().filter(|length| *length > 0)
}

/// The same, where an empty export ends the check.
pub(super) fn a_block(info: &ExportInfo) -> Result<u32, Stop> {
    one_block(info).ok_or_else(|| Stop::Inapplicable("the export is empty".into()))
}

/// BLOCK_STATUS where no context is valid must be refused with EINVAL.
pub(super) fn require_no_contexts(session: &mut Transmission, length: u32) -> Result<(), Stop> {
    let reply = session.block_status(0, length).map_err(broke)?;
    let errno = reply.errno();
    require(errno == Errno::EINVAL, || match errno {
        Errno::OK => format!("BLOCK_STATUS was answered: {}", shape(&reply)),
        errno => format!("BLOCK_STATUS was refused with {errno}, not with EINVAL"),
    })
}

/// READ without structured replies must be answered with a simple reply, or the kernel driver gives up (K1).
pub(super) fn require_simple_read(session: &mut Transmission, length: u32) -> Result<(), Stop> {
    let reply = session.read(0, length).map_err(broke)?;
    require(
        matches!(
            reply,
            Reply::Simple {
                errno: Errno::OK,
                ..
            }
        ),
        || {
            format!(
                "READ of {length} bytes at 0 was answered with {}",
                shape(&reply)
            )
        },
    )
}

/// The content of a READ of `length` bytes at `offset`, in whatever form it came.
pub(super) fn content(
    session: &mut Transmission,
    offset: u64,
    length: u32,
) -> Result<Vec<u8>, Stop> {
    content_or(session, offset, length, broke)
}

/// The same, with what a session that fails comes to.
pub(super) fn content_or(
    session: &mut Transmission,
    offset: u64,
    length: u32,
    failed: fn(Failure) -> Stop,
) -> Result<Vec<u8>, Stop> {
    let reply = session.read(offset, length).map_err(failed)?;
    let unfit = || {
        Stop::Finding(format!(
            "READ of {length} bytes at {offset} was answered with {}",
            shape(&reply)
        ))
    };
    match &reply {
        Reply::Simple {
            errno: Errno::OK,
            data,
        } => Ok(data.clone()),
        Reply::Structured(chunks) if reply.errno() == Errno::OK => {
            let mut content = vec![0; length as usize];
            for chunk in chunks {
                let OwnedChunk::Data { offset: at, data } = chunk else {
                    continue;
                };
                let start = at.checked_sub(offset).ok_or_else(unfit)?;
                let start = usize::try_from(start).map_err(|_| unfit())?;
                let end = start.checked_add(data.len()).ok_or_else(unfit)?;
                let place = content.get_mut(start..end).ok_or_else(unfit)?;
                place.copy_from_slice(data);
            }
            Ok(content)
        }
        _ => Err(unfit()),
    }
}

/// A session that goes on: READ works.
pub(super) fn require_read(session: &mut Transmission, length: u32) -> Result<(), Stop> {
    content(session, 0, length).map(|_| ())
}

/// A reply in a few words.
pub(super) fn shape(reply: &Reply) -> String {
    match reply {
        Reply::Simple { errno, data } if *errno == Errno::OK => {
            format!("a simple reply of {} bytes", data.len())
        }
        Reply::Simple { errno, .. } => format!("the error {errno} in a simple reply"),
        Reply::Structured(chunks) if reply.errno() == Errno::OK => {
            format!("{} structured chunks", chunks.len())
        }
        Reply::Structured(_) => format!("the error {} in a structured reply", reply.errno()),
    }
}
