//! Kernel interfaces that no safe crate offers: every unsafe block of Hawser lives here, behind safe functions.
//!
//! Each module is a small wrapper over one interface. What is said through it is decided elsewhere: netlink
//! messages, for one, are encoded in [`crate::attach`].

pub mod ktls;
pub mod memory;
pub mod netlink;
pub mod process;
pub mod socket;
mod sockopt;
