//! Writes, on an export whose content may go: what was written is read back, and what was not is left alone.

use super::prelude::*;
use crate::nbd::MAX_PAYLOAD;

const WRITE: &str = "Request types, NBD_CMD_WRITE";
const ZEROES: &str = "Request types, NBD_CMD_WRITE_ZEROES";
const ERRORS: &str = "Error values";

/// Bytes of an ordinary write, at least: each has a page of its own, and one on each side.
const PAGE: u32 = 64 << 10;

/// C46, C53.
pub(super) const READ_BACK: Check = Check {
    id: "write-read-back",
    title: "What was written is read back, and what lies beside it is unchanged; FUA is accepted where it is offered",
    group: Group::Transmission,
    section: WRITE,
    severity: Severity::Data,
    why: "Data is lost.",
    needs: Needs::Write,
    rules: &[46, 53],
    question: read_back,
    ..Check::USUAL
};

/// C48.
pub(super) const BEYOND_REFUSED: Check = Check {
    id: "write-beyond-the-end-refused",
    title: "Writes beyond the export's end fail",
    group: Group::Transmission,
    section: ERRORS,
    severity: Severity::Data,
    why: "The client believes that data is stored which is not, or which overwrote something else.",
    needs: Needs::Write,
    rules: &[48],
    question: beyond_refused,
    ..Check::USUAL
};

/// C48, C63.
pub(super) const BEYOND_ENOSPC: Check = Check {
    id: "write-beyond-the-end-is-enospc",
    title: "Writes beyond the export's end get ENOSPC",
    group: Group::Transmission,
    section: ERRORS,
    severity: Severity::Style,
    why: "The client's error messages say something else than what is wrong.",
    needs: Needs::Write,
    rules: &[48, 63],
    question: beyond_enospc,
    ..Check::USUAL
};

/// C48, C52.
pub(super) const FAILURE_SURVIVED: Check = Check {
    id: "failed-write-survived",
    title: "The payload of a WRITE that fails is read, and the session goes on",
    group: Group::Transmission,
    section: "Terminating the transmission phase",
    severity: Severity::Interoperability,
    why: "One request that fails takes the connection with it: the payload is taken for requests, or for TLS.",
    needs: Needs::Write,
    rules: &[48, 52],
    question: failure_survived,
    ..Check::USUAL
};

/// C52.
pub(super) const FLAG_REFUSED: Check = Check {
    id: "write-with-unknown-flag-refused",
    title: "WRITE with an unknown flag gets EINVAL, its payload is read, and nothing is written",
    group: Group::Transmission,
    section: ERRORS,
    severity: Severity::Interoperability,
    why: "The payload is taken for requests, or the client believes that the flag was heeded.",
    needs: Needs::Write,
    rules: &[52],
    question: flag_refused,
    ..Check::USUAL
};

/// C50.
pub(super) const LARGE: Check = Check {
    id: "large-write-stored",
    title: "WRITE of 32 MiB, or of what the server says it takes, is stored",
    group: Group::Transmission,
    section: "Size constraints",
    severity: Severity::Interoperability,
    why: "Linux sends requests of up to 32 MiB, and an error is an I/O error of the device.",
    needs: Needs::Write,
    rules: &[50],
    question: large,
    ..Check::USUAL
};

/// C55.
pub(super) const ZEROED: Check = Check {
    id: "write-zeroes-reads-zero",
    title: "WRITE_ZEROES, with and without NO_HOLE, reads back as zeroes, and what lies beside it is unchanged",
    group: Group::Transmission,
    section: ZEROES,
    severity: Severity::Data,
    why: "File systems rely on it: old data shows up where there should be none.",
    needs: Needs::Write,
    rules: &[55],
    question: zeroed,
    ..Check::USUAL
};

/// C55.
pub(super) const FAST_ZERO: Check = Check {
    id: "fast-zero-all-or-nothing",
    title: "WRITE_ZEROES with FAST_ZERO writes zeroes, or gets ENOTSUP and changes nothing",
    group: Group::Transmission,
    section: ZEROES,
    severity: Severity::Data,
    why: "The client falls back on ENOTSUP, and otherwise takes the content for zeroes.",
    needs: Needs::Write,
    rules: &[55],
    question: fast_zero,
    ..Check::USUAL
};

/// C56.
pub(super) const TRIMMED: Check = Check {
    id: "trim-keeps-the-rest",
    title: "TRIM succeeds where it is offered, and changes nothing beside what it trims",
    group: Group::Transmission,
    section: "Request types, NBD_CMD_TRIM",
    severity: Severity::Data,
    why: "Data that is in use is thrown away.",
    needs: Needs::Write,
    rules: &[56],
    question: trimmed,
    ..Check::USUAL
};

/// C53.
pub(super) const SHARED_FLUSH: Check = Check {
    id: "multi-conn-coherent",
    title: "Where CAN_MULTI_CONN is offered, what one connection wrote and flushed, another reads",
    group: Group::Transmission,
    section: "Transmission flags, NBD_FLAG_CAN_MULTI_CONN",
    severity: Severity::Data,
    why: "Linux spreads a device over several connections: it would read stale data.",
    needs: Needs::Write,
    rules: &[53],
    question: shared_flush,
    ..Check::USUAL
};

/// Bytes that no other write of the battery has.
fn pattern(seed: u8, length: u32) -> Vec<u8> {
    (0..length)
        .map(|index| (index.wrapping_mul(0x9e37_79b1) >> 24) as u8 ^ seed | 1)
        .collect()
}

/// Bytes of one write: whole blocks, whatever the minimum.
fn page(session: &Transmission) -> u32 {
    let minimum = session.info.block_sizes.map_or(1, |sizes| sizes.minimum);
    PAGE.max(minimum)
}

fn succeeds(reply: &Reply, what: &str) -> Result<(), Stop> {
    require(reply.errno() == Errno::OK, || {
        format!("{what} got {}", reply.errno())
    })
}

fn holds(session: &mut Transmission, offset: u64, wanted: &[u8], what: &str) -> Result<(), Stop> {
    let length = u32::try_from(wanted.len()).unwrap_or(0);
    let found = content(session, offset, length)?;
    let differs = found.iter().zip(wanted).position(|(is, was)| is != was);
    match differs {
        None => Ok(()),
        Some(at) => Err(Stop::Finding(format!(
            "{what}: byte {at} of {length} at {offset} is {:#04x}, not {:#04x}",
            found[at], wanted[at]
        ))),
    }
}

/// Three pages, filled: the outer two must stay as they are.
struct Pages {
    session: Transmission,
    page: u32,
    filled: Vec<u8>,
}

impl Pages {
    fn filled(subject: &Subject<'_>, seed: u8) -> Result<Self, Stop> {
        let mut session = subject.writing(3 * u64::from(PAGE))?;
        let page = page(&session);
        let filled = pattern(seed, 3 * page);
        let reply = session.write(0, &filled).map_err(broke)?;
        succeeds(&reply, "WRITE")?;
        Ok(Self {
            session,
            page,
            filled,
        })
    }

    fn offers(&self, flag: TransmissionFlags, what: &str) -> Result<(), Stop> {
        if self.session.info.flags.contains(flag) {
            return Ok(());
        }
        Err(Stop::Inapplicable(format!(
            "the server does not offer {what}"
        )))
    }

    /// A request for the page in the middle.
    fn middle(&mut self, command: Command, flags: CommandFlags) -> Result<Errno, Stop> {
        let reply = self
            .session
            .request(command, flags, u64::from(self.page), self.page)
            .map_err(broke)?;
        Ok(reply.errno())
    }

    fn require_middle(&mut self, wanted: &[u8], what: &str) -> Result<(), Stop> {
        holds(&mut self.session, u64::from(self.page), wanted, what)
    }

    fn require_outer(&mut self, what: &str) -> Result<(), Stop> {
        let page = self.page as usize;
        let (first, last) = (
            self.filled[..page].to_vec(),
            self.filled[2 * page..].to_vec(),
        );
        holds(&mut self.session, 0, &first, what)?;
        holds(&mut self.session, 2 * page as u64, &last, what)
    }
}

fn read_back(subject: &Subject<'_>) -> Result<String, Stop> {
    let mut pages = Pages::filled(subject, 0x11)?;
    let filled = pages.filled.clone();
    holds(&mut pages.session, 0, &filled, "after WRITE")?;
    let flags = pages.session.info.flags;
    let fua = flags.contains(TransmissionFlags::SEND_FUA);
    let middle = pattern(0x22, pages.page);
    let reply = pages
        .session
        .write_with(
            if fua {
                CommandFlags::FUA
            } else {
                CommandFlags(0)
            },
            u64::from(pages.page),
            &middle,
        )
        .map_err(broke)?;
    succeeds(&reply, if fua { "WRITE with FUA" } else { "WRITE" })?;
    pages.require_middle(&middle, "after WRITE")?;
    pages.require_outer("beside WRITE")?;
    pages.session.disconnect();
    Ok(format!("{} bytes, and a part of them again", filled.len()))
}

/// What writes beyond the end came to; the last one may have been the end of the session.
struct Beyond {
    seen: Vec<(&'static str, u64, Errno)>,
    broke: Option<Failure>,
}

fn beyond(subject: &Subject<'_>) -> Result<Beyond, Stop> {
    let mut session = subject.writing(3 * u64::from(PAGE))?;
    let page = page(&session);
    let data = pattern(0x33, page);
    let end = session
        .info
        .size
        .checked_next_multiple_of(u64::from(page))
        .unwrap_or(1 << 63);
    let zeroes = session
        .info
        .flags
        .contains(TransmissionFlags::SEND_WRITE_ZEROES);
    let mut beyond = Beyond {
        seen: Vec::new(),
        broke: None,
    };
    for offset in [end, end.max(1 << 62), u64::MAX - u64::from(page) + 1] {
        let result = session.write(offset, &data).and_then(|reply| {
            beyond.seen.push(("WRITE", offset, reply.errno()));
            if zeroes {
                let flags = CommandFlags(0);
                let reply = session.request(Command::WRITE_ZEROES, flags, offset, page)?;
                beyond.seen.push(("WRITE_ZEROES", offset, reply.errno()));
            }
            session.read(0, page)
        });
        if let Err(failure) = result {
            beyond.broke = Some(failure);
            return Ok(beyond);
        }
    }
    session.disconnect();
    Ok(beyond)
}

fn beyond_refused(subject: &Subject<'_>) -> Result<String, Stop> {
    let Beyond { seen, .. } = beyond(subject)?;
    for (command, offset, errno) in &seen {
        require(*errno != Errno::OK, || {
            format!("{command} at {offset}, beyond the end, succeeded")
        })?;
    }
    Ok(format!("{} requests failed", seen.len()))
}

fn beyond_enospc(subject: &Subject<'_>) -> Result<String, Stop> {
    for (command, offset, errno) in beyond(subject)?.seen {
        require(matches!(errno, Errno::ENOSPC | Errno::OK), || {
            format!("{command} at {offset}, beyond the end, got {errno}")
        })?;
    }
    Ok("ENOSPC".into())
}

fn failure_survived(subject: &Subject<'_>) -> Result<String, Stop> {
    let Beyond { seen, broke } = beyond(subject)?;
    match broke {
        None => Ok(format!("the session went on after {} requests", seen.len())),
        Some(failure) => Err(Stop::Finding(format!(
            "after {} requests beyond the end: {failure}",
            seen.len()
        ))),
    }
}

fn flag_refused(subject: &Subject<'_>) -> Result<String, Stop> {
    let mut pages = Pages::filled(subject, 0x44)?;
    let data = pattern(0x55, pages.page);
    let page = u64::from(pages.page);
    let reply = pages
        .session
        .write_with(CommandFlags(1 << 14), page, &data)
        .map_err(broke)?;
    require(reply.errno() == Errno::EINVAL, || {
        format!("WRITE with the flag 0x4000 got {}", reply.errno())
    })?;
    let filled = pages.filled.clone();
    holds(&mut pages.session, 0, &filled, "after WRITE was refused")?;
    pages.session.disconnect();
    Ok("EINVAL, and nothing was written".into())
}

fn large(subject: &Subject<'_>) -> Result<String, Stop> {
    let mut session = subject.writing(3 * u64::from(PAGE))?;
    let limit = session
        .info
        .block_sizes
        .map_or(MAX_PAYLOAD, |sizes| sizes.maximum_payload.min(MAX_PAYLOAD));
    let page = u64::from(page(&session));
    let length = u64::from(limit).min(session.info.size) / page * page;
    let data = pattern(0x66, u32::try_from(length).unwrap_or(0));
    let reply = session.write(0, &data).map_err(broke_or_slow)?;
    succeeds(&reply, &format!("WRITE of {length} bytes"))?;
    for offset in [0, length - page] {
        let start = usize::try_from(offset).unwrap_or(0);
        let part = &data[start..start + usize::try_from(page).unwrap_or(0)];
        holds(&mut session, offset, part, "after WRITE")?;
    }
    session.disconnect();
    Ok(format!("{length} bytes"))
}

fn zeroed(subject: &Subject<'_>) -> Result<String, Stop> {
    for flags in [CommandFlags(0), CommandFlags::NO_HOLE] {
        let mut pages = Pages::filled(subject, 0x77)?;
        pages.offers(TransmissionFlags::SEND_WRITE_ZEROES, "WRITE_ZEROES")?;
        let errno = pages.middle(Command::WRITE_ZEROES, flags)?;
        require(errno == Errno::OK, || {
            format!("WRITE_ZEROES with {flags:?} got {errno}")
        })?;
        let zeroes = vec![0; pages.page as usize];
        pages.require_middle(&zeroes, "after WRITE_ZEROES")?;
        pages.require_outer("beside WRITE_ZEROES")?;
        pages.session.disconnect();
    }
    Ok("zeroes, with and without NO_HOLE".into())
}

fn fast_zero(subject: &Subject<'_>) -> Result<String, Stop> {
    let mut pages = Pages::filled(subject, 0x88)?;
    pages.offers(TransmissionFlags::SEND_FAST_ZERO, "FAST_ZERO")?;
    let errno = pages.middle(Command::WRITE_ZEROES, CommandFlags::FAST_ZERO)?;
    let page = pages.page as usize;
    let (wanted, seen) = match errno {
        Errno::OK => (vec![0; page], "zeroes"),
        Errno::ENOTSUP => (pages.filled[page..2 * page].to_vec(), "ENOTSUP"),
        errno => return Err(Stop::Finding(format!("FAST_ZERO got {errno}"))),
    };
    pages.require_middle(&wanted, "after FAST_ZERO")?;
    pages.require_outer("beside FAST_ZERO")?;
    pages.session.disconnect();
    Ok(seen.into())
}

fn trimmed(subject: &Subject<'_>) -> Result<String, Stop> {
    let mut pages = Pages::filled(subject, 0x99)?;
    pages.offers(TransmissionFlags::SEND_TRIM, "TRIM")?;
    let errno = pages.middle(Command::TRIM, CommandFlags(0))?;
    require(errno == Errno::OK, || format!("TRIM got {errno}"))?;
    pages.require_outer("beside TRIM")?;
    pages.session.disconnect();
    Ok("it succeeded".into())
}

fn shared_flush(subject: &Subject<'_>) -> Result<String, Stop> {
    let mut pages = Pages::filled(subject, 0xaa)?;
    pages.offers(TransmissionFlags::CAN_MULTI_CONN, "CAN_MULTI_CONN")?;
    if !subject.concurrent {
        return Err(Stop::Inapplicable(
            "the server has one session at a time".into(),
        ));
    }
    let mut other = subject.transmitting()?;
    // So that a cache of its own would hold the old content.
    content(&mut other, 0, pages.page)?;
    let data = pattern(0xbb, pages.page);
    let reply = pages.session.write(0, &data).map_err(broke)?;
    succeeds(&reply, "WRITE")?;
    let reply = pages
        .session
        .request(Command::FLUSH, CommandFlags(0), 0, 0)
        .map_err(broke)?;
    succeeds(&reply, "FLUSH")?;
    holds(
        &mut other,
        0,
        &data,
        "on another connection, after WRITE and FLUSH",
    )?;
    other.disconnect();
    pages.session.disconnect();
    Ok("another connection read what was written".into())
}
