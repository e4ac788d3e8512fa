//! The checks themselves, by the part of a session's life they belong to.

mod certificates;
mod contexts;
mod extents;
mod greeting;
mod plaintext;
mod prelude;
mod secured;

use super::check::Check;

/// All checks, in the order of a session's life.
pub static CHECKS: &[&Check] = &[
    &greeting::NEWSTYLE,
    &plaintext::TLS_OFFERED,
    &plaintext::OPTIONS_REFUSED,
    &plaintext::REFUSALS_ALIKE,
    &plaintext::EXPORT_NAME_CLOSES,
    &plaintext::INJECTION_DEAD,
    &plaintext::STATE_DROPPED,
    &certificates::ANONYMOUS_REFUSED,
    &certificates::FOREIGN_REFUSED,
    &secured::SECOND_STARTTLS_REFUSED,
    &secured::BLOCK_STATUS_REFUSED,
    &secured::READ_SIMPLE,
    &contexts::IDS_UNIQUE,
    &extents::WELL_FORMED,
    &contexts::OTHER_EXPORT_VOID,
    &contexts::FAILED_SELECTION_CLEARS,
    &contexts::EMPTY_SELECTION_CLEARS,
];
