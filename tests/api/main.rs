//! `hawser controller` against a real API server: real processes on one side, the agent and the kubelet played on the
//! other.
//!
//! `cargo test --test api [NAME]` runs the scenarios whose name has NAME in it, one after the other.

mod parts;
mod rules;
mod scenarios;
mod server;
mod world;

use std::future::Future;
use std::pin::Pin;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hawser::kube::api::definitions;
use k8s_openapi::api::core::v1::{Namespace, Node};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};

use server::ApiServer;

type Scenario =
    for<'a> fn(&'a ApiServer, &'a str) -> Pin<Box<dyn Future<Output = Result<()>> + 'a>>;

macro_rules! scenarios {
    ($($module:ident :: $name:ident),+ $(,)?) => {
        [$((concat!(stringify!($module), "::", stringify!($name)), (|api, namespace| Box::pin($module::$name(api, namespace))) as Scenario)),+]
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

async fn run(filter: &str) -> Result<bool> {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let all = scenarios![
        rules::the_crds_are_taken_and_their_rules_hold,
        scenarios::a_volume_lives_and_goes,
        scenarios::a_detachment_waits_for_the_agents_mark,
        scenarios::two_controllers_make_one_volume_and_the_second_takes_over,
        scenarios::secrets_are_issued_again_and_never_overwritten,
        scenarios::what_somebody_changed_by_hand_is_put_right,
        scenarios::volumes_go_where_there_is_room_and_reach,
    ];
    let chosen: Vec<_> = all
        .into_iter()
        .filter(|(name, _)| name.contains(filter))
        .collect();
    if chosen.is_empty() {
        bail!("no scenario has {filter:?} in its name");
    }
    let folder = tempfile::tempdir()?;
    let api = ApiServer::start(folder.path()).await?;
    prepare(&api.client).await?;
    let mut all_passed = true;
    for (number, (name, scenario)) in chosen.into_iter().enumerate() {
        let begun = Instant::now();
        let namespace = format!("test-{number}");
        let namespaces: Api<Namespace> = Api::all(api.client.clone());
        namespaces
            .create(
                &PostParams::default(),
                &Namespace {
                    metadata: named(&namespace),
                    ..Namespace::default()
                },
            )
            .await?;
        let result = scenario(&api, &namespace).await;
        let seconds = begun.elapsed().as_secs_f32();
        match result {
            Ok(()) => println!("test {name} ... ok ({seconds:.1} s)"),
            Err(error) => {
                all_passed = false;
                println!("test {name} ... FAILED ({seconds:.1} s)\n{error:?}");
            }
        }
    }
    Ok(all_passed)
}

fn named(name: &str) -> ObjectMeta {
    ObjectMeta {
        name: Some(name.to_owned()),
        ..ObjectMeta::default()
    }
}

/// The CRDs, and two nodes in two zones.
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
        metadata.labels =
            Some([("topology.kubernetes.io/zone".to_owned(), zone.to_owned())].into());
        let node = Node {
            metadata,
            ..Node::default()
        };
        nodes.create(&PostParams::default(), &node).await?;
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
