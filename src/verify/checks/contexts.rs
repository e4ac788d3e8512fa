//! Selecting meta contexts inside TLS: what counts is the last selection, for this export, if it succeeded.

use std::collections::BTreeSet;

use super::prelude::*;
use crate::nbd::option_reply::MetaContextReply;

const SELECTING: &str = "Option types, NBD_OPT_SET_META_CONTEXT";

/// The one context that the specification itself defines.
pub(super) const ALLOCATION: &str = "base:allocation";

/// Contexts asked for at a time; a server may have one for each of many snapshots.
const CONTEXTS: usize = 16;

/// C43.
pub(super) const IDS_UNIQUE: Check = Check {
    id: "contexts-have-ids-of-their-own",
    title: "SET_META_CONTEXT names each context that was asked for once, with an id of its own, and BLOCK_STATUS answers by these ids",
    group: Group::Contexts,
    section: SELECTING,
    severity: Severity::Data,
    why: "A backup would take one context's answer for another's, and leave out data.",
    rules: &[43],
    attach: true,
    scope: Scope::Session,
    question: ids_unique,
    ..Check::USUAL
};

/// C42.
pub(super) const OTHER_EXPORT_VOID: Check = Check {
    id: "other-exports-context-void",
    title: "A context selected for another export is not valid for this one",
    group: Group::Contexts,
    section: SELECTING,
    severity: Severity::Data,
    why: "The block status of another volume would be taken for this one's.",
    rules: &[42],
    attach: true,
    scope: Scope::Session,
    question: other_export_void,
    ..Check::USUAL
};

/// C41, C42.
pub(super) const FAILED_SELECTION_CLEARS: Check = Check {
    id: "failed-selection-clears",
    title: "A selection that fails clears the one before it",
    group: Group::Contexts,
    section: SELECTING,
    severity: Severity::Data,
    why: "Client and server would disagree about which contexts are in force.",
    rules: &[41, 42],
    attach: true,
    scope: Scope::Session,
    question: failed_selection_clears,
    ..Check::USUAL
};

/// C42.
pub(super) const EMPTY_SELECTION_CLEARS: Check = Check {
    id: "empty-selection-clears",
    title: "A selection of nothing clears the one before it",
    group: Group::Contexts,
    section: SELECTING,
    severity: Severity::Data,
    why: "Client and server would disagree about which contexts are in force.",
    rules: &[42],
    attach: true,
    scope: Scope::Session,
    question: empty_selection_clears,
    ..Check::USUAL
};

/// A session with structured replies, where contexts can be selected, and the length of a request to it.
pub(super) fn structured(subject: &Subject<'_>) -> Result<(Session, ExportInfo, u32), Stop> {
    let (mut probe, info) = subject.admitted()?;
    let length =
        one_block(&info).ok_or_else(|| Stop::Inapplicable("the export is empty".into()))?;
    if let Err(refusal) = probe.structured_reply().map_err(broke)? {
        return Err(lacking("structured replies", &refusal));
    }
    Ok((probe, info, length))
}

/// Selects `base:allocation`, which must succeed where the server knows contexts at all.
pub(super) fn select_allocation(
    subject: &Subject<'_>,
    probe: &mut Session,
) -> Result<MetaContextReply, Stop> {
    let selected = probe
        .set_meta_context(subject.export(), &[ALLOCATION])
        .map_err(broke)?
        .map_err(|refusal| lacking("meta contexts", &refusal))?;
    selected
        .into_iter()
        .find(|context| context.name == ALLOCATION)
        .ok_or_else(|| Stop::Inapplicable("the server has no base:allocation".into()))
}

/// A feature that the server says it does not have; any other refusal is a fault.
pub(super) fn lacking(feature: &str, refusal: &Refusal) -> Stop {
    match refusal.code {
        ReplyCode::ERR_UNSUP | ReplyCode::ERR_POLICY | ReplyCode::ERR_PLATFORM => {
            Stop::Inapplicable(format!("the server has no {feature}: {refusal}"))
        }
        _ => Stop::Finding(format!("asked for {feature}: {refusal}")),
    }
}

fn ids_unique(subject: &Subject<'_>) -> Result<String, Stop> {
    let (mut probe, _, length) = structured(subject)?;
    let listed = probe
        .list_meta_context(subject.export(), &[])
        .map_err(broke)?
        .map_err(|refusal| lacking("meta contexts", &refusal))?;
    let mut names: BTreeSet<&str> = listed
        .iter()
        .map(|context| context.name.as_str())
        .take(CONTEXTS)
        .collect();
    names.insert(ALLOCATION);
    let queries: Vec<&str> = names.iter().copied().collect();
    let selected = probe
        .set_meta_context(subject.export(), &queries)
        .map_err(broke)?
        .map_err(|refusal| lacking("meta contexts", &refusal))?;
    if selected.is_empty() {
        return Err(Stop::Inapplicable("the server has no contexts".into()));
    }
    let mut ids = BTreeSet::new();
    let mut seen = BTreeSet::new();
    for MetaContextReply { id, name } in &selected {
        require(names.contains(name.as_str()), || {
            format!("{name:?} was selected, which nobody asked for")
        })?;
        require(seen.insert(name.as_str()), || {
            format!("{name:?} was selected twice")
        })?;
        require(ids.insert(*id), || {
            format!("{name:?} has the id {id}, which another context has too")
        })?;
    }
    let mut session = subject.go(probe)?;
    let reply = session.block_status(0, length).map_err(broke)?;
    let Reply::Structured(chunks) = &reply else {
        return Err(Stop::Finding(format!(
            "BLOCK_STATUS was answered with {}",
            shape(&reply)
        )));
    };
    for chunk in chunks {
        match chunk {
            OwnedChunk::BlockStatus { context, .. } => require(ids.remove(context), || {
                format!(
                    "BLOCK_STATUS answered for context {context}, which is not selected or was answered already"
                )
            })?,
            OwnedChunk::None => {}
            _ => {
                return Err(Stop::Finding(format!(
                    "BLOCK_STATUS was answered with {}",
                    shape(&reply)
                )));
            }
        }
    }
    require(ids.is_empty(), || {
        format!("BLOCK_STATUS did not answer for the contexts {ids:?}")
    })?;
    session.disconnect();
    Ok(format!("{} contexts", selected.len()))
}

fn other_export_void(subject: &Subject<'_>) -> Result<String, Stop> {
    let (mut probe, _, length) = structured(subject)?;
    let listed = probe.list().map_err(broke)?.unwrap_or_default();
    // One that is there has contexts to keep, which one that is not may not.
    let other = listed
        .iter()
        .filter_map(|name| ExportName::try_from(name.as_str()).ok())
        .find(|name| name != subject.export())
        .unwrap_or_else(|| subject.other_export());
    let selected = probe
        .set_meta_context(&other, &[ALLOCATION])
        .map_err(broke)?;
    let seen = match selected {
        Ok(contexts) => format!(
            "{} contexts for the other export, void here",
            contexts.len()
        ),
        Err(refusal) => format!("the selection: {refusal}"),
    };
    void(subject, probe, length)?;
    Ok(seen)
}

fn failed_selection_clears(subject: &Subject<'_>) -> Result<String, Stop> {
    // The length of its only query runs past the end of the option.
    let mut overlong = Vec::new();
    overlong.put_string(subject.export().as_str());
    overlong.put_u32(1);
    overlong.put_u32(0xffff);
    overlong.extend_from_slice(ALLOCATION.as_bytes());
    let (mut probe, _, length) = structured(subject)?;
    select_allocation(subject, &mut probe)?;
    match probe.ask(OptionCode::SET_META_CONTEXT, &overlong) {
        Ok(answer) if answer.last.code == ReplyCode::ACK => {
            return Err(Stop::Finding(
                "a query whose length runs past the end of the option was accepted".into(),
            ));
        }
        Ok(_) => void(subject, probe, length)?,
        Err(error) if error.is_violation() => return Err(broke(error)),
        // Harsh, but nothing is left in force.
        Err(_) => {}
    }
    let (mut probe, _, length) = structured(subject)?;
    select_allocation(subject, &mut probe)?;
    let other = probe
        .set_meta_context(&subject.other_export(), &[ALLOCATION])
        .map_err(broke)?;
    match other {
        Err(_) => void(subject, probe, length)?,
        // It did not fail: what it means is the question of another check.
        Ok(_) => probe.abort(),
    }
    Ok("nothing was left in force".into())
}

fn empty_selection_clears(subject: &Subject<'_>) -> Result<String, Stop> {
    let (mut probe, _, length) = structured(subject)?;
    select_allocation(subject, &mut probe)?;
    let selected = probe
        .set_meta_context(subject.export(), &[])
        .map_err(broke)?
        .unwrap_or_default();
    require(selected.is_empty(), || {
        format!("a selection of nothing selected {selected:?}")
    })?;
    void(subject, probe, length)?;
    Ok("nothing was left in force".into())
}

pub(super) fn void(subject: &Subject<'_>, probe: Session, length: u32) -> Result<(), Stop> {
    let mut session = subject.go(probe)?;
    require_no_contexts(&mut session, length)?;
    session.disconnect();
    Ok(())
}
