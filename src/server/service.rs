//! What all sessions of a server share.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::budget::Budget;
use super::commit::Commits;
use super::exports::{Export, Exports};
use super::store::Store;
use super::workers::Workers;
use crate::nbd::{self, BlockSizes, ExportInfo, MAX_PAYLOAD, TransmissionFlags};
use crate::tls::ServerTls;

/// A file takes bytes at any offset. Page-sized requests are what it likes best, and the limit is the protocol's.
pub(super) const BLOCK_SIZES: BlockSizes = BlockSizes {
    minimum: 1,
    preferred: 4096,
    maximum_payload: MAX_PAYLOAD,
};

/// Refusals that are logged in a second.
const LINES: u32 = 20;
const SECOND: Duration = Duration::from_secs(1);

/// One store, served to whoever may have it.
pub(super) struct Service {
    pub(super) store: Arc<Store>,
    pub(super) commits: Arc<Commits>,
    pub(super) workers: Workers,
    pub(super) budget: Arc<Budget>,
    pub(super) exports: Arc<Exports>,
    pub(super) tls: ServerTls,
    /// What INFO_DESCRIPTION says.
    pub(super) description: Option<String>,
    /// Whether LIST tells names. Attachments are not told: one that was revoked could learn of its successor.
    pub(super) listed: bool,
    pub(super) limits: nbd::server::Limits,
    pub(super) draining: AtomicBool,
    /// Connections whose negotiation has not ended.
    pub(super) negotiating: AtomicUsize,
    pub(super) refused: Refusals,
    pub(super) started: Instant,
}

impl Service {
    /// What a client is told of an export, now.
    pub(super) fn info(&self, export: &Export) -> ExportInfo {
        let mut flags = TransmissionFlags::HAS_FLAGS
            .with(TransmissionFlags::SEND_FLUSH)
            .with(TransmissionFlags::SEND_FUA)
            .with(TransmissionFlags::SEND_CACHE)
            .with(TransmissionFlags::CAN_MULTI_CONN);
        flags = if export.read_only {
            flags.with(TransmissionFlags::READ_ONLY)
        } else {
            flags
                .with(TransmissionFlags::SEND_TRIM)
                .with(TransmissionFlags::SEND_WRITE_ZEROES)
                .with(TransmissionFlags::SEND_FAST_ZERO)
        };
        ExportInfo {
            size: self.store.size(),
            flags,
            block_sizes: Some(BLOCK_SIZES),
            description: self.description.clone(),
        }
    }
}

/// Connections that ended without a session, counted by reason.
#[derive(Debug, Default)]
pub(super) struct Refusals(Mutex<Refused>);

#[derive(Debug, Default)]
struct Refused {
    counts: BTreeMap<&'static str, u64>,
    /// Lines in the log since this moment.
    since: Option<Instant>,
    told: u32,
    untold: u64,
}

/// Whether a refusal is worth a line in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Telling {
    /// `untold` before it were not.
    Tell {
        untold: u64,
    },
    Keep,
}

impl Refusals {
    pub(super) fn count(&self, reason: &'static str) -> Telling {
        let mut refused = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *refused.counts.entry(reason).or_default() += 1;
        let now = Instant::now();
        if refused.since.is_none_or(|since| now - since >= SECOND) {
            refused.since = Some(now);
            refused.told = 0;
        }
        if refused.told >= LINES {
            refused.untold += 1;
            return Telling::Keep;
        }
        refused.told += 1;
        Telling::Tell {
            untold: std::mem::take(&mut refused.untold),
        }
    }

    pub(super) fn counts(&self) -> BTreeMap<&'static str, u64> {
        let refused = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        refused.counts.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_all_counted_but_not_all_told() {
        let refusals = Refusals::default();
        let told = (0..1000)
            .filter(|_| refusals.count("left") != Telling::Keep)
            .count();
        assert!(told < 1000 && told >= LINES as usize, "{told}");
        assert_eq!(refusals.counts().get("left"), Some(&1000));
    }
}
