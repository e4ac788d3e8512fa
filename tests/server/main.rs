//! `hawser serve` from outside: the real process, on the wire. Tests are named after the rules they show (C1 to C64).
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a helper of a test that fails fails the test"
)]

mod abuse;
mod bench;
mod documents;
mod lifecycle;
mod negotiation;
mod resent;
mod transmission;
mod wire;
