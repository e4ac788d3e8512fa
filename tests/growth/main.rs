//! What a volume costs the control plane where there are many: a real API server with 1, 100, 1000 and 3000 NbdVolumes, the
//! real controller and agents, and the part of the kubelet played.
//!
//! At each number it waits until all is quiet, counts what is asked of the API server while nobody wants anything, and
//! then makes, attaches, detaches and deletes some volumes more, one after the other. Nothing is asserted: the curve is
//! read by people. `make growth`; `docs/performance.md` says what came of it.

#[path = "../support/api_server.rs"]
mod api_server;
mod curve;
mod pods;
#[path = "../bench/spread.rs"]
#[allow(dead_code, reason = "what is written down is larger there")]
mod spread;
mod world;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use self::api_server::ApiServer;
use self::curve::{Curve, Point};
use self::world::World;

/// Longer than an agent's turn, which is 30 s.
const IDLE: Duration = Duration::from_secs(35);

/// Until what the last volumes set in motion has come to rest.
const REST: Duration = Duration::from_secs(5);

fn main() -> Result<()> {
    let options = Options::parse()?;
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    tokio::runtime::Runtime::new()?.block_on(run(&options))
}

async fn run(options: &Options) -> Result<()> {
    let folder = tempfile::tempdir_in("/dev/shm")?;
    let api = ApiServer::start(folder.path(), "", &[]).await?;
    let world = World::start(&api, folder.path(), &options.hawser).await?;
    let mut curve = Curve::default();
    let mut there = 0;
    for volumes in &options.volumes {
        let began = Instant::now();
        world.fill(there, *volumes).await?;
        let filling = began.elapsed() / u32::try_from((volumes - there).max(1))?;
        there = *volumes;
        tokio::time::sleep(REST).await;
        let before = world.asked().await?;
        tokio::time::sleep(IDLE).await;
        let idle = (world.asked().await? - before).per(IDLE.as_secs_f64());
        let before = world.asked().await?;
        let mut lives = Vec::new();
        for number in 0..options.samples {
            lives.push(world.live(&format!("sample-{there}-{number}")).await?);
        }
        let asked = (world.asked().await? - before).per(lives.len() as f64);
        let point = Point {
            volumes: there,
            filling,
            idle,
            asked,
            lives,
            controller: world.controller_memory()?,
            agent: world.agent_memory()?,
        };
        println!("{point}");
        curve.add(point);
    }
    print!("{}", curve.table());
    match &options.output {
        Some(output) => curve.write(output),
        None => Ok(()),
    }
}

struct Options {
    volumes: Vec<usize>,
    samples: usize,
    /// The program that is measured.
    hawser: PathBuf,
    output: Option<PathBuf>,
}

impl Options {
    fn parse() -> Result<Self> {
        let mut options = Self {
            volumes: vec![1, 100, 1000, 3000],
            samples: 15,
            hawser: env!("CARGO_BIN_EXE_hawser").into(),
            output: None,
        };
        let mut arguments = std::env::args().skip(1);
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().context("a value for the last option");
            match argument.as_str() {
                // Cargo's.
                "--bench" => {}
                "--volumes" => {
                    let numbers = value()?;
                    let numbers = numbers.split(',').map(str::parse);
                    options.volumes = numbers.collect::<Result<_, _>>()?;
                }
                "--samples" => options.samples = value()?.parse()?,
                "--hawser" => options.hawser = value()?.into(),
                "--output" => options.output = Some(value()?.into()),
                other => bail!(
                    "unknown option {other}; there are --volumes N,N..., --samples N, --hawser PROGRAM, --output FILE"
                ),
            }
        }
        Ok(options)
    }
}
