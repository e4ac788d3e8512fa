//! The Dockerfile: what it copies into the stage that compiles is enough to compile, and what it must say it says.
//!
//! What is in the image that comes of it is looked at where one is made, in the cluster's tests.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::tool::{run, source};

fn dockerfile() -> String {
    let text = fs::read_to_string(source("Dockerfile")).unwrap();
    text.replace("\\\n", " ")
}

/// What is copied from the checkout into the stage that compiles.
fn copied() -> BTreeSet<String> {
    let text = dockerfile();
    let (_, stage) = text.split_once(" AS build\n").unwrap();
    let stage = stage.split("\nFROM ").next().unwrap();
    let lines = stage.lines().filter_map(|line| line.strip_prefix("COPY "));
    lines
        .flat_map(|line| {
            let mut words: Vec<_> = line.split_whitespace().collect();
            words.pop();
            words
        })
        .map(str::to_owned)
        .collect()
}

fn is_covered(path: &Path, by: &BTreeSet<String>) -> bool {
    by.iter().any(|copied| path.starts_with(copied))
}

/// The files that compiling the library read, as the compiler wrote them down, and those of the rest.
fn read_by_the_compiler() -> Vec<PathBuf> {
    let deps = Path::new(env!("CARGO_BIN_EXE_hawser")).with_file_name("deps");
    let newest = fs::read_dir(&deps)
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| {
            let name = entry.file_name().into_string().unwrap();
            name.starts_with("libhawser-") && name.ends_with(".rlib")
        })
        .max_by_key(|entry| entry.metadata().unwrap().modified().unwrap());
    let library = newest.unwrap_or_else(|| panic!("no library in {}", deps.display()));
    let name = library.file_name().into_string().unwrap();
    let notes = deps.join(name.replace("libhawser-", "hawser-").replace(".rlib", ".d"));
    let text = fs::read_to_string(&notes).unwrap();
    let (_, files) = text.lines().next().unwrap().split_once(": ").unwrap();
    let root = source("");
    let mut ours: Vec<_> = files
        .split_whitespace()
        .map(|file| {
            Path::new(file)
                .strip_prefix(&root)
                .unwrap_or(Path::new(file))
        })
        .filter(|file| file.is_relative() && !file.starts_with("target"))
        .map(Path::to_owned)
        .collect();
    assert!(ours.len() > 150, "{}: {}", notes.display(), ours.len());
    // The program that is a few lines, the script and what that reads.
    ours.extend(["src/main.rs", "build.rs", "proto/csi.proto"].map(PathBuf::from));
    ours
}

#[test]
fn whatever_the_compiler_reads_is_copied() {
    let copied = copied();
    for file in read_by_the_compiler() {
        assert!(
            is_covered(&file, &copied),
            "the Dockerfile copies {copied:?}, without {}",
            file.display()
        );
    }
}

/// `.dockerignore` lets nothing through but what it names.
#[test]
fn what_is_copied_is_in_the_context_and_nothing_else_is() {
    let text = fs::read_to_string(source(".dockerignore")).unwrap();
    let mut lines = text.lines();
    assert_eq!(lines.next(), Some("*"));
    let let_through: BTreeSet<_> = lines.filter_map(|line| line.strip_prefix('!')).collect();
    let mut wanted: BTreeSet<_> = copied();
    // For the target `runtime`.
    wanted.insert("hawser".to_owned());
    assert_eq!(let_through, wanted.iter().map(String::as_str).collect());
}

/// Manifests may name files that are not copied, but cargo must be able to read them there.
#[test]
fn cargo_understands_the_manifest_without_the_rest() {
    let place = tempfile::tempdir().unwrap();
    for name in copied() {
        let (from, to) = (source(&name), place.path().join(&name));
        let copied = Command::new("cp").arg("-r").args([&from, &to]).status();
        assert!(copied.unwrap().success(), "{name}");
    }
    let mut cargo = Command::new(env!("CARGO"));
    cargo
        .args([
            "tree",
            "--locked",
            "--offline",
            "--edges=normal,build",
            "--depth=0",
        ])
        .current_dir(place.path());
    let said = run(&mut cargo, "").unwrap_or_else(|said| panic!("{said}"));
    assert!(said.starts_with("hawser v"), "{said}");
}

#[test]
fn nobody_is_root_and_the_entry_is_the_binary() {
    let text = dockerfile();
    let base = text.split("\nFROM ").nth(1).unwrap();
    assert!(base.contains("\nUSER 65532:65532\n"), "{base}");
    assert!(
        base.contains("\nENTRYPOINT [\"/usr/bin/hawser\"]"),
        "{base}"
    );
    let users = text.lines().filter(|line| line.starts_with("USER "));
    assert_eq!(users.count(), 1);
    for label in ["title", "description", "licenses", "version", "revision"] {
        let label = format!("org.opencontainers.image.{label}=");
        assert!(base.contains(&label), "{label}");
    }
}
