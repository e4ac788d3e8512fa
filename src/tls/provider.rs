//! Which library does which part of the cryptography.
//!
//! aws-lc does all of it but one: AES-GCM on processors for which it has no wide code. `docs/design/decisions.md` says why.

use std::sync::{Arc, LazyLock};

use rustls::CipherSuite;
use rustls::SupportedCipherSuite;
use rustls::crypto::aws_lc_rs::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256;
use rustls::crypto::{CryptoProvider, aws_lc_rs, ring};

/// The provider is always named: rustls' process-wide default is for libraries that cannot be told.
pub(super) fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
        let mut provider = aws_lc_rs::default_provider();
        if ring_is_wider() {
            provider.cipher_suites.iter_mut().for_each(widen);
        }
        Arc::new(provider)
    });
    Arc::clone(&PROVIDER)
}

/// For sessions that the kernel takes over: the one cipher whose keys last.
pub(super) fn kernel_provider() -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider {
        cipher_suites: vec![TLS13_CHACHA20_POLY1305_SHA256],
        ..aws_lc_rs::default_provider()
    })
}

/// Whether this processor encrypts two blocks of AES at a time (VAES), but not with the 512-bit registers that aws-lc wants
/// for that; ring is content with 256 bits.
pub(super) fn ring_is_wider() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        has!("avx2") && has!("vaes") && has!("vpclmulqdq") && !has!("avx512f")
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

fn widen(suite: &mut SupportedCipherSuite) {
    match suite.suite() {
        CipherSuite::TLS13_AES_256_GCM_SHA384 => {
            *suite = ring::cipher_suite::TLS13_AES_256_GCM_SHA384;
        }
        CipherSuite::TLS13_AES_128_GCM_SHA256 => {
            *suite = ring::cipher_suite::TLS13_AES_128_GCM_SHA256;
        }
        _ => {}
    }
}

/// Begins to collect the randomness that the first handshake would otherwise wait for.
///
/// The first random number of a process costs aws-lc 50 to 130 ms of measuring the processor's jitter. A thread does
/// that now; whoever needs a random number before it has, waits as long as without it.
pub fn warm_up() {
    let warm = || {
        // Where this fails, so will whoever needs randomness, and say so.
        let _ = provider().secure_random.fill(&mut [0; 8]);
    };
    // Without a thread nothing is lost but time.
    let _ = std::thread::Builder::new()
        .name("warm-up".into())
        .spawn(warm);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_encrypts_the_suites_and_their_order_are_the_same() {
        let suites = |provider: &CryptoProvider| -> Vec<_> {
            let suites = provider.cipher_suites.iter();
            suites.map(SupportedCipherSuite::suite).collect()
        };
        assert_eq!(suites(&provider()), suites(&aws_lc_rs::default_provider()));
        let mut widened = aws_lc_rs::default_provider();
        widened.cipher_suites.iter_mut().for_each(widen);
        assert_eq!(suites(&widened), suites(&provider()));
    }

    #[test]
    fn a_kernel_session_has_one_cipher_and_it_is_aws_lcs() {
        assert_eq!(
            kernel_provider().cipher_suites,
            [TLS13_CHACHA20_POLY1305_SHA256]
        );
    }
}
