//! What goes over the wire, and whether what arrives is what was sent.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

/// Bytes that nothing else on a wire looks like.
pub(crate) const MARKER: &[u8] = b"0123 nobody may read this on the wire 4567";

/// A number of `/proc/net/tls_stat`.
pub(crate) fn tls_statistic(name: &str) -> Result<u64> {
    let table = fs::read_to_string("/proc/net/tls_stat")?;
    table
        .lines()
        .find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
        .with_context(|| format!("no {name} in {table}"))
}

/// What is written through the device arrives in the backing file, and comes back from it.
pub(crate) fn copy_and_compare(device: &Path, data: &Path) -> Result<()> {
    let mut written = Vec::new();
    while written.len() < 8 << 20 {
        written.extend_from_slice(MARKER);
        written.extend_from_slice(&written.len().to_le_bytes());
    }
    let mut file = OpenOptions::new().read(true).write(true).open(device)?;
    file.write_all(&written)?;
    file.sync_all()?;
    let mut arrived = vec![0; written.len()];
    File::open(data)?.read_exact(&mut arrived)?;
    ensure!(arrived == written, "the backing file differs");
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    file.seek(SeekFrom::Start(0))?;
    arrived.fill(0);
    file.read_exact(&mut arrived)?;
    ensure!(arrived == written, "the device differs");
    Ok(())
}

/// Everything that goes over the loopback.
pub(crate) struct Capture(std::process::Child);

impl Capture {
    const FILE: &str = "/run/capture";

    pub(crate) fn start() -> Result<Self> {
        let child = Command::new("tcpdump")
            .args(["-i", "lo", "-s", "0", "-U", "-B", "32768", "-w", Self::FILE])
            .args(["-Z", "root", "tcp"])
            .stderr(Stdio::null())
            .spawn()
            .context("tcpdump")?;
        // The file's header is there once tcpdump listens.
        while fs::metadata(Self::FILE).map_or(0, |file| file.len()) == 0 {
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(Self(child))
    }

    pub(crate) fn saw_no_plaintext(mut self) -> Result<()> {
        std::thread::sleep(Duration::from_millis(200));
        self.0.kill()?;
        self.0.wait()?;
        let captured = fs::read(Self::FILE)?;
        let found = |text: &[u8]| captured.windows(text.len()).any(|window| window == text);
        // It saw the connections' beginnings, so it would have seen the rest.
        ensure!(found(b"IHAVEOPT"), "nothing was captured");
        ensure!(
            captured.len() > 8 << 20,
            "only {} bytes were captured",
            captured.len()
        );
        ensure!(!found(&MARKER[..16]), "plaintext on the wire");
        fs::remove_file(Self::FILE)?;
        Ok(())
    }
}
