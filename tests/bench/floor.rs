//! What no server can go below on this machine: moving the bytes through loopback, through the page cache and through the
//! cipher, each alone, measured in the same run.
//!
//! What loopback costs one side depends on the other: a kernel does the receiver's work for whom it finds elsewhere, and has more
//! of it with smaller pieces. So it is measured with a peer that only moves bytes, and with one that reads and writes
//! records as every client in TLS must.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Result, bail};
use rustix::time::{ClockId, clock_gettime};

use super::clients::{Access, Case};
use super::servers::Cipher;

/// Bytes that each part moves.
const BYTES: usize = 128 << 20;

/// How often each part is measured.
const TIMES: usize = 5;

/// The longest record of TLS.
const RECORD: usize = 16 << 10;

/// What a record has besides its content, and its part at the beginning.
const OVERHEAD: usize = 22;
const HEAD: usize = 5;

/// Bytes that pass through the cipher between two looks at the clock.
const IN_CACHE: usize = 128 << 10;

/// The most that is sent or received with one call.
const PIECE: usize = 256 << 10;

/// Seconds of processor time for a GiB.
#[derive(Clone, Copy)]
pub(crate) struct Floor {
    /// With a peer that does nothing else.
    pub(crate) loopback: f64,
    /// With a peer that encrypts or decrypts each record.
    pub(crate) with_client: f64,
    pub(crate) page_cache: f64,
    pub(crate) cipher: f64,
}

impl Floor {
    pub(crate) fn sum(&self) -> f64 {
        self.loopback + self.page_cache + self.cipher
    }

    pub(crate) fn sum_with_client(&self) -> f64 {
        self.with_client + self.page_cache + self.cipher
    }
}

pub(crate) fn measure(file: &Path, cipher: Cipher, case: &Case) -> Result<Floor> {
    let block = case.block as usize;
    // Requests that are in flight together can be moved together.
    let piece = (block * case.depth as usize).min(PIECE);
    let record = block.min(RECORD);
    let per_gib = (1_u64 << 30) as f64 / BYTES as f64;
    let access = case.access;
    let idle = || Peer { piece, key: None };
    let client = || -> Result<Peer> {
        Ok(Peer {
            piece: record + OVERHEAD,
            key: Some(aws_lc::key(cipher)?),
        })
    };
    Ok(Floor {
        loopback: median(|| loopback(access, piece, idle()))? * per_gib,
        with_client: median(|| loopback(access, piece, client()?))? * per_gib,
        page_cache: median(|| page_cache(file, access, block))? * per_gib,
        cipher: median(|| seal_or_open(cipher, access, record))? * per_gib,
    })
}

/// Of several: what loopback takes depends on where the two threads happen to run.
fn median(measure: impl FnMut() -> Result<f64>) -> Result<f64> {
    let mut found = std::iter::repeat_with(measure)
        .take(TIMES)
        .collect::<Result<Vec<_>>>()?;
    found.sort_by(f64::total_cmp);
    Ok(found[TIMES / 2])
}

/// The processor time of this thread so far, in seconds.
fn thread_time() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// The other end of the connection.
struct Peer {
    /// Bytes that it moves at a time.
    piece: usize,
    /// What it encrypts each piece with: decrypting takes as long.
    key: Option<aws_lc::Key>,
}

impl Peer {
    fn work(&self, buffer: &mut [u8]) -> Result<()> {
        match &self.key {
            Some(key) => aws_lc::seal(key, buffer),
            None => Ok(()),
        }
    }

    fn send(&self, socket: &mut TcpStream) -> Result<()> {
        let mut buffer = vec![7; self.piece];
        for _ in 0..BYTES / self.piece {
            self.work(&mut buffer)?;
            socket.write_all(&buffer)?;
        }
        Ok(())
    }

    fn receive(&self, socket: &mut TcpStream) -> Result<()> {
        let mut buffer = vec![0; self.piece];
        // A record's head says how long it is.
        let (head, rest) = buffer.split_at_mut(if self.key.is_some() { HEAD } else { 0 });
        loop {
            match socket
                .read_exact(head)
                .and_then(|()| socket.read_exact(rest))
            {
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(()),
                done => done?,
            }
            self.work(rest)?;
        }
    }
}

/// The processor time of one end, which moves `piece` bytes at a time.
fn loopback(access: Access, piece: usize, peer: Peer) -> Result<f64> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut socket = TcpStream::connect(listener.local_addr()?)?;
    let (mut other, _) = listener.accept()?;
    for end in [&socket, &other] {
        end.set_nodelay(true)?;
    }
    std::thread::scope(|scope| {
        let peer = scope.spawn(move || match access {
            Access::Read => peer.receive(&mut other),
            Access::Write => peer.send(&mut other),
        });
        let mut buffer = vec![7; piece];
        let began = thread_time();
        match access {
            Access::Read => {
                for _ in 0..BYTES / piece {
                    socket.write_all(&buffer)?;
                }
            }
            Access::Write => while socket.read(&mut buffer)? > 0 {},
        }
        let taken = thread_time() - began;
        drop(socket);
        match peer.join() {
            Ok(done) => done.map(|()| taken),
            Err(_) => bail!("the other end failed"),
        }
    })
}

fn page_cache(file: &Path, access: Access, block: usize) -> Result<f64> {
    let file = File::options().read(true).write(true).open(file)?;
    let blocks = file.metadata()?.len() / block as u64;
    let mut buffer = vec![7; block];
    let began = thread_time();
    for turn in 0..(BYTES / block) as u64 {
        // All over the file, as the clients go.
        let offset = turn * 7919 % blocks * block as u64;
        match access {
            Access::Read => file.read_exact_at(&mut buffer, offset)?,
            Access::Write => file.write_all_at(&buffer, offset)?,
        }
    }
    Ok(thread_time() - began)
}

/// The faster of the libraries that the server chooses from.
fn seal_or_open(cipher: Cipher, access: Access, record: usize) -> Result<f64> {
    let one = aws_lc::seal_or_open(cipher, access, record)?;
    let other = with_ring::seal_or_open(cipher, access, record)?;
    Ok(one.min(other))
}

/// Both libraries have the same interface, under names of their own.
macro_rules! cipher_alone {
    ($module:ident, $library:ident) => {
        mod $module {
            use $library::aead::{
                AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey,
            };

            use super::*;

            pub(super) type Key = LessSafeKey;

            fn unusable<E>(_: E) -> anyhow::Error {
                anyhow::anyhow!("{} refuses", stringify!($library))
            }

            fn nonce() -> Nonce {
                Nonce::assume_unique_for_key([5; 12])
            }

            fn aad() -> Aad<[u8; 5]> {
                Aad::from([0x17, 3, 3, 0, 0])
            }

            pub(super) fn key(cipher: Cipher) -> Result<Key> {
                let algorithm = match cipher {
                    Cipher::Aes256Gcm => &AES_256_GCM,
                    Cipher::ChaCha20Poly1305 => &CHACHA20_POLY1305,
                };
                let key = UnboundKey::new(algorithm, &[3; 32]).map_err(unusable)?;
                Ok(LessSafeKey::new(key))
            }

            pub(super) fn seal(key: &Key, buffer: &mut [u8]) -> Result<()> {
                key.seal_in_place_separate_tag(nonce(), aad(), buffer)
                    .map(drop)
                    .map_err(unusable)
            }

            pub(super) fn seal_or_open(
                cipher: Cipher,
                access: Access,
                record: usize,
            ) -> Result<f64> {
                let key = key(cipher)?;
                let mut sealed = vec![7; record];
                key.seal_in_place_append_tag(nonce(), aad(), &mut sealed)
                    .map_err(unusable)?;
                // So many that reading the clock costs nothing beside them, so few that the processor's cache holds them.
                let mut buffers = vec![sealed.clone(); (IN_CACHE / record).max(1)];
                let mut spent = 0.0;
                for _ in 0..BYTES / record / buffers.len() {
                    for buffer in &mut buffers {
                        buffer.copy_from_slice(&sealed);
                    }
                    let began = thread_time();
                    for buffer in &mut buffers {
                        match access {
                            Access::Read => seal(&key, &mut buffer[..record])?,
                            Access::Write => key
                                .open_in_place(nonce(), aad(), buffer)
                                .map(drop)
                                .map_err(unusable)?,
                        }
                    }
                    spent += thread_time() - began;
                }
                Ok(spent)
            }
        }
    };
}

cipher_alone!(aws_lc, aws_lc_rs);
cipher_alone!(with_ring, ring);
