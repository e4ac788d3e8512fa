//! What all sessions of a server share.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

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
pub(super) struct Refusals(Mutex<BTreeMap<&'static str, u64>>);

impl Refusals {
    pub(super) fn count(&self, reason: &'static str) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.entry(reason).or_default() += 1;
    }

    pub(super) fn counts(&self) -> BTreeMap<&'static str, u64> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}
