//! Inside TLS, before anything else was negotiated: what the kernel's session will be.

use super::prelude::*;

/// C30, C31.
pub(super) const SECOND_STARTTLS_REFUSED: Check = Check {
    id: "second-starttls-refused",
    title: "STARTTLS inside TLS gets ERR_INVALID, and the session goes on",
    group: Group::Secured,
    section: "FORCEDTLS mode",
    severity: Severity::Interoperability,
    why: "A server that begins TLS twice, or breaks off, handles its own TLS state carelessly.",
    rules: &[30, 31],
    attach: true,
    scope: Scope::Secured,
    question: second_starttls_refused,
    ..Check::USUAL
};

/// C32, C42.
pub(super) const BLOCK_STATUS_REFUSED: Check = Check {
    id: "block-status-needs-negotiation",
    title: "BLOCK_STATUS without a context negotiated inside TLS gets EINVAL",
    group: Group::Secured,
    section: "Request types, NBD_CMD_BLOCK_STATUS",
    severity: Severity::Data,
    why: "Contexts that the client never asked for come from somewhere else: another session, or an attacker.",
    rules: &[32, 42],
    attach: true,
    scope: Scope::Session,
    question: block_status_refused,
    ..Check::USUAL
};

/// C47, K1.
pub(super) const READ_SIMPLE: Check = Check {
    id: "read-stays-simple",
    title: "READ without structured replies is answered with a simple reply",
    group: Group::Secured,
    section: "Simple reply message",
    severity: Severity::Data,
    why: "The kernel's nbd driver understands simple replies only, and fails the device at any other.",
    rules: &[47],
    attach: true,
    scope: Scope::Session,
    question: read_simple,
    ..Check::USUAL
};

fn second_starttls_refused(subject: &Subject<'_>) -> Result<String, Stop> {
    let (mut probe, _) = subject.admitted()?;
    match probe
        .ask(OptionCode::STARTTLS, &[])
        .map_err(broke)?
        .accepted()
    {
        Ok(_) => return Err(Stop::Finding("STARTTLS inside TLS was accepted".into())),
        Err(refusal) => require(refusal.code == ReplyCode::ERR_INVALID, || {
            format!("STARTTLS inside TLS: {refusal}, not with ERR_INVALID")
        })?,
    }
    match probe.info(subject.export()).map_err(broke)? {
        Ok(_) => probe.abort(),
        Err(refusal) => {
            return Err(Stop::Finding(format!(
                "INFO after a second STARTTLS: {refusal}"
            )));
        }
    }
    Ok("ERR_INVALID, and INFO worked after it".into())
}

fn block_status_refused(subject: &Subject<'_>) -> Result<String, Stop> {
    let (probe, info) = subject.admitted()?;
    let length =
        one_block(&info).ok_or_else(|| Stop::Inapplicable("the export is empty".into()))?;
    let mut session = subject.go(probe)?;
    require_no_contexts(&mut session, length)?;
    session.disconnect();
    Ok("EINVAL".into())
}

fn read_simple(subject: &Subject<'_>) -> Result<String, Stop> {
    let (probe, info) = subject.admitted()?;
    let length =
        one_block(&info).ok_or_else(|| Stop::Inapplicable("the export is empty".into()))?;
    let mut session = subject.go(probe)?;
    require_simple_read(&mut session, length)?;
    session.disconnect();
    Ok(format!("{length} bytes in a simple reply"))
}
