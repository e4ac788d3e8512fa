//! The checks themselves, by the part of a session's life they belong to.

mod certificates;
mod contexts;
mod exports;
mod extents;
mod greeting;
mod options;
mod plaintext;
mod prelude;
mod queries;
mod reading;
mod requests;
mod robustness;
mod secured;
mod starttls;
mod versions;
mod writing;

use super::check::Check;

/// All checks, in the order of a session's life.
pub static CHECKS: &[&Check] = &[
    &greeting::FIXED_NEWSTYLE,
    &greeting::FLAGS_KNOWN,
    &greeting::CLIENT_FLAGS_CHECKED,
    &greeting::NO_TLS_UNASKED,
    &plaintext::TLS_OFFERED,
    &plaintext::OPTIONS_REFUSED,
    &plaintext::REFUSALS_ALIKE,
    &plaintext::EXPORT_NAME_CLOSES,
    &plaintext::SELECTIVE_ANSWERS,
    &starttls::ACCEPTED,
    &starttls::PAYLOAD_REFUSED,
    &starttls::IN_PIECES,
    &plaintext::INJECTION_DEAD,
    &starttls::SPLIT_INJECTION_DEAD,
    &starttls::EARLY_HELLO,
    &starttls::PLAINTEXT_DEAD,
    &plaintext::STATE_DROPPED,
    &certificates::SERVER_GENUINE,
    &certificates::ANONYMOUS_REFUSED,
    &certificates::FOREIGN_REFUSED,
    &certificates::EXPIRED_REFUSED,
    &certificates::OTHER_REFUSED,
    &versions::OLD_REFUSED,
    &versions::TLS13,
    &secured::SECOND_STARTTLS_REFUSED,
    &exports::OPENS,
    &exports::UNKNOWN_EXPORT,
    &exports::ALIKE,
    &exports::GO_LIKE_INFO,
    &exports::EXPORT_NAME,
    &exports::UNKNOWN_INFORMATION,
    &exports::BLOCK_SIZES,
    &exports::SIZE_IN_BLOCKS,
    &exports::FLAGS_FIT,
    &options::MAGIC_CHECKED,
    &options::UNKNOWN_REFUSED,
    &options::NO_PAYLOAD,
    &options::ABORT_ACKNOWLEDGED,
    &options::ABORT_DATA_IGNORED,
    &options::LONG_NAME_HEARD,
    &options::TOO_LONG_REFUSED,
    &options::NUL_REFUSED,
    &options::LENGTHS_CHECKED,
    &options::STRUCTURED_TWICE,
    &options::TLS_REQUIRED_NEVER,
    &secured::BLOCK_STATUS_REFUSED,
    &secured::READ_SIMPLE,
    &queries::NEEDS_STRUCTURED,
    &queries::LISTED_SELECTABLE,
    &queries::LISTED_IDS_ZERO,
    &queries::UNKNOWN_IGNORED,
    &queries::NO_COLON,
    &queries::LENGTHS_CHECKED,
    &contexts::IDS_UNIQUE,
    &extents::WELL_FORMED,
    &contexts::OTHER_EXPORT_VOID,
    &contexts::FAILED_SELECTION_CLEARS,
    &contexts::EMPTY_SELECTION_CLEARS,
    &queries::REPLACED,
    &reading::COOKIES,
    &reading::COVERED,
    &reading::IN_ONE_PIECE,
    &reading::ERRORS_STRUCTURED,
    &reading::LARGE,
    &reading::NOTHING,
    &requests::BEYOND_REFUSED,
    &requests::BEYOND_EINVAL,
    &requests::UNALIGNED,
    &requests::MAGIC_CHECKED,
    &requests::UNKNOWN_COMMAND,
    &requests::UNKNOWN_FLAG,
    &requests::FLUSHES,
    &requests::FUA_ACCEPTED,
    &requests::READ_ONLY,
    &requests::READ_ONLY_EPERM,
    &requests::CACHES,
    &requests::DISC,
    &writing::READ_BACK,
    &writing::BEYOND_REFUSED,
    &writing::BEYOND_ENOSPC,
    &writing::FAILURE_SURVIVED,
    &writing::FLAG_REFUSED,
    &writing::LARGE,
    &writing::ZEROED,
    &writing::FAST_ZERO,
    &writing::TRIMMED,
    &writing::SHARED_FLUSH,
    &robustness::TRUNCATED,
    &robustness::HUGE,
    &robustness::OPTIONS_BOUNDED,
    &robustness::SILENT_SESSIONS,
    &robustness::IDLE_ENDS,
];
