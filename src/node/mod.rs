//! `hawser node`: the plugin on every node of a cluster.

mod registration;
