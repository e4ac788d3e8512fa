//! What is measured, by fio on a block device.

use std::fmt;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// One thing to measure.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Case {
    /// fio's name of it.
    access: &'static str,
    kib: u32,
    depth: u32,
    /// Requests that fio makes with one system call, at most.
    batch: u32,
    /// Past the page cache, as O_DIRECT says; else through it, as a file system reads.
    direct: bool,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}K depth {}", self.access, self.kib, self.depth)?;
        if self.batch > 1 {
            write!(f, " batches of {}", self.batch)?;
        }
        f.write_str(if self.direct { "" } else { " buffered" })
    }
}

/// All cases: 4 KiB to 4 MiB, in order and at random, and the file system's way of reading in order. Small requests also in
/// batches, for where each takes a system call the machine is busy with those.
pub(crate) fn all() -> Vec<Case> {
    let case = |access, kib, depth, batch| Case {
        access,
        kib,
        depth,
        batch,
        direct: true,
    };
    let mut cases = Vec::new();
    for access in ["randread", "randwrite", "read", "write"] {
        for (kib, depth, batch) in [(4, 32, 1), (4, 32, 16), (256, 8, 1), (1024, 4, 1)] {
            cases.push(case(access, kib, depth, batch));
        }
    }
    for (access, kib, depth) in [("read", 4096, 2), ("write", 4096, 2), ("randread", 4, 1)] {
        cases.push(case(access, kib, depth, 1));
    }
    cases.push(Case {
        direct: false,
        ..case("read", 128, 1, 1)
    });
    cases
}

/// What one run of fio came to.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Sample {
    /// Whose device it was.
    pub(crate) subject: String,
    pub(crate) case: String,
    pub(crate) connections: u8,
    pub(crate) operations: f64,
    pub(crate) bytes: f64,
    pub(crate) seconds: f64,
    /// Microseconds.
    pub(crate) median_latency: f64,
    pub(crate) slow_latency: f64,
    /// Seconds of processor time that the machine took, and the server; the host fills them in.
    #[serde(default)]
    pub(crate) machine: f64,
    #[serde(default)]
    pub(crate) server: f64,
}

impl Case {
    pub(crate) fn run(
        &self,
        device: &Path,
        subject: &str,
        connections: u8,
        seconds: f64,
    ) -> Result<Sample> {
        if !self.direct {
            fs::write("/proc/sys/vm/drop_caches", "1")?;
        }
        let output = Command::new("fio")
            .args(["--name=bench", "--thread", "--group_reporting"])
            .arg(format!("--filename={}", device.display()))
            .arg(format!("--rw={}", self.access))
            .arg(format!("--bs={}k", self.kib))
            .arg(format!("--iodepth={}", self.depth))
            .arg(format!("--direct={}", u8::from(self.direct)))
            .arg(if self.direct {
                "--ioengine=libaio"
            } else {
                "--ioengine=psync"
            })
            .arg(format!("--iodepth_batch_submit={}", self.batch))
            .arg(format!("--iodepth_batch_complete_max={}", self.batch))
            .args(["--norandommap", "--randrepeat=0", "--output-format=json"])
            // Through the page cache, a second time round would measure nothing but it.
            .args(self.direct.then_some("--time_based"))
            .arg(format!("--runtime={:.0}ms", seconds * 1e3))
            .current_dir("/run")
            .output()
            .context("fio: run `tests/support/install kernel`")?;
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(
            output.status.success(),
            "fio: {}\n{text}{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        let report: Value = serde_json::from_str(&text[text.find('{').unwrap_or(0)..])?;
        let job = &report["jobs"][0];
        let result = if self.access.ends_with("read") {
            &job["read"]
        } else {
            &job["write"]
        };
        let number = |value: &Value| value.as_f64().context("a number in fio's report");
        let percentile = |which: &str| number(&result["clat_ns"]["percentile"][which]);
        Ok(Sample {
            subject: subject.to_owned(),
            case: self.to_string(),
            connections,
            operations: number(&result["total_ios"])?,
            bytes: number(&result["io_bytes"])?,
            seconds: number(&result["runtime"])? / 1e3,
            median_latency: percentile("50.000000")? / 1e3,
            slow_latency: percentile("99.000000")? / 1e3,
            machine: 0.0,
            server: 0.0,
        })
    }
}
