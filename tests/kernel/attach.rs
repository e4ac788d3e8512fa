//! Devices: made, used, kept alive and removed.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use hawser::attach::{AttachError, Device, ErrorKind, Fate, Transport};
use hawser::verify::Policy;
use hawser::volumes::AttachmentId;

use crate::Scenario;
use crate::load::Load;
use crate::node::{NodeProcess, Served, block_on, node, nothing_left, options, until};
use crate::relay::Relay;
use crate::rude::Rude;

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario::new("attach::one_connection", || works(1)),
    Scenario::new("attach::four_connections", || works(4)),
    Scenario::new("attach::read_only", read_only),
    Scenario::new("attach::k2_no_cipher_no_device", no_cipher_no_device)
        .without(&["chacha20poly1305"]),
    Scenario::new(
        "attach::k5_one_dead_socket_of_four",
        one_dead_socket_of_four,
    ),
    Scenario::new(
        "attach::the_server_dies_under_load",
        the_server_dies_under_load,
    )
    .within_seconds(120),
    Scenario::new(
        "attach::the_node_restarts_under_load",
        the_node_restarts_under_load,
    )
    .within_seconds(120),
    Scenario::new(KILLED, the_node_is_killed).within_seconds(120),
    Scenario::new(PROXY_KILLED, the_node_is_killed)
        .without(&["tls"])
        .within_seconds(120),
    Scenario::new("attach::m15_a_silent_network", a_silent_network).within_seconds(120),
    Scenario::new("attach::k3_k4_tickets_and_new_keys", tickets_and_new_keys).within_seconds(120),
    Scenario::new("attach::the_policy_decides", the_policy_decides),
    Scenario::new(
        "attach::another_epoch_ends_the_device",
        another_epoch_ends_the_device,
    ),
    Scenario::new(
        "attach::another_server_is_refused",
        another_server_is_refused,
    ),
    Scenario::new("attach::it_grows", it_grows),
    Scenario::new("attach::another_attachment", another_attachment),
    Scenario::new("attach::records_and_devices_part", records_and_devices_part),
    Scenario::new("attach::the_proxy_carries", the_proxy_carries)
        .without(&["tls"])
        .within_seconds(120),
    Scenario::new("attach::k24_no_tls_says_so", no_tls_says_so).without(&["tls"]),
    Scenario::new("attach::k24_no_nbd_says_so", no_nbd_says_so).without(&["nbd"]),
];

const SIZE: u64 = 64 << 20;

/// Bytes that nothing else on a wire looks like.
const MARKER: &[u8] = b"0123 nobody may read this on the wire 4567";

/// A number of `/proc/net/tls_stat`.
fn tls_statistic(name: &str) -> Result<u64> {
    let table = fs::read_to_string("/proc/net/tls_stat")?;
    table
        .lines()
        .find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
        .with_context(|| format!("no {name} in {table}"))
}

/// What is written through the device arrives in the backing file, and comes back from it.
fn copy_and_compare(device: &Path, data: &Path) -> Result<()> {
    let mut written = Vec::new();
    while written.len() < 8 << 20 {
        written.extend_from_slice(MARKER);
        written.extend_from_slice(&written.len().to_le_bytes());
    }
    let mut file = OpenOptions::new().read(true).write(true).open(device)?;
    file.write_all(&written)?;
    file.sync_all()?;
    let mut arrived = vec![0; written.len()];
    File::open(data)?.read_exact(&mut arrived)?;
    ensure!(arrived == written, "the backing file differs");
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    file.seek(SeekFrom::Start(0))?;
    arrived.fill(0);
    file.read_exact(&mut arrived)?;
    ensure!(arrived == written, "the device differs");
    Ok(())
}

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
        ensure!(shown("max_sectors_kb")?.trim() == "4096");
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

/// Everything that goes over the loopback.
struct Capture(std::process::Child);

impl Capture {
    const FILE: &str = "/run/capture";

    fn start() -> Result<Self> {
        let child = Command::new("tcpdump")
            .args(["-i", "lo", "-s", "0", "-U", "-B", "32768", "-w", Self::FILE])
            .args(["-Z", "root", "tcp"])
            .stderr(Stdio::null())
            .spawn()
            .context("tcpdump")?;
        // The file's header is there once tcpdump listens.
        while fs::metadata(Self::FILE).map_or(0, |file| file.len()) == 0 {
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(Self(child))
    }

    fn saw_no_plaintext(mut self) -> Result<()> {
        std::thread::sleep(Duration::from_millis(200));
        self.0.kill()?;
        self.0.wait()?;
        let captured = fs::read(Self::FILE)?;
        let found = |text: &[u8]| captured.windows(text.len()).any(|window| window == text);
        // It saw the connections' beginnings, so it would have seen the rest.
        ensure!(found(b"IHAVEOPT"), "nothing was captured");
        ensure!(
            captured.len() > 8 << 20,
            "only {} bytes were captured",
            captured.len()
        );
        ensure!(!found(&MARKER[..16]), "plaintext on the wire");
        fs::remove_file(Self::FILE)?;
        Ok(())
    }
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

/// Only the dead socket is replaced, and by one new connection.
fn one_dead_socket_of_four() -> Result<()> {
    block_on(async {
        let served = Served::new(1, SIZE)?;
        let relay = Relay::to(served.address()?)?;
        served.send_clients_to(relay.address)?;
        let attachment = served.allow(1, false).await?;
        let attacher = node(&served, false).await?;
        let device = attacher
            .attach(served.request(&attachment, false, options(4))?)
            .await?;
        let load = Load::start(&device.path)?;
        for _ in 0..3 {
            load.go_on(200).await?;
            let before = relay.accepted();
            relay.cut_one();
            until("a new connection", || Ok(relay.accepted() > before)).await?;
            load.go_on(200).await?;
            ensure!(
                relay.accepted() == before + 1,
                "more connections than needed"
            );
        }
        load.finish(&served.data())?;
        attacher.detach(&served.volume).await?;
        nothing_left()
    })
}

fn the_server_dies_under_load() -> Result<()> {
    block_on(async {
        let served = Served::new(1, SIZE)?;
        let attachment = served.allow(1, false).await?;
        let attacher = node(&served, false).await?;
        let device = attacher
            .attach(served.request(&attachment, false, options(2))?)
            .await?;
        let load = Load::start(&device.path)?;
        for pause in [0, 1500, 100] {
            load.go_on(200).await?;
            served.kill()?;
            tokio::time::sleep(Duration::from_millis(pause)).await;
            // On another port: the node must ask again.
            served.start()?;
            load.go_on(200).await?;
        }
        load.finish(&served.data())?;
        // What was put in the place of dead sockets is encrypted like those that were there first.
        until("two encrypted sockets", || {
            Ok(tls_statistic("TlsCurrTxSw")? == 2 && tls_statistic("TlsCurrRxSw")? == 2)
        })
        .await?;
        attacher.detach(&served.volume).await?;
        nothing_left()
    })
}

fn the_node_restarts_under_load() -> Result<()> {
    block_on(async {
        let served = Served::new(1, SIZE)?;
        let attachment = served.allow(1, false).await?;
        let attacher = node(&served, false).await?;
        let request = served.request(&attachment, false, options(2))?;
        let device = attacher.attach(request.clone()).await?;
        let load = Load::start(&device.path)?;
        load.go_on(100).await?;

        drop(attacher);
        load.go_on(100).await?;
        let attacher = node(&served, false).await?;
        let recovered = attacher.recover().await?;
        ensure!(
            matches!(&recovered[..], [one] if matches!(one.fate, Fate::Resumed(_))),
            "{recovered:?}"
        );
        load.go_on(100).await?;
        served.kill()?;
        served.start()?;
        load.go_on(100).await?;

        // The sockets die while nobody looks after them.
        drop(attacher);
        served.kill()?;
        served.start()?;
        let attacher = node(&served, false).await?;
        attacher.recover().await?;
        load.go_on(100).await?;
        let again = attacher.attach(request).await?;
        ensure!(again.index == device.index);

        load.finish(&served.data())?;
        attacher.detach(&served.volume).await?;
        nothing_left()
    })
}

const KILLED: &str = "attach::the_node_is_killed_under_load";
const PROXY_KILLED: &str = "attach::the_proxy_is_killed_under_load";

/// kill -9 of the node part, which with kernel TLS does not carry the data, and with the proxy does.
fn the_node_is_killed() -> Result<()> {
    block_on(async {
        let attachment = AttachmentId::from_bytes([1; 16]);
        if let Some(served) = NodeProcess::volume()? {
            let attacher = node(&served, true).await?;
            attacher.recover().await?;
            let request = served.request(&attachment, false, options(2))?;
            attacher.attach(request).await?;
            return NodeProcess::be_ready().await;
        }
        let served = Served::new(1, SIZE)?;
        served.allow(1, false).await?;
        let proxied = !fs::read_to_string("/proc/sys/net/ipv4/tcp_available_ulp")?.contains("tls");
        let scenario = if proxied { PROXY_KILLED } else { KILLED };
        let process = NodeProcess::start(&served, scenario)?;
        let load = Load::start(Path::new("/dev/nbd0"))?;
        load.go_on(100).await?;
        process.kill()?;
        if !proxied {
            load.go_on(100).await?;
        }
        let process = NodeProcess::start(&served, scenario)?;
        load.go_on(100).await?;
        served.kill()?;
        served.start()?;
        load.go_on(100).await?;
        process.kill()?;

        // The rest is this process' work.
        let attacher = node(&served, true).await?;
        let recovered = attacher.recover().await?;
        ensure!(
            matches!(&recovered[..], [one] if matches!(one.fate, Fate::Resumed(_))),
            "{recovered:?}"
        );
        load.go_on(100).await?;
        load.finish(&served.data())?;
        attacher.detach(&served.volume).await?;
        nothing_left()
    })
}

/// Connections that neither carry anything nor end: the driver's timeout gives them up.
fn a_silent_network() -> Result<()> {
    block_on(async {
        let served = Served::new(1, SIZE)?;
        let server = served.address()?;
        let relay = Relay::to(server)?;
        served.send_clients_to(relay.address)?;
        let attachment = served.allow(1, false).await?;
        let attacher = node(&served, false).await?;
        let device = attacher
            .attach(served.request(&attachment, false, options(2))?)
            .await?;
        let load = Load::start(&device.path)?;
        load.go_on(200).await?;
        relay.fall_silent();
        tokio::time::sleep(Duration::from_secs(1)).await;
        served.send_clients_to(server)?;
        load.go_on(200).await?;
        load.finish(&served.data())?;
        attacher.detach(&served.volume).await?;
        nothing_left()
    })
}

/// Tickets are over before the kernel has the socket. New keys end it, and cost a pause.
fn tickets_and_new_keys() -> Result<()> {
    block_on(async {
        let served = Served::not_served(1, SIZE)?;
        let rude = Rude::serve(&served, 150)?;
        served.send_clients_to(rude.address)?;
        let mut options = options(2);
        options.policy = Policy::Off;
        let attacher = node(&served, false).await?;
        let attachment = AttachmentId::from_bytes([1; 16]);
        let device = attacher
            .attach(served.request(&attachment, false, options)?)
            .await?;
        let load = Load::start(&device.path)?;
        until("new keys, several times", || {
            load.check()?;
            Ok(rude.rekeyed.load(Ordering::Relaxed) >= 4)
        })
        .await?;
        load.go_on(100).await?;
        load.finish(&served.data())?;
        attacher.detach(&served.volume).await?;
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

/// The storage host lost its page cache with the volume open.
fn another_epoch_ends_the_device() -> Result<()> {
    block_on(async {
        let served = Served::new(1, SIZE)?;
        let attachment = served.allow(1, false).await?;
        let attacher = node(&served, false).await?;
        let request = served.request(&attachment, false, options(2))?;
        let device = attacher.attach(request.clone()).await?;
        served.kill()?;
        let epoch = fs::read_to_string(served.epoch())?;
        let mut epoch: serde_json::Value = serde_json::from_str(&epoch)?;
        epoch["boot_id"] = "another boot".into();
        fs::write(served.epoch(), epoch.to_string())?;
        served.start()?;
        let mut file = File::open(&device.path)?;
        let failed = file.read(&mut [0; 512]).err().context("read")?;
        ensure!(failed.raw_os_error() == Some(5), "{failed}");

        // While it is open it cannot go, and nothing may pretend that it works.
        let error = attacher
            .attach(request.clone())
            .await
            .err()
            .context("attached")?;
        ensure!(matches!(error, AttachError::Disconnected { .. }), "{error}");
        ensure!(error.to_string().contains("epoch"), "{error}");
        drop(file);
        let device = attacher.attach(request).await?;
        copy_and_compare(&device.path, &served.data())?;
        attacher.detach(&served.volume).await?;
        nothing_left()
    })
}

/// A server of another volume answers in the place of its own; then the right one comes back.
fn another_server_is_refused() -> Result<()> {
    block_on(async {
        let served = Served::new(1, SIZE)?;
        let other = Served::new(2, SIZE)?;
        let attachment = served.allow(1, false).await?;
        other.allow(1, false).await?;
        let attacher = node(&served, false).await?;
        let device = attacher
            .attach(served.request(&attachment, false, options(2))?)
            .await?;
        let load = Load::start(&device.path)?;
        load.go_on(100).await?;
        served.kill()?;
        served.send_clients_to(other.address()?)?;
        let before = load.done();
        tokio::time::sleep(Duration::from_secs(8)).await;
        // What was under way may have been answered before the end.
        ensure!(
            load.done() <= before + 8,
            "another server's answers were taken"
        );
        served.start()?;
        load.go_on(100).await?;
        load.finish(&served.data())?;
        let written = fs::read(other.data())?;
        ensure!(
            written.iter().all(|byte| *byte == 0),
            "another volume was written to"
        );
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
        let error = attacher
            .attach(request.clone())
            .await
            .err()
            .context("attached")?;
        ensure!(error.kind() == ErrorKind::Unavailable, "{error}");
        nothing_left()?;
        served.start()?;
        let device = attacher.attach(request).await?;
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

fn the_proxy_carries() -> Result<()> {
    block_on(async {
        let served = Served::new(1, SIZE)?;
        let attachment = served.allow(1, false).await?;
        let capture = Capture::start()?;
        let attacher = node(&served, true).await?;
        let request = served.request(&attachment, false, options(2))?;
        let device: Device = attacher.attach(request).await?;
        ensure!(device.transport == Transport::Proxy);
        copy_and_compare(&device.path, &served.data())?;
        capture.saw_no_plaintext()?;
        let load = Load::start(&device.path)?;
        load.go_on(200).await?;
        served.kill()?;
        served.start()?;
        load.go_on(200).await?;
        load.finish(&served.data())?;
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
