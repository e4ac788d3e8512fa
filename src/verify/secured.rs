//! Inside TLS, before anything else was negotiated: what the kernel's session will be.

use super::check::{
    Check, Severity, Stop, Subject, broke, one_block, require, require_no_contexts,
    require_simple_read,
};
use crate::nbd::{OptionCode, ReplyCode};

/// C30, C31.
pub(super) const SECOND_STARTTLS_REFUSED: Check = Check {
    id: "second-starttls-refused",
    title: "STARTTLS inside TLS gets ERR_INVALID, and the session goes on",
    section: "FORCEDTLS mode",
    severity: Severity::Interoperability,
    why: "A server that begins TLS twice, or breaks off, handles its own TLS state carelessly.",
    question: second_starttls_refused,
};

/// C32, C42.
pub(super) const BLOCK_STATUS_REFUSED: Check = Check {
    id: "block-status-needs-negotiation",
    title: "BLOCK_STATUS without a context negotiated inside TLS gets EINVAL",
    section: "Request types, NBD_CMD_BLOCK_STATUS",
    severity: Severity::Data,
    why: "Contexts that the client never asked for come from somewhere else: another session, or an attacker.",
    question: block_status_refused,
};

/// C47, K1.
pub(super) const READ_SIMPLE: Check = Check {
    id: "read-stays-simple",
    title: "READ without structured replies is answered with a simple reply",
    section: "Simple reply message",
    severity: Severity::Data,
    why: "The kernel's nbd driver understands simple replies only, and fails the device at any other.",
    question: read_simple,
};

fn second_starttls_refused(subject: &Subject<'_>) -> Result<String, Stop> {
    let (mut probe, _) = subject.admitted()?;
    match probe.other(OptionCode::STARTTLS, &[]).map_err(broke)? {
        Ok(()) => return Err(Stop::Finding("STARTTLS inside TLS was accepted".into())),
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
