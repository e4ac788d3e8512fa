//! What the kernel shows of its nbd devices in sysfs, `/proc` and `/dev`, and the few settings made there.

use std::collections::HashSet;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use super::backend::Backend;

/// A sector of sysfs' `size`, whatever the device's block size.
const SECTOR: u64 = 512;

/// How often a device that is coming or going is looked at.
const GLANCE: Duration = Duration::from_millis(10);

/// The largest single request. The kernel's default is 1280 KiB, or 4 MiB from 6.13 on (K29), but what is beyond 1 MiB our server
/// puts together in memory of its own, and it holds up all that wait behind it on its connection.
const MAX_SECTORS_KB: u64 = 1024;

/// Two round trips' worth of a sequential reader at 10 Gbit/s; the kernel's 128 KiB are made for local disks.
const READ_AHEAD_KB: u64 = 1024;

/// Where the kernel shows itself; a test has its own roots.
#[derive(Debug, Clone)]
pub(super) struct System {
    pub(super) sys: PathBuf,
    pub(super) proc: PathBuf,
    pub(super) dev: PathBuf,
}

impl Default for System {
    fn default() -> Self {
        Self {
            sys: "/sys".into(),
            proc: "/proc".into(),
            dev: "/dev".into(),
        }
    }
}

impl System {
    /// Every device that has a backend identifier of ours, in the order of their indices.
    pub(super) fn devices(&self) -> io::Result<Vec<(u32, Backend)>> {
        let entries = match fs::read_dir(self.sys.join("block")) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut devices = Vec::new();
        for entry in entries {
            let name = entry?.file_name();
            let index = name.to_str().and_then(|name| name.strip_prefix("nbd"));
            let Some(index) = index.and_then(|index| index.parse().ok()) else {
                continue;
            };
            if let Some(backend) = self.backend(index)? {
                devices.push((index, backend));
            }
        }
        devices.sort_by_key(|(index, _)| *index);
        Ok(devices)
    }

    /// The device's backend identifier, if it has one of ours now.
    pub(super) fn backend(&self, index: u32) -> io::Result<Option<Backend>> {
        Ok(self
            .attribute(index, "backend")?
            .and_then(|text| text.parse().ok()))
    }

    /// Bytes; 0 for a device that is not connected.
    pub(super) fn size_bytes(&self, index: u32) -> io::Result<u64> {
        let sectors = self.attribute(index, "size")?.unwrap_or_default();
        let sectors: u64 = sectors.parse().map_err(|_| unreadable("size", &sectors))?;
        sectors
            .checked_mul(SECTOR)
            .ok_or_else(|| unreadable("size", "too large"))
    }

    /// The device's node.
    pub(super) fn path(&self, index: u32) -> PathBuf {
        self.dev.join(format!("nbd{index}"))
    }

    /// Waits for the device's node, which devtmpfs makes with the device and some other arrangement later.
    pub(super) fn wait_for_node(&self, index: u32, patience: Duration) -> io::Result<()> {
        let path = self.path(index);
        if wait(patience, || Ok(path.try_exists()?.then_some(())))?.is_some() {
            return Ok(());
        }
        Err(io::Error::new(
            ErrorKind::NotFound,
            format!("{} does not appear", path.display()),
        ))
    }

    /// Raises the limits that are made for local disks. A device works without: what cannot be set is only logged.
    ///
    /// From 6.11 on the kernel waits, before it changes a limit, until no request is under way: for as long as the
    /// device has no living socket. So nothing is set that is as it should be.
    pub(super) fn tune(&self, index: u32, maximum_payload: Option<u32>) {
        let queue = self.block(index).join("queue");
        let limit = maximum_payload.map_or(MAX_SECTORS_KB, |bytes| {
            // The driver splits no request: one larger than the server takes would fail.
            (u64::from(bytes) >> 10).clamp(4, MAX_SECTORS_KB)
        });
        let hardware = fs::read_to_string(queue.join("max_hw_sectors_kb"))
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(limit);
        let limit = limit.min(hardware).to_string();
        let read_ahead = READ_AHEAD_KB.to_string();
        for (name, value, shown) in [
            ("max_sectors_kb", limit.as_str(), limit.as_str()),
            ("read_ahead_kb", &read_ahead, &read_ahead),
            // The server's disks are scheduled on the server.
            ("scheduler", "none", "[none]"),
        ] {
            let path = queue.join(name);
            let now = fs::read_to_string(&path).unwrap_or_default();
            if now.split_whitespace().any(|word| word == shown) {
                continue;
            }
            if let Err(error) = fs::write(path, value) {
                tracing::warn!("/dev/nbd{index}: cannot set {name} to {value}: {error}");
            }
        }
    }

    /// Where the device, or a file system on it, is mounted.
    pub(super) fn mounted_at(&self, index: u32) -> io::Result<Option<String>> {
        let Some(number) = self.attribute(index, "dev")? else {
            return Ok(None);
        };
        let table = fs::read_to_string(self.proc.join("self/mountinfo"))?;
        let node = format!("/nbd{index}");
        Ok(table.lines().find_map(|line| {
            let fields: Vec<&str> = line.split(' ').collect();
            let (device, root, target) = (*fields.get(2)?, *fields.get(3)?, *fields.get(4)?);
            // A raw block volume is published as a bind mount of the node out of devtmpfs.
            (device == number || root == node).then(|| target.to_owned())
        }))
    }

    /// Devices that are stacked on this one.
    pub(super) fn holders(&self, index: u32) -> io::Result<Vec<String>> {
        match fs::read_dir(self.block(index).join("holders")) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
            entries => entries?
                .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
                .collect(),
        }
    }

    /// What is still left of a device's last connection; `None` if it is as good as new (K30).
    pub(super) fn leftover(&self, index: u32) -> io::Result<Option<String>> {
        if self.attribute(index, "pid")?.is_some() || self.attribute(index, "backend")?.is_some() {
            return Ok(Some("some process has it open".into()));
        }
        let inflight = self.attribute(index, "inflight")?.unwrap_or_default();
        if inflight.split_whitespace().any(|count| count != "0") {
            return Ok(Some(format!(
                "requests are under way ({})",
                inflight.trim()
            )));
        }
        let holders = self.holders(index)?;
        if !holders.is_empty() {
            return Ok(Some(format!("{} is stacked on it", holders.join(", "))));
        }
        match self.size_bytes(index)? {
            0 => Ok(None),
            size => Ok(Some(format!("it still has a size of {size} bytes"))),
        }
    }

    /// Waits until nothing is left; returns what is, if that takes too long.
    pub(super) fn wait_until_gone(
        &self,
        index: u32,
        patience: Duration,
    ) -> io::Result<Option<String>> {
        let gone = wait(patience, || {
            Ok(self.leftover(index)?.is_none().then_some(()))
        })?;
        match gone {
            Some(()) => Ok(None),
            None => self.leftover(index),
        }
    }

    /// The inodes of all TCP sockets that are connected in both directions, whoever holds them: the driver's, too.
    pub(super) fn established_sockets(&self) -> io::Result<HashSet<u64>> {
        let mut inodes = HashSet::new();
        for table in ["net/tcp", "net/tcp6"] {
            match fs::read_to_string(self.proc.join(table)) {
                Ok(table) => inodes.extend(table.lines().filter_map(established_inode)),
                // A kernel without IPv6.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(inodes)
    }

    /// Whether a TCP socket can be given the `tls` protocol.
    pub(super) fn has_kernel_tls(&self) -> bool {
        fs::read_to_string(self.proc.join("sys/net/ipv4/tcp_available_ulp"))
            .is_ok_and(|protocols| protocols.split_whitespace().any(|name| name == "tls"))
    }

    fn block(&self, index: u32) -> PathBuf {
        self.sys.join(format!("block/nbd{index}"))
    }

    /// An attribute without its line feed; `None` where the device has none of that name.
    fn attribute(&self, index: u32, name: &str) -> io::Result<Option<String>> {
        read_attribute(&self.block(index).join(name))
    }
}

fn read_attribute(path: &Path) -> io::Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text.trim_end_matches('\n').to_owned())),
        // ENODEV: removed between open and read.
        Err(error) if error.kind() == ErrorKind::NotFound || error.raw_os_error() == Some(19) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Does what may wait for the device itself, on a thread that nobody has to wait for.
pub(super) fn detached<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Receiver<T> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        // Whoever asked may have stopped waiting.
        let _ = sender.send(work());
    });
    receiver
}

/// Looks again and again until there is an answer, or patience ends.
pub(super) fn wait<T>(
    patience: Duration,
    mut look: impl FnMut() -> io::Result<Option<T>>,
) -> io::Result<Option<T>> {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(answer) = look()? {
            return Ok(Some(answer));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        std::thread::sleep(GLANCE);
    }
}

/// One line of `/proc/net/tcp`: slot, local, remote, state, queues, timer, retransmissions, user, probes, inode.
fn established_inode(line: &str) -> Option<u64> {
    const ESTABLISHED: &str = "01";
    let mut fields = line.split_whitespace().skip(3);
    if fields.next()? != ESTABLISHED {
        return None;
    }
    fields.nth(5)?.parse().ok()
}

fn unreadable(what: &str, text: &str) -> io::Error {
    io::Error::new(
        ErrorKind::InvalidData,
        format!("the kernel's {what} reads {text:?}"),
    )
}

/// The driver's 2^20 minor numbers, of which each device takes as many as it may have partitions, and one, rounded up
/// to a power of two (drivers/block/nbd.c, nbd_init); 16 partitions where the driver does not say.
pub(super) fn most_devices(maximum_partitions: Option<&str>) -> u32 {
    const MINORS: u32 = 1 << 20;
    const DEFAULT: u32 = 16;
    let partitions = maximum_partitions.and_then(|text| text.trim().parse::<u32>().ok());
    let shift = u32::BITS - partitions.unwrap_or(DEFAULT).leading_zeros();
    MINORS.checked_shr(shift).unwrap_or_default().max(1)
}

#[cfg(test)]
mod tests;
