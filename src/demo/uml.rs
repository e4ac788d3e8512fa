//! A kernel of our own: user-mode Linux, which has the nbd and tls modules wherever Debian runs and needs no root.
//!
//! The demonstration uses it where the host's kernel lacks them, and so do all tests that need a real kernel. The
//! machine's root file system is the host's own, read-only; it runs one command and is gone. Nothing is left behind,
//! also when this process is killed.
//!
//! - `kernel`: which kernels there are
//! - `stage`: the folder in which `init`, the machine's first process, finds what to do
//! - `process`: the running kernel

mod kernel;
mod process;
mod stage;

use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub use self::kernel::Kernel;
use self::process::Process;
use self::stage::{Stage, quoted, speakable};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "user-mode Linux is not installed ({0} is missing): run `apt-get install user-mode-linux`"
    )]
    NotInstalled(PathBuf),
    #[error("{0} holds no kernel that was unpacked whole: run `tests/support/install`")]
    NotUnpacked(PathBuf),
    #[error(
        "user-mode Linux cannot be given the path {0:?}: it has a space, a comma or a control character"
    )]
    Path(PathBuf),
    #[error("{doing} {path}: {source}")]
    File {
        doing: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error(
        "no folder for the machine's memory: {needed} MiB are needed in one of {tried}, and it must not be mounted noexec"
    )]
    NoRoomForMemory { needed: u32, tried: String },
    #[error(
        "user-mode Linux hung, and was killed after {} s; the end of its console:\n{console}",
        after.as_secs()
    )]
    TimedOut { after: Duration, console: String },
    #[error("user-mode Linux ended before its command did; the end of its console:\n{console}")]
    Died { console: String },
}

/// Whether the machine may write to one of the host's folders.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    ReadOnly,
    ReadWrite,
}

/// What one start of a kernel is given.
#[derive(Debug, Clone)]
pub struct Machine {
    kernel: Kernel,
    memory_mib: u32,
    deadline: Duration,
    silence: Duration,
    load: Vec<String>,
    absent: Vec<String>,
    shares: Vec<(Access, PathBuf)>,
    environment: Vec<(OsString, OsString)>,
    tap: Option<String>,
}

/// How a command inside ended.
#[derive(Debug)]
pub struct Outcome {
    /// Its exit status, as a shell says it.
    pub status: i32,
    /// The end of what the kernel and its first process said.
    pub console: String,
}

impl Machine {
    /// A machine with 1 GiB of memory, the nbd and tls modules loaded, and ten minutes to live.
    #[must_use]
    pub fn new(kernel: Kernel) -> Self {
        let modules = (Access::ReadOnly, kernel.modules.clone());
        Self {
            kernel,
            memory_mib: 1024,
            deadline: Duration::from_secs(600),
            silence: Duration::MAX,
            load: vec!["nbd".to_owned(), "tls".to_owned()],
            absent: Vec::new(),
            shares: vec![modules],
            environment: Vec::new(),
            tap: None,
        }
    }

    /// Memory is taken from the host only as it is touched.
    #[must_use]
    pub fn memory_mib(mut self, memory_mib: u32) -> Self {
        self.memory_mib = memory_mib;
        self
    }

    /// When the machine is killed if it still runs, counted from its start.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// When the machine is killed because its command has printed nothing for so long.
    #[must_use]
    pub fn silence(mut self, silence: Duration) -> Self {
        self.silence = silence;
        self
    }

    /// A module that this machine shall not have: neither loaded at its start nor to be had on demand.
    #[must_use]
    pub fn without(mut self, module: &str) -> Self {
        self.load.retain(|loaded| loaded != module);
        self.absent.push(module.to_owned());
        self
    }

    /// Shows one of the host's folders under its own path. The host's root is there already, read-only, but without
    /// what is under `/tmp`, `/run`, `/mnt` and `/dev/shm`: each is an empty tmpfs.
    #[must_use]
    pub fn share(mut self, access: Access, folder: &Path) -> Self {
        self.shares.push((access, folder.to_owned()));
        self
    }

    /// A variable of the command's environment, which otherwise has `PATH` and `HOME` only.
    #[must_use]
    pub fn environment(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// Joins the machine to one of the host's tap devices, as its interface `vec0`, which is yet without an address.
    #[must_use]
    pub fn network(mut self, tap: &str) -> Self {
        self.tap = Some(tap.to_owned());
        self
    }

    /// Starts the kernel and runs a command as root in it, handing over each line of its output (both streams) as it
    /// is printed. Nothing is left of either when this returns.
    ///
    /// # Errors
    /// A machine that could not be started, did not end in time, or ended before its command; a command that fails
    /// is no error.
    pub fn run<S: AsRef<OsStr>>(
        &self,
        command: &[S],
        mut line: impl FnMut(&str),
    ) -> Result<Outcome, Error> {
        let stage = self.stage(command)?;
        let mut process =
            Process::start(&self.kernel, self.memory_mib, self.tap.as_deref(), &stage)?;
        let started = Instant::now();
        let finished = process.relay(self.deadline, self.silence, &mut line);
        let (console, status) = (stage.console(), stage.status());
        drop(process);
        if !finished {
            return Err(Error::TimedOut {
                after: started.elapsed(),
                console,
            });
        }
        match status {
            Some(status) => Ok(Outcome { status, console }),
            None => Err(Error::Died { console }),
        }
    }

    /// Lays out the folder in which the machine's first process finds what to do.
    fn stage<S: AsRef<OsStr>>(&self, command: &[S]) -> Result<Stage, Error> {
        let stage = Stage::new()?;
        for path in self.shares.iter().map(|(_, folder)| folder) {
            speakable(path)?;
        }
        let shares: String = self
            .shares
            .iter()
            .map(|(access, folder)| {
                let access = match access {
                    Access::ReadOnly => "ro",
                    Access::ReadWrite => "rw",
                };
                format!("{access} {}\n", folder.display())
            })
            .collect();
        let lines = |names: &[String]| {
            names
                .iter()
                .map(|name| format!("{name}\n"))
                .collect::<String>()
        };
        let mut script = OsString::new();
        for (name, value) in &self.environment {
            script.push("export ");
            script.push(name);
            script.push("=");
            script.push(quoted(value));
            script.push("\n");
        }
        script.push("exec");
        for word in command {
            script.push(" ");
            script.push(quoted(word.as_ref()));
        }
        script.push("\n");
        stage.write("shares", shares.as_bytes(), 0o600)?;
        stage.write("load", lines(&self.load).as_bytes(), 0o600)?;
        stage.write("absent", lines(&self.absent).as_bytes(), 0o600)?;
        stage.write(
            "modules",
            self.kernel.modules.as_os_str().as_encoded_bytes(),
            0o600,
        )?;
        stage.write("command", script.as_encoded_bytes(), 0o600)?;
        stage.write("init", stage::INIT.as_bytes(), 0o700)?;
        Ok(stage)
    }
}
