//! One machine without a cluster: state and Secrets in directories, servers as supervised processes.

mod command;
mod foreign;
mod installation;
mod process;
mod recover;
mod secrets;
mod server;
mod site;

pub use self::command::{Args, run};
pub use self::installation::{Installation, Settings};
pub use self::recover::OpenError;
