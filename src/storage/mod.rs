//! Pools and backing stores: where volume data lives on a storage host.
