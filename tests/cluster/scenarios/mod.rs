//! What is shown in the cluster, in this order.

mod failures;
mod smoke;
mod volumes;

use anyhow::Result;

use super::testbed::Testbed;

pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    pub(crate) run: fn(&mut Testbed) -> Result<()>,
}

impl Scenario {
    pub(crate) const fn new(name: &'static str, run: fn(&mut Testbed) -> Result<()>) -> Self {
        Self { name, run }
    }
}

pub(crate) fn all() -> impl Iterator<Item = &'static Scenario> {
    [smoke::SCENARIOS, volumes::SCENARIOS, failures::SCENARIOS]
        .into_iter()
        .flatten()
}
