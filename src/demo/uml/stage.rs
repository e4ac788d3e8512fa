//! The folder that a machine and its host share.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use super::Error;

/// The machine's first process.
pub(super) const INIT: &str = include_str!("init");

/// How much of the console an error shows, in bytes: an oops and what led to it.
const CONSOLE_TAIL: u64 = 16 * 1024;

/// Removed with this value.
pub(super) struct Stage(PathBuf);

impl Stage {
    pub(super) fn new() -> Result<Self, Error> {
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

    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    /// A new file, for appending.
    pub(super) fn create(&self, name: &str, mode: u32) -> Result<File, Error> {
        let path = self.0.join(name);
        File::options()
            .append(true)
            .create_new(true)
            .mode(mode)
            .open(&path)
            .map_err(|source| Error::File {
                doing: "creating",
                path,
                source,
            })
    }

    pub(super) fn write(&self, name: &str, content: &[u8], mode: u32) -> Result<(), Error> {
        self.create(name, mode)?
            .write_all(content)
            .map_err(|source| Error::File {
                doing: "writing",
                path: self.0.join(name),
                source,
            })
    }

    pub(super) fn status(&self) -> Option<i32> {
        let text = fs::read_to_string(self.0.join("status")).ok()?;
        text.trim().parse().ok()
    }

    pub(super) fn console(&self) -> String {
        let tail = || -> io::Result<Vec<u8>> {
            let mut file = File::open(self.0.join("console"))?;
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
pub(super) fn speakable(path: &Path) -> Result<(), Error> {
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
pub(super) fn quoted(word: &OsStr) -> OsString {
    let mut quoted = OsString::from("'");
    let text = word.to_string_lossy();
    quoted.push(text.replace('\'', r"'\''"));
    quoted.push("'");
    quoted
}

#[cfg(test)]
mod tests {
    use std::process::Command;

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
}
