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
