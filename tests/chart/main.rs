//! The Helm chart: that it renders for every set of values, into what the API server takes and our binary understands,
//! with no more rights than each role needs, and that what is generated from it is as it generates.
//!
//! `HAWSER_UPDATE=1` writes what is generated anew instead of comparing it.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a helper of a test that fails fails the test"
)]

mod arguments;
mod conformity;
mod documents;
mod generated;
mod image;
mod rights;
mod tool;
mod values;
mod workloads;
