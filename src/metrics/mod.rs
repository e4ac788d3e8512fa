//! What each role measures, and how Prometheus reads it.
//!
//! Metrics have a port of their own, not a path beside health: probes come from the kubelet, metrics go to a scraper, and
//! a network policy tells the two apart by port. The node part is in its host's network, which no policy reaches: it can
//! be told who may ask. What is told is names, numbers and codes; labels are of things that a part has few of, and a
//! single volume is named by nobody but the node that has it attached.
//!
//! - `calls`: CSI calls; `serve`: the port
//! - each role's own: `kube::controller::metrics`, `agent::metrics`, `node::metrics`

mod calls;
mod serve;
#[cfg(test)]
mod tests;

use std::fmt;

use prometheus_client::encoding::{EncodeMetric, MetricEncoder};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

pub use self::calls::Calls;
pub(crate) use self::calls::observe;
pub use self::serve::Args;

/// All that a role tells.
pub struct Exposition {
    registry: Registry,
    /// Names as they are scraped.
    names: Vec<String>,
}

impl Exposition {
    /// With what is the same in all roles.
    #[must_use]
    pub fn new() -> Self {
        let mut exposition = Self {
            registry: Registry::with_prefix("hawser"),
            names: Vec::new(),
        };
        let version = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        exposition.add("build", "The version of this process.", version);
        exposition
    }

    /// Tells `metric` as `hawser_<name>`; a counter's name ends in `_total` besides. Names end in their unit.
    pub fn add(
        &mut self,
        name: &'static str,
        help: &'static str,
        metric: impl EncodeMetric + fmt::Debug + Send + Sync + 'static,
    ) {
        let suffix = match metric.metric_type() {
            MetricType::Counter => "_total",
            MetricType::Info => "_info",
            _ => "",
        };
        self.names.push(format!("hawser_{name}{suffix}"));
        // The registry ends the sentence.
        self.registry
            .register(name, help.trim_end_matches('.'), metric);
    }

    /// Tells what `read` returns when it is called, at each scrape. It may block.
    pub fn read(
        &mut self,
        name: &'static str,
        help: &'static str,
        read: impl Fn() -> Vec<Reading> + Send + Sync + 'static,
    ) {
        self.add(name, help, Gauges(Box::new(read)));
    }

    pub(crate) fn text(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

impl Default for Exposition {
    fn default() -> Self {
        Self::new()
    }
}

/// One value of a gauge that is read when it is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reading {
    labels: Vec<(&'static str, String)>,
    value: i64,
}

impl Reading {
    /// Numbers beyond what there is are told as the largest there is.
    pub fn new(
        labels: impl IntoIterator<Item = (&'static str, String)>,
        value: impl TryInto<i64>,
    ) -> Self {
        Self {
            labels: labels.into_iter().collect(),
            value: value.try_into().unwrap_or(i64::MAX),
        }
    }

    /// Of a gauge without labels.
    pub fn plain(value: impl TryInto<i64>) -> Self {
        Self::new([], value)
    }
}

struct Gauges(Box<dyn Fn() -> Vec<Reading> + Send + Sync>);

impl fmt::Debug for Gauges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Gauges")
    }
}

impl EncodeMetric for Gauges {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        for Reading { labels, value } in (self.0)() {
            match labels.is_empty() {
                true => encoder.encode_gauge(&value)?,
                false => encoder.encode_family(&labels)?.encode_gauge(&value)?,
            }
        }
        Ok(())
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Gauge
    }
}
