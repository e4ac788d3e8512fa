//! The records of a TLS 1.3 session after its handshake, sealed and opened where they lie.
//!
//! rustls seals into memory of its own, and hands out what it opened as a copy: two more of each byte on either side. So
//! it makes the handshake and all keys, also those of a KeyUpdate, and the records are made here, out of its nonce, its
//! additional data and the cipher that the provider has chosen. A sequence number is counted before it is used, so
//! none can seal two records.

use rustls::crypto::cipher::{InboundOpaqueMessage, Iv, MessageDecrypter, Nonce, make_tls13_aad};
use rustls::kernel::KernelConnection;
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::{ConnectionTrafficSecrets, ContentType, Error, ProtocolVersion, Tls13CipherSuite};

use super::provider::ring_is_wider;

/// Bytes before a record's content (RFC 8446, 5.2).
pub const HEAD: usize = 5;

/// Bytes behind it: its type and the tag, which is as long in all suites.
pub const TAIL: usize = 1 + TAG;
const TAG: usize = 16;

/// The longest content of a record.
pub const CONTENT: usize = 16 << 10;

/// The longest ciphertext of a record.
const CIPHERTEXT: usize = CONTENT + 256;

/// Records that may be sealed between the decision to change the keys and the change: far more than ever wait.
const MARGIN: u64 = 1 << 16;

/// The keys of a session, for both directions.
pub struct Records {
    keys: KernelConnection<ServerConnectionData>,
    suite: &'static Tls13CipherSuite,
    sealer: Sealer,
    opener: Opener,
    /// Records that are sealed with the same keys, before they are changed.
    lasts: u64,
}

impl Records {
    /// Takes a session over from rustls, which has made the handshake and has nothing left to send.
    pub fn take_over(tls: UnbufferedServerConnection) -> Result<Self, Error> {
        let (secrets, keys) = tls.dangerous_into_kernel_connection()?;
        let suite = keys.negotiated_cipher_suite();
        let suite = suite
            .tls13()
            .ok_or_else(|| Error::General("not a TLS 1.3 session".to_owned()))?;
        Ok(Self {
            keys,
            lasts: suite.common.confidentiality_limit - MARGIN,
            suite,
            sealer: Sealer::new(secrets.tx)?,
            opener: Opener::new(suite, secrets.rx)?,
        })
    }

    /// Seals a record: the content lies between [`HEAD`] and [`TAIL`] bytes, which are filled in.
    pub fn seal(&mut self, content: ContentType, record: &mut [u8]) -> Result<(), Error> {
        self.sealer.seal(content, record)
    }

    /// Opens a record, of [`length`] bytes: what it is, and how many bytes of content are behind its [`HEAD`].
    pub fn open(&mut self, record: &mut [u8]) -> Result<(ContentType, usize), Error> {
        self.opener.open(record)
    }

    /// Whether so much was sealed with these keys that it is time for a KeyUpdate.
    #[must_use]
    pub fn are_worn(&self) -> bool {
        self.sealer.sequence >= self.lasts
    }

    /// How many records were sealed with these keys.
    #[cfg(test)]
    pub(crate) fn sealed(&self) -> u64 {
        self.sealer.sequence
    }

    #[cfg(test)]
    pub(crate) fn wear_out_after(&mut self, records: u64) {
        self.lasts = records;
    }

    /// Seals with the next keys from now on: a KeyUpdate was sealed.
    pub fn change_sealer(&mut self) -> Result<(), Error> {
        self.sealer = Sealer::new(self.keys.update_tx_secret()?)?;
        Ok(())
    }

    /// Opens with the next keys from now on: a KeyUpdate was received.
    pub fn change_opener(&mut self) -> Result<(), Error> {
        self.opener = Opener::new(self.suite, self.keys.update_rx_secret()?)?;
        Ok(())
    }
}

/// How long the record at the beginning of `received` is with all of its parts; `None` until its head is there.
pub fn length(received: &[u8]) -> Result<Option<usize>, Error> {
    let &[content, _, _, high, low, ..] = received else {
        return Ok(None);
    };
    // Nothing else is sent after the handshake, and the version says nothing (RFC 8446, 5.1 and 5.2).
    if ContentType::from(content) != ContentType::ApplicationData {
        return Err(Error::InappropriateMessage {
            expect_types: vec![ContentType::ApplicationData],
            got_type: ContentType::from(content),
        });
    }
    let ciphertext = usize::from(u16::from_be_bytes([high, low]));
    if ciphertext > CIPHERTEXT {
        return Err(Error::PeerSentOversizedRecord);
    }
    Ok(Some(HEAD + ciphertext))
}

struct Sealer {
    key: Key,
    iv: Iv,
    sequence: u64,
}

impl Sealer {
    fn new((sequence, secrets): (u64, ConnectionTrafficSecrets)) -> Result<Self, Error> {
        let (key, iv) = Key::new(secrets)?;
        Ok(Self { key, iv, sequence })
    }

    fn seal(&mut self, content: ContentType, record: &mut [u8]) -> Result<(), Error> {
        let sequence = self.sequence;
        self.sequence = sequence.checked_add(1).ok_or(Error::EncryptError)?;
        let length = record.len().checked_sub(HEAD).ok_or(Error::EncryptError)?;
        if !(TAIL..=CONTENT + TAIL).contains(&length) {
            return Err(Error::EncryptError);
        }
        let (head, rest) = record.split_at_mut(HEAD);
        let (inner, tag) = rest.split_at_mut(length - TAG);
        inner[length - TAIL] = content.into();
        let data = make_tls13_aad(length);
        head.copy_from_slice(&data);
        tag.copy_from_slice(&self.key.seal(Nonce::new(&self.iv, sequence), data, inner)?);
        Ok(())
    }
}

struct Opener {
    key: Box<dyn MessageDecrypter>,
    sequence: u64,
}

impl Opener {
    fn new(
        suite: &Tls13CipherSuite,
        (sequence, secrets): (u64, ConnectionTrafficSecrets),
    ) -> Result<Self, Error> {
        let (ConnectionTrafficSecrets::Aes128Gcm { key, iv }
        | ConnectionTrafficSecrets::Aes256Gcm { key, iv }
        | ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv }) = secrets
        else {
            return Err(unknown_cipher());
        };
        Ok(Self {
            key: suite.aead_alg.decrypter(key, iv),
            sequence,
        })
    }

    fn open(&mut self, record: &mut [u8]) -> Result<(ContentType, usize), Error> {
        let sequence = self.sequence;
        self.sequence = sequence.checked_add(1).ok_or(Error::DecryptError)?;
        let ciphertext = record.get_mut(HEAD..).ok_or(Error::DecryptError)?;
        let record = InboundOpaqueMessage::new(
            ContentType::ApplicationData,
            ProtocolVersion::TLSv1_2,
            ciphertext,
        );
        let opened = self.key.decrypt(record, sequence)?;
        Ok((opened.typ, opened.payload.len()))
    }
}

/// A key in the hands of the library that is quicker with it here.
#[expect(
    clippy::large_enum_variant,
    reason = "there is one in a session, and it is used for each record"
)]
enum Key {
    AwsLc(aws_lc_rs::aead::LessSafeKey),
    Ring(ring::aead::LessSafeKey),
}

impl Key {
    fn new(secrets: ConnectionTrafficSecrets) -> Result<(Self, Iv), Error> {
        use aws_lc_rs::aead as aws_lc;
        use ring::aead as ring;
        let wider = ring_is_wider();
        Ok(match secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } if wider => {
                (Self::ring(&ring::AES_128_GCM, key.as_ref())?, iv)
            }
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } if wider => {
                (Self::ring(&ring::AES_256_GCM, key.as_ref())?, iv)
            }
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => {
                (Self::aws_lc(&aws_lc::AES_128_GCM, key.as_ref())?, iv)
            }
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => {
                (Self::aws_lc(&aws_lc::AES_256_GCM, key.as_ref())?, iv)
            }
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => {
                (Self::aws_lc(&aws_lc::CHACHA20_POLY1305, key.as_ref())?, iv)
            }
            _ => return Err(unknown_cipher()),
        })
    }

    fn ring(cipher: &'static ring::aead::Algorithm, key: &[u8]) -> Result<Self, Error> {
        let key = ring::aead::UnboundKey::new(cipher, key).map_err(|_| Error::EncryptError)?;
        Ok(Self::Ring(ring::aead::LessSafeKey::new(key)))
    }

    fn aws_lc(cipher: &'static aws_lc_rs::aead::Algorithm, key: &[u8]) -> Result<Self, Error> {
        let key = aws_lc_rs::aead::UnboundKey::new(cipher, key).map_err(|_| Error::EncryptError)?;
        Ok(Self::AwsLc(aws_lc_rs::aead::LessSafeKey::new(key)))
    }

    /// Encrypts in place; the tag.
    fn seal(&self, nonce: Nonce, data: [u8; HEAD], inner: &mut [u8]) -> Result<[u8; TAG], Error> {
        let mut copy = [0; TAG];
        match self {
            Self::AwsLc(key) => {
                use aws_lc_rs::aead::{Aad, Nonce as Once};
                let once = Once::assume_unique_for_key(nonce.0);
                let tag = key
                    .seal_in_place_separate_tag(once, Aad::from(data), inner)
                    .map_err(|_| Error::EncryptError)?;
                copy.copy_from_slice(tag.as_ref());
            }
            Self::Ring(key) => {
                use ring::aead::{Aad, Nonce as Once};
                let once = Once::assume_unique_for_key(nonce.0);
                let tag = key
                    .seal_in_place_separate_tag(once, Aad::from(data), inner)
                    .map_err(|_| Error::EncryptError)?;
                copy.copy_from_slice(tag.as_ref());
            }
        }
        Ok(copy)
    }
}

fn unknown_cipher() -> Error {
    Error::General("the session's cipher is not known here".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_libraries_seal_the_same() {
        let ciphers = [
            (&ring::aead::AES_128_GCM, &aws_lc_rs::aead::AES_128_GCM),
            (&ring::aead::AES_256_GCM, &aws_lc_rs::aead::AES_256_GCM),
            (
                &ring::aead::CHACHA20_POLY1305,
                &aws_lc_rs::aead::CHACHA20_POLY1305,
            ),
        ];
        for (ring, aws_lc) in ciphers {
            let key = &[7; 32][..ring.key_len()];
            let sealed = [
                Key::ring(ring, key).unwrap(),
                Key::aws_lc(aws_lc, key).unwrap(),
            ]
            .map(|key| {
                let mut inner = vec![3; CONTENT];
                let nonce = Nonce([9; 12]);
                let tag = key.seal(nonce, make_tls13_aad(CONTENT), &mut inner);
                (inner, tag.unwrap())
            });
            assert_ne!(sealed[0].0, [3; CONTENT]);
            assert_eq!(sealed[0], sealed[1]);
        }
    }

    #[test]
    fn a_record_is_as_long_as_its_head_says_and_no_longer_than_allowed() {
        assert_eq!(length(&[23, 3, 3, 1]).unwrap(), None);
        assert_eq!(length(&[23, 3, 3, 1, 2, 9]).unwrap(), Some(HEAD + 258));
        let longest = u16::try_from(CIPHERTEXT).unwrap();
        let [high, low] = longest.to_be_bytes();
        assert_eq!(
            length(&[23, 3, 3, high, low]).unwrap(),
            Some(HEAD + CIPHERTEXT)
        );
        assert_eq!(
            length(&[23, 3, 3, high, low + 1]),
            Err(Error::PeerSentOversizedRecord)
        );
        for other in [20, 21, 22, 24, 0] {
            let refused = length(&[other, 3, 3, 0, 32]);
            assert!(matches!(refused, Err(Error::InappropriateMessage { .. })));
        }
    }
}
