//! Requests that must be refused, and those that must not: limits, flags, commands, and the end of the session.

use std::time::Duration;

use super::contexts::{select_allocation, structured};
use super::prelude::*;

const REQUEST: &str = "Request message";
const ERRORS: &str = "Error values";
const SIZES: &str = "Size constraints";

/// C48.
pub(super) const BEYOND_REFUSED: Check = Check {
    id: "beyond-the-end-refused",
    title: "READ and BLOCK_STATUS beyond the export's end fail, also where offset and length overflow, and the session goes on",
    group: Group::Transmission,
    section: ERRORS,
    severity: Severity::Data,
    why: "What is read there is somebody else's, or made up.",
    rules: &[48],
    question: beyond_refused,
    ..Check::USUAL
};

/// C48.
pub(super) const BEYOND_EINVAL: Check = Check {
    id: "beyond-the-end-is-einval",
    title: "READ beyond the export's end gets EINVAL",
    group: Group::Transmission,
    section: ERRORS,
    severity: Severity::Style,
    why: "The client's error messages say something else than what is wrong.",
    rules: &[48, 63],
    question: beyond_einval,
    ..Check::USUAL
};

/// C49.
pub(super) const UNALIGNED: Check = Check {
    id: "unaligned-read-refused",
    title: "READ that is not aligned to the minimum block size gets EINVAL, and the session goes on",
    group: Group::Transmission,
    section: SIZES,
    severity: Severity::Style,
    why: "A client that does not keep the block size may get other bytes than it asked for.",
    rules: &[49],
    question: unaligned,
    ..Check::USUAL
};

/// C45.
pub(super) const MAGIC_CHECKED: Check = Check {
    id: "request-magic-checked",
    title: "A request that does not begin with its magic is not carried out",
    group: Group::Transmission,
    section: REQUEST,
    severity: Severity::Data,
    why: "The two sides are out of step, and data would be taken for requests.",
    rules: &[45],
    question: magic_checked,
    ..Check::USUAL
};

/// C52.
pub(super) const UNKNOWN_COMMAND: Check = Check {
    id: "unknown-command-refused",
    title: "An unknown command gets EINVAL, and the session goes on",
    group: Group::Transmission,
    section: ERRORS,
    severity: Severity::Interoperability,
    why: "The device dies where one request would have failed.",
    rules: &[52],
    question: unknown_command,
    ..Check::USUAL
};

/// C52.
pub(super) const UNKNOWN_FLAG: Check = Check {
    id: "unknown-request-flag-refused",
    title: "READ with an unknown flag gets EINVAL, and the session goes on",
    group: Group::Transmission,
    section: ERRORS,
    severity: Severity::Interoperability,
    why: "The client believes that the server does what it asked for.",
    rules: &[52],
    question: unknown_flag,
    ..Check::USUAL
};

/// C53.
pub(super) const FLUSHES: Check = Check {
    id: "flush-succeeds",
    title: "FLUSH succeeds where SEND_FLUSH is offered",
    group: Group::Transmission,
    section: "Request types, NBD_CMD_FLUSH",
    severity: Severity::Data,
    why: "File systems cannot make anything durable.",
    rules: &[53],
    question: flushes,
    ..Check::USUAL
};

/// C53.
pub(super) const FUA_ACCEPTED: Check = Check {
    id: "fua-accepted-on-read",
    title: "READ with FUA succeeds where SEND_FUA is offered",
    group: Group::Transmission,
    section: "Command flags, NBD_CMD_FLAG_FUA",
    severity: Severity::Interoperability,
    why: "Clients may set it on every request, and reads fail.",
    rules: &[53],
    question: fua_accepted,
    ..Check::USUAL
};

/// C54.
pub(super) const READ_ONLY: Check = Check {
    id: "read-only-refuses-writes",
    title: "WRITE to an export that the server calls read-only fails",
    group: Group::Transmission,
    section: "Transmission flags, NBD_FLAG_READ_ONLY",
    severity: Severity::Data,
    why: "What must not change can be changed.",
    rules: &[54],
    question: read_only,
    ..Check::USUAL
};

/// C54, C63.
pub(super) const READ_ONLY_EPERM: Check = Check {
    id: "read-only-is-eperm",
    title: "WRITE to an export that the server calls read-only gets EPERM",
    group: Group::Transmission,
    section: ERRORS,
    severity: Severity::Style,
    why: "The client's error messages say something else than what is wrong.",
    rules: &[54, 63],
    question: read_only_eperm,
    ..Check::USUAL
};

/// C56.
pub(super) const CACHES: Check = Check {
    id: "cache-succeeds",
    title: "CACHE succeeds where SEND_CACHE is offered, and unknown flags of it are refused",
    group: Group::Transmission,
    section: "Request types, NBD_CMD_CACHE",
    severity: Severity::Interoperability,
    why: "The server offers what it cannot do.",
    rules: &[56],
    question: caches,
    ..Check::USUAL
};

/// C57.
pub(super) const DISC: Check = Check {
    id: "disc-ends-the-session",
    title: "DISC ends the connection, without a reply",
    group: Group::Transmission,
    section: "Terminating the transmission phase",
    severity: Severity::Interoperability,
    why: "Sessions pile up at the server, or the client waits for its end.",
    rules: &[57],
    question: disc,
    ..Check::USUAL
};

/// Offsets beyond the end, aligned, and a length.
fn beyond(info: &ExportInfo) -> Result<([u64; 3], u32), Stop> {
    let length = a_block(info)?;
    let block = u64::from(length);
    let last = u64::MAX - block + 1;
    let end = info.size.checked_next_multiple_of(block).unwrap_or(last);
    Ok(([end, end.max(1 << 62), last], length))
}

fn beyond_refused(subject: &Subject<'_>) -> Result<String, Stop> {
    let mut session = subject.transmitting()?;
    let (offsets, length) = beyond(&session.info)?;
    for offset in offsets {
        let reply = session.read(offset, length).map_err(broke)?;
        require(reply.errno() != Errno::OK, || {
            format!(
                "READ of {length} bytes at {offset} was answered with {}",
                shape(&reply)
            )
        })?;
    }
    require_read(&mut session, length)?;
    session.disconnect();
    let mut seen = "READ failed";
    if let Ok((mut session, _, _)) = structured(subject)
        && select_allocation(subject, &mut session).is_ok()
    {
        let mut session = subject.go(session)?;
        for offset in offsets {
            let reply = session.block_status(offset, length).map_err(broke)?;
            require(reply.errno() != Errno::OK, || {
                format!(
                    "BLOCK_STATUS at {offset} was answered with {}",
                    shape(&reply)
                )
            })?;
        }
        session.disconnect();
        seen = "READ and BLOCK_STATUS failed";
    }
    Ok(format!("{seen}, and the session went on"))
}

fn beyond_einval(subject: &Subject<'_>) -> Result<String, Stop> {
    let mut session = subject.transmitting()?;
    let (offsets, length) = beyond(&session.info)?;
    for offset in offsets {
        let errno = session.read(offset, length)?.errno();
        require(matches!(errno, Errno::EINVAL | Errno::OK), || {
            format!("READ at {offset} got {errno}")
        })?;
    }
    session.disconnect();
    Ok("EINVAL".into())
}

fn unaligned(subject: &Subject<'_>) -> Result<String, Stop> {
    let mut session = subject.transmitting()?;
    let length = a_block(&session.info)?;
    let minimum = session.info.block_sizes.map_or(1, |sizes| sizes.minimum);
    if minimum <= 1 {
        return Err(Stop::Inapplicable(
            "every byte can be addressed alone".into(),
        ));
    }
    for (offset, length) in [(1, minimum), (0, minimum - 1)] {
        let errno = session.read(offset, length).map_err(broke)?.errno();
        require(errno == Errno::EINVAL, || {
            format!("READ of {length} bytes at {offset} got {errno}, the minimum is {minimum}")
        })?;
    }
    require_read(&mut session, length)?;
    session.disconnect();
    Ok("EINVAL".into())
}

fn magic_checked(subject: &Subject<'_>) -> Result<String, Stop> {
    let mut session = subject.transmitting()?;
    let length = a_block(&session.info)?;
    let request = session.next(Command::READ, CommandFlags(0), 0, length);
    let mut bytes = request.encode();
    bytes[0] ^= 0x40;
    let failed = Failure::at::<Reason>(Step::Command(Command::READ));
    let link = session.link();
    link.write_all(&bytes).map_err(&failed)?;
    if !link.stirs(Duration::from_secs(1)).unwrap_or(true) {
        return Ok("no answer".into());
    }
    match session.reply(&request) {
        Err(failure) if failure.is_end() => Ok("the connection ended".into()),
        Err(failure) => Err(broke(failure)),
        Ok(reply) if reply.errno() == Errno::OK => Err(Stop::Finding(format!(
            "a request with another magic was answered with {}",
            shape(&reply)
        ))),
        Ok(reply) => Ok(shape(&reply)),
    }
}

/// A request that must get EINVAL on a session that goes on.
fn invalid(
    subject: &Subject<'_>,
    command: Command,
    flags: CommandFlags,
    what: &str,
) -> Result<String, Stop> {
    let mut session = subject.transmitting()?;
    let length = a_block(&session.info)?;
    let errno = session
        .request(command, flags, 0, length)
        .map_err(broke)?
        .errno();
    require(errno == Errno::EINVAL, || {
        format!("{what} got {errno}, not EINVAL")
    })?;
    require_read(&mut session, length)?;
    session.disconnect();
    Ok("EINVAL, and the session went on".into())
}

fn unknown_command(subject: &Subject<'_>) -> Result<String, Stop> {
    invalid(
        subject,
        Command(0x7fff),
        CommandFlags(0),
        "the command 0x7fff",
    )
}

fn unknown_flag(subject: &Subject<'_>) -> Result<String, Stop> {
    let flag = CommandFlags(1 << 14);
    // A server that refuses it with a data-less reply, or answers with data: both are read to their end.
    invalid(subject, Command::READ, flag, "READ with the flag 0x4000")
}

fn flushes(subject: &Subject<'_>) -> Result<String, Stop> {
    let mut session = subject.transmitting()?;
    if !session.info.flags.contains(TransmissionFlags::SEND_FLUSH) {
        return Err(Stop::Inapplicable("the server does not offer FLUSH".into()));
    }
    let errno = session
        .request(Command::FLUSH, CommandFlags(0), 0, 0)
        .map_err(broke)?
        .errno();
    require(errno == Errno::OK, || format!("FLUSH got {errno}"))?;
    session.disconnect();
    Ok("it succeeded".into())
}

fn fua_accepted(subject: &Subject<'_>) -> Result<String, Stop> {
    let mut session = subject.transmitting()?;
    if !session.info.flags.contains(TransmissionFlags::SEND_FUA) {
        return Err(Stop::Inapplicable("the server does not offer FUA".into()));
    }
    let length = a_block(&session.info)?;
    let errno = session
        .request(Command::READ, CommandFlags::FUA, 0, length)
        .map_err(broke)?
        .errno();
    require(errno == Errno::OK, || format!("READ with FUA got {errno}"))?;
    session.disconnect();
    Ok("it succeeded".into())
}

/// Writes what is there already, so that even a server that does it does no harm.
fn write_read_only(subject: &Subject<'_>) -> Result<Errno, Stop> {
    let mut session = subject.transmitting()?;
    if !session.info.flags.contains(TransmissionFlags::READ_ONLY) {
        return Err(Stop::Inapplicable("the export is not read-only".into()));
    }
    let length = a_block(&session.info)?;
    let data = content(&mut session, 0, length)?;
    let errno = session.write(0, &data).map_err(broke)?.errno();
    require_read(&mut session, length)?;
    session.disconnect();
    Ok(errno)
}

fn read_only(subject: &Subject<'_>) -> Result<String, Stop> {
    let errno = write_read_only(subject)?;
    require(errno != Errno::OK, || {
        "WRITE to a read-only export succeeded".to_owned()
    })?;
    Ok(errno.to_string())
}

fn read_only_eperm(subject: &Subject<'_>) -> Result<String, Stop> {
    let errno = write_read_only(subject)?;
    require(matches!(errno, Errno::EPERM | Errno::OK), || {
        format!("WRITE to a read-only export got {errno}")
    })?;
    Ok("EPERM".into())
}

fn caches(subject: &Subject<'_>) -> Result<String, Stop> {
    let mut session = subject.transmitting()?;
    if !session.info.flags.contains(TransmissionFlags::SEND_CACHE) {
        return Err(Stop::Inapplicable("the server does not offer CACHE".into()));
    }
    let length = a_block(&session.info)?;
    for (flags, wanted) in [(CommandFlags(0), true), (CommandFlags(1 << 14), false)] {
        let errno = session
            .request(Command::CACHE, flags, 0, length)
            .map_err(broke)?
            .errno();
        require((errno == Errno::OK) == wanted, || {
            format!("CACHE with the flags {:#06x} got {errno}", flags.0)
        })?;
    }
    session.disconnect();
    Ok("it succeeded, and an unknown flag was refused".into())
}

fn disc(subject: &Subject<'_>) -> Result<String, Stop> {
    let mut session = subject.transmitting()?;
    let request = session.next(Command::DISC, CommandFlags(0), 0, 0);
    session.send(&request, &[]).map_err(broke)?;
    let ends = session
        .link()
        .ends()
        .map_err(Failure::at(Step::Command(Command::DISC)))?;
    require(ends, || "DISC was answered".to_owned())?;
    Ok("the connection ended".into())
}
