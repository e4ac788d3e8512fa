//! Probe, format, check, mount and grow file systems, by executing the system's own tools.
//!
//! It works on the path of a block device and knows nothing of NBD. The rule above all others: a device that could
//! not be read is never taken for an empty one, and what is not empty is never formatted.

mod check;
mod error;
mod format;
mod grow;
mod kind;
mod mount;
mod mountinfo;
mod ownership;
mod probe;
mod tool;
mod usage;

pub use self::check::check;
pub use self::error::FilesystemError;
pub use self::format::{Before, format};
pub use self::grow::grow;
pub use self::kind::{Kind, UnknownKind};
pub use self::mount::{bind, mount, unmount};
pub use self::mountinfo::{MountPoint, mount_points};
pub use self::ownership::give_to_group;
pub use self::probe::{Content, Probe, is_in_use, probe};
pub use self::usage::{Usage, device_size, usage};
