//! `hawser controller` against a real API server, with Kubernetes' own controllers and csi-provisioner as processes; the
//! agent and the kubelet are played.
//!
//! `cargo test --test api [NAME]` runs the scenarios whose name has NAME in it. Those with csi-provisioner run one after
//! the other, for each of them would serve the claims of all; the others run beside them, some at a time.

#[path = "../support/api_server.rs"]
mod api_server;
mod certificates;
mod chart;
mod claims;
mod classes;
mod hand;
mod leader;
mod load;
mod parts;
mod pools;
mod quota;
mod rules;
mod scenarios;
mod server;
mod world;

use std::future::Future;
use std::pin::Pin;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use futures::StreamExt;
use hawser::kube::api::{ZONE_KEY, ZONE_LABEL, definitions};
use k8s_openapi::api::core::v1::{Namespace, Node};
use k8s_openapi::api::storage::v1::CSINode;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use serde_json::json;

use server::ApiServer;

type Scenario =
    for<'a> fn(&'a ApiServer, &'a str) -> Pin<Box<dyn Future<Output = Result<()>> + 'a>>;

macro_rules! scenarios {
    ($($module:ident :: $name:ident),+ $(,)?) => {
        vec![$((concat!(stringify!($module), "::", stringify!($name)), (|api, namespace| Box::pin($module::$name(api, namespace))) as Scenario)),+]
    };
}

fn main() -> ExitCode {
    let filter = std::env::args()
        .skip(1)
        .find(|argument| !argument.starts_with('-'));
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    match runtime.block_on(run(filter.as_deref().unwrap_or_default())) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Scenarios without csi-provisioner that run at a time: most of them wait for the time to pass.
const SIDE_BY_SIDE: usize = 3;

async fn run(filter: &str) -> Result<bool> {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let with_provisioner = scenarios![
        classes::a_wrong_class_is_told_on_the_claim,
        quota::a_quota_is_told_and_waited_for,
        load::three_hundred_claims_at_once,
        // With it, cert-manager's API comes and goes for all.
        certificates::cert_manager_is_asked_and_may_go,
    ];
    let others = scenarios![
        leader::a_leader_that_was_stopped_writes_nothing_afterwards,
        leader::a_killed_leader_leaves_nothing_half_made,
        pools::a_place_that_goes_is_told_and_nothing_is_forgotten,
        pools::data_that_nobody_names_is_told_where_people_look,
        certificates::the_authority_is_replaced_without_an_outage,
        certificates::certificates_of_ones_own_that_end_are_told,
        hand::what_was_wiped_or_restored_is_put_right,
        leader::two_controllers_make_one_volume_and_hand_over,
        rules::the_crds_are_taken_and_their_rules_hold,
        scenarios::a_volume_lives_and_goes,
        scenarios::a_detachment_waits_for_the_agents_mark,
        scenarios::secrets_are_issued_again_and_never_overwritten,
        scenarios::what_somebody_changed_by_hand_is_put_right,
        scenarios::volumes_go_where_there_is_room_and_reach,
    ];
    let mut names = Vec::new();
    let mut choose = |all: Vec<(&'static str, Scenario)>| -> Vec<_> {
        let all = all.into_iter().filter(|(name, _)| name.contains(filter));
        all.map(|(name, scenario)| {
            names.push(format!("test-{}", names.len()));
            (name, scenario, names[names.len() - 1].clone())
        })
        .collect()
    };
    let (with_provisioner, others) = (choose(with_provisioner), choose(others));
    if names.is_empty() {
        bail!("no scenario has {filter:?} in its name");
    }
    let folder = tempfile::tempdir()?;
    let api = &ApiServer::start(folder.path(), &names).await?;
    prepare(&api.client).await?;
    let lane = async |scenarios: Vec<(&'static str, Scenario, String)>, at_a_time| {
        futures::stream::iter(scenarios)
            .map(|(name, scenario, namespace)| async move {
                play(api, name, scenario, &namespace).await
            })
            .buffer_unordered(at_a_time)
            .fold(true, async |all, passed| all && passed)
            .await
    };
    let (one, other) = tokio::join!(lane(with_provisioner, 1), lane(others, SIDE_BY_SIDE));
    Ok(one && other)
}

/// Plays one scenario in its namespace, and says what came of it.
async fn play(api: &ApiServer, name: &str, scenario: Scenario, namespace: &str) -> bool {
    let begun = Instant::now();
    let namespaces: Api<Namespace> = Api::all(api.client.clone());
    let object = Namespace {
        metadata: named(namespace),
        ..Namespace::default()
    };
    let result = match namespaces.create(&PostParams::default(), &object).await {
        Ok(_) => scenario(api, namespace).await,
        Err(error) => Err(error.into()),
    };
    let seconds = begun.elapsed().as_secs_f32();
    match &result {
        Ok(()) => println!("test {name} ... ok ({seconds:.1} s)"),
        Err(error) => println!("test {name} ... FAILED ({seconds:.1} s)\n{error:#}"),
    }
    result.is_ok()
}

fn named(name: &str) -> ObjectMeta {
    ObjectMeta {
        name: Some(name.to_owned()),
        ..ObjectMeta::default()
    }
}

/// The CRDs, and two nodes in two zones, on both of which the driver's node part is registered.
async fn prepare(client: &Client) -> Result<()> {
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    for definition in definitions() {
        api.create(&PostParams::default(), &definition)
            .await
            .context("the API server does not take a CRD")?;
    }
    let nodes: Api<Node> = Api::all(client.clone());
    for (node, zone) in [("node-1", "one"), ("node-2", "two")] {
        let mut metadata = named(node);
        let labels = [ZONE_LABEL, ZONE_KEY].map(|key| (key.to_owned(), zone.to_owned()));
        metadata.labels = Some(labels.into());
        let node = Node {
            metadata,
            ..Node::default()
        };
        nodes.create(&PostParams::default(), &node).await?;
    }
    let registered: Api<CSINode> = Api::all(client.clone());
    for node in ["node-1", "node-2"] {
        let node = serde_json::from_value(json!({
            "metadata": { "name": node },
            "spec": { "drivers": [{ "name": "csi.hawser.dev", "nodeID": node, "topologyKeys": [ZONE_KEY] }] },
        }))?;
        registered.create(&PostParams::default(), &node).await?;
    }
    until("the CRDs are served", Duration::from_secs(30), async || {
        let volumes: Api<hawser::kube::api::NbdVolume> = Api::namespaced(client.clone(), "default");
        Ok(volumes
            .list(&Default::default())
            .await
            .is_ok()
            .then_some(()))
    })
    .await
}

/// Asks until there is an answer.
pub(crate) async fn until<T>(
    what: &str,
    within: Duration,
    mut ask: impl AsyncFnMut() -> Result<Option<T>>,
) -> Result<T> {
    let begun = Instant::now();
    loop {
        if let Some(answer) = ask().await? {
            return Ok(answer);
        }
        if begun.elapsed() > within {
            bail!("waited {within:?} in vain until {what}");
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
