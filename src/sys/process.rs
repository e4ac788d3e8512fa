//! Processes that outlive their parent, and handles on them that no other process can take over.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Starts the command in a session of its own: it is not told when its parent's terminal hangs up or is interrupted.
pub fn in_own_session(command: &mut Command) -> &mut Command {
    // SAFETY: the closure runs between fork and exec, and makes one system call there: it allocates nothing and takes
    // no lock that another thread of the parent may have held.
    unsafe {
        command.pre_exec(|| {
            rustix::process::setsid()?;
            Ok(())
        })
    }
}

/// A pidfd (Linux 5.3): means the same process for as long as it is held, whatever becomes of the process' id.
#[derive(Debug)]
pub struct ProcessHandle(AsyncFd<OwnedFd>);

impl ProcessHandle {
    /// The process that has that id now. Must be called within a tokio runtime.
    pub fn open(id: i32) -> io::Result<Self> {
        let id = Pid::from_raw(id).ok_or(io::ErrorKind::InvalidInput)?;
        let handle = pidfd_open(id, PidfdFlags::NONBLOCK)?;
        // SAFETY: an `OwnedFd` stays open, and the same, until it is dropped; `AsyncFd` owns it and nothing takes it out.
        let registered = unsafe { AsyncFd::register_with_interest(handle, Interest::READABLE) };
        Ok(Self(registered?))
    }

    /// Returns when the process has ended.
    pub async fn ended(&self) -> io::Result<()> {
        self.0.readable().await.map(|_| ())
    }

    /// Sends a signal. A process that has ended needs none: that is no error.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        match pidfd_send_signal(self.0.get_ref(), signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}
