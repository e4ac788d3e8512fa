use serde_json::Value;

use super::*;
use crate::kube::manifests;

/// Keywords of a schema that a structural schema has not, or that the API server does not know.
const FORBIDDEN: [&str; 12] = [
    "$ref",
    "$schema",
    "definitions",
    "$defs",
    "const",
    "patternProperties",
    "dependencies",
    "deprecated",
    "oneOf",
    "anyOf",
    "allOf",
    "exclusiveMinimum",
];

/// Walks a schema, and names what a structural schema must not have.
fn problems(path: &str, schema: &Value, found: &mut Vec<String>) {
    let Some(schema) = schema.as_object() else {
        found.push(format!("{path}: {schema} is no schema"));
        return;
    };
    for word in FORBIDDEN {
        if schema.contains_key(word) {
            found.push(format!("{path}: {word}"));
        }
    }
    let free = schema.contains_key("x-kubernetes-preserve-unknown-fields");
    if !schema.get("type").is_some_and(Value::is_string) && !free {
        found.push(format!("{path}: no type"));
    }
    if let Some(format) = schema.get("format").and_then(Value::as_str)
        && !["int32", "int64", "date-time"].contains(&format)
    {
        found.push(format!("{path}: format {format}"));
    }
    if let Some(properties) = schema.get("properties").and_then(Value::as_object) {
        for (name, property) in properties {
            problems(&format!("{path}.{name}"), property, found);
        }
    }
    for inner in ["items", "additionalProperties"] {
        if let Some(inner_schema) = schema.get(inner) {
            problems(&format!("{path}.{inner}"), inner_schema, found);
        }
    }
}

#[test]
fn crds_are_structural() {
    for definition in definitions() {
        let definition = serde_json::to_value(definition).unwrap();
        let version = &definition["spec"]["versions"][0];
        let mut found = Vec::new();
        let kind = definition["spec"]["names"]["kind"].as_str().unwrap();
        problems(kind, &version["schema"]["openAPIV3Schema"], &mut found);
        assert_eq!(found, Vec::<String>::new());
        assert_eq!(version["subresources"]["status"], serde_json::json!({}));
    }
}

/// The paths of fields of which `kubectl explain` would say nothing.
fn unexplained(path: &str, schema: &serde_json::Value, found: &mut Vec<String>) {
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        let path = format!("{path}.{name}");
        if field["description"].as_str().is_none_or(str::is_empty) {
            found.push(path.clone());
        }
        unexplained(&path, field, found);
    }
    if schema["items"].is_object() {
        unexplained(&format!("{path}[]"), &schema["items"], found);
    }
}

#[test]
fn every_field_explains_itself() {
    let mut found = Vec::new();
    for definition in definitions() {
        let definition = serde_json::to_value(definition).unwrap();
        let schema = &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
        let kind = definition["spec"]["names"]["kind"].as_str().unwrap();
        assert!(schema["description"].is_string(), "{kind}");
        unexplained(kind, schema, &mut found);
    }
    assert_eq!(found, Vec::<String>::new());
}

#[test]
fn the_chart_has_the_crds_of_this_code() {
    assert!(
        manifests::crds().unwrap() == include_str!("../../../charts/hawser/crds/hawser.dev.yaml"),
        "the chart's CRDs are not those of this code; run\n  \
         cargo run --locked -- manifests crds > charts/hawser/crds/hawser.dev.yaml"
    );
}

#[test]
fn a_condition_keeps_its_time_until_its_status_changes() {
    let mut old = condition(&[], READY, Some(false), "Waiting", "wait", Some(1));
    old.last_transition_time = time(1000).unwrap();
    let old = [old];
    let same = condition(&old, READY, Some(false), "Other", "wait more", Some(2));
    assert_eq!(same.last_transition_time, old[0].last_transition_time);
    let changed = condition(&old, READY, Some(true), "Ready", "", Some(2));
    assert_ne!(changed.last_transition_time, old[0].last_transition_time);
    assert!(holds(&[changed], READY) && !holds(&[same], READY) && !holds(&[], READY));
}

#[test]
fn managers_fit_their_limit() {
    assert_eq!(agent_manager("node1"), "hawser-agent-node1");
    assert_eq!(node_manager(&"n".repeat(253)).len(), MANAGER_LIMIT);
}
