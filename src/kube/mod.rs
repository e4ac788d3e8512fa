//! Hawser in a Kubernetes cluster: the API objects, and the roles that meet in them.
//!
//! `api` has the objects and says who writes which of their fields. Roles never speak to each other: each watches the
//! objects and writes its own fields, so that any of them may be away for a while.

pub mod api;
pub mod apply;
pub mod claim;
pub mod controller;
pub mod convert;
pub mod follow;
pub mod hook;
pub mod lease;
pub mod manifests;
pub mod volumes;
