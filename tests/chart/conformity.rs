//! What is rendered is what the API server takes, by the schemas that it publishes, strictly.
//!
//! The schemas come from the source of Kubernetes, which the tools are built from anyhow, and from our own
//! CustomResourceDefinitions: no download knows the version that we test with.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use serde_json::{Value, json};

use crate::tool::{program, run, source, template, value_sets, yaml};

/// A folder with a schema for each kind.
static SCHEMAS: LazyLock<PathBuf> = LazyLock::new(|| {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("chart-schemas");
    fs::create_dir_all(&folder).unwrap();
    kubernetes(&folder);
    ours(&folder);
    operators(&folder);
    folder
});

fn write(path: &Path, schema: &Value) {
    fs::write(path, serde_json::to_vec(schema).unwrap()).unwrap();
}

/// `{{ .ResourceKind }}-{{ .Group }}-{{ .ResourceAPIVersion }}`, as kubeconform is told to look for it. To it the group
/// of what has none is its version.
fn file_name(kind: &str, group: &str, version: &str) -> String {
    let group = if group.is_empty() { version } else { group };
    format!("{kind}-{group}-{version}.json").to_lowercase()
}

/// The kinds of Kubernetes itself: each file refers to the definitions in one.
fn kubernetes(folder: &Path) {
    let mut list = Command::new("go");
    list.args(["list", "-m", "-f", "{{.Dir}}", "k8s.io/kubernetes"])
        .current_dir(source("tests/cluster/tools"));
    let module = run(&mut list, "").unwrap();
    let path = Path::new(module.trim()).join("api/openapi-spec/swagger.json");
    let text = fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut specification: Value = serde_json::from_slice(&text).unwrap();
    let mut definitions = specification["definitions"].take();
    for (name, definition) in definitions.as_object_mut().unwrap() {
        let kinds = definition["x-kubernetes-group-version-kind"].take();
        // Others are no objects of their own, or everywhere, as DeleteOptions is.
        let Some([kind]) = kinds.as_array().map(Vec::as_slice) else {
            continue;
        };
        let text = |key: &str| kind[key].as_str().unwrap();
        let file = file_name(text("kind"), text("group"), text("version"));
        let reference = format!("definitions.json#/definitions/{name}");
        write(&folder.join(file), &json!({"$ref": reference}));
    }
    close(&mut definitions);
    // Numbers too are good quantities, and ports.
    for name in [
        "io.k8s.apimachinery.pkg.util.intstr.IntOrString",
        "io.k8s.apimachinery.pkg.api.resource.Quantity",
    ] {
        assert!(definitions[name].is_object(), "{name}");
        definitions[name] = json!({"type": ["string", "number"]});
    }
    write(
        &folder.join("definitions.json"),
        &json!({"definitions": definitions}),
    );
}

/// The kinds of our own CustomResourceDefinitions.
fn ours(folder: &Path) {
    for entry in fs::read_dir(source("charts/hawser/crds")).unwrap() {
        let text = fs::read_to_string(entry.unwrap().path()).unwrap();
        for definition in yaml(&text) {
            let spec = &definition["spec"];
            let (kind, group) = (&spec["names"]["kind"], &spec["group"]);
            for version in spec["versions"].as_array().unwrap() {
                let mut schema = version["schema"]["openAPIV3Schema"].clone();
                close(&mut schema);
                schema["properties"]["metadata"] = json!({
                    "$ref": "definitions.json#/definitions/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta",
                });
                for key in ["apiVersion", "kind"] {
                    schema["properties"][key] = json!({"type": "string"});
                }
                let name = file_name(
                    kind.as_str().unwrap(),
                    group.as_str().unwrap(),
                    version["name"].as_str().unwrap(),
                );
                write(&folder.join(name), &schema);
            }
        }
    }
}

/// The kinds of the Prometheus operator, as far as the chart uses them. Their schemas are written by hand after the
/// operator's API (monitoring.coreos.com/v1), and are stricter: what is not in them is refused.
fn operators(folder: &Path) {
    for entry in fs::read_dir(source("tests/chart/schemas")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, folder.join(path.file_name().unwrap())).unwrap();
    }
}

/// Refuses, in every object below `schema` whose properties are known, all others: as the API server does where it is
/// asked to be strict.
fn close(schema: &mut Value) {
    match schema {
        Value::Array(items) => items.iter_mut().for_each(close),
        Value::Object(members) => {
            members.values_mut().for_each(close);
            let is_object = members.get("properties").is_some_and(Value::is_object)
                && members.get("type").is_some_and(|kind| kind == "object");
            let open = members.contains_key("x-kubernetes-preserve-unknown-fields")
                || members.contains_key("additionalProperties");
            if is_object && !open {
                members.insert("additionalProperties".to_owned(), false.into());
            }
            // A null is a field that is not there.
            if members
                .get("nullable")
                .is_some_and(|nullable| nullable == true)
                && let Some(kind) = members.remove("type")
            {
                members.insert("type".to_owned(), json!([kind, "null"]));
            }
        }
        _ => {}
    }
}

/// What kubeconform finds wrong in `manifests`.
fn conform(manifests: &str) -> Result<(), String> {
    let mut location = SCHEMAS.display().to_string();
    location += "/{{ .ResourceKind }}-{{ .Group }}-{{ .ResourceAPIVersion }}.json";
    let mut kubeconform = program("kubeconform");
    kubeconform.args(["-summary", "-schema-location", &location]);
    run(&mut kubeconform, manifests).map(drop)
}

#[test]
fn every_set_of_values_renders_what_the_api_server_takes() {
    for (name, arguments) in value_sets() {
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        if let Err(said) = conform(&template(&arguments).unwrap()) {
            panic!("{name}: {said}");
        }
    }
}

#[test]
fn the_manifests_in_deploy_are_what_the_api_server_takes() {
    let mut files = 0;
    for folder in ["deploy", "deploy/examples"] {
        for entry in fs::read_dir(source(folder)).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_none_or(|extension| extension != "yaml") {
                continue;
            }
            let text = fs::read_to_string(&path).unwrap();
            if let Err(said) = conform(&without_foreign(&text)) {
                panic!("{}: {said}", path.display());
            }
            files += 1;
        }
    }
    assert!(files >= 7, "{files}");
}

/// Without the objects of cert-manager, whose schemas are not ours to keep.
fn without_foreign(text: &str) -> String {
    text.split("\n---\n")
        .filter(|document| !document.contains("apiVersion: cert-manager.io/"))
        .collect::<Vec<_>>()
        .join("\n---\n")
}

#[test]
fn a_mistake_is_found() {
    let wrong = "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: a, labells: {}}\n";
    let said = conform(wrong).unwrap_err();
    assert!(said.contains("labells"), "{said}");
    let wrong =
        "apiVersion: hawser.dev/v1alpha1\nkind: NbdPool\nmetadata: {name: a}\nspec: {nodes: {}}\n";
    let said = conform(wrong).unwrap_err();
    assert!(said.contains("nodes"), "{said}");
}
