//! What was measured, as a table for people, JSON for programs, and a picture.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::Options;
use super::clients::{Access, Case, Client, Sample};
use super::distance::Distance;
use super::floor::Floor;
use super::network;
use super::plot;
use super::servers::{Cipher, Server};
use super::spread::{Spread, compact, round};

/// The server that the others are compared with.
const OURS: &str = "hawser";

#[derive(Default)]
struct Measured {
    case: Option<Case>,
    floors: Vec<Floor>,
    /// By server, in the order of the repetitions.
    samples: BTreeMap<String, Vec<Sample>>,
}

pub(crate) struct Report {
    machine: Value,
    /// By cipher and case.
    measured: Vec<((String, String), Measured)>,
    memory: Vec<Value>,
}

impl Report {
    pub(crate) fn new(options: &Options) -> Result<Self> {
        let processor = fs::read_to_string("/proc/cpuinfo")?;
        let models = processor
            .lines()
            .filter(|line| line.starts_with("model name"));
        let model = models.clone().next().and_then(|line| line.split_once(": "));
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
        let machine = json!({
            "processor": model.map_or("unknown", |(_, model)| model),
            "cores": models.count(),
            "kernel": kernel.trim(),
            "congestion control": network::congestion_control()?,
            "file in": options.directory,
            "matrix": if options.full { "full" } else { "quick" },
            "repetitions": options.repetitions,
            "idle processors": if options.awake { "kept awake" } else { "sleep" },
            "hawser": env!("CARGO_PKG_VERSION"),
            "nbdkit": version("nbdkit"),
            "qemu-nbd": version("qemu-nbd"),
            "fio": version("fio"),
            "nbdcopy": version("nbdcopy"),
        });
        println!("{machine:#}");
        Ok(Self {
            machine,
            measured: Vec::new(),
            memory: Vec::new(),
        })
    }

    fn entry(&mut self, cipher: Cipher, case: &Case) -> &mut Measured {
        let key = (cipher.to_string(), case.to_string());
        let place = self.measured.iter().position(|(known, _)| *known == key);
        let place = place.unwrap_or_else(|| {
            let measured = Measured {
                case: Some(*case),
                ..Measured::default()
            };
            self.measured.push((key, measured));
            self.measured.len() - 1
        });
        &mut self.measured[place].1
    }

    pub(crate) fn floor(&mut self, cipher: Cipher, case: &Case, floor: Floor) {
        self.entry(cipher, case).floors.push(floor);
    }

    pub(crate) fn sample(&mut self, cipher: Cipher, case: &Case, server: &Server, sample: Sample) {
        let samples = &mut self.entry(cipher, case).samples;
        samples.entry(server.to_string()).or_default().push(sample);
    }

    pub(crate) fn memory(&mut self, cipher: Cipher, server: &Server, before: u64, peak: u64) {
        let mib = |bytes: u64| bytes as f64 / (1 << 20) as f64;
        println!(
            "\n{cipher}: {server} with 16 connections at depth 128, 128 KiB reads: {:.1} MiB, before that {:.1} MiB",
            mib(peak),
            mib(before)
        );
        self.memory.push(json!({
            "cipher": cipher.to_string(), "server": server.to_string(),
            "MiB before": round(mib(before)), "MiB at most": round(mib(peak)),
        }));
    }

    /// Prints a case.
    pub(crate) fn show(&mut self, cipher: Cipher, case: &Case) {
        println!("\n{cipher}: {case}");
        print!("{}", self.entry(cipher, case).table());
    }

    /// Writes everything down as `OUTPUT.json` and `OUTPUT.svg`.
    pub(crate) fn finish(&self, output: Option<&Path>, distance: &Distance) -> Result<()> {
        println!("\n{:#}", distance.json());
        let Some(output) = output else {
            return Ok(());
        };
        let cases: Vec<Value> = self
            .measured
            .iter()
            .map(|((cipher, _), measured)| measured.json(cipher))
            .collect();
        let all = json!({
            "machine": self.machine,
            "distance": distance.json(),
            "figures": "[median, least, most] over the repetitions",
            "cases": cases,
            "memory": self.memory,
        });
        let write = |extension: &str, text: String| {
            let path = output.with_extension(extension);
            fs::write(&path, text).with_context(|| path.display().to_string())
        };
        write("json", compact(&all))?;
        let bars = self
            .measured
            .iter()
            .filter_map(|((cipher, name), measured)| {
                let case = measured.case.filter(|case| case.client == Client::Fio)?;
                let large = match (case.block >> 10, case.connections, case.depth) {
                    (256, 1, 16) => true,
                    (4, 1, 64) => false,
                    _ => return None,
                };
                let figure = if large {
                    Sample::per_gib
                } else {
                    Sample::per_operation
                };
                let mut bars = Vec::new();
                for (server, samples) in &measured.samples {
                    if let Some(spread) = Spread::of(samples.iter().map(figure)) {
                        bars.push((server.clone(), spread));
                    }
                }
                if let (true, Some(floor)) = (large, measured.floor()) {
                    bars.push(("floor".to_owned(), floor));
                }
                let unit = if large { "s/GiB" } else { "us/request" };
                Some(plot::Group {
                    title: format!("{cipher}, {name}"),
                    unit,
                    bars,
                })
            });
        write("svg", plot::draw(&bars.collect::<Vec<_>>()))
    }
}

impl Measured {
    fn floor(&self) -> Option<Spread> {
        Spread::of(self.floors.iter().map(Floor::sum))
    }

    /// Our figure divided by the other's, repetition by repetition.
    fn ratio(&self, other: &str, figure: impl Fn(&Sample) -> Option<f64>) -> Option<Spread> {
        let ours = self.samples.get(OURS)?.iter();
        let pairs = ours.zip(self.samples.get(other)?);
        Spread::of(pairs.filter_map(|(ours, theirs)| Some(figure(ours)? / figure(theirs)?)))
    }

    fn table(&self) -> String {
        let mut table = format!(
            "{:<16}{:>8}{:>9}{:>8}{:>8}{:>8}{:>8}  hawser/it: s/GiB (spread)   IOPS    p50    p99\n",
            "", "MiB/s", "IOPS", "p50 us", "p99 us", "s/GiB", "us/op"
        );
        for (server, samples) in &self.samples {
            let middle = |figure: &dyn Fn(&Sample) -> Option<f64>, decimals: usize| {
                Spread::of(samples.iter().filter_map(figure)).map_or("-".to_owned(), |spread| {
                    format!("{:.decimals$}", spread.median)
                })
            };
            let _ = write!(
                table,
                "{server:<16}{:>8}{:>9}{:>8}{:>8}{:>8}{:>8}",
                middle(&|sample| Some(sample.mib_per_second()), 0),
                middle(&|sample| Some(sample.operations_per_second()), 0),
                middle(&|sample| sample.median_latency, 0),
                middle(&|sample| sample.slow_latency, 0),
                middle(&|sample| Some(sample.per_gib()), 3),
                middle(&|sample| Some(sample.per_operation()), 2),
            );
            if server != OURS {
                let ratio = |figure: fn(&Sample) -> Option<f64>| {
                    self.ratio(server, figure)
                        .map_or("-".to_owned(), |ratio| format!("{:.2}", ratio.median))
                };
                if let Some(ratio) = self.ratio(server, |sample| Some(sample.per_gib())) {
                    let spread = format!("({:.2}-{:.2})", ratio.least, ratio.most);
                    let _ = write!(table, "{:>18.2} {spread:<13}", ratio.median);
                }
                let _ = write!(
                    table,
                    "{:>6} {:>6} {:>6}",
                    ratio(|sample| Some(sample.operations_per_second())),
                    ratio(|sample| sample.median_latency),
                    ratio(|sample| sample.slow_latency),
                );
            }
            table.push('\n');
        }
        if let (Some(floor), Some(ours), Some(with_client)) = (
            self.floor(),
            self.over_floor(Floor::sum),
            self.over_floor(Floor::sum_with_client),
        ) {
            let part = |part: fn(&Floor) -> f64| {
                Spread::of(self.floors.iter().map(part)).map_or(0.0, |spread| spread.median)
            };
            let _ = writeln!(
                table,
                "floor: {:.3} s/GiB = {:.3} loopback + {:.3} page cache + {:.3} cipher; hawser/floor {:.2} ({:.2}-{:.2})",
                floor.median,
                part(|floor| floor.loopback),
                part(|floor| floor.page_cache),
                part(|floor| floor.cipher),
                ours.median,
                ours.least,
                ours.most,
            );
            let _ = writeln!(
                table,
                "with a peer that handles records: {:.3} loopback; hawser/floor {:.2} ({:.2}-{:.2})",
                part(|floor| floor.with_client),
                with_client.median,
                with_client.least,
                with_client.most,
            );
        }
        table
    }

    fn over_floor(&self, sum: impl Fn(&Floor) -> f64) -> Option<Spread> {
        let ours = self.samples.get(OURS)?.iter();
        let pairs = ours.zip(&self.floors);
        Spread::of(pairs.map(|(ours, floor)| ours.per_gib() / sum(floor)))
    }

    fn json(&self, cipher: &str) -> Value {
        let Some(case) = self.case else {
            return Value::Null;
        };
        let mut servers = serde_json::Map::new();
        for (server, samples) in &self.samples {
            let spread = |figure: &dyn Fn(&Sample) -> Option<f64>| {
                Spread::json(Spread::of(samples.iter().filter_map(figure)))
            };
            let mut figures = json!({
                "MiB/s": spread(&|sample| Some(sample.mib_per_second())),
                "IOPS": spread(&|sample| Some(sample.operations_per_second())),
                "p50 us": spread(&|sample| sample.median_latency),
                "p99 us": spread(&|sample| sample.slow_latency),
                "CPU s/GiB": spread(&|sample| Some(sample.per_gib())),
                "CPU us/op": spread(&|sample| Some(sample.per_operation())),
            });
            if server != OURS {
                let ratio =
                    |figure: fn(&Sample) -> Option<f64>| Spread::json(self.ratio(server, figure));
                figures["hawser/it"] = json!({
                    "CPU": ratio(|sample| Some(sample.per_operation())),
                    "IOPS": ratio(|sample| Some(sample.operations_per_second())),
                    "p50": ratio(|sample| sample.median_latency),
                    "p99": ratio(|sample| sample.slow_latency),
                });
            }
            servers.insert(server.clone(), figures);
        }
        let part = |part: fn(&Floor) -> f64| Spread::json(Spread::of(self.floors.iter().map(part)));
        json!({
            "cipher": cipher,
            "case": case.to_string(),
            "access": match case.access { Access::Read => "read", Access::Write => "write" },
            "block": case.block, "connections": case.connections, "depth": case.depth,
            "servers": servers,
            "floor CPU s/GiB": {
                "loopback": part(|floor| floor.loopback),
                "loopback with a peer that handles records": part(|floor| floor.with_client),
                "page cache": part(|floor| floor.page_cache),
                "cipher": part(|floor| floor.cipher),
                "hawser/sum": Spread::json(self.over_floor(Floor::sum)),
                "hawser/sum with that peer": Spread::json(self.over_floor(Floor::sum_with_client)),
            },
        })
    }
}

fn version(program: &str) -> String {
    let output = std::process::Command::new(program)
        .arg("--version")
        .output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let text = text.unwrap_or_default();
    text.lines().next().unwrap_or("missing").to_owned()
}
