//! The NBD protocol, pure: codec, options, requests, replies, and both sides' negotiation as state machines.
//!
//! Nothing here opens, reads or waits; section names in comments are those of the specification, `doc/proto.md`.
