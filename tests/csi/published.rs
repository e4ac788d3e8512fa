//! `proto/csi.proto` and `proto/pluginregistration.proto` are written anew; these tests prove them equal, on the wire, to
//! what was published.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use protox::prost_reflect::{
    DescriptorPool, DynamicMessage, EnumDescriptor, ExtensionDescriptor, FieldDescriptor,
    MessageDescriptor, ServiceDescriptor,
};

/// A definition that is published in a Go module.
struct Published {
    module: &'static str,
    version: &'static str,
    /// Where in the module, and what the file is called there.
    directory: &'static str,
    file: &'static str,
    package: &'static str,
    /// The file of ours.
    ours: &'static str,
    /// How many services and methods it has, so that an empty comparison cannot pass.
    size: (usize, usize),
}

const CSI: Published = Published {
    module: "github.com/container-storage-interface/spec",
    version: "v1.13.0",
    directory: "",
    file: "csi.proto",
    package: "csi.v1",
    ours: "csi.proto",
    size: (5, 36),
};

const REGISTRATION: Published = Published {
    module: "k8s.io/kubelet",
    version: "v0.37.2",
    directory: "pkg/apis/pluginregistration/v1",
    file: "api.proto",
    package: "pluginregistration",
    ours: "pluginregistration.proto",
    size: (1, 2),
};

/// The directory of a published module, from Go's module cache or its proxy.
fn fetch(module: &str, version: &str) -> Result<PathBuf> {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Download {
        dir: Option<PathBuf>,
        error: Option<String>,
    }

    let output = Command::new("go")
        .args(["mod", "download", "-json"])
        .arg(format!("{module}@{version}"))
        .current_dir(std::env::temp_dir())
        .output()
        .context("go is needed to fetch the published definition: install golang-go")?;
    let download: Download = serde_json::from_slice(&output.stdout)
        .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    match download {
        Download { dir: Some(dir), .. } => Ok(dir),
        Download { error, .. } => bail!("{module}@{version} cannot be fetched: {error:?}"),
    }
}

fn ours() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("proto")
}

/// Every fact about the definition in `directory` that shows on the wire, in JSON or in options: one line each.
fn facts(directory: &Path, file: &str, package: &str) -> Result<BTreeSet<String>> {
    let pool = protox::Compiler::new([directory])?
        .include_imports(true)
        .open_file(file)?
        .descriptor_pool();
    Ok(facts_of(&pool, package))
}

fn facts_of(pool: &DescriptorPool, package: &str) -> BTreeSet<String> {
    let mut facts = BTreeSet::new();
    for message in pool.all_messages().filter(|m| m.package_name() == package) {
        facts.extend(message_facts(&message));
    }
    for enumeration in pool.all_enums().filter(|e| e.package_name() == package) {
        facts.extend(enum_facts(&enumeration));
    }
    for service in pool.services().filter(|s| s.package_name() == package) {
        facts.extend(service_facts(&service));
    }
    for extension in pool
        .all_extensions()
        .filter(|e| e.package_name() == package)
    {
        facts.insert(extension_fact(&extension));
    }
    for file in pool.files().filter(|f| f.package_name() == package) {
        facts.insert(format!(
            "file syntax={:?}{}",
            file.syntax(),
            options(&file.options())
        ));
    }
    facts
}

fn message_facts(message: &MessageDescriptor) -> Vec<String> {
    let name = message.full_name();
    let mut facts = vec![format!(
        "message {name} map={} reserved={:?} {:?}{}",
        message.is_map_entry(),
        message.reserved_ranges().collect::<Vec<_>>(),
        message.reserved_names().collect::<Vec<_>>(),
        options(&message.options())
    )];
    facts.extend(message.fields().map(|field| field_fact(&field)));
    facts
}

fn field_fact(field: &FieldDescriptor) -> String {
    format!(
        "field {} = {} {:?} {:?} json={} packed={} presence={} oneof={:?}{}",
        field.full_name(),
        field.number(),
        field.cardinality(),
        field.kind(),
        field.json_name(),
        field.is_packed(),
        field.supports_presence(),
        field.containing_oneof().map(|o| o.full_name().to_owned()),
        options(&field.options())
    )
}

fn extension_fact(extension: &ExtensionDescriptor) -> String {
    format!(
        "extension {} of {} = {} {:?} {:?} json={}{}",
        extension.full_name(),
        extension.containing_message().full_name(),
        extension.number(),
        extension.cardinality(),
        extension.kind(),
        extension.json_name(),
        options(&extension.options())
    )
}

fn enum_facts(enumeration: &EnumDescriptor) -> Vec<String> {
    let mut facts = vec![format!(
        "enum {} reserved={:?} {:?}{}",
        enumeration.full_name(),
        enumeration.reserved_ranges().collect::<Vec<_>>(),
        enumeration.reserved_names().collect::<Vec<_>>(),
        options(&enumeration.options())
    )];
    facts.extend(enumeration.values().map(|value| {
        format!(
            "value {} {} = {}{}",
            enumeration.full_name(),
            value.name(),
            value.number(),
            options(&value.options())
        )
    }));
    facts
}

fn service_facts(service: &ServiceDescriptor) -> Vec<String> {
    let mut facts = vec![format!(
        "service {}{}",
        service.full_name(),
        options(&service.options())
    )];
    facts.extend(service.methods().map(|method| {
        format!(
            "method {}({} stream={}) -> {} stream={}{}",
            method.full_name(),
            method.input().full_name(),
            method.is_client_streaming(),
            method.output().full_name(),
            method.is_server_streaming(),
            options(&method.options())
        )
    }));
    facts
}

/// The options that are set, extensions among them.
fn options(message: &DynamicMessage) -> String {
    let mut set: Vec<String> = message
        .fields()
        .map(|(field, value)| format!(" [{}={value:?}]", field.name()))
        .chain(
            message
                .extensions()
                .map(|(extension, value)| format!(" [{}={value:?}]", extension.full_name())),
        )
        .collect();
    set.sort();
    set.concat()
}

fn check(definition: &Published) -> Result<()> {
    let Published { file, package, .. } = *definition;
    let directory = fetch(definition.module, definition.version)?.join(definition.directory);
    let published = facts(&directory, file, package)?;
    let ours = facts(&ours(), definition.ours, package)?;
    let missing: Vec<_> = published.difference(&ours).collect();
    let surplus: Vec<_> = ours.difference(&published).collect();
    assert!(
        missing.is_empty() && surplus.is_empty(),
        "published, but not ours: {missing:#?}\nours, but not published: {surplus:#?}"
    );
    let count = |kind: &str| ours.iter().filter(|fact| fact.starts_with(kind)).count();
    assert_eq!((count("service "), count("method ")), definition.size);
    Ok(())
}

#[test]
fn our_csi_is_the_published_one() -> Result<()> {
    check(&CSI)
}

#[test]
fn our_registration_is_the_published_one() -> Result<()> {
    check(&REGISTRATION)
}

#[test]
fn a_changed_definition_is_noticed() -> Result<()> {
    let text = std::fs::read_to_string(ours().join("csi.proto"))?;
    let facts = |directory: &Path| facts(directory, CSI.ours, CSI.package);
    let original = facts(&ours())?;
    for (from, to) in [
        (
            "  string vendor_version = 2;",
            "  string vendor_version = 9;",
        ),
        (
            "  string vendor_version = 2;",
            "  bytes vendor_version = 2;",
        ),
        (
            "  string vendor_version = 2;",
            "  repeated string vendor_version = 2;",
        ),
        (
            "  string vendor_version = 2;",
            "  optional string vendor_version = 2;",
        ),
        (
            "  string vendor_version = 2;",
            "  string vendor_version = 2 [json_name = \"v\"];",
        ),
        (
            "map<string, string> secrets = 5 [(csi_secret) = true]",
            "map<string, string> secrets = 5",
        ),
        ("      LIST_VOLUMES = 3;", "      LIST_VOLUMES = 30;"),
        (
            "returns (ProbeResponse);",
            "returns (stream ProbeResponse);",
        ),
        ("rpc Probe(ProbeRequest)", "rpc Prove(ProbeRequest)"),
        ("  option (alpha_service) = true;\n", ""),
        ("      reserved 11;\n", ""),
        ("bool csi_secret = 1059;", "bool csi_secret = 1058;"),
    ] {
        let directory = tempfile::tempdir()?;
        let changed = text.replacen(from, to, 1);
        assert_ne!(changed, text, "{from}");
        std::fs::write(directory.path().join("csi.proto"), changed)?;
        assert_ne!(facts(directory.path())?, original, "{from} -> {to}");
    }
    Ok(())
}
