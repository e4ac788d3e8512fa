//! The process: how it starts and refuses to, control, growth, certificates, faults of the disk, and its end.

use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command as Process, Output};
use std::time::{Duration, Instant};

use hawser::nbd::option_reply::Information;
use hawser::nbd::{Command, CommandFlags, Errno, OptionCode, ReplyCode, TransmissionFlags};
use hawser::proto::control::control_client::ControlClient;
use hawser::proto::control::{
    AllowRequest, DrainRequest, GrowRequest, RevokeRequest, StatisticsRequest, StatisticsResponse,
};
use hawser::tls::{self, Authority};
use tonic::Code;
use tonic::transport::Channel;

use crate::bench::{Bench, EXPORT, PATIENCE, attachment};
use crate::wire::{Plain, Tls, is_end};

const NONE: CommandFlags = CommandFlags(0);
const MIB: u64 = 1 << 20;

async fn allow(control: &mut ControlClient<Channel>, byte: u8, read_only: bool) -> Code {
    let request = AllowRequest {
        attachment: attachment(byte).to_string(),
        read_only,
    };
    match control.allow(request).await {
        Ok(_) => Code::Ok,
        Err(status) => status.code(),
    }
}

async fn revoke(control: &mut ControlClient<Channel>, byte: u8) -> u32 {
    let request = RevokeRequest {
        attachment: attachment(byte).to_string(),
    };
    let response = control.revoke(request).await.unwrap();
    response.into_inner().closed_sessions
}

async fn statistics(control: &mut ControlClient<Channel>) -> StatisticsResponse {
    let response = control.statistics(StatisticsRequest {}).await.unwrap();
    response.into_inner()
}

fn resize(bench: &Bench, size: u64) {
    let file = File::options().write(true).open(bench.data()).unwrap();
    file.set_len(size).unwrap();
}

#[test]
fn a_file_is_served_by_hand() {
    let bench = Bench::new(MIB);
    let mut server = bench.serve_file(&[]);
    let mut wire = Tls::connect(server.address, &bench.client());
    let said = wire.go(EXPORT).unwrap();
    assert_eq!(said.export().0, MIB);
    assert_eq!(wire.write(NONE, 4096, b"over the wire"), Errno::OK);
    assert_eq!(wire.read(4096, 13).unwrap(), b"over the wire");
    assert_eq!(wire.flush(), Errno::OK);
    wire.request(Command::DISC, NONE, 0, 0, 0);
    wire.hears_the_end();
    server.signal("-TERM");
    assert!(server.wait().success());
    let file = std::fs::read(bench.data()).unwrap();
    assert_eq!(&file[4096..4109], b"over the wire");
}

#[tokio::test]
async fn a_volume_is_served_to_whom_the_control_socket_says_and_as_long() {
    let bench = Bench::new(MIB);
    let server = bench.serve_volume(&[]);
    let mut control = bench.control().await;
    let [first, second] = [1, 2].map(|byte| bench.export(&attachment(byte)));
    let mut wire = Tls::connect(server.address, &bench.client());
    assert_eq!(wire.go(&first), Err(ReplyCode::ERR_UNKNOWN));
    assert_eq!(allow(&mut control, 1, false).await, Code::Ok);
    assert_eq!(allow(&mut control, 1, false).await, Code::Ok, "repeated");
    assert_eq!(allow(&mut control, 1, true).await, Code::FailedPrecondition);
    assert_eq!(allow(&mut control, 2, true).await, Code::Ok);
    wire.option(OptionCode::LIST, &[]);
    let listed = wire.replies(OptionCode::LIST).unwrap();
    assert!(listed.is_empty(), "attachments are not told to one another");
    let said = wire.go(&first).unwrap();
    let epoch = statistics(&mut control).await.epoch;
    let described = format!("hawser volume={} epoch={epoch}", bench.volume);
    let description = Information::Description(described);
    assert!(said.information.contains(&description));
    assert_eq!(wire.write(NONE, 0, b"xyz"), Errno::OK);
    let mut reader = Tls::connect(server.address, &bench.client());
    let flags = reader.go(&second).unwrap().export().1;
    assert!(flags.contains(TransmissionFlags::READ_ONLY));
    assert_eq!(reader.write(NONE, 0, b"x"), Errno::EPERM);
    assert_eq!(reader.read(0, 3).unwrap(), b"xyz");

    let said = statistics(&mut control).await;
    assert_eq!(said.volume, bench.volume.to_string());
    assert_eq!(said.address, server.address.to_string());
    assert_eq!(said.process_id, server.process());
    assert_eq!((said.size_bytes, said.epoch), (MIB, epoch));
    assert_eq!(said.certificate_problem, "");
    let [writer, other] = &said.attachments[..] else {
        panic!("{said:?}")
    };
    assert_eq!(writer.id, attachment(1).to_string());
    assert_eq!((writer.sessions, writer.writes), (1, 1));
    assert_eq!((writer.written_bytes, writer.read_bytes), (3, 0));
    assert_eq!((other.reads, other.read_bytes), (1, 3));
    assert_eq!((other.read_only, other.failed_requests), (true, 1));

    // A client that has come as far as it can without entering, when its attachment goes.
    let mut waiting = Tls::connect(server.address, &bench.client());
    waiting.go_or_info(OptionCode::INFO, &first, &[]).unwrap();
    assert_eq!(revoke(&mut control, 1).await, 1);
    assert_eq!(waiting.go(&first), Err(ReplyCode::ERR_UNKNOWN));
    wire.hears_the_end();
    assert_eq!(revoke(&mut control, 1).await, 0, "repeated");
    assert_eq!(revoke(&mut control, 9).await, 0, "never allowed");
    assert_eq!(reader.read(0, 3).unwrap(), b"xyz", "nobody else notices");
}

#[tokio::test]
async fn control_refuses_what_makes_no_sense() {
    let bench = Bench::new(MIB);
    let _server = bench.serve_volume(&[]);
    let mode = std::fs::metadata(bench.control_socket()).unwrap();
    assert_eq!(mode.permissions().mode() & 0o777, 0o600);
    let mut control = bench.control().await;
    for bad in ["", "att-", "../../etc/passwd", bench.volume.as_str()] {
        let request = AllowRequest {
            attachment: bad.to_owned(),
            read_only: false,
        };
        let status = control.allow(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{bad}");
        let request = RevokeRequest {
            attachment: bad.to_owned(),
        };
        let status = control.revoke(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{bad}");
    }
    assert!(statistics(&mut control).await.attachments.is_empty());
}

#[tokio::test]
async fn a_volume_grows_under_its_sessions() {
    let bench = Bench::new(MIB);
    let server = bench.serve_volume(&[]);
    let mut control = bench.control().await;
    allow(&mut control, 1, false).await;
    let export = bench.export(&attachment(1));
    let mut wire = Tls::simple(server.address, &bench.client(), &export);
    let grow = |size_bytes| GrowRequest { size_bytes };
    let status = control.grow(grow(2 * MIB)).await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange);
    resize(&bench, 2 * MIB);
    assert_eq!(wire.write(NONE, MIB, b"x"), Errno::ENOSPC, "not yet");
    for wanted in [2 * MIB, 2 * MIB, MIB] {
        let grown = control.grow(grow(wanted)).await.unwrap().into_inner();
        assert_eq!(grown.size_bytes, 2 * MIB);
    }
    assert_eq!(wire.write(NONE, 2 * MIB - 1, b"x"), Errno::OK);
    let mut other = Tls::connect(server.address, &bench.client());
    assert_eq!(other.go(&export).unwrap().export().0, 2 * MIB);
}

#[tokio::test]
async fn a_full_pool_stops_no_revocation() {
    let bench = Bench::new(MIB);
    let mut server = bench.serve_volume_on("tmpfs", "size=2m", 64 * MIB);
    let mut control = bench.control().await;
    allow(&mut control, 1, false).await;
    let export = bench.export(&attachment(1));
    let mut wire = Tls::simple(server.address, &bench.client(), &export);
    let mut at = 0;
    while wire.write(NONE, at, &[1; 4096]) == Errno::OK {
        at += 4096;
    }
    assert_eq!(wire.write(NONE, at, &[1; 1]), Errno::ENOSPC);
    assert_eq!(revoke(&mut control, 1).await, 1);
    assert_eq!(allow(&mut control, 2, false).await, Code::Ok);
    assert_eq!(revoke(&mut control, 2).await, 0);
    control.drain(DrainRequest {}).await.unwrap();
    assert!(server.wait().success(), "the epoch was closed, too");
}

#[tokio::test]
async fn c60_draining_finishes_what_was_begun_and_ends_the_process() {
    let bench = Bench::new(MIB);
    let mut server = bench.serve_volume(&[]);
    let mut control = bench.control().await;
    allow(&mut control, 1, false).await;
    let export = bench.export(&attachment(1));
    let mut wire = Tls::simple(server.address, &bench.client(), &export);
    let mut asking = Tls::connect(server.address, &bench.client());
    let mut plain = Plain::connect(server.address);
    assert_eq!(wire.write(NONE, 0, b"x"), Errno::OK);
    control.drain(DrainRequest {}).await.unwrap();
    // Who negotiates is told as long as the process is there.
    for code in [OptionCode::LIST, OptionCode::STARTTLS] {
        if plain
            .try_say(&hawser::nbd::option::OptionHeader::encode(code, &[]))
            .is_ok()
            && let Ok((answer, _)) = plain.answer(code)
        {
            assert_eq!(answer, ReplyCode::ERR_SHUTDOWN);
        }
    }
    wire.hears_the_end();
    assert!(server.wait().success());
    assert!(asking.hear(1).is_err());
    assert!(std::net::TcpStream::connect(server.address).is_err());
    assert!(!bench.control_socket().exists());
    let epoch = std::fs::read_to_string(bench.volume_directory().join("epoch.json")).unwrap();
    assert!(epoch.contains("\"clean\":true"), "{epoch}");
}

#[test]
fn sigterm_under_load_loses_nothing_that_was_acknowledged() {
    for signal in ["-TERM", "-INT", "-HUP"] {
        let bench = Bench::new(64 * MIB);
        let mut server = bench.serve_file(&[]);
        let mut wire = Tls::simple(server.address, &bench.client(), EXPORT);
        let mut acknowledged = Vec::new();
        let mut next = 0;
        let (mut sent, mut told) = (0, false);
        let ended = loop {
            while sent - acknowledged.len() < 16 {
                let byte = u8::try_from(next % 251 + 1).unwrap();
                let data = vec![byte; 100_000];
                let offset = (next % 600) * 100_000;
                let mut bytes =
                    crate::wire::request(Command::WRITE, NONE, next, offset, 100_000).to_vec();
                bytes.extend(&data);
                if wire.try_say(&bytes).is_err() {
                    break;
                }
                next += 1;
                sent += 1;
                if next == 600 {
                    break;
                }
            }
            if acknowledged.len() >= 100 && !told {
                server.signal(signal);
                told = true;
            }
            match wire.status() {
                Ok((cookie, errno)) => {
                    assert_eq!(errno, Errno::OK);
                    acknowledged.push(cookie);
                }
                Err(error) => break error,
            }
            assert!(acknowledged.len() < 600, "it goes on for ever");
        };
        assert!(is_end(&ended), "{ended}");
        assert!(server.wait().success());
        let file = std::fs::read(bench.data()).unwrap();
        for cookie in acknowledged {
            let at = usize::try_from(cookie).unwrap() * 100_000;
            let byte = u8::try_from(cookie % 251 + 1).unwrap();
            let written = &file[at..at + 100_000];
            assert!(written.iter().all(|found| *found == byte), "{cookie}");
        }
    }
}

#[tokio::test]
async fn attachments_and_epoch_survive_kill_9() {
    let bench = Bench::new(MIB);
    let export = bench.export(&attachment(1));
    let mut first = None;
    for round in 0..3 {
        let mut server = bench.serve_volume(&[]);
        let mut control = bench.control().await;
        if round == 0 {
            allow(&mut control, 1, false).await;
            allow(&mut control, 2, false).await;
            revoke(&mut control, 2).await;
        }
        let mut wire = Tls::connect(server.address, &bench.client());
        let revoked = bench.export(&attachment(2));
        assert_eq!(wire.go(&revoked), Err(ReplyCode::ERR_UNKNOWN));
        wire.go(&export).unwrap();
        if round > 0 {
            assert_eq!(wire.read(0, 1).unwrap(), [b'0' + round - 1]);
        }
        assert_eq!(wire.write(NONE, 0, &[b'0' + round]), Errno::OK);
        let epoch = statistics(&mut control).await.epoch;
        assert_eq!(*first.get_or_insert(epoch), epoch, "the same boot");
        server.signal("-KILL");
        server.wait();
    }
    // The machine went down with the volume open.
    let path = bench.volume_directory().join("epoch.json");
    let open = r#"{"epoch":1,"boot_id":"another","clean":false}"#;
    std::fs::write(&path, open).unwrap();
    let mut server = bench.serve_volume(&[]);
    let mut control = bench.control().await;
    assert_eq!(statistics(&mut control).await.epoch, 2);
    let mut wire = Tls::connect(server.address, &bench.client());
    let described = format!("hawser volume={} epoch=2", bench.volume);
    let said = wire.go(&export).unwrap();
    assert!(
        said.information
            .contains(&Information::Description(described))
    );
    control.drain(DrainRequest {}).await.unwrap();
    server.wait();
    // It went down after that, and nothing was lost.
    let closed = std::fs::read_to_string(&path).unwrap();
    let open = closed.split('"').nth(5).unwrap().to_owned();
    std::fs::write(&path, closed.replace(&open, "another")).unwrap();
    let _server = bench.serve_volume(&[]);
    let mut control = bench.control().await;
    assert_eq!(statistics(&mut control).await.epoch, 2);
}

#[test]
fn a_volume_has_one_server() {
    let bench = Bench::new(MIB);
    let first = bench.serve_volume(&[]);
    let output = refused(bench.command().args(volume_arguments(&bench)));
    assert!(
        output.contains("another server serves this volume"),
        "{output}"
    );
    drop(first);
    assert!(
        bench.control_socket().exists(),
        "left behind by the killed one"
    );
    let _second = bench.serve_volume(&[]);
}

fn volume_arguments(bench: &Bench) -> Vec<String> {
    let path = |path: std::path::PathBuf| path.display().to_string();
    vec![
        "--volume".into(),
        bench.volume.to_string(),
        "--directory".into(),
        path(bench.volume_directory()),
        "--control".into(),
        path(bench.control_socket()),
    ]
}

/// What a server that does not start says.
fn refused(command: &mut Process) -> String {
    let Output { status, stderr, .. } = command.output().unwrap();
    assert!(!status.success());
    String::from_utf8(stderr).unwrap()
}

#[test]
fn a_server_that_cannot_serve_says_why() {
    let bench = Bench::new(MIB);
    let missing = bench.path("missing");
    let output = refused(
        bench
            .command()
            .arg("--file")
            .arg(&missing)
            .args(["--export", "x", "--client", "y"]),
    );
    assert!(
        output.contains("missing: open the backing file"),
        "{output}"
    );
    let output = refused(
        bench
            .command()
            .arg("--file")
            .arg(bench.directory.path())
            .args(["--read-only", "--export", "x", "--client", "y"]),
    );
    assert!(
        output.contains("neither a file nor a block device"),
        "{output}"
    );
    // Command lines that mean two things, or half of one, are wrong before anything is touched.
    for arguments in [
        &[][..],
        &["--file", "x"],
        &["--file", "x", "--export", "y"],
        &["--file", "x", "--client", "y"],
        &["--volume", bench.volume.as_str()],
        &["--volume", "vol-1", "--directory", "d", "--control", "c"],
    ] {
        let status = bench.command().args(arguments).output().unwrap().status;
        assert_eq!(status.code(), Some(64), "{arguments:?}");
    }
    let mut both = volume_arguments(&bench);
    both.extend(["--file", "x", "--export", "y", "--client", "z"].map(String::from));
    let status = bench.command().args(both).output().unwrap().status;
    assert_eq!(status.code(), Some(64));
    // Something that is not a socket is in the place of the control socket.
    std::fs::write(bench.control_socket(), "precious").unwrap();
    let output = refused(bench.command().args(volume_arguments(&bench)));
    assert!(output.contains("something else than a socket"), "{output}");
    assert_eq!(std::fs::read(bench.control_socket()).unwrap(), b"precious");
    std::fs::remove_file(bench.control_socket()).unwrap();
    for (name, contents) in [("epoch.json", "epoch"), ("attachments.json", "{}")] {
        let path = bench.volume_directory().join(name);
        std::fs::write(&path, contents).unwrap();
        let output = refused(bench.command().args(volume_arguments(&bench)));
        assert!(output.contains(name), "{output}");
        std::fs::remove_file(path).unwrap();
    }
    std::fs::remove_dir_all(bench.certificates()).unwrap();
    let output = refused(bench.command().args(volume_arguments(&bench)));
    assert!(output.contains("certificates"), "{output}");
    let epoch = bench.volume_directory().join("epoch.json");
    assert!(!epoch.exists(), "a server that did not serve opened none");
}

#[tokio::test]
async fn certificates_are_reloaded_and_no_session_notices() {
    let bench = Bench::new(MIB);
    let server = bench.serve_volume(&[]);
    let mut control = bench.control().await;
    allow(&mut control, 1, false).await;
    let export = bench.export(&attachment(1));
    let mut live = Tls::simple(server.address, &bench.client(), &export);
    let first = live.stream.conn.peer_certificates().unwrap()[0].clone();

    let names = ["localhost".to_owned()];
    let renewed = bench.authority.issue_server(&bench.volume, &names).unwrap();
    tls::write_secret(&bench.certificates(), &renewed).unwrap();
    server.logged("certificates reloaded");
    let other = Tls::simple(server.address, &bench.client(), &export);
    let second = &other.stream.conn.peer_certificates().unwrap()[0];
    assert_ne!(first, *second);
    assert_eq!(live.write(NONE, 0, b"still here"), Errno::OK);

    // Files that cannot be used: the old ones stay in use, and everybody can see why.
    let foreign = Authority::temporary().unwrap();
    let mut mixed = renewed.clone();
    let foreign = foreign.issue_server(&bench.volume, &names).unwrap();
    mixed.insert(tls::KEY.to_owned(), foreign[tls::KEY].clone());
    tls::write_secret(&bench.certificates(), &mixed).unwrap();
    server.logged("new certificate files are not used");
    let problem = statistics(&mut control).await.certificate_problem;
    assert!(problem.contains("key"), "{problem}");
    Tls::simple(server.address, &bench.client(), &export);
    tls::write_secret(&bench.certificates(), &renewed).unwrap();
    server.logged("certificates reloaded");
    assert_eq!(statistics(&mut control).await.certificate_problem, "");
    assert_eq!(live.read(0, 10).unwrap(), b"still here");
}

#[test]
fn a_backing_file_that_others_damage_fails_requests_and_nothing_else() {
    let bench = Bench::new(MIB);
    let server = bench.serve_file(&[]);
    let (mut wire, _) = Tls::structured(server.address, &bench.client(), EXPORT);
    let data = bench.data();
    let write = |wire: &mut Tls| {
        wire.send_write(NONE, 1, 0, b"data");
        wire.structured_status().1
    };
    let flush = |wire: &mut Tls| {
        wire.request(Command::FLUSH, NONE, 2, 0, 0);
        wire.structured_status().1
    };
    let read = |wire: &mut Tls| wire.read_chunks(NONE, MIB - 4096, 4096).map(|_| ());
    assert_eq!(write(&mut wire), Errno::OK);

    // Truncated: what is not there cannot be read, and nothing is written behind the end.
    resize(&bench, 4096);
    for _ in 0..3 {
        assert_eq!(write(&mut wire), Errno::EIO);
        assert_eq!(read(&mut wire), Err(Errno::EIO));
        assert_eq!(flush(&mut wire), Errno::EIO);
        assert_eq!(wire.block_status(NONE, 0, 1 << 20), Err(Errno::EIO));
    }
    server.logged("has 4096 bytes, fewer than the 1048576 that are served");
    resize(&bench, MIB);
    assert_eq!(write(&mut wire), Errno::OK, "and back");
    assert_eq!(read(&mut wire), Ok(()));

    // Nobody may write it any more.
    let mode = |mode| {
        let permissions = std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(&data, permissions).unwrap();
    };
    mode(0o400);
    assert_eq!(write(&mut wire), Errno::EPERM);
    assert_eq!(read(&mut wire), Ok(()));
    mode(0o600);
    assert_eq!(write(&mut wire), Errno::OK);

    // Deleted, and another file in its place.
    std::fs::remove_file(&data).unwrap();
    File::create(&data).unwrap().set_len(MIB).unwrap();
    assert_eq!(write(&mut wire), Errno::EIO);
    assert_eq!(flush(&mut wire), Errno::EIO);
    assert_eq!(read(&mut wire), Ok(()));
    server.logged("was deleted");
    let log = server.log();
    let repeated = log.iter().filter(|line| line.contains("requests fail"));
    assert!(repeated.count() <= 1, "{log:#?}");
    // Not everything it acknowledged can be durable, and its end says so.
    let mut server = server;
    server.signal("-TERM");
    assert!(!server.wait().success());
}

#[test]
fn a_server_starts_within_moments_and_is_small() {
    let bench = Bench::new(MIB);
    let began = Instant::now();
    let server = bench.serve_file(&[]);
    Tls::simple(server.address, &bench.client(), EXPORT);
    // The figures are the benchmark's; this is only against an accident.
    assert!(began.elapsed() < PATIENCE / 10, "{:?}", began.elapsed());
    std::thread::sleep(Duration::from_millis(100));
    let (resident, _) = server.memory();
    assert!(resident < 48 << 20, "{resident}");
}
