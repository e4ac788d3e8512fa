//! The battery against servers that exist. None of them has the faults it looks for, so none may have a finding.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use hawser::client::kernel_session;
use hawser::nbd::ExportName;
use hawser::tls::{self, Authority, Leaf, Profile, Secret, Side};
use hawser::verify::{
    Cancel, Examined, Identity, Outcome, Policy, Report, Selection, Server, Target, battery, run,
};
use rustls::CipherSuite;
use rustls::pki_types::ServerName;
use tempfile::TempDir;

const SERVER: &str = "volume.server.test";
const CLIENT: &str = "volume.client.test";
pub(crate) const EXPORT: &str = "volume";
const SIZE: u64 = 64 << 20;

/// Certificates under everybody's names for them, and a backing file with data and holes.
pub(crate) struct Bench {
    directory: TempDir,
    client: Secret,
    /// Another client of the same authority.
    other: Identity,
    /// The client's certificate of yesterday.
    expired: Identity,
}

impl Bench {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let authority = Authority::temporary().unwrap();
        let server = authority
            .issue(&Leaf::new(Side::Server, vec![SERVER.into()]))
            .unwrap();
        let issue = |leaf: &Leaf| authority.issue(leaf).unwrap();
        let client = issue(&Leaf::new(Side::Client, vec![CLIENT.into()]));
        let other = issue(&Leaf::new(Side::Client, vec!["other.client.test".into()]));
        let other = Secret::from_map("another client's Secret", &other, Side::Client).unwrap();
        let mut yesterday = Leaf::new(Side::Client, vec![CLIENT.into()]);
        yesterday.not_after = yesterday.not_before;
        yesterday.not_before -= Duration::from_secs(24 * 60 * 60);
        tls::write_secret(&directory.path().join("expired"), &issue(&yesterday)).unwrap();
        let expired = Secret::load_expired(&directory.path().join("expired"), Side::Client);
        tls::write_secret(directory.path(), &server).unwrap();
        for (ours, theirs) in [
            (tls::CERTIFICATE, "server-cert.pem"),
            (tls::KEY, "server-key.pem"),
            (tls::AUTHORITIES, "ca-cert.pem"),
        ] {
            std::fs::write(directory.path().join(theirs), &server[ours]).unwrap();
        }
        let data = File::create(directory.path().join("data")).unwrap();
        data.set_len(SIZE).unwrap();
        for offset in [0, 1 << 20, 40 << 20] {
            data.write_all_at(&[0x5a; 128 << 10], offset).unwrap();
        }
        Self {
            directory,
            client: Secret::from_map("the client Secret", &client, Side::Client).unwrap(),
            other: Identity::new(&other).unwrap(),
            expired: Identity::new(&expired.unwrap()).unwrap(),
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    fn target(&self, address: SocketAddr, profile: Profile) -> Target {
        Target {
            address,
            export: ExportName::try_from(EXPORT).unwrap(),
            tls: tls::client_config(&self.client, profile).unwrap(),
            server_name: ServerName::try_from(SERVER).unwrap(),
            timeout: Duration::from_secs(20),
        }
    }

    pub(crate) fn server(&self, address: SocketAddr) -> Server {
        Server {
            identity: Some(Identity::new(&self.client).unwrap()),
            other: Some(self.other.clone()),
            expired: Some(self.expired.clone()),
            ..Server::from(&self.target(address, Profile::Any))
        }
    }

    /// Every check is made, and none finds anything; and the session that the kernel gets is to be had.
    fn assert_sound(&self, address: SocketAddr) {
        let report = battery(&self.target(address, Profile::Probe));
        assert!(
            report
                .results
                .iter()
                .all(|examined| matches!(examined.outcome, Outcome::Passed { .. })),
            "{report}"
        );
        assert_eq!(Policy::Strict.decide(&report), Ok(()));
        // M5: GnuTLS sends tickets, which must be read before the hand-over.
        let session = match kernel_session(&self.target(address, Profile::Kernel)) {
            Ok(session) => session,
            Err(error) => panic!("{error}"),
        };
        assert_eq!(session.transmission.info.size, SIZE);
        assert_eq!(
            session.cipher,
            Some(CipherSuite::TLS13_CHACHA20_POLY1305_SHA256),
            "K4"
        );
    }
}

/// A process that ends with its test.
pub(crate) struct Peer(pub(crate) Child);

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Peer {
    /// Starts a server that is told its port, and waits until it listens.
    pub(crate) fn start(command: &mut Command, address: SocketAddr) -> Self {
        // They log each refusal that the battery provokes.
        command.stdin(Stdio::null()).stderr(Stdio::null());
        let mut peer = Self(command.spawn().unwrap());
        let deadline = Instant::now() + Duration::from_secs(60);
        while TcpStream::connect(address).is_err() {
            assert!(Instant::now() < deadline, "{command:?} does not listen");
            assert_eq!(peer.0.try_wait().unwrap(), None, "{command:?} ended");
            std::thread::sleep(Duration::from_millis(10));
        }
        peer
    }
}

pub(crate) fn free_address() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap()
}

#[test]
fn hawser_serve_has_no_finding() {
    let bench = Bench::new();
    let mut server = Command::new(env!("CARGO_BIN_EXE_hawser"))
        .env("HAWSER_LOG", "warn")
        .args(["serve", "--listen", "127.0.0.1:0", "--certificates"])
        .arg(bench.directory.path())
        .arg("--file")
        .arg(bench.path("data"))
        .args(["--export", EXPORT, "--client", CLIENT])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let stdout = server.stdout.take().unwrap();
    let _server = Peer(server);
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line).unwrap();
    let address = line.trim().strip_prefix("listening on ").unwrap();
    let address = address.parse().unwrap();
    bench.assert_sound(address);
    let started = Instant::now();
    let report = examine(&bench.server(address), &Selection::default());
    assert_eq!(report.findings().count(), 0, "{report}");
    assert_eq!(report.not_run().count(), 0, "{report}");
    let seconds = started.elapsed().as_secs();
    assert!(seconds < 60, "{seconds} s, on a busy machine: {report}");
    // And what may break it, or overwrite it.
    let report = examine(
        &bench.server(address),
        &Selection {
            write: true,
            intrusive: true,
            ..Selection::default()
        },
    );
    assert_eq!(report.findings().count(), 0, "{report}");
    assert_eq!(report.not_run().count(), 0, "{report}");
    let passed = |examined: &&Examined| matches!(examined.outcome, Outcome::Passed { .. });
    assert!(
        report.results.iter().filter(passed).count() > 80,
        "{report}"
    );
}

pub(crate) fn examine(server: &Server, selection: &Selection) -> Report {
    run(server, selection, &|_| {}, &Cancel::new())
}

#[test]
fn nbdkit_has_no_finding() {
    let bench = Bench::new();
    let address = free_address();
    let mut command = Command::new("nbdkit");
    command
        .args(["--foreground", "--tls=require", "--tls-verify-peer"])
        .args(["--ipaddr=127.0.0.1", &format!("--port={}", address.port())])
        .arg(format!("--tls-certificates={}", bench.text("")))
        .args(["file", &bench.text("data")]);
    let _peer = Peer::start(&mut command, address);
    bench.assert_sound(address);
}

#[test]
fn qemu_nbd_has_no_finding() {
    let bench = Bench::new();
    let address = free_address();
    let credentials = format!(
        "tls-creds-x509,id=t,endpoint=server,verify-peer=on,dir={}",
        bench.text("")
    );
    let mut command = Command::new("qemu-nbd");
    command
        .args(["--object", &credentials, "--tls-creds=t", "--read-only"])
        .args(["--format=raw", "--persistent", "--shared=0"])
        .args(["--bind=127.0.0.1", &format!("--port={}", address.port())])
        .args(["--export-name", EXPORT, &bench.text("data")]);
    let _peer = Peer::start(&mut command, address);
    bench.assert_sound(address);
}
