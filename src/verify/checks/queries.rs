//! Asking for meta contexts: what is listed, what is ignored, and what is malformed.

use super::contexts::{ALLOCATION, lacking, select_allocation, structured, void};
use super::options::{refusal, require_alive};
use super::prelude::*;
use crate::nbd::MAX_STRING;
use crate::nbd::codec::wire_length;
use crate::nbd::option_reply::MetaContextReply;

const LISTING: &str = "Option types, NBD_OPT_LIST_META_CONTEXT";
const SELECTING: &str = "Option types, NBD_OPT_SET_META_CONTEXT";
const QUERYING: &str = "Metadata querying";

/// A namespace that nobody has.
const UNKNOWN: &str = "x-hawser-nobody:leaf";

/// C41.
pub(super) const NEEDS_STRUCTURED: Check = Check {
    id: "selection-needs-structured-replies",
    title: "SET_META_CONTEXT before STRUCTURED_REPLY is refused",
    group: Group::Contexts,
    section: SELECTING,
    severity: Severity::Style,
    why: "A client that forgot to ask is promised contexts that simple replies cannot carry.",
    rules: &[41],
    question: needs_structured,
    ..Check::USUAL
};

/// C43.
pub(super) const LISTED_SELECTABLE: Check = Check {
    id: "listed-context-selectable",
    title: "What LIST_META_CONTEXT names for a query, SET_META_CONTEXT selects, and base:allocation is found in every way",
    group: Group::Contexts,
    section: LISTING,
    severity: Severity::Interoperability,
    why: "Clients that look first never find the context, or ask for one that is not there.",
    rules: &[43],
    question: listed_selectable,
    ..Check::USUAL
};

/// C43.
pub(super) const LISTED_IDS_ZERO: Check = Check {
    id: "listed-ids-zero",
    title: "The ids in replies to LIST_META_CONTEXT are 0",
    group: Group::Contexts,
    section: LISTING,
    severity: Severity::Style,
    why: "A client could take them for the ids of a selection.",
    rules: &[43],
    question: listed_ids_zero,
    ..Check::USUAL
};

/// C43.
pub(super) const UNKNOWN_IGNORED: Check = Check {
    id: "unknown-namespace-ignored",
    title: "Queries of an unknown namespace are ignored, and those beside them are answered",
    group: Group::Contexts,
    section: QUERYING,
    severity: Severity::Interoperability,
    why: "A client that asks for more than the server knows gets nothing at all.",
    rules: &[43],
    question: unknown_ignored,
    ..Check::USUAL
};

/// C43.
pub(super) const NO_COLON: Check = Check {
    id: "query-without-namespace-selects-nothing",
    title: "A query without a colon is refused, or selects nothing",
    group: Group::Contexts,
    section: QUERYING,
    severity: Severity::Interoperability,
    why: "The server makes up its own names for contexts.",
    rules: &[43],
    question: no_colon,
    ..Check::USUAL
};

/// C43.
pub(super) const LENGTHS_CHECKED: Check = Check {
    id: "query-lengths-checked",
    title: "A query that is longer than a string may be, or missing, is refused",
    group: Group::Contexts,
    section: LISTING,
    severity: Severity::Interoperability,
    why: "The server reads beyond what it was sent.",
    rules: &[43, 9],
    question: lengths_checked,
    ..Check::USUAL
};

/// C42.
pub(super) const REPLACED: Check = Check {
    id: "new-selection-replaces",
    title: "A selection that finds nothing replaces the one before it",
    group: Group::Contexts,
    section: SELECTING,
    severity: Severity::Data,
    why: "Client and server would disagree about which contexts are in force.",
    rules: &[42],
    question: replaced,
    ..Check::USUAL
};

fn needs_structured(subject: &Subject<'_>) -> Result<String, Stop> {
    let (mut session, _) = subject.admitted()?;
    match session
        .set_meta_context(subject.export(), &[ALLOCATION])
        .map_err(broke)?
    {
        Ok(contexts) => Err(Stop::Finding(format!(
            "it was accepted, with {} contexts",
            contexts.len()
        ))),
        Err(refusal) => {
            require_alive(subject, session, "SET_META_CONTEXT")?;
            Ok(refusal.code.to_string())
        }
    }
}

fn list(
    subject: &Subject<'_>,
    session: &mut Session,
    queries: &[&str],
) -> Result<Vec<MetaContextReply>, Stop> {
    session
        .list_meta_context(subject.export(), queries)
        .map_err(broke)?
        .map_err(|refusal| lacking("meta contexts", &refusal))
}

fn listed_selectable(subject: &Subject<'_>) -> Result<String, Stop> {
    let (mut session, _, _) = structured(subject)?;
    let all = list(subject, &mut session, &[])?;
    select_allocation(subject, &mut session)?;
    let has =
        |contexts: &[MetaContextReply]| contexts.iter().any(|context| context.name == ALLOCATION);
    // "base:" may stand for all of its contexts.
    let wildcard = all.iter().any(|context| context.name == "base:");
    require(has(&all) || wildcard, || {
        "base:allocation can be selected, and is not among all that are listed".to_owned()
    })?;
    for query in ["base:", ALLOCATION] {
        let listed = list(subject, &mut session, &[query])?;
        require(has(&listed), || {
            format!("base:allocation can be selected, and is not listed for {query:?}")
        })?;
        require(
            listed
                .iter()
                .all(|context| context.name.starts_with("base:")),
            || format!("{query:?} listed contexts of another namespace"),
        )?;
    }
    session.abort();
    Ok(format!("{} contexts are listed", all.len()))
}

fn listed_ids_zero(subject: &Subject<'_>) -> Result<String, Stop> {
    let (mut session, _, _) = structured(subject)?;
    let all = list(subject, &mut session, &[])?;
    session.abort();
    match all.iter().find(|context| context.id != 0) {
        None if all.is_empty() => Err(Stop::Inapplicable("no contexts are listed".into())),
        None => Ok("all are 0".into()),
        Some(context) => Err(Stop::Finding(format!(
            "{:?} is listed with the id {}",
            context.name, context.id
        ))),
    }
}

fn unknown_ignored(subject: &Subject<'_>) -> Result<String, Stop> {
    let (mut session, _, _) = structured(subject)?;
    select_allocation(subject, &mut session)?;
    for option in [OptionCode::LIST_META_CONTEXT, OptionCode::SET_META_CONTEXT] {
        for (queries, wanted) in [(&[UNKNOWN][..], 0), (&[UNKNOWN, ALLOCATION], 1)] {
            let payload = crate::verify::session::query(subject.export(), queries);
            let found = session.contexts(option, &payload).map_err(broke)?;
            let found = found
                .map_err(|refusal| Stop::Finding(format!("{option} of {queries:?}: {refusal}")))?;
            require(found.len() == wanted, || {
                format!("{option} of {queries:?} found {} contexts", found.len())
            })?;
        }
    }
    session.abort();
    Ok("they were ignored".into())
}

fn no_colon(subject: &Subject<'_>) -> Result<String, Stop> {
    let (mut session, _, _) = structured(subject)?;
    select_allocation(subject, &mut session)?;
    for query in ["base", "allocation", ""] {
        let selected = session
            .set_meta_context(subject.export(), &[query])
            .map_err(broke)?
            .unwrap_or_default();
        require(selected.is_empty(), || {
            format!("{query:?} selected {:?}", selected[0].name)
        })?;
    }
    session.abort();
    Ok("nothing was selected".into())
}

fn lengths_checked(subject: &Subject<'_>) -> Result<String, Stop> {
    let name = subject.export().as_str();
    let mut missing = Vec::new();
    missing.put_string(name);
    missing.put_u32(1000);
    missing.put_string(ALLOCATION);
    let mut long = Vec::new();
    long.put_string(name);
    long.put_u32(1);
    long.put_u32(wire_length(MAX_STRING + 1));
    long.extend_from_slice(b"base:");
    long.resize(long.len() + MAX_STRING - 4, b'x');
    let mut seen = Vec::new();
    for (what, payload) in [
        ("a list of 1000 queries that has one", missing),
        ("a query of 4097 bytes", long),
    ] {
        let (mut session, _, _) = structured(subject)?;
        select_allocation(subject, &mut session)?;
        let result = session.ask(OptionCode::SET_META_CONTEXT, &payload);
        let code = match &result {
            // A namespace that is known and a leaf that is not: to find nothing is right too.
            Ok(answer) if what.starts_with("a query") && answer.replies.is_empty() => None,
            _ => refusal(result)?,
        };
        require(code != Some(ReplyCode::ACK), || {
            format!("{what} was accepted")
        })?;
        seen.push(code.map_or_else(|| "nothing".to_owned(), |code| code.to_string()));
    }
    Ok(format!("they found {}", seen.join(" and ")))
}

fn replaced(subject: &Subject<'_>) -> Result<String, Stop> {
    let (mut session, _, length) = structured(subject)?;
    select_allocation(subject, &mut session)?;
    let selected = session
        .set_meta_context(subject.export(), &[UNKNOWN])
        .map_err(broke)?
        .unwrap_or_default();
    // What it selects is another check's question.
    if selected.is_empty() {
        void(subject, session, length)?;
    }
    Ok("nothing was left in force".into())
}
