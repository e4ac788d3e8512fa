//! The values: each is in the schema, each does something, and what is not in the schema is refused.

use std::collections::BTreeSet;
use std::fs;

use serde_json::Value;

use crate::tool::{for_each_set, program, run, source, template, value_sets, yaml};

fn schema() -> Value {
    let text = fs::read_to_string(source("charts/hawser/values.schema.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn defaults() -> Value {
    let text = fs::read_to_string(source("charts/hawser/values.yaml")).unwrap();
    yaml(&text).remove(0)
}

/// The part of the schema that `node` stands for.
fn resolve<'a>(root: &'a Value, node: &'a Value) -> &'a Value {
    match node["$ref"].as_str() {
        Some(reference) => root.pointer(reference.trim_start_matches('#')).unwrap(),
        None => node,
    }
}

/// The paths of all properties that the schema knows, as far as it says what they are.
fn known(root: &Value, node: &Value, at: &str, found: &mut BTreeSet<String>) {
    let node = resolve(root, node);
    let Some(properties) = node["properties"].as_object() else {
        found.insert(at.to_owned());
        return;
    };
    assert_eq!(
        node["additionalProperties"], false,
        "{at}: a misspelt value must be refused"
    );
    for (name, property) in properties {
        known(root, property, &format!("{at}.{name}"), found);
    }
}

/// The paths of all values, as deep as the schema goes.
fn given(root: &Value, node: &Value, value: &Value, at: &str, found: &mut BTreeSet<String>) {
    let node = resolve(root, node);
    match (node["properties"].as_object(), value.as_object()) {
        (Some(properties), Some(members)) => {
            for (name, member) in members {
                let property = properties
                    .get(name)
                    .unwrap_or_else(|| panic!("the schema lacks {at}.{name}"));
                given(root, property, member, &format!("{at}.{name}"), found);
            }
        }
        _ => {
            found.insert(at.to_owned());
        }
    }
}

/// The paths of all values that the schema knows, each after a point.
pub(crate) fn known_paths() -> BTreeSet<String> {
    let schema = schema();
    let mut found = BTreeSet::new();
    known(&schema, &schema, "", &mut found);
    found
}

#[test]
fn values_and_schema_name_the_same() {
    let schema = schema();
    let (mut known_paths, mut given_paths) = (BTreeSet::new(), BTreeSet::new());
    known(&schema, &schema, "", &mut known_paths);
    given(&schema, &schema, &defaults(), "", &mut given_paths);
    // Helm gives it to every chart, and a resource may have parts that the defaults do not.
    known_paths.retain(|path| {
        path != ".global"
            && !path.contains(".resources.")
            && !path.ends_with("Strategy.rollingUpdate")
    });
    given_paths.retain(|path| !path.contains(".resources."));
    let missing: Vec<_> = known_paths.difference(&given_paths).collect();
    assert!(missing.is_empty(), "values.yaml lacks {missing:?}");
}

#[test]
fn what_the_schema_does_not_know_is_refused_by_name() {
    for (wrong, name) in [
        ("replicas=3", "replicas"),
        ("controller.replica=3", "replica"),
        ("pools[0].path=/a", "path"),
        ("storageClasses[0].filesystem=xfs", "filesystem"),
        ("storageClasses[0].fsType=ntfs", "fsType"),
        ("sidecars.snapshotter.logLevel=3", "snapshotter"),
        ("node.updateStrategy.rollingUpdate.maxSurge=1", "maxSurge"),
        ("node.statePath=relative", "statePath"),
        ("pools[0].directory=/var/lib/hawser/", "directory"),
        ("image.digest=latest", "digest"),
    ] {
        let refused = template(&["--set", wrong]).unwrap_err();
        assert!(refused.contains(name), "{wrong}: {refused}");
    }
}

/// Values that the schema takes, one by one, and that make no sense together.
#[test]
fn what_contradicts_itself_is_refused_and_the_message_says_what_to_do() {
    let pools = |json: &str| format!("pools={json}");
    let classes = |json: &str| format!("storageClasses={json}");
    for (json, told) in [
        (
            r#"metrics={"podMonitor":{"enabled":true}}"#.to_owned(),
            "need metrics.enabled",
        ),
        (
            r#"metrics={"serviceMonitor":{"enabled":true}}"#.to_owned(),
            "need metrics.enabled",
        ),
        (
            r#"metrics={"enabled":true,"serviceMonitor":{"enabled":true},"podMonitor":{"enabled":true}}"#
                .to_owned(),
            "scraped twice",
        ),
        (
            r#"metrics={"prometheusRule":{"enabled":true}}"#.to_owned(),
            "need metrics.enabled",
        ),
        (
            r#"metrics={"enabled":true,"port":9808}"#.to_owned(),
            "controller.healthPort",
        ),
        (
            r#"metrics={"enabled":true,"nodePort":19808}"#.to_owned(),
            "node.healthPort",
        ),
        (
            pools(r#"[{"name":"a","directory":"/a"},{"name":"a","directory":"/b"}]"#),
            "two are called a",
        ),
        (
            pools(
                r#"[{"name":"a","directory":"/a","nodeSelector":{"b":"c"}},{"name":"b","directory":"/a"}]"#,
            ),
            "share the directory /a",
        ),
        (
            classes(r#"[{"name":"a"},{"name":"a"}]"#),
            "two are called a",
        ),
        (
            classes(r#"[{"name":"a","default":true},{"name":"b","default":true}]"#),
            "only one can be the default",
        ),
        (
            classes(r#"[{"name":"a","parameters":{"pool":"b"}}]"#),
            "say it as `pool`",
        ),
        (
            classes(r#"[{"name":"a","parameters":{"csi.storage.k8s.io/fstype":"xfs"}}]"#),
            "use `fsType`",
        ),
        (
            classes(r#"[{"name":"a","parameters":{"certificates":"certManager","issuer":"b"}}]"#),
            "set tls.certManager.enabled",
        ),
        (
            classes(r#"[{"name":"a","clientSecret":"b"}]"#),
            "clientSecret is of use only with",
        ),
    ] {
        let refused = template(&["--set-json", &json]).expect_err(&json);
        assert!(refused.contains(told), "{json}: {refused}");
    }
    let refused = template(&["--set=networkPolicy.enabled=true,metrics.enabled=true"]).unwrap_err();
    assert!(refused.contains("networkPolicy.scrapers"), "{refused}");
    let refused = template(&[
        "--set=tls.certManager.enabled=true",
        "--set-json",
        r#"storageClasses=[{"name":"a","parameters":{"certificates":"certManager"}}]"#,
    ]);
    let refused = refused.unwrap_err();
    assert!(refused.contains("parameters.issuer"), "{refused}");
}

#[test]
fn one_set_gives_every_value_another_than_its_default() {
    let schema = schema();
    let text = fs::read_to_string(source("tests/chart/values/everything.yaml")).unwrap();
    let everything = yaml(&text).remove(0);
    let defaults = defaults();
    let (mut all, mut given_paths) = (BTreeSet::new(), BTreeSet::new());
    known(&schema, &schema, "", &mut all);
    given(&schema, &schema, &everything, "", &mut given_paths);
    all.retain(|path| path != ".global" && !path.ends_with(".resources.claims"));
    for path in &all {
        // The first has one value only; with another one of the second there would be nothing to roll, and with one of the
        // third everything would be scraped twice.
        let fixed = [
            ".controller.updateStrategy.type",
            ".metrics.podMonitor.enabled",
        ];
        if path.ends_with("maxSurge") || fixed.contains(&path.as_str()) {
            continue;
        }
        assert!(given_paths.contains(path), "everything.yaml lacks {path}");
        let pointer = path.replace('.', "/");
        assert_ne!(
            everything.pointer(&pointer),
            defaults.pointer(&pointer),
            "{path}"
        );
    }
}

/// Helm's own judgement, with warnings as errors.
#[test]
fn every_set_of_values_passes_helms_lint() {
    for (name, arguments) in value_sets() {
        let mut helm = program("helm");
        helm.args(["lint", "--strict", "--namespace", "hawser-system"])
            .arg(source("charts/hawser"))
            .args(arguments);
        if let Err(said) = run(&mut helm, "") {
            panic!("{name}: {said}");
        }
    }
}

#[test]
fn the_suites_of_helm_unittest_pass() {
    let mut unittest = program("helm-unittest");
    unittest.arg("--strict").arg(source("charts/hawser"));
    let said = run(&mut unittest, "").unwrap_or_else(|said| panic!("{said}"));
    assert!(said.contains("Charts:      1 passed, 1 total"), "{said}");
}

/// Nothing depends on what the release is called, or where it is.
#[test]
fn another_release_in_another_namespace_is_the_same_driver_there() {
    let mut helm = program("helm");
    helm.args(["template", "storage", "--namespace", "kube-storage"])
        .arg(source("charts/hawser"))
        .args(["--set=metrics.enabled=true,metrics.serviceMonitor.enabled=true"]);
    let text = run(&mut helm, "").unwrap();
    assert!(!text.contains("hawser-system"), "{text}");
    let arguments = ["--set=metrics.enabled=true,metrics.serviceMonitor.enabled=true"];
    let usual = template(&arguments).unwrap();
    let names = |text: &str| -> Vec<(Value, Value)> {
        let mut names: Vec<_> = yaml(text)
            .iter()
            .map(|object| (object["kind"].clone(), object["metadata"]["name"].clone()))
            .collect();
        names.sort_by_key(|(kind, name)| (kind.to_string(), name.to_string()));
        names
    };
    assert_eq!(names(&text), names(&usual));
    // The same text, but for the two names.
    let renamed = text
        .replace("kube-storage", "hawser-system")
        .replace("instance: storage", "instance: hawser");
    assert_eq!(renamed, usual);
}

#[test]
fn no_two_objects_have_one_name() {
    for_each_set(|set, objects| {
        let mut seen = BTreeSet::new();
        for object in objects {
            let key = (
                object["kind"].to_string(),
                object["metadata"]["name"].to_string(),
            );
            assert!(seen.insert(key.clone()), "{set}: {key:?}");
        }
    });
}

#[test]
fn every_namespaced_object_is_in_the_namespace_of_the_release() {
    for_each_set(|set, objects| {
        for object in objects {
            let clusterwide = [
                "CSIDriver",
                "ClusterRole",
                "ClusterRoleBinding",
                "NbdPool",
                "StorageClass",
            ];
            let kind = object["kind"].as_str().unwrap();
            let namespace = &object["metadata"]["namespace"];
            if clusterwide.contains(&kind) {
                assert_eq!(namespace, &Value::Null, "{set}: {kind}");
            } else {
                assert_eq!(namespace, crate::tool::NAMESPACE, "{set}: {kind}");
            }
        }
    });
}
