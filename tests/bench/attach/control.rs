//! What the calls before the first byte take, and for how long I/O stands still when a server is killed.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use hawser::proto::control::StatisticsRequest;
use hawser::proto::control::control_client::ControlClient;
use hawser::proto::csi::volume_capability::MountVolume;
use hawser::proto::csi::volume_capability::access_mode::Mode;
use hawser::proto::socket;
use rustix::process::{Pid, Signal};

use super::driver::{Driver, mounted};
use super::spread::Spread;

const BLOCK: usize = 4096;

/// Bytes of a volume.
const SIZE: i64 = 256 << 20;

/// Until the pages and the certificates of a new server are in its memory.
const WARM: Duration = Duration::from_secs(2);

/// Milliseconds, by what they were spent on.
type Times = BTreeMap<String, Vec<f64>>;

/// Lets a volume live so many times, and prints the table.
pub(crate) async fn measure(repetitions: usize) -> Result<()> {
    let driver = Driver::start(&[])?;
    let mut times = Times::new();
    for repetition in 0..repetitions {
        live(&driver, repetition, &mut times).await?;
    }
    println!("milliseconds, median (least-most) of {repetitions}:");
    for (what, samples) in &times {
        if let Some(spread) = Spread::of(samples.iter().copied()) {
            println!(
                "{what:<48}{:>9.1} ({:.1}-{:.1})",
                spread.median, spread.least, spread.most
            );
        }
    }
    Ok(())
}

async fn live(driver: &Driver, repetition: usize, times: &mut Times) -> Result<()> {
    let mut calls = driver.connect().await?;
    let mount = MountVolume {
        fs_type: "ext4".into(),
        ..MountVolume::default()
    };
    let capability = mounted(Mode::SingleNodeWriter, mount);
    let mut note = |what: &str, spent: f64| times.entry(what.to_owned()).or_default().push(spent);
    let began = Instant::now();
    let mut claim = calls
        .create(&format!("pvc-{repetition}"), SIZE, capability)
        .await?;
    note("1 CreateVolume", milliseconds(began));
    let began = Instant::now();
    calls.attach(&mut claim).await?;
    note("2 ControllerPublish", milliseconds(began));
    let began = Instant::now();
    calls.stage(&claim).await?;
    note("3 NodeStage", milliseconds(began));
    for (step, spent) in steps(&driver.log()?)? {
        note(&format!("3 NodeStage: {step}"), spent);
    }
    let began = Instant::now();
    calls.publish(&claim, "pod", false).await?;
    note("4 NodePublish", milliseconds(began));

    let device = device()?;
    tokio::time::sleep(WARM).await;
    let control = driver.path("state/servers").join(&claim.id).join("control");
    kill(&control).await?;
    let began = Instant::now();
    read_block(&device)?;
    note(
        "5 server killed, device idle: the next read",
        milliseconds(began),
    );
    tokio::time::sleep(WARM).await;
    note(
        "6 server killed, reads in flight: the longest",
        under_load(&device, &control).await?,
    );

    let began = Instant::now();
    calls.unpublish(&claim, "pod").await?;
    calls.unstage(&claim).await?;
    note("7 NodeUnpublish, NodeUnstage", milliseconds(began));
    let began = Instant::now();
    calls.detach(&claim).await?;
    calls.delete(&claim).await?;
    note("8 ControllerUnpublish, DeleteVolume", milliseconds(began));
    Ok(())
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

/// The last staging's steps, as the log has them: of the device, and of what is on it.
fn steps(log: &str) -> Result<Vec<(String, f64)>> {
    let last = |mark: &str| {
        let found = log.lines().rev().find(|line| line.contains(mark));
        found.with_context(|| format!("no {mark} in the log"))
    };
    let mut steps = Vec::new();
    let staged = last("steps=secret")?;
    let (_, listed) = staged.split_once("steps=").context("the steps")?;
    for step in listed.split(", ") {
        let mut words = step.rsplitn(3, ' ');
        let (unit, number, name) = (words.next(), words.next(), words.next());
        if let (Some("ms"), Some(number), Some(name)) = (unit, number, name) {
            steps.push((name.to_owned(), number.parse()?));
        }
    }
    for word in last("verify_ms=")?.split_whitespace() {
        if let Some((name, number)) = word.split_once("_ms=") {
            steps.push((format!("attach, {name}"), number.parse()?));
        }
    }
    Ok(steps)
}

/// The one device that is connected.
fn device() -> Result<PathBuf> {
    for entry in fs::read_dir("/sys/block")? {
        let entry = entry?;
        if entry.path().join("pid").exists() {
            return Ok(Path::new("/dev").join(entry.file_name()));
        }
    }
    anyhow::bail!("no device is connected")
}

/// As a crash would.
async fn kill(control: &Path) -> Result<()> {
    let channel = socket::connect(control).await?;
    let answer = ControlClient::new(channel)
        .statistics(StatisticsRequest {})
        .await?;
    let process =
        Pid::from_raw(answer.into_inner().process_id.try_into()?).context("no process")?;
    rustix::process::kill_process(process, Signal::KILL).context("killing a server")
}

fn read_block(device: &Path) -> Result<()> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(device)?;
    let mut buffer = vec![0; 2 * BLOCK];
    let start = buffer.as_ptr().align_offset(BLOCK);
    file.read_exact_at(&mut buffer[start..start + BLOCK], 0)?;
    Ok(())
}

/// Reads without a pause while the server is killed.
async fn under_load(device: &Path, control: &Path) -> Result<f64> {
    let stop = Arc::new(AtomicBool::new(false));
    let (stopped, path) = (Arc::clone(&stop), device.to_owned());
    let reader = std::thread::spawn(move || -> Result<f64> {
        let mut longest = 0.0;
        while !stopped.load(Ordering::Relaxed) {
            let began = Instant::now();
            read_block(&path)?;
            longest = f64::max(longest, milliseconds(began));
        }
        Ok(longest)
    });
    tokio::time::sleep(WARM / 4).await;
    kill(control).await?;
    tokio::time::sleep(WARM).await;
    stop.store(true, Ordering::Relaxed);
    let longest = reader.join();
    longest.map_err(|_| anyhow::anyhow!("the reader panicked"))?
}
