//! The two devices side by side, as a table and as JSON.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use hawser::demo::uml::Kernel;
use serde_json::{Value, json};

use super::Options;
use super::cases::Sample;
use super::guest::HAWSER;
use super::network;
use super::spread::{Spread, compact, round};

/// A figure of a run.
type Figure = fn(&Sample) -> f64;

const THROUGHPUT: Figure = |sample| sample.bytes / sample.seconds / f64::from(1 << 20);
const IOPS: Figure = |sample| sample.operations / sample.seconds;
const MACHINE: Figure = |sample| sample.machine / sample.bytes * f64::from(1 << 30);
const SERVER: Figure = |sample| sample.server / sample.bytes * f64::from(1 << 30);
const MEDIAN: Figure = |sample| sample.median_latency;
const SLOW: Figure = |sample| sample.slow_latency;

pub(crate) struct Report {
    machine: Value,
    samples: Vec<Sample>,
}

impl Report {
    pub(crate) fn new(kernel: &Kernel, options: &Options) -> Result<Self> {
        let machine = json!({
            "guest": kernel.version(),
            "server's congestion control": network::congestion_control()?,
            "repetitions": options.repetitions,
            "seconds": options.seconds,
            "hawser": env!("CARGO_PKG_VERSION"),
        });
        println!("{machine:#}");
        Ok(Self {
            machine,
            samples: Vec::new(),
        })
    }

    pub(crate) fn add(&mut self, sample: Sample) {
        println!(
            "{} x{}: {} {:.1} MiB/s, {:.0} IOPS, machine {:.2} s/GiB",
            sample.case,
            sample.connections,
            sample.subject,
            THROUGHPUT(&sample),
            IOPS(&sample),
            MACHINE(&sample)
        );
        self.samples.push(sample);
    }

    fn of(&self, subject: &str, case: &str, connections: u8) -> Vec<&Sample> {
        let same = |sample: &&Sample| {
            sample.subject == subject && sample.case == case && sample.connections == connections
        };
        self.samples.iter().filter(same).collect()
    }

    /// What there is beside Hawser's device as it is, in the order in which it was measured.
    fn comparisons(&self) -> Vec<(&str, u8, &str)> {
        let mut seen = Vec::new();
        for sample in &self.samples {
            let key = (
                sample.case.as_str(),
                sample.connections,
                sample.subject.as_str(),
            );
            if sample.subject != HAWSER && !seen.contains(&key) {
                seen.push(key);
            }
        }
        // Another number of connections is a setting, too, though its runs are no neighbours.
        for sample in &self.samples {
            let key = (sample.case.as_str(), sample.connections, HAWSER);
            let alone = !seen
                .iter()
                .any(|(case, connections, _)| *case == key.0 && *connections == key.1);
            if alone && !seen.contains(&key) {
                seen.push(key);
            }
        }
        seen
    }

    pub(crate) fn finish(&self, output: Option<&Path>) -> Result<()> {
        if self.samples.is_empty() {
            return Ok(());
        }
        let mut table = String::from(
            "\nhawser divided by the other, median (least-most) of neighbours in time:\n",
        );
        let mut cases = Vec::new();
        for (case, connections, subject) in self.comparisons() {
            let ours = self.of(
                HAWSER,
                case,
                if subject == HAWSER { 4 } else { connections },
            );
            let theirs = self.of(subject, case, connections);
            let ratio = |figure: Figure| {
                Spread::of(
                    ours.iter()
                        .zip(&theirs)
                        .map(|(ours, theirs)| figure(ours) / figure(theirs)),
                )
            };
            let text = |figure| {
                ratio(figure).map_or_else(String::new, |ratio| {
                    format!("{:.2} ({:.2}-{:.2})", ratio.median, ratio.least, ratio.most)
                })
            };
            let _ = writeln!(
                table,
                "{:<48} throughput {:<18} machine's processor time {:<18} server's {}",
                format!("{case} x{connections} / {subject}"),
                text(THROUGHPUT),
                text(MACHINE),
                text(SERVER),
            );
            let figures = |samples: &[&Sample]| {
                let spread = |figure: Figure| {
                    Spread::json(Spread::of(samples.iter().map(|sample| figure(sample))))
                };
                json!({
                    "MiB/s": spread(THROUGHPUT), "IOPS": spread(IOPS), "p50 us": spread(MEDIAN),
                    "p99 us": spread(SLOW), "machine CPU s/GiB": spread(MACHINE),
                    "server CPU s/GiB": spread(SERVER),
                })
            };
            cases.push(json!({
                "case": case, "connections": connections, "other": subject,
                "hawser": figures(&ours), "figures of the other": figures(&theirs),
                "hawser/other": {
                    "throughput": Spread::json(ratio(THROUGHPUT)),
                    "machine CPU": Spread::json(ratio(MACHINE)),
                    "p50": Spread::json(ratio(MEDIAN)),
                },
            }));
        }
        print!("{table}");
        let Some(output) = output else {
            return Ok(());
        };
        let all = json!({
            "machine": self.machine,
            "figures": "[median, least, most] over the repetitions",
            "volume MiB": round((super::SIZE >> 20) as f64),
            "cases": cases,
        });
        let path = output.with_extension("json");
        fs::write(&path, compact(&all)).with_context(|| path.display().to_string())
    }
}
