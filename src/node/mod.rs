//! `hawser node`: the plugin on every node of a cluster.
//!
//! It serves CSI's Node service on the kernel's devices, as standalone does, with the volumes of the API server. It may
//! read no Secret: the kubelet brings them.
//!
//! - `registration`: making itself known to the kubelet
//! - `volumes`: the installation as the Node service and the devices see it; `directory`, where servers are, and
//!   `keyring`, what the kubelet brought, stand behind it
//! - `notes`: what it says of attaches, in statuses and Events; `metrics`: what it measures

mod command;
mod directory;
mod keyring;
pub(crate) mod metrics;
mod notes;
mod registration;
mod volumes;

pub use self::command::{Args, run};
