//! What the node part measures: its attachments, which are the ones that it may name, for there are few.

use std::sync::Arc;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;

use super::keyring::Keyring;
use crate::attach::{Links, Transport};
use crate::metrics::{Calls, Exposition, Reading};

/// Cheap to clone; all clones measure the same.
#[derive(Clone, Default)]
pub(super) struct Metrics {
    verifications: Family<[(&'static str, String); 1], Counter>,
    reconnects: Family<[(&'static str, &'static str); 1], Counter>,
}

impl Metrics {
    /// What verification came to, in the words of NbdVolume.status.
    pub(super) fn verified(&self, result: &str) {
        let labels = [("result", result.to_owned())];
        self.verifications.get_or_create(&labels).inc();
    }

    /// An attempt to put new connections in the places of dead ones.
    pub(super) fn reconnected(&self, mended: bool) {
        let result = if mended { "ok" } else { "error" };
        self.reconnects.get_or_create(&[("result", result)]).inc();
    }

    /// All that a node part tells, of the devices that `links` returns, and of the Secrets it was given.
    pub(super) fn exposition(
        &self,
        calls: &Calls,
        maximum_volumes: u32,
        keyring: Arc<Keyring>,
        is_registered: impl Fn() -> bool + Send + Sync + 'static,
        links: impl Fn() -> Vec<Links> + Clone + Send + Sync + 'static,
    ) -> Exposition {
        let mut told = Exposition::new();
        calls.tell(&mut told);
        told.read(
            "registered",
            "Whether the kubelet has registered this plugin.",
            move || vec![Reading::plain(i64::from(is_registered()))],
        );
        told.read(
            "attachments_maximum",
            "Volumes that can be attached to this node at one time.",
            move || vec![Reading::plain(maximum_volumes)],
        );
        let all = links.clone();
        told.read(
            "attachments",
            "Volumes that are attached to this node, by who encrypts their data.",
            move || transports(&all()),
        );
        let all = links.clone();
        told.read(
            "attachment_links",
            "Connections of an attached volume: those that are up, and those that died and were not replaced yet.",
            move || {
                let states = |links: Links| {
                    [("up", links.up), ("down", links.down)].map(|(state, count)| {
                        let volume = links.volume.to_string();
                        Reading::new([("volume", volume), ("state", state.to_owned())], count)
                    })
                };
                all().into_iter().flat_map(states).collect()
            },
        );
        told.read(
            "attachment_failed",
            "Whether an attached volume was given up, so that its I/O fails.",
            move || {
                let failed = |links: Links| {
                    let volume = links.volume.to_string();
                    Reading::new([("volume", volume)], i64::from(links.failed))
                };
                links().into_iter().map(failed).collect()
            },
        );
        told.add(
            "reconnects",
            "Attempts to replace connections that died, by result.",
            self.reconnects.clone(),
        );
        told.add(
            "verifications",
            "Verifications of volumes' servers at an attach, by result: passed, warnings, failed, off.",
            self.verifications.clone(),
        );
        told.read(
            "certificate_expiry_timestamp_seconds",
            "When the first client certificate that this node was given ends, in seconds since 1970.",
            move || {
                let end = keyring.first_end();
                let reading = |end| Reading::new([("of", "client".to_owned())], end);
                end.map(reading).into_iter().collect()
            },
        );
        told
    }
}

fn transports(links: &[Links]) -> Vec<Reading> {
    [
        (Transport::KernelTls, "kernel-tls"),
        (Transport::Proxy, "proxy"),
    ]
    .map(|(transport, name)| {
        let count = links.iter().filter(|links| links.transport == transport);
        Reading::new([("transport", name.to_owned())], count.count())
    })
    .into()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::tls::Authority;
    use crate::volumes::VolumeId;

    fn told(metrics: &Metrics, keyring: Arc<Keyring>, links: Vec<Links>) -> Exposition {
        metrics.exposition(
            &Calls::default(),
            64,
            keyring,
            || true,
            move || links.clone(),
        )
    }

    /// All that a node part tells, of no volumes.
    pub(crate) fn exposition() -> Exposition {
        let keyring = Arc::new(Keyring::forgetful());
        told(&Metrics::default(), keyring, Vec::new())
    }

    #[test]
    fn a_scrape_tells_how_the_attachments_are_and_no_key() {
        let volume = VolumeId::from_bytes([1; 16]);
        let links = |up, down, failed| Links {
            volume: volume.clone(),
            transport: Transport::KernelTls,
            up,
            down,
            failed,
        };
        let keyring = Arc::new(Keyring::forgetful());
        let secret = Authority::temporary()
            .unwrap()
            .issue_client(&volume)
            .unwrap();
        keyring.keep(&volume, secret).unwrap();
        let metrics = Metrics::default();
        metrics.verified("passed");
        metrics.verified("passed");
        metrics.reconnected(true);
        metrics.reconnected(false);
        let text = told(&metrics, keyring, vec![links(3, 1, true)])
            .text()
            .unwrap();
        for line in [
            "hawser_registered 1\n".to_owned(),
            "hawser_attachments_maximum 64\n".to_owned(),
            "hawser_attachments{transport=\"kernel-tls\"} 1\n".to_owned(),
            "hawser_attachments{transport=\"proxy\"} 0\n".to_owned(),
            format!("hawser_attachment_links{{volume=\"{volume}\",state=\"up\"}} 3\n"),
            format!("hawser_attachment_links{{volume=\"{volume}\",state=\"down\"}} 1\n"),
            format!("hawser_attachment_failed{{volume=\"{volume}\"}} 1\n"),
            "hawser_reconnects_total{result=\"ok\"} 1\n".to_owned(),
            "hawser_reconnects_total{result=\"error\"} 1\n".to_owned(),
            "hawser_verifications_total{result=\"passed\"} 2\n".to_owned(),
        ] {
            assert!(text.contains(&line), "{line}{text}");
        }
        let end = text
            .lines()
            .find_map(|line| line.split_once("{of=\"client\"} "));
        let (_, end) = end.unwrap_or_else(|| panic!("{text}"));
        let left = end.parse::<i64>().unwrap() - time::OffsetDateTime::now_utc().unix_timestamp();
        assert!((80..=90).contains(&(left / 86_400)), "{left}");
        assert!(!text.contains("BEGIN"), "{text}");
    }
}
