//! Listing and selecting contexts, and the extents of them.

use std::collections::BTreeSet;
use std::io::{Read, Write};

use hawser::nbd::option::MetaContextQuery;
use hawser::nbd::option_reply::{MetaContextReply, put_reply, reply};
use hawser::nbd::reply::{Extent, block_status, none, simple};
use hawser::nbd::request::RawRequest;
use hawser::nbd::{CommandFlags, Errno, ExportName, OptionCode, ReplyCode};

use super::{BLOCK, EXPORT, Fault, OTHER, Options, RUN, SIZE};

pub(super) const CONTEXTS: [&str; 2] = ["base:allocation", "test:dirty"];

impl<S: Read + Write> Options<S> {
    pub(super) fn contexts(&mut self, code: OptionCode, payload: &[u8]) -> Vec<u8> {
        let set = code == OptionCode::SET_META_CONTEXT;
        if self.has(Fault::NoContexts) {
            return reply(code, ReplyCode::ERR_UNSUP, &[]);
        }
        let before = if set {
            self.state.selection.take()
        } else {
            None
        };
        let query = match self.query(payload) {
            Ok(Some(query)) => query,
            Ok(None) => return reply(code, ReplyCode::ACK, &[]),
            Err(refusal) => {
                if self.has(Fault::FailedSelectionKept) {
                    self.state.selection = before;
                }
                return reply(code, refusal, &[]);
            }
        };
        if set && query.queries.is_empty() && self.has(Fault::EmptySelectionKept) {
            self.state.selection = before;
            return reply(code, ReplyCode::ACK, &[]);
        }
        let mut selected = self.selected(&query, set);
        if selected.is_empty() && self.has(Fault::UnknownKeepsSelection) {
            let unknown = query.queries.iter().any(|query| query.starts_with("x-"));
            self.state.selection = before.filter(|_| unknown);
            return reply(code, ReplyCode::ACK, &[]);
        }
        let several = selected.len() > 1;
        match self.shared.fault {
            Fault::SameIds if set && several => selected[1].0 = selected[0].0,
            Fault::SelectsTwice if set && several => selected.push((3, CONTEXTS[1])),
            Fault::SelectsUnasked if set && several => selected.push((3, "test:unasked")),
            _ => {}
        }
        let mut out = Vec::new();
        for (id, name) in &selected {
            let context = MetaContextReply {
                id: if set || self.has(Fault::ListedIds) {
                    *id
                } else {
                    0
                },
                name: (*name).into(),
            };
            put_reply(&mut out, code, ReplyCode::META_CONTEXT, &context.encode());
        }
        put_reply(&mut out, code, ReplyCode::ACK, &[]);
        if set && !selected.is_empty() {
            self.state.selection = Some((query.export.as_str().into(), selected));
        }
        out
    }

    /// What was asked; `None` for what is accepted without a look.
    fn query(&self, payload: &[u8]) -> Result<Option<MetaContextQuery>, ReplyCode> {
        let parsed = MetaContextQuery::parse(payload);
        let fault = self.shared.fault;
        if !self.state.structured && fault != Fault::SelectsWithoutStructured {
            return Err(ReplyCode::ERR_INVALID);
        }
        let allocation = || MetaContextQuery {
            export: ExportName::try_from(EXPORT).unwrap(),
            queries: vec![CONTEXTS[0].into()],
        };
        let ends_in = |text: &[u8]| payload.ends_with(text);
        match parsed {
            Err(_) if fault == Fault::OverlongQueryAccepted => Ok(None),
            Err(_) if fault == Fault::NoColonSelects && ends_in(b"\0\0\0\x04base") => {
                Ok(Some(allocation()))
            }
            Err(_)
                if fault == Fault::QueriesUncounted
                    && payload.windows(2).any(|two| two == [3, 0xe8]) =>
            {
                Ok(Some(allocation()))
            }
            Err(_) => Err(ReplyCode::ERR_INVALID),
            Ok(query)
                if query.export.as_str() != EXPORT
                    && !(fault == Fault::ContextOfListedExport
                        && query.export.as_str() == OTHER)
                    && !matches!(
                        fault,
                        Fault::ContextOfOtherExport | Fault::ContextsOfUnknown
                    ) =>
            {
                Err(ReplyCode::ERR_UNKNOWN)
            }
            Ok(_) if !self.visible => Err(ReplyCode::ERR_UNKNOWN),
            Ok(query)
                if fault == Fault::UnknownNamespaceRefused
                    && query.queries.iter().any(|query| query.starts_with("x-")) =>
            {
                Err(ReplyCode::ERR_INVALID)
            }
            Ok(query) => Ok(Some(query)),
        }
    }

    fn selected(&self, query: &MetaContextQuery, set: bool) -> Vec<(u32, &'static str)> {
        let fault = self.shared.fault;
        let all = query.queries.is_empty() && (!set || fault == Fault::EmptySelectionSelectsAll);
        let wanted = |name: &str| {
            query.queries.iter().any(|query| {
                let wildcard = !set && query == "base:" && fault != Fault::NoWildcard;
                query == name || wildcard && name.starts_with("base:")
            })
        };
        (1..)
            .zip(CONTEXTS)
            .filter(|(_, name)| all || wanted(name))
            .filter(|(_, name)| !(all && fault == Fault::NotListed && *name == CONTEXTS[0]))
            .collect()
    }

    pub(super) fn status(&self, request: &RawRequest) -> Vec<u8> {
        let contexts = match &self.state.selection {
            Some((_, contexts)) => contexts.clone(),
            None if !self.state.structured && self.has(Fault::StatusWithoutContexts) => {
                vec![(1, CONTEXTS[0])]
            }
            None if !self.state.structured && self.has(Fault::StatusWrongErrno) => {
                return self.refuse(request, Errno::ENOTSUP);
            }
            None => return self.refuse(request, Errno::EINVAL),
        };
        if self.has(Fault::StatusSimple) {
            return simple(request.cookie, Errno::OK).to_vec();
        }
        let one = request.flags.contains(CommandFlags::REQ_ONE);
        let extents = self.extents(request, one);
        let mut out = Vec::new();
        let mut answered = BTreeSet::new();
        for (id, _) in &contexts {
            if !answered.insert(*id) || self.has(Fault::OneContextUnanswered) && *id > 1 {
                continue;
            }
            let id = if self.has(Fault::WrongContextId) {
                id + 7
            } else {
                *id
            };
            out.extend(block_status(request.cookie, false, id, &extents));
            if self.has(Fault::ChunkTwice) {
                out.extend(block_status(request.cookie, false, id, &extents));
            }
        }
        out.extend(none(request.cookie));
        out
    }

    /// Data and holes by turns.
    fn extents(&self, request: &RawRequest, one: bool) -> Vec<Extent> {
        if request.offset >= SIZE {
            return vec![Extent {
                length: request.length,
                flags: 0,
            }];
        }
        let end = request.offset + u64::from(request.length);
        let mut offset = request.offset;
        let mut extents = Vec::new();
        while offset < end {
            let run = (offset / RUN + 1) * RUN;
            let length = u32::try_from(run.min(end) - offset).unwrap();
            let flags = if (offset / RUN).is_multiple_of(2) {
                0
            } else {
                3
            };
            extents.push(Extent { length, flags });
            offset += u64::from(length);
        }
        let last = extents.len() - 1;
        match self.shared.fault {
            Fault::NoExtents => extents.clear(),
            Fault::EmptyExtent => extents[last].length = 0,
            Fault::ExtentsBeyondRequest if !one => extents.push(Extent {
                length: BLOCK,
                flags: 0,
            }),
            Fault::ExtentBeyondEnd if !one => extents[last].length += BLOCK,
            Fault::UnalignedExtent if !one => extents[last].length -= 1,
            Fault::ReqOneIgnored if one => extents.insert(0, extents[0]),
            Fault::ReqOneTooLong if one => extents[0].length = request.length + BLOCK,
            _ => {}
        }
        if one && !self.has(Fault::ReqOneIgnored) {
            extents.truncate(1);
        }
        extents
    }
}
