//! The protocol module alone: it stands on nothing but `thiserror`, so the targets are built in seconds and
//! without instrumenting the whole crate.

#[path = "../../../src/nbd/mod.rs"]
pub mod nbd;
