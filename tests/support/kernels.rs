//! The kernels that the tests run on: that of each supported Debian release, in user-mode Linux.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use hawser::demo::uml::Kernel;

/// Debian 12 has Linux 6.1, Debian 13 has 6.12.
const RELEASES: [&str; 2] = ["bookworm", "trixie"];

/// The host's own release comes from its package, the others were unpacked by `tests/support/install`.
pub(crate) fn all() -> Result<Vec<Kernel>> {
    let host = fs::read_to_string("/etc/os-release").context("reading /etc/os-release")?;
    let host = host
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .unwrap_or_default()
        .trim_matches('"');
    let mut kernels = vec![Kernel::installed()?];
    for release in RELEASES.iter().filter(|release| **release != host) {
        kernels.push(Kernel::unpacked(&cache()?.join("kernels").join(release))?);
    }
    Ok(kernels)
}

/// Where `tests/support/install` keeps what is in no Debian package.
pub(crate) fn cache() -> Result<PathBuf> {
    if let Some(cache) = std::env::var_os("HAWSER_CACHE") {
        return Ok(cache.into());
    }
    let home = std::env::var_os("HOME").context("neither HAWSER_CACHE nor HOME is set")?;
    Ok(PathBuf::from(home).join(".cache/hawser"))
}
