//! The host's half: a network of our own, the server, and how much of the processor both sides take.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use hawser::demo::uml::{Access, Kernel, Machine};
use hawser::proto::control::AllowRequest;
use hawser::proto::control::control_client::ControlClient;
use hawser::proto::socket;
use hawser::tls::{self, Authority};
use hawser::volumes::{AttachmentId, VolumeId};

use super::cases::Sample;
use super::guest::{self, Task};
use super::report::Report;
use super::{Options, SIZE, network};

const TAP: &str = "bench";
const HOST: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
const GUEST: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2));

/// For all cases together, several times what they take.
const DEADLINE: Duration = Duration::from_secs(2 * 3600);

/// Clock ticks of /proc in a second, on every Linux.
const TICKS: f64 = 100.0;

/// ChaCha20-Poly1305 is the cipher of kernel sessions; nbd-client gets no other.
const PRIORITIES: &str = "[overrides]\n\
    tls-disabled-cipher = AES-256-GCM\n\
    tls-disabled-cipher = AES-128-GCM\n\
    tls-disabled-cipher = AES-256-CCM\n\
    tls-disabled-cipher = AES-128-CCM\n";

pub(crate) fn main(options: &Options) -> Result<()> {
    for line in [
        &format!("tuntap add dev {TAP} mode tap"),
        &format!("address add {HOST}/24 dev {TAP}"),
        &format!("link set {TAP} up"),
    ] {
        network::ip(line)?;
    }
    // Elsewhere than in the folders that a machine has for itself.
    let folder = tempfile::tempdir_in("/dev/shm")?;
    let server = Server::start(folder.path())?;
    let task = Task {
        server: server.address,
        address: GUEST,
        volume: server.volume.clone(),
        attachments: server.allow()?,
        secret: folder.path().join("client"),
        priorities: folder.path().join("priorities"),
        repetitions: options.repetitions,
        seconds: options.seconds,
        only: options.only.clone(),
        mode: options.mode,
    };
    let kernel = Kernel::installed()?;
    let mut report = Report::new(&kernel, options)?;
    let built = std::env::current_exe()?;
    let machine = Machine::new(kernel)
        .network(TAP)
        .deadline(DEADLINE)
        .share(
            Access::ReadOnly,
            built.parent().context("the build's folder")?,
        )
        .share(Access::ReadOnly, folder.path());
    let command = [
        built.display().to_string(),
        guest::INSIDE.to_owned(),
        serde_json::to_string(&task)?,
    ];
    let mut began = (0.0, 0.0);
    let mut trouble = None;
    let outcome = machine.run(&command, |line| {
        let told = match line.strip_prefix(guest::MARK) {
            None => {
                println!("{line}");
                return;
            }
            Some(guest::BEGINS) => server.times().map(|times| began = times),
            Some(text) => server.times().and_then(|times| {
                let mut sample: Sample = serde_json::from_str(text)?;
                sample.machine = times.0 - began.0;
                sample.server = times.1 - began.1;
                report.add(sample);
                Ok(())
            }),
        };
        if let Err(error) = told {
            trouble.get_or_insert(error);
        }
    })?;
    if let Some(error) = trouble {
        return Err(error);
    }
    ensure!(
        outcome.status == 0,
        "the machine's half failed:\n{}",
        outcome.console
    );
    server.check_ciphers()?;
    report.finish(options.output.as_deref())
}

/// `hawser serve` with one volume; ends with this value.
struct Server {
    volume: VolumeId,
    address: SocketAddr,
    folder: PathBuf,
    process: Child,
}

impl Server {
    fn start(folder: &Path) -> Result<Self> {
        let volume = VolumeId::from_bytes([1; 16]);
        let authority = Authority::open(&folder.join("authority"))?;
        tls::write_secret(
            &folder.join("server"),
            &authority.issue_server(&volume, &[])?,
        )?;
        tls::write_secret(&folder.join("client"), &authority.issue_client(&volume)?)?;
        let priorities = folder.join("priorities");
        fs::write(&priorities, PRIORITIES)?;
        fs::set_permissions(&priorities, fs::Permissions::from_mode(0o644))?;
        // Not a hole anywhere, which would be answered without reading.
        let mut data = File::create(folder.join("data"))?;
        let block: Vec<u8> = (0..1_u32 << 20).map(|at| (at % 251) as u8).collect();
        for _ in 0..SIZE >> 20 {
            data.write_all(&block)?;
        }
        let binary = std::env::var_os("HAWSER_BENCH_BINARY");
        let binary = binary.unwrap_or_else(|| env!("CARGO_BIN_EXE_hawser").into());
        let mut process = Command::new(binary)
            .args(["serve", "--tls12", "--listen", &format!("{HOST}:0")])
            .args(["--volume", volume.as_str(), "--directory"])
            .arg(folder)
            .arg("--certificates")
            .arg(folder.join("server"))
            .arg("--control")
            .arg(folder.join("control"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(folder.join("log"))?)
            .spawn()?;
        let mut line = String::new();
        let output = process.stdout.take().context("the server's output")?;
        BufReader::new(output).read_line(&mut line)?;
        let mut server = Self {
            volume,
            address: SocketAddr::new(HOST, 0),
            folder: folder.to_owned(),
            process,
        };
        let Some(address) = line.trim().strip_prefix("listening on ") else {
            bail!("the server does not listen: {}", server.log()?);
        };
        server.address = address.parse()?;
        Ok(server)
    }

    fn log(&self) -> Result<String> {
        Ok(fs::read_to_string(self.folder.join("log"))?)
    }

    fn allow(&self) -> Result<[AttachmentId; 2]> {
        let attachments = [1, 2].map(|number| AttachmentId::from_bytes([number; 16]));
        let control = self.folder.join("control");
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?
            .block_on(async {
                let mut control = ControlClient::new(socket::connect(&control).await?);
                for attachment in &attachments {
                    let request = AllowRequest {
                        attachment: attachment.to_string(),
                        read_only: false,
                    };
                    control.allow(request).await?;
                }
                Ok::<_, anyhow::Error>(())
            })?;
        Ok(attachments)
    }

    /// Seconds of processor time so far: of the machine, and of this server.
    fn times(&self) -> Result<(f64, f64)> {
        Ok((machine_time()?, of_group(self.process.id())?.0))
    }

    fn check_ciphers(&self) -> Result<()> {
        let log = self.log()?;
        for line in log.lines().filter(|line| line.contains("cipher=")) {
            ensure!(line.contains("CHACHA20_POLY1305"), "another cipher: {line}");
        }
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The processor time of a process with its ended children, and its group and parent.
fn of_group(process: u32) -> Result<(f64, u32, u32)> {
    let text = fs::read_to_string(format!("/proc/{process}/stat"))?;
    let (_, fields) = text.rsplit_once(") ").context("/proc/PID/stat")?;
    let fields: Vec<&str> = fields.split(' ').collect();
    let number = |index: usize| -> Result<u32> { Ok(fields[index].parse()?) };
    let ticks = number(11)? + number(12)? + number(13)? + number(14)?;
    Ok((f64::from(ticks) / TICKS, number(2)?, number(1)?))
}

/// The same of all processes of the user-mode Linux that this process started: it leads a group of its own.
fn machine_time() -> Result<f64> {
    let mut processes = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        if let Some(process) = name.to_str().and_then(|name| name.parse::<u32>().ok())
            // It may have ended since.
            && let Ok((time, group, parent)) = of_group(process)
        {
            processes.push((process, time, group, parent));
        }
    }
    let leader = processes
        .iter()
        .find(|(process, _, group, parent)| process == group && *parent == std::process::id())
        .context("the machine's first process")?
        .0;
    let members = processes.iter().filter(|(_, _, group, _)| *group == leader);
    Ok(members.map(|(_, time, _, _)| time).sum())
}
