//! The whole of Hawser on one machine, while someone else's programs write and verify: what must never cost a byte.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::Scenario;
use crate::machine::{Machine, PATIENCE, Usage, Volume, block_on, scratch, succeed};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario::new("data::ext4_over_one_connection", || keeps(EXT4, 1)).within_seconds(180),
    Scenario::new("data::ext4_over_four_connections", || keeps(EXT4, 4)).within_seconds(180),
    Scenario::new("data::xfs_over_four_connections", || keeps(XFS, 4)).within_seconds(180),
    Scenario::new("data::btrfs_over_four_connections", || keeps(BTRFS, 4)).within_seconds(180),
    Scenario::new("data::block_over_four_connections", || {
        keeps(Usage::Block, 4)
    })
    .within_seconds(180),
    Scenario::new(
        "data::nothing_on_the_wire_is_plaintext",
        nothing_on_the_wire_is_plaintext,
    ),
    Scenario::new(
        "data::the_server_is_killed_under_load",
        the_server_is_killed,
    )
    .within_seconds(180),
    Scenario::new(
        "data::the_node_part_is_killed_under_load",
        the_node_part_is_killed,
    )
    .within_seconds(180),
    Scenario::new("data::everything_is_killed_at_once", everything_is_killed).within_seconds(180),
    Scenario::new("data::the_network_is_cut", the_network_is_cut).within_seconds(180),
    Scenario::new("data::ext4_grows_while_mounted", || grows(EXT4)).within_seconds(180),
    Scenario::new("data::xfs_grows_while_mounted", || grows(XFS)).within_seconds(180),
    Scenario::new("data::btrfs_grows_while_mounted", || grows(BTRFS)).within_seconds(180),
    Scenario::new("data::block_grows_while_open", || grows(Usage::Block)).within_seconds(180),
];

const EXT4: Usage = Usage::FileSystem("ext4");
const XFS: Usage = Usage::FileSystem("xfs");
const BTRFS: Usage = Usage::FileSystem("btrfs");

const MIB: i64 = 1 << 20;
/// XFS makes nothing smaller than 300 MB.
const SIZE: i64 = 512 * MIB;

/// fio on a volume: four writers that verify what they wrote, soon after they wrote it and again at the end.
struct Fio(Child);

impl Fio {
    /// Writes and verifies for `seconds`; with 0, until everything was written once.
    fn start(volume: &Volume, seconds: u32) -> Result<Self> {
        let mut fio = fio(volume);
        fio.args(["--do_verify=1", "--verify_backlog=128", "--fsync=64"]);
        if seconds > 0 {
            fio.arg("--time_based").arg(format!("--runtime={seconds}"));
        }
        let (_, report) = scratch("fio")?;
        fio.stdin(Stdio::null())
            .stdout(report.try_clone()?)
            .stderr(report);
        Ok(Self(fio.spawn()?))
    }

    fn runs(&mut self) -> Result<bool> {
        Ok(self.0.try_wait()?.is_none())
    }

    /// Waits for the end: no request may have failed, and no byte may be another.
    fn finish(mut self) -> Result<()> {
        let started = Instant::now();
        while self.runs()? {
            ensure!(started.elapsed() < 2 * PATIENCE, "fio does not end");
            thread::sleep(Duration::from_millis(20));
        }
        let status = self.0.wait()?;
        let report = fs::read_to_string(format!("/run/fio.{}", std::process::id()))?;
        ensure!(
            status.success() && !report.contains("verify: bad"),
            "fio: {status}\n{report}"
        );
        Ok(())
    }
}

/// What writing and a later reading have in common.
fn fio(volume: &Volume) -> Command {
    let mut fio = Command::new("fio");
    if volume.target.is_dir() {
        fio.arg(format!("--directory={}", volume.target.display()))
            .arg("--filename_format=$jobnum");
    } else {
        // One range for each writer.
        fio.arg(format!("--filename={}", volume.target.display()))
            .arg("--offset_increment=8m");
    }
    fio.args([
        "--name=verify",
        "--numjobs=4",
        "--group_reporting",
        "--size=8m",
    ])
    .args([
        "--rw=randwrite",
        "--bsrange=4k-64k",
        "--direct=1",
        "--ioengine=psync",
    ])
    .args([
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--randseed=7",
    ]);
    fio
}

/// Everything that was written is there after the volume was away.
fn keeps(usage: Usage, connections: u8) -> Result<()> {
    block_on(async {
        let machine = Machine::new()?;
        let plugin = machine.start().await?;
        let mut volume = machine.provide(&plugin, usage, connections, SIZE).await?;
        Fio::start(&volume, 0)?.finish()?;
        volume.unpublish(&plugin).await?;
        volume.publish(&plugin).await?;
        succeed(fio(&volume).arg("--verify_only"))?;
        machine.remove(&plugin, volume).await
    })
}

fn nothing_on_the_wire_is_plaintext() -> Result<()> {
    const MARKER: &[u8] = b"A marker that is nowhere else: 9b1f6c0e.";
    const CONTROL: &[u8] = b"A control that is nowhere else: 77d2a4e1.";
    block_on(async {
        let machine = Machine::new()?;
        let plugin = machine.start().await?;
        let (capture, _) = scratch("capture")?;
        let (said, log) = scratch("tcpdump")?;
        let mut tcpdump = Command::new("tcpdump")
            .args(["-i", "lo", "-s", "0", "-B", "65536", "-U", "-w"])
            .arg(&capture)
            .stderr(log)
            .spawn()?;
        until("tcpdump listens", || {
            Ok(fs::read_to_string(&said)?.contains("listening on"))
        })?;

        let volume = machine.provide(&plugin, EXT4, 4, SIZE).await?;
        let file = volume.target.join("marked");
        let content = MARKER.repeat(25_000);
        fs::write(&file, &content)?;
        succeed(Command::new("sync").arg(&file))?;
        fs::write("/proc/sys/vm/drop_caches", "3")?;
        ensure!(fs::read(&file)? == content, "the file came back changed");
        // The search must find what does go over the wire in plaintext.
        send_in_plaintext(CONTROL)?;
        machine.remove(&plugin, volume).await?;

        let captured = |text: &[u8]| -> Result<usize> {
            let bytes = fs::read(&capture)?;
            Ok(bytes
                .windows(text.len())
                .filter(|window| *window == text)
                .count())
        };
        until("the control is captured", || Ok(captured(CONTROL)? > 0))?;
        succeed(Command::new("kill").arg(tcpdump.id().to_string()))?;
        tcpdump.wait()?;
        let bytes = fs::metadata(&capture)?.len();
        ensure!(
            bytes > 2 * content.len() as u64,
            "only {bytes} bytes were captured"
        );
        let said = fs::read_to_string(&said)?;
        ensure!(
            said.contains("\n0 packets dropped by kernel"),
            "packets are missing: {said}"
        );
        ensure!(captured(MARKER)? == 0, "the marker is on the wire");
        Ok(())
    })
}

fn send_in_plaintext(text: &[u8]) -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut client = TcpStream::connect(listener.local_addr()?)?;
    client.write_all(text)?;
    drop(client);
    let mut received = Vec::new();
    listener.accept()?.0.read_to_end(&mut received)?;
    ensure!(received == text, "the loopback changed what it carried");
    Ok(())
}

fn the_server_is_killed() -> Result<()> {
    block_on(async {
        let machine = Machine::new()?;
        let plugin = machine.start().await?;
        let volume = machine.provide(&plugin, EXT4, 4, SIZE).await?;
        let mut fio = Fio::start(&volume, 15)?;
        for _ in 0..3 {
            thread::sleep(Duration::from_secs(3));
            ensure!(fio.runs()?, "fio ended before the server was killed");
            machine.kill_server(&volume).await?;
            machine.server(&volume).await?;
        }
        fio.finish()?;
        machine.remove(&plugin, volume).await
    })
}

/// The kernel's device works on alone, and the next node part looks after it: it replaces what dies then.
fn the_node_part_is_killed() -> Result<()> {
    block_on(async {
        let machine = Machine::new()?;
        let mut plugin = machine.start().await?;
        let volume = machine.provide(&plugin, EXT4, 4, SIZE).await?;
        let mut fio = Fio::start(&volume, 15)?;
        for _ in 0..2 {
            thread::sleep(Duration::from_secs(2));
            plugin.kill()?;
            thread::sleep(Duration::from_secs(2));
            ensure!(fio.runs()?, "fio ended before the node part was back");
            plugin = machine.start().await?;
        }
        machine.kill_server(&volume).await?;
        machine.server(&volume).await?;
        fio.finish()?;
        machine.remove(&plugin, volume).await
    })
}

fn everything_is_killed() -> Result<()> {
    block_on(async {
        let machine = Machine::new()?;
        let mut plugin = machine.start().await?;
        let volume = machine.provide(&plugin, XFS, 2, SIZE).await?;
        let mut fio = Fio::start(&volume, 15)?;
        for _ in 0..2 {
            thread::sleep(Duration::from_secs(3));
            ensure!(fio.runs()?, "fio ended before everything was killed");
            machine.kill_server(&volume).await?;
            plugin.kill()?;
            thread::sleep(Duration::from_secs(1));
            plugin = machine.start().await?;
        }
        fio.finish()?;
        machine.remove(&plugin, volume).await
    })
}

/// For longer than a request may take, so that connections are given up and made anew.
fn the_network_is_cut() -> Result<()> {
    block_on(async {
        let machine = Machine::new()?;
        let plugin = machine.start().await?;
        let volume = machine.provide(&plugin, EXT4, 4, SIZE).await?;
        let mut fio = Fio::start(&volume, 10)?;
        thread::sleep(Duration::from_secs(3));
        ensure!(fio.runs()?, "fio ended before the network was cut");
        succeed(Command::new("ip").args(["link", "set", "lo", "down"]))?;
        thread::sleep(Duration::from_secs(10));
        succeed(Command::new("ip").args(["link", "set", "lo", "up"]))?;
        fio.finish()?;
        machine.remove(&plugin, volume).await
    })
}

/// Twice while it is written to, and what was written before is there after.
fn grows(usage: Usage) -> Result<()> {
    block_on(async {
        let machine = Machine::new()?;
        let plugin = machine.start().await?;
        let mut volume = machine.provide(&plugin, usage, 4, SIZE).await?;
        let mut fio = Fio::start(&volume, 10)?;
        for size in [SIZE + 100 * MIB, 2 * SIZE] {
            thread::sleep(Duration::from_secs(2));
            ensure!(fio.runs()?, "fio ended before the volume was grown");
            let before = room(&volume.target)?;
            volume.expand(&plugin, size).await?;
            let after = room(&volume.target)?;
            ensure!(
                after > before + 64 * MIB.unsigned_abs(),
                "it has {after} bytes and had {before}"
            );
        }
        fio.finish()?;
        volume.unpublish(&plugin).await?;
        volume.publish(&plugin).await?;
        machine.remove(&plugin, volume).await
    })
}

/// Bytes of a mounted file system, or of a device.
fn room(target: &Path) -> Result<u64> {
    if target.is_dir() {
        let stat = rustix::fs::statvfs(target)?;
        return Ok(stat.f_blocks * stat.f_frsize);
    }
    let size = succeed(Command::new("blockdev").arg("--getsize64").arg(target))?;
    size.trim().parse().context("the device's size")
}

fn until(what: &str, mut so: impl FnMut() -> Result<bool>) -> Result<()> {
    let started = Instant::now();
    while !so()? {
        ensure!(started.elapsed() < PATIENCE, "never came true: {what}");
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}
