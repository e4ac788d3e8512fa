//! Making a device.

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::{Instant, sleep_until, timeout};

use super::backend::Backend;
use super::error::{AttachError, chain};
use super::kernel::{DeviceSocket, Driver};
use super::netlink::Connect;
use super::record::Record;
use super::session::{Export, Peer, Session, offered, open_all};
use super::system::detached;
use super::{Device, Inner, Options, Request, Transport, blocking, modules};
use crate::client::{ClientError, Reason, Step, Target};
use crate::nbd::TransmissionFlags;
use crate::tls::{Profile, Secret};
use crate::verify;
use crate::volumes::AttachNote;

/// Devtmpfs makes a node at once; a container's `/dev` may take a moment.
const NODE: Duration = Duration::from_secs(5);

/// How long a server that is away is waited for: a Pod that starts elsewhere after its node's death is there sooner than
/// the kubelet would be again. The kubelet waits two minutes for a call.
const AWAY: Duration = Duration::from_secs(25);

/// How long a server may take to accept a connection, for one retransmission.
const ACCEPT: Duration = Duration::from_secs(2);

/// Pauses between looks at a server that is away.
const FIRST: Duration = Duration::from_millis(100);
const LAST: Duration = Duration::from_secs(1);

/// The driver has one hardware queue for each socket, and sets them up one after the other (K27).
const MOST_CONNECTIONS: u8 = 16;

impl Inner {
    pub(super) async fn attach(self: Arc<Self>, request: Request) -> Result<Device, AttachError> {
        let peer = Peer {
            backend: Backend {
                volume: request.volume.clone(),
                attachment: request.attachment.clone(),
            },
            foreign: request.foreign.clone(),
        };
        let _lock = self.lock(&request.volume).await;
        self.clone().listen().await?;
        let inner = self.clone();
        let wanted = (peer.clone(), request.read_only, request.secret.clone());
        let existing = blocking(move || {
            let (peer, read_only, secret) = wanted;
            let device = inner.existing(&peer, read_only)?;
            if device.is_some() && peer.foreign.is_some() {
                inner.secrets.keep(peer.volume(), &secret)?;
            }
            Ok(device)
        });
        if let Some(device) = existing.await? {
            self.watch(&peer.backend, device.index);
            return Ok(device);
        }
        let device = self.clone().connect(&peer, request).await?;
        self.watch(&peer.backend, device.index);
        Ok(device)
    }

    /// The device that this attachment has already. What an interrupted attach or detach left is cleared away.
    fn existing(&self, wanted: &Peer, read_only: bool) -> Result<Option<Device>, AttachError> {
        let volume = wanted.volume();
        let Some((index, backend)) = self.device_of(volume)? else {
            self.forget(volume)?;
            return Ok(None);
        };
        let device = self.system.path(index);
        let mut driver = modules::driver()?;
        if backend != wanted.backend {
            self.displace(&mut driver, index, &backend)?;
            return Ok(None);
        }
        if !driver.is_connected(index, &backend.to_string())? {
            let record = self.record_of(volume)?;
            return Err(AttachError::Disconnected {
                volume: volume.clone(),
                device,
                problem: record
                    .and_then(|record| record.failed)
                    .unwrap_or_else(|| "some process has it open".into()),
            });
        }
        if self.record_for(index, &backend)?.foreign != wanted.foreign {
            return Err(AttachError::Unsuitable {
                volume: volume.clone(),
                problem: format!(
                    "{} is of another export than the one that is asked for now; unstage it first",
                    device.display()
                ),
            });
        }
        let device = self.describe(index, &backend)?;
        if device.read_only != read_only {
            return Err(AttachError::Unsuitable {
                volume: volume.clone(),
                problem: format!(
                    "it is on {} already, and that is {}",
                    device.path.display(),
                    if read_only { "writable" } else { "read-only" }
                ),
            });
        }
        Ok(Some(device))
    }

    /// Clears away another attachment's device, if all its sockets are dead: attachments are never used again, so that
    /// it cannot come back, and every request to it fails sooner or later.
    fn displace(
        &self,
        driver: &mut Driver,
        index: u32,
        backend: &Backend,
    ) -> Result<(), AttachError> {
        let other = |device| AttachError::OtherAttachment {
            volume: backend.volume.clone(),
            device,
            attachment: backend.attachment.clone(),
        };
        let record = self.record_for(index, backend)?;
        let used = self
            .system
            .mounted_at(index)
            .map_err(AttachError::system("read the mount table"))?;
        if used.is_some() || !self.live_sockets(&record)?.is_empty() {
            return Err(other(self.system.path(index)));
        }
        self.disconnect(driver, index, backend)?;
        self.forget(&backend.volume)
    }

    async fn connect(
        self: Arc<Self>,
        peer: &Peer,
        request: Request,
    ) -> Result<Device, AttachError> {
        let volume = &request.volume;
        let start = Instant::now();
        let inner = self.clone();
        let transport =
            blocking(move || modules::transport(&inner.system, inner.config.proxy_allowed)).await?;
        let address = self.server(peer, &request).await?;
        let report = self.verify(peer, address, &request).await?;
        let verified = start.elapsed();

        let target = peer.target(address, &request.secret, transport.profile())?;
        let (sessions, export) = sessions(&target, transport, peer, &request.options).await?;
        if !request.read_only && export.flags.contains(TransmissionFlags::READ_ONLY) {
            return Err(AttachError::Unsuitable {
                volume: volume.clone(),
                problem: "its server offers it read-only; attach it with readonly, or an access mode that only reads"
                    .into(),
            });
        }
        let opened = start.elapsed();

        let record = Record {
            volume: volume.clone(),
            attachment: request.attachment.clone(),
            foreign: request.foreign.clone(),
            server: address,
            transport,
            read_only: request.read_only,
            flags: export.flags,
            epoch: export.epoch,
            maximum_payload: export.maximum_payload,
            block_size_bytes: export.block_size_bytes,
            served_bytes: export.size_bytes,
            // At most MOST_CONNECTIONS.
            connections: u8::try_from(sessions.len()).unwrap_or(MOST_CONNECTIONS),
            timeout_seconds: seconds(request.options.timeout),
            dead_timeout_seconds: seconds(request.options.dead_timeout),
            sockets: Vec::new(),
            failed: None,
        };
        let (inner, secret) = (self.clone(), request.secret.clone());
        let mut device =
            blocking(move || inner.hand_over(record, &secret, sessions, &export)).await?;
        device.report = report;
        self.note(&request, device.report.clone(), Some(transport));
        tracing::info!(
            volume = %volume,
            device = %device.path.display(),
            server = %address,
            transport = ?transport,
            verify_ms = verified.as_millis(),
            sessions_ms = (opened - verified).as_millis(),
            connect_ms = (start.elapsed() - opened).as_millis(),
            "attached"
        );
        Ok(device)
    }

    /// Where the volume's server is, once it accepts connections: one that is away is waited for, for a while, and tried
    /// anew as soon as it is said to be elsewhere. What a server says that is there is an answer, and not waited out.
    ///
    /// A foreign server is only looked up: some count connections, and there are those that end with the first.
    async fn server(&self, peer: &Peer, request: &Request) -> Result<SocketAddr, AttachError> {
        if peer.foreign.is_some() {
            return self.address(peer).await;
        }
        let deadline = request.patience.until(AWAY, AWAY);
        let mut pauses = [FIRST, FIRST * 2, FIRST * 4].into_iter();
        let mut waits = false;
        loop {
            let mut moved = pin!(self.moves.notified());
            moved.as_mut().enable();
            let found = tokio::select! {
                found = self.accepting(peer, &request.secret) => found,
                () = request.patience.ends() => Err(AttachError::Abandoned { volume: request.volume.clone() }),
            };
            let away = match found {
                Err(error) if error.is_away() && Instant::now() < deadline => error,
                found => return found,
            };
            if !waits {
                waits = true;
                tracing::info!(volume = %request.volume, problem = chain(&away), "waiting for its server");
            }
            let pause = (Instant::now() + pauses.next().unwrap_or(LAST)).min(deadline);
            tokio::select! {
                () = sleep_until(pause) => {}
                () = moved => {}
                () = request.patience.ends() => {}
            }
        }
    }

    /// Where the volume's server is, if it accepts connections there.
    async fn accepting(&self, peer: &Peer, secret: &Secret) -> Result<SocketAddr, AttachError> {
        let address = self.address(peer).await?;
        // What is wrong with the Secret is told first: no server makes that right.
        let target = peer.target(address, secret, Profile::Probe)?;
        let reason = match timeout(ACCEPT, TcpStream::connect(address)).await {
            Ok(Ok(_)) => return Ok(address),
            Ok(Err(error)) => Reason::Io(error),
            Err(_) => Reason::TimedOut(ACCEPT),
        };
        let failure = ClientError {
            address,
            export: target.export,
            step: Step::Connect,
            reason: Box::new(reason),
        };
        Err(AttachError::session(peer.volume(), failure))
    }

    /// Verifies the server on sessions of their own, as the policy says.
    async fn verify(
        &self,
        peer: &Peer,
        address: SocketAddr,
        request: &Request,
    ) -> Result<Option<Arc<verify::Report>>, AttachError> {
        let policy = request.options.policy;
        if policy == verify::Policy::Off {
            return Ok(None);
        }
        let target = peer.target(address, &request.secret, Profile::Probe)?;
        // A server that is away, or lets us not in, is told in one sentence, not in one for each check.
        offered(peer, target.clone()).await?;
        let report = blocking(move || Ok(Arc::new(verify::battery(&target)))).await?;
        if let Err(source) = policy.decide(&report) {
            let findings = report.findings().count();
            self.note(request, Some(report), None);
            return Err(AttachError::Verification {
                volume: peer.volume().clone(),
                findings,
                source,
            });
        }
        if report.findings().chain(report.not_run()).next().is_some() {
            tracing::warn!(volume = %peer.volume(), "the policy lets it pass: {report}");
        }
        for examined in &report.results {
            if let verify::Outcome::Inapplicable { reason } = &examined.outcome {
                let (volume, check) = (peer.volume(), examined.check.id);
                tracing::info!(%volume, "{check} does not apply to its server: {reason}");
            }
        }
        Ok(Some(report))
    }

    fn note(
        &self,
        request: &Request,
        report: Option<Arc<verify::Report>>,
        transport: Option<Transport>,
    ) {
        let note = AttachNote {
            attachment: request.attachment.clone(),
            policy: request.options.policy,
            report,
            transport,
        };
        self.volumes.note_attach(&request.volume, note);
    }

    /// Gives the sessions to the kernel. The record is on disk first, so that a device is never without one.
    fn hand_over(
        &self,
        mut record: Record,
        secret: &Secret,
        sessions: Vec<Session>,
        export: &Export,
    ) -> Result<Device, AttachError> {
        let timeout = Duration::from_secs(record.timeout_seconds);
        let mut sockets = Vec::with_capacity(sessions.len());
        for session in sessions {
            let socket = session.into_socket(&record.volume, timeout, &self.proxies)?;
            record.sockets.push(inode(&socket)?);
            sockets.push(socket);
        }
        if record.foreign.is_some() {
            self.secrets.keep(&record.volume, secret)?;
        }
        self.save(&record)?;
        let made = self.make(&record, &sockets, export);
        if made.is_err() {
            // The record stays if its device does; the next attach or detach finds both.
            if let Ok(None) = self.device_of(&record.volume) {
                let _ = self.forget(&record.volume);
            }
        }
        made
    }

    fn make(
        &self,
        record: &Record,
        sockets: &[DeviceSocket],
        export: &Export,
    ) -> Result<Device, AttachError> {
        let backend = record.backend();
        let mut driver = modules::driver()?;
        let mut flags = export.flags;
        if record.read_only {
            // Less than the server allows, never more: the kernel then refuses writes by itself.
            flags = flags.with(TransmissionFlags::READ_ONLY);
        }
        let index = driver.connect(
            &Connect {
                size_bytes: export.size_bytes,
                block_size_bytes: export.block_size_bytes,
                timeout_seconds: record.timeout_seconds,
                dead_timeout_seconds: record.dead_timeout_seconds,
                server_flags: flags.0,
                backend: &backend.to_string(),
            },
            sockets,
        )?;
        let ready = self
            .check(index, &backend, export)
            .and_then(|()| self.describe(index, &backend));
        if ready.is_err()
            && let Err(error) = self.disconnect(&mut driver, index, &backend)
        {
            tracing::error!(
                "{} was not usable, and cannot be disconnected: {error}",
                self.system.path(index).display()
            );
        }
        ready
    }

    /// What the kernel shows must be what it was told.
    fn check(&self, index: u32, backend: &Backend, export: &Export) -> Result<(), AttachError> {
        let wrong = |problem: String| AttachError::Unsuitable {
            volume: backend.volume.clone(),
            problem: format!("{}: {problem}", self.system.path(index).display()),
        };
        let shown = self
            .system
            .backend(index)
            .map_err(AttachError::system("read the device's backend identifier"))?;
        if shown.as_ref() != Some(backend) {
            return Err(wrong("the kernel does not show its volume".into()));
        }
        let size = self
            .system
            .size_bytes(index)
            .map_err(AttachError::system("read the device's size"))?;
        if size != export.size_bytes {
            return Err(wrong(format!(
                "the kernel shows {size} bytes in the place of {}",
                export.size_bytes
            )));
        }
        self.system
            .wait_for_node(index, NODE)
            .map_err(AttachError::system("find the device's node"))?;
        let (system, payload) = (self.system.clone(), export.maximum_payload);
        detached(move || system.tune(index, payload))
            .recv_timeout(NODE)
            .map_err(|_| wrong("its first requests are not answered".into()))
    }
}

/// Opens the sessions. Only the first can say whether there may be more; all must agree.
async fn sessions(
    target: &Target,
    transport: Transport,
    peer: &Peer,
    options: &Options,
) -> Result<(Vec<Session>, Export), AttachError> {
    let volume = peer.volume();
    let mut sessions = Vec::new();
    for session in open_all(target, transport, volume, 1).await? {
        sessions.push(session?);
    }
    let info = sessions
        .first()
        .map(|session| session.transmission().info.clone())
        .ok_or(AttachError::Interrupted)?;
    let export = peer.export(&info)?;
    if export.flags.contains(TransmissionFlags::CAN_MULTI_CONN) {
        let more = options.connections.clamp(1, MOST_CONNECTIONS) - 1;
        for session in open_all(target, transport, volume, more.into()).await? {
            sessions.push(session?);
        }
    }
    if sessions
        .iter()
        .any(|session| session.transmission().info != info)
    {
        return Err(AttachError::Unsuitable {
            volume: volume.clone(),
            problem: "its server says different things of it on different connections".into(),
        });
    }
    Ok((sessions, export))
}

pub(super) fn inode(socket: &DeviceSocket) -> Result<u64, AttachError> {
    socket
        .inode()
        .map_err(AttachError::system("identify a socket"))
}

/// Whole seconds, at least one: 0 would mean no timeout to the driver.
fn seconds(duration: Duration) -> u64 {
    (duration.as_secs() + u64::from(duration.subsec_nanos() > 0)).max(1)
}
