//! The table of metrics in the documents is that of the code.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// The rows of the table of metrics: name and kind.
fn documented() -> BTreeSet<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/kubernetes/operations.md");
    let text = fs::read_to_string(path).unwrap();
    let (_, rest) = text.split_once("\n## Monitoring\n").unwrap();
    let section = rest.split("\n## ").next().unwrap();
    let rows = section
        .lines()
        .filter_map(|line| line.strip_prefix("| `hawser_"));
    rows.filter_map(|row| row.split('`').next())
        .map(|name| format!("hawser_{name}"))
        .collect()
}

fn all() -> BTreeSet<String> {
    let roles = [
        crate::kube::controller::metrics::tests::exposition(),
        crate::agent::metrics::tests::exposition(),
        crate::node::metrics::tests::exposition(),
    ];
    roles.into_iter().flat_map(|role| role.names).collect()
}

#[test]
fn every_metric_is_in_the_documents_and_no_other() {
    assert_eq!(documented(), all());
}

#[test]
fn names_say_what_they_count() {
    for name in all() {
        let plain = name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
        assert!(plain && name.starts_with("hawser_"), "{name}");
        for unit in ["_ms", "_millis", "_mib", "_kib"] {
            assert!(!name.contains(unit), "{name}: seconds and bytes");
        }
    }
}

/// The alerts in the documents ask for what is told.
#[test]
fn every_metric_in_an_alert_is_one_of_ours() {
    let rules = Path::new(env!("CARGO_MANIFEST_DIR")).join("charts/hawser/files/alerts.yaml");
    let rules = fs::read_to_string(rules).unwrap();
    let known = all();
    let mut asked = 0;
    for part in rules.split("hawser_").skip(1) {
        let end = part
            .find(|c: char| !c.is_ascii_lowercase() && c != '_')
            .unwrap_or(part.len());
        let name = format!("hawser_{}", &part[..end]);
        let plain = ["_count", "_sum", "_bucket"]
            .iter()
            .find_map(|suffix| name.strip_suffix(suffix))
            .unwrap_or(&name);
        assert!(known.contains(plain), "{name}");
        asked += 1;
    }
    assert!(asked > 8, "{asked}");
}
