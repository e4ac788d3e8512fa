//! One server process: started here, or found running; watched and ended by its pidfd, which no other process can
//! take over as it could a process id.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::process::Signal;
use tokio::process::Child;

use crate::sys::process::{ProcessHandle, in_own_session};

/// A log that has grown beyond this, in bytes, is set aside when its server starts anew.
const LOG_LIMIT: u64 = 1 << 20;

/// Bytes of the end of a log in which its last line is looked for.
const LOG_TAIL: u64 = 4096;

/// A running server process. Dropping it leaves the process alone.
#[derive(Debug)]
pub(super) struct Process {
    id: i32,
    handle: ProcessHandle,
    /// Ours to collect, or of an earlier life of this program.
    child: Option<Child>,
}

impl Process {
    /// Starts the command in a session of its own, its output appended to `log`.
    pub(super) fn start(mut command: Command, log: &Path) -> io::Result<Self> {
        if fs::metadata(log).is_ok_and(|log| log.len() > LOG_LIMIT) {
            fs::rename(log, previous(log))?;
        }
        let output = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(log)?;
        command
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output);
        in_own_session(&mut command);
        let child = tokio::process::Command::from(command).spawn()?;
        let id = child.id().and_then(|id| i32::try_from(id).ok());
        // Not collected before `child` is waited for, so the id is still this process'.
        let mut process = Self::find(id.unwrap_or_default())?;
        process.child = Some(child);
        Ok(process)
    }

    /// The process of that id. Whoever asks must make sure that it is the one that was meant.
    pub(super) fn find(id: i32) -> io::Result<Self> {
        Ok(Self {
            id,
            handle: ProcessHandle::open(id)?,
            child: None,
        })
    }

    pub(super) fn id(&self) -> i32 {
        self.id
    }

    /// Returns when the process has ended, with how it ended, if we started it.
    pub(super) async fn ended(&mut self) -> String {
        if let Some(child) = &mut self.child {
            return match child.wait().await {
                Ok(status) => status.to_string(),
                Err(error) => format!("ended, and cannot be collected: {error}"),
            };
        }
        match self.handle.ended().await {
            Ok(()) => "ended".to_owned(),
            Err(error) => format!("cannot be watched: {error}"),
        }
    }

    /// Sends a signal; a process that has ended already needs none.
    pub(super) fn signal(&self, signal: Signal) {
        if let Err(error) = self.handle.signal(signal) {
            tracing::warn!(process = self.id, ?signal, %error, "cannot signal the server");
        }
    }
}

fn previous(log: &Path) -> PathBuf {
    log.with_extension("previous")
}

/// The last line of a log, to say why a server ended.
pub(super) fn last_line(log: &Path) -> Option<String> {
    let mut file = File::open(log).ok()?;
    let length = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL)))
        .ok()?;
    let mut tail = Vec::new();
    file.take(LOG_TAIL).read_to_end(&mut tail).ok()?;
    let tail = String::from_utf8_lossy(&tail);
    let line = tail.lines().rev().find(|line| !line.trim().is_empty())?;
    Some(line.trim().chars().take(512).collect())
}

/// The process that holds an exclusive flock on `file`, if the kernel tells.
pub(super) fn lock_holder(file: &File) -> Option<i32> {
    use std::os::unix::fs::MetadataExt;
    let inode = file.metadata().ok()?.ino();
    let locks = fs::read_to_string("/proc/locks").ok()?;
    find_holder(&locks, inode)
}

/// Reads proc(5)'s /proc/locks: `1: FLOCK  ADVISORY  WRITE 1234 08:02:131090 0 EOF`.
fn find_holder(locks: &str, inode: u64) -> Option<i32> {
    locks.lines().find_map(|line| {
        let mut fields = line.split_whitespace().skip(1);
        // `->` marks a process that waits for the lock.
        if fields.next()? != "FLOCK" {
            return None;
        }
        let (process, place) = (fields.nth(2)?, fields.next()?);
        let same = place.rsplit(':').next()?.parse() == Ok(inode);
        process.parse().ok().filter(|id| same && *id > 0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_holder_of_a_lock_is_found_among_others() {
        let locks = "1: POSIX  ADVISORY  WRITE 11 08:02:7 0 EOF\n\
                     2: FLOCK  ADVISORY  WRITE 12 08:02:77 0 EOF\n\
                     3: FLOCK  ADVISORY  WRITE 13 08:02:7 0 EOF\n\
                     3: -> FLOCK  ADVISORY  WRITE 14 08:02:8 0 EOF\n\
                     4: FLOCK  ADVISORY  WRITE 0 08:02:9 0 EOF\n\
                     5: FLOCK\n";
        assert_eq!(find_holder(locks, 7), Some(13));
        assert_eq!(find_holder(locks, 8), None);
        assert_eq!(find_holder(locks, 9), None);
        let file = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(lock_holder(file.as_file()), None);
        file.as_file().lock().unwrap();
        assert_eq!(
            lock_holder(file.as_file()),
            Some(std::process::id().cast_signed())
        );
    }

    #[test]
    fn the_last_line_of_a_log_is_found() {
        let home = tempfile::TempDir::new().unwrap();
        let log = home.path().join("log");
        assert_eq!(last_line(&log), None);
        fs::write(&log, "x".repeat(9000) + "\nfirst\nlast \n\n").unwrap();
        assert_eq!(last_line(&log), Some("last".to_owned()));
    }

    #[tokio::test]
    async fn a_process_is_started_in_its_own_session_and_its_end_is_seen() {
        let home = tempfile::TempDir::new().unwrap();
        let log = home.path().join("log");
        let mut command = Command::new("sh");
        command.args(["-c", "ps -o sid= -p $$; exec sleep 60"]);
        let mut started = Process::start(command, &log).unwrap();
        let mut found = Process::find(started.id()).unwrap();
        while last_line(&log).is_none() {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        assert_eq!(last_line(&log), Some(started.id().to_string()));
        found.signal(Signal::TERM);
        assert!(started.ended().await.contains("signal: 15"));
        found.ended().await;
        found.signal(Signal::KILL);
    }
}
