//! One machine without a cluster: state and Secrets in directories, servers as supervised processes.
