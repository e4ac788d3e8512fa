//! The Node service on a real kernel: what csi-sanity does not look at, which is what becomes of the data.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use hawser::proto::csi::volume_capability::MountVolume;
use hawser::proto::csi::volume_capability::access_mode::Mode;
use tonic::{Code, Status};

use crate::Scenario;
use crate::driver::{Calls, Claim, Driver, block, mounted};
use crate::node::block_on;

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario::new("csi::ext4", || file_system("ext4")).within_seconds(180),
    Scenario::new("csi::xfs", || file_system("xfs")).within_seconds(180),
    Scenario::new("csi::btrfs", || file_system("btrfs")).within_seconds(180),
    Scenario::new("csi::raw_block", raw_block).within_seconds(120),
    Scenario::new("csi::several_pods_and_a_reader", several_pods).within_seconds(120),
    Scenario::new("csi::many_nodes_read", many_nodes_read).within_seconds(120),
    Scenario::new("csi::killed_while_published", killed).within_seconds(120),
    Scenario::new("csi::only_what_is_empty_is_formatted", only_empty).within_seconds(180),
    Scenario::new("csi::mounted_elsewhere", mounted_elsewhere).within_seconds(120),
];

const MIB: i64 = 1 << 20;
const MARKER: &[u8] = b"what the pod wrote";

fn kind(fs_type: &str) -> MountVolume {
    MountVolume {
        fs_type: fs_type.into(),
        ..MountVolume::default()
    }
}

/// Created, attached, staged.
async fn staged(
    calls: &mut Calls<'_>,
    mib: i64,
    capability: hawser::proto::csi::VolumeCapability,
) -> Result<Claim> {
    let mut claim = calls.create("data", mib * MIB, capability).await?;
    calls.attach(&mut claim).await?;
    calls.stage(&claim).await?;
    Ok(claim)
}

async fn gone(calls: &mut Calls<'_>, claim: &Claim) -> Result<()> {
    calls.unstage(claim).await?;
    calls.detach(claim).await?;
    calls.delete(claim).await?;
    Ok(())
}

fn refused<T>(result: Result<T, Status>, code: Code, part: &str) -> Result<()> {
    match result {
        Ok(_) => bail!("not refused: {part}"),
        Err(status) => {
            ensure!(
                status.code() == code && status.message().contains(part),
                "{status:?}"
            );
            Ok(())
        }
    }
}

fn mountinfo(point: &Path) -> Result<String> {
    let all = fs::read_to_string("/proc/self/mountinfo")?;
    let wanted = format!(" {} ", point.display());
    let line = all.lines().find(|line| line.contains(&wanted));
    Ok(line.context("not mounted")?.to_owned())
}

/// Formatted once, mounted as asked, grown while in use, and the same data after it was staged again.
fn file_system(fs_type: &str) -> Result<()> {
    block_on(async {
        let driver = Driver::start(&[])?;
        let mut calls = driver.connect().await?;
        let mount = MountVolume {
            mount_flags: vec!["noatime".into()],
            ..kind(fs_type)
        };
        let claim = staged(&mut calls, 384, mounted(Mode::SingleNodeWriter, mount)).await?;
        let pod = calls.publish(&claim, "pod", false).await?;
        let line = mountinfo(&pod)?;
        ensure!(
            line.contains("noatime") && line.contains(&format!(" - {fs_type} ")),
            "{line}"
        );
        fs::write(pod.join("file"), MARKER)?;
        File::open(pod.join("file"))?.sync_all()?;

        let before = calls.usage(&claim, "pod").await?[0].total;
        calls.expand(&claim, "pod", 768 * MIB).await?;
        let after = calls.usage(&claim, "pod").await?[0].total;
        ensure!(after > before + 300 * MIB, "{before} -> {after} bytes");
        fs::write(pod.join("more"), vec![7; 1 << 20])?;

        calls.unpublish(&claim, "pod").await?;
        calls.unstage(&claim).await?;
        calls.stage(&claim).await?;
        let pod = calls.publish(&claim, "pod", false).await?;
        ensure!(
            fs::read(pod.join("file"))? == MARKER,
            "other data after staging again"
        );
        calls.unpublish(&claim, "pod").await?;
        gone(&mut calls, &claim).await?;

        let log = driver.log()?;
        let stages: Vec<&str> = log
            .lines()
            .filter(|line| line.contains("staged device"))
            .collect();
        let formatted = stages
            .iter()
            .filter(|line| line.contains("format "))
            .count();
        ensure!((stages.len(), formatted) == (2, 1), "{stages:#?}");
        drop(calls);
        driver.end_well()
    })
}

fn raw_block() -> Result<()> {
    block_on(async {
        let driver = Driver::start(&[])?;
        let mut calls = driver.connect().await?;
        let claim = staged(&mut calls, 64, block(Mode::SingleNodeWriter)).await?;
        let pod = calls.publish(&claim, "pod", false).await?;
        let mut device = File::options().read(true).write(true).open(&pod)?;
        ensure!(
            device.seek(SeekFrom::End(0))? == 64 << 20,
            "the device's size"
        );
        device.write_all_at(MARKER, 0)?;
        device.sync_all()?;
        calls.expand(&claim, "pod", 128 * MIB).await?;
        ensure!(
            device.seek(SeekFrom::End(0))? == 128 << 20,
            "the grown device's size"
        );
        ensure!(
            calls.usage(&claim, "pod").await?[0].total == 128 * MIB,
            "the told size"
        );
        drop(device);
        calls.unpublish(&claim, "pod").await?;
        calls.unstage(&claim).await?;
        // What a pod wrote to the raw device is never anybody's to format or check.
        calls.stage(&claim).await?;
        let pod = calls.publish(&claim, "pod", false).await?;
        let mut read = vec![0; MARKER.len()];
        File::open(&pod)?.read_exact(&mut read)?;
        ensure!(read == MARKER, "other data after staging again");
        calls.unpublish(&claim, "pod").await?;
        gone(&mut calls, &claim).await?;
        drop(calls);
        driver.end_well()
    })
}

/// Two pods on one node, with a group, and one that may only read.
fn several_pods() -> Result<()> {
    block_on(async {
        let driver = Driver::start(&[])?;
        let mut calls = driver.connect().await?;
        let mount = MountVolume {
            volume_mount_group: "2000".into(),
            ..kind("")
        };
        let capability = mounted(Mode::SingleNodeMultiWriter, mount);
        let claim = staged(&mut calls, 64, capability).await?;
        let writer = calls.publish(&claim, "writer", false).await?;
        let reader = calls.publish(&claim, "reader", true).await?;
        fs::write(writer.join("file"), MARKER)?;
        ensure!(
            fs::read(reader.join("file"))? == MARKER,
            "the reader sees other data"
        );
        let error = fs::write(reader.join("file"), "")
            .err()
            .context("the reader wrote")?;
        ensure!(
            error.kind() == std::io::ErrorKind::ReadOnlyFilesystem,
            "{error}"
        );
        for path in [&writer, &writer.join("file")] {
            ensure!(fs::metadata(path)?.gid() == 2000, "{}", path.display());
        }
        let mode = fs::metadata(&writer)?.mode();
        ensure!(mode & 0o2070 == 0o2070, "mode {mode:o}");
        refused(
            calls.unstage(&claim).await,
            Code::FailedPrecondition,
            "still published",
        )?;
        for target in ["writer", "reader"] {
            calls.unpublish(&claim, target).await?;
        }
        gone(&mut calls, &claim).await?;
        drop(calls);
        driver.end_well()
    })
}

/// Filled by one, then read by many: the server takes no write, and nothing is formatted or repaired.
fn many_nodes_read() -> Result<()> {
    block_on(async {
        let driver = Driver::start(&[])?;
        let mut calls = driver.connect().await?;
        let writer = mounted(Mode::SingleNodeWriter, kind(""));
        let mut claim = calls.create("data", 64 * MIB, writer.clone()).await?;
        claim.capability = mounted(Mode::MultiNodeReaderOnly, kind(""));
        calls.attach(&mut claim).await?;
        let too_early = calls.stage(&claim).await;
        refused(too_early, Code::FailedPrecondition, "not formatted yet")?;
        calls.detach(&claim).await?;

        claim.capability = writer;
        calls.attach(&mut claim).await?;
        calls.stage(&claim).await?;
        let pod = calls.publish(&claim, "pod", false).await?;
        fs::write(pod.join("file"), MARKER)?;
        calls.unpublish(&claim, "pod").await?;
        calls.unstage(&claim).await?;
        calls.detach(&claim).await?;

        claim.capability = mounted(Mode::MultiNodeReaderOnly, kind(""));
        calls.attach(&mut claim).await?;
        calls.stage(&claim).await?;
        let pod = calls.publish(&claim, "pod", false).await?;
        ensure!(fs::read(pod.join("file"))? == MARKER, "other data");
        ensure!(fs::write(pod.join("file"), "").is_err(), "a reader wrote");
        calls.unpublish(&claim, "pod").await?;
        gone(&mut calls, &claim).await?;
        drop(calls);
        driver.end_well()
    })
}

/// The pod does not notice that the process was killed, and the next process knows what is where.
fn killed() -> Result<()> {
    block_on(async {
        let mut driver = Driver::start(&[])?;
        let mut calls = driver.connect().await?;
        let claim = staged(&mut calls, 64, mounted(Mode::SingleNodeWriter, kind(""))).await?;
        let pod = calls.publish(&claim, "pod", false).await?;
        let mut file = File::create(pod.join("file"))?;
        file.write_all(MARKER)?;
        drop(calls);
        driver.restart()?;
        file.write_all(MARKER)?;
        file.sync_all()?;
        drop(file);

        let mut calls = driver.connect().await?;
        calls.stage(&claim).await?;
        calls.publish(&claim, "pod", false).await?;
        refused(
            calls.publish(&claim, "pod", true).await,
            Code::AlreadyExists,
            "published",
        )?;
        refused(
            calls.publish(&claim, "other", false).await,
            Code::FailedPrecondition,
            "one place",
        )?;
        ensure!(
            calls.usage(&claim, "pod").await?.len() == 2,
            "bytes and inodes"
        );
        ensure!(
            fs::read(pod.join("file"))?.len() == 2 * MARKER.len(),
            "lost data"
        );
        calls.unpublish(&claim, "pod").await?;
        calls.unstage(&claim).await?;
        calls.unstage(&claim).await?;
        drop(calls);
        driver.restart()?;
        let mut calls = driver.connect().await?;
        gone(&mut calls, &claim).await?;
        drop(calls);
        driver.end_well()
    })
}

/// Foreign data, a device that cannot be read, and a file system that is gone: none of them is formatted over.
fn only_empty() -> Result<()> {
    block_on(async {
        let driver = Driver::start(&[])?;
        let mut calls = driver.connect().await?;
        // Verification would find the shortened store before anything else does.
        calls.parameters.insert("verify".into(), "off".into());
        let capability = mounted(Mode::SingleNodeWriter, kind(""));
        let mut claim = calls.create("data", 64 * MIB, capability).await?;
        let data = driver.path("pool/volumes").join(&claim.id).join("data");
        let backing = File::options().read(true).write(true).open(&data)?;
        calls.attach(&mut claim).await?;

        backing.write_all_at(MARKER, (64 << 20) - 100)?;
        refused(
            calls.stage(&claim).await,
            Code::FailedPrecondition,
            "never formatted",
        )?;
        let mut read = vec![0; MARKER.len()];
        backing.read_exact_at(&mut read, (64 << 20) - 100)?;
        ensure!(read == MARKER, "foreign data was overwritten");

        // Shorter than what is exported: the end cannot be read.
        backing.set_len(32 << 20)?;
        let unreadable = calls.stage(&claim).await;
        refused(
            unreadable,
            Code::Unavailable,
            "must not be taken for an empty device",
        )?;
        ensure!(
            fs::read(&data)?.iter().all(|&byte| byte == 0),
            "something was written"
        );
        backing.set_len(64 << 20)?;

        calls.stage(&claim).await?;
        calls.unstage(&claim).await?;
        backing.set_len(0)?;
        backing.set_len(64 << 20)?;
        refused(
            calls.stage(&claim).await,
            Code::FailedPrecondition,
            "not formatted again",
        )?;
        ensure!(
            fs::read(&data)?.iter().all(|&byte| byte == 0),
            "something was written"
        );
        calls.detach(&claim).await?;
        calls.delete(&claim).await?;
        Ok(())
    })
}

/// A mount in another namespace, as containers have them, keeps the device: it may still be written through.
fn mounted_elsewhere() -> Result<()> {
    block_on(async {
        let driver = Driver::start(&[])?;
        let mut calls = driver.connect().await?;
        let claim = staged(&mut calls, 64, mounted(Mode::SingleNodeWriter, kind(""))).await?;
        let mut container = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sleep", "1000"])
            .spawn()?;
        // Its namespace is made before it becomes sleep.
        let name = format!("/proc/{}/comm", container.id());
        crate::node::until("the container runs", || {
            Ok(fs::read_to_string(&name).is_ok_and(|name| name.trim() == "sleep"))
        })
        .await?;
        refused(
            calls.unstage(&claim).await,
            Code::FailedPrecondition,
            "in use",
        )?;
        container.kill()?;
        container.wait()?;
        crate::node::until("the namespace is gone", || {
            Ok(fs::read_dir("/sys/fs/ext4")?.all(|entry| {
                !entry.is_ok_and(|entry| entry.file_name().to_string_lossy().starts_with("nbd"))
            }))
        })
        .await?;
        gone(&mut calls, &claim).await?;
        drop(calls);
        driver.end_well()
    })
}
