//! In transmission: C45 to C59, and C63.

use std::fs::File;
use std::io::{IoSliceMut, Write};
use std::os::unix::fs::MetadataExt;
use std::thread;
use std::time::{Duration, Instant};

use hawser::nbd::reply::Extent;
use hawser::nbd::{ChunkType, Command, CommandFlags, Errno, TransmissionFlags};

use crate::bench::{Bench, EXPORT};
use crate::wire::{Tls, request};

const NONE: CommandFlags = CommandFlags(0);
const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const HOLE: u32 = Extent::HOLE | Extent::ZERO;

#[test]
fn c45_a_request_without_its_magic_ends_the_session() {
    let bench = Bench::new(MIB);
    let server = bench.serve_file(&[]);
    let mut wire = Tls::simple(server.address, &bench.client(), EXPORT);
    let mut bad = request(Command::READ, NONE, 1, 0, 1);
    bad[0] ^= 1;
    wire.say(&bad);
    wire.hears_the_end();
    server.logged("broke the protocol");
}

#[test]
fn c46_cookies_come_back_as_they_were_also_twice() {
    let bench = Bench::new(MIB);
    let server = bench.serve_file(&[]);
    let mut wire = Tls::simple(server.address, &bench.client(), EXPORT);
    let cookies = [0, u64::MAX, 0x0102_0304_0506_0708, 5, 5, 5];
    let mut bytes = Vec::new();
    for cookie in cookies {
        bytes.extend(request(Command::FLUSH, NONE, cookie, 0, 0));
    }
    wire.say(&bytes);
    let mut heard: Vec<_> = cookies.iter().map(|_| wire.status().unwrap()).collect();
    let mut expected = cookies.map(|cookie| (cookie, Errno::OK));
    heard.sort_unstable();
    expected.sort_unstable();
    assert_eq!(heard, expected);
}

#[test]
fn c47_replies_have_the_form_that_was_negotiated_errors_included() {
    let bench = Bench::new(MIB);
    let server = bench.serve_file(&[]);
    let requests = [
        (Command::READ, 0, 16, Errno::OK),
        (Command::READ, MIB, 1, Errno::EINVAL),
        (Command::READ, 0, 0, Errno::OK),
        (Command::FLUSH, 0, 0, Errno::OK),
        (Command::TRIM, 0, 4096, Errno::OK),
        (Command(99), 0, 0, Errno::EINVAL),
    ];
    let mut simple = Tls::simple(server.address, &bench.client(), EXPORT);
    let (mut structured, _) = Tls::structured(server.address, &bench.client(), EXPORT);
    for (command, offset, length, errno) in requests {
        assert_eq!(simple.carry_out(command, NONE, offset, length), errno);
        if command == Command::READ && errno == Errno::OK {
            simple.hear(length as usize).unwrap();
            let content = structured.read_chunks(NONE, offset, length).unwrap();
            assert_eq!(content.data, vec![0; length as usize]);
        } else {
            structured.request(command, NONE, 3, offset, length);
            assert_eq!(structured.structured_status(), (3, errno), "{command}");
        }
    }
}

#[test]
fn c48_beyond_the_end_each_command_has_its_own_error() {
    let bench = Bench::new(MIB);
    let server = bench.serve_file(&[]);
    let mut wire = Tls::simple(server.address, &bench.client(), EXPORT);
    for (offset, length) in [(MIB, 1), (MIB - 1, 2), (u64::MAX, 1), (u64::MAX - 1, 512)] {
        for (command, errno) in [
            (Command::READ, Errno::EINVAL),
            (Command::TRIM, Errno::EINVAL),
            (Command::CACHE, Errno::EINVAL),
            (Command::WRITE_ZEROES, Errno::ENOSPC),
        ] {
            let heard = wire.carry_out(command, NONE, offset, length);
            assert_eq!(heard, errno, "{command} {offset}");
        }
        let data = vec![1; length as usize];
        assert_eq!(wire.write(NONE, offset, &data), Errno::ENOSPC);
    }
    assert_eq!(std::fs::metadata(bench.data()).unwrap().len(), MIB);
    let (mut wire, _) = Tls::structured(server.address, &bench.client(), EXPORT);
    assert_eq!(wire.block_status(NONE, MIB, 1), Err(Errno::EINVAL));
}

#[test]
fn c49_every_byte_can_be_addressed_alone() {
    let bench = Bench::new(MIB);
    let server = bench.serve_file(&[]);
    let mut wire = Tls::simple(server.address, &bench.client(), EXPORT);
    assert_eq!(wire.write(NONE, 0, &[0xff; 64]), Errno::OK);
    assert_eq!(wire.write(NONE, 7, b"x"), Errno::OK);
    let zeroes = wire.carry_out(Command::WRITE_ZEROES, NONE, 9, 3);
    assert_eq!(zeroes, Errno::OK);
    let mut expected = [0xff; 64];
    expected[7] = b'x';
    expected[9..12].fill(0);
    assert_eq!(wire.read(0, 64).unwrap(), expected);
}

#[test]
fn c50_payloads_of_32_mib_are_carried_and_larger_ones_are_not() {
    let bench = Bench::new(80 * MIB);
    let server = bench.serve_file(&[]);
    let mut wire = Tls::simple(server.address, &bench.client(), EXPORT);
    let data: Vec<u8> = (0..=255).cycle().step_by(7).take(32 << 20).collect();
    assert_eq!(wire.write(NONE, 3, &data), Errno::OK);
    assert!(wire.read(3, 32 << 20).unwrap() == data);
    let (mut structured, _) = Tls::structured(server.address, &bench.client(), EXPORT);
    let content = structured.read_chunks(CommandFlags::DF, 3, 32 << 20);
    assert!(content.unwrap().data == data);
    let refused = wire.carry_out(Command::READ, NONE, 0, (32 << 20) + 1);
    assert_eq!(refused, Errno::EINVAL);
    // K25: these carry no payload.
    for command in [Command::TRIM, Command::WRITE_ZEROES] {
        assert_eq!(wire.carry_out(command, NONE, 0, 80 << 20), Errno::OK);
    }
    for length in [(32 << 20) + 1, 1 << 31, u32::MAX] {
        let mut wire = Tls::simple(server.address, &bench.client(), EXPORT);
        wire.request(Command::WRITE, NONE, 1, 0, length);
        wire.hears_the_end();
    }
}

#[test]
fn c51_requests_for_nothing_succeed() {
    let bench = Bench::new(MIB);
    let server = bench.serve_file(&[]);
    let mut simple = Tls::simple(server.address, &bench.client(), EXPORT);
    let (mut structured, _) = Tls::structured(server.address, &bench.client(), EXPORT);
    for offset in [0, MIB / 2, MIB] {
        for command in [
            Command::READ,
            Command::WRITE,
            Command::TRIM,
            Command::WRITE_ZEROES,
            Command::CACHE,
        ] {
            assert_eq!(simple.carry_out(command, NONE, offset, 0), Errno::OK);
            structured.request(command, NONE, 1, offset, 0);
            assert_eq!(structured.structured_status(), (1, Errno::OK));
        }
        let status = structured.block_status(NONE, offset, 0);
        assert_eq!(status, Err(Errno::EINVAL));
    }
}

#[test]
fn c52_what_is_not_known_is_invalid_and_its_payload_is_read() {
    let bench = Bench::new(MIB);
    let server = bench.serve_file(&[]);
    let mut wire = Tls::simple(server.address, &bench.client(), EXPORT);
    for command in [8, 9, 0xffff] {
        let heard = wire.carry_out(Command(command), NONE, 0, 0);
        assert_eq!(heard, Errno::EINVAL);
    }
    for (command, flags) in [
        (Command::READ, CommandFlags::DF),
        (Command::READ, CommandFlags::NO_HOLE),
        (Command::FLUSH, CommandFlags(1 << 15)),
        (Command::TRIM, CommandFlags::FAST_ZERO),
        (Command::CACHE, CommandFlags::REQ_ONE),
        (Command::WRITE_ZEROES, CommandFlags::PAYLOAD_LEN),
        (Command::BLOCK_STATUS, NONE),
    ] {
        let heard = wire.carry_out(command, flags, 0, 512);
        assert_eq!(heard, Errno::EINVAL, "{command} {flags:?}");
    }
    let heard = wire.write(CommandFlags::PAYLOAD_LEN, 0, &[1; 5000]);
    assert_eq!(heard, Errno::EINVAL);
    assert_eq!(wire.read(0, 1).unwrap(), [0], "and the stream is in step");
}

#[test]
fn c53_fua_and_flush_cover_what_every_connection_wrote() {
    let bench = Bench::new(MIB);
    let server = bench.serve_file(&[]);
    let mut first = Tls::simple(server.address, &bench.client(), EXPORT);
    let mut second = Tls::simple(server.address, &bench.client(), EXPORT);
    let is_dirty = |page| is_dirty(&bench, page);
    assert_eq!(first.write(NONE, 0, &[1; 4096]), Errno::OK);
    assert!(is_dirty(0), "without either, a page waits in memory");
    assert_eq!(second.read(0, 1).unwrap(), [1], "seen through the other");
    assert_eq!(second.flush(), Errno::OK);
    assert!(!is_dirty(0), "FLUSH on the other connection");
    let fua = CommandFlags::FUA;
    assert_eq!(first.write(fua, 4096, &[2; 4096]), Errno::OK);
    assert!(!is_dirty(1), "FUA");
    for command in [
        Command::READ,
        Command::TRIM,
        Command::WRITE_ZEROES,
        Command::CACHE,
    ] {
        let heard = first.carry_out(command, CommandFlags::FUA, 0, 512);
        assert_eq!(heard, Errno::OK, "the bit is accepted everywhere");
        if command == Command::READ {
            first.hear(512).unwrap();
        }
    }
    let heard = first.carry_out(Command::FLUSH, CommandFlags::FUA, 0, 0);
    assert_eq!(heard, Errno::OK);
}

/// Whether a page of the backing file is not on disk, and stays so for a second.
///
/// A direct read that must not wait is refused where a page of its range is dirty or being written, and has
/// no other effect. By itself the system writes a page when it is thirty seconds old (`vm.dirty_expire_centisecs`).
fn is_dirty(bench: &Bench, page: u64) -> bool {
    use rustix::fs::{Mode, OFlags, open};
    use rustix::io::{Errno, ReadWriteFlags, preadv2};
    let flags = OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC;
    let file = open(bench.data(), flags, Mode::empty()).unwrap();
    let mut space = vec![0; 2 * 4096];
    let aligned = space.as_ptr().align_offset(4096);
    let until = Instant::now() + Duration::from_secs(1);
    loop {
        let buffers = &mut [IoSliceMut::new(&mut space[aligned..][..4096])];
        match preadv2(&file, buffers, page * 4096, ReadWriteFlags::NOWAIT) {
            Ok(_) => return false,
            Err(Errno::AGAIN) if Instant::now() > until => return true,
            Err(Errno::AGAIN) => thread::sleep(Duration::from_millis(10)),
            Err(errno) => panic!("{errno}: this file system cannot tell what is dirty"),
        }
    }
}

#[test]
fn c54_a_read_only_export_refuses_every_change() {
    let bench = Bench::new(MIB);
    let server = bench.serve_file(&["--read-only"]);
    let mut wire = Tls::connect(server.address, &bench.client());
    let (_, flags) = wire.go(EXPORT).unwrap().export();
    assert!(flags.contains(TransmissionFlags::READ_ONLY));
    assert!(!flags.contains(TransmissionFlags::SEND_TRIM));
    assert_eq!(wire.write(NONE, 0, &[1; 5000]), Errno::EPERM);
    for command in [Command::TRIM, Command::WRITE_ZEROES] {
        assert_eq!(wire.carry_out(command, NONE, 0, 512), Errno::EPERM);
    }
    assert_eq!(wire.read(0, 8).unwrap(), [0; 8]);
    assert_eq!(wire.flush(), Errno::OK);
}

#[test]
fn c55_c56_zeroes_trims_and_cache_do_what_they_say() {
    let bench = Bench::new(MIB);
    let server = bench.serve_file(&[]);
    let (mut wire, _) = Tls::structured(server.address, &bench.client(), EXPORT);
    let fill = |wire: &mut Tls| {
        wire.send_write(NONE, 1, 0, &[0xff; 1 << 20]);
        assert_eq!(wire.structured_status(), (1, Errno::OK));
    };
    let allocated = || std::fs::metadata(bench.data()).unwrap().blocks() * 512;
    let half = 512 << 10;
    for flags in [NONE, CommandFlags::FAST_ZERO] {
        fill(&mut wire);
        wire.request(
            Command::WRITE_ZEROES,
            flags.with(CommandFlags::FUA),
            2,
            0,
            half,
        );
        assert_eq!(wire.structured_status(), (2, Errno::OK));
        let content = wire.read_chunks(NONE, 0, 1 << 20).unwrap();
        assert!(content.data[..half as usize].iter().all(|byte| *byte == 0));
        assert!(
            content.data[half as usize..]
                .iter()
                .all(|byte| *byte == 0xff)
        );
        assert!(allocated() <= MIB - 256 * KIB);
        fill(&mut wire);
        let flags = flags.with(CommandFlags::NO_HOLE).with(CommandFlags::FUA);
        wire.request(Command::WRITE_ZEROES, flags, 3, 0, half);
        assert_eq!(wire.structured_status(), (3, Errno::OK));
        let content = wire.read_chunks(CommandFlags::DF, 0, half).unwrap();
        assert_eq!(content.data, vec![0; half as usize]);
        assert!(allocated() >= MIB, "NO_HOLE");
    }
    wire.request(Command::CACHE, NONE, 4, 0, half);
    assert_eq!(wire.structured_status(), (4, Errno::OK));
    wire.request(Command::CACHE, CommandFlags::NO_HOLE, 4, 0, half);
    assert_eq!(wire.structured_status(), (4, Errno::EINVAL));
    fill(&mut wire);
    wire.request(Command::TRIM, CommandFlags::FUA, 5, 0, half);
    assert_eq!(wire.structured_status(), (5, Errno::OK));
    assert!(allocated() <= MIB - 256 * KIB, "this file system has holes");
}

#[test]
fn c57_disc_ends_the_session_without_a_reply() {
    let bench = Bench::new(MIB);
    let server = bench.serve_file(&[]);
    let mut wire = Tls::simple(server.address, &bench.client(), EXPORT);
    let mut all = Vec::new();
    for cookie in 0..64_u8 {
        let offset = u64::from(cookie) * 4096;
        all.extend(request(Command::WRITE, NONE, cookie.into(), offset, 4096));
        all.extend([cookie; 4096]);
    }
    all.extend(request(Command::DISC, NONE, 99, 0, 0));
    // What comes behind DISC is not read any more.
    all.extend(request(Command::FLUSH, NONE, 100, 0, 0));
    wire.say(&all);
    let mut cookies: Vec<_> = (0..64).map(|_| wire.status().unwrap().0).collect();
    cookies.sort_unstable();
    assert_eq!(cookies, (0..64).collect::<Vec<_>>());
    // close_notify, so that the client knows that nothing was cut off.
    let mut byte = [0];
    assert_eq!(std::io::Read::read(&mut wire.stream, &mut byte).unwrap(), 0);
    server.logged("disconnected");
}

#[test]
fn c58_sparse_reads_are_answered_with_holes_unless_df_asks_for_one_piece() {
    let bench = Bench::new(4 * MIB);
    let mut file = File::options().write(true).open(bench.data()).unwrap();
    file.write_all(&[1; 64 << 10]).unwrap();
    rustix::io::pwrite(&file, &[2; 64 << 10], MIB).unwrap();
    file.sync_all().unwrap();
    let server = bench.serve_file(&[]);
    let (mut wire, _) = Tls::structured(server.address, &bench.client(), EXPORT);
    let content = wire.read_chunks(NONE, 0, 2 << 20).unwrap();
    assert_eq!(
        content.chunks,
        [
            (ChunkType::OFFSET_DATA, 0, 64 << 10),
            (ChunkType::OFFSET_HOLE, 64 * KIB, (1 << 20) - (64 << 10)),
            (ChunkType::OFFSET_DATA, MIB, 64 << 10),
            (
                ChunkType::OFFSET_HOLE,
                MIB + 64 * KIB,
                (1 << 20) - (64 << 10)
            ),
        ]
    );
    assert!(content.data == std::fs::read(bench.data()).unwrap()[..2 << 20]);
    for length in [65_536, 2 << 20] {
        let content = wire
            .read_chunks(CommandFlags::DF, 32 * KIB, length)
            .unwrap();
        assert_eq!(content.chunks, [(ChunkType::OFFSET_DATA, 32 * KIB, length)]);
    }
}

#[test]
fn block_status_tells_the_extents_of_the_file() {
    let bench = Bench::new(4 * MIB);
    let file = File::options().write(true).open(bench.data()).unwrap();
    rustix::io::pwrite(&file, &[2; 64 << 10], MIB).unwrap();
    file.sync_all().unwrap();
    let server = bench.serve_file(&[]);
    let (mut wire, id) = Tls::structured(server.address, &bench.client(), EXPORT);
    let extent = |length: u64, flags| Extent {
        length: u32::try_from(length).unwrap(),
        flags,
    };
    let all = wire.block_status(NONE, 0, 4 << 20).unwrap();
    let expected = vec![
        extent(MIB, HOLE),
        extent(64 * KIB, 0),
        extent(3 * MIB - 64 * KIB, HOLE),
    ];
    assert_eq!(all, (id, expected));
    let one = wire.block_status(CommandFlags::REQ_ONE, MIB + 1, 4096);
    assert_eq!(one, Ok((id, vec![extent(4096, 0)])));
    let one = wire.block_status(CommandFlags::REQ_ONE, MIB - 1, 4096);
    assert_eq!(one, Ok((id, vec![extent(1, HOLE)])));
    // More extents than one answer may have: the client asks again from where the answer ended.
    let bench = Bench::new(64 * MIB);
    let file = File::options().write(true).open(bench.data()).unwrap();
    for index in 0..5000 {
        rustix::io::pwrite(&file, b"x", index * 8192).unwrap();
    }
    let server = bench.serve_file(&[]);
    let (mut wire, _) = Tls::structured(server.address, &bench.client(), EXPORT);
    let (mut at, mut found) = (0, 0);
    while at < 5000 * 8192 {
        let left = u32::try_from(64 * MIB - at).unwrap();
        let (_, extents) = wire.block_status(NONE, at, left).unwrap();
        assert!(extents.len() <= 4096);
        found += extents.iter().filter(|extent| extent.flags == 0).count();
        at += extents.iter().map(|e| u64::from(e.length)).sum::<u64>();
    }
    assert_eq!(found, 5000);
}

#[test]
fn requests_that_are_sent_together_are_all_answered() {
    let bench = Bench::new(64 * MIB);
    let server = bench.serve_file(&[]);
    let mut wire = Tls::simple(server.address, &bench.client(), EXPORT);
    // Far more than may be in flight, with answers far larger than what fits into any buffer.
    let sender = {
        let mut requests = Vec::new();
        for cookie in 0..2000 {
            requests.extend(request(Command::READ, NONE, cookie, cookie * 1000, 50_000));
        }
        requests
    };
    wire.say(&sender);
    let mut seen = vec![false; 2000];
    for _ in 0..2000 {
        let (cookie, errno) = wire.status().unwrap();
        assert_eq!(errno, Errno::OK);
        wire.hear(50_000).unwrap();
        let cookie = usize::try_from(cookie).unwrap();
        assert!(
            !std::mem::replace(&mut seen[cookie], true),
            "answered twice"
        );
    }
}

#[test]
fn c55_a_file_system_without_holes_says_so_when_asked_to_be_fast() {
    let bench = Bench::new(MIB);
    // ramfs knows neither holes nor fallocate(2).
    let server = bench.serve_file_on("ramfs", "", MIB);
    let (mut wire, id) = Tls::structured(server.address, &bench.client(), EXPORT);
    let mut status = |command, flags, data: Option<&[u8]>| {
        match data {
            Some(data) => wire.send_write(flags, 1, 0, data),
            None => wire.request(command, flags, 1, 0, 4096),
        }
        wire.structured_status().1
    };
    assert_eq!(status(Command::WRITE, NONE, Some(&[7; 8192])), Errno::OK);
    for flags in [
        CommandFlags::FAST_ZERO,
        CommandFlags::FAST_ZERO.with(CommandFlags::NO_HOLE),
    ] {
        assert_eq!(status(Command::WRITE_ZEROES, flags, None), Errno::ENOTSUP);
    }
    let content = wire.read_chunks(NONE, 0, 8192).unwrap();
    assert_eq!(content.data, [7; 8192], "with contents unchanged");
    for (command, flags) in [
        (Command::TRIM, NONE),
        (Command::WRITE_ZEROES, NONE),
        (Command::WRITE_ZEROES, CommandFlags::NO_HOLE),
    ] {
        wire.request(command, flags, 1, 0, 4096);
        assert_eq!(wire.structured_status(), (1, Errno::OK));
    }
    let content = wire.read_chunks(NONE, 0, 8192).unwrap();
    assert_eq!(content.data, [[0; 4096], [7; 4096]].concat());
    let (context, extents) = wire.block_status(NONE, 0, 1 << 20).unwrap();
    let all = Extent {
        length: 1 << 20,
        flags: 0,
    };
    assert_eq!((context, extents), (id, vec![all]));
}

#[test]
fn c63_a_full_disk_and_a_full_quota_are_enospc() {
    let bench = Bench::new(MIB);
    let server = bench.serve_file_on("tmpfs", "size=4m", 64 * MIB);
    let mut wire = Tls::simple(server.address, &bench.client(), EXPORT);
    let mut full = false;
    for index in 0..8 {
        let errno = wire.write(NONE, index * MIB, &vec![1; 1 << 20]);
        assert!(errno == Errno::OK && !full || errno == Errno::ENOSPC);
        full = errno == Errno::ENOSPC;
    }
    assert!(full);
    server.logged("No space left");
    assert_eq!(wire.read(0, 1), Ok(vec![1]), "nothing else is harmed");
    assert_eq!(
        wire.write(NONE, 0, b"over"),
        Errno::OK,
        "room it has already"
    );
    assert_eq!(wire.carry_out(Command::TRIM, NONE, 0, 2 << 20), Errno::OK);
    assert_eq!(wire.write(NONE, 32 * MIB, b"again"), Errno::OK);
    // EFBIG: the process may write no file longer than 8 MiB. SIGXFSZ would have killed it.
    let bench = Bench::new(64 * MIB);
    let server = bench.serve_file_with_limit(8 * MIB);
    let mut wire = Tls::simple(server.address, &bench.client(), EXPORT);
    assert_eq!(wire.write(NONE, 9 * MIB, &[1; 4096]), Errno::ENOSPC);
    assert_eq!(wire.write(NONE, 0, &[1; 4096]), Errno::OK);
}
