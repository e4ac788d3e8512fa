//! Certificates that are one's own, that are lost, and that are over.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};

use super::{Scenario, When};
use crate::driver::NAMESPACE;
use crate::kubectl::Kubectl;
use crate::process::output;
use crate::report::step;
use crate::testbed::Testbed;
use crate::workload::{self, CLASS, Usage};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario::new("certificates::own_ones", When::SideBySide, own_ones),
    Scenario::new(
        "certificates::secrets_lost_while_in_use",
        When::SideBySide,
        secrets_lost_while_in_use,
    ),
];

/// The client's has expired at first.
fn own_ones(testbed: &Testbed) -> Result<()> {
    let kubectl = testbed.namespace("own-certificates")?;
    let ours = kubectl.in_namespace(NAMESPACE);
    kubectl.apply(&workload::class("own-certificates", "certificates: secret"))?;
    kubectl.apply(&workload::claim(
        "data",
        "own-certificates",
        Usage::FileSystem,
    ))?;
    let claim = kubectl.object("pvc", "data")?.unwrap_or_default();
    let volume = format!(
        "pvc-{}",
        claim["metadata"]["uid"].as_str().unwrap_or_default()
    );
    let digest =
        output(Command::new("sh").args(["-c", "printf %s \"$1\" | sha256sum", "sh", &volume]))?;
    let id = format!("vol-{}", &digest[..32]);
    let folder = tempfile::tempdir()?;
    let (server, client) = (
        format!("DNS:{id}.server.hawser.dev"),
        format!("DNS:{id}.client.hawser.dev"),
    );
    make_certificates(folder.path(), &server, &client)?;
    let secrets = [
        (format!("{id}-server"), "server"),
        (format!("{volume}-hawser-client"), "client"),
    ];
    put_secret(&ours, &secrets[0].0, folder.path(), "server")?;
    put_secret(&ours, &secrets[1].0, folder.path(), "late")?;
    kubectl.apply(&workload::pod("pod", "node2", "data", Usage::FileSystem))?;
    step(
        "an Event on the pod tells that its certificate is over",
        || kubectl.until_event("Pod", "pod", &["node-stage Secret", "ended at", "renew it"]),
    )?;
    put_secret(&ours, &secrets[1].0, folder.path(), "client")?;
    step("the pod has its volume with the next one", || {
        kubectl.until_pod_ready("pod")
    })?;
    workload::write_something(&kubectl, "pod", Usage::FileSystem)?;
    ensure!(
        workload::volume_id(&kubectl, "data")? == id,
        "the volume has another id"
    );
    testbed.delete_namespace(&kubectl)?;
    kubectl.run(&["delete", "storageclass", "own-certificates"])?;
    step("the volume is gone, and the Secrets are not", || {
        ours.until_gone("nbdvolume", &id)
    })?;
    for (secret, _) in &secrets {
        ours.run(&["delete", "secret", secret])?;
    }
    Ok(())
}

/// An authority, a server's certificate and a client's, for the names given, and a client's that is over.
const CERTIFICATES: &str = r#"
set -e
cd "$1"
new() { openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes "$@" 2>/dev/null; }
new -x509 -days 2 -subj /CN=authority -keyout ca.key -out ca-cert.pem
certify() {
    new -subj "/CN=$1" -keyout "$1-key.pem" -out "$1.csr"
    printf 'subjectAltName=%s\nextendedKeyUsage=%sAuth\n' "$3" "$2" >"$1.ext"
    openssl x509 -req -days "$4" -in "$1.csr" -CA ca-cert.pem -CAkey ca.key -CAcreateserial -extfile "$1.ext" \
        -out "$1-cert.pem" 2>/dev/null
}
certify server server "$2" 2
certify client client "$3" 2
certify late client "$3" -1
"#;

pub(super) fn make_certificates(folder: &Path, server: &str, client: &str) -> Result<()> {
    output(
        Command::new("sh")
            .args(["-c", CERTIFICATES, "sh"])
            .arg(folder)
            .args([server, client]),
    )
    .map(drop)
}

/// Makes a Secret, or puts other contents into it.
pub(super) fn put_secret(kubectl: &Kubectl, name: &str, folder: &Path, who: &str) -> Result<()> {
    let file = |key: &str, name: &str| format!("--from-file={key}={}", folder.join(name).display());
    let manifest = kubectl.run(&[
        "create",
        "secret",
        "generic",
        name,
        "--type=kubernetes.io/tls",
        "--dry-run=client",
        "--output=yaml",
        &file("tls.key", &format!("{who}-key.pem")),
        &file("tls.crt", &format!("{who}-cert.pem")),
        &file("ca.crt", "ca-cert.pem"),
    ])?;
    kubectl.apply(&manifest)
}

/// I/O goes on, they are issued again, and the next attach works; one that somebody put in their place is not overwritten,
/// and the object says what is wrong with it.
fn secrets_lost_while_in_use(testbed: &Testbed) -> Result<()> {
    let kubectl = testbed.namespace("secrets")?;
    let ours = kubectl.in_namespace(NAMESPACE);
    kubectl.apply(&workload::claim("data", CLASS, Usage::FileSystem))?;
    kubectl.apply(&workload::pod("first", "node2", "data", Usage::FileSystem))?;
    step("a pod has its volume", || kubectl.until_pod_ready("first"))?;
    let id = workload::volume_id(&kubectl, "data")?;
    let claim = kubectl.object("pvc", "data")?.unwrap_or_default();
    let volume = claim["spec"]["volumeName"].as_str().unwrap_or_default();
    let secrets = [format!("{id}-server"), format!("{volume}-hawser-client")];
    let uid = |secret: &str| -> Result<String> {
        let object = ours.object("secret", secret)?.unwrap_or_default();
        Ok(object["metadata"]["uid"]
            .as_str()
            .unwrap_or_default()
            .to_owned())
    };
    for secret in &secrets {
        let before = uid(secret)?;
        ours.delete("secret", secret)?;
        step("a Secret that was deleted is issued again", || {
            ours.until("secret", secret, "is another one", |secret| {
                secret["metadata"]["uid"] != before.as_str()
            })
        })?;
    }
    let written = step("I/O goes on", || {
        workload::write_something(&kubectl, "first", Usage::FileSystem)
    })?;
    let folder = tempfile::tempdir()?;
    make_certificates(
        folder.path(),
        "DNS:server.example.org",
        "DNS:client.example.org",
    )?;
    put_secret(&ours, &secrets[0], folder.path(), "server")?;
    step("one of somebody else's is said to be wrong", || {
        ours.until("nbdvolume", &id, "says so", |volume| {
            let conditions = volume["status"]["conditions"].to_string();
            conditions.contains("SecretUnusable") && conditions.contains("to have it issued again")
        })
    })?;
    ours.delete("secret", &secrets[0])?;
    kubectl.delete("pod", "first")?;
    kubectl.apply(&workload::pod("second", "node1", "data", Usage::FileSystem))?;
    step("the next attach works", || {
        kubectl.until_pod_ready("second")
    })?;
    let read = workload::digest(&kubectl, "second", Usage::FileSystem)?;
    ensure!(read == written, "the second pod reads something else");
    testbed.delete_namespace(&kubectl)
}
