use std::io::IoSliceMut;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use tempfile::TempDir;

use super::*;

const KIB: u64 = 1 << 10;
const SIZE: u64 = 1 << 20;

fn range(offset: u64, length: u64) -> Range {
    let length = u32::try_from(length).unwrap();
    Range { offset, length }
}

/// A store on a sparse file, and where that is.
fn sparse() -> (TempDir, PathBuf, Store) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("data");
    File::create(&path).unwrap().set_len(SIZE).unwrap();
    let store = Store::open(&path, false).unwrap();
    (directory, path, store)
}

fn read(store: &Store, range: Range) -> Result<Vec<u8>, Trouble> {
    let mut data = Vec::new();
    store.read(range, &mut data).map(|()| data)
}

fn allocated(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn what_is_written_is_read_and_all_else_is_zero() {
    let (_directory, _, store) = sparse();
    store.write(SIZE - 3, b"end").unwrap();
    store.write(5, b"begin").unwrap();
    assert_eq!(read(&store, range(0, 12)).unwrap(), b"\0\0\0\0\0begin\0\0");
    assert_eq!(read(&store, range(SIZE - 5, 5)).unwrap(), b"\0\0end");
    assert_eq!(read(&store, range(SIZE, 0)).unwrap(), b"");
    let mut now = [0; 5];
    let (begin, end) = now.split_at_mut(2);
    let pieces = &mut [IoSliceMut::new(begin), IoSliceMut::new(end)];
    if store.read_now(5, pieces) {
        assert_eq!(&now, b"begin");
    }
    store.flush().unwrap();
    store.cache(range(0, SIZE)).unwrap();
    store.cache(range(0, 0)).unwrap();
}

#[test]
fn one_look_at_the_file_serves_many_writes_but_not_lost_ones() {
    // In memory, where no write needs waiting.
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = directory.path().join("data");
    File::create(&path).unwrap().set_len(SIZE).unwrap();
    let store = Store::open(&path, false).unwrap();
    let mut looked = false;
    store.write_now(0, b"x", &mut looked).unwrap();
    assert!(looked);
    std::fs::remove_file(path).unwrap();
    store.write_now(0, b"y", &mut looked).unwrap();
    assert_eq!(store.write_now(0, b"z", &mut false), None);
    store.lose();
    assert_eq!(store.write_now(0, b"z", &mut looked), None);
    assert_eq!(read(&store, range(0, 1)).unwrap(), b"y");
}

#[test]
fn extents_cover_the_range_and_alternate() {
    let (_directory, _, store) = sparse();
    store.write(64 * KIB, &[1; 64 << 10]).unwrap();
    store.write(256 * KIB, &[1; 64 << 10]).unwrap();
    let flags = |extents: &[Extent]| -> Vec<(u64, bool)> {
        let pairs = extents.iter().map(|e| (u64::from(e.length), e.flags == 3));
        pairs.collect()
    };
    let all = store.extents(range(0, SIZE), 100).unwrap();
    let expected = [
        (64 * KIB, true),
        (64 * KIB, false),
        (128 * KIB, true),
        (64 * KIB, false),
        (704 * KIB, true),
    ];
    assert_eq!(flags(&all), expected);
    let part = store.extents(range(100 * KIB, 100 * KIB), 100).unwrap();
    assert_eq!(flags(&part), [(28 * KIB, false), (72 * KIB, true)]);
    let first = store.extents(range(0, SIZE), 2).unwrap();
    assert_eq!(flags(&first), expected[..2]);
    let tail = store.extents(range(SIZE - 1, 1), 1).unwrap();
    assert_eq!(flags(&tail), [(1, true)]);
}

#[test]
fn c55_c56_zeroes_and_trims_read_back_as_zero_and_keep_or_free_the_space() {
    let (_directory, path, store) = sparse();
    let fill = || store.write(0, &[0xff; 1 << 20]).unwrap();
    let is_zero = |from: u64, until: u64| {
        let data = read(&store, range(0, SIZE)).unwrap();
        let expected = |at: u64| if (from..until).contains(&at) { 0 } else { 0xff };
        (0..).zip(&data).all(|(at, byte)| *byte == expected(at))
    };
    // Unaligned ends, so that the file system has to write something too.
    let (from, length) = (3 * KIB + 1, 500 * KIB);
    for fast in [false, true] {
        fill();
        store.zero(range(from, length), false, fast).unwrap();
        assert!(is_zero(from, from + length));
        store.flush().unwrap();
        assert!(allocated(&path) < SIZE - 400 * KIB, "the space is free");
        fill();
        store.zero(range(from, length), true, fast).unwrap();
        assert!(is_zero(from, from + length));
        store.flush().unwrap();
        assert!(allocated(&path) >= SIZE, "NO_HOLE: the space is kept");
    }
    fill();
    store.trim(range(from, length)).unwrap();
    assert!(
        is_zero(from, from + length),
        "true of file systems with holes"
    );
    assert_eq!(std::fs::metadata(&path).unwrap().len(), SIZE);
    store.zero(range(SIZE, 0), false, false).unwrap();
    store.trim(range(0, 0)).unwrap();
}

#[test]
fn a_file_that_shrank_fails_what_touches_it_and_recovers_with_it() {
    let (_directory, path, store) = sparse();
    let resize = |size| {
        let file = File::options().write(true).open(&path).unwrap();
        file.set_len(size).unwrap();
    };
    resize(KIB);
    let truncated = Trouble::Truncated {
        size: KIB,
        served: SIZE,
    };
    assert_eq!(read(&store, range(0, 4096)), Err(truncated));
    assert_eq!(store.write(0, b"x"), Err(truncated));
    assert_eq!(
        store.write(SIZE - 1, b"x"),
        Err(truncated),
        "and does not grow it"
    );
    let mut looked = false;
    assert_eq!(store.write_now(0, b"x", &mut looked), None);
    assert!(!looked, "so the next one looks again");
    assert_eq!(store.trim(range(0, KIB)), Err(truncated));
    assert_eq!(store.zero(range(0, KIB), false, false), Err(truncated));
    assert_eq!(store.extents(range(0, SIZE), 10), Err(truncated));
    assert_eq!(store.flush(), Err(truncated));
    assert_eq!(truncated.errno(), Errno::EIO);
    assert_eq!(std::fs::metadata(&path).unwrap().len(), KIB);
    resize(SIZE);
    store.write(SIZE - 1, b"x").unwrap();
    store.flush().unwrap();
    resize(SIZE / 2);
    assert_eq!(store.grow(), Ok(SIZE), "never serves less than before");
    resize(2 * SIZE);
    assert_eq!(store.size(), SIZE, "not before it is asked to");
    assert_eq!(store.grow(), Ok(2 * SIZE));
    store.write(2 * SIZE - 1, b"x").unwrap();
}

#[test]
fn a_deleted_file_takes_no_more_writes() {
    let (_directory, path, store) = sparse();
    store.write(0, b"x").unwrap();
    std::fs::remove_file(&path).unwrap();
    File::create(&path).unwrap().set_len(SIZE).unwrap();
    assert_eq!(store.write(0, b"y"), Err(Trouble::Deleted));
    assert_eq!(store.flush(), Err(Trouble::Deleted));
    assert_eq!(
        read(&store, range(0, 1)).unwrap(),
        b"x",
        "what is there can be rescued"
    );
}

#[test]
fn a_file_without_any_right_to_write_takes_none() {
    let (_directory, path, store) = sparse();
    let mode = |mode| {
        let permissions = std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(&path, permissions).unwrap();
    };
    mode(0o440);
    assert_eq!(store.write(0, b"x"), Err(Trouble::WriteProtected));
    assert_eq!(Trouble::WriteProtected.errno(), Errno::EPERM);
    read(&store, range(0, 1)).unwrap();
    store.flush().unwrap();
    mode(0o640);
    store.write(0, b"x").unwrap();
}

#[test]
fn c63_errors_of_the_host_become_those_of_the_protocol() {
    let of = |errno| Trouble::io("test")(errno).errno();
    for errno in [OsErrno::NOSPC, OsErrno::DQUOT, OsErrno::FBIG] {
        assert_eq!(of(errno), Errno::ENOSPC, "{errno}");
    }
    for errno in [OsErrno::PERM, OsErrno::ACCESS, OsErrno::ROFS] {
        assert_eq!(of(errno), Errno::EPERM, "{errno}");
    }
    for errno in [
        OsErrno::NOMEM,
        OsErrno::IO,
        OsErrno::STALE,
        OsErrno::OPNOTSUPP,
    ] {
        assert_eq!(of(errno), Errno::EIO, "{errno}");
    }
}

#[test]
fn only_files_and_devices_are_opened_and_by_one_writer() {
    let (directory, path, store) = sparse();
    let error = Store::open(directory.path(), true).unwrap_err();
    assert!(matches!(error, OpenError::Kind { .. }), "{error}");
    assert!(Store::open(Path::new("/dev/null"), true).is_err());
    store.lock(false).unwrap();
    for read_only in [true, false] {
        let other = Store::open(&path, read_only).unwrap();
        let error = other.lock(read_only).unwrap_err();
        assert!(matches!(error, OpenError::InUse { .. }), "{error}");
    }
}

/// A write that was under way while the file grew once saw its old size and the new size that was served.
#[test]
fn growing_fails_no_request_that_is_under_way() {
    let (_directory, path, store) = sparse();
    let file = File::options().write(true).open(&path).unwrap();
    std::thread::scope(|scope| {
        let grower = scope.spawn(|| {
            for step in 1..=5000 {
                file.set_len(SIZE + step * KIB).unwrap();
                store.grow().unwrap();
            }
        });
        while !grower.is_finished() {
            store.write(0, b"under way").unwrap();
        }
    });
    assert_eq!(store.size(), SIZE + 5000 * KIB);
}
