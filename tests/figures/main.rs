//! Measures what the promises about size and start-up come to on this machine, and prints it. It asserts nothing about
//! time: a figure is read by people, beside the goal.
//!
//! `make figures`; needs no root and no kernel module.

use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use hawser::proto::csi::controller_client::ControllerClient;
use hawser::proto::csi::volume_capability::access_mode::Mode;
use hawser::proto::csi::volume_capability::{AccessMode, AccessType, BlockVolume};
use hawser::proto::csi::{
    CapacityRange, CreateVolumeRequest, DeleteVolumeRequest, VolumeCapability,
};
use hawser::proto::socket;
use hawser::tls::{self, Authority, Leaf, Profile, Secret, Side};

const HAWSER: &str = env!("CARGO_BIN_EXE_hawser");
const STARTS: usize = 20;
const VOLUMES: usize = 200;

fn main() -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    println!("figure                                             measured      goal");
    starts(directory.path())?;
    tokio::runtime::Runtime::new()?.block_on(side_by_side(directory.path()))
}

fn show(figure: &str, measured: &str, goal: &str) {
    println!("{figure:<48} {measured:>10} {goal:>9}");
}

/// A process that is killed when it goes out of scope.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn starts(directory: &Path) -> anyhow::Result<()> {
    let authority = Authority::temporary()?;
    let (server, client) = (directory.join("server"), directory.join("client"));
    tls::write_secret(
        &server,
        &authority.issue(&Leaf::new(Side::Server, vec!["figures.test".into()]))?,
    )?;
    tls::write_secret(
        &client,
        &authority.issue(&Leaf::new(Side::Client, vec!["reader".into()]))?,
    )?;
    let file = directory.join("disk");
    std::fs::File::create(&file)?.set_len(1 << 30)?;
    let mut times = Vec::new();
    for _ in 0..STARTS {
        let port = free_port()?;
        let began = Instant::now();
        let serve = serve(&file, &server, port)?;
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            ensure!(
                began.elapsed() < Duration::from_secs(10),
                "the server does not listen"
            );
            std::thread::sleep(Duration::from_micros(500));
        }
        times.push(began.elapsed());
        drop(serve);
    }
    times.sort();
    show(
        "hawser serve: from start to listening, median",
        &format!("{:.1} ms", times[STARTS / 2].as_secs_f64() * 1e3),
        "50 ms",
    );
    show(
        "hawser serve: from start to listening, slowest",
        &format!("{:.1} ms", times[STARTS - 1].as_secs_f64() * 1e3),
        "50 ms",
    );
    let port = free_port()?;
    let serve = serve(&file, &server, port)?;
    let address = format!("127.0.0.1:{port}").parse()?;
    std::thread::sleep(Duration::from_secs(1));
    show(
        "hawser serve: resident memory, before a session",
        &resident(serve.0.id())?,
        "16 MiB",
    );
    let target = hawser::client::Target {
        address,
        export: "disk".try_into()?,
        tls: tls::client_config(&Secret::load(&client, Side::Client)?, Profile::Probe)?,
        server_name: "figures.test".try_into()?,
        timeout: Duration::from_secs(10),
    };
    for _ in 0..50 {
        hawser::client::ProbeSession::connect(&target)?.abort();
    }
    std::thread::sleep(Duration::from_secs(1));
    show(
        "hawser serve: resident memory, after 50 sessions",
        &resident(serve.0.id())?,
        "16 MiB",
    );
    Ok(())
}

fn serve(file: &Path, certificates: &Path, port: u16) -> anyhow::Result<Killed> {
    Command::new(HAWSER)
        .args([
            "--log", "warn", "serve", "--export", "disk", "--client", "reader",
        ])
        .arg("--file")
        .arg(file)
        .arg("--certificates")
        .arg(certificates)
        .args(["--listen", &format!("127.0.0.1:{port}")])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .map(Killed)
        .context("start hawser serve")
}

fn free_port() -> anyhow::Result<u16> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?
        .local_addr()?
        .port())
}

fn resident(process: u32) -> anyhow::Result<String> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status"))?;
    let kib: f64 = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|rest| rest.trim().strip_suffix("kB"))
        .context("no VmRSS")?
        .trim()
        .parse()?;
    Ok(format!("{:.1} MiB", kib / 1024.0))
}

/// Creates volumes all at once, as a provisioner with many workers would, and deletes them.
async fn side_by_side(directory: &Path) -> anyhow::Result<()> {
    let folder = |name: &str| -> PathBuf { directory.join(name) };
    let path = folder("csi.sock");
    let standalone = Command::new(HAWSER)
        .args([
            "--log",
            "warn",
            "standalone",
            "--no-node",
            "--node-id",
            "figures",
        ])
        .arg("--state")
        .arg(folder("state"))
        .arg("--secrets")
        .arg(folder("secrets"))
        .arg("--pool")
        .arg(folder("pool"))
        .arg("--endpoint")
        .arg(format!("unix://{}", path.display()))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .map(Killed)
        .context("start hawser standalone")?;
    let began = Instant::now();
    let channel = loop {
        match socket::connect(&path).await {
            Ok(channel) => break channel,
            Err(_) if began.elapsed() < Duration::from_secs(10) => {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            Err(error) => bail!(error),
        }
    };
    let began = Instant::now();
    let mut calls = tokio::task::JoinSet::new();
    for index in 0..VOLUMES {
        let mut controller = ControllerClient::new(channel.clone());
        calls.spawn(async move {
            let began = Instant::now();
            let volume = controller.create_volume(create(index)).await?.into_inner();
            anyhow::Ok((
                began.elapsed(),
                volume.volume.context("no volume")?.volume_id,
            ))
        });
    }
    let mut done = calls
        .join_all()
        .await
        .into_iter()
        .collect::<Result<Vec<_>, _>>()?;
    let all = began.elapsed();
    done.sort();
    show(
        &format!("CreateVolume: {VOLUMES} side by side, all"),
        &format!("{:.2} s", all.as_secs_f64()),
        "all served",
    );
    show(
        "CreateVolume: the slowest of them",
        &format!("{:.2} s", done[VOLUMES - 1].0.as_secs_f64()),
        "",
    );
    let began = Instant::now();
    let mut calls = tokio::task::JoinSet::new();
    for (_, volume_id) in done {
        let mut controller = ControllerClient::new(channel.clone());
        calls.spawn(async move {
            let request = DeleteVolumeRequest {
                volume_id,
                ..Default::default()
            };
            controller.delete_volume(request).await
        });
    }
    for result in calls.join_all().await {
        result?;
    }
    show(
        &format!("DeleteVolume: {VOLUMES} side by side, all"),
        &format!("{:.2} s", began.elapsed().as_secs_f64()),
        "",
    );
    drop(standalone);
    Ok(())
}

fn create(index: usize) -> CreateVolumeRequest {
    CreateVolumeRequest {
        name: format!("figure-{index}"),
        capacity_range: Some(CapacityRange {
            required_bytes: 64 << 20,
            limit_bytes: 0,
        }),
        volume_capabilities: vec![VolumeCapability {
            access_mode: Some(AccessMode {
                mode: Mode::SingleNodeWriter.into(),
            }),
            access_type: Some(AccessType::Block(BlockVolume {})),
        }],
        ..Default::default()
    }
}
