//! Before TLS: the way through STARTTLS.

use super::wire::Wire;
use super::{ClientError, Reason, Step, Target};
use crate::nbd::client::{Fault, Handshake, Plain, PlainStep};

/// Connects, and goes to the point where TLS begins.
pub(super) fn upgraded(target: &Target) -> Result<(Wire, Handshake), ClientError> {
    let (mut wire, plain, answer) = greeted(target)?;
    wire.write_all(&answer)
        .map_err(target.failed(Step::StartTls))?;
    upgrade(wire, plain, target)
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
