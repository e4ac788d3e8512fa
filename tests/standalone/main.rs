//! `hawser standalone` from outside: the real process and its servers, driven over its CSI socket.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a helper of a test that fails fails the test"
)]

mod bad_input;
mod calls;
mod fence;
mod foreign;
mod home;
mod kill;
mod servers;
mod volumes;
