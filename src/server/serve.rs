//! `hawser serve`: from the command line to the end of the process.

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail};
use rustix::fs::Mode;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio_stream::wrappers::UnixListenerStream;
use tracing::{error, info, warn};

use super::control::{ControlService, Drain};
use super::exports::Order;
use super::reception::Reception;
use super::service::Service;
use super::subject::{OpenVolume, Subject};
use super::wake::Wake;
use crate::listen::Listen;
use crate::nbd::ExportName;
use crate::proto::control::control_server::ControlServer;
use crate::tls::{self, Refresh, ServerOptions, ServerTls};
use crate::volumes::VolumeId;

/// How often the certificate files are looked at, and whether there is anything to do.
const TICK: Duration = Duration::from_secs(2);

/// How long sessions have to finish what they began; Kubernetes kills a pod after 30 s.
const DRAIN: Duration = Duration::from_secs(20);

/// How long those who wait on the control socket have to take their answers: they are on this machine.
const LAST_ANSWERS: Duration = Duration::from_millis(500);

/// Serve one volume, or one file, over NBD inside mutual TLS.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("what").required(true).args(["volume", "file"]))]
pub struct Args {
    /// The volume to serve; whom to, the control socket says.
    #[arg(long, value_name = "ID", requires_all = ["directory", "control"])]
    volume: Option<VolumeId>,
    /// The volume's directory in its pool.
    #[arg(long, value_name = "DIR", requires = "volume")]
    directory: Option<PathBuf>,
    /// Where to make the control socket.
    #[arg(long, value_name = "SOCKET", requires = "volume")]
    control: Option<PathBuf>,
    /// A file or block device to serve as it is, without control socket.
    #[arg(long, requires_all = ["export", "client"])]
    file: Option<PathBuf>,
    /// The name clients ask for.
    #[arg(long, value_name = "NAME", requires = "file", value_parser = export_name)]
    export: Option<ExportName>,
    /// A DNS name, URI or common name that a client's certificate may have.
    #[arg(long, value_name = "NAME", requires = "file", num_args = 1..)]
    client: Vec<String>,
    /// Refuse every write.
    #[arg(long, requires = "file")]
    read_only: bool,
    /// tls.crt, tls.key and ca.crt, or the names libnbd and QEMU have for them. Read again when they change.
    #[arg(long, value_name = "DIR")]
    certificates: PathBuf,
    /// Where to listen; without an address everywhere. Port 0 takes a free one.
    #[arg(long, value_name = "[ADDRESS]:PORT", default_value = ":10809")]
    listen: Listen,
    /// Allow TLS 1.2 with AEAD ciphers, for userspace clients that have nothing newer.
    #[arg(long)]
    tls12: bool,
    /// Memory for the requests in flight of all clients together, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 128, value_parser = clap::value_parser!(u32).range(64..=65536))]
    request_memory: u32,
}

fn export_name(text: &str) -> Result<ExportName, crate::nbd::InvalidExportName> {
    ExportName::try_from(text)
}

/// Serves until told to stop.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    // Nothing that is made here is for others: neither the control socket nor the records.
    rustix::process::umask(Mode::RWXG | Mode::RWXO);
    let clients = match &args.volume {
        Some(volume) => vec![tls::client_identity(volume)],
        None => args.client.clone(),
    };
    let tls12 = args.tls12;
    let tls = ServerTls::load(&args.certificates, ServerOptions { tls12, clients })?;
    let listener = args.listen.bind();
    let listener = listener.with_context(|| format!("listen on {}", args.listen))?;
    let address = listener.local_addr().context("find the address")?;
    tls::warm_up();
    let subject = args.subject()?;
    let pool = (args.request_memory as usize) << 20;
    let service = Arc::new(subject.service(tls, pool));
    let wake = Arc::new(Wake::new().context("make an eventfd")?);
    Reception::new(Arc::clone(&service), listener, Arc::clone(&wake))
        .and_then(Reception::start)
        .context("start to accept connections")?;
    info!(
        %address,
        size = service.store.size(),
        description = service.description.as_deref().unwrap_or("none"),
        "serving"
    );
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(4)
        .build()
        .context("start the control runtime")?;
    let ended = runtime.block_on(attend(&service, subject.volume, address, &wake));
    // Who was told twice to stop does not wait for a disk.
    runtime.shutdown_background();
    ended
}

impl Args {
    fn subject(&self) -> anyhow::Result<Subject> {
        let Self {
            volume,
            directory,
            control,
            file,
            export,
            read_only,
            ..
        } = self;
        match (volume, directory, control, file, export) {
            (Some(id), Some(directory), Some(control), None, None) => {
                Subject::volume(id, directory, control)
            }
            (None, None, None, Some(file), Some(export)) => Subject::file(file, export, *read_only),
            _ => bail!("give --volume with --directory and --control, or --file with --export"),
        }
    }
}

/// Answers the control socket and signals, and keeps the certificates fresh, until the end.
async fn attend(
    service: &Arc<Service>,
    volume: Option<OpenVolume>,
    address: SocketAddr,
    wake: &Wake,
) -> anyhow::Result<ExitCode> {
    let (drain, mut wanted) = watch::channel(Drain::No);
    // Else a write beyond RLIMIT_FSIZE kills the process, instead of failing with EFBIG.
    let _beyond_limit = signal(SignalKind::from_raw(SIGXFSZ))?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    let control = match &volume {
        None => None,
        Some(volume) => Some(start_control(service, volume, address, &drain)?),
    };
    // Its output may be a file on a full disk.
    let _ = writeln!(std::io::stdout(), "listening on {address}");
    let mut tick = tokio::time::interval(TICK);
    let mut idle = Idle::default();
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = hang_up.recv() => break,
            _ = wanted.wait_for(|state| *state == Drain::Wanted) => break,
            _ = tick.tick() => {
                refresh(service);
                idle.look(service);
            }
        }
    }
    info!("shutting down");
    let ended = tokio::select! {
        ended = finish(service, volume.as_ref(), wake) => ended,
        _ = terminate.recv() => Err("stopped by a second signal".to_owned()),
        _ = interrupt.recv() => Err("stopped by a second signal".to_owned()),
    };
    drain.send_replace(Drain::Done(ended.clone()));
    if let Some(control) = control {
        let _ = tokio::time::timeout(LAST_ANSWERS, control).await;
    }
    if let Some(volume) = &volume {
        let _ = std::fs::remove_file(&volume.control_path);
    }
    match ended {
        Ok(()) => {
            info!("ended, and everything is durable");
            Ok(ExitCode::SUCCESS)
        }
        Err(problem) => {
            error!("ended: {problem}");
            Ok(ExitCode::FAILURE)
        }
    }
}

/// signal(7): sent when a write exceeds RLIMIT_FSIZE; the same number on all of Linux but MIPS.
const SIGXFSZ: i32 = 25;

/// Gives memory back when nothing was asked from one tick to the next, once.
#[derive(Default)]
struct Idle {
    requests: u64,
    done: bool,
}

impl Idle {
    fn look(&mut self, service: &Service) {
        let requests = service.budget.granted();
        if requests != self.requests {
            (self.requests, self.done) = (requests, false);
        } else if !self.done && service.budget.in_flight() == 0 {
            crate::sys::memory::give_back();
            self.done = true;
        }
    }
}

fn refresh(service: &Service) {
    match service.tls.refresh() {
        Refresh::Unchanged => {}
        Refresh::Reloaded => info!("certificates reloaded, for new sessions"),
        Refresh::Kept(problem) => warn!("new certificate files are not used: {problem}"),
    }
}

fn start_control(
    service: &Arc<Service>,
    volume: &OpenVolume,
    address: SocketAddr,
    drain: &watch::Sender<Drain>,
) -> anyhow::Result<tokio::task::JoinHandle<Result<(), tonic::transport::Error>>> {
    let socket = volume.control.try_clone().context("control socket")?;
    let socket = UnixListener::from_std(socket).context("control socket")?;
    let epoch = volume
        .epoch
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .number();
    let control = ControlService {
        service: Arc::clone(service),
        attachments: Arc::clone(&volume.attachments),
        volume: volume.id.clone(),
        address: address.to_string(),
        epoch,
        drain: drain.clone(),
    };
    let mut done = drain.subscribe();
    let server = tonic::transport::Server::builder()
        .add_service(ControlServer::new(control))
        .serve_with_incoming_shutdown(UnixListenerStream::new(socket), async move {
            let _ = done.wait_for(|state| matches!(state, Drain::Done(_))).await;
        });
    Ok(tokio::spawn(server))
}

/// Lets everybody finish, and makes everything durable.
async fn finish(
    service: &Arc<Service>,
    volume: Option<&OpenVolume>,
    wake: &Wake,
) -> Result<(), String> {
    service.draining.store(true, Ordering::Release);
    wake.wake();
    service.exports.drain();
    if tokio::time::timeout(DRAIN, service.exports.vacated(None))
        .await
        .is_err()
    {
        warn!(
            "sessions that did not finish in {} s are closed",
            DRAIN.as_secs()
        );
        service.exports.order(None, Order::Close);
        service.exports.vacated(None).await;
    }
    let store = Arc::clone(&service.store);
    let epoch = volume.map(|volume| Arc::clone(&volume.epoch));
    tokio::task::spawn_blocking(move || {
        store
            .flush()
            .map_err(|trouble| format!("not everything is durable: {trouble}"))?;
        let Some(epoch) = epoch else {
            return Ok(());
        };
        let mut epoch = epoch.lock().unwrap_or_else(PoisonError::into_inner);
        epoch.close().map_err(|error| error.to_string())
    })
    .await
    .map_err(|error| error.to_string())?
}
