//! A program that writes, as a database would: a block, then fsync, over and over; and that remembers what it wrote.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

const BLOCK: usize = 4096;
const BLOCKS: u64 = 512;

/// A writer at work.
#[derive(Debug)]
pub(super) struct Load {
    file: PathBuf,
    stop: Arc<AtomicBool>,
    writes: Arc<AtomicU64>,
    thread: JoinHandle<anyhow::Result<Written>>,
}

/// What a writer did.
#[derive(Debug)]
pub(super) struct Written {
    file: PathBuf,
    pub(super) writes: u64,
    /// The longest that one write with its fsync took.
    pub(super) longest: Duration,
    latest: Vec<u64>,
}

impl Load {
    pub(super) fn begin(file: PathBuf) -> anyhow::Result<Self> {
        let open = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .open(&file)
            .with_context(|| format!("create {}", file.display()))?;
        let (stop, writes) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let thread = {
            let (file, stop, writes) = (file.clone(), stop.clone(), writes.clone());
            std::thread::spawn(move || write(&open, file, &stop, &writes))
        };
        Ok(Self {
            file,
            stop,
            writes,
            thread,
        })
    }

    /// Waits until so many more writes have become durable.
    pub(super) async fn progress(&self, more: u64, within: Duration) -> anyhow::Result<()> {
        let goal = self.writes.load(Ordering::Relaxed) + more;
        let deadline = Instant::now() + within;
        while self.writes.load(Ordering::Relaxed) < goal {
            if self.thread.is_finished() {
                bail!("the writer on {} has ended", self.file.display());
            }
            if Instant::now() > deadline {
                bail!(
                    "the writer on {} stands still for {within:?}",
                    self.file.display()
                );
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }

    pub(super) fn end(self) -> anyhow::Result<Written> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread
            .join()
            .map_err(|_| anyhow::anyhow!("the writer panicked"))?
    }
}

impl Written {
    /// Reads everything back.
    pub(super) fn verify(&self) -> anyhow::Result<()> {
        let file = File::open(&self.file)?;
        let mut block = vec![0; BLOCK];
        for (at, &sequence) in (0_u64..).zip(&self.latest) {
            if sequence == 0 {
                continue;
            }
            file.read_exact_at(&mut block, at * BLOCK as u64)?;
            if block != pattern(sequence) {
                bail!("block {at} of {} holds wrong data", self.file.display());
            }
        }
        Ok(())
    }
}

fn write(
    open: &File,
    file: PathBuf,
    stop: &AtomicBool,
    writes: &AtomicU64,
) -> anyhow::Result<Written> {
    let mut latest = Vec::new();
    let mut longest = Duration::ZERO;
    let mut sequence = 0;
    while !stop.load(Ordering::Relaxed) {
        let at = sequence % BLOCKS;
        sequence += 1;
        let began = Instant::now();
        open.write_all_at(&pattern(sequence), at * BLOCK as u64)
            .and_then(|()| open.sync_data())
            .with_context(|| format!("write {sequence} to {}", file.display()))?;
        longest = longest.max(began.elapsed());
        match latest.get_mut(usize::try_from(at)?) {
            Some(slot) => *slot = sequence,
            None => latest.push(sequence),
        }
        writes.store(sequence, Ordering::Relaxed);
    }
    Ok(Written {
        file,
        writes: sequence,
        longest,
        latest,
    })
}

/// A block that only the write of this number can have made.
fn pattern(sequence: u64) -> Vec<u8> {
    sequence.to_le_bytes().repeat(BLOCK / 8)
}
