//! Peers that are silent, slow, greedy or mad: C8, C64, and that nobody else suffers from them.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use hawser::nbd::option::OptionHeader;
use hawser::nbd::{Command, CommandFlags, Errno, OptionCode, ReplyCode};
use hawser::proto::control::{AllowRequest, StatisticsRequest};
use proptest::test_runner::{Config, TestRunner};

use crate::bench::{Bench, EXPORT, attachment};
use crate::wire::{Plain, Tls, go_payload, request};

const NONE: CommandFlags = CommandFlags(0);
const MIB: u64 = 1 << 20;

/// What a client that behaves must get, whatever the others do.
fn is_served(bench: &Bench, address: SocketAddr, export: &str) {
    let began = Instant::now();
    let mut wire = Tls::simple(address, &bench.client(), export);
    assert_eq!(wire.read(0, 1), Ok(vec![0]));
    assert!(began.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn c8_300_silent_connections_lock_nobody_out() {
    let bench = Bench::new(MIB);
    let server = bench.serve_volume(&[]);
    let mut control = bench.control().await;
    control
        .allow(AllowRequest {
            attachment: attachment(1).to_string(),
            read_only: false,
        })
        .await
        .unwrap();
    let export = bench.export(&attachment(1));
    let mut silent = Vec::new();
    for index in 0..300 {
        let mut wire = Plain::silent(server.address).unwrap();
        // A third says nothing, a third stops half-way, a third stops in the TLS handshake.
        if index % 3 > 0 {
            wire.say(&3_u32.to_be_bytes());
        }
        if index % 3 > 1 {
            wire.ask(OptionCode::STARTTLS, &[]);
        }
        silent.push(wire);
    }
    is_served(&bench, server.address, &export);
    let statistics = control.statistics(StatisticsRequest {}).await.unwrap();
    let statistics = statistics.into_inner();
    assert!(statistics.sessions_in_handshake <= 128);
    assert!(statistics.refused["crowded"] >= 172);
    let (resident, _) = server.memory();
    assert!(resident < 64 << 20, "{resident}");
    is_served(&bench, server.address, &export);
    drop(silent);
}

#[test]
fn c8_who_is_slow_has_a_deadline_however_busy_it_looks() {
    let bench = Bench::new(MIB);
    let server = bench.serve_file(&[]);
    let began = Instant::now();
    let patience = Duration::from_secs(10);
    let until_closed = |mut socket: TcpStream, drip: &[u8]| {
        socket
            .set_read_timeout(Some(Duration::from_millis(200)))
            .unwrap();
        let mut drip = drip.iter();
        loop {
            if let Some(byte) = drip.next() {
                let _ = socket.write_all(&[*byte]);
            }
            match socket.read(&mut [0]) {
                Ok(0) => return began.elapsed(),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return began.elapsed(),
            }
            assert!(began.elapsed() < 3 * patience, "it is never closed");
        }
    };
    std::thread::scope(|scope| {
        let silent = scope.spawn(|| until_closed(TcpStream::connect(server.address).unwrap(), &[]));
        let drip = scope.spawn(|| {
            let mut bytes = 3_u32.to_be_bytes().to_vec();
            bytes.extend(OptionHeader::encode(OptionCode::GO, &[0; 4096]));
            until_closed(TcpStream::connect(server.address).unwrap(), &bytes)
        });
        let in_tls = scope.spawn(|| {
            let mut wire = Plain::connect(server.address);
            wire.ask(OptionCode::STARTTLS, &[]);
            let mut hello = Vec::new();
            let name = "localhost".try_into().unwrap();
            let mut client = rustls::ClientConnection::new(bench.client(), name).unwrap();
            client.write_tls(&mut hello).unwrap();
            until_closed(wire.stream, &hello[..hello.len() - 1])
        });
        for closed in [silent, drip, in_tls] {
            let closed = closed.join().unwrap();
            assert!(closed > patience / 2, "not before its time: {closed:?}");
        }
    });
    is_served(&bench, server.address, EXPORT);
}

#[test]
fn garbage_at_any_stage_ends_only_its_own_connection() {
    let bench = Bench::new(MIB);
    let server = bench.serve_file(&[]);
    let client = bench.client();
    let mut runner = TestRunner::new(Config {
        cases: 60,
        failure_persistence: None,
        ..Config::default()
    });
    let garbage = proptest::collection::vec(proptest::prelude::any::<u8>(), 1..3000);
    runner
        .run(&(0..4, garbage), |(stage, garbage)| {
            let mut plain = Plain::silent(server.address).unwrap();
            if stage > 0 {
                plain.say(&3_u32.to_be_bytes());
            }
            if stage < 2 {
                let _ = plain.try_say(&garbage);
                let _ = plain.stream.shutdown(Shutdown::Write);
                let _ = plain.stream.read_to_end(&mut Vec::new());
                return Ok(());
            }
            if stage == 2 {
                plain.ask(OptionCode::STARTTLS, &[]);
                let _ = plain.try_say(&garbage);
                let _ = plain.stream.shutdown(Shutdown::Write);
                let _ = plain.stream.read_to_end(&mut Vec::new());
                return Ok(());
            }
            let mut wire = Tls::simple(server.address, &client, EXPORT);
            let _ = wire.try_say(&garbage);
            wire.cut();
            Ok(())
        })
        .unwrap();
    is_served(&bench, server.address, EXPORT);
    let log = server.log();
    assert!(!log.iter().any(|line| line.contains("bug")), "{log:#?}");
}

#[test]
fn bytes_behind_the_end_of_tls_keep_nobody_busy() {
    let bench = Bench::new(MIB);
    let server = bench.serve_file(&[]);
    let cases = [false, true].map(|in_transmission| {
        let mut wire = Tls::connect(server.address, &bench.client());
        if in_transmission {
            wire.go(EXPORT).unwrap();
        }
        wire.stream.conn.send_close_notify();
        let mut bytes = Vec::new();
        wire.stream.conn.write_tls(&mut bytes).unwrap();
        bytes.extend([0x17; 1000]);
        wire.stream.sock.write_all(&bytes).unwrap();
        wire
    });
    for mut wire in cases {
        wire.hears_the_end();
    }
    is_served(&bench, server.address, EXPORT);
}

#[test]
fn c64_every_request_cut_anywhere_changes_nothing() {
    let bench = Bench::new(MIB);
    let server = bench.serve_file(&[]);
    let client = bench.client();
    let mut write = request(Command::WRITE, NONE, 1, 0, 20).to_vec();
    write.extend([0xff; 20]);
    for end in 0..write.len() {
        let mut wire = Tls::simple(server.address, &client, EXPORT);
        wire.say(&write[..end]);
        wire.stream.conn.send_close_notify();
        let _ = wire.stream.flush();
        wire.hears_the_end();
    }
    let mut wire = Tls::simple(server.address, &client, EXPORT);
    assert_eq!(wire.read(0, 20), Ok(vec![0; 20]));
    for length in [0, 1, 1 << 31, u32::MAX] {
        for command in 0..10 {
            for offset in [0, 1, 1 << 63, u64::MAX] {
                if command == Command::DISC.0 || command == Command::WRITE.0 {
                    continue;
                }
                let mut wire = Tls::simple(server.address, &client, EXPORT);
                let heard = wire.carry_out(Command(command), NONE, offset, length);
                let fits = offset < MIB && length <= 1;
                assert!(fits || heard != Errno::OK, "{command} {offset} {length}");
            }
        }
    }
}

#[test]
fn memory_is_bounded_whatever_clients_ask_for() {
    let bench = Bench::new(64 * MIB);
    let server = bench.serve_file(&["--request-memory", "64"]);
    let client = bench.client();
    let mut greedy: Vec<_> = (0..30)
        .map(|_| Tls::simple(server.address, &client, EXPORT))
        .collect();
    for (index, wire) in greedy.iter_mut().enumerate() {
        let mut bytes = Vec::new();
        if index % 2 == 0 {
            for cookie in 0..100 {
                bytes.extend(request(Command::READ, NONE, cookie, 0, 32 << 20));
            }
        } else {
            bytes.extend(request(Command::WRITE, NONE, 1, 0, 32 << 20));
            bytes.extend(vec![1; 1 << 20]);
        }
        wire.stream.sock.set_nonblocking(true).unwrap();
        let _ = wire.try_say(&bytes);
    }
    std::thread::sleep(Duration::from_secs(1));
    let (_, most) = server.memory();
    // The pool, and for each session its floor and its buffers.
    assert!(most < (64 + 30 * 2 + 32) << 20, "{} MiB", most >> 20);
    is_served(&bench, server.address, EXPORT);
}

#[test]
fn who_keeps_memory_from_others_and_does_nothing_is_cut_off() {
    let bench = Bench::new(64 * MIB);
    let server = bench.serve_file(&["--request-memory", "64"]);
    let client = bench.client();
    // The pool has room for two of these, less what each session has for itself.
    let _stalled: Vec<_> = (0..2)
        .map(|_| {
            let mut wire = Tls::simple(server.address, &client, EXPORT);
            wire.request(Command::WRITE, NONE, 1, 0, 32 << 20);
            wire.say(&[1; 1000]);
            wire
        })
        .collect();
    std::thread::sleep(Duration::from_millis(200));
    let mut wire = Tls::simple(server.address, &client, EXPORT);
    wire.stream
        .sock
        .set_read_timeout(Some(Duration::from_secs(25)))
        .unwrap();
    assert_eq!(wire.read(0, 32 << 20).map(|data| data.len()), Ok(32 << 20));
    server.logged("did nothing for 10 s");
}

#[test]
fn an_export_has_a_limited_number_of_sessions() {
    let bench = Bench::new(MIB);
    let server = bench.serve_file(&[]);
    let client = bench.client();
    let sessions: Vec<_> = (0..32)
        .map(|_| Tls::simple(server.address, &client, EXPORT))
        .collect();
    let mut wire = Tls::connect(server.address, &client);
    wire.option(OptionCode::GO, &go_payload(EXPORT, &[]));
    wire.hears_the_end();
    server.logged("32 sessions");
    for wire in sessions {
        wire.cut();
    }
    server.logged("session ends");
    is_served(&bench, server.address, EXPORT);
    // Nothing is unfair to who only asks.
    let mut wire = Tls::connect(server.address, &client);
    assert_eq!(wire.ask(OptionCode::LIST, &[]).0, ReplyCode::SERVER);
}
