//! Writers that know what they wrote, and read it back while everything else goes wrong.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

const BLOCK: usize = 4096;
/// Blocks of each writer.
const BLOCKS: u64 = 64;
const WRITERS: u64 = 4;

/// Memory that O_DIRECT takes.
struct Aligned {
    buffer: Vec<u8>,
    start: usize,
}

impl Aligned {
    fn new(length: usize) -> Self {
        let buffer = vec![0; length + BLOCK];
        let start = buffer.as_ptr().align_offset(BLOCK);
        Self { buffer, start }
    }

    fn bytes(&mut self) -> &mut [u8] {
        let length = self.buffer.len() - BLOCK;
        &mut self.buffer[self.start..][..length]
    }
}

/// Some writers on one device, until stopped.
pub(crate) struct Load {
    writers: Vec<JoinHandle<Writer>>,
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    /// The first thing that went wrong.
    failure: Arc<Mutex<Option<anyhow::Error>>>,
    path: PathBuf,
}

struct Writer {
    file: File,
    first: u64,
    /// The generation of each block.
    written: Vec<u64>,
    slowest: Duration,
}

impl Load {
    pub(crate) fn start(path: &Path) -> Result<Self> {
        let (stop, done) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let failure = Arc::new(Mutex::new(None));
        open(path)?.write_all_at(
            Aligned::new(WRITERS as usize * BLOCKS as usize * BLOCK).bytes(),
            0,
        )?;
        let writers = (0..WRITERS)
            .map(|number| {
                let mut writer = Writer {
                    file: open(path)?,
                    first: number * BLOCKS,
                    written: vec![0; BLOCKS as usize],
                    slowest: Duration::ZERO,
                };
                let (stop, done, failure) = (stop.clone(), done.clone(), failure.clone());
                Ok(std::thread::spawn(move || {
                    if let Err(error) = writer.work(&stop, &done) {
                        failure.lock().unwrap().get_or_insert(error);
                    }
                    writer
                }))
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            writers,
            stop,
            done,
            failure,
            path: path.to_owned(),
        })
    }

    /// Requests done so far.
    pub(crate) fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Fails as soon as anything went wrong.
    pub(crate) fn check(&self) -> Result<()> {
        self.failure.lock().unwrap().take().map_or(Ok(()), Err)
    }

    /// Waits until so many more requests were done.
    pub(crate) async fn go_on(&self, more: u64) -> Result<()> {
        let wanted = self.done() + more;
        crate::node::until("the load goes on", || {
            self.check()?;
            Ok(self.done() >= wanted)
        })
        .await
    }

    /// Ends the writers; fails if any request failed or any byte is wrong, on the device or in the backing file.
    pub(crate) fn finish(self, data: &Path) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        let (device, data) = (open(&self.path)?, File::open(data)?);
        let mut slowest = Duration::ZERO;
        for writer in self.writers {
            let writer = writer.join().map_err(|_| anyhow!("a writer panicked"))?;
            if let Some(failure) = self.failure.lock().unwrap().take() {
                return Err(failure);
            }
            slowest = slowest.max(writer.slowest);
            for (index, generation) in (0..).zip(&writer.written) {
                let block = writer.first + index;
                let mut bytes = Aligned::new(BLOCK);
                device.read_exact_at(bytes.bytes(), block * BLOCK as u64)?;
                check(bytes.bytes(), block, *generation).context("on the device")?;
                data.read_exact_at(bytes.bytes(), block * BLOCK as u64)?;
                check(bytes.bytes(), block, *generation).context("in the backing file")?;
            }
        }
        println!(
            "{} requests, the slowest took {slowest:?}",
            self.done.load(Ordering::Relaxed)
        );
        Ok(())
    }
}

impl Writer {
    fn work(&mut self, stop: &AtomicBool, done: &AtomicU64) -> Result<()> {
        let mut bytes = Aligned::new(BLOCK);
        let mut random = self.first + 1;
        while !stop.load(Ordering::Relaxed) {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let index = (random >> 33) % BLOCKS;
            let (block, generation) = (self.first + index, random | 1);
            let started = Instant::now();
            if random & (1 << 40) == 0 {
                fill(bytes.bytes(), block, generation);
                self.file
                    .write_all_at(bytes.bytes(), block * BLOCK as u64)
                    .with_context(|| format!("writing block {block}"))?;
                self.written[index as usize] = generation;
            } else {
                self.file
                    .read_exact_at(bytes.bytes(), block * BLOCK as u64)
                    .with_context(|| format!("reading block {block}"))?;
                check(bytes.bytes(), block, self.written[index as usize])?;
            }
            self.slowest = self.slowest.max(started.elapsed());
            done.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)
}

/// A block says all over which one it is and when it was written; generation 0 is a block that never was.
fn fill(bytes: &mut [u8], block: u64, generation: u64) {
    let word = if generation == 0 {
        0
    } else {
        generation ^ (block << 48)
    };
    for chunk in bytes.chunks_exact_mut(8) {
        chunk.copy_from_slice(&word.to_le_bytes());
    }
}

fn check(bytes: &[u8], block: u64, generation: u64) -> Result<()> {
    let mut expected = vec![0; bytes.len()];
    fill(&mut expected, block, generation);
    ensure!(bytes == expected, "block {block} has wrong bytes");
    Ok(())
}
