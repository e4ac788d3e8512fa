//! QEMU's block layer, over `tls-creds-x509`.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};

use crate::bench::{Bench, EXPORT, noise};

const MIB: usize = 1 << 20;

/// `qemu-img VERB` with the credentials of this bench.
fn qemu_img(bench: &Bench, verb: &str) -> Command {
    let mut command = Command::new("qemu-img");
    let pki = bench.pki();
    command.arg(verb).arg("--object");
    command.arg(format!(
        "tls-creds-x509,id=tls,endpoint=client,dir={}",
        pki.display()
    ));
    command
}

/// The export, as QEMU's image options say it.
fn image(bench: &Bench) -> String {
    format!(
        "driver=nbd,host=localhost,port={},export={EXPORT},tls-creds=tls",
        bench.port()
    )
}

fn file(path: &Path) -> String {
    format!(
        "driver=raw,file.driver=file,file.filename={}",
        path.display()
    )
}

#[test]
fn qemu_img_copies_in_and_out_and_compares() -> Result<()> {
    let bench = Bench::serve_sparse(48 << 20, &[])?;
    let (source, copy) = (bench.path("source"), bench.path("copy"));
    let mut content = noise(48 * MIB, 7);
    content[8 * MIB..24 * MIB].fill(0);
    fs::write(&source, &content)?;
    bench.client(
        qemu_img(&bench, "convert")
            .args(["-n", "-f", "raw", "-m", "8", "-W", "--target-image-opts"])
            .arg(&source)
            .arg(image(&bench)),
    )?;
    ensure!(
        bench.content()? == content,
        "what QEMU wrote is not what the file holds"
    );

    let compared = bench.client(qemu_img(&bench, "compare").args([
        "--image-opts",
        &file(&source),
        &image(&bench),
    ]))?;
    ensure!(compared.contains("identical"), "{compared}");

    bench.client(
        qemu_img(&bench, "convert")
            .args(["-O", "raw", "--image-opts", &image(&bench)])
            .arg(&copy),
    )?;
    ensure!(
        fs::read(&copy)? == content,
        "what QEMU read is not what the file holds"
    );
    Ok(())
}

#[test]
fn qemu_img_finds_a_difference() -> Result<()> {
    let content = noise(4 * MIB, 8);
    let bench = Bench::serve(&content, &[])?;
    let other = bench.path("other");
    let mut changed = content;
    changed[3 * MIB + 17] ^= 1;
    fs::write(&other, &changed)?;
    let (status, printed, _) = bench.attempt(qemu_img(&bench, "compare").args([
        "--image-opts",
        &file(&other),
        &image(&bench),
    ]))?;
    ensure!(
        status.code() == Some(1) && printed.contains("mismatch"),
        "{status}: {printed}"
    );
    Ok(())
}

#[test]
fn qemu_img_maps_holes_and_data() -> Result<()> {
    let bench = Bench::serve_sparse(16 << 20, &[])?;
    let backing = fs::OpenOptions::new()
        .write(true)
        .open(bench.path("data"))?;
    std::os::unix::fs::FileExt::write_all_at(&backing, &noise(MIB, 9), 4 << 20)?;
    let map = bench.client(qemu_img(&bench, "map").args([
        "--output=json",
        "--image-opts",
        &image(&bench),
    ]))?;
    let map: Vec<serde_json::Value> = serde_json::from_str(&map)?;
    let extents: Vec<_> = map
        .iter()
        .map(|extent| {
            (
                extent["start"].as_u64(),
                extent["length"].as_u64(),
                extent["data"].as_bool(),
            )
        })
        .collect();
    let expected = [
        (0, 4 << 20, false),
        (4 << 20, 1 << 20, true),
        (5 << 20, 11 << 20, false),
    ];
    assert_eq!(
        extents,
        expected.map(|(at, length, data)| (Some(at), Some(length), Some(data)))
    );
    Ok(())
}

#[test]
fn qemu_img_is_told_the_size() -> Result<()> {
    let bench = Bench::serve_sparse(16 << 20, &[])?;
    let info = bench.client(qemu_img(&bench, "info").args([
        "--output=json",
        "--image-opts",
        &image(&bench),
    ]))?;
    let info: serde_json::Value = serde_json::from_str(&info)?;
    assert_eq!(info["virtual-size"], 16 << 20);
    Ok(())
}

#[test]
fn qemu_img_without_credentials_is_refused() -> Result<()> {
    let bench = Bench::serve_sparse(16 << 20, &[])?;
    let plain = image(&bench).replace(",tls-creds=tls", "");
    let (status, _, error) =
        bench.attempt(qemu_img(&bench, "info").args(["--image-opts", &plain]))?;
    ensure!(
        !status.success() && error.contains("tls"),
        "{status}: {error}"
    );
    Ok(())
}
