//! gRPC: the generated messages, clients and servers of `proto/`, and the unix sockets that carry them.

pub mod socket;

macro_rules! generated {
    ($(#[$doc:meta])* $name:ident = $package:literal) => {
        $(#[$doc])*
        #[allow(
            clippy::all,
            clippy::panic,
            clippy::use_self,
            clippy::semicolon_if_nothing_returned,
            clippy::uninlined_format_args,
            unreachable_pub,
            reason = "generated code keeps its generator's style"
        )]
        pub mod $name {
            tonic::include_proto!($package);
        }
    };
}

generated! {
    /// The control socket of a volume's server.
    control = "hawser.control.v1"
}

generated! {
    /// The Container Storage Interface 1.13.
    csi = "csi.v1"
}

generated! {
    /// The kubelet's registration of plugins.
    pluginregistration = "pluginregistration"
}
