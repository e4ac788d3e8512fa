//! All unsafe code: netlink, kTLS, ioctls. Each module is a safe wrapper around one kernel interface.

pub mod process;
