//! Outside: builds the image, which takes packages from the network, and gives the test its own namespaces.

use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};

use super::driver::{self, Image};
use super::report::step;
use super::tools::Tools;

pub(crate) const INSIDE: &str = "--inside";

/// An image in seconds, in the place of the one that users run.
const QUICK: &str = "--quick";

/// Becomes the same executable in new network, mount and PID namespaces.
pub(crate) fn main(arguments: &[String]) -> Result<ExitCode> {
    if arguments.iter().any(|argument| argument == "--list") {
        for scenario in super::scenarios::all() {
            println!("{}", scenario.name);
        }
        return Ok(ExitCode::SUCCESS);
    }
    ensure!(
        rustix::process::geteuid().is_root(),
        "this tier needs root, for a network namespace with a bridge and taps in it: run `make e2e` as root"
    );
    let (quick, arguments): (Vec<_>, Vec<_>) = arguments
        .iter()
        .cloned()
        .partition(|argument| argument == QUICK);
    let image = match quick.is_empty() {
        true => Image::Whole,
        false => Image::Quick,
    };
    step(image.name(), || {
        driver::build_image(image, &Tools::find()?.images())
    })?;
    let error = Command::new("unshare")
        .args([
            "--net",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "--",
        ])
        .arg(std::env::current_exe().context("which executable is this?")?)
        .arg(INSIDE)
        .args(arguments)
        .exec();
    Err(error).context("running unshare: install util-linux")
}
