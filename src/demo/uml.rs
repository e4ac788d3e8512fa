//! A kernel of our own: user-mode Linux, which has the nbd and tls modules wherever Debian runs and needs no root.
//!
//! The demonstration uses it where the host's kernel lacks them, and so do all tests that need a real kernel. The
//! machine's root file system is the host's own, read-only; it runs one command and is gone. Nothing is left behind,
//! also when this process is killed: the kernel's whole process group ends as soon as our end of its standard input
//! closes.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::StatVfsMountFlags;

/// Where Debian's user-mode-linux package has its files.
const INSTALLED_LINUX: &str = "/usr/bin/linux.uml";
const INSTALLED_MODULES: &str = "/usr/lib/uml/modules";

/// How much of the console an error shows, in bytes: an oops and what led to it.
const CONSOLE_TAIL: u64 = 16 * 1024;

/// How long a kernel that closed its consoles may take to end.
const END: Duration = Duration::from_secs(10);

const INIT: &str = include_str!("uml-init");

/// Removes the stage and ends the process group when our end of standard input closes, and becomes the kernel.
const LIFELINE: &str = r#"
ulimit -c 0
exec 3<&0
(read -r _ <&3; rm -rf "$HAWSER_UML_STAGE"; kill -KILL 0) >/dev/null 2>&1 &
[ -z "$HAWSER_UML_LIBRARIES" ] || export LD_LIBRARY_PATH="$HAWSER_UML_LIBRARIES"
exec "$@" </dev/null 3<&-
"#;

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
        "user-mode Linux did not end within {} s and was killed; the end of its console:\n{console}",
        deadline.as_secs()
    )]
    TimedOut { deadline: Duration, console: String },
    #[error("user-mode Linux ended before its command did; the end of its console:\n{console}")]
    Died { console: String },
}

/// A user-mode Linux and its modules.
#[derive(Debug, Clone)]
pub struct Kernel {
    linux: PathBuf,
    /// The C library that the kernel wants, where that is not the host's.
    libraries: Option<PathBuf>,
    modules: PathBuf,
    version: String,
}

impl Kernel {
    /// The one of Debian's package.
    ///
    /// # Errors
    /// Where the package is not installed.
    pub fn installed() -> Result<Self, Error> {
        let linux = PathBuf::from(INSTALLED_LINUX);
        if !linux.exists() {
            return Err(Error::NotInstalled(linux));
        }
        let modules = PathBuf::from(INSTALLED_MODULES);
        let (modules, version) = only_folder(&modules).ok_or(Error::NotInstalled(modules))?;
        Ok(Self {
            linux,
            libraries: None,
            modules,
            version,
        })
    }

    /// One of another Debian release, as `tests/support/kernel` unpacks it: `linux.uml` and its C library in
    /// `directory`, the modules in `directory/modules/VERSION`.
    ///
    /// # Errors
    /// Where something of it is missing.
    pub fn unpacked(directory: &Path) -> Result<Self, Error> {
        let incomplete = || Error::NotUnpacked(directory.to_owned());
        let linux = directory.join("linux.uml");
        if !linux.exists() {
            return Err(incomplete());
        }
        let (modules, version) = only_folder(&directory.join("modules")).ok_or_else(incomplete)?;
        Ok(Self {
            linux,
            libraries: Some(directory.to_owned()),
            modules,
            version,
        })
    }

    /// As `uname -r` says it.
    #[must_use]
    pub fn version(&self) -> &str {
        &self.version
    }
}

/// The single folder in a folder, and its name.
fn only_folder(directory: &Path) -> Option<(PathBuf, String)> {
    let mut entries = fs::read_dir(directory).ok()?;
    let entry = entries.next()?.ok()?;
    let name = entry.file_name().into_string().ok()?;
    entries.next().is_none().then(|| (entry.path(), name))
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
    load: Vec<String>,
    absent: Vec<String>,
    shares: Vec<(Access, PathBuf)>,
    environment: Vec<(OsString, OsString)>,
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
            load: vec!["nbd".to_owned(), "tls".to_owned()],
            absent: Vec::new(),
            shares: vec![modules],
            environment: Vec::new(),
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
        let mut process = self.start(&stage)?;
        let finished = process.relay(self.deadline, &mut line);
        let (console, status) = (stage.console(), stage.status());
        drop(process);
        if !finished {
            return Err(Error::TimedOut {
                deadline: self.deadline,
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
        stage.write("init", INIT.as_bytes(), 0o700)?;
        Ok(stage)
    }

    fn start(&self, stage: &Stage) -> Result<Process, Error> {
        let memory = memory_folder(self.memory_mib)?;
        let failed = |source| Error::File {
            doing: "starting",
            path: self.kernel.linux.clone(),
            source,
        };
        let console = fs::OpenOptions::new()
            .append(true)
            .create_new(true)
            .mode(0o600)
            .open(stage.0.join("console"))
            .map_err(failed)?;
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", LIFELINE, "sh"])
            .arg(&self.kernel.linux)
            .arg(format!("mem={}M", self.memory_mib))
            .args(["rootfstype=hostfs", "rootflags=/", "ro"])
            .arg(format!("init={}", stage.0.join("init").display()))
            .arg(format!("uml_dir={}/", stage.0.display()))
            // The kernel and its first process speak on the first console, the command on the second.
            .args(["con=null", "con0=null,fd:2", "con1=null,fd:1"])
            .env("TMPDIR", memory)
            .env("HAWSER_UML_STAGE", &stage.0)
            .env(
                "HAWSER_UML_LIBRARIES",
                self.kernel.libraries.as_deref().unwrap_or(Path::new("")),
            )
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(console)
            .process_group(0);
        if let Some(directory) = &self.kernel.libraries {
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
        Ok(Process { child, lines })
    }
}

/// A running kernel, which ends when this is dropped.
struct Process {
    child: Child,
    lines: Receiver<String>,
}

impl Process {
    /// Hands over what the command prints until the kernel has ended; false where it did not in time.
    fn relay(&mut self, deadline: Duration, line: &mut dyn FnMut(&str)) -> bool {
        let started = Instant::now();
        loop {
            let left = deadline.saturating_sub(started.elapsed());
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

/// The folder that a machine and its host share, removed with this value.
struct Stage(PathBuf);

impl Stage {
    fn new() -> Result<Self, Error> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("hawser-uml-{}-{count}", std::process::id()));
        speakable(&path)?;
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(|source| Error::File {
                doing: "creating",
                path: path.clone(),
                source,
            })?;
        Ok(Self(path))
    }

    fn write(&self, name: &str, content: &[u8], mode: u32) -> Result<(), Error> {
        let path = self.0.join(name);
        fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&path)
            .and_then(|mut file| io::Write::write_all(&mut file, content))
            .map_err(|source| Error::File {
                doing: "writing",
                path,
                source,
            })
    }

    fn status(&self) -> Option<i32> {
        let text = fs::read_to_string(self.0.join("status")).ok()?;
        text.trim().parse().ok()
    }

    fn console(&self) -> String {
        let tail = || -> io::Result<Vec<u8>> {
            let mut file = fs::File::open(self.0.join("console"))?;
            let length = file.metadata()?.len();
            file.seek(SeekFrom::Start(length.saturating_sub(CONSOLE_TAIL)))?;
            let mut bytes = Vec::new();
            file.take(CONSOLE_TAIL).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        match tail() {
            Ok(bytes) => String::from_utf8_lossy(&bytes).replace('\r', ""),
            Err(error) => format!("(not to be read: {error})"),
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Refuses paths that neither a kernel command line nor a mount option can carry.
fn speakable(path: &Path) -> Result<(), Error> {
    let fine = path.is_absolute()
        && path.to_str().is_some_and(|text| {
            !text.contains([' ', ',', '"', '\\']) && !text.contains(char::is_control)
        });
    if fine {
        Ok(())
    } else {
        Err(Error::Path(path.to_owned()))
    }
}

/// A word as a shell takes it literally.
fn quoted(word: &OsStr) -> OsString {
    let mut quoted = OsString::from("'");
    let text = word.to_string_lossy();
    quoted.push(text.replace('\'', r"'\''"));
    quoted.push("'");
    quoted
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_reach_the_command_as_they_are() {
        let word = "it's $HOME `x` \"y\"\n*";
        let printed = Command::new("/bin/sh")
            .arg("-c")
            .arg({
                let mut script = OsString::from("printf %s ");
                script.push(quoted(OsStr::new(word)));
                script
            })
            .output()
            .expect("a shell");
        assert_eq!(String::from_utf8_lossy(&printed.stdout), word);
    }

    #[test]
    fn paths_that_a_kernel_command_line_cannot_carry_are_refused() {
        for path in [
            "relative",
            "/with space",
            "/with,comma",
            "/with\nnewline",
            "/with\"quote",
        ] {
            assert!(speakable(Path::new(path)).is_err(), "{path:?}");
        }
        assert!(speakable(Path::new("/var/cache/hawser-1")).is_ok());
    }

    #[test]
    fn a_half_unpacked_kernel_is_refused() {
        let directory = tempfile::tempdir().expect("a folder");
        fs::write(directory.path().join("linux.uml"), "").expect("a file");
        assert!(matches!(
            Kernel::unpacked(directory.path()),
            Err(Error::NotUnpacked(_))
        ));
    }
}
