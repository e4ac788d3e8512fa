//! The network: a bridge in a namespace of the test's own, where the control plane is, and a tap for each node.

use std::process::Command;

use anyhow::Result;

use super::process::output;

/// Where the control plane and, seen from the nodes, everything outside of the cluster is.
pub(crate) const GATEWAY: &str = "198.51.100.1";

/// Services; the first address is the API server's.
pub(crate) const SERVICES: &str = "198.19.0.0/16";

pub(crate) fn node_address(index: usize) -> String {
    format!("198.51.100.{}", 10 + index)
}

/// The addresses of a node's pods.
pub(crate) fn pod_range(index: usize) -> String {
    format!("198.18.{index}.0/24")
}

pub(crate) fn tap(index: usize) -> String {
    format!("tap{index}")
}

/// Everything for so many nodes, in the namespace that this process is in.
pub(crate) fn lay_out(nodes: usize) -> Result<()> {
    ip("link set lo up")?;
    ip("link add cluster type bridge")?;
    ip(&format!("address add {GATEWAY}/24 dev cluster"))?;
    ip("link set cluster up")?;
    for index in 1..=nodes {
        let tap = tap(index);
        ip(&format!("tuntap add dev {tap} mode tap"))?;
        ip(&format!("link set {tap} master cluster up"))?;
        let (range, address) = (pod_range(index), node_address(index));
        ip(&format!("route add {range} via {address}"))?;
    }
    // The API server calls Services in the cluster, if any, by way of a node.
    ip(&format!("route add {SERVICES} via {}", node_address(1)))
}

/// Cuts a node off, or joins it again. The tap stays up: user-mode Linux never reads again from one that was down.
pub(crate) fn connect(node: usize, connected: bool) -> Result<()> {
    let place = if connected {
        "master cluster"
    } else {
        "nomaster"
    };
    ip(&format!("link set {} {place}", tap(node)))
}

fn ip(arguments: &str) -> Result<()> {
    output(Command::new("ip").args(arguments.split(' '))).map(drop)
}
