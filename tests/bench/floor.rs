//! What no server can go below on this machine: moving the bytes through loopback, through the page cache and through the
//! cipher, each alone, measured in the same run.

use std::fs::File;
use std::io::{Read, Write};
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

/// Bytes that pass through the cipher between two looks at the clock.
const IN_CACHE: usize = 128 << 10;

/// The most that is sent or received with one call.
const PIECE: usize = 256 << 10;

/// Seconds of processor time for a GiB.
#[derive(Clone, Copy)]
pub(crate) struct Floor {
    pub(crate) loopback: f64,
    pub(crate) page_cache: f64,
    pub(crate) cipher: f64,
}

impl Floor {
    pub(crate) fn sum(&self) -> f64 {
        self.loopback + self.page_cache + self.cipher
    }
}

pub(crate) fn measure(file: &Path, cipher: Cipher, case: &Case) -> Result<Floor> {
    let block = case.block as usize;
    // Requests that are in flight together can be moved together.
    let piece = (block * case.depth as usize).min(PIECE);
    let per_gib = (1_u64 << 30) as f64 / BYTES as f64;
    Ok(Floor {
        loopback: median(|| loopback(case.access, piece))? * per_gib,
        page_cache: median(|| page_cache(file, case.access, block))? * per_gib,
        cipher: median(|| seal_or_open(cipher, case.access, block.min(RECORD)))? * per_gib,
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

fn loopback(access: Access, piece: usize) -> Result<f64> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let receiver = std::thread::spawn(move || -> std::io::Result<f64> {
        let (mut socket, _) = listener.accept()?;
        let mut buffer = vec![0; piece];
        let began = thread_time();
        while socket.read(&mut buffer)? > 0 {}
        Ok(thread_time() - began)
    });
    let mut socket = TcpStream::connect(address)?;
    socket.set_nodelay(true)?;
    let buffer = vec![7; piece];
    let began = thread_time();
    for _ in 0..BYTES / piece {
        socket.write_all(&buffer)?;
    }
    let sending = thread_time() - began;
    drop(socket);
    let Ok(receiving) = receiver.join() else {
        bail!("the receiver failed");
    };
    Ok(match access {
        Access::Read => sending,
        Access::Write => receiving?,
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

            pub(super) fn seal_or_open(
                cipher: Cipher,
                access: Access,
                record: usize,
            ) -> Result<f64> {
                let algorithm = match cipher {
                    Cipher::Aes256Gcm => &AES_256_GCM,
                    Cipher::ChaCha20Poly1305 => &CHACHA20_POLY1305,
                };
                let unusable = |_| anyhow::anyhow!("{} has no {cipher}", stringify!($library));
                let key = LessSafeKey::new(UnboundKey::new(algorithm, &[3; 32]).map_err(unusable)?);
                let nonce = || Nonce::assume_unique_for_key([5; 12]);
                let aad = || Aad::from([0x17, 3, 3, 0, 0]);
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
                            Access::Read => key
                                .seal_in_place_separate_tag(nonce(), aad(), &mut buffer[..record])
                                .map(drop),
                            Access::Write => key.open_in_place(nonce(), aad(), buffer).map(drop),
                        }
                        .map_err(unusable)?;
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
