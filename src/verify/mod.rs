//! The verification battery and its reports.
