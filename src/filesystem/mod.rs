//! Probe, format, check, mount and grow file systems, by executing the system's own tools.
