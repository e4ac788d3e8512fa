//! Volumes on other people's servers, through the whole of the driver.

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hawser::proto::csi::VolumeCapability;
use hawser::proto::csi::volume_capability::MountVolume;
use hawser::proto::csi::volume_capability::access_mode::Mode;
use hawser::tls;
use hawser::volumes::AttachmentId;
use tonic::{Code, Status};

use crate::Scenario;
use crate::driver::{Calls, Claim, Driver, block, mounted};
use crate::load::Load;
use crate::machine::{PATIENCE, succeed};
use crate::node::{Served, block_on, options, until};
use crate::peer::{Kind, Peer};
use crate::rude::Rude;

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario::new("elsewhere::qemu_nbd", || lives(Kind::QemuNbd)).within_seconds(240),
    Scenario::new("elsewhere::nbdkit", || lives(Kind::Nbdkit)).within_seconds(240),
    Scenario::new("elsewhere::nbd_server", || lives(Kind::NbdServer)).within_seconds(240),
    Scenario::new("elsewhere::file_system", file_system).within_seconds(240),
    Scenario::new("elsewhere::k3_new_keys", new_keys).within_seconds(180),
    Scenario::new("elsewhere::refused_and_why", refused_and_why).within_seconds(240),
    Scenario::new("elsewhere::what_a_device_can_be_made_of", devices).within_seconds(180),
    Scenario::new("elsewhere::it_grows", it_grows).within_seconds(120),
];

const SIZE: u64 = 64 << 20;
const DOUBLE: i64 = 128 << 20;
const HANDLE: &str = "legacy/disk-1";

/// What a server's export is called by, and how the volume is attached.
fn context(uri: &str, more: &[(&str, &str)]) -> HashMap<String, String> {
    let usual = [
        ("uri", uri),
        ("ioTimeout", "3"),
        ("reconnectTimeout", "120"),
        ("connections", "2"),
    ];
    let all = usual.iter().chain(more);
    all.map(|&(key, value)| (key.into(), value.into()))
        .collect()
}

fn claim(peer: &Peer, capability: VolumeCapability, more: &[(&str, &str)]) -> Claim {
    Claim::elsewhere(
        HANDLE,
        capability,
        context(&peer.uri(), more),
        peer.secrets(),
    )
}

/// What strict verification makes of each is in docs/peers.md; here the device counts.
const WARN: (&str, &str) = ("verify", "warn");

/// Neither a device nor anything about it is left, above all no key.
fn nothing_left(driver: &Driver) -> Result<()> {
    for folder in [
        driver.path("state/node/devices"),
        driver.path("state/foreign"),
        "/run/hawser/foreign".into(),
    ] {
        for entry in fs::read_dir(&folder).into_iter().flatten() {
            let name = entry?.file_name();
            ensure!(
                name == "lock",
                "left in {}: {}",
                folder.display(),
                name.display()
            );
        }
    }
    Ok(())
}

/// A verifying writer that must not notice anything.
fn fio(path: &Path, seconds: u32) -> Result<Child> {
    Command::new("fio")
        .args([
            "--name=verify",
            "--size=8m",
            "--rw=randwrite",
            "--bs=4k",
            "--direct=1",
        ])
        .args([
            "--ioengine=psync",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_state_save=0",
        ])
        .args([
            "--do_verify=1",
            "--fsync=32",
            "--time_based=1",
            &format!("--runtime={seconds}"),
        ])
        .arg(format!("--filename={}", path.display()))
        .stdout(Stdio::null())
        .spawn()
        .context("starting fio")
}

async fn ended_well(mut fio: Child) -> Result<()> {
    until("fio ends", || Ok(fio.try_wait()?.is_some())).await?;
    ensure!(fio.wait()?.success(), "fio found an error");
    Ok(())
}

/// A raw device under load: server and node part die and come back, and no request fails or returns a wrong byte.
fn lives(kind: Kind) -> Result<()> {
    block_on(async {
        let mut peer = Peer::start(kind, SIZE)?;
        let mut driver = Driver::start(&[])?;
        let mut volume = claim(&peer, block(Mode::SingleNodeWriter), &[WARN]);
        let mut calls = driver.connect().await?;
        calls.attach(&mut volume).await?;
        calls.stage(&volume).await?;
        let device = calls.publish(&volume, "pod", false).await?;
        let size = calls.usage(&volume, "pod").await?[0].total;
        ensure!(size == DOUBLE / 2, "{size} bytes");

        let load = Load::start(&device)?;
        for pause in [0, 1500] {
            load.go_on(200).await?;
            peer.kill()?;
            tokio::time::sleep(Duration::from_millis(pause)).await;
            peer.start_again()?;
            load.go_on(200).await?;
        }
        // The next process has never seen the Secret.
        drop(calls);
        driver.restart()?;
        load.go_on(100).await?;
        peer.kill()?;
        peer.start_again()?;
        load.go_on(200).await?;
        load.finish(&peer.data())?;

        let verify = fio(&device, 4)?;
        tokio::time::sleep(Duration::from_secs(1)).await;
        peer.kill()?;
        peer.start_again()?;
        ended_well(verify).await?;

        let mut calls = driver.connect().await?;
        // As the kubelet does from time to time.
        calls.publish(&volume, "pod", false).await?;
        gone(&mut calls, &volume).await?;
        drop(calls);
        nothing_left(&driver)
    })
}

async fn gone(calls: &mut Calls<'_>, volume: &Claim) -> Result<()> {
    calls.unpublish(volume, "pod").await?;
    calls.unstage(volume).await?;
    calls.detach(volume).await?;
    // Of somebody else's data nothing is deleted.
    calls.delete(volume).await?;
    Ok(())
}

/// Made on request where nothing is, found again, and never made twice.
fn file_system() -> Result<()> {
    block_on(async {
        let mut peer = Peer::start(Kind::Nbdkit, SIZE)?;
        let driver = Driver::start(&[])?;
        let mut calls = driver.connect().await?;
        let ext4 = || mounted(Mode::SingleNodeWriter, MountVolume::default());
        let mut unasked = claim(&peer, ext4(), &[WARN]);
        calls.attach(&mut unasked).await?;
        let refused = calls.stage(&unasked).await;
        check(
            refused,
            Code::FailedPrecondition,
            &["format: if-empty", HANDLE],
        )?;
        calls.detach(&unasked).await?;

        let mut volume = claim(&peer, ext4(), &[WARN, ("format", "if-empty")]);
        calls.attach(&mut volume).await?;
        calls.stage(&volume).await?;
        let pod = calls.publish(&volume, "pod", false).await?;
        let file = pod.join("file");
        let verify = fio(&file, 4)?;
        tokio::time::sleep(Duration::from_secs(1)).await;
        peer.kill()?;
        tokio::time::sleep(Duration::from_millis(500)).await;
        peer.start_again()?;
        ended_well(verify).await?;
        let written = fs::read(&file)?;
        calls.unpublish(&volume, "pod").await?;
        calls.unstage(&volume).await?;

        calls.stage(&volume).await?;
        let pod = calls.publish(&volume, "pod", false).await?;
        ensure!(
            fs::read(pod.join("file"))? == written,
            "other data than before"
        );
        calls.unpublish(&volume, "pod").await?;
        calls.unstage(&volume).await?;

        // The server lost everything.
        File::create(peer.data())?.set_len(SIZE)?;
        let refused = calls.stage(&volume).await;
        check(refused, Code::FailedPrecondition, &["may have lost data"])?;
        calls.detach(&volume).await?;
        drop(calls);
        nothing_left(&driver)
    })
}

/// New keys in the middle of a connection end it for the kernel, and cost a pause.
fn new_keys() -> Result<()> {
    block_on(async {
        let served = Served::not_served(1, SIZE)?;
        let rude = Rude::serve(&served, 150)?;
        let attachment = AttachmentId::from_bytes([1; 16]);
        let request = served.request(&attachment, false, options(1))?;
        let parts = request.secret.parts().into_iter();
        let secrets = parts
            .map(|(key, value)| Ok((key, String::from_utf8(value)?)))
            .collect::<Result<_>>()?;
        let name = tls::server_identity(&served.volume);
        let uri = format!("nbds://{}/disk?tls-hostname={name}", rude.address);
        let context = context(&uri, &[("verify", "off")]);
        let mut volume = Claim::elsewhere(HANDLE, block(Mode::SingleNodeWriter), context, secrets);
        let driver = Driver::start(&[])?;
        let mut calls = driver.connect().await?;
        calls.attach(&mut volume).await?;
        calls.stage(&volume).await?;
        let device = calls.publish(&volume, "pod", false).await?;
        let load = Load::start(&device)?;
        until("new keys, several times", || {
            load.check()?;
            Ok(rude.rekeyed.load(Ordering::Relaxed) >= 4)
        })
        .await?;
        load.go_on(100).await?;
        load.finish(&served.data())?;
        gone(&mut calls, &volume).await?;
        drop(calls);
        nothing_left(&driver)
    })
}

fn check<T>(result: Result<T, Status>, code: Code, parts: &[&str]) -> Result<()> {
    let Err(status) = result else {
        bail!("not refused: {parts:?}");
    };
    let told = parts.iter().all(|part| status.message().contains(part));
    ensure!(status.code() == code && told, "{parts:?}: {status:?}");
    Ok(())
}

/// One server's export is staged as the context says, or refused; nothing is left in either case.
async fn stage_once(
    driver: &Driver,
    peer: &Peer,
    more: &[(&str, &str)],
    change: impl FnOnce(&mut Claim),
) -> Result<Result<(), Status>> {
    let mut calls = driver.connect().await?;
    let mut volume = claim(peer, block(Mode::SingleNodeWriter), more);
    change(&mut volume);
    calls.attach(&mut volume).await?;
    let staged = calls.stage(&volume).await;
    calls.unstage(&volume).await?;
    calls.detach(&volume).await?;
    nothing_left(driver)?;
    Ok(staged)
}

/// What strict verification and the identity of the server stand in the way of, in words that help.
fn refused_and_why() -> Result<()> {
    block_on(async {
        let driver = Driver::start(&[])?;
        for (kind, changes, parts) in [
            // Whoever asks in plaintext is served in plaintext.
            (Kind::Nbdkit, ("--tls=require", "--tls=on"), "before TLS"),
            (Kind::Nbdkit, ("--tls-verify-peer", ""), "anonymous-client"),
            (
                Kind::QemuNbd,
                ("verify-peer=on", "verify-peer=off"),
                "anonymous-client",
            ),
        ] {
            let peer = Peer::changed(kind, SIZE, &[changes])?;
            let refused = stage_once(&driver, &peer, &[], |_| ()).await?;
            let parts = ["failed verification", "set the policy to warn", parts];
            check(refused, Code::FailedPrecondition, &parts)?;
            stage_once(&driver, &peer, &[WARN], |_| ()).await??;
        }
        for kind in [Kind::Nbdkit, Kind::QemuNbd, Kind::NbdServer] {
            let peer = Peer::start(kind, SIZE)?;
            let staged = stage_once(&driver, &peer, &[], |_| ()).await?;
            ensure!(staged.is_ok(), "{kind:?} under strict: {staged:?}");
        }

        // As its manual has it by default: TLS 1.2 and nothing newer.
        let old = [("VERS-TLS1.3", "VERS-TLS1.2")];
        let peer = Peer::changed(Kind::NbdServer, SIZE, &old)?;
        let refused = stage_once(&driver, &peer, &[WARN], |_| ()).await?;
        check(refused, Code::FailedPrecondition, &["must offer TLS 1.3"])?;
        let without = [("VERS-TLS1.3", "VERS-TLS1.3:-CHACHA20-POLY1305")];
        let peer = Peer::changed(Kind::NbdServer, SIZE, &without)?;
        let refused = stage_once(&driver, &peer, &[WARN], |_| ()).await?;
        check(refused, Code::Unavailable, &["TLS_CHACHA20_POLY1305"])?;

        let peer = Peer::start(Kind::Nbdkit, SIZE)?;
        let refused = stage_once(&driver, &peer, &[WARN], |volume| {
            let uri = format!("{}?tls-hostname=other.example", peer.uri());
            volume.context.insert("uri".into(), uri);
        });
        check(
            refused.await?,
            Code::FailedPrecondition,
            &["localhost", "other.example is needed"],
        )?;
        let stranger = Peer::start(Kind::Nbdkit, SIZE)?;
        let refused = stage_once(&driver, &peer, &[WARN], |volume| {
            volume.secrets = stranger.secrets();
        });
        check(refused.await?, Code::FailedPrecondition, &["authority"])?;
        let refused = stage_once(&driver, &peer, &[WARN], |volume| {
            volume.secrets.clear();
        });
        check(
            refused.await?,
            Code::Unauthenticated,
            &["nodeStageSecretRef"],
        )?;
        let refused = stage_once(&driver, &peer, &[WARN], |volume| {
            volume
                .context
                .insert("uri".into(), "nbds://nowhere.invalid/disk".into());
        });
        check(refused.await?, Code::Unavailable, &["nowhere.invalid"])?;
        Ok(())
    })
}

fn block_size(device: &Path) -> Result<String> {
    succeed(Command::new("blockdev").args(["--getss"]).arg(device))
}

/// Blocks that are larger, exports that only read, servers for one client.
fn devices() -> Result<()> {
    block_on(async {
        let driver = Driver::start(&[])?;
        let coarse = [
            ("--foreground", "--foreground --filter=blocksize-policy"),
            (
                "/data",
                "/data blocksize-minimum=4096 blocksize-preferred=4096",
            ),
        ];
        let peer = Peer::changed(Kind::Nbdkit, SIZE, &coarse)?;
        let mut calls = driver.connect().await?;
        let mut volume = claim(&peer, block(Mode::SingleNodeWriter), &[WARN]);
        calls.attach(&mut volume).await?;
        calls.stage(&volume).await?;
        let device = calls.publish(&volume, "pod", false).await?;
        let size = block_size(&device)?;
        ensure!(size.trim() == "4096", "blocks of {size}");
        let load = Load::start(&device)?;
        load.go_on(100).await?;
        load.finish(&peer.data())?;
        gone(&mut calls, &volume).await?;
        drop(calls);

        let coarser = [
            coarse[0],
            (
                "/data",
                "/data blocksize-minimum=65536 blocksize-preferred=65536",
            ),
        ];
        let peer = Peer::changed(Kind::Nbdkit, SIZE, &coarser)?;
        let refused = stage_once(&driver, &peer, &[WARN], |_| ()).await?;
        check(
            refused,
            Code::FailedPrecondition,
            &["blocks of 65536 bytes"],
        )?;

        let read_only = [("--foreground", "--foreground --readonly")];
        let peer = Peer::changed(Kind::Nbdkit, SIZE, &read_only)?;
        let refused = stage_once(&driver, &peer, &[WARN], |_| ()).await?;
        check(
            refused,
            Code::FailedPrecondition,
            &["read-only", "readonly"],
        )?;
        stage_once(&driver, &peer, &[WARN], |volume| volume.readonly = true).await??;

        // Without CAN_MULTI_CONN there is one connection, whatever was asked for.
        let single = [("--shared 0", "--shared 1")];
        let peer = Peer::changed(Kind::QemuNbd, SIZE, &single)?;
        stage_once(&driver, &peer, &[("verify", "off")], |_| ()).await??;
        Ok(())
    })
}

/// All connections are replaced within moments, and only then can the device grow.
async fn until_grown(calls: &mut Calls<'_>, volume: &Claim) -> Result<()> {
    let begun = Instant::now();
    loop {
        match calls.expand_here(volume, "pod", DOUBLE).await {
            Ok(()) => return Ok(()),
            Err(status) => ensure!(begun.elapsed() < PATIENCE, "{status:?}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// A server that was given more room: the node takes it, with a file system on it in use.
fn it_grows() -> Result<()> {
    block_on(async {
        let mut peer = Peer::start(Kind::Nbdkit, SIZE)?;
        let driver = Driver::start(&[])?;
        let mut calls = driver.connect().await?;
        let ext4 = mounted(Mode::SingleNodeWriter, MountVolume::default());
        let mut volume = claim(&peer, ext4, &[WARN, ("format", "if-empty")]);
        calls.attach(&mut volume).await?;
        calls.stage(&volume).await?;
        let pod = calls.publish(&volume, "pod", false).await?;
        let before = calls.usage(&volume, "pod").await?[0].total;
        let refused = calls.expand(&volume, "pod", DOUBLE).await;
        check(refused, Code::NotFound, &["grown at that server"])?;
        let refused = calls.expand_here(&volume, "pod", DOUBLE).await;
        check(
            refused,
            Code::FailedPrecondition,
            &["offers 67108864 bytes"],
        )?;
        File::options()
            .write(true)
            .open(peer.data())?
            .set_len(2 * SIZE)?;
        // nbdkit keeps a connection at the size that it began with.
        calls.expand_here(&volume, "pod", 0).await?;
        ensure!(
            calls.usage(&volume, "pod").await?[0].total == before,
            "it grew beyond its connections"
        );
        let refused = calls.expand_here(&volume, "pod", DOUBLE).await;
        check(refused, Code::FailedPrecondition, &["stage it again"])?;
        peer.kill()?;
        peer.start_again()?;
        // A request that must wait for new connections.
        fs::write(pod.join("file"), vec![7; 1 << 20])?;
        File::open(pod.join("file"))?.sync_all()?;
        until_grown(&mut calls, &volume).await?;
        let after = calls.usage(&volume, "pod").await?[0].total;
        ensure!(after > before + DOUBLE / 4, "{before} -> {after} bytes");
        gone(&mut calls, &volume).await?;
        drop(calls);
        nothing_left(&driver)
    })
}
