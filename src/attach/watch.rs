//! Keeping devices alive: each has a task that sees its sockets die and puts new ones in their places.
//!
//! The driver announces that some socket of a device died (LINK_DEAD), and that only in the initial network
//! namespace; the task looks for itself, and looks now and then without being told.

use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::backend::Backend;
use super::connect::inode;
use super::error::{AttachError, chain};
use super::kernel::{Announcements, DeviceSocket};
use super::record::Record;
use super::session::{Export, Peer, Session, open_all};
use super::{Inner, blocking, modules, system};
use crate::tls::{Secret, Side};
use crate::volumes::VolumeId;

/// How often a device is looked at without an announcement.
const GLANCE: Duration = Duration::from_secs(5);

/// Pauses between attempts to reconnect grow from the first to the last.
const FIRST: Duration = Duration::from_millis(100);
const LAST: Duration = Duration::from_secs(1);

/// A socket that died a moment ago is not dead to the driver yet, which then takes no other.
const SETTLING: Duration = Duration::from_secs(1);

/// How long a server of ours must not know an attachment before its device is given up. What was revoked is never allowed
/// again; but a server whose files were restored by hand is told within this time what it has to allow.
const REVOKED: Duration = Duration::from_secs(30);

/// The task of one device.
pub(super) struct Watch {
    index: u32,
    wake: Arc<Notify>,
    moved: Arc<Notify>,
    stop: CancellationToken,
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// What became of one look at a device.
#[derive(Debug, PartialEq, Eq)]
enum Look {
    Whole,
    Mended,
    /// The device is gone, or given up: there is nothing to look after any more.
    Over,
}

impl Inner {
    /// Looks after the device from now on, if that is not done already.
    pub(super) fn watch(self: &Arc<Self>, backend: &Backend, index: u32) {
        let mut watches = self.watches.lock().unwrap_or_else(PoisonError::into_inner);
        let running = watches.get(&backend.volume);
        if running.is_some_and(|watch| watch.index == index && !watch.stop.is_cancelled()) {
            return;
        }
        let watch = Watch {
            index,
            wake: Arc::default(),
            moved: Arc::default(),
            stop: self.stopped.child_token(),
        };
        tokio::spawn(look_after(
            Arc::downgrade(self),
            index,
            backend.clone(),
            [watch.wake.clone(), watch.moved.clone()],
            watch.stop.clone(),
        ));
        watches.insert(backend.volume.clone(), watch);
    }

    pub(super) fn unwatch(&self, volume: &VolumeId) {
        let mut watches = self.watches.lock().unwrap_or_else(PoisonError::into_inner);
        watches.remove(volume);
    }

    /// Listens to the driver's announcements from now on.
    pub(super) async fn listen(self: Arc<Self>) -> Result<(), AttachError> {
        self.listening
            .get_or_try_init(async || {
                let announcements = blocking(|| Ok(modules::driver()?.announcements()?)).await?;
                tokio::spawn(wake_on(
                    announcements,
                    Arc::downgrade(&self),
                    self.stopped.clone(),
                ));
                Ok(())
            })
            .await
            .copied()
    }

    /// Has the volume's server looked for anew, where some of its sockets are dead: it may be elsewhere by now.
    pub(super) fn moved(&self, volume: &VolumeId) {
        self.moves.notify_waiters();
        let watches = self.watches.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(watch) = watches.get(volume) {
            watch.moved.notify_one();
        }
    }

    /// Wakes the tasks of these devices; of all, if it is not known which.
    fn wake(&self, dead: Option<&[u32]>) {
        let watches = self.watches.lock().unwrap_or_else(PoisonError::into_inner);
        for watch in watches.values() {
            if dead.is_none_or(|dead| dead.contains(&watch.index)) {
                watch.wake.notify_one();
            }
        }
    }

    /// Where the volume's server is now.
    pub(super) async fn address(&self, peer: &Peer) -> Result<SocketAddr, AttachError> {
        let volume = peer.volume();
        if let Some(foreign) = &peer.foreign {
            return foreign.address(volume).await;
        }
        let endpoint = self.volumes.endpoint(volume).await;
        endpoint.map_err(|source| AttachError::Endpoint {
            volume: volume.clone(),
            source,
        })
    }

    /// Where the volume's server is now, and the Secret to show there.
    pub(super) async fn whereabouts(
        self: &Arc<Self>,
        peer: &Peer,
    ) -> Result<(SocketAddr, Secret), AttachError> {
        let address = self.address(peer).await?;
        let volume = peer.volume();
        if peer.foreign.is_some() {
            let (inner, volume) = (self.clone(), volume.clone());
            let secret = blocking(move || inner.secrets.find(&volume)).await?;
            return Ok((address, secret));
        }
        let parts = self.volumes.client_secret(volume).await;
        let parts = parts.map_err(|source| AttachError::Endpoint {
            volume: volume.clone(),
            source,
        })?;
        let origin = format!("the client Secret of volume {volume}");
        let secret = Secret::from_map(&origin, &parts, Side::Client).map_err(|source| {
            AttachError::Certificate {
                volume: volume.clone(),
                source,
            }
        })?;
        Ok((address, secret))
    }

    /// Looks once, and replaces what is dead.
    async fn look(
        self: &Arc<Self>,
        index: u32,
        backend: &Backend,
        stop: &CancellationToken,
    ) -> Result<Look, AttachError> {
        let (inner, wanted) = (self.clone(), backend.clone());
        let Some((record, size, missing)) = blocking(move || inner.missing(index, &wanted)).await?
        else {
            return Ok(Look::Over);
        };
        if missing == 0 {
            return Ok(Look::Whole);
        }
        tracing::debug!(
            volume = %backend.volume,
            "/dev/nbd{index}: {missing} of {} connections are dead", record.connections
        );
        let peer = record.peer();
        let (address, secret) = self.whereabouts(&peer).await?;
        let target = peer.target(address, &secret, record.transport.profile())?;
        let opened = open_all(&target, record.transport, &backend.volume, missing).await?;
        let mut sessions = Vec::new();
        let mut failure = None;
        for session in opened {
            match session.and_then(|session| acceptable(session, &record, size)) {
                Ok(session) => sessions.push(session),
                Err(error @ AttachError::EpochChanged { .. }) => {
                    self.give_up(index, backend, &error, stop).await?;
                    return Ok(Look::Over);
                }
                Err(error) if record.foreign.is_none() && error.is_unknown_export() => {
                    let volume = backend.volume.clone();
                    failure = Some(AttachError::Revoked { volume });
                }
                Err(error) => failure = Some(error),
            }
        }
        if sessions.is_empty() {
            return failure.map_or(Ok(Look::Whole), Err);
        }
        // The lock is the work's own: this future may be dropped while the work goes on.
        let lock = self.lock(&backend.volume).await;
        if stop.is_cancelled() {
            return Ok(Look::Over);
        }
        let (inner, backend) = (self.clone(), backend.clone());
        let look = blocking(move || {
            let _lock = lock;
            inner.replace_sockets(index, &backend, address, sessions)
        })
        .await?;
        failure.map_or(Ok(look), Err)
    }

    /// The device's record, its size, and how many of its sockets are dead. `None`: there is no such device any more.
    fn missing(
        &self,
        index: u32,
        backend: &Backend,
    ) -> Result<Option<(Record, u64, usize)>, AttachError> {
        let Some(record) = self.current(index, backend)? else {
            return Ok(None);
        };
        let size = self
            .system
            .size_bytes(index)
            .map_err(AttachError::system("read the device's size"))?;
        let live = self.live_sockets(&record)?.len();
        let missing = usize::from(record.connections).saturating_sub(live);
        Ok(Some((record, size, missing)))
    }

    /// The record of the device, if that is still there and not given up.
    fn current(&self, index: u32, backend: &Backend) -> Result<Option<Record>, AttachError> {
        let shown = self
            .system
            .backend(index)
            .map_err(AttachError::system("read the device's backend identifier"))?;
        if shown.as_ref() != Some(backend) {
            return Ok(None);
        }
        let record = self.record_for(index, backend)?;
        Ok(record.failed.is_none().then_some(record))
    }

    /// Offers the sessions to the driver, one at a time (K5).
    fn replace_sockets(
        &self,
        index: u32,
        backend: &Backend,
        address: SocketAddr,
        sessions: Vec<(Session, Export)>,
    ) -> Result<Look, AttachError> {
        let Some(mut record) = self.current(index, backend)? else {
            return Ok(Look::Over);
        };
        let timeout = Duration::from_secs(record.timeout_seconds);
        let mut driver = modules::driver()?;
        record.sockets = self.live_sockets(&record)?;
        record.server = address;
        if record.sockets.is_empty() {
            record.served_bytes = u64::MAX;
        }
        let offered = sessions.len();
        let mut taken = 0;
        for (session, export) in sessions {
            let socket = session.into_socket(&backend.volume, timeout, &self.proxies)?;
            record.served_bytes = record.served_bytes.min(export.size_bytes);
            record.sockets.push(inode(&socket)?);
            self.save(&record)?;
            let name = backend.to_string();
            let mut refused = None;
            let mut offer = |socket: &DeviceSocket| match driver.offer(index, &name, socket) {
                Ok(taken) => Ok(taken.then_some(())),
                Err(error) => {
                    refused = Some(error);
                    Err(std::io::ErrorKind::Other.into())
                }
            };
            match system::wait(SETTLING, || offer(&socket)) {
                Ok(Some(())) => taken += 1,
                // It closes here; the next look sees what is true then.
                Ok(None) => {
                    record.sockets.pop();
                }
                Err(error) => {
                    return Err(refused.map_or_else(
                        || AttachError::system("offer a socket")(error),
                        AttachError::from,
                    ));
                }
            }
        }
        tracing::info!(
            volume = %backend.volume, server = %address,
            "/dev/nbd{index}: the kernel took {taken} of {offered} new connections"
        );
        Ok(if taken > 0 { Look::Mended } else { Look::Whole })
    }

    /// Ends a device whose server may have lost writes, or serves it no more: its requests fail from now on, which whoever
    /// wrote them must see.
    async fn give_up(
        self: &Arc<Self>,
        index: u32,
        backend: &Backend,
        why: &AttachError,
        stop: &CancellationToken,
    ) -> Result<(), AttachError> {
        let lock = self.lock(&backend.volume).await;
        if stop.is_cancelled() {
            return Ok(());
        }
        tracing::error!(
            volume = %backend.volume,
            "/dev/nbd{index} is given up, its requests fail: {why}"
        );
        let (inner, backend, why) = (self.clone(), backend.clone(), why.to_string());
        blocking(move || {
            let _lock = lock;
            let Some(mut record) = inner.current(index, &backend)? else {
                return Ok(());
            };
            record.failed = Some(why);
            inner.save(&record)?;
            modules::driver()?.disconnect(index)?;
            Ok(())
        })
        .await
    }
}

/// Refuses a session that is not of the device's export as it was.
fn acceptable(
    session: Session,
    record: &Record,
    device_size_bytes: u64,
) -> Result<(Session, Export), AttachError> {
    let offered = record.peer().export(&session.transmission().info)?;
    offered.check_against(record, device_size_bytes)?;
    Ok((session, offered))
}

async fn look_after(
    inner: Weak<Inner>,
    index: u32,
    backend: Backend,
    [wake, moved]: [Arc<Notify>; 2],
    stop: CancellationToken,
) {
    let mut pause = FIRST;
    let mut last_words = String::new();
    let mut revoked_since = None;
    loop {
        let Some(inner) = inner.upgrade() else {
            return;
        };
        let look = tokio::select! {
            () = stop.cancelled() => return,
            look = inner.look(index, &backend, &stop) => look,
            // Whoever it is connecting to is not there any more, and may take long to say nothing.
            () = moved.notified() => {
                pause = FIRST;
                continue;
            }
        };
        let look = match look {
            Err(revoked @ AttachError::Revoked { .. }) => {
                let since: Instant = *revoked_since.get_or_insert_with(Instant::now);
                if since.elapsed() < REVOKED {
                    Err(revoked)
                } else {
                    let given_up = inner.give_up(index, &backend, &revoked, &stop).await;
                    given_up.map(|()| Look::Over)
                }
            }
            look => {
                revoked_since = None;
                look
            }
        };
        match look {
            Ok(Look::Mended) => inner.volumes.note_reconnect(&backend.volume, true),
            Err(_) => inner.volumes.note_reconnect(&backend.volume, false),
            Ok(Look::Whole | Look::Over) => {}
        }
        drop(inner);
        let rest = match look {
            Ok(Look::Over) => {
                stop.cancel();
                return;
            }
            Ok(Look::Whole) => {
                pause = FIRST;
                last_words.clear();
                GLANCE
            }
            // Once more, soon: a server that accepts and dies must not keep this busy.
            Ok(Look::Mended) => {
                pause = FIRST;
                FIRST
            }
            Err(error) => {
                let words = chain(&error);
                if words != last_words {
                    tracing::warn!(volume = %backend.volume, "/dev/nbd{index}: {words}");
                    last_words = words;
                }
                pause = (pause * 2).min(LAST);
                pause
            }
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(FIRST.max(rest)) => {}
            () = wake.notified(), if rest == GLANCE => {}
            () = moved.notified() => pause = FIRST,
        }
    }
}

/// Passes announcements on to the devices' tasks.
async fn wake_on(announcements: Announcements, inner: Weak<Inner>, stopped: CancellationToken) {
    loop {
        let dead = tokio::select! {
            () = stopped.cancelled() => return,
            dead = announcements.receive() => dead,
        };
        let Some(inner) = inner.upgrade() else {
            return;
        };
        match dead {
            Ok(dead) => inner.wake(dead.as_deref()),
            Err(error) => {
                tracing::warn!("an announcement of the nbd driver's was lost: {error}");
                inner.wake(None);
                tokio::time::sleep(FIRST).await;
            }
        }
    }
}
