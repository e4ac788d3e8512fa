//! Probe, format, check, mount and grow file systems, by executing the system's own tools.

mod kind;

pub use self::kind::{Kind, UnknownKind};
