//! libnbd: nbdinfo, nbdcopy, fio's engine, and its Python binding for what it would never send by itself.

use std::fs;
use std::os::unix::fs::chown;
use std::process::Command;

use anyhow::{Result, ensure};

use crate::bench::{Bench, EXPORT, noise};

const MIB: usize = 1 << 20;
/// Whom fio runs as where the tests run as root: Debian's `nobody`.
const NOBODY: u32 = 65534;

#[test]
fn nbdinfo_sees_what_is_offered() -> Result<()> {
    let bench = Bench::serve_sparse(8 << 20, &[])?;
    let info = bench.client(Command::new("nbdinfo").arg("--json").arg(bench.uri()))?;
    let info: serde_json::Value = serde_json::from_str(&info)?;
    assert_eq!(info["TLS"], true);
    assert_eq!(info["structured"], true);
    let export = &info["exports"][0];
    assert_eq!(export["export-name"], EXPORT);
    assert_eq!(export["export-size"], 8 << 20);
    assert_eq!(export["contexts"], serde_json::json!(["base:allocation"]));
    for can in [
        "cache",
        "df",
        "fast_zero",
        "flush",
        "fua",
        "multi_conn",
        "trim",
        "zero",
    ] {
        assert_eq!(export[format!("can_{can}")], true, "{can}");
    }
    assert_eq!(export["is_read_only"], false);
    assert_eq!(export["block_size_minimum"], 1);
    assert_eq!(export["block_size_maximum"], 32 << 20);
    Ok(())
}

#[test]
fn nbdinfo_asks_one_thing_at_a_time() -> Result<()> {
    let bench = Bench::serve_sparse(8 << 20, &["--read-only"])?;
    bench.client(
        Command::new("nbdinfo")
            .args(["--is", "tls"])
            .arg(bench.uri()),
    )?;
    bench.client(
        Command::new("nbdinfo")
            .args(["--is", "read-only"])
            .arg(bench.uri()),
    )?;
    bench.client(
        Command::new("nbdinfo")
            .args(["--can", "structured-reply"])
            .arg(bench.uri()),
    )?;
    // nbdinfo's "no" is exit status 2.
    let (status, ..) = bench.attempt(
        Command::new("nbdinfo")
            .args(["--can", "write"])
            .arg(bench.uri()),
    )?;
    assert_eq!(status.code(), Some(2));
    let size = bench.client(Command::new("nbdinfo").arg("--size").arg(bench.uri()))?;
    assert_eq!(size.trim(), "8388608");
    Ok(())
}

#[test]
fn nbdinfo_lists_the_exports_of_this_client() -> Result<()> {
    let bench = Bench::serve_sparse(8 << 20, &[])?;
    let server = bench.uri().replace(&format!("/{EXPORT}?"), "/?");
    let list = bench.client(
        Command::new("nbdinfo")
            .args(["--list", "--json"])
            .arg(server),
    )?;
    let list: serde_json::Value = serde_json::from_str(&list)?;
    let names: Vec<_> = list["exports"].as_array().into_iter().flatten().collect();
    assert_eq!(names.len(), 1);
    assert_eq!(names[0]["export-name"], EXPORT);
    Ok(())
}

#[test]
fn nbdinfo_maps_the_extents_of_the_file() -> Result<()> {
    let bench = Bench::serve_sparse(8 << 20, &[])?;
    let data = noise(MIB, 3);
    let file = fs::OpenOptions::new()
        .write(true)
        .open(bench.path("data"))?;
    std::os::unix::fs::FileExt::write_all_at(&file, &data, 2 << 20)?;
    let map = bench.client(
        Command::new("nbdinfo")
            .args(["--map", "--json"])
            .arg(bench.uri()),
    )?;
    let map: Vec<serde_json::Value> = serde_json::from_str(&map)?;
    let extents: Vec<_> = map
        .iter()
        .map(|extent| {
            (
                extent["offset"].as_u64(),
                extent["length"].as_u64(),
                extent["type"].as_u64(),
            )
        })
        .collect();
    // Type 3 is HOLE and ZERO.
    let expected = [
        (0, 2 << 20, 3),
        (2 << 20, 1 << 20, 0),
        (3 << 20, 5 << 20, 3),
    ];
    assert_eq!(
        extents,
        expected.map(|(at, length, kind)| (Some(at), Some(length), Some(kind)))
    );
    Ok(())
}

#[test]
fn nbdcopy_carries_every_byte_both_ways() -> Result<()> {
    let content = noise(64 * MIB + 512, 4);
    let bench = Bench::serve(&content, &[])?;
    let copy = bench.path("copy");
    bench.client(Command::new("nbdcopy").arg(bench.uri()).arg(&copy))?;
    ensure!(
        fs::read(&copy)? == content,
        "what nbdcopy read is not what the file holds"
    );

    let other = noise(64 * MIB + 512, 5);
    fs::write(&copy, &other)?;
    bench.client(
        Command::new("nbdcopy")
            .arg("--flush")
            .arg(&copy)
            .arg(bench.uri()),
    )?;
    ensure!(
        bench.content()? == other,
        "what nbdcopy wrote is not what the file holds"
    );
    Ok(())
}

#[test]
fn nbdcopy_keeps_holes() -> Result<()> {
    let bench = Bench::serve_sparse(64 << 20, &[])?;
    let sparse = bench.path("sparse");
    let file = fs::File::create(&sparse)?;
    file.set_len(64 << 20)?;
    std::os::unix::fs::FileExt::write_all_at(&file, &noise(MIB, 6), 8 << 20)?;
    bench.client(Command::new("nbdcopy").arg(&sparse).arg(bench.uri()))?;
    ensure!(bench.content()? == fs::read(&sparse)?, "the copy differs");
    let allocated =
        std::os::unix::fs::MetadataExt::blocks(&fs::metadata(bench.path("data"))?) * 512;
    ensure!(
        allocated < 4 << 20,
        "a file with 1 MiB of data takes {allocated} bytes"
    );
    Ok(())
}

#[test]
fn libnbd_does_what_is_not_allowed() -> Result<()> {
    let bench = Bench::serve_sparse(128 << 20, &[])?;
    // Debian's interpreter has Debian's binding; another one that comes first in PATH has not.
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/peers/libnbd.py");
    let printed = bench.client(
        Command::new("/usr/bin/python3")
            .arg(script)
            .arg(bench.uri()),
    )?;
    ensure!(printed.contains("12 checks"), "{printed}");
    Ok(())
}

#[test]
fn c54_a_read_only_export_refuses_libnbds_writes() -> Result<()> {
    let bench = Bench::serve_sparse(8 << 20, &["--read-only"])?;
    let script = "
import errno, sys, nbd
handle = nbd.NBD()
handle.set_uri_allow_local_file(True)
handle.set_strict_mode(0)
handle.connect_uri(sys.argv[1])
for call in (lambda: handle.pwrite(b'x' * 512, 0), lambda: handle.zero(512, 0), lambda: handle.trim(512, 0)):
    try:
        call()
    except nbd.Error as error:
        assert error.errnum == errno.EPERM, error
    else:
        raise AssertionError('a read-only export was changed')
assert handle.pread(512, 0) == bytes(512)
";
    bench.client(
        Command::new("/usr/bin/python3")
            .args(["-c", script])
            .arg(bench.uri()),
    )?;
    Ok(())
}

#[test]
fn fio_verifies_what_it_wrote() -> Result<()> {
    let bench = Bench::serve_sparse(32 << 20, &[])?;
    // Without certificates in the URI libnbd looks in the user's folder, but for root in one of the system's.
    let home = tempfile::tempdir()?;
    let pki = home.path().join(".pki/libnbd");
    fs::create_dir_all(&pki)?;
    for name in ["ca-cert.pem", "client-cert.pem", "client-key.pem"] {
        fs::copy(bench.pki().join(name), pki.join(name))?;
    }
    let root = rustix::process::geteuid().is_root();
    let mut fio = if root {
        let folders = [
            home.path().to_owned(),
            home.path().join(".pki"),
            pki.clone(),
        ];
        let files = fs::read_dir(&pki)?.map(|entry| entry.map(|entry| entry.path()));
        for path in folders.into_iter().map(Ok).chain(files) {
            chown(path?, Some(NOBODY), Some(NOBODY))?;
        }
        let mut fio = Command::new("setpriv");
        let id = NOBODY.to_string();
        fio.args([
            &format!("--reuid={id}"),
            &format!("--regid={id}"),
            "--clear-groups",
            "env",
        ]);
        fio
    } else {
        Command::new("env")
    };
    fio.arg(format!("HOME={}", home.path().display()))
        .args([
            "fio",
            "--name=verify",
            "--ioengine=nbd",
            "--rw=randrw",
            "--bsrange=512-64k",
        ])
        .arg(format!("--uri=nbds://localhost:{}/{EXPORT}", bench.port()))
        .args([
            "--size=32m",
            "--iodepth=32",
            "--verify=crc32c",
            "--verify_fatal=1",
        ])
        .args([
            "--verify_state_save=0",
            "--output-format=json",
            "--output=report",
        ])
        .current_dir(home.path());
    bench.client(&mut fio)?;
    let report = fs::read(home.path().join("report"))?;
    let report: serde_json::Value = serde_json::from_slice(&report)?;
    let job = &report["jobs"][0];
    assert_eq!(job["error"], 0);
    let written = job["write"]["total_ios"].as_u64().unwrap_or_default();
    ensure!(written > 100, "fio wrote {written} times");
    Ok(())
}
