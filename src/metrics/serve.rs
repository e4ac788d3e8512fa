//! The port on which metrics are told.

use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, Semaphore};
use tokio::time::{sleep, timeout};

use super::Exposition;
use crate::listen::{Listen, plain};

/// Connections at a time: there are one or two scrapers.
const CONNECTIONS: usize = 8;

/// How long a connection may take, which is one request's. Scrapers give up after 10 s by default.
const LONGEST: Duration = Duration::from_secs(15);

/// The pause when no connection can be accepted, for want of descriptors.
const PAUSE: Duration = Duration::from_millis(200);

/// What OpenMetrics calls its text.
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Where metrics are told, and to whom.
#[derive(Debug, Clone, Default, clap::Args)]
// The roles' own arguments are a group of this name.
#[group(skip)]
pub struct Args {
    /// Where to tell metrics, over HTTP, at /metrics; without an address everywhere. If it is not said, nowhere.
    #[arg(long, value_name = "[ADDRESS]:PORT")]
    metrics: Option<Listen>,
    /// Networks whose scrapers are answered, as 192.0.2.0/24,2001:db8::/64. If it is not said, all are.
    #[arg(
        long,
        value_name = "NETWORK",
        value_delimiter = ',',
        requires = "metrics"
    )]
    metrics_from: Vec<Network>,
}

impl Args {
    /// Returns when it listens, and answers for as long as the process lives.
    pub async fn serve(&self, exposition: Exposition) -> anyhow::Result<()> {
        let Some(listen) = self.metrics else {
            return Ok(());
        };
        let listener = listen.bind().and_then(|listener| {
            listener.set_nonblocking(true)?;
            TcpListener::from_std(listener)
        });
        let listener = listener.with_context(|| format!("tell metrics on {listen}"))?;
        let door = Door {
            listener,
            from: self.metrics_from.clone(),
        };
        tokio::spawn(door.answer(router(exposition)));
        Ok(())
    }
}

fn router(exposition: Exposition) -> Router {
    let exposition = Arc::new(Mutex::new(exposition));
    Router::new().route("/metrics", get(move || told(Arc::clone(&exposition))))
}

/// One scrape at a time: what is read for it may be a disk.
async fn told(exposition: Arc<Mutex<Exposition>>) -> Response {
    let exposition = exposition.lock_owned().await;
    let told = tokio::task::spawn_blocking(move || exposition.text()).await;
    match told {
        Ok(Ok(text)) => ([(header::CONTENT_TYPE, OPENMETRICS)], text).into_response(),
        _ => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

struct Door {
    listener: TcpListener,
    /// Empty: everybody's.
    from: Vec<Network>,
}

impl Door {
    async fn answer(self, router: Router) {
        let slots = Arc::new(Semaphore::new(CONNECTIONS));
        while let Ok(slot) = Arc::clone(&slots).acquire_owned().await {
            let stream = self.next().await;
            let router = router.clone();
            tokio::spawn(async move {
                let _slot = slot;
                let mut server = auto::Builder::new(TokioExecutor::new()).http1_only();
                server.http1().keep_alive(false);
                let service = TowerToHyperService::new(router);
                let served = server.serve_connection(TokioIo::new(stream), service);
                // A scraper that went away, or says nothing, is nobody's concern.
                let _ = timeout(LONGEST, served).await;
            });
        }
    }

    /// The next connection of somebody who may ask.
    async fn next(&self) -> TcpStream {
        loop {
            match self.listener.accept().await {
                Ok((stream, peer)) if self.admits(peer) => return stream,
                Ok((_, peer)) => {
                    let peer = plain(peer);
                    tracing::debug!(%peer, "may not read metrics: see --metrics-from");
                }
                Err(error) => {
                    tracing::debug!(%error, "no connection for metrics");
                    sleep(PAUSE).await;
                }
            }
        }
    }

    fn admits(&self, peer: SocketAddr) -> bool {
        let peer = plain(peer).ip();
        self.from.is_empty() || self.from.iter().any(|network| network.has(peer))
    }
}

/// Addresses that begin with the same bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Network {
    address: IpAddr,
    bits: u32,
}

impl Network {
    fn has(&self, address: IpAddr) -> bool {
        match (self.address, address) {
            (IpAddr::V4(ours), IpAddr::V4(theirs)) => {
                let differing = ours.to_bits() ^ theirs.to_bits();
                differing.leading_zeros() >= self.bits
            }
            (IpAddr::V6(ours), IpAddr::V6(theirs)) => {
                let differing = ours.to_bits() ^ theirs.to_bits();
                differing.leading_zeros() >= self.bits
            }
            _ => false,
        }
    }
}

impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits)),
            None => (text, None),
        };
        let problem = || format!("{text:?} is no network, as 192.0.2.0/24 or 2001:db8::/64 is");
        let address: IpAddr = address.parse().map_err(|_| problem())?;
        let all = if address.is_ipv4() { 32 } else { 128 };
        let bits = bits.map_or(Ok(all), str::parse).map_err(|_| problem())?;
        match bits <= all {
            true => Ok(Self { address, bits }),
            false => Err(problem()),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[test]
    fn a_network_has_the_addresses_that_begin_as_it_does() {
        for (network, address, has) in [
            ("192.0.2.0/24", "192.0.2.255", true),
            ("192.0.2.0/24", "192.0.3.0", false),
            ("192.0.2.7", "192.0.2.7", true),
            ("192.0.2.7", "192.0.2.6", false),
            ("0.0.0.0/0", "203.0.113.1", true),
            ("0.0.0.0/0", "::1", false),
            ("2001:db8::/64", "2001:db8::ffff", true),
            ("2001:db8::/64", "2001:db8:0:1::", false),
            ("::/0", "::1", true),
        ] {
            let network: Network = network.parse().unwrap();
            assert_eq!(
                network.has(address.parse().unwrap()),
                has,
                "{network:?} {address}"
            );
        }
        for wrong in ["", "/8", "10.0.0.0/33", "10.0.0.0/-1", "::/129", "host/8"] {
            assert!(wrong.parse::<Network>().is_err(), "{wrong}");
        }
    }

    async fn door(from: &[&str]) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let from = from.iter().map(|text| text.parse().unwrap()).collect();
        tokio::spawn(Door { listener, from }.answer(router(Exposition::new())));
        address
    }

    /// What is answered to one request, of which the connection is closed after that.
    async fn ask(address: SocketAddr, line: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("{line} HTTP/1.1\r\nHost: a\r\n\r\n");
        // Whoever may not ask has no connection to write to.
        let _ = stream.write_all(request.as_bytes()).await;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        String::from_utf8(answer).unwrap()
    }

    #[tokio::test]
    async fn a_scraper_is_answered_and_can_do_nothing_but_read() {
        let address = door(&["127.0.0.0/8"]).await;
        let answer = ask(address, "GET /metrics").await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert!(answer.contains("application/openmetrics-text"), "{answer}");
        assert!(answer.contains("hawser_build_info{"), "{answer}");
        assert!(answer.ends_with("# EOF\n"), "{answer}");
        for (line, status) in [
            ("POST /metrics", "405"),
            ("GET /", "404"),
            ("GET /healthz", "404"),
        ] {
            let answer = ask(address, line).await;
            assert!(
                answer.starts_with(&format!("HTTP/1.1 {status}")),
                "{line}: {answer}"
            );
        }
    }

    #[tokio::test]
    async fn who_may_not_ask_is_told_nothing() {
        let address = door(&["192.0.2.0/24", "::1"]).await;
        assert_eq!(ask(address, "GET /metrics").await, "");
    }

    #[tokio::test]
    async fn silent_connections_are_few_and_do_not_last() {
        let address = door(&[]).await;
        let mut silent = Vec::new();
        for _ in 0..CONNECTIONS {
            silent.push(TcpStream::connect(address).await.unwrap());
        }
        let waits = timeout(Duration::from_millis(200), ask(address, "GET /metrics"));
        assert!(waits.await.is_err());
        // One that goes makes room.
        silent.pop();
        let answer = ask(address, "GET /metrics").await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
}
