//! Userspace NBD sessions over TLS: what attach and verify connect with.
