//! The generated gRPC messages, clients and servers of `proto/`.
#![allow(
    clippy::all,
    clippy::panic,
    clippy::use_self,
    clippy::semicolon_if_nothing_returned,
    clippy::uninlined_format_args,
    unreachable_pub,
    reason = "generated code keeps its generator's style"
)]

/// The control socket of a volume's server.
pub mod control {
    tonic::include_proto!("hawser.control.v1");
}

/// The Container Storage Interface 1.13.
pub mod csi {
    tonic::include_proto!("csi.v1");
}
