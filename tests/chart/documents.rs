//! `docs/kubernetes/` points at what there is, and its tables agree with those that are compared with the code.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::tool::{render, source};

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn pages() -> Vec<PathBuf> {
    let mut pages: Vec<_> = fs::read_dir(source("docs/kubernetes"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "md"))
        .collect();
    pages.extend(["README.md", "deploy/README.md", "charts/hawser/README.md"].map(source));
    assert!(pages.len() > 7, "{pages:?}");
    pages
}

/// The targets of all links in `text`.
fn links(text: &str) -> impl Iterator<Item = &str> {
    text.split("](")
        .skip(1)
        .filter_map(|rest| rest.split_once(')').map(|(link, _)| link))
}

/// What a heading is called in links.
fn anchor(heading: &str) -> String {
    heading
        .chars()
        .filter_map(|letter| match letter {
            ' ' => Some('-'),
            letter if letter.is_alphanumeric() || letter == '-' => letter.to_lowercase().next(),
            _ => None,
        })
        .collect()
}

#[test]
fn every_link_leads_somewhere() {
    for page in pages() {
        for link in links(&read(&page)) {
            if link.starts_with("https://") {
                continue;
            }
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = match file {
                "" => page.clone(),
                file => page.parent().unwrap().join(file),
            };
            assert!(target.exists(), "{}: {link}", page.display());
            if heading.is_empty() {
                continue;
            }
            let found = read(&target)
                .lines()
                .filter_map(|line| line.strip_prefix('#'))
                .any(|line| anchor(line.trim_start_matches('#').trim()) == heading);
            assert!(found, "{}: {link}", page.display());
        }
    }
}

/// The first column of the table below that heading.
fn keys(text: &str, heading: &str) -> BTreeSet<String> {
    let (_, rest) = text.split_once(&format!("\n{heading}\n")).unwrap();
    let section = rest.split("\n## ").next().unwrap();
    let keys: BTreeSet<_> = section
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split('`').next())
        .map(str::to_owned)
        .collect();
    assert!(keys.len() > 4, "{heading}: {keys:?}");
    keys
}

#[test]
fn the_parameters_of_classes_are_those_that_the_code_knows() {
    let cluster = read(&source("docs/kubernetes/storageclass.md"));
    let all = read(&source("docs/parameters.md"));
    assert_eq!(
        keys(&cluster, "## Parameters"),
        keys(&all, "## StorageClass parameters")
    );
}

/// Where conditions and Events get their reasons.
const SOURCES: [&str; 10] = [
    "src/agent/decide.rs",
    "src/agent/reconcile.rs",
    "src/kube/api/mod.rs",
    "src/kube/controller/certificates.rs",
    "src/kube/controller/pools.rs",
    "src/kube/controller/reconcile.rs",
    "src/kube/controller/server.rs",
    "src/kube/controller/status.rs",
    "src/kube/volumes/standing.rs",
    "src/node/notes.rs",
];

/// Words there that look like reasons, and are Kubernetes' own.
const NO_REASONS: [&str; 21] = [
    "AgentReady",
    "Always",
    "Attach",
    "BackingReady",
    "Certificate",
    "CertificatesReady",
    "Default",
    "Directory",
    "False",
    "In",
    "Look",
    "OnDelete",
    "OnRootMismatch",
    "Parallel",
    "PersistentVolumeClaim",
    "Reconcile",
    "RuntimeDefault",
    "ServerReady",
    "True",
    "Unknown",
    "NbdVolume",
];

/// Words in quotation marks as reasons are written: letters, the first of them a capital.
fn reasons(path: &str) -> BTreeSet<String> {
    let text = read(&source(path));
    let code = text.split("#[cfg(test)]").next().unwrap();
    let quoted = code
        .lines()
        .flat_map(|line| line.split('"').skip(1).step_by(2));
    quoted
        .filter(|word| word.starts_with(|c: char| c.is_ascii_uppercase()))
        .filter(|word| word.len() > 2 && word.bytes().any(|b| b.is_ascii_lowercase()))
        .filter(|word| word.bytes().all(|b| b.is_ascii_alphabetic()))
        .filter(|word| !NO_REASONS.contains(word))
        .map(str::to_owned)
        .collect()
}

#[test]
fn every_reason_of_a_condition_or_an_event_is_explained() {
    let page = read(&source("docs/kubernetes/troubleshooting.md"));
    let (_, rest) = page.split_once("\n## What a reason means\n").unwrap();
    let section = rest.split("\n## ").next().unwrap();
    let rows = section.lines().filter(|line| line.starts_with("| "));
    let explained: BTreeSet<String> = rows
        .skip(1)
        .filter_map(|row| row.split(" | ").nth(1))
        .flat_map(|column| column.split('`').skip(1).step_by(2))
        .map(str::to_owned)
        .collect();
    let known: BTreeSet<String> = SOURCES.into_iter().flat_map(reasons).collect();
    assert_eq!(explained, known);
}

/// The words of every command that the pages show, with lines that go on joined.
fn commands(text: &str) -> Vec<Vec<String>> {
    let mut commands = Vec::new();
    for block in text.split("```").skip(1).step_by(2) {
        let block = block.replace("\\\n", " ");
        for line in block.lines() {
            let line = line.split(" #").next().unwrap();
            commands.push(line.split_whitespace().map(str::to_owned).collect());
        }
    }
    commands
}

#[test]
fn every_value_that_a_page_names_is_one() {
    let known = crate::values::known_paths();
    let is_one = |name: &str| {
        let path = format!(".{name}");
        known.iter().any(|known| {
            *known == path
                || known.starts_with(&format!("{path}."))
                || path.starts_with(&format!("{known}."))
        })
    };
    let parts = [
        "agent",
        "controller",
        "csiDriver",
        "hooks",
        "image",
        "metrics",
        "networkPolicy",
        "node",
        "server",
        "tls",
    ];
    let mut named = 0;
    for page in pages() {
        let text = read(&page);
        for command in commands(&text) {
            for pair in command.windows(2).filter(|pair| pair[0] == "--set") {
                for setting in pair[1].split(',') {
                    let name = setting.split('=').next().unwrap();
                    assert!(is_one(name), "{}: --set {name}", page.display());
                    named += 1;
                }
            }
        }
        for quoted in text.split('`').skip(1).step_by(2) {
            let name = quoted.split('=').next().unwrap();
            let is_path = name
                .split('.')
                .all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphabetic()));
            let (first, rest) = name.split_once('.').unwrap_or((name, ""));
            let is_file =
                ["crt", "d", "key", "yaml", "json", "md", "rs", "sh", "svg"].contains(&rest);
            if is_path && !rest.is_empty() && !is_file && parts.contains(&first) {
                assert!(is_one(name), "{}: {name}", page.display());
                named += 1;
            }
        }
    }
    assert!(named > 20, "{named}");
}

#[test]
fn every_flag_of_ours_that_a_page_shows_is_one() {
    let mut files = pages();
    files.extend(["docs/verify.md", "docs/parameters.md"].map(source));
    let mut shown = 0;
    for page in files {
        for command in commands(&read(&page)) {
            let [program, role, rest @ ..] = command.as_slice() else {
                continue;
            };
            if program != "hawser" {
                continue;
            }
            let help = std::process::Command::new(env!("CARGO_BIN_EXE_hawser"))
                .args([role, "--help"])
                .output()
                .unwrap();
            let help = String::from_utf8_lossy(&help.stdout).into_owned();
            for flag in rest.iter().filter(|word| word.starts_with("--")) {
                let flag = flag.split('=').next().unwrap();
                let is_one = help.split([' ', ',', '\n', '[']).any(|word| word == flag);
                assert!(is_one, "{}: hawser {role} {flag}", page.display());
                shown += 1;
            }
        }
    }
    assert!(shown > 5, "{shown}");
}

#[test]
fn every_workload_that_a_page_names_is_in_the_chart() {
    let objects = render(&[]);
    let mut named = 0;
    for page in pages() {
        let text = read(&page);
        for (kind, short) in [("Deployment", "deployment/"), ("DaemonSet", "daemonset/")] {
            for rest in text
                .split(short)
                .skip(1)
                .filter(|rest| rest.starts_with("hawser-"))
            {
                let end = rest.find(|c: char| !c.is_ascii_lowercase() && c != '-');
                crate::tool::find(&objects, kind, &rest[..end.unwrap_or(rest.len())]);
                named += 1;
            }
        }
    }
    assert!(named > 5, "{named}");
}

#[test]
fn the_page_about_classes_shows_the_one_of_the_chart() {
    let page = read(&source("docs/kubernetes/storageclass.md"));
    let example = page.split("```yaml\n").nth(1).unwrap();
    let example = crate::tool::yaml(example.split("```").next().unwrap()).remove(0);
    let objects = render(&[]);
    let class = crate::tool::find(&objects, "StorageClass", "hawser");
    for key in [
        "provisioner",
        "reclaimPolicy",
        "volumeBindingMode",
        "allowVolumeExpansion",
        "parameters",
    ] {
        assert_eq!(example[key], class[key], "{key}");
    }
}
