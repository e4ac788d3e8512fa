//! Other people's NBD clients against `hawser serve`: what they negotiate, and that every byte arrives.
//!
//! libnbd, QEMU and fio speak TLS 1.3; nbd-client has only TLS 1.2 and needs `--tls12`.

mod bench;
mod libnbd;
mod nbd_client;
mod qemu;
