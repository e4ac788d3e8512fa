//! What a server says of an export, by each of the three options that ask.

use super::options::{refusal, require_alive};
use super::prelude::*;
use crate::nbd::InfoType;
use crate::verify::session::USUAL;

const GO: &str = "Option types, NBD_OPT_INFO and NBD_OPT_GO";
const FLAGS: &str = "Transmission flags";
const SIZES: &str = "Size constraints";

/// C35, C39.
pub(super) const OPENS: Check = Check {
    id: "export-opens",
    title: "GO tells the export's size and flags, then says ACK, and transmission begins",
    group: Group::Secured,
    section: GO,
    severity: Severity::Interoperability,
    why: "No client can use the export.",
    rules: &[35, 39],
    scope: Scope::Gate,
    question: opens,
    ..Check::USUAL
};

/// C34.
pub(super) const UNKNOWN_EXPORT: Check = Check {
    id: "unknown-export-refused",
    title: "INFO and GO of an export that does not exist get ERR_UNKNOWN, and the session goes on",
    group: Group::Secured,
    section: GO,
    severity: Severity::Interoperability,
    why: "Clients cannot tell a wrong name from a server in trouble.",
    rules: &[34],
    question: unknown_export,
    ..Check::USUAL
};

/// C37.
pub(super) const GO_LIKE_INFO: Check = Check {
    id: "go-says-what-info-said",
    title: "GO right after an INFO with the same parameters says the same",
    group: Group::Secured,
    section: GO,
    severity: Severity::Data,
    why: "The client decides by what INFO says, and gets something else: another size, say.",
    rules: &[37],
    question: go_like_info,
    ..Check::USUAL
};

/// C36.
pub(super) const EXPORT_NAME: Check = Check {
    id: "export-name-answered",
    title: "EXPORT_NAME is answered with size, flags and, unless NO_ZEROES was agreed, 124 zeroes",
    group: Group::Secured,
    section: "Option types, NBD_OPT_EXPORT_NAME",
    severity: Severity::Interoperability,
    why: "Old clients know no other way to open an export, and take the surplus or the lack for data.",
    rules: &[36],
    question: export_name,
    ..Check::USUAL
};

/// C38.
pub(super) const UNKNOWN_INFORMATION: Check = Check {
    id: "unknown-information-ignored",
    title: "Requests for information that the server does not know are ignored",
    group: Group::Secured,
    section: GO,
    severity: Severity::Interoperability,
    why: "Newer clients cannot open the export.",
    rules: &[38],
    question: unknown_information,
    ..Check::USUAL
};

/// C38.
pub(super) const BLOCK_SIZES: Check = Check {
    id: "block-sizes-keep-the-rules",
    title: "The block sizes are powers of two in their order, and payloads of the preferred size are allowed",
    group: Group::Secured,
    section: SIZES,
    severity: Severity::Interoperability,
    why: "Clients refuse the export, or send requests that the server cannot serve.",
    rules: &[38],
    question: block_sizes,
    ..Check::USUAL
};

/// C38.
pub(super) const SIZE_IN_BLOCKS: Check = Check {
    id: "size-in-whole-blocks",
    title: "The export's size is a multiple of the minimum block size, and payloads of 1 MiB are allowed",
    group: Group::Secured,
    section: SIZES,
    severity: Severity::Style,
    why: "The last bytes cannot be reached, or requests are many and small.",
    rules: &[38],
    question: size_in_blocks,
    ..Check::USUAL
};

/// C44.
pub(super) const FLAGS_FIT: Check = Check {
    id: "transmission-flags-fit",
    title: "HAS_FLAGS is set, SEND_DF with structured replies only, SEND_FAST_ZERO with SEND_WRITE_ZEROES only",
    group: Group::Secured,
    section: FLAGS,
    severity: Severity::Interoperability,
    why: "Clients send what the server does not understand.",
    rules: &[44],
    question: flags_fit,
    ..Check::USUAL
};

fn opens(subject: &Subject<'_>) -> Result<String, Stop> {
    let mut session = subject.session()?;
    match session.told(OptionCode::GO, subject.export(), &USUAL)? {
        Ok(told) => {
            let size = told.info.size;
            session.transmit(told.info).disconnect();
            Ok(format!("{size} bytes"))
        }
        Err(refusal) if refusal.code == ReplyCode::ERR_BLOCK_SIZE_REQD => Err(Stop::Finding(
            "GO that asked for the block sizes got ERR_BLOCK_SIZE_REQD".into(),
        )),
        Err(refusal) => Err(Stop::NotRun(format!(
            "GO of export {:?}: {refusal}",
            subject.export()
        ))),
    }
}

fn unknown_export(subject: &Subject<'_>) -> Result<String, Stop> {
    let (mut session, _) = subject.admitted()?;
    for option in [OptionCode::INFO, OptionCode::GO] {
        let told = session
            .told(option, &subject.other_export(), &[])
            .map_err(broke)?;
        let code = match told {
            Ok(_) => {
                return Err(Stop::Inapplicable(
                    "the server has an export by every name that was tried".into(),
                ));
            }
            Err(refusal) => refusal.code,
        };
        // In plaintext, a server with TLS may hide what exists.
        let hidden = code == ReplyCode::ERR_TLS_REQD && !subject.is_secured();
        require(code == ReplyCode::ERR_UNKNOWN || hidden, || {
            format!("{option} of an export that does not exist got {code}")
        })?;
    }
    require_alive(subject, session, "an unknown export")?;
    Ok("ERR_UNKNOWN, and INFO worked after it".into())
}

fn go_like_info(subject: &Subject<'_>) -> Result<String, Stop> {
    let mut session = subject.session()?;
    let requests = [InfoType::NAME, InfoType::DESCRIPTION, InfoType::BLOCK_SIZE];
    let told = session.told(OptionCode::INFO, subject.export(), &requests)?;
    let Ok(mut info) = told else {
        return Err(Stop::Inapplicable("INFO was refused".into()));
    };
    let told = session
        .told(OptionCode::GO, subject.export(), &requests)
        .map_err(broke)?;
    let mut go =
        told.map_err(|refusal| Stop::Finding(format!("INFO said yes, and GO: {refusal}")))?;
    // In whatever order.
    info.kinds.sort_unstable();
    go.kinds.sort_unstable();
    require(info == go, || format!("INFO said {info:?}, and GO {go:?}"))?;
    let kinds = go.kinds.len();
    session.transmit(go.info).disconnect();
    Ok(format!("{kinds} pieces of information, the same"))
}

fn export_name(subject: &Subject<'_>) -> Result<String, Stop> {
    let (session, info) = subject.admitted()?;
    session.abort();
    for zeroes in [false, true] {
        let option = OptionCode::EXPORT_NAME;
        let mut session = if zeroes {
            subject.session_with_zeroes()?
        } else {
            subject.session()?
        };
        let zeroes = session.has_zeroes();
        session
            .send(option, subject.export().as_str().as_bytes())
            .map_err(broke)?;
        let mut answer = [0; 10];
        let failed = Failure::at::<Reason>(Step::Option(option));
        if let Err(reason) = session.link().read_exact(&mut answer) {
            let failure = failed(reason);
            // "MAY refuse to go into transmission phase with a client that uses NBD_OPT_EXPORT_NAME".
            let strict = info.block_sizes.is_some_and(|sizes| sizes.minimum > 1);
            if strict && failure.is_end() {
                return Err(Stop::Inapplicable(
                    "the connection ended, as it may where block sizes must be agreed upon".into(),
                ));
            }
            return Err(broke(failure));
        }
        let size = u64::from_be_bytes(std::array::from_fn(|index| answer[index]));
        require(size == info.size, || {
            format!("EXPORT_NAME says {size} bytes, INFO {}", info.size)
        })?;
        if zeroes {
            let mut padding = [0; 124];
            let read = session.link().read_exact(&mut padding);
            read.map_err(|reason| broke(failed(reason)))?;
            require(padding == [0; 124], || {
                "what follows size and flags is not 124 zeroes".to_owned()
            })?;
        }
        let mut transmission = session.transmit(info.clone());
        if let Some(length) = one_block(&info) {
            require_read(&mut transmission, length)?;
        }
        transmission.disconnect();
    }
    let mut session = subject.session()?;
    let other = subject.other_export();
    session
        .send(OptionCode::EXPORT_NAME, other.as_str().as_bytes())
        .map_err(broke)?;
    match session.ends(OptionCode::EXPORT_NAME) {
        Ok(true) => Ok("with and without zeroes; an unknown export ends the connection".into()),
        Ok(false) => Ok("with and without zeroes; the server has an export by every name".into()),
        Err(failure) => Err(broke(failure)),
    }
}

fn unknown_information(subject: &Subject<'_>) -> Result<String, Stop> {
    let (mut session, _) = subject.admitted()?;
    let requests = [InfoType(0x7ffe), InfoType::BLOCK_SIZE, InfoType(0x7fff)];
    let told = session
        .told(OptionCode::INFO, subject.export(), &requests)
        .map_err(broke)?;
    if let Err(refusal) = told {
        return Err(Stop::Finding(format!(
            "INFO with requests that nobody knows: {refusal}"
        )));
    }
    session.abort();
    Ok("they were ignored".into())
}

fn block_sizes(subject: &Subject<'_>) -> Result<String, Stop> {
    let (session, info) = subject.admitted()?;
    session.abort();
    let Some(sizes) = info.block_sizes else {
        return Err(Stop::Inapplicable("the server names no block sizes".into()));
    };
    let said = format!(
        "minimum {}, preferred {}, payloads up to {}",
        sizes.minimum, sizes.preferred, sizes.maximum_payload
    );
    let minimum = sizes.minimum.is_power_of_two() && sizes.minimum <= 1 << 16;
    let preferred = sizes.preferred.is_power_of_two() && sizes.preferred >= sizes.minimum.max(512);
    let payload = sizes.maximum_payload >= sizes.preferred;
    require(minimum && preferred && payload, || said.clone())?;
    Ok(said)
}

fn size_in_blocks(subject: &Subject<'_>) -> Result<String, Stop> {
    let (session, info) = subject.admitted()?;
    session.abort();
    let Some(sizes) = info.block_sizes else {
        return Err(Stop::Inapplicable("the server names no block sizes".into()));
    };
    let minimum = u64::from(sizes.minimum.max(1));
    require(info.size.is_multiple_of(minimum), || {
        format!("{} bytes, in blocks of {minimum}", info.size)
    })?;
    let payload = u64::from(sizes.maximum_payload);
    require(payload >= (1 << 20).min(info.size), || {
        format!("payloads of at most {payload} bytes")
    })?;
    Ok(format!("{} blocks of {minimum}", info.size / minimum))
}

fn flags_fit(subject: &Subject<'_>) -> Result<String, Stop> {
    let (mut session, simple) = subject.admitted()?;
    let structured = session.structured_reply().map_err(broke)?.is_ok();
    let with = subject.info(&mut session)?;
    session.abort();
    for flags in [simple.flags, with.flags] {
        require(flags.contains(TransmissionFlags::HAS_FLAGS), || {
            format!("{flags:?}, without HAS_FLAGS")
        })?;
        let fast = flags.contains(TransmissionFlags::SEND_FAST_ZERO);
        let zeroes = flags.contains(TransmissionFlags::SEND_WRITE_ZEROES);
        require(!fast || zeroes, || {
            format!("{flags:?}: FAST_ZERO without WRITE_ZEROES")
        })?;
    }
    require(!simple.flags.contains(TransmissionFlags::SEND_DF), || {
        format!("{:?} without structured replies", simple.flags)
    })?;
    Ok(if structured {
        format!(
            "{:?}, with structured replies {:?}",
            simple.flags, with.flags
        )
    } else {
        format!("{:?}", simple.flags)
    })
}

/// C33: what is refused by one option is not told by another.
pub(super) const ALIKE: Check = Check {
    id: "unknown-export-unknown-to-all",
    title: "An export that INFO does not know is known to no other option",
    group: Group::Secured,
    section: "Option types, NBD_OPT_LIST_META_CONTEXT",
    severity: Severity::Interoperability,
    why: "Whoever may not use an export could still find out that it exists.",
    rules: &[33],
    question: alike,
    ..Check::USUAL
};

fn alike(subject: &Subject<'_>) -> Result<String, Stop> {
    let (mut session, _) = subject.admitted()?;
    let other = subject.other_export();
    if session.info(&other).map_err(broke)?.is_ok() {
        return Err(Stop::Inapplicable(
            "the server has an export by every name that was tried".into(),
        ));
    }
    if session.structured_reply().map_err(broke)?.is_err() {
        return Err(Stop::Inapplicable(
            "the server has no structured replies".into(),
        ));
    }
    for option in [OptionCode::LIST_META_CONTEXT, OptionCode::SET_META_CONTEXT] {
        let payload = crate::verify::session::query(&other, &["base:allocation"]);
        let result = session.ask(option, &payload);
        if let Ok(answer) = &result {
            require(answer.replies.is_empty(), || {
                format!("{option} named contexts of an export that INFO does not know")
            })?;
        }
        refusal(result)?;
    }
    session.abort();
    Ok("neither LIST_META_CONTEXT nor SET_META_CONTEXT knew it".into())
}
