//! What is made from something else is as it would be made now: the table of values in the chart's README, `deploy/`, the
//! definitions, and versions that are said in more than one place.

use std::fs;

use serde_json::Value;

use crate::tool::{NAMESPACE, source, template, yaml};

/// Compares the file with what it should be; with `HAWSER_UPDATE` set, writes it.
fn is(path: &str, wanted: &str) {
    let file = source(path);
    if std::env::var_os("HAWSER_UPDATE").is_some() {
        fs::write(&file, wanted).unwrap();
        return;
    }
    let there = fs::read_to_string(&file).unwrap_or_default();
    let differs = there
        .lines()
        .zip(wanted.lines())
        .position(|(there, wanted)| there != wanted)
        .unwrap_or_else(|| there.lines().count().min(wanted.lines().count()));
    assert!(
        there == wanted,
        "{path} is not what it is made from, from line {} on: HAWSER_UPDATE=1 make chart writes it anew",
        differs + 1
    );
}

/// `values.yaml`'s values with the lines `# -- ...` above them, in order.
fn described(text: &str) -> Vec<(String, String)> {
    let mut path: Vec<(usize, &str)> = Vec::new();
    let mut described = Vec::new();
    let mut about = None;
    for line in text.lines() {
        let content = line.trim_start();
        let depth = line.len() - content.len();
        if let Some(comment) = content.strip_prefix("# -- ") {
            about = Some(comment);
            continue;
        }
        let Some((name, _)) = content.split_once(':') else {
            continue;
        };
        if content.starts_with(['#', '-']) || name.contains(' ') {
            continue;
        }
        while path.last().is_some_and(|(above, _)| *above >= depth) {
            path.pop();
        }
        path.push((depth, name));
        if let Some(about) = about.take() {
            let names: Vec<_> = path.iter().map(|(_, name)| *name).collect();
            described.push((names.join("."), about.to_owned()));
        }
    }
    described
}

/// Every leaf of `value` that no description covers.
fn undescribed(value: &Value, at: &str, described: &[(String, String)], found: &mut Vec<String>) {
    if described.iter().any(|(name, _)| name == at) {
        return;
    }
    match value.as_object() {
        Some(members) if !members.is_empty() => {
            for (name, member) in members {
                let below = if at.is_empty() {
                    name.clone()
                } else {
                    format!("{at}.{name}")
                };
                undescribed(member, &below, described, found);
            }
        }
        _ => found.push(at.to_owned()),
    }
}

#[test]
fn the_readme_lists_the_values() {
    let text = fs::read_to_string(source("charts/hawser/values.yaml")).unwrap();
    let values = yaml(&text).remove(0);
    let described = described(&text);
    let mut missing = Vec::new();
    undescribed(&values, "", &described, &mut missing);
    assert!(
        missing.is_empty(),
        "values without a line about them: {missing:?}"
    );

    let mut table = "| value | default | what it sets |\n|---|---|---|\n".to_owned();
    for (name, about) in &described {
        let default = values
            .pointer(&format!("/{}", name.replace('.', "/")))
            .unwrap_or_else(|| panic!("{name}: there is no such value"));
        table += &format!("| `{name}` | `{default}` | {about} |\n");
    }
    const BEGIN: &str = "<!-- values: made from values.yaml -->\n";
    const END: &str = "<!-- end of values -->\n";
    let path = "charts/hawser/README.md";
    let readme = fs::read_to_string(source(path)).unwrap();
    let (before, rest) = readme.split_once(BEGIN).unwrap();
    let (_, after) = rest.split_once(END).unwrap();
    is(path, &format!("{before}{BEGIN}{table}{END}{after}"));
}

#[test]
fn deploy_is_the_chart_as_it_renders_by_default() {
    let rendered = template(&["--no-hooks"]).unwrap();
    let head = format!(
        "\
# The chart with its default values: HAWSER_UPDATE=1 make chart writes this file. Apply crds.yaml first.
---
apiVersion: v1
kind: Namespace
metadata:
  name: {NAMESPACE}
  labels:
    # The node part is privileged, and agents and servers see directories of their nodes.
    pod-security.kubernetes.io/enforce: privileged
"
    );
    // Helm leaves blank lines where a template had nothing to say.
    let mut lines: Vec<_> = rendered.lines().map(str::trim_end).collect();
    lines.retain(|line| !line.is_empty());
    is(
        "deploy/hawser.yaml",
        &format!("{head}{}\n", lines.join("\n")),
    );
}

/// For those who do not use Helm, which is where the chart's `crds/` would not be seen.
#[test]
fn deploy_has_the_definitions_of_the_chart() {
    let definitions = fs::read_to_string(source("charts/hawser/crds/hawser.dev.yaml")).unwrap();
    is("deploy/crds.yaml", &definitions);
}

/// The value of a top-level `key: value` or `key = "value"` in `text`.
fn stated<'a>(text: &'a str, key: &str) -> &'a str {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(key))
        .unwrap_or_else(|| panic!("nothing says {key}"));
    line.trim_matches([' ', '=', ':', '"'])
}

#[test]
fn versions_agree() {
    let read = |path: &str| fs::read_to_string(source(path)).unwrap();
    let chart = read("charts/hawser/Chart.yaml");
    let dockerfile = read("Dockerfile");
    let ours = env!("CARGO_PKG_VERSION");
    assert_eq!(stated(&chart, "appVersion"), ours);
    assert_eq!(stated(&dockerfile, "ARG VERSION"), ours);
    let toolchain = read("rust-toolchain.toml");
    assert_eq!(
        stated(&dockerfile, "ENV RUSTUP_TOOLCHAIN"),
        stated(&toolchain, "channel")
    );
    let base = stated(&toolchain, "channel").rsplit_once('.').unwrap().0;
    assert!(dockerfile.contains(&format!("/rust:{base}-slim-trixie AS build")));
}
