//! The verification battery: whether a server's TLS is real, and its negotiation right, asked of the server itself.
//!
//! Each check is a small value with a stable id, run on sessions of its own. [`battery`] makes the few that guard each
//! attach: they only read, run side by side, and each has a deadline, so that a hostile server can neither stall an
//! attach nor harm the volume. [`run`] makes all that a [`Selection`] allows, against any server: it first finds out
//! what kind of server it is, for not every rule holds for every kind.

mod check;
mod checks;
pub mod command;
mod failure;
mod link;
mod mode;
mod policy;
mod report;
mod run;
mod server;
mod session;
mod subject;
#[cfg(test)]
mod tests;
mod transmission;

pub use self::check::{Check, Group, Needs, Outcome, Severity};
pub use self::checks::CHECKS;
pub use self::failure::Cancel;
pub use self::mode::{Features, Mode, Sizes};
pub use self::policy::{Policy, Refused, UnknownPolicy};
pub use self::report::{Examined, Report, Summary};
pub use self::run::{Progress, Selection, battery, check, run};
pub use self::server::{Address, Identity, Server};
/// What is verified before an attach: how a genuine client reaches its export.
pub use crate::client::Target;
