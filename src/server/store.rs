//! The backing file of a volume: reads, writes, holes and durability, and what can go wrong with a file that others
//! can reach too.
//!
//! Nothing is mapped into memory, so a file that shrinks is an error and never a SIGBUS. Before anything is written
//! the file is looked at again: acknowledging a write to a file that was deleted would lose it in silence.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::num::NonZeroU64;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::fs::{Advice, FallocateFlags, FlockOperation, SeekFrom};
use rustix::io::{Errno as OsErrno, ReadWriteFlags};

use crate::nbd::Errno;
use crate::nbd::reply::Extent;
use crate::nbd::request::Range;

#[cfg(test)]
mod tests;

/// How much is written at a time where zeroes must be written one by one.
const ZEROES: usize = 256 << 10;

/// A write that took longer waited for the disk: from one that only fills pages a long one takes 0.2 ms.
const SLOW: Duration = Duration::from_millis(2);

/// For how long nobody tries again not to wait, where one had to.
const RESPITE: Duration = Duration::from_secs(1);

/// A file system without a disk (linux/magic.h).
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// An open backing file.
#[derive(Debug)]
pub(super) struct Store {
    file: File,
    path: PathBuf,
    regular: bool,
    /// Bytes that are served: a file may be longer than that, never shorter.
    served: AtomicU64,
    /// Set once the kernel said that it could not write out what it had accepted: it says so only once.
    lost: AtomicBool,
    /// Whether RWF_NOWAIT is understood by this file system, for reads and for writes.
    nowait_reads: AtomicBool,
    nowait_writes: AtomicBool,
    /// No request ever waits for a disk.
    in_memory: bool,
    opened: Instant,
    /// Until when writes are slow, in microseconds since then.
    slow_until: AtomicU64,
    reported: Mutex<Option<Trouble>>,
}

/// Why a request could not be carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Trouble {
    #[error("the backing file was deleted, so nothing written to it would be found again")]
    Deleted,
    #[error("the backing file has {size} bytes, fewer than the {served} that are served")]
    Truncated { size: u64, served: u64 },
    #[error("the backing file may not be written any more")]
    WriteProtected,
    #[error(
        "the system lost writes that were acknowledged: find out why, then restart this server"
    )]
    Lost,
    #[error("{doing}: {errno}")]
    Io { doing: &'static str, errno: OsErrno },
    /// Not logged: the client asked to be told.
    #[error("this file system cannot make zeroes without writing them")]
    NotFast,
}

impl Trouble {
    /// The one place where an error of the host becomes one of the protocol (C63).
    pub(super) fn errno(self) -> Errno {
        match self {
            Self::WriteProtected => Errno::EPERM,
            Self::NotFast => Errno::ENOTSUP,
            Self::Deleted | Self::Truncated { .. } | Self::Lost => Errno::EIO,
            Self::Io { errno, .. } => match errno {
                OsErrno::NOSPC | OsErrno::DQUOT | OsErrno::FBIG => Errno::ENOSPC,
                OsErrno::PERM | OsErrno::ACCESS | OsErrno::ROFS => Errno::EPERM,
                _ => Errno::EIO,
            },
        }
    }

    fn io(doing: &'static str) -> impl Fn(OsErrno) -> Self {
        move |errno| Self::Io { doing, errno }
    }
}

/// Why a file cannot be served.
#[derive(Debug, thiserror::Error)]
pub(super) enum OpenError {
    #[error("{path}: open the backing file", path = .path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{path} is neither a file nor a block device", path = .path.display())]
    Kind { path: PathBuf },
    #[error("{path} is in use by another server", path = .path.display())]
    InUse { path: PathBuf },
}

impl Store {
    pub(super) fn open(path: &Path, read_only: bool) -> Result<Self, OpenError> {
        let failed = |source: io::Error| OpenError::Io {
            path: path.to_owned(),
            source,
        };
        let file = File::options()
            .read(true)
            .write(!read_only)
            .open(path)
            .map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        let regular = metadata.is_file();
        let size = if regular {
            metadata.len()
        } else if metadata.file_type().is_block_device() {
            rustix::fs::seek(&file, SeekFrom::End(0)).map_err(|errno| failed(errno.into()))?
        } else {
            return Err(OpenError::Kind {
                path: path.to_owned(),
            });
        };
        let in_memory = rustix::fs::fstatfs(&file)
            .is_ok_and(|status| u64::try_from(status.f_type) == Ok(TMPFS_MAGIC));
        Ok(Self {
            file,
            path: path.to_owned(),
            regular,
            served: AtomicU64::new(size),
            lost: AtomicBool::new(false),
            nowait_reads: AtomicBool::new(true),
            nowait_writes: AtomicBool::new(!read_only),
            in_memory: regular && in_memory,
            opened: Instant::now(),
            slow_until: AtomicU64::new(0),
            reported: Mutex::new(None),
        })
    }

    /// Refuses a file that another server serves; several may serve it if none writes.
    pub(super) fn lock(&self, read_only: bool) -> Result<(), OpenError> {
        let operation = if read_only {
            FlockOperation::NonBlockingLockShared
        } else {
            FlockOperation::NonBlockingLockExclusive
        };
        match rustix::fs::flock(&self.file, operation) {
            Ok(()) => Ok(()),
            Err(OsErrno::WOULDBLOCK) => Err(OpenError::InUse {
                path: self.path.clone(),
            }),
            Err(errno) => Err(OpenError::Io {
                path: self.path.clone(),
                source: errno.into(),
            }),
        }
    }

    /// Bytes that are served.
    pub(super) fn size(&self) -> u64 {
        self.served.load(Ordering::Acquire)
    }

    /// Serves what the file has grown to; never less than before. Returns the size.
    pub(super) fn grow(&self) -> Result<u64, Trouble> {
        let size = if self.regular {
            self.status()?.0
        } else {
            rustix::fs::seek(&self.file, SeekFrom::End(0)).map_err(Trouble::io("find the size"))?
        };
        Ok(self.served.fetch_max(size, Ordering::AcqRel).max(size))
    }

    /// Appends exactly that range to `data`.
    pub(super) fn read(&self, range: Range, data: &mut Vec<u8>) -> Result<(), Trouble> {
        let end = data.len() + range.length as usize;
        data.reserve_exact(range.length as usize);
        let mut at = range.offset;
        while data.len() < end {
            match rustix::io::pread(&self.file, spare_capacity(data), at) {
                Ok(0) => return Err(self.too_short()),
                Ok(read) => at += read as u64,
                Err(OsErrno::INTR) => {}
                Err(errno) => return Err(Trouble::io("read")(errno)),
            }
        }
        // There may have been room for more.
        data.truncate(end);
        Ok(())
    }

    /// Fills all of `data` if that needs no waiting, which is so when the page cache has it all.
    pub(super) fn read_now(&self, offset: u64, data: &mut [IoSliceMut<'_>]) -> bool {
        let flags = if self.in_memory {
            ReadWriteFlags::empty()
        } else if self.nowait_reads.load(Ordering::Relaxed) {
            ReadWriteFlags::NOWAIT
        } else {
            return false;
        };
        let length: usize = data.iter().map(|piece| piece.len()).sum();
        match rustix::io::preadv2(&self.file, data, offset, flags) {
            Ok(read) => read == length,
            Err(OsErrno::OPNOTSUPP | OsErrno::NOSYS | OsErrno::INVAL) => {
                self.nowait_reads.store(false, Ordering::Relaxed);
                false
            }
            Err(_) => false,
        }
    }

    pub(super) fn write(&self, offset: u64, data: &[u8]) -> Result<(), Trouble> {
        self.check_writable()?;
        self.write_all(offset, data)
    }

    /// Writes `data` if that is unlikely to need waiting; `None` where it would, or where anything is out of order.
    ///
    /// `looked` is whether the file was looked at since the request came. One look serves all that came together.
    pub(super) fn write_now(&self, offset: u64, data: &[u8], looked: &mut bool) -> Option<()> {
        if self.is_slow() || self.has_lost_writes() {
            return None;
        }
        if !*looked {
            self.check_writable().ok()?;
            *looked = true;
        }
        if self.nowait_writes.load(Ordering::Relaxed) && !self.in_memory {
            let buffers = &[IoSlice::new(data)];
            match rustix::io::pwritev2(&self.file, buffers, offset, ReadWriteFlags::NOWAIT) {
                Err(OsErrno::OPNOTSUPP | OsErrno::NOSYS | OsErrno::INVAL) => {
                    self.nowait_writes.store(false, Ordering::Relaxed);
                }
                written => return (written == Ok(data.len())).then_some(()),
            }
        }
        // ext4 and block devices have no such flag. What goes into the page cache seldom waits for the disk.
        let began = Instant::now();
        let written = rustix::io::pwrite(&self.file, data, offset);
        if began.elapsed() > SLOW && !self.in_memory {
            let until = (self.opened.elapsed() + RESPITE).as_micros();
            let until = u64::try_from(until).unwrap_or(u64::MAX);
            self.slow_until.store(until, Ordering::Relaxed);
        }
        (written == Ok(data.len())).then_some(())
    }

    /// Whether a write had to wait just now.
    fn is_slow(&self) -> bool {
        let until = self.slow_until.load(Ordering::Relaxed);
        until > 0 && self.opened.elapsed().as_micros() < u128::from(until)
    }

    fn write_all(&self, mut offset: u64, mut data: &[u8]) -> Result<(), Trouble> {
        while !data.is_empty() {
            match rustix::io::pwrite(&self.file, data, offset) {
                Ok(0) => return Err(Trouble::io("write")(OsErrno::IO)),
                Ok(written) => {
                    data = &data[written..];
                    offset += written as u64;
                }
                Err(OsErrno::INTR) => {}
                Err(errno) => return Err(Trouble::io("write")(errno)),
            }
        }
        Ok(())
    }

    /// Makes everything durable that was written before this was called.
    pub(super) fn flush(&self) -> Result<(), Trouble> {
        self.check_present()?;
        match rustix::fs::fdatasync(&self.file) {
            Ok(()) => Ok(()),
            Err(errno) => {
                // The pages that could not be written are clean now: the next fdatasync would succeed.
                self.lost.store(true, Ordering::Release);
                Err(Trouble::io("make the data durable")(errno))
            }
        }
    }

    /// Whether the system lost writes that were acknowledged.
    pub(super) fn has_lost_writes(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// Gives the range back to the file system, where that is possible: a hint (C56).
    pub(super) fn trim(&self, range: Range) -> Result<(), Trouble> {
        self.check_writable()?;
        self.fallocate(PUNCH, range).map(|_| ())
    }

    /// Makes the range read as zeroes (C55).
    pub(super) fn zero(&self, range: Range, no_hole: bool, fast: bool) -> Result<(), Trouble> {
        self.check_writable()?;
        let zero_range = FallocateFlags::ZERO_RANGE.union(FallocateFlags::KEEP_SIZE);
        let done = if no_hole {
            // Where ranges cannot be zeroed in place (tmpfs), a hole that is filled again comes to the same.
            self.fallocate(zero_range, range)?
                || self.fallocate(PUNCH, range)?
                    && self.fallocate(FallocateFlags::KEEP_SIZE, range)?
        } else {
            self.fallocate(PUNCH, range)? || self.fallocate(zero_range, range)?
        };
        if done {
            return Ok(());
        }
        if fast {
            return Err(Trouble::NotFast);
        }
        let zeroes = vec![0; ZEROES.min(range.length as usize)];
        let mut at = range.offset;
        while at < range.end() {
            let most = usize::try_from(range.end() - at).unwrap_or(ZEROES);
            let piece = &zeroes[..zeroes.len().min(most)];
            self.write_all(at, piece)?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    /// Whether the file system did it; `false` where it cannot, and then nothing was changed.
    fn fallocate(&self, flags: FallocateFlags, range: Range) -> Result<bool, Trouble> {
        if range.length == 0 {
            return Ok(true);
        }
        loop {
            match rustix::fs::fallocate(&self.file, flags, range.offset, range.length.into()) {
                Ok(()) => return Ok(true),
                Err(OsErrno::INTR) => {}
                Err(OsErrno::OPNOTSUPP | OsErrno::NOSYS) => return Ok(false),
                // Block devices do this in whole sectors only.
                Err(OsErrno::INVAL) if !self.regular => return Ok(false),
                Err(errno) => return Err(Trouble::io("change the allocation")(errno)),
            }
        }
    }

    /// Asks the system to have the range in memory soon.
    pub(super) fn cache(&self, range: Range) -> Result<(), Trouble> {
        let Some(length) = NonZeroU64::new(range.length.into()) else {
            return Ok(());
        };
        match rustix::fs::fadvise(&self.file, range.offset, Some(length), Advice::WillNeed) {
            Ok(()) | Err(OsErrno::INVAL | OsErrno::NOSYS | OsErrno::OPNOTSUPP) => Ok(()),
            Err(errno) => Err(Trouble::io("read ahead")(errno)),
        }
    }

    /// What is data and what is a hole in the range, from its beginning: at most `most` extents, none of them
    /// empty, each unlike its neighbours. Each costs two system calls.
    pub(super) fn extents(&self, range: Range, most: usize) -> Result<Vec<Extent>, Trouble> {
        let mut extents = Vec::new();
        let mut at = range.offset;
        while at < range.end() && extents.len() < most {
            let data = self.seek(SeekFrom::Data(at))?;
            let (until, flags) = match data {
                Found::At(data) if data <= at => match self.seek(SeekFrom::Hole(at))? {
                    Found::At(hole) => (hole.max(at + 1), 0),
                    Found::Nothing | Found::Unsupported => (range.end(), 0),
                },
                Found::At(data) => (data, Extent::HOLE | Extent::ZERO),
                Found::Nothing => (range.end(), Extent::HOLE | Extent::ZERO),
                Found::Unsupported => (range.end(), 0),
            };
            let until = until.min(range.end());
            let length = u32::try_from(until - at).unwrap_or(u32::MAX);
            extents.push(Extent { length, flags });
            at = until;
        }
        // After the search: behind the end of a file that shrank everything looks like a hole.
        self.check_length()?;
        Ok(extents)
    }

    fn seek(&self, to: SeekFrom) -> Result<Found, Trouble> {
        match rustix::fs::seek(&self.file, to) {
            Ok(at) => Ok(Found::At(at)),
            Err(OsErrno::NXIO) => Ok(Found::Nothing),
            Err(OsErrno::INVAL | OsErrno::OPNOTSUPP) => Ok(Found::Unsupported),
            Err(errno) => Err(Trouble::io("find the holes")(errno)),
        }
    }

    /// Size, links and mode as they are now.
    fn status(&self) -> Result<(u64, u64, u32), Trouble> {
        let status = rustix::fs::fstat(&self.file).map_err(Trouble::io("look at the file"))?;
        let size = u64::try_from(status.st_size).unwrap_or(0);
        #[allow(
            clippy::useless_conversion,
            reason = "the width of st_nlink differs by architecture"
        )]
        Ok((size, status.st_nlink.into(), status.st_mode))
    }

    fn check_length(&self) -> Result<(), Trouble> {
        if !self.regular {
            return Ok(());
        }
        // In this order: the file grows before it is served.
        let served = self.size();
        let size = self.status()?.0;
        if size < served {
            return Err(Trouble::Truncated { size, served });
        }
        Ok(())
    }

    /// Whether what is in the file can still be found there later.
    fn check_present(&self) -> Result<u32, Trouble> {
        if self.has_lost_writes() {
            return Err(Trouble::Lost);
        }
        // In this order: the file grows before it is served, and a write meanwhile must not see the old size and the new.
        let served = self.size();
        let (size, links, mode) = self.status()?;
        if !self.regular {
            return Ok(mode);
        }
        if links == 0 {
            return Err(Trouble::Deleted);
        }
        if size < served {
            return Err(Trouble::Truncated { size, served });
        }
        Ok(mode)
    }

    fn check_writable(&self) -> Result<(), Trouble> {
        // Who takes away every right to write means it, though an open file would not notice.
        if self.check_present()? & 0o222 == 0 {
            return Err(Trouble::WriteProtected);
        }
        Ok(())
    }

    fn too_short(&self) -> Trouble {
        match self.check_length() {
            Err(trouble) => trouble,
            Ok(()) => Trouble::io("read")(OsErrno::IO),
        }
    }

    /// Logs what went wrong, once until it is something else: a client repeats a failing request for ever.
    pub(super) fn report(&self, trouble: Trouble) {
        if trouble == Trouble::NotFast {
            return;
        }
        let mut reported = self.reported.lock().unwrap_or_else(PoisonError::into_inner);
        if *reported != Some(trouble) {
            tracing::error!(file = %self.path.display(), "requests fail: {trouble}");
            *reported = Some(trouble);
        }
    }
}

#[cfg(test)]
impl Store {
    /// As if fdatasync(2) had failed.
    pub(super) fn lose(&self) {
        self.lost.store(true, Ordering::Release);
    }
}

const PUNCH: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);

enum Found {
    At(u64),
    /// Up to the end of the file.
    Nothing,
    /// The file system or the device does not know.
    Unsupported,
}
