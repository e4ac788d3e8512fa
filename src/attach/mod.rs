//! Kernel nbd devices: connect, reconnect, recover, grow, disconnect, and the userspace proxy fallback.
