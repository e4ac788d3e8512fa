//! One machine without a cluster: state and Secrets in directories, servers as supervised processes.

mod admission;
mod command;
mod control;
mod installation;
mod process;
mod recover;
mod secrets;
mod server;
mod site;

pub use self::command::{Args, run};
pub use self::installation::{Installation, Settings};
pub use self::recover::OpenError;

/// An error and everything behind it, on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}
