//! The server of one volume, kept alive.
//!
//! One task for each volume finds the server that an earlier life of this program left running, or starts one; brings
//! what it allows into line with the volume's record; and does so again whenever it ends. The record is the truth: a
//! server is started only while its volume's lock proves that none is alive, and finds then only what the record allows.
//!
//! `gate` is held from before a server is started until it has been brought into line, and for each call that changes
//! what is allowed. So nobody's stale view of the record is ever pushed over a newer one.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex as StdMutex, PoisonError};
use std::time::Duration;

use rustix::process::Signal;
use tokio::sync::{Mutex, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::control::{Control, ControlError, Description};
use crate::daemon::chain;
use crate::storage::Record;
use crate::volumes::{Attachment, VolumesError};

use super::process::{self, Process};
use super::site::{ServerError, Site};

/// How long a server may take from its start to its first answer.
const START: Duration = Duration::from_secs(20);

/// How often a server that is starting is asked whether it answers yet.
const ASK: Duration = Duration::from_millis(10);

/// The pause before a server is started again: doubled each time, and short again once one has run for `STEADY`.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
const STEADY: Duration = Duration::from_secs(10);

/// How long callers wait for a server that failed to start: its next start may go well.
const DOWN: Duration = Duration::from_secs(5);

/// How long a server may take to end after it was drained, and after it was told to end.
const END: Duration = Duration::from_secs(10);

/// How long a server that was killed may hold its volume still, while the kernel ends its system calls.
const DYING: Duration = Duration::from_secs(2);

/// Failures in a row after which a server that holds its volume but cannot be reached is told to end.
const PATIENCE: u32 = 5;

/// How often a call is made anew because the server ended under it.
const ATTEMPTS: u32 = 3;

/// What is known of the server, for those who wait for it.
#[derive(Debug, Clone)]
enum State {
    Starting,
    Up(SocketAddr),
    Down(String),
    Stopped,
}

/// The server of one volume.
pub(super) struct Server {
    site: Site,
    gate: Mutex<Option<Control>>,
    state: watch::Sender<State>,
    stop: CancellationToken,
    task: StdMutex<Option<JoinHandle<()>>>,
}

impl Server {
    /// Looks after the server of that volume from now on.
    pub(super) fn keep(site: Site) -> Arc<Self> {
        let server = Arc::new(Self {
            site,
            gate: Mutex::new(None),
            state: watch::Sender::new(State::Starting),
            stop: CancellationToken::new(),
            task: StdMutex::new(None),
        });
        let task = tokio::spawn(Arc::clone(&server).supervise());
        *server.task.lock().unwrap_or_else(PoisonError::into_inner) = Some(task);
        server
    }

    /// Where the server listens; waits for it to come up for at most `patience`.
    pub(super) async fn endpoint(&self, patience: Duration) -> Result<SocketAddr, VolumesError> {
        let mut state = self.state.subscribe();
        let deadline = Instant::now() + patience;
        let started = state.wait_for(|state| !matches!(state, State::Starting));
        if let Ok(Ok(State::Down(_))) = tokio::time::timeout_at(deadline, started)
            .await
            .map(|settled| settled.map(|state| state.clone()))
        {
            let up = state.wait_for(|state| !matches!(state, State::Down(_)));
            let _ = tokio::time::timeout_at(deadline.min(Instant::now() + DOWN), up).await;
        }
        let last = self.state.borrow().clone();
        match last {
            State::Up(address) => Ok(address),
            State::Stopped => Err(VolumesError::NotFound(self.site.volume.to_string())),
            State::Starting => Err(self.unavailable("its server is starting", None)),
            State::Down(why) => Err(self.unavailable("its server is down", Some(why))),
        }
    }

    /// Lets the attachment in; it must be in the record already.
    pub(super) async fn allow(&self, attachment: &Attachment) -> Result<(), VolumesError> {
        self.ask("its server did not allow the attachment", |control| {
            let attachment = attachment.clone();
            async move { control.allow(&attachment.id, attachment.read_only).await }
        })
        .await
    }

    /// Tells the server the size that its file has been grown to.
    pub(super) async fn grow(&self, size_bytes: u64) -> Result<(), VolumesError> {
        self.ask("its server did not grow", |control| async move {
            control.grow(size_bytes).await
        })
        .await
    }

    /// Asks the running server, and the next one if it ends under the question.
    async fn ask<F>(&self, doing: &str, call: impl Fn(Control) -> F) -> Result<(), VolumesError>
    where
        F: Future<Output = Result<(), ControlError>>,
    {
        let mut attempts = 1;
        loop {
            self.endpoint(START).await?;
            let gate = self.gate.lock().await;
            let asked = match gate.clone() {
                Some(control) => call(control).await,
                None => Err(ControlError::Absent),
            };
            drop(gate);
            match asked {
                Ok(()) => return Ok(()),
                Err(error) if error.is_absence() && attempts < ATTEMPTS => sleep(FIRST_PAUSE).await,
                Err(error) => return Err(self.unavailable(doing, Some(chain(&error)))),
            }
            attempts += 1;
        }
    }

    /// Refuses the attachment, which must not be in the record any more. When this returns `Ok`, no write of it is
    /// under way and none can follow: either the server has said so, or no server is alive, and the next one will not
    /// allow it.
    pub(super) async fn revoke(&self, attachment: &Attachment) -> Result<(), VolumesError> {
        let gate = self.gate.lock().await;
        let refused = match gate.clone() {
            Some(control) => match control.revoke(&attachment.id).await {
                Ok(()) => return Ok(()),
                Err(error) => chain(&error),
            },
            None => "it is down".to_owned(),
        };
        // The lock is held for as long as any thread of a server lives, so also for as long as a write is under way.
        let deadline = Instant::now() + DYING;
        let settled = loop {
            match self.site.blocking(Site::settle_allowed).await {
                Err(ServerError::Held { .. }) if Instant::now() < deadline => sleep(ASK).await,
                settled => break settled,
            }
        };
        settled.map_err(|error| {
            let why = format!("{refused}; {}", chain(&error));
            self.unavailable("its server did not revoke the attachment", Some(why))
        })
    }

    /// Ends the server and its supervision. The server finishes what it was asked and makes it durable.
    pub(super) async fn stop(&self) -> Result<(), VolumesError> {
        self.stop.cancel();
        let task = self
            .task
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(task) = task {
            // It ends of itself: it is never aborted while it may be starting a process.
            let _ = task.await;
        }
        self.expel()
            .await
            .map_err(|error| self.unavailable("its server did not end", Some(chain(&error))))
    }

    async fn supervise(self: Arc<Self>) {
        let mut pause = FIRST_PAUSE;
        let mut failures = 0_u32;
        while !self.stop.is_cancelled() {
            match self.bring_up(failures).await {
                Ok(mut process) => {
                    failures = 0;
                    let since = Instant::now();
                    tokio::select! {
                        how = process.ended() => {
                            let (volume, process) = (&self.site.volume, process.id());
                            tracing::warn!(%volume, process, how, "the server is gone");
                        }
                        () = self.stop.cancelled() => self.end(&mut process).await,
                    }
                    *self.gate.lock().await = None;
                    self.state.send_replace(State::Starting);
                    if since.elapsed() > STEADY {
                        pause = FIRST_PAUSE;
                    }
                }
                Err(error) => {
                    failures = failures.saturating_add(1);
                    let (volume, why) = (&self.site.volume, chain(&error));
                    if failures.is_power_of_two() {
                        tracing::error!(%volume, why, failures, "the volume has no server");
                    }
                    self.state.send_replace(State::Down(why));
                }
            }
            tokio::select! {
                () = sleep(pause) => {}
                () = self.stop.cancelled() => {}
            }
            pause = (2 * pause).min(LONGEST_PAUSE);
        }
        self.state.send_replace(State::Stopped);
    }

    /// Finds or starts the server, and brings it into line with the record before anybody hears of it.
    async fn bring_up(&self, failures: u32) -> Result<Process, ServerError> {
        let permit = self.site.ground.starting.acquire().await;
        let _starting = permit.map_err(|_| ServerError::ShuttingDown)?;
        let mut gate = self.gate.lock().await;
        let (process, control, description) = match self.adopt().await? {
            Some(found) => found,
            None => {
                if let Err(error) = self.site.blocking(Site::prepare).await {
                    self.lose_patience(&error, failures).await;
                    return Err(error);
                }
                self.start().await?
            }
        };
        self.bring_into_line(&control, &description).await?;
        let (volume, address) = (&self.site.volume, description.address);
        tracing::info!(%volume, process = process.id(), %address, "serving");
        *gate = Some(control);
        self.state.send_replace(State::Up(address));
        Ok(process)
    }

    /// The server that is running already, if one is.
    async fn adopt(&self) -> Result<Option<(Process, Control, Description)>, ServerError> {
        let socket = self.site.socket();
        let control = match Control::connect(&socket).await {
            Ok(control) => control,
            Err(ControlError::Absent) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let claimed = control.describe(&self.site.volume).await?;
        let process = Process::find(claimed.process)
            .map_err(ServerError::io("find the process behind", &socket))?;
        // Asked again: had it ended before it was found, its id could be another process'.
        let description = control.describe(&self.site.volume).await?;
        if description.process != process.id() {
            return Err(ControlError::Absent.into());
        }
        Ok(Some((process, control, description)))
    }

    async fn start(&self) -> Result<(Process, Control, Description), ServerError> {
        let (socket, log) = (self.site.socket(), self.site.log());
        let mut process = Process::start(self.site.command(), &log)
            .map_err(ServerError::io("start", &self.site.ground.program))?;
        let answer = async {
            loop {
                match Control::connect(&socket).await {
                    Ok(control) => {
                        let description = control.describe(&self.site.volume).await?;
                        return Ok((control, description));
                    }
                    Err(ControlError::Absent) => sleep(ASK).await,
                    Err(error) => return Err(ServerError::from(error)),
                }
            }
        };
        let answered = tokio::select! {
            how = process.ended() => {
                let said = process::last_line(&log);
                return Err(ServerError::Ended { how, said });
            }
            answered = timeout(START, answer) => answered.unwrap_or(Err(ServerError::Silent)),
        };
        match answered {
            Ok((control, description)) if description.process == process.id() => {
                Ok((process, control, description))
            }
            answered => {
                process.signal(Signal::KILL);
                process.ended().await;
                // One that was started in an earlier life answered instead: it is found the next time.
                answered.and(Err(ControlError::Absent.into()))
            }
        }
    }

    /// Tells the server what the record allows, and no more, and how large the volume is.
    async fn bring_into_line(
        &self,
        control: &Control,
        found: &Description,
    ) -> Result<(), ServerError> {
        let record = self.site.ground.pool.find(&self.site.volume)?;
        let attachments = &record.volume.attachments;
        let stale = |id: &&_| !attachments.iter().any(|attachment| attachment.id == **id);
        let revoking = record.revoking.iter().map(|attachment| &attachment.id);
        for id in found.allowed.iter().filter(stale).chain(revoking) {
            control.revoke(id).await?;
        }
        for attachment in attachments {
            control.allow(&attachment.id, attachment.read_only).await?;
        }
        if found.size_bytes < record.volume.size_bytes {
            control.grow(record.volume.size_bytes).await?;
        }
        self.forget_revoked(record).await
    }

    /// The server knows of these revocations now: they need not be repeated.
    async fn forget_revoked(&self, known: Arc<Record>) -> Result<(), ServerError> {
        if known.revoking.is_empty() {
            return Ok(());
        }
        self.site
            .blocking(move |site| {
                site.ground.pool.update(&site.volume, |record| {
                    record.revoking.retain(|one| !known.revoking.contains(one));
                    Ok::<_, ServerError>(())
                })?;
                Ok(())
            })
            .await
    }

    /// Ends a server that holds the volume but cannot be reached, such as one whose socket was removed.
    async fn lose_patience(&self, error: &ServerError, failures: u32) {
        if matches!(error, ServerError::Held { .. })
            && failures >= PATIENCE
            && let Err(error) = self.expel().await
        {
            let (volume, error) = (&self.site.volume, chain(&error));
            tracing::error!(%volume, error, "cannot end a server that cannot be reached");
        }
    }

    async fn end(&self, process: &mut Process) {
        let drained = match Control::connect(&self.site.socket()).await {
            Ok(control) => control.drain().await,
            Err(error) => Err(error),
        };
        if let Err(error) = drained {
            let (volume, error) = (&self.site.volume, chain(&error));
            tracing::warn!(%volume, error, "cannot drain the server");
        }
        if timeout(END, process.ended()).await.is_err() {
            terminate(process).await;
        }
    }

    /// Makes sure that no process holds the volume: whoever does, and is a server of it, is ended.
    async fn expel(&self) -> Result<(), ServerError> {
        let vacate = || self.site.blocking(|site| site.vacate().map(drop));
        match vacate().await {
            Err(ServerError::Held {
                holder: Some(id), ..
            }) => {
                // It holds the volume's lock, so its id cannot be another process' by now.
                if let Ok(mut process) = Process::find(id)
                    && self.site.is_served_by(id)
                {
                    let volume = &self.site.volume;
                    tracing::warn!(%volume, process = id, "ending a server that cannot be reached");
                    terminate(&mut process).await;
                }
                vacate().await
            }
            vacated => vacated,
        }
    }

    /// Ends a server whose volume is not in the pool any more, if one is running.
    pub(super) async fn end_orphan(site: &Site) -> Result<(), ServerError> {
        let control = match Control::connect(&site.socket()).await {
            Ok(control) => control,
            Err(ControlError::Absent) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let description = control.describe(&site.volume).await?;
        let process = Process::find(description.process);
        let mut process =
            process.map_err(ServerError::io("find the server behind", &site.socket()))?;
        if site.is_served_by(process.id()) {
            terminate(&mut process).await;
        }
        Ok(())
    }

    fn unavailable(&self, doing: &str, why: Option<String>) -> VolumesError {
        VolumesError::Unavailable {
            volume: self.site.volume.to_string(),
            doing: doing.to_owned(),
            source: why.map(Into::into),
        }
    }
}

/// Asks a process to end, and ends it when it does not. What it wrote stays: it is in the kernel's hands.
async fn terminate(process: &mut Process) {
    process.signal(Signal::TERM);
    if timeout(END, process.ended()).await.is_err() {
        process.signal(Signal::KILL);
        process.ended().await;
    }
}
