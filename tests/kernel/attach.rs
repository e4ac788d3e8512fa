//! Devices: made, used, grown and removed; and when none is made.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hawser::attach::{AttachError, ErrorKind, Fate, Request, Transport};
use hawser::patience::Patience;
use hawser::verify::Policy;
use hawser::volumes::AttachmentId;

use crate::Scenario;
use crate::load::Load;
use crate::node::{Served, block_on, node, nothing_left, options};
use crate::rude::Rude;
use crate::wire::{Capture, MARKER, copy_and_compare, tls_statistic};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario::new("attach::one_connection", || works(1)),
    Scenario::new("attach::four_connections", || works(4)),
    Scenario::new("attach::read_only", read_only),
    Scenario::new("attach::k2_no_cipher_no_device", no_cipher_no_device)
        .without(&["chacha20poly1305"]),
    Scenario::new("attach::the_policy_decides", the_policy_decides),
    Scenario::new("attach::it_grows", it_grows),
    Scenario::new("attach::another_attachment", another_attachment),
    Scenario::new("attach::records_and_devices_part", records_and_devices_part),
    Scenario::new("attach::k24_no_tls_says_so", no_tls_says_so).without(&["tls"]),
    Scenario::new("attach::k24_no_nbd_says_so", no_nbd_says_so).without(&["nbd"]),
];

const SIZE: u64 = 64 << 20;

fn works(connections: u8) -> Result<()> {
    block_on(async move {
        let served = Served::new(1, SIZE)?;
        let attachment = served.allow(1, false).await?;
        let capture = Capture::start()?;
        let encrypted = tls_statistic("TlsCurrTxSw")?;

        let attacher = node(&served, false).await?;
        let request = served.request(&attachment, false, options(connections))?;
        let device = attacher.attach(request.clone()).await?;
        ensure!(device.transport == Transport::KernelTls);
        ensure!(device.size_bytes == SIZE && !device.read_only);
        let report = device.report.as_ref().context("no report")?;
        ensure!(report.findings().count() == 0, "{report}");
        ensure!(tls_statistic("TlsCurrTxSw")? == encrypted + u64::from(connections));
        ensure!(tls_statistic("TlsCurrRxSw")? >= u64::from(connections));
        let queue = Path::new("/sys/block")
            .join(device.path.file_name().context("a name")?)
            .join("queue");
        let shown = |name| fs::read_to_string(queue.join(name));
        ensure!(shown("max_sectors_kb")?.trim() == "1024");
        ensure!(shown("logical_block_size")?.trim() == "512");
        ensure!(
            shown("scheduler")?.contains("[none]"),
            "{}",
            shown("scheduler")?
        );

        copy_and_compare(&device.path, &served.data())?;
        fio(&device.path)?;
        ensure!(tls_statistic("TlsDecryptError")? == 0);

        let again = attacher.attach(request).await?;
        ensure!(again.index == device.index && again.report.is_none());
        let found = attacher.find(&served.volume).await?.context("not found")?;
        ensure!(found.index == device.index && found.size_bytes == SIZE);

        attacher.detach(&served.volume).await?;
        nothing_left()?;
        ensure!(attacher.find(&served.volume).await?.is_none());
        attacher.detach(&served.volume).await?;
        capture.saw_no_plaintext()
    })
}

/// The opinion of someone else's program.
fn fio(device: &Path) -> Result<()> {
    let output = Command::new("fio")
        .arg(format!("--filename={}", device.display()))
        .args([
            "--name=verify",
            "--rw=randrw",
            "--bsrange=4k-256k",
            "--size=16M",
        ])
        .args(["--direct=1", "--ioengine=libaio", "--iodepth=16"])
        .args(["--verify=crc32c", "--verify_fatal=1", "--randrepeat=0"])
        .current_dir("/run")
        .output()?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

fn read_only() -> Result<()> {
    block_on(async {
        let served = Served::new(1, SIZE)?;
        File::options()
            .write(true)
            .open(served.data())?
            .write_all(MARKER)?;
        let attachment = served.allow(1, true).await?;
        let attacher = node(&served, false).await?;
        let writable = served.request(&attachment, false, options(2))?;
        let refused = attacher.attach(writable).await.err().context("writable")?;
        ensure!(refused.kind() == ErrorKind::Precondition, "{refused}");
        nothing_left()?;

        let device = attacher
            .attach(served.request(&attachment, true, options(2))?)
            .await?;
        ensure!(device.read_only);
        let mut bytes = vec![0; MARKER.len()];
        File::open(&device.path)?.read_exact(&mut bytes)?;
        ensure!(bytes == MARKER);
        let mut file = File::options().write(true).open(&device.path)?;
        let refused = file.write_all(&[0; 4096]).and_then(|()| file.sync_all());
        ensure!(refused.is_err(), "written to");
        drop(file);
        ensure!(fs::read(served.data())?.starts_with(MARKER));
        attacher.detach(&served.volume).await?;
        nothing_left()
    })
}

/// Half-installed kernel TLS would be plaintext, which the driver accepts.
fn no_cipher_no_device() -> Result<()> {
    block_on(async {
        let served = Served::new(1, SIZE)?;
        let attachment = served.allow(1, false).await?;
        let attacher = node(&served, true).await?;
        let request = served.request(&attachment, false, options(1))?;
        let error = attacher.attach(request).await.err().context("attached")?;
        ensure!(matches!(error, AttachError::KernelTls { .. }), "{error}");
        let error = format!("{:#}", anyhow::Error::from(error));
        ensure!(error.contains("modprobe chacha20poly1305"), "{error}");
        nothing_left()
    })
}

/// A server with findings.
fn the_policy_decides() -> Result<()> {
    block_on(async {
        let served = Served::not_served(1, SIZE)?;
        let rude = Rude::serve(&served, usize::MAX)?;
        served.send_clients_to(rude.address)?;
        let attacher = node(&served, false).await?;
        let attachment = AttachmentId::from_bytes([1; 16]);
        let strict = served.request(&attachment, false, options(1))?;
        let error = attacher
            .attach(strict.clone())
            .await
            .err()
            .context("attached")?;
        ensure!(
            matches!(error, AttachError::Verification { findings: 1.., .. }),
            "{error}"
        );
        ensure!(error.kind() == ErrorKind::Precondition);
        nothing_left()?;

        let mut warn = strict;
        warn.options.policy = Policy::Warn;
        let device = attacher.attach(warn).await?;
        let report = device.report.as_ref().context("no report")?;
        ensure!(report.findings().count() > 0, "{report}");
        copy_and_compare(&device.path, &served.data())?;
        attacher.detach(&served.volume).await?;
        nothing_left()
    })
}

fn it_grows() -> Result<()> {
    block_on(async {
        let served = Served::new(1, SIZE)?;
        let attachment = served.allow(1, false).await?;
        let attacher = node(&served, false).await?;
        let device = attacher
            .attach(served.request(&attachment, false, options(2))?)
            .await?;
        ensure!(attacher.grow(&served.volume, SIZE).await? == SIZE);
        let early = attacher.grow(&served.volume, 2 * SIZE).await;
        ensure!(early.is_err(), "grew beyond what the server has");
        let load = Load::start(&device.path)?;
        load.go_on(50).await?;
        served.grow(2 * SIZE).await?;
        ensure!(attacher.grow(&served.volume, 2 * SIZE - 4096).await? == 2 * SIZE);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&device.path)?;
        ensure!(file.seek(SeekFrom::End(0))? == 2 * SIZE);
        file.seek(SeekFrom::Start(2 * SIZE - 4096))?;
        file.write_all(&[0x5a; 4096])?;
        file.sync_all()?;
        load.go_on(50).await?;

        // The larger device goes on with a new server, too.
        served.kill()?;
        served.start()?;
        load.go_on(50).await?;
        load.finish(&served.data())?;
        let data = fs::read(served.data())?;
        ensure!(data.ends_with(&[0x5a; 4096]), "the new end was not written");
        drop(file);
        attacher.detach(&served.volume).await?;
        nothing_left()
    })
}

/// An attachment is never used again: its device may stand in the way only while it works.
fn another_attachment() -> Result<()> {
    block_on(async {
        let served = Served::new(1, SIZE)?;
        let first = served.allow(1, false).await?;
        let second = served.allow(2, false).await?;
        let attacher = node(&served, false).await?;
        attacher
            .attach(served.request(&first, false, options(1))?)
            .await?;
        let request = served.request(&second, false, options(1))?;
        let error = attacher
            .attach(request.clone())
            .await
            .err()
            .context("attached")?;
        ensure!(
            matches!(error, AttachError::OtherAttachment { .. }),
            "{error}"
        );
        served.kill()?;
        served.send_clients_to(([127, 0, 0, 1], 1).into())?;
        // A server that is away is waited for, but not for longer than somebody waits for the answer.
        let hasty = Request {
            patience: Patience::within(Duration::ZERO),
            ..request.clone()
        };
        let error = attacher.attach(hasty).await.err().context("attached")?;
        ensure!(error.kind() == ErrorKind::Unavailable, "{error}");
        let gone = request.patience.guard();
        let unheard = attacher.attach(request.clone());
        let leave = async { drop(gone) };
        let (error, ()) = tokio::join!(unheard, leave);
        let error = error.err().context("attached")?;
        ensure!(matches!(error, AttachError::Abandoned { .. }), "{error}");
        nothing_left()?;
        let request = served.request(&second, false, options(1))?;
        let waiting = tokio::spawn({
            let attacher = attacher.clone();
            async move { attacher.attach(request).await }
        });
        tokio::time::sleep(Duration::from_millis(500)).await;
        ensure!(!waiting.is_finished(), "it does not wait");
        let begun = Instant::now();
        served.start()?;
        attacher.server_moved(&served.volume);
        let device = waiting.await??;
        ensure!(
            begun.elapsed() < Duration::from_secs(5),
            "{:?}",
            begun.elapsed()
        );
        copy_and_compare(&device.path, &served.data())?;
        attacher.detach(&served.volume).await?;
        nothing_left()
    })
}

/// What kill -9 leaves: a record without a device is forgotten; a device without a record is left alone, and can be
/// removed.
fn records_and_devices_part() -> Result<()> {
    block_on(async {
        let served = Served::new(1, SIZE)?;
        let attachment = served.allow(1, false).await?;
        let request = served.request(&attachment, false, options(1))?;
        let attacher = node(&served, false).await?;
        let device = attacher.attach(request.clone()).await?;
        let record = Path::new(crate::node::RECORDS).join(format!("{}.json", served.volume));
        let kept = fs::read(&record)?;
        fs::remove_file(&record)?;
        drop(attacher);

        let attacher = node(&served, false).await?;
        let recovered = attacher.recover().await?;
        ensure!(
            matches!(&recovered[..], [one] if matches!(&one.fate, Fate::Unrecorded(path) if *path == device.path)),
            "{recovered:?}"
        );
        let error = attacher
            .attach(request.clone())
            .await
            .err()
            .context("attached")?;
        ensure!(matches!(error, AttachError::Unrecorded { .. }), "{error}");
        attacher.detach(&served.volume).await?;
        nothing_left()?;

        fs::write(&record, &kept)?;
        let recovered = attacher.recover().await?;
        ensure!(
            matches!(&recovered[..], [one] if matches!(one.fate, Fate::Forgotten)),
            "{recovered:?}"
        );
        nothing_left()?;
        fs::write(&record, &kept)?;
        attacher.attach(request).await?;
        attacher.detach(&served.volume).await?;
        nothing_left()
    })
}

fn no_tls_says_so() -> Result<()> {
    refuses("modprobe tls")
}

fn no_nbd_says_so() -> Result<()> {
    if Path::new("/sys/module/nbd").exists() {
        bail!("this machine has nbd");
    }
    refuses("modprobe nbd")
}

fn refuses(remedy: &str) -> Result<()> {
    block_on(async {
        let served = Served::not_served(1, SIZE)?;
        let attachment = AttachmentId::from_bytes([1; 16]);
        let attacher = node(&served, false).await?;
        let mut options = options(1);
        options.policy = Policy::Off;
        let request = served.request(&attachment, false, options)?;
        let error = attacher.attach(request).await.err().context("attached")?;
        ensure!(error.kind() == ErrorKind::Precondition, "{error}");
        ensure!(error.to_string().contains(remedy), "{error}");
        ensure!(attacher.recover().await?.is_empty());
        attacher.detach(&served.volume).await?;
        Ok(())
    })
}
