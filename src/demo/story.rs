//! The steps of the demo, on a machine whose kernel has nbd and tls.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rustix::process::Signal;

use super::load::Load;
use super::plugin::{Folders, Plugin, signal};
use super::show::{Found, Show};
use super::wire::{Capture, MARKER};
use crate::client::{self, Target};
use crate::nbd::ExportName;
use crate::proto::csi::Volume;
use crate::tls::{self, Profile, Secret, Side};
use crate::verify;
use crate::volumes::VolumeId;

const MIB: u64 = 1 << 20;
const SIZE: i64 = 256 << 20;
const GROWN: i64 = 384 << 20;

/// How often the marker is written: 1 MiB of it.
const REPEATS: usize = (1 << 20) / MARKER;

/// How long I/O may stand still while a part is down.
const PAUSE: Duration = Duration::from_secs(60);

/// The whole job. Every claim of the last line was checked by then.
pub(super) async fn tell(scratch: &Path) -> anyhow::Result<()> {
    let folders = Folders::new(scratch.to_owned())?;
    let mut show = Show::new();
    let told = steps(&mut show, &folders).await;
    if let Err(error) = told {
        last_words(&folders);
        return Err(error);
    }
    println!(
        "\nPROVEN in {:.1} s, {} steps: a volume was provisioned over CSI, verified, attached by the kernel over TLS,\n\
         written, unreadable on the wire, alive through kill -9 of the node part and of its server, grown in use,\n\
         fenced after unpublish, and deleted without a trace.",
        show.seconds(),
        show.steps()
    );
    Ok(())
}

async fn steps(show: &mut Show, folders: &Folders) -> anyhow::Result<()> {
    let mut plugin = show
        .step("Start the CSI services (hawser standalone)", async {
            Plugin::start(folders).await.map(Found::new)
        })
        .await?;
    let volume = show
        .step("CreateVolume: 256 MiB, with a server of its own", async {
            let volume = plugin.create("demo", SIZE).await?;
            let (address, process) = plugin.server(&volume).await?;
            let line = format!(
                "{} is served at {address} by process {process}",
                volume.volume_id
            );
            Ok(Found::new(volume).saying(line))
        })
        .await?;
    let capture = show
        .step("Start to listen on the wire", async {
            Capture::begin(folders.path("wire.pcap"))
                .await
                .map(Found::new)
        })
        .await?;
    let context = show
        .step("ControllerPublish: allow this node to attach", async {
            let context = plugin.controller_publish(&volume).await?;
            let attachment = attachment(&context)?;
            let line = format!("attachment {attachment}");
            Ok(Found::new(context).saying(line))
        })
        .await?;
    let export =
        ExportName::try_from(format!("{}/{}", volume.volume_id, attachment(&context)?).as_str())?;
    // What a thief would have copied from the node.
    let stolen = copy_secret(folders, &volume)?;

    show.step("Verify the server: what every attach checks first", async {
        verified(&plugin, &volume, &export, &stolen).await
    })
    .await?;
    show.step(
        "NodeStage: verify, attach in the kernel, mkfs, mount",
        async {
            plugin.stage(&volume, &context).await?;
            let device = our_device(&volume)?;
            let line = format!(
                "/dev/nbd{} is {} MiB, backend {}",
                device.index,
                device.bytes()? / MIB,
                device.backend
            );
            Ok(Found::new(()).saying(line))
        },
    )
    .await?;
    let target = show
        .step("NodePublish: the pod's directory", async {
            plugin.publish(&volume, &context).await.map(Found::new)
        })
        .await?;
    let marker = marker(b"SECRET")?;
    show.step("Write a secret text 1 MiB long, and fsync", async {
        let file = target.join("secret.txt");
        std::fs::write(&file, marker.repeat(REPEATS))?;
        std::fs::File::open(&file)?.sync_all()?;
        Ok(Found::new(()).saying(format!("it repeats {}", String::from_utf8_lossy(&marker))))
    })
    .await?;
    show.step("Ask the kernel whether it is TLS that it speaks", async {
        kernel_tls()
    })
    .await?;
    plugin = show
        .step("kill -9 the node part under load, and restart it", async {
            let load = Load::begin(target.join("load-1"))?;
            load.progress(20, PAUSE).await?;
            plugin.kill().await?;
            load.progress(20, PAUSE)
                .await
                .context("while the node part was dead")?;
            let plugin = Plugin::start(folders).await?;
            load.progress(20, PAUSE).await?;
            let written = load.end()?;
            drop_caches()?;
            written.verify()?;
            Ok(Found::new(plugin).saying(format!(
                "{} durable writes went on and read back right; the slowest took {} ms",
                written.writes,
                written.longest.as_millis()
            )))
        })
        .await?;
    show.step("kill -9 the volume's server under load", async {
        let load = Load::begin(target.join("load-2"))?;
        load.progress(20, PAUSE).await?;
        let (_, process) = plugin.server(&volume).await?;
        signal(process, Signal::KILL)?;
        load.progress(20, PAUSE)
            .await
            .context("after the server was killed")?;
        let written = load.end()?;
        drop_caches()?;
        written.verify()?;
        Ok(Found::new(()).saying(format!(
            "no I/O error; I/O paused for {} ms; {} durable writes read back right",
            written.longest.as_millis(),
            written.writes
        )))
    })
    .await?;
    show.step("Grow to 384 MiB while mounted", async {
        let before = file_system_bytes(&target)?;
        plugin.expand(&volume, GROWN).await?;
        let after = file_system_bytes(&target)?;
        ensure!(
            after > before + 100 * MIB,
            "the file system went from {before} to {after} bytes"
        );
        Ok(Found::new(()).saying(format!(
            "the file system has {} MiB where it had {}",
            after / MIB,
            before / MIB
        )))
    })
    .await?;
    show.step(
        "Unstage, and stage again what is formatted already",
        async {
            plugin.unpublish_and_unstage(&volume).await?;
            no_devices()?;
            let began = Instant::now();
            plugin.stage(&volume, &context).await?;
            let took = began.elapsed().as_millis();
            plugin.publish(&volume, &context).await?;
            Ok(Found::new(()).saying(format!("NodeStage without mkfs took {took} ms")))
        },
    )
    .await?;
    show.step("Read the secret text back from the server", async {
        drop_caches()?;
        let text = std::fs::read(target.join("secret.txt"))?;
        ensure!(text == marker.repeat(REPEATS), "what was read differs");
        Ok(Found::new(()))
    })
    .await?;
    show.step("Search all that crossed the wire for it", async {
        searched(capture, &marker).await
    })
    .await?;
    let (server, _) = plugin.server(&volume).await?;
    show.step("NodeUnpublish, NodeUnstage: the device is gone", async {
        plugin.unpublish_and_unstage(&volume).await?;
        no_devices()?;
        Ok(Found::new(()))
    })
    .await?;
    show.step("The attachment still opens the volume, until ...", async {
        opens(&server, &volume, &export, &stolen).await?;
        Ok(Found::new(()))
    })
    .await?;
    show.step(
        "ControllerUnpublish: a thief has certificate and name",
        async {
            plugin.controller_unpublish(&volume).await?;
            let Err(refusal) = opens(&server, &volume, &export, &stolen).await else {
                bail!("the revoked attachment still opens the volume");
            };
            let refusal = format!("{refusal:#}");
            ensure!(
                refusal.contains("ERR_UNKNOWN"),
                "the thief failed for another reason: {refusal}"
            );
            Ok(Found::new(()).saying(format!("refused: {refusal}")))
        },
    )
    .await?;
    show.step("DeleteVolume: nothing is left", async {
        plugin.delete(&volume).await?;
        nothing_left(folders, &volume, &server)?;
        Ok(Found::new(()).saying("no data, no Secret, no process, no device, nobody listens"))
    })
    .await?;
    show.step("Stop the CSI services", async {
        plugin.stop().await.map(Found::new)
    })
    .await
}

fn attachment(context: &std::collections::HashMap<String, String>) -> anyhow::Result<&str> {
    context
        .values()
        .find(|value| value.starts_with("att-"))
        .map(String::as_str)
        .context("publish_context names no attachment")
}

/// A text that nobody else sends: a word, then random hex digits.
fn marker(word: &[u8]) -> anyhow::Result<Vec<u8>> {
    let mut random = [0; MARKER / 2];
    std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut random)?;
    let digits: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    let mut text = [word, b"-", digits.as_bytes()].concat();
    text.truncate(MARKER);
    Ok(text)
}

fn copy_secret(folders: &Folders, volume: &Volume) -> anyhow::Result<Secret> {
    let directory = folders
        .path("secrets")
        .join(format!("{}-client", volume.volume_id));
    Ok(Secret::load(&directory, Side::Client)?)
}

fn target(
    address: &str,
    volume: &Volume,
    export: &ExportName,
    secret: &Secret,
    profile: Profile,
) -> anyhow::Result<Target> {
    let id: VolumeId = volume.volume_id.parse()?;
    Ok(Target {
        address: address.parse::<SocketAddr>()?,
        export: export.clone(),
        tls: tls::client_config(secret, profile)?,
        server_name: tls::server_identity(&id).try_into()?,
        timeout: Duration::from_secs(10),
    })
}

/// Opens a session as an attach does, and gives it up.
async fn opens(
    address: &str,
    volume: &Volume,
    export: &ExportName,
    secret: &Secret,
) -> anyhow::Result<()> {
    let target = target(address, volume, export, secret, Profile::Kernel)?;
    tokio::task::spawn_blocking(move || client::kernel_session(&target).map(drop)).await??;
    Ok(())
}

async fn verified(
    plugin: &Plugin,
    volume: &Volume,
    export: &ExportName,
    secret: &Secret,
) -> anyhow::Result<Found<()>> {
    let (address, _) = plugin.server(volume).await?;
    let target = target(&address, volume, export, secret, Profile::Probe)?;
    let report = tokio::task::spawn_blocking(move || verify::battery(&target)).await?;
    let clean = report.findings().count() == 0 && report.not_run().count() == 0;
    ensure!(clean, "the server did not pass:\n{report}");
    Ok(Found::new(()).saying(report.to_string()))
}

/// A kernel device of ours.
struct KernelDevice {
    index: u32,
    backend: String,
}

impl KernelDevice {
    fn bytes(&self) -> anyhow::Result<u64> {
        let sectors = std::fs::read_to_string(format!("/sys/block/nbd{}/size", self.index))?;
        Ok(sectors.trim().parse::<u64>()? * 512)
    }
}

fn our_device(volume: &Volume) -> anyhow::Result<KernelDevice> {
    for index in 0..64 {
        let path = format!("/sys/block/nbd{index}/backend");
        if let Ok(backend) = std::fs::read_to_string(path)
            && backend.contains(&volume.volume_id)
        {
            let backend = backend.trim().to_owned();
            return Ok(KernelDevice { index, backend });
        }
    }
    bail!("no kernel device has the volume as its backend");
}

fn no_devices() -> anyhow::Result<()> {
    for index in 0..64 {
        ensure!(
            !Path::new(&format!("/sys/block/nbd{index}/pid")).exists(),
            "/dev/nbd{index} is still connected"
        );
    }
    Ok(())
}

/// The kernel's own counters: sockets whose records it makes and reads itself.
fn kernel_tls() -> anyhow::Result<Found<()>> {
    let statistics = std::fs::read_to_string("/proc/net/tls_stat")?;
    let counter = |name: &str| {
        statistics
            .lines()
            .find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok())
            .with_context(|| format!("/proc/net/tls_stat has no {name}"))
    };
    let (sending, receiving) = (counter("TlsCurrTxSw")?, counter("TlsCurrRxSw")?);
    let errors = counter("TlsDecryptError")?;
    ensure!(
        sending > 0 && receiving > 0 && errors == 0,
        "TlsCurrTxSw {sending}, TlsCurrRxSw {receiving}, TlsDecryptError {errors}"
    );
    Ok(Found::new(()).saying(format!(
        "/proc/net/tls_stat: TlsCurrTxSw {sending}, TlsCurrRxSw {receiving}, TlsDecryptError 0"
    )))
}

async fn searched(capture: Capture, marker: &[u8]) -> anyhow::Result<Found<()>> {
    let control = self::marker(b"CONTROL")?;
    Capture::control(&control)?;
    let captured = capture.end(&control).await?;
    ensure!(
        captured.len() > marker.len() * REPEATS,
        "the capture is shorter than what was written"
    );
    ensure!(!captured.has(marker), "the secret text is on the wire");
    Ok(Found::new(()).saying(format!(
        "not in {} KiB of capture, which does have a text sent in the clear to try it",
        captured.len() >> 10
    )))
}

/// Makes the kernel forget what it read and wrote, so that the next read comes from the server.
fn drop_caches() -> anyhow::Result<()> {
    rustix::fs::sync();
    std::fs::write("/proc/sys/vm/drop_caches", "3").context("drop the page cache")
}

fn file_system_bytes(target: &Path) -> anyhow::Result<u64> {
    let statistics = rustix::fs::statvfs(target)?;
    Ok(statistics.f_blocks * statistics.f_frsize)
}

fn nothing_left(folders: &Folders, volume: &Volume, server: &str) -> anyhow::Result<()> {
    let id = &volume.volume_id;
    for folder in ["pool", "secrets", "state", "staging", "target"] {
        if let Some(path) = named(&folders.path(folder), id)? {
            bail!("{} is left", path.display());
        }
    }
    no_devices()?;
    ensure!(
        std::net::TcpStream::connect(server.parse::<SocketAddr>()?).is_err(),
        "somebody still listens at {server}"
    );
    for process in std::fs::read_dir("/proc")?.flatten() {
        let line = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
        ensure!(
            !String::from_utf8_lossy(&line).contains(id.as_str()),
            "process {} is left",
            process.file_name().display()
        );
    }
    Ok(())
}

/// The first path below `folder` that has `name` in it.
fn named(folder: &Path, name: &str) -> anyhow::Result<Option<PathBuf>> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().contains(name) {
            return Ok(Some(entry.path()));
        }
        if entry.file_type()?.is_dir()
            && let Some(found) = named(&entry.path(), name)?
        {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// The end of the services' log, for the person who has to find out.
fn last_words(folders: &Folders) {
    let log = std::fs::read_to_string(folders.path("standalone.log")).unwrap_or_default();
    let lines: Vec<_> = log.lines().collect();
    eprintln!("\nThe end of the services' log:");
    for line in &lines[lines.len().saturating_sub(30)..] {
        eprintln!("  {line}");
    }
}
