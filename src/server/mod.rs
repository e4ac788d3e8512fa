//! The NBD server of one volume: sessions, commands, memory budget, extents, control socket.
//!
//! Three kinds of threads carry the data: one `reception`, which accepts and negotiates with all clients at once; a
//! `session` for each client in transmission, which owns its socket and its encryption; and `worker`s, which do what
//! may block on the disk. The main thread answers the control socket and signals.

mod attachments;
mod budget;
mod client;
mod command;
mod commit;
mod control;
mod epoch;
mod exports;
mod negotiation;
mod outgoing;
mod pace;
mod reception;
mod serve;
mod service;
mod session;
mod store;
mod subject;
#[cfg(test)]
mod tests;
mod transport;
mod wake;
mod workers;

pub use self::serve::{Args, run};
