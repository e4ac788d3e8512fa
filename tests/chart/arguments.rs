//! The command lines and files that the chart gives to our binary are ones that it takes.

use std::collections::BTreeSet;
use std::process::Command;

use serde_json::Value;

use crate::tool::{find, for_each_set};

/// The arguments of every container that runs our image.
fn command_lines(objects: &[Value]) -> Vec<Vec<&str>> {
    let mut lines = Vec::new();
    for object in objects {
        let containers = object["spec"]["template"]["spec"]["containers"].as_array();
        for container in containers.into_iter().flatten() {
            if container["name"] == "hawser" {
                let arguments = container["args"].as_array().unwrap().iter();
                lines.push(
                    arguments
                        .map(|argument| argument.as_str().unwrap())
                        .collect(),
                );
            }
        }
    }
    lines
}

/// What the binary says, and its exit status, where it finds no cluster. That is the first thing that each of these roles
/// looks for once it has understood what it was told.
fn without_cluster(arguments: &[&str]) -> (String, Option<i32>) {
    let output = Command::new(env!("CARGO_BIN_EXE_hawser"))
        .env_clear()
        .env("KUBECONFIG", "/nonexistent")
        .args(arguments)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    (said, output.status.code())
}

const NO_CLUSTER: [&str; 3] = [
    "find the API server",
    "find out how to reach the API server",
    "find the cluster",
];

fn assert_understood(set: &str, arguments: &[&str]) {
    let (said, code) = without_cluster(arguments);
    assert_eq!(code, Some(1), "{set}: {arguments:?}: {said}");
    assert!(
        NO_CLUSTER.iter().any(|words| said.contains(words)),
        "{set}: {arguments:?}: {said}"
    );
}

#[test]
fn the_binary_understands_every_command_line_of_every_set() {
    let pods = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(pods.path(), "{}").unwrap();
    let pods = format!("--server-pods={}", pods.path().display());
    for_each_set(|set, objects| {
        let mut roles = BTreeSet::new();
        for mut line in command_lines(objects) {
            for argument in &mut line {
                if argument.starts_with("--server-pods=") {
                    *argument = &pods;
                }
            }
            assert_understood(set, &line);
            roles.insert(line[0]);
        }
        for role in ["controller", "node"] {
            assert!(roles.contains(role), "{set}: {roles:?}");
        }
    });
}

#[test]
fn the_controller_understands_what_every_servers_pod_is_to_have() {
    for_each_set(|set, objects| {
        let map = find(objects, "ConfigMap", "hawser-server-pods");
        let pods = tempfile::NamedTempFile::new().unwrap();
        let text = map["data"]["server-pods.json"].as_str().unwrap();
        std::fs::write(pods.path(), text).unwrap();
        let file = format!("--server-pods={}", pods.path().display());
        let line = [
            "controller",
            "--endpoint=unix:///nonexistent/csi.sock",
            "--namespace=a",
            "--image=b",
            &file,
        ];
        assert_understood(set, &line);
        std::fs::write(pods.path(), text.replacen("tolerations", "tolerance", 1)).unwrap();
        let (said, code) = without_cluster(&line);
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains("tolerance"), "{said}");
    });
}

#[test]
fn an_argument_too_few_or_too_many_is_told() {
    for wrong in [
        &["controller"][..],
        &["hook", "guard-uninstall"],
        &["hook", "upgrade-crds", "--now"],
    ] {
        let (said, code) = without_cluster(wrong);
        assert_eq!(code, Some(64), "{wrong:?}: {said}");
    }
}
