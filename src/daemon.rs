//! What every long-lived role has in common: its endpoint, the signals that end it, serving until then, and health.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;
use std::time::Duration;

use anyhow::Context;
use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::sleep;
use tokio_stream::wrappers::UnixListenerStream;

use crate::listen::Listen;

/// How long calls that are under way may take to be answered at the end. Kubernetes kills a pod after 30 s.
const ANSWERS: Duration = Duration::from_secs(25);

/// How long a health check may take: the kubelet's probes give up after some seconds, and so do people.
const CHECK: Duration = Duration::from_secs(5);

/// What is blocked at the end, on a disk or a peer, is waited for so long.
const LEFTOVERS: Duration = Duration::from_secs(5);

/// Does a role's work on a runtime of its own.
pub fn run(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<ExitCode> {
    allow_many_files();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("start the runtime")?;
    let ended = runtime.block_on(work);
    runtime.shutdown_timeout(LEFTOVERS);
    ended.map(|()| ExitCode::SUCCESS)
}

/// A unix socket as CSI's tools name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint(PathBuf);

impl Endpoint {
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let path = text
            .strip_prefix("unix://")
            .or_else(|| text.strip_prefix("unix:"));
        match path.map(Path::new) {
            Some(path) if path.is_absolute() => Ok(Self(path.to_owned())),
            _ => Err("expected unix:// and the absolute path of a socket".to_owned()),
        }
    }
}

/// A node's name within CSI's limit on node ids.
pub fn node_name(text: &str) -> Result<String, String> {
    match text.len() {
        1..=256 => Ok(text.to_owned()),
        length => Err(format!(
            "a node's name has 1 to 256 bytes, and this one has {length}"
        )),
    }
}

/// An error and everything behind it, on one line.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

/// A volume takes some open files, and login sessions often start with 1024.
fn allow_many_files() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}

/// The signals that end a role. They are caught from the moment on when this is made.
pub struct Stop {
    signals: [Signal; 3],
}

impl Stop {
    pub fn listen() -> std::io::Result<Self> {
        Ok(Self {
            signals: [
                signal(SignalKind::terminate())?,
                signal(SignalKind::interrupt())?,
                signal(SignalKind::hangup())?,
            ],
        })
    }

    pub async fn told(mut self) {
        let [terminate, interrupt, hang_up] = &mut self.signals;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            _ = hang_up.recv() => {}
        }
    }
}

/// Serves gRPC on a socket until `stop` is ready, and then until the calls under way are answered, within limits.
pub async fn serve_until(
    router: tonic::transport::server::Router,
    listener: UnixListener,
    stop: impl Future<Output = ()>,
) -> Result<(), tonic::transport::Error> {
    let (told, answered) = tokio::sync::oneshot::channel();
    let served = router.serve_with_incoming_shutdown(UnixListenerStream::new(listener), async {
        stop.await;
        tracing::info!("shutting down");
        let _ = told.send(());
    });
    tokio::select! {
        served = served => served?,
        () = too_long(answered) => tracing::warn!("calls that are under way are not answered any more"),
    }
    Ok(())
}

async fn too_long(answered: tokio::sync::oneshot::Receiver<()>) {
    match answered.await {
        Ok(()) => sleep(ANSWERS).await,
        Err(_) => std::future::pending().await,
    }
}

/// Answers `GET /healthz` with what `live` says, and `/readyz` with what `ready` does: 200, or 503 and what is wrong.
/// Returns when it listens, and answers for as long as the process lives.
pub async fn serve_health(
    listen: Listen,
    live: impl Check,
    ready: impl Check,
) -> std::io::Result<()> {
    let listener = listen.bind()?;
    listener.set_nonblocking(true)?;
    let listener = TcpListener::from_std(listener)?;
    let router = health(live, ready, CHECK);
    tokio::spawn(async move { axum::serve(listener, router).await });
    Ok(())
}

/// Whether a role is as it should be; the text says what is wrong.
pub trait Check: Clone + Send + Sync + 'static {
    fn check(&self) -> impl Future<Output = Result<(), String>> + Send;
}

impl<C, F> Check for C
where
    C: Fn() -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Result<(), String>> + Send,
{
    fn check(&self) -> impl Future<Output = Result<(), String>> + Send {
        self()
    }
}

fn health(live: impl Check, ready: impl Check, within: Duration) -> Router {
    Router::new()
        .route("/healthz", get(async move || answer(live, within).await))
        .route("/readyz", get(async move || answer(ready, within).await))
}

async fn answer(check: impl Check, within: Duration) -> (StatusCode, String) {
    let checked = tokio::time::timeout(within, check.check()).await;
    match checked.unwrap_or_else(|_| Err("no answer in time".to_owned())) {
        Ok(()) => (StatusCode::OK, "ok\n".to_owned()),
        Err(problem) => (StatusCode::SERVICE_UNAVAILABLE, format!("{problem}\n")),
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use axum::http::Request;
    use tower::ServiceExt;

    use super::*;

    #[test]
    fn endpoints_are_absolute_unix_sockets() {
        for text in ["unix:///run/csi.sock", "unix:/run/csi.sock"] {
            assert_eq!(text.parse(), Ok(Endpoint("/run/csi.sock".into())));
        }
        for text in [
            "",
            "unix://",
            "unix://csi.sock",
            "tcp://1.2.3.4:5",
            "/run/csi.sock",
        ] {
            assert!(text.parse::<Endpoint>().is_err(), "{text}");
        }
    }

    #[tokio::test]
    async fn health_is_what_the_check_says_and_a_check_that_hangs_fails() {
        for (hangs, result, status) in [
            (false, Ok(()), StatusCode::OK),
            (false, Err("it is not"), StatusCode::SERVICE_UNAVAILABLE),
            (true, Ok(()), StatusCode::SERVICE_UNAVAILABLE),
        ] {
            let check = move || async move {
                if hangs {
                    std::future::pending::<()>().await;
                }
                result.map_err(str::to_owned)
            };
            let fine = || async { Ok(()) };
            let router = health(fine, check, Duration::from_millis(20));
            let request = Request::get("/readyz").body(Body::empty()).unwrap();
            let answer = router.oneshot(request).await.unwrap();
            assert_eq!(answer.status(), status, "{result:?}");
        }
    }
}
