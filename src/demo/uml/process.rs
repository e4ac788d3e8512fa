//! A running kernel.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::StatVfsMountFlags;

use super::stage::Stage;
use super::{Error, Kernel};

/// How long a kernel that closed its consoles may take to end.
const END: Duration = Duration::from_secs(10);

/// Removes the stage and ends the process group when our end of standard input closes, and becomes the kernel.
const LIFELINE: &str = r#"
ulimit -c 0
exec 3<&0
(read -r _ <&3; rm -rf "$HAWSER_UML_STAGE"; kill -KILL 0) >/dev/null 2>&1 &
[ -z "$HAWSER_UML_LIBRARIES" ] || export LD_LIBRARY_PATH="$HAWSER_UML_LIBRARIES"
exec "$@" </dev/null 3<&-
"#;

/// A running kernel, which ends when this is dropped.
pub(super) struct Process {
    child: Child,
    lines: Receiver<String>,
}

impl Process {
    pub(super) fn start(
        kernel: &Kernel,
        memory_mib: u32,
        tap: Option<&str>,
        stage: &Stage,
    ) -> Result<Self, Error> {
        let memory = memory_folder(memory_mib)?;
        let failed = |source| Error::File {
            doing: "starting",
            path: kernel.linux.clone(),
            source,
        };
        let console = stage.create("console", 0o600)?;
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", LIFELINE, "sh"])
            .arg(&kernel.linux)
            .arg(format!("mem={memory_mib}M"))
            .args(["rootfstype=hostfs", "rootflags=/", "ro"])
            .arg(format!("init={}", stage.path().join("init").display()))
            .arg(format!("uml_dir={}/", stage.path().display()))
            // The kernel and its first process speak on the first console, the command on the second.
            .args(["con=null", "con0=null,fd:2", "con1=null,fd:1"])
            .args(tap.map(|tap| format!("vec0:transport=tap,ifname={tap},depth=128,gro=1")))
            .env("TMPDIR", memory)
            .env("HAWSER_UML_STAGE", stage.path())
            .env(
                "HAWSER_UML_LIBRARIES",
                kernel.libraries.as_deref().unwrap_or(Path::new("")),
            )
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(console)
            .process_group(0);
        if let Some(directory) = &kernel.libraries {
            // The unpacked kernel names its dynamic linker by a relative path.
            command.current_dir(directory);
        }
        let mut child = command.spawn().map_err(failed)?;
        let (sender, lines) = mpsc::sync_channel(64);
        if let Some(output) = child.stdout.take() {
            thread::spawn(move || {
                let mut output = BufReader::new(output);
                let mut line = Vec::new();
                while output
                    .read_until(b'\n', &mut line)
                    .is_ok_and(|length| length > 0)
                {
                    let text = String::from_utf8_lossy(&line);
                    if sender
                        .send(text.trim_end_matches(['\n', '\r']).to_owned())
                        .is_err()
                    {
                        break;
                    }
                    line.clear();
                }
            });
        }
        Ok(Self { child, lines })
    }

    /// Hands over what the command prints until the kernel has ended; false where it did not in time, or printed nothing
    /// for too long.
    pub(super) fn relay(
        &mut self,
        deadline: Duration,
        silence: Duration,
        line: &mut dyn FnMut(&str),
    ) -> bool {
        let started = Instant::now();
        loop {
            let left = deadline.saturating_sub(started.elapsed()).min(silence);
            match self.lines.recv_timeout(left) {
                Ok(text) => line(&text),
                Err(RecvTimeoutError::Timeout) => return false,
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        let closed = Instant::now();
        while closed.elapsed() < END {
            match self.child.try_wait() {
                Ok(None) => thread::sleep(Duration::from_millis(10)),
                Ok(Some(_)) | Err(_) => return true,
            }
        }
        false
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Closing the lifeline kills the group; waiting for the kernel, so that it no longer writes to its folder.
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// Where the machine's memory may live: user-mode Linux maps a file of its size, executable.
fn memory_folder(memory_mib: u32) -> Result<PathBuf, Error> {
    let candidates = [PathBuf::from("/dev/shm"), std::env::temp_dir()];
    let needed = u64::from(memory_mib) << 20;
    let suitable = candidates.iter().find(|folder| {
        rustix::fs::statvfs(folder.as_path()).is_ok_and(|stat| {
            !stat.f_flag.contains(StatVfsMountFlags::NOEXEC)
                && stat.f_bavail.saturating_mul(stat.f_frsize) >= needed
                && rustix::fs::access(folder.as_path(), rustix::fs::Access::WRITE_OK).is_ok()
        })
    });
    suitable.cloned().ok_or_else(|| Error::NoRoomForMemory {
        needed: memory_mib,
        tried: candidates
            .map(|folder| folder.display().to_string())
            .join(" and "),
    })
}
