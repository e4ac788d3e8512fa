//! What is shown in the cluster, in this order.

mod certificates;
mod failures;
mod nodes;
mod release;
mod requests;
mod smoke;
mod volumes;

use anyhow::Result;

use super::testbed::Testbed;

/// Besides which others a scenario may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum When {
    /// Before all others: the cluster is blamed before the driver, and the driver begins as the version before.
    First,
    /// It leaves the driver and the nodes alone.
    SideBySide,
    Alone,
}

pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    pub(crate) when: When,
    pub(crate) run: fn(&Testbed) -> Result<()>,
}

impl Scenario {
    const fn new(name: &'static str, when: When, run: fn(&Testbed) -> Result<()>) -> Self {
        Self { name, when, run }
    }
}

pub(crate) fn all() -> impl Iterator<Item = &'static Scenario> {
    [
        smoke::SCENARIOS,
        release::BEGIN,
        volumes::SCENARIOS,
        certificates::SCENARIOS,
        requests::SCENARIOS,
        failures::SCENARIOS,
        nodes::SCENARIOS,
        release::END,
    ]
    .into_iter()
    .flatten()
}
