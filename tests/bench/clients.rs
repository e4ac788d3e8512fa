//! The clients, and what one run of one of them comes to.

use std::fmt;
use std::fs;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::SIZE;
use super::servers::{Cipher, Server, Site};

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Client {
    /// fio's nbd engine, at random offsets.
    Fio,
    /// The whole file once, in order.
    Nbdcopy,
    /// libnbd's Python binding, one request at a time: what a request takes from end to end.
    Libnbd,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
}

/// One thing to measure.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Case {
    pub(crate) client: Client,
    pub(crate) access: Access,
    /// Bytes of each request.
    pub(crate) block: u32,
    pub(crate) connections: u32,
    /// Requests in flight on each connection.
    pub(crate) depth: u32,
}

/// What a run came to.
#[derive(Clone, Copy)]
pub(crate) struct Sample {
    pub(crate) bytes: f64,
    pub(crate) operations: f64,
    /// How long the client worked.
    pub(crate) seconds: f64,
    /// Seconds of processor time in the server, with the handshakes.
    pub(crate) processor: f64,
    /// Microseconds, where the client says.
    pub(crate) median_latency: Option<f64>,
    pub(crate) slow_latency: Option<f64>,
}

impl Sample {
    /// Seconds of the server's processor time for a GiB.
    pub(crate) fn per_gib(&self) -> f64 {
        self.processor / self.bytes * (1_u64 << 30) as f64
    }

    /// Microseconds of it for a request.
    pub(crate) fn per_operation(&self) -> f64 {
        self.processor / self.operations * 1e6
    }

    pub(crate) fn mib_per_second(&self) -> f64 {
        self.bytes / self.seconds / (1 << 20) as f64
    }

    pub(crate) fn operations_per_second(&self) -> f64 {
        self.operations / self.seconds
    }
}

impl Case {
    pub(crate) fn new(
        client: Client,
        access: Access,
        block: u32,
        connections: u32,
        depth: u32,
    ) -> Self {
        Self {
            client,
            access,
            block,
            connections,
            depth,
        }
    }

    pub(crate) fn run(
        &self,
        site: &Site,
        server: &Server,
        cipher: Cipher,
        seconds: f64,
    ) -> Result<Sample> {
        let before = server.processor_time(site)?;
        let mut sample = match self.client {
            Client::Fio => self.fio(site, server, cipher, seconds)?,
            Client::Nbdcopy => self.nbdcopy(site, server, cipher)?,
            Client::Libnbd => self.libnbd(site, server, cipher, seconds)?,
        };
        sample.processor = server.processor_time(site)? - before;
        Ok(sample)
    }

    fn fio(&self, site: &Site, server: &Server, cipher: Cipher, seconds: f64) -> Result<Sample> {
        let access = match self.access {
            Access::Read => "randread",
            Access::Write => "randwrite",
        };
        let mut fio = site.unprivileged("fio", cipher);
        fio.args([
            "--name=bench",
            "--ioengine=nbd",
            "--thread",
            "--group_reporting",
        ])
        .arg(format!("--uri={}", server.uri()))
        .arg(format!("--rw={access}"))
        .arg(format!("--bs={}", self.block))
        .arg(format!("--numjobs={}", self.connections))
        .arg(format!("--iodepth={}", self.depth))
        .args(["--time_based", "--norandommap", "--randrepeat=0"])
        .arg(format!("--runtime={:.0}ms", seconds * 1e3))
        .arg("--output-format=json");
        let report: Value = serde_json::from_str(&run(fio)?)?;
        let job = &report["jobs"][0];
        ensure!(job["error"] == 0, "fio: error {}", job["error"]);
        let result = match self.access {
            Access::Read => &job["read"],
            Access::Write => &job["write"],
        };
        let number = |value: &Value| value.as_f64().context("a number in fio's report");
        let percentile = |which: &str| result["clat_ns"]["percentile"][which].as_f64();
        Ok(Sample {
            bytes: number(&result["io_bytes"])?,
            operations: number(&result["total_ios"])?,
            seconds: number(&result["runtime"])? / 1e3,
            processor: 0.0,
            median_latency: percentile("50.000000").map(|ns| ns / 1e3),
            slow_latency: percentile("99.000000").map(|ns| ns / 1e3),
        })
    }

    fn nbdcopy(&self, site: &Site, server: &Server, cipher: Cipher) -> Result<Sample> {
        let mut nbdcopy = site.client("nbdcopy", cipher);
        let uri = with_certificates(site, server);
        nbdcopy
            .arg("--no-extents")
            .arg(format!("--connections={}", self.connections))
            .arg(format!("--requests={}", self.depth))
            .arg(format!("--request-size={}", self.block));
        match self.access {
            Access::Read => nbdcopy.args([&uri, "null:"]),
            Access::Write => nbdcopy.arg(site.path("source")).arg(&uri),
        };
        let began = Instant::now();
        run(nbdcopy)?;
        let bytes = SIZE as f64;
        Ok(Sample {
            bytes,
            operations: bytes / f64::from(self.block),
            seconds: began.elapsed().as_secs_f64(),
            processor: 0.0,
            median_latency: None,
            slow_latency: None,
        })
    }

    fn libnbd(&self, site: &Site, server: &Server, cipher: Cipher, seconds: f64) -> Result<Sample> {
        let script = site.path("latency.py");
        fs::write(&script, include_str!("latency.py"))?;
        let access = match self.access {
            Access::Read => "read",
            Access::Write => "write",
        };
        // The system's own, which has the binding.
        let mut python = site.client("/usr/bin/python3", cipher);
        python
            .arg(script)
            .args([&with_certificates(site, server), access])
            .args([&self.block.to_string(), &seconds.to_string()]);
        let report: Value = serde_json::from_str(&run(python)?)?;
        let number = |key: &str| report[key].as_f64().context("a number in the report");
        let operations = number("operations")?;
        Ok(Sample {
            bytes: operations * f64::from(self.block),
            operations,
            seconds: number("seconds")?,
            processor: 0.0,
            median_latency: Some(number("p50")?),
            slow_latency: Some(number("p99")?),
        })
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let client = match self.client {
            Client::Fio => "fio",
            Client::Nbdcopy => "nbdcopy",
            Client::Libnbd => "libnbd",
        };
        let access = match self.access {
            Access::Read => "read",
            Access::Write => "write",
        };
        let (block, connections, depth) = (self.block >> 10, self.connections, self.depth);
        write!(f, "{client} {access} {block}K {connections}x{depth}")
    }
}

fn with_certificates(site: &Site, server: &Server) -> String {
    if server.tls {
        let pki = site.pki();
        format!("{}?tls-certificates={}", server.uri(), pki.display())
    } else {
        server.uri()
    }
}

/// Runs a client to its end; what it printed.
fn run(mut command: Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("{command:?}: run `tests/support/install bench`"))?;
    let (out, err) = (output.stdout, String::from_utf8_lossy(&output.stderr));
    let out = String::from_utf8_lossy(&out);
    ensure!(
        output.status.success(),
        "{command:?}: {}\n{out}{err}",
        output.status
    );
    // fio prints notes before its report.
    Ok(out[out.find('{').unwrap_or(0)..].to_owned())
}
