//! Identities and certificates: Secret-shaped directories, the managed certificate authority, rustls configurations, reload.
