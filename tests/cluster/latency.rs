//! What lies between a claim and its running pod, step by step, and how long reads stand still when a server is killed.
//!
//! Objects are looked at every few milliseconds, and a step is over when they show it. A node here is a user-mode Linux with
//! one slow processor, so the shares count.

use std::collections::BTreeMap;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::driver::NAMESPACE;
use super::kubectl::{Kubectl, PATIENCE, is_ready};
use super::report::say;
use super::spread::Spread;
use super::testbed::Testbed;
use super::workload::{self, CLASS, Usage};

/// Where the pods are: not where the volumes are kept.
const NODE: &str = "node2";

const PAUSE: Duration = Duration::from_millis(10);

/// Until the reads go on as if nothing had been before.
const SETTLED: Duration = Duration::from_secs(5);

/// Milliseconds, by what they were spent on, in the order of the steps.
type Times = BTreeMap<String, Vec<f64>>;

/// What there is of one volume.
struct Look {
    claim: Option<Value>,
    pod: Option<Value>,
    volume: Option<Value>,
    server: Option<Value>,
    attachment: Option<Value>,
}

/// Whether a step is over.
type IsOver = fn(&Look) -> bool;

/// The steps, in their order.
const STEPS: &[(&str, IsOver)] = &[
    ("the pod and its claim are there", |look| look.pod.is_some()),
    ("CreateVolume: the volume is recorded", |look| {
        look.volume.is_some()
    }),
    ("CreateVolume: its backing store is made", |look| {
        has_condition(&look.volume, "BackingReady")
    }),
    ("CreateVolume: its certificates are made", |look| {
        has_condition(&look.volume, "CertificatesReady")
    }),
    ("CreateVolume: its server's pod is made", |look| {
        look.server.is_some()
    }),
    ("CreateVolume: its server's container runs", |look| {
        runs(&look.server)
    }),
    ("CreateVolume: its server is ready", |look| {
        has_condition(&look.volume, "ServerReady")
    }),
    ("CreateVolume: the claim is bound", |look| {
        is(&look.claim, "/status/phase", "Bound")
    }),
    ("the scheduler has placed the pod", |look| {
        has_condition(&look.pod, "PodScheduled")
    }),
    ("ControllerPublish is asked for", |look| {
        look.attachment.is_some()
    }),
    ("ControllerPublish", |look| {
        let attached = look.attachment.as_ref();
        attached.is_some_and(|attached| attached["status"]["attached"] == true)
    }),
    ("NodeStage, NodePublish, and the container runs", |look| {
        runs(&look.pod)
    }),
    ("the pod is ready", |look| {
        look.pod.as_ref().is_some_and(is_ready)
    }),
];

/// Lets so many volumes live, one after the other, and prints the table.
pub(crate) fn measure(testbed: &Testbed, repetitions: usize) -> Result<()> {
    let kubectl = testbed.namespace("latency")?;
    let mut times = Times::new();
    for repetition in 0..repetitions {
        let mut note = |step: &str, milliseconds: f64| {
            times.entry(step.to_owned()).or_default().push(milliseconds);
        };
        let name = format!("volume-{repetition}");
        let volume = from_claim_to_pod(&kubectl, &name, &mut note)?;
        for (step, milliseconds) in staging(testbed, &volume)? {
            note(&format!("{STAGE}{step}"), milliseconds);
        }
        note(
            "server's pod killed: the longest read",
            failover(&kubectl, &name, &volume)?,
        );
        let began = Instant::now();
        kubectl.run(&["delete", "pod,pvc", &name, "--wait=true"])?;
        kubectl
            .in_namespace(NAMESPACE)
            .until_gone("nbdvolume", &volume)?;
        note("pod and claim deleted, nothing left", milliseconds(began));
    }
    say(&format!(
        "milliseconds, median (least-most) of {repetitions}:"
    ));
    for (step, samples) in &times {
        if let Some(spread) = Spread::of(samples.iter().copied()) {
            say(&format!(
                "{step:<60}{:>9.0} ({:.0}-{:.0})",
                spread.median, spread.least, spread.most
            ));
        }
    }
    Ok(())
}

/// Within the step that ends with the running container.
const STAGE: &str = "11.1 of it, NodeStage: ";

fn from_claim_to_pod(
    kubectl: &Kubectl,
    name: &str,
    note: &mut impl FnMut(&str, f64),
) -> Result<String> {
    let manifests = workload::claim(name, CLASS, Usage::FileSystem)
        + &workload::pod(name, NODE, name, Usage::FileSystem);
    thread::scope(|scope| {
        let apply = scope.spawn(|| kubectl.apply(&manifests));
        let mut began = Instant::now();
        let mut last = began;
        for (index, (step, is_over)) in STEPS.iter().enumerate() {
            let look = loop {
                let look = look(kubectl, name)?;
                if is_over(&look) {
                    break look;
                }
                ensure!(began.elapsed() < PATIENCE, "{name}, not yet: {step}");
                thread::sleep(PAUSE);
            };
            if index == 0 {
                // What kubectl takes to start is not the driver's.
                (began, last) = (Instant::now(), Instant::now());
                continue;
            }
            note(&format!("{index:02} {step}"), milliseconds(last));
            last = Instant::now();
            if index + 1 == STEPS.len() {
                note("from the pod to its being ready", milliseconds(began));
                let volume = look.volume.context("the volume is gone")?;
                apply.join().map_err(|_| anyhow::anyhow!("kubectl"))??;
                let id = volume["metadata"]["name"].as_str();
                return Ok(id.context("an NbdVolume has a name")?.to_owned());
            }
        }
        anyhow::bail!("there are no steps")
    })
}

fn look(kubectl: &Kubectl, name: &str) -> Result<Look> {
    let ours = kubectl.in_namespace(NAMESPACE);
    let claim = kubectl.object("pvc", name)?;
    let pod = kubectl.object("pod", name)?;
    let uid = claim
        .as_ref()
        .and_then(|claim| claim["metadata"]["uid"].as_str());
    let volume_name = uid.map(|uid| format!("pvc-{uid}")).unwrap_or_default();
    let volumes = ours.objects("nbdvolume", "")?;
    let volume = volumes
        .into_iter()
        .find(|volume| volume["spec"]["name"] == volume_name.as_str());
    let id = volume
        .as_ref()
        .and_then(|volume| volume["metadata"]["name"].as_str());
    let server = match id {
        Some(id) => {
            let servers = ours.objects("pod", &format!("hawser.dev/volume={id}"))?;
            servers.into_iter().next()
        }
        None => None,
    };
    let attachments = kubectl.objects("volumeattachment", "")?;
    let attachment = attachments.into_iter().find(|attachment| {
        attachment["spec"]["source"]["persistentVolumeName"] == volume_name.as_str()
    });
    Ok(Look {
        claim,
        pod,
        volume,
        server,
        attachment,
    })
}

fn has_condition(object: &Option<Value>, kind: &str) -> bool {
    let conditions = object
        .as_ref()
        .map(|object| &object["status"]["conditions"]);
    conditions
        .and_then(Value::as_array)
        .is_some_and(|conditions| {
            conditions
                .iter()
                .any(|condition| condition["type"] == kind && condition["status"] == "True")
        })
}

fn is(object: &Option<Value>, path: &str, wanted: &str) -> bool {
    let found = object.as_ref().and_then(|object| object.pointer(path));
    found.is_some_and(|found| found == wanted)
}

fn runs(pod: &Option<Value>) -> bool {
    let running = "/status/containerStatuses/0/state/running";
    pod.as_ref()
        .is_some_and(|pod| pod.pointer(running).is_some_and(|state| !state.is_null()))
}

/// The steps of the volume's staging, as the node part has logged them.
fn staging(testbed: &Testbed, volume: &str) -> Result<Vec<(String, f64)>> {
    let mut steps = Vec::new();
    for folder in fs::read_dir(testbed.logs.join(format!("{NODE}-pods")))? {
        let folder = folder?.path();
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        if !name.starts_with(&format!("{NAMESPACE}_hawser-node")) {
            continue;
        }
        for container in fs::read_dir(&folder)? {
            for file in fs::read_dir(container?.path())? {
                for line in fs::read_to_string(file?.path())?.lines() {
                    if line.contains(volume) {
                        steps.extend(steps_in(line));
                    }
                }
            }
        }
    }
    ensure!(
        !steps.is_empty(),
        "the node part has no staging of {volume} in its log"
    );
    Ok(steps)
}

/// `steps=NAME 1.0 ms, NAME 2.0 ms` and `NAME_ms=3`, as a line of the log has them in one of its formats.
fn steps_in(line: &str) -> Vec<(String, f64)> {
    let mut steps = Vec::new();
    let listed = line
        .split_once("steps=")
        .or_else(|| line.split_once("\"steps\":\""));
    for step in listed.map_or("", |(_, listed)| listed).split(", ") {
        let mut words = step.rsplitn(3, ' ');
        let (unit, number, name) = (words.next(), words.next(), words.next());
        if let (Some(unit), Some(number), Some(name)) = (unit, number, name)
            && unit.starts_with("ms")
            && let Ok(number) = number.parse()
        {
            steps.push((name.to_owned(), number));
        }
    }
    for word in line.split([' ', ',', '{', '}']) {
        let word = word.replace('"', "").replace(':', "=");
        if let Some((name, number)) = word.split_once("_ms=")
            && let Ok(number) = number.parse()
        {
            steps.push((format!("attach, {name}"), number));
        }
    }
    steps
}

/// Reads without a pause while the server's pod is killed; the longest of them, in milliseconds.
fn failover(kubectl: &Kubectl, pod: &str, volume: &str) -> Result<f64> {
    let ours = kubectl.in_namespace(NAMESPACE);
    let selector = format!("hawser.dev/volume={volume}");
    kubectl.exec(
        pod,
        "dd if=/dev/urandom of=/data/file bs=1M count=8 conv=fsync 2>/dev/null",
    )?;
    let reads = "fio --name=reads --filename=/data/file --size=8m --readonly --rw=randread --bs=4k --direct=1 \
        --ioengine=psync --time_based --runtime=30 --output-format=json";
    let printed = thread::scope(|scope| -> Result<String> {
        let reads = scope.spawn(|| kubectl.exec(pod, reads));
        thread::sleep(SETTLED);
        ours.run(&[
            "delete",
            "pod",
            "--selector",
            &selector,
            "--force",
            "--grace-period=0",
        ])?;
        reads.join().map_err(|_| anyhow::anyhow!("fio"))?
    })?;
    let printed: Value = serde_json::from_str(printed.trim())?;
    let longest = printed
        .pointer("/jobs/0/read/clat_ns/max")
        .and_then(Value::as_f64);
    ours.until_pods_ready(&selector, 1)?;
    Ok(longest.context("fio says nothing of latency")? / 1e6)
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}
