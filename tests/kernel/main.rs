//! What only a real kernel can show: the nbd and tls modules of each supported Debian release, in user-mode Linux.
//!
//! On the host this boots the kernels; inside, the same executable runs one scenario after the other, each in a
//! process of its own. A scenario that fails, hangs, leaves a device or a mount behind or makes the kernel complain
//! costs that kernel its life: the rest go on in a fresh one.
//!
//! ```text
//! cargo test --test kernel -- [--kernel VERSION] [--list] [PART-OF-A-NAME...]
//! cargo test --test kernel -- [--kernel VERSION] --run COMMAND [ARGUMENT...]
//! ```
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a helper of a scenario that fails fails the scenario, and every machine here has 64 bits"
)]

mod attach;
mod bad_input;
mod csi;
mod data;
mod driver;
mod elsewhere;
mod foreign;
mod host;
mod hung;
mod inside;
#[path = "../support/kernels.rs"]
mod kernels;
mod load;
mod machine;
mod node;
mod peer;
mod reconnect;
mod relay;
mod rude;
mod sanity;
mod smoke;
mod wire;

use std::process::ExitCode;
use std::time::Duration;

/// Something that a kernel with our code in it must be able to do.
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    run: fn() -> anyhow::Result<()>,
    /// Modules that the machine must not have.
    without: &'static [&'static str],
    /// When a scenario that still runs has failed.
    deadline: Duration,
}

impl Scenario {
    pub(crate) const fn new(name: &'static str, run: fn() -> anyhow::Result<()>) -> Self {
        Self {
            name,
            run,
            without: &[],
            deadline: Duration::from_secs(60),
        }
    }

    /// On a machine that cannot load these modules.
    pub(crate) const fn without(mut self, modules: &'static [&'static str]) -> Self {
        self.without = modules;
        self
    }

    pub(crate) const fn within_seconds(mut self, seconds: u64) -> Self {
        self.deadline = Duration::from_secs(seconds);
        self
    }
}

fn scenarios() -> impl Iterator<Item = &'static Scenario> {
    [
        smoke::SCENARIOS,
        attach::SCENARIOS,
        bad_input::SCENARIOS,
        reconnect::SCENARIOS,
        csi::SCENARIOS,
        data::SCENARIOS,
        foreign::SCENARIOS,
        elsewhere::SCENARIOS,
        sanity::SCENARIOS,
    ]
    .into_iter()
    .flatten()
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let result = match arguments.first().map(String::as_str) {
        Some(inside::ALL) => inside::all(&arguments[1..]),
        Some(inside::ONE) => inside::one(&arguments[1..]),
        _ => host::main(&arguments),
    };
    result.unwrap_or_else(|error| {
        eprintln!("kernel: {error:#}");
        ExitCode::FAILURE
    })
}
