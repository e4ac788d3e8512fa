//! Other people's way to a kernel device: nbd-client, whose TLS is a process between the kernel and the server.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hawser::tls::{Authority, Leaf, Side};

use crate::Scenario;
use crate::machine::{PATIENCE, succeed};

pub(crate) const SCENARIOS: &[Scenario] = &[Scenario::new(
    "foreign::nbd_client_carries_data_through_its_proxy",
    nbd_client_carries_data_through_its_proxy,
)];

const MIB: u64 = 1 << 20;
const CLIENT: &str = "peer.client.example";

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// nbd-client 3.24 offers TLS 1.2 and nothing newer: it is what `--tls12` is for.
fn nbd_client_carries_data_through_its_proxy() -> Result<()> {
    let folder = PathBuf::from(format!("/run/foreign.{}", std::process::id()));
    fs::create_dir(&folder)?;
    let path = |name: &str| folder.join(name);
    let authority = Authority::temporary()?;
    for (side, names, prefix) in [
        (Side::Server, "localhost", "server"),
        (Side::Client, CLIENT, "client"),
    ] {
        let secret = authority.issue(&Leaf::new(side, vec![names.to_owned()]))?;
        fs::write(path(&format!("{prefix}-cert.pem")), &secret["tls.crt"])?;
        fs::write(path(&format!("{prefix}-key.pem")), &secret["tls.key"])?;
        fs::write(path("ca-cert.pem"), &secret["ca.crt"])?;
    }
    File::create(path("data"))?.set_len(64 * MIB)?;
    let mut server = Command::new(env!("CARGO_BIN_EXE_hawser"))
        .args([
            "serve",
            "--tls12",
            "--export",
            "disk",
            "--listen",
            "127.0.0.1:0",
        ])
        .args(["--client", CLIENT, "--file"])
        .arg(path("data"))
        .arg("--certificates")
        .arg(&folder)
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    BufReader::new(server.stdout.take().context("the server's output")?).read_line(&mut line)?;
    let server = Server(server);
    let port = line
        .trim()
        .rsplit_once(':')
        .context("the server did not start")?
        .1;

    succeed(
        Command::new("nbd-client")
            .args([
                "localhost",
                port,
                "/dev/nbd0",
                "-name",
                "disk",
                "-block-size",
                "4096",
            ])
            .args(["-tlshostname", "localhost", "-certfile"])
            .arg(path("client-cert.pem"))
            .arg("-keyfile")
            .arg(path("client-key.pem"))
            .arg("-cacertfile")
            .arg(path("ca-cert.pem")),
    )?;
    let size = fs::read_to_string("/sys/block/nbd0/size")?;
    ensure!(
        size.trim() == (64 * MIB / 512).to_string(),
        "{size} sectors"
    );
    succeed(
        Command::new("fio")
            .args([
                "--name=verify",
                "--filename=/dev/nbd0",
                "--size=8m",
                "--rw=randwrite",
            ])
            .args([
                "--bs=4k",
                "--direct=1",
                "--ioengine=psync",
                "--verify=crc32c",
            ])
            .args(["--verify_fatal=1", "--verify_state_save=0", "--end_fsync=1"]),
    )?;
    let data = fs::read(path("data"))?;
    let written = data
        .chunks(4096)
        .filter(|block| block.iter().any(|byte| *byte != 0))
        .count();
    ensure!(
        written == 2048,
        "{written} blocks arrived in the backing file, and fio wrote 2048"
    );

    succeed(Command::new("nbd-client").args(["-d", "/dev/nbd0"]))?;
    let started = Instant::now();
    while fs::exists("/sys/block/nbd0/pid")? {
        ensure!(started.elapsed() < PATIENCE, "nbd0 is still connected");
        thread::sleep(Duration::from_millis(20));
    }
    drop(server);
    fs::remove_dir_all(&folder).context("removing what this scenario made")
}
