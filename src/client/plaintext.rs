//! Before TLS: the way through STARTTLS, and for verification all that an honest client never says.

use super::probe::ProbeSession;
use super::wire::Wire;
use super::{ClientError, Reason, Step, Target};
use crate::nbd::OptionCode;
use crate::nbd::client::{Fault, Handshake, Plain, PlainStep};
use crate::nbd::option::OptionHeader;
use crate::nbd::option_reply::OptionReplyHeader;

/// The longest reply in plaintext that is read: a refusal's sentence has 4096 bytes at most.
const REPLY: u32 = 16 << 10;

/// Bytes of our flags, which go before the first option.
const FLAGS: usize = 4;

/// Connects, and goes to the point where TLS begins.
pub(super) fn upgraded(target: &Target) -> Result<(Wire, Handshake), ClientError> {
    let (mut wire, plain, answer) = greeted(target)?;
    wire.write_all(&answer)
        .map_err(target.failed(Step::StartTls))?;
    upgrade(wire, plain, target)
}

/// A connection in plaintext that has sent its flags. Only verification has a use for it.
#[derive(Debug)]
pub struct PlaintextSession {
    target: Target,
    wire: Wire,
    plain: Plain,
    /// Not sent yet.
    starttls: Vec<u8>,
}

/// A reply to an option in plaintext, whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OptionReply {
    pub header: OptionReplyHeader,
    pub payload: Vec<u8>,
}

impl PlaintextSession {
    /// Connects, reads the greeting and answers with our flags.
    pub fn connect(target: &Target) -> Result<Self, ClientError> {
        let (mut wire, plain, mut flags) = greeted(target)?;
        let starttls = flags.split_off(FLAGS);
        wire.write_all(&flags)
            .map_err(target.failed(Step::Greeting))?;
        Ok(Self {
            target: target.clone(),
            wire,
            plain,
            starttls,
        })
    }

    /// Sends an option that ought to wait for TLS.
    pub fn send(&mut self, option: OptionCode, payload: &[u8]) -> Result<(), ClientError> {
        self.wire
            .write_all(&OptionHeader::encode(option, payload))
            .map_err(self.target.failed(Step::Plaintext(option)))
    }

    /// Reads one reply, to whatever option; `asked` only names the step in errors.
    pub fn reply(&mut self, asked: OptionCode) -> Result<OptionReply, ClientError> {
        self.read_reply()
            .map_err(self.target.failed(Step::Plaintext(asked)))
    }

    /// Whether the connection ends here, without another byte.
    pub fn ends(&mut self, asked: OptionCode) -> Result<bool, ClientError> {
        self.wire
            .ends()
            .map_err(self.target.failed(Step::Plaintext(asked)))
    }

    /// Sends STARTTLS with `injected` behind it in the same segment, and goes on as if nothing were there.
    pub fn upgrade(mut self, injected: &[u8]) -> Result<ProbeSession, ClientError> {
        self.starttls.extend_from_slice(injected);
        self.wire
            .write_all(&self.starttls)
            .map_err(self.target.failed(Step::StartTls))?;
        let (wire, handshake) = upgrade(self.wire, self.plain, &self.target)?;
        ProbeSession::begin(self.target, wire, handshake)
    }

    fn read_reply(&mut self) -> Result<OptionReply, Reason> {
        let mut header = [0; OptionReplyHeader::LENGTH];
        self.wire.read_exact(&mut header)?;
        let header = OptionReplyHeader::parse(&header)?;
        if header.length > REPLY {
            return Err(Reason::TooLong { limit: REPLY });
        }
        let mut payload = vec![0; header.length as usize];
        self.wire.read_exact(&mut payload)?;
        Ok(OptionReply { header, payload })
    }
}

/// Connects and reads the greeting; returns our answer to it too, the flags and STARTTLS.
fn greeted(target: &Target) -> Result<(Wire, Plain, Vec<u8>), ClientError> {
    let mut wire =
        Wire::connect(target.address, target.timeout).map_err(target.failed(Step::Connect))?;
    let failed = target.failed(Step::Greeting);
    match step(&mut wire, Plain::new()) {
        Ok(PlainStep::Send(plain, answer)) => Ok((wire, plain, answer)),
        Ok(_) => Err(failed(Fault::NotNbd.into())),
        Err(reason) => Err(failed(reason)),
    }
}

fn upgrade(
    mut wire: Wire,
    mut plain: Plain,
    target: &Target,
) -> Result<(Wire, Handshake), ClientError> {
    loop {
        match step(&mut wire, plain).map_err(target.failed(Step::StartTls))? {
            PlainStep::Continue(next) => plain = next,
            PlainStep::Send(next, bytes) => {
                wire.write_all(&bytes)
                    .map_err(target.failed(Step::StartTls))?;
                plain = next;
            }
            PlainStep::Upgrade(handshake) => return Ok((wire, handshake)),
        }
    }
}

fn step(wire: &mut Wire, plain: Plain) -> Result<PlainStep, Reason> {
    let mut bytes = vec![0; plain.wanted()];
    wire.read_exact(&mut bytes)?;
    Ok(plain.receive(&bytes)?)
}
