//! Where volumes are served, as the API server says, kept here so that a server that moved is found at once.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use kube::runtime::watcher;
use kube::{Api, ResourceExt};
use tokio::sync::{mpsc, watch};

use crate::kube::api::NbdVolume;
use crate::kube::follow::{Seen, follow};
use crate::volumes::VolumeId;

/// The servers' places. Cheap to clone.
#[derive(Clone)]
pub(super) struct Directory {
    /// `None` until the API server was heard.
    known: watch::Sender<Option<HashMap<VolumeId, SocketAddr>>>,
    /// Who is told that a volume's server is elsewhere now.
    moved: mpsc::UnboundedSender<VolumeId>,
}

/// What is known of a volume's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    At(SocketAddr),
    /// It has no server that runs, or there is no such volume.
    Nowhere,
    /// The API server was not heard yet.
    Unheard,
}

impl Directory {
    pub(super) fn new() -> (Self, mpsc::UnboundedReceiver<VolumeId>) {
        let (moved, news) = mpsc::unbounded_channel();
        let known = watch::Sender::new(None);
        (Self { known, moved }, news)
    }

    /// Follows the API server; never returns.
    pub(super) async fn follow(self, api: Api<NbdVolume>) {
        follow(api, watcher::Config::default(), |seen| self.see(seen)).await;
    }

    /// Where the volume's server is; waits for a place for at most `patience`.
    pub(super) async fn place(&self, volume: &VolumeId, patience: Duration) -> Place {
        let mut known = self.known.subscribe();
        let is_there = |known: &Option<HashMap<VolumeId, SocketAddr>>| {
            known
                .as_ref()
                .is_some_and(|known| known.contains_key(volume))
        };
        let _ = tokio::time::timeout(patience, known.wait_for(is_there)).await;
        match &*self.known.borrow() {
            None => Place::Unheard,
            Some(known) => known
                .get(volume)
                .map_or(Place::Nowhere, |address| Place::At(*address)),
        }
    }

    fn see(&self, seen: Seen<NbdVolume>) {
        let mut moved = Vec::new();
        self.known.send_modify(|known| match seen {
            Seen::All(volumes) => {
                let now: HashMap<_, _> = volumes.iter().filter_map(served).collect();
                let before = known.take().unwrap_or_default();
                let elsewhere = now.iter().filter(|(id, at)| before.get(id) != Some(at));
                moved.extend(elsewhere.map(|(id, _)| id.clone()));
                *known = Some(now);
            }
            Seen::Present(volume) => {
                let known = known.get_or_insert_default();
                match served(&volume) {
                    Some((id, at)) => {
                        if known.insert(id.clone(), at) != Some(at) {
                            moved.push(id);
                        }
                    }
                    None => forget(known, &volume),
                }
            }
            Seen::Gone(volume) => forget(known.get_or_insert_default(), &volume),
        });
        for volume in moved {
            // Nobody listens where this process ends.
            let _ = self.moved.send(volume);
        }
    }
}

fn forget(known: &mut HashMap<VolumeId, SocketAddr>, volume: &NbdVolume) {
    if let Ok(id) = volume.name_any().parse::<VolumeId>() {
        known.remove(&id);
    }
}

fn served(volume: &NbdVolume) -> Option<(VolumeId, SocketAddr)> {
    let endpoint = volume.status.as_ref()?.endpoint.as_ref()?;
    Some((volume.name_any().parse().ok()?, endpoint.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kube::api::{NbdVolumeSpec, NbdVolumeStatus};
    use crate::volumes::Content;

    fn id(number: u8) -> VolumeId {
        VolumeId::from_bytes([number; 16])
    }

    fn volume(number: u8, endpoint: Option<&str>) -> NbdVolume {
        let spec = NbdVolumeSpec {
            name: "pvc".to_owned(),
            size_bytes: 4096,
            pool: "pool".to_owned(),
            node: "node".to_owned(),
            content: Content::Block,
            context: Default::default(),
            certificates: Default::default(),
            port: None,
            attachments: Vec::new(),
        };
        let mut volume = NbdVolume::new(id(number).as_str(), spec);
        volume.status = Some(NbdVolumeStatus {
            endpoint: endpoint.map(str::to_owned),
            ..NbdVolumeStatus::default()
        });
        volume
    }

    #[tokio::test]
    async fn a_server_that_moved_is_told_once_and_found_at_once() {
        let (directory, mut moved) = Directory::new();
        let now = Duration::ZERO;
        assert_eq!(directory.place(&id(1), now).await, Place::Unheard);
        let (first, second) = ("10.0.0.1:10809", "[2001:db8::2]:10809");
        directory.see(Seen::All(vec![volume(1, Some(first)), volume(2, None)]));
        assert_eq!(moved.try_recv(), Ok(id(1)));
        assert_eq!(directory.place(&id(2), now).await, Place::Nowhere);
        directory.see(Seen::Present(volume(1, Some(first))));
        directory.see(Seen::All(vec![volume(1, Some(first))]));
        assert!(moved.try_recv().is_err());
        directory.see(Seen::Present(volume(1, None)));
        assert_eq!(directory.place(&id(1), now).await, Place::Nowhere);

        let waiting = directory.clone();
        let found = tokio::spawn(async move {
            let patience = Duration::from_secs(60);
            waiting.place(&id(1), patience).await
        });
        tokio::task::yield_now().await;
        directory.see(Seen::Present(volume(1, Some(second))));
        assert_eq!(found.await.unwrap(), Place::At(second.parse().unwrap()));
        assert_eq!(moved.try_recv(), Ok(id(1)));
        directory.see(Seen::Gone(volume(1, Some(second))));
        assert_eq!(directory.place(&id(1), now).await, Place::Nowhere);
        directory.see(Seen::Present(volume(1, Some("not an address"))));
        assert_eq!(directory.place(&id(1), now).await, Place::Nowhere);
    }
}
