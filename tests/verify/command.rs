//! The command as users and pipelines see it: what it prints where, and its exit status.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use hawser::tls::{self, Authority, Leaf, Side};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::peers::Peer;

const SERVER: &str = "volume.server.test";
const CLIENT: &str = "volume.client.test";

/// `hawser verify`, out of reach of whatever certificates this machine has.
fn verify(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hawser"));
    command
        .arg("verify")
        .args(words)
        .env("HOME", "/nonexistent")
        .stdin(Stdio::null());
    command
}

fn output(words: &[&str]) -> (i32, String, String) {
    told(verify(words).output().unwrap())
}

fn told(output: Output) -> (i32, String, String) {
    (
        output.status.code().unwrap(),
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    )
}

/// Certificates in both layouts, and a running `hawser serve`.
struct Bench {
    directory: TempDir,
    address: SocketAddr,
    _server: Peer,
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        let authority = Authority::temporary().unwrap();
        let server = authority
            .issue(&Leaf::new(Side::Server, vec![SERVER.into()]))
            .unwrap();
        tls::write_secret(&path.join("server"), &server).unwrap();
        let mut ended = Leaf::new(Side::Client, vec![CLIENT.into()]);
        ended.not_before -= time::Duration::days(30);
        ended.not_after = ended.not_before + time::Duration::days(1);
        for (name, leaf) in [
            ("client", Leaf::new(Side::Client, vec![CLIENT.into()])),
            (
                "other",
                Leaf::new(Side::Client, vec!["other.client.test".into()]),
            ),
            ("expired", ended),
        ] {
            let secret = authority.issue(&leaf).unwrap();
            tls::write_secret(&path.join(name), &secret).unwrap();
            let libnbd = path.join(format!("{name}-libnbd"));
            std::fs::create_dir(&libnbd).unwrap();
            for (ours, theirs) in [
                (tls::CERTIFICATE, "client-cert.pem"),
                (tls::KEY, "client-key.pem"),
                (tls::AUTHORITIES, "ca-cert.pem"),
            ] {
                std::fs::write(libnbd.join(theirs), &secret[ours]).unwrap();
            }
        }
        File::create(path.join("data"))
            .unwrap()
            .set_len(4 << 20)
            .unwrap();
        let mut server = Command::new(env!("CARGO_BIN_EXE_hawser"))
            .env("HAWSER_LOG", "error")
            .args(["serve", "--listen", "127.0.0.1:0", "--certificates"])
            .arg(path.join("server"))
            .arg("--file")
            .arg(path.join("data"))
            .args(["--export", "disk", "--client", CLIENT])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = server.stdout.take().unwrap();
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening on ").unwrap();
        Self {
            address: address.parse().unwrap(),
            _server: Peer(server),
            directory,
        }
    }

    fn path(&self, name: &str) -> String {
        self.directory.path().join(name).display().to_string()
    }

    fn uri(&self, parameters: &str) -> String {
        format!(
            "nbds://{}/disk?tls-hostname={SERVER}{parameters}",
            self.address
        )
    }
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

fn count<'a>(report: &'a Value, outcome: &'a str) -> usize {
    let results = report["results"].as_array().unwrap();
    results
        .iter()
        .filter(|result| result["outcome"] == outcome)
        .count()
}

#[test]
fn certificates_come_from_files_and_directories() {
    let bench = Bench::new();
    let file = |name: &str| bench.path(&format!("client/{name}"));
    let by_uri = bench.uri(&format!("&tls-certificates={}", bench.path("client")));
    let uri = bench.uri("");
    let (ca, cert, key) = (file("ca.crt"), file("tls.crt"), file("tls.key"));
    for words in [
        vec![by_uri.as_str()],
        vec![&uri, "--certificates", &bench.path("client-libnbd")],
        vec![&uri, "--ca", &ca, "--cert", &cert, "--key", &key],
    ] {
        let quick = [&words[..], &["--check", "secured", "--format", "json"]].concat();
        let (status, stdout, stderr) = output(&quick);
        let report = json(&stdout);
        assert_eq!(status, 0, "{words:?}: {stdout}{stderr}");
        assert_eq!(report["verdict"], "passed");
        assert_eq!(report["schema"], "hawser.dev/verify/1");
        assert_eq!(report["summary"]["mode"], "forced");
        assert!(count(&report, "passed") >= 3, "{stdout}");
        assert_eq!(stderr, "");
    }
    // Where libnbd looks, for whoever is not root; root's place is the machine's.
    if !rustix::process::geteuid().is_root() {
        let pki = bench.directory.path().join("home/.pki");
        std::fs::create_dir_all(&pki).unwrap();
        std::os::unix::fs::symlink(bench.path("client-libnbd"), pki.join("libnbd")).unwrap();
        let mut command = verify(&[&uri, "--check", "secured"]);
        let (status, stdout, _) = told(command.env("HOME", bench.path("home")).output().unwrap());
        assert_eq!(status, 0, "{stdout}");
    }
}

#[test]
fn a_clean_server_is_found_clean_with_all_that_is_known_of_it() {
    let bench = Bench::new();
    let (json_file, junit_file) = (bench.path("report.json"), bench.path("report.xml"));
    let (status, stdout, stderr) = output(&[
        &bench.uri(""),
        "--certificates",
        &bench.path("client"),
        "--other-certificates",
        &bench.path("other"),
        "--expired-certificates",
        &bench.path("expired"),
        "--json",
        &json_file,
        "--junit",
        &junit_file,
        "--fail-on",
        "style",
    ]);
    assert_eq!(status, 0, "{stdout}{stderr}");
    assert!(stdout.contains("\nFORCEDTLS: "), "{stdout}");
    assert!(stdout.contains("; 4194304 bytes; "), "{stdout}");
    assert!(stdout.contains("\nNo findings; of "), "{stdout}");
    assert!(stdout.lines().all(|line| line.len() <= 80), "{stdout}");
    let report = json(&std::fs::read_to_string(json_file).unwrap());
    assert_eq!(count(&report, "finding") + count(&report, "not-run"), 0);
    let junit = std::fs::read_to_string(junit_file).unwrap();
    let cases = junit.matches("<testcase ").count();
    assert_eq!(cases, report["results"].as_array().unwrap().len());
    assert!(
        !junit.contains("<failure") && !junit.contains("<error"),
        "{junit}"
    );
}

#[test]
fn without_certificates_the_outside_is_examined() {
    let bench = Bench::new();
    let words = [&bench.uri(""), "--no-certificates", "--format", "json"];
    let (status, stdout, stderr) = output(&words);
    let report = json(&stdout);
    assert_eq!(status, 2, "{stdout}");
    assert_eq!(report["verdict"], "incomplete");
    assert_eq!(report["summary"]["mode"], "forced");
    assert!(count(&report, "passed") >= 4, "{stdout}");
    assert!(count(&report, "not-run") >= 4, "{stdout}");
    assert_eq!(count(&report, "finding"), 0, "{stdout}");
    assert_eq!(stderr, "", "it was asked for");
    let (status, ..) = output(&[&words[..], &["--partial"]].concat());
    assert_eq!(status, 0);
    if !Path::new("/etc/pki/libnbd/ca-cert.pem").exists() {
        let (status, _, stderr) = output(&[&bench.uri("")]);
        assert_eq!(status, 2);
        assert!(
            stderr.contains("no certificates were given or found"),
            "{stderr}"
        );
    }
}

#[test]
fn what_cannot_run_says_why_and_is_2() {
    let bench = Bench::new();
    let nobody = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        format!("nbd://{}/", listener.local_addr().unwrap())
    };
    let uri = bench.uri("");
    let (client, expired) = (bench.path("client"), bench.path("expired"));
    let unix = format!("nbds+unix:///disk?socket=/nonexistent&tls-certificates={client}");
    let certificates = ["--certificates", client.as_str()];
    for (words, wanted) in [
        (vec![], "required"),
        (vec!["localhost:10809"], "an NBD URI begins with"),
        (vec!["nbds://h/?tls-verify-peer=0"], "may be anybody"),
        (
            vec!["nbds://h/?tls-psk-file=f"],
            "pre-shared keys are not supported",
        ),
        (vec!["nbd://no-such-host.invalid/"], "look up the host"),
        (vec![&nobody], "None of the checks could be made"),
        (vec![&unix], "add tls-hostname=NAME"),
        (vec![&uri, "--certificates", "/nonexistent"], "/nonexistent"),
        (vec![&uri, "--certificates", &expired], "ended at"),
        (
            [
                &[uri.as_str()],
                &certificates[..],
                &["--expired-certificates", &client],
            ]
            .concat(),
            "one that has expired is needed",
        ),
        (vec![&uri, "--check", "nothing-such"], "no check"),
        (vec![&uri, "--write"], "--yes"),
        (vec![&uri, "--fail-on", "everything"], "invalid value"),
        (
            vec![&uri, "--json", "/nonexistent/report"],
            "create the report",
        ),
        (vec!["--explain", "nothing-such"], "no check"),
    ] {
        let (status, stdout, stderr) = output(&words);
        assert_eq!(status, 2, "{words:?}: {stdout}{stderr}");
        assert!(
            stderr.contains(wanted) || stdout.contains(wanted),
            "{words:?}: {stdout}{stderr}"
        );
    }
}

#[test]
fn checks_are_listed_and_explained() {
    let (status, list, _) = output(&["--list"]);
    assert_eq!(status, 0);
    let (_, of_json, _) = output(&["--list", "--format", "json"]);
    let of_json = json(&of_json);
    let checks = of_json.as_array().unwrap();
    for check in checks {
        let id = check["id"].as_str().unwrap();
        assert!(list.contains(&format!("\n  {id} ")), "{id}: {list}");
        let (status, page, _) = output(&["--explain", id]);
        assert_eq!(status, 0);
        assert!(page.starts_with(&format!("{id}\n  wanted    ")), "{page}");
    }
}

#[test]
fn a_reader_that_has_had_enough_is_no_error() {
    let mut child = verify(&["--list"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let (status, _, stderr) = told(child.wait_with_output().unwrap());
    assert_eq!((status, stderr.as_str()), (0, ""));
}

/// Passes everything on between a unix socket and a TCP server.
fn relay(socket: &Path, server: SocketAddr) {
    let listener = UnixListener::bind(socket).unwrap();
    thread::spawn(move || {
        for inside in listener.incoming().flatten() {
            let Ok(outside) = TcpStream::connect(server) else {
                continue;
            };
            let (inside, outside) = (Arc::new(inside), Arc::new(outside));
            let there = (inside.clone(), outside.clone());
            thread::spawn(move || {
                let _ = std::io::copy(&mut &*there.0, &mut &*there.1);
                let _ = there.1.shutdown(Shutdown::Write);
            });
            thread::spawn(move || {
                let _ = std::io::copy(&mut &*outside, &mut &*inside);
                let _ = inside.shutdown(Shutdown::Both);
            });
        }
    });
}

#[test]
fn a_server_at_a_unix_socket_is_examined() {
    let bench = Bench::new();
    let socket = bench.directory.path().join("a socket");
    relay(&socket, bench.address);
    let uri = format!(
        "nbds+unix:///disk?socket={}&tls-hostname={SERVER}&tls-certificates={}",
        bench.path("a%20socket"),
        bench.path("client")
    );
    let (status, stdout, stderr) = output(&[&uri, "--check", "secured", "--format", "json"]);
    assert_eq!(status, 0, "{stdout}{stderr}");
    assert!(
        json(&stdout)["address"]
            .as_str()
            .unwrap()
            .starts_with("unix:/")
    );
}

/// Accepts and greets everybody, and then says no more.
fn silent_server() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        let mut sessions = Vec::new();
        for mut session in listener.incoming().flatten() {
            let _ = session.write_all(b"NBDMAGICIHAVEOPT\0\x03");
            sessions.push(session);
        }
    });
    address
}

#[test]
fn ctrl_c_ends_a_run_quickly_and_tells_what_was_found() {
    for (signal, expected) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        let uri = format!("nbd://{}/", silent_server());
        let mut child = verify(&[&uri, "--no-certificates", "--format", "json"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        thread::sleep(Duration::from_secs(2));
        assert_eq!(child.try_wait().unwrap(), None, "the server never answers");
        let started = Instant::now();
        kill_process(Pid::from_child(&child), signal).unwrap();
        let mut stdout = String::new();
        child
            .stdout
            .take()
            .unwrap()
            .read_to_string(&mut stdout)
            .unwrap();
        let status = child.wait().unwrap();
        assert!(started.elapsed() < Duration::from_secs(5));
        assert_eq!(status.code(), Some(expected));
        assert_eq!(json(&stdout)["verdict"], "interrupted");
    }
}

#[test]
fn a_hostile_server_s_words_do_not_reach_the_terminal() {
    // An error to every option, with a message that would clear the screen and forge a line.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for session in listener.incoming().flatten() {
            thread::spawn(move || refuse_everything(session));
        }
    });
    let uri = format!("nbd://{address}/");
    for format in ["text", "json", "junit"] {
        let words = [
            &uri,
            "--no-certificates",
            "--timeout",
            "2",
            "--verbose",
            "--format",
            format,
        ];
        let (_, stdout, stderr) = output(&words);
        for text in [&stdout, &stderr] {
            assert!(
                !text.contains(|c: char| c != '\n' && c.is_control()),
                "{format}: {text:?}"
            );
        }
        assert!(!stdout.contains('\u{202e}'), "{format}: {stdout:?}");
    }
}

fn refuse_everything(mut session: TcpStream) -> Option<()> {
    session.write_all(b"NBDMAGICIHAVEOPT\0\x03").ok()?;
    session.read_exact(&mut [0; 4]).ok()?;
    let message = "\u{1b}[2J\u{9b}31m\r\nNo findings\u{202e}\0]]>";
    loop {
        let mut header = [0; 16];
        session.read_exact(&mut header).ok()?;
        let length = u32::from_be_bytes(header[12..].try_into().ok()?);
        session.read_exact(&mut vec![0; length as usize]).ok()?;
        let mut reply = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
        reply.extend(&header[8..12]);
        reply.extend(0x8000_0002_u32.to_be_bytes());
        reply.extend(u32::try_from(message.len()).ok()?.to_be_bytes());
        reply.extend(message.as_bytes());
        session.write_all(&reply).ok()?;
    }
}
