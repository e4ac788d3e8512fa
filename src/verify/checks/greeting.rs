//! The first words of each side.

use super::prelude::*;
use crate::verify::session::greeting;

const SECTION: &str = "Handshake phase, Newstyle negotiation";

/// C1.
pub(super) const NEWSTYLE: Check = Check {
    id: "greeting-newstyle",
    title: "The greeting is NBDMAGIC, IHAVEOPT and flags with FIXED_NEWSTYLE, and the server waits for the client's",
    group: Group::Greeting,
    section: SECTION,
    severity: Severity::Interoperability,
    why: "Without fixed newstyle there is no TLS, and no way to ask for anything but an export.",
    rules: &[1],
    scope: Scope::Always,
    question: newstyle,
    ..Check::USUAL
};

fn newstyle(subject: &Subject<'_>) -> Result<String, Stop> {
    let mut link = subject.link()?;
    let flags = greeting(&mut link)?;
    require(flags & 1 != 0, || {
        format!("the server's flags are {flags:#06x}, without FIXED_NEWSTYLE")
    })?;
    Ok(format!("newstyle, flags {flags:#06x}"))
}
