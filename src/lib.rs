//! Hawser: block volumes over NBD, always inside mutually authenticated TLS.
//!
//! The folders are the architecture; `docs/design/contracts.md` says which owns what and how they meet.

mod admission;
pub mod agent;
pub mod attach;
pub mod client;
pub mod control;
pub mod csi;
pub mod daemon;
pub mod demo;
pub mod filesystem;
pub mod kube;
pub mod listen;
pub mod metrics;
pub mod nbd;
pub mod node;
pub mod patience;
pub mod proto;
pub mod server;
pub mod standalone;
pub mod storage;
#[allow(
    unsafe_code,
    reason = "the kernel interfaces that no safe crate offers live here, and only here"
)]
pub mod sys;
pub mod tls;
pub mod verify;
pub mod volumes;
