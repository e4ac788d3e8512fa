//! TLS in the kernel: gives the traffic keys of a finished handshake to a TCP socket.
//!
//! A socket on which only a part of this succeeded still carries data, in plaintext (K2). So [`Encrypted`] is the
//! only thing that comes out of here: it exists only when both directions were installed *and* read back, and
//! every failure closes the socket.

use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use rustls::{ConnectionTrafficSecrets, ExtractedSecrets};

use super::sockopt;

/// `struct tls12_crypto_info_chacha20_poly1305`: version, cipher, IV, key, an empty salt, record sequence.
const LENGTH: usize = size_of::<libc::tls12_crypto_info_chacha20_poly1305>();

/// A TCP socket whose every byte the kernel encrypts and decrypts.
#[derive(Debug)]
pub struct Encrypted(TcpStream);

/// Why the kernel does not encrypt a socket. The socket is closed.
#[derive(Debug, thiserror::Error)]
pub enum KernelTlsError {
    #[error("the kernel refused TLS on the socket; load its module with `modprobe tls`")]
    Protocol(#[source] io::Error),
    #[error(
        "the kernel refused the {direction} key; if it lacks the cipher, `modprobe chacha20poly1305` loads it"
    )]
    Key {
        direction: Direction,
        #[source]
        source: io::Error,
    },
    #[error("the kernel does not say which {direction} key it uses")]
    ReadBack {
        direction: Direction,
        #[source]
        source: io::Error,
    },
    #[error("the kernel says that it uses another {direction} key than the one it was given")]
    Differs { direction: Direction },
    #[error(
        "the session uses AES-GCM, but a kernel session uses ChaCha20-Poly1305: its keys never have to change"
    )]
    Cipher,
}

/// Which of a socket's two keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    Send,
    Receive,
}

impl std::fmt::Display for Direction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Send => "sending",
            Self::Receive => "receiving",
        })
    }
}

impl Direction {
    const fn option(self) -> libc::c_int {
        match self {
            Self::Send => libc::TLS_TX,
            Self::Receive => libc::TLS_RX,
        }
    }
}

impl Encrypted {
    /// Hands the connection's traffic keys (TLS 1.3) to the kernel. No byte of either direction may be buffered
    /// outside the kernel any more.
    pub fn new(socket: TcpStream, secrets: ExtractedSecrets) -> Result<Self, KernelTlsError> {
        let keys = [
            (Direction::Send, Keys::new(secrets.tx.0, &secrets.tx.1)?),
            (Direction::Receive, Keys::new(secrets.rx.0, &secrets.rx.1)?),
        ];
        sockopt::set(socket.as_fd(), libc::SOL_TCP, libc::TCP_ULP, b"tls")
            .map_err(KernelTlsError::Protocol)?;
        for (direction, keys) in &keys {
            let direction = *direction;
            sockopt::set(socket.as_fd(), libc::SOL_TLS, direction.option(), &keys.0)
                .map_err(|source| KernelTlsError::Key { direction, source })?;
        }
        for (direction, keys) in &keys {
            let direction = *direction;
            let mut used = Keys([0; LENGTH]);
            let length = sockopt::read(
                socket.as_fd(),
                libc::SOL_TLS,
                direction.option(),
                &mut used.0,
            )
            .map_err(|source| KernelTlsError::ReadBack { direction, source })?;
            if length != LENGTH || used.0 != keys.0 {
                return Err(KernelTlsError::Differs { direction });
            }
        }
        Ok(Self(socket))
    }
}

impl AsFd for Encrypted {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Encrypted {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// One direction's keys as the kernel takes them; wiped when dropped.
struct Keys([u8; LENGTH]);

impl Keys {
    fn new(sequence: u64, secrets: &ConnectionTrafficSecrets) -> Result<Self, KernelTlsError> {
        let ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } = secrets else {
            return Err(KernelTlsError::Cipher);
        };
        let mut keys = Self([0; LENGTH]);
        let mut rest = keys.0.as_mut_slice();
        for part in [
            &libc::TLS_1_3_VERSION.to_ne_bytes()[..],
            &libc::TLS_CIPHER_CHACHA20_POLY1305.to_ne_bytes(),
            iv.as_ref(),
            key.as_ref(),
            &sequence.to_be_bytes(),
        ] {
            let Some((target, after)) = rest.split_at_mut_checked(part.len()) else {
                return Err(KernelTlsError::Cipher);
            };
            target.copy_from_slice(part);
            rest = after;
        }
        Ok(keys)
    }
}

impl Drop for Keys {
    fn drop(&mut self) {
        self.0.fill(0);
        // Without a reader after it the compiler might leave the wiping out.
        std::hint::black_box(&mut self.0);
    }
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use rustls::crypto::cipher::{AeadKey, Iv};

    use super::*;

    fn chacha(key: u8, iv: u8) -> ConnectionTrafficSecrets {
        ConnectionTrafficSecrets::Chacha20Poly1305 {
            key: AeadKey::from([key; 32]),
            iv: Iv::from([iv; 12]),
        }
    }

    #[test]
    fn keys_lie_where_the_kernel_looks_for_them() {
        type Info = libc::tls12_crypto_info_chacha20_poly1305;
        let Keys(ref bytes) = Keys::new(0x0102_0304_0506_0708, &chacha(0xaa, 0xbb)).unwrap();
        assert_eq!(bytes.len(), 56);
        assert_eq!(bytes[..4], [0x04, 0x03, 54, 0]);
        assert_eq!(bytes[offset_of!(Info, iv)..][..12], [0xbb; 12]);
        assert_eq!(bytes[offset_of!(Info, key)..][..32], [0xaa; 32]);
        assert_eq!(bytes[offset_of!(Info, rec_seq)..], [1, 2, 3, 4, 5, 6, 7, 8]);
    }

    #[test]
    fn k4_a_cipher_with_a_record_limit_is_refused() {
        let secrets = ConnectionTrafficSecrets::Aes256Gcm {
            key: AeadKey::from([1; 32]),
            iv: Iv::from([2; 12]),
        };
        assert!(matches!(
            Keys::new(0, &secrets),
            Err(KernelTlsError::Cipher)
        ));
    }
}
