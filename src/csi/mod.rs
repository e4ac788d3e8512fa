//! The CSI gRPC services, and the one place where errors become status codes.
