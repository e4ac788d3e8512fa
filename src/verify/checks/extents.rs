//! `base:allocation` of the whole export: extents that can be added up.

use super::contexts::{select_allocation, structured};
use super::prelude::*;
use crate::nbd::reply::{Extent, MAX_DESCRIPTORS};

/// Bytes asked about at a time.
const STEP: u32 = 1 << 30;

/// Requests before the walk skips to the end of the export. A server may answer for less than it was asked.
const REQUESTS: usize = 64;

/// nbd.md 3.2.
pub(super) const WELL_FORMED: Check = Check {
    id: "extents-cover-the-export",
    title: "BLOCK_STATUS covers the export in extents that begin where they were asked for and are never empty",
    group: Group::Contexts,
    section: "Structured reply types, NBD_REPLY_TYPE_BLOCK_STATUS",
    severity: Severity::Data,
    why: "A backup or a copy would take data for a hole, or miss it.",
    rules: &[43],
    attach: true,
    scope: Scope::Session,
    question: well_formed,
    ..Check::USUAL
};

/// The walk over one export.
struct Walk<'a> {
    session: Transmission,
    info: &'a ExportInfo,
    context: u32,
    minimum: u64,
    extents: usize,
}

fn well_formed(subject: &Subject<'_>) -> Result<String, Stop> {
    let (mut probe, info, _) = structured(subject)?;
    let context = select_allocation(subject, &mut probe)?.id;
    let mut walk = Walk {
        session: subject.go(probe)?,
        info: &info,
        context,
        minimum: info.block_sizes.map_or(1, |sizes| u64::from(sizes.minimum)),
        extents: 0,
    };
    walk.single()?;
    let mut offset = 0;
    for _ in 0..REQUESTS {
        match walk.next(offset)? {
            Some(end) => offset = end,
            None => break,
        }
    }
    let whole = offset / walk.minimum == info.size / walk.minimum;
    if !whole {
        let end = info.size.saturating_sub(u64::from(STEP)) / walk.minimum * walk.minimum;
        walk.next(end.max(offset))?;
    }
    let extents = walk.extents;
    walk.session.disconnect();
    Ok(if whole {
        format!("{extents} extents cover all {} bytes", info.size)
    } else {
        format!(
            "{extents} extents: the first {offset} of {} bytes, and the last ones",
            info.size
        )
    })
}

impl Walk<'_> {
    /// REQ_ONE: a single extent, no longer than the request.
    fn single(&mut self) -> Result<(), Stop> {
        let Some(length) = self.length(0) else {
            return Ok(());
        };
        let extents = self.ask(0, length, CommandFlags::REQ_ONE)?;
        require(extents.len() == 1 && extents[0].length <= length, || {
            format!(
                "one extent of at most {length} bytes was asked for (REQ_ONE), {} came, the first of {} bytes",
                extents.len(),
                extents[0].length
            )
        })
    }

    /// Asks about what begins at `offset`; returns where the answer ends, or `None` at the end of the export.
    fn next(&mut self, offset: u64) -> Result<Option<u64>, Stop> {
        let Some(length) = self.length(offset) else {
            return Ok(None);
        };
        let extents = self.ask(offset, length, CommandFlags(0))?;
        self.extents += extents.len();
        let mut end = offset;
        for (index, extent) in extents.iter().enumerate() {
            require(end < offset + u64::from(length), || {
                format!(
                    "{} extents for {length} bytes at {offset}: the first {index} cover them already",
                    extents.len()
                )
            })?;
            end += u64::from(extent.length);
            require(end <= self.info.size, || {
                format!(
                    "an extent ends at {end}, beyond the export's {} bytes",
                    self.info.size
                )
            })?;
            require(
                end.is_multiple_of(self.minimum) || end == self.info.size,
                || {
                    format!(
                        "an extent ends at {end}, not a multiple of the minimum block size {}",
                        self.minimum
                    )
                },
            )?;
        }
        Ok(Some(end))
    }

    /// How much to ask for at `offset`: whole blocks, and nothing where less than a block is left.
    fn length(&self, offset: u64) -> Option<u32> {
        let left = self.info.size.saturating_sub(offset) / self.minimum * self.minimum;
        u32::try_from(left.min(u64::from(STEP)))
            .ok()
            .filter(|length| *length > 0)
    }

    /// The extents of our context: one chunk, with at least one extent and none of no length.
    fn ask(&mut self, offset: u64, length: u32, flags: CommandFlags) -> Result<Vec<Extent>, Stop> {
        let reply = self
            .session
            .request(Command::BLOCK_STATUS, flags, offset, length)
            .map_err(broke)?;
        let unfit = || {
            Stop::Finding(format!(
                "BLOCK_STATUS of {length} bytes at {offset} was answered with {}",
                shape(&reply)
            ))
        };
        let Reply::Structured(chunks) = &reply else {
            return Err(unfit());
        };
        let mut answer = None;
        for chunk in chunks {
            match chunk {
                OwnedChunk::BlockStatus { context, extents } => {
                    require(*context == self.context && answer.is_none(), || {
                        format!(
                            "a chunk for context {context} came, one chunk for context {} was due",
                            self.context
                        )
                    })?;
                    answer = Some(extents.clone());
                }
                OwnedChunk::None => {}
                _ => return Err(unfit()),
            }
        }
        let extents = answer.ok_or_else(unfit)?;
        require(
            !extents.is_empty() && extents.len() <= MAX_DESCRIPTORS,
            || format!("{} extents in one chunk", extents.len()),
        )?;
        require(extents.iter().all(|extent| extent.length > 0), || {
            format!("an extent of no length, for {length} bytes at {offset}")
        })?;
        Ok(extents)
    }
}
