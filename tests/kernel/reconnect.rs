//! Devices kept alive: servers, networks and node parts that die under load, and servers that are not what they were.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hawser::attach::{AttachError, Fate, Transport};
use hawser::verify::Policy;
use hawser::volumes::AttachmentId;

use crate::Scenario;
use crate::load::Load;
use crate::node::{NodeProcess, Served, block_on, node, nothing_left, options, until};
use crate::relay::Relay;
use crate::rude::Rude;
use crate::wire::{Capture, copy_and_compare, tls_statistic};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario::new(
        "reconnect::k5_one_dead_socket_of_four",
        one_dead_socket_of_four,
    ),
    Scenario::new("reconnect::the_server_dies", the_server_dies).within_seconds(120),
    Scenario::new(
        "reconnect::k21_the_server_stands_still",
        the_server_stands_still,
    )
    .within_seconds(120),
    Scenario::new("reconnect::the_node_restarts", the_node_restarts).within_seconds(120),
    Scenario::new(KILLED, the_node_is_killed).within_seconds(120),
    Scenario::new(PROXY_KILLED, the_node_is_killed)
        .without(&["tls"])
        .within_seconds(120),
    Scenario::new("reconnect::the_proxy_carries", the_proxy_carries)
        .without(&["tls"])
        .within_seconds(120),
    Scenario::new("reconnect::m15_a_silent_network", a_silent_network).within_seconds(120),
    Scenario::new(
        "reconnect::k3_k4_tickets_and_new_keys",
        tickets_and_new_keys,
    )
    .within_seconds(120),
    Scenario::new(
        "reconnect::another_epoch_ends_the_device",
        another_epoch_ends_the_device,
    ),
    Scenario::new(
        "reconnect::a_revoked_attachment_ends_the_device",
        a_revoked_attachment_ends_the_device,
    )
    .within_seconds(180),
    Scenario::new(
        "reconnect::another_server_is_refused",
        another_server_is_refused,
    ),
];

const SIZE: u64 = 64 << 20;

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

fn the_server_dies() -> Result<()> {
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

/// For longer than the driver waits, as with a host that was paused: when it goes on, it has old requests and the same anew.
fn the_server_stands_still() -> Result<()> {
    block_on(async {
        let served = Served::new(1, SIZE)?;
        let attachment = served.allow(1, false).await?;
        let attacher = node(&served, false).await?;
        let options = options(4);
        let still = options.timeout * 2;
        let device = attacher
            .attach(served.request(&attachment, false, options)?)
            .await?;
        let load = Load::start(&device.path)?;
        for _ in 0..2 {
            load.go_on(200).await?;
            served.hold(true)?;
            tokio::time::sleep(still).await;
            served.hold(false)?;
            load.go_on(200).await?;
        }
        load.finish(&served.data())?;
        attacher.detach(&served.volume).await?;
        nothing_left()
    })
}

fn the_node_restarts() -> Result<()> {
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

const KILLED: &str = "reconnect::the_node_is_killed";
const PROXY_KILLED: &str = "reconnect::the_proxy_is_killed";

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

/// A node that was cut off comes back, and the volume is another's: what it has not written fails, and soon.
fn a_revoked_attachment_ends_the_device() -> Result<()> {
    block_on(async {
        let served = Served::new(1, SIZE)?;
        let attachment = served.allow(1, false).await?;
        let attacher = node(&served, false).await?;
        let request = served.request(&attachment, false, options(2))?;
        let device = attacher.attach(request).await?;
        served.revoke(&attachment).await?;
        let revoked = Instant::now();
        let mut file = File::open(&device.path)?;
        let failed = file.read(&mut [0; 512]).err().context("read")?;
        ensure!(failed.raw_os_error() == Some(5), "{failed}");
        let waited = revoked.elapsed();
        ensure!(
            Duration::from_secs(25) < waited && waited < Duration::from_secs(120),
            "{waited:?}"
        );
        drop(file);
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

fn the_proxy_carries() -> Result<()> {
    block_on(async {
        let served = Served::new(1, SIZE)?;
        let attachment = served.allow(1, false).await?;
        let capture = Capture::start()?;
        let attacher = node(&served, true).await?;
        let request = served.request(&attachment, false, options(2))?;
        let device = attacher.attach(request).await?;
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
