//! Which kernels there are.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::Error;

/// Where Debian's user-mode-linux package has its files.
const INSTALLED_LINUX: &str = "/usr/bin/linux.uml";
const INSTALLED_MODULES: &str = "/usr/lib/uml/modules";

/// A user-mode Linux and its modules.
#[derive(Debug, Clone)]
pub struct Kernel {
    pub(super) linux: PathBuf,
    /// The C library that the kernel wants, where that is not the host's.
    pub(super) libraries: Option<PathBuf>,
    pub(super) modules: PathBuf,
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
        let directory = directory.canonicalize().map_err(|_| incomplete())?;
        let linux = directory.join("linux.uml");
        if !linux.exists() {
            return Err(incomplete());
        }
        let (modules, version) = only_folder(&directory.join("modules")).ok_or_else(incomplete)?;
        Ok(Self {
            linux,
            libraries: Some(directory),
            modules,
            version,
        })
    }

    /// The kernel as a process that is yet without arguments; its dynamic linker may depend on the folder it is started in.
    #[must_use]
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.linux);
        if let Some(directory) = &self.libraries {
            command
                .current_dir(directory)
                .env("LD_LIBRARY_PATH", directory);
        }
        command
    }

    /// The folder of its modules, as `/lib/modules` has one.
    #[must_use]
    pub fn modules(&self) -> &Path {
        &self.modules
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

#[cfg(test)]
mod tests {
    use super::*;

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
