//! The wire as an eavesdropper has it: everything that crosses loopback is captured, and searched for what was written.

use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

/// Bytes of the texts that are searched for: no ciphertext has them by chance.
pub(super) const MARKER: usize = 48;

/// How long the capturer may take to begin or end.
const PATIENCE: Duration = Duration::from_secs(20);

/// A running capture.
#[derive(Debug)]
pub(super) struct Capture {
    child: Child,
    file: PathBuf,
}

/// What was captured.
#[derive(Debug)]
pub(super) struct Captured {
    bytes: Vec<u8>,
}

impl Capture {
    /// Captures all of loopback's TCP into `file`.
    pub(super) async fn begin(file: PathBuf) -> anyhow::Result<Self> {
        let mut child = Command::new("tcpdump")
            .args([
                "-i", "lo", "-s", "0", "-U", "-B", "32768", "-Z", "root", "-w",
            ])
            .arg(&file)
            .arg("tcp")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("start tcpdump (Debian package tcpdump)")?;
        let stderr = child.stderr.take().context("tcpdump's messages")?;
        let mut lines = BufReader::new(stderr).lines();
        let listening = async {
            while let Some(line) = lines.next_line().await? {
                if line.contains("listening on") {
                    return anyhow::Ok(true);
                }
            }
            Ok(false)
        };
        if !tokio::time::timeout(PATIENCE, listening).await?? {
            bail!("tcpdump ended before it listened");
        }
        Ok(Self { child, file })
    }

    /// Sends `text` over a plain connection, so that a search that finds nothing is known to be able to find something.
    pub(super) fn control(text: &[u8]) -> anyhow::Result<()> {
        use std::io::{Read, Write};
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let mut sender = TcpStream::connect(listener.local_addr()?)?;
        let (mut receiver, _) = listener.accept()?;
        sender.write_all(text)?;
        drop(sender);
        let mut heard = Vec::new();
        receiver.read_to_end(&mut heard)?;
        anyhow::ensure!(heard == text, "loopback changed a text");
        Ok(())
    }

    /// Ends the capture once `last` was captured, which was sent after everything else.
    pub(super) async fn end(mut self, last: &[u8]) -> anyhow::Result<Captured> {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            let captured = Captured::read(&self.file)?;
            if captured.has(last) {
                break;
            }
            if tokio::time::Instant::now() > deadline {
                bail!("the capture lacks what was sent in the clear: it cannot show anything");
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        self.child.kill().await.context("stop tcpdump")?;
        Captured::read(&self.file)
    }
}

impl Captured {
    fn read(file: &Path) -> anyhow::Result<Self> {
        let bytes = std::fs::read(file).context("read the capture")?;
        Ok(Self { bytes })
    }

    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn has(&self, text: &[u8]) -> bool {
        find(&self.bytes, text)
    }
}

/// Whether `text` is somewhere in `bytes`: jumps to each place that has its first byte.
fn find(bytes: &[u8], text: &[u8]) -> bool {
    let Some((first, _)) = text.split_first() else {
        return true;
    };
    let mut rest = bytes;
    while let Some(at) = rest.iter().position(|byte| byte == first) {
        if rest[at..].starts_with(text) {
            return true;
        }
        rest = &rest[at + 1..];
    }
    false
}

#[cfg(test)]
mod tests {
    use super::find;

    #[test]
    fn a_text_is_found_wherever_it_is() {
        assert!(find(b"abcabd", b"abd"));
        assert!(find(b"aaab", b"aab"));
        assert!(find(b"x", b""));
        assert!(!find(b"abcab", b"abd"));
        assert!(!find(b"", b"a"));
    }
}
