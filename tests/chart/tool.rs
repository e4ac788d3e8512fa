//! helm and its companions, and what they render.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

/// The namespace that everything is rendered for.
pub(crate) const NAMESPACE: &str = "hawser-system";

/// A file of the source tree.
pub(crate) fn source(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// A program that `tests/support/install chart` brings.
pub(crate) fn program(name: &str) -> Command {
    let cache =
        std::env::var("HAWSER_CACHE").map_or_else(|_| home().join(".cache/hawser"), PathBuf::from);
    let path = cache.join("cluster/bin").join(name);
    assert!(
        path.exists(),
        "{} is missing: run tests/support/install chart",
        path.display()
    );
    Command::new(path)
}

fn home() -> PathBuf {
    PathBuf::from(std::env::var_os("HOME").unwrap())
}

/// Runs `command` with `input`: its standard output, or everything that it said.
pub(crate) fn run(command: &mut Command, input: &str) -> Result<String, String> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_owned();
    let writer = std::thread::spawn(move || {
        // One that reads none of it has said why.
        let _ = stdin.write_all(input.as_bytes());
    });
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(stdout);
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    Err(format!("{command:?}: {}\n{stdout}{stderr}", output.status))
}

/// What `helm template` makes of the chart with `arguments`.
pub(crate) fn template(arguments: &[&str]) -> Result<String, String> {
    let mut helm = program("helm");
    helm.args(["template", "hawser"])
        .arg(source("charts/hawser"))
        .args(["--namespace", NAMESPACE])
        .args(arguments);
    run(&mut helm, "")
}

/// The objects that the chart makes with `arguments`.
pub(crate) fn render(arguments: &[&str]) -> Vec<Value> {
    yaml(&template(arguments).unwrap())
}

/// All documents in `text`, without the empty ones.
pub(crate) fn yaml(text: &str) -> Vec<Value> {
    let mut documents: Vec<Value> = serde_saphyr::from_multiple(text).unwrap();
    documents.retain(|document| !document.is_null());
    documents
}

/// The one object of that kind and name.
pub(crate) fn find<'a>(objects: &'a [Value], kind: &str, name: &str) -> &'a Value {
    let mut found = objects
        .iter()
        .filter(|object| object["kind"] == kind && object["metadata"]["name"] == name);
    let first = found
        .next()
        .unwrap_or_else(|| panic!("there is no {kind} {name}"));
    assert!(found.next().is_none(), "there are two of {kind} {name}");
    first
}

/// The sets of values under `tests/chart/values`, as arguments of helm, by name; with none at all first.
pub(crate) fn value_sets() -> Vec<(String, Vec<String>)> {
    let mut sets: Vec<_> = std::fs::read_dir(source("tests/chart/values"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| {
            let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
            (
                name,
                vec!["--values".to_owned(), path.display().to_string()],
            )
        })
        .collect();
    sets.sort();
    assert!(sets.len() >= 3, "{sets:?}");
    sets.insert(0, ("nothing".to_owned(), Vec::new()));
    sets
}

/// Calls `check` with the name of each set and what it renders.
pub(crate) fn for_each_set(check: impl Fn(&str, &[Value])) {
    for (name, arguments) in value_sets() {
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        check(&name, &render(&arguments));
    }
}
