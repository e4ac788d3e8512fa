//! The control socket: what the owner of a volume tells its server.

use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::watch;
use tonic::{Request, Response, Status};

use super::attachments::{Attachments, AttachmentsError};
use super::exports::Export;
use super::service::Service;
use crate::proto::control::control_server::Control;
use crate::proto::control::{
    AllowRequest, AllowResponse, Attachment, DrainRequest, DrainResponse, GrowRequest,
    GrowResponse, RevokeRequest, RevokeResponse, StatisticsRequest, StatisticsResponse,
};
use crate::volumes::{AttachmentId, VolumeId};

/// How far the end of the server has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Drain {
    No,
    Wanted,
    /// Everything is durable, or this is why it is not.
    Done(Result<(), String>),
}

/// Answers the control socket.
pub(super) struct ControlService {
    pub(super) service: Arc<Service>,
    pub(super) attachments: Arc<Attachments>,
    pub(super) volume: VolumeId,
    pub(super) address: String,
    pub(super) epoch: u64,
    pub(super) drain: watch::Sender<Drain>,
}

/// Makes the socket, in the place of one that a server left behind. Nobody else can be on it: the volume is locked.
pub(super) fn bind(path: &Path) -> io::Result<UnixListener> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => std::fs::remove_file(path)?,
        Ok(_) => {
            let why = "there is something else than a socket";
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, why));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    // The umask of a server gives nobody else a right, so there is no moment at which others could connect.
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn attachment(id: String) -> Result<AttachmentId, Status> {
    AttachmentId::try_from(id).map_err(|error| Status::invalid_argument(error.to_string()))
}

fn refused(error: &AttachmentsError) -> Status {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    match error {
        AttachmentsError::OtherRights(_) => Status::failed_precondition(text),
        AttachmentsError::TooMany(_) => Status::resource_exhausted(text),
        AttachmentsError::Io { .. } | AttachmentsError::Corrupt { .. } => Status::unavailable(text),
    }
}

impl ControlService {
    /// Does what waits for the disk where it keeps nobody else waiting. It runs to its end, also when the caller
    /// gives up.
    async fn change<T: Send + 'static>(
        &self,
        change: impl FnOnce(&Attachments) -> Result<T, AttachmentsError> + Send + 'static,
    ) -> Result<T, Status> {
        let attachments = Arc::clone(&self.attachments);
        tokio::task::spawn_blocking(move || change(&attachments))
            .await
            .map_err(|error| Status::internal(error.to_string()))?
            .map_err(|error| refused(&error))
    }

    fn statistics_of(export: &Export, sessions: usize) -> Attachment {
        let counters = &export.counters;
        let name = export.name.as_str();
        let id = name.rsplit_once('/').map_or(name, |(_, id)| id);
        Attachment {
            id: id.to_owned(),
            read_only: export.read_only,
            sessions: u32::try_from(sessions).unwrap_or(u32::MAX),
            reads: counters.reads.load(Ordering::Relaxed),
            writes: counters.writes.load(Ordering::Relaxed),
            read_bytes: counters.read_bytes.load(Ordering::Relaxed),
            written_bytes: counters.written_bytes.load(Ordering::Relaxed),
            failed_requests: counters.failed.load(Ordering::Relaxed),
        }
    }
}

#[tonic::async_trait]
impl Control for ControlService {
    async fn allow(
        &self,
        request: Request<AllowRequest>,
    ) -> Result<Response<AllowResponse>, Status> {
        let AllowRequest {
            attachment: id,
            read_only,
        } = request.into_inner();
        let id = attachment(id)?;
        let told = id.clone();
        self.change(move |attachments| attachments.allow(&id, read_only))
            .await?;
        tracing::info!(attachment = %told, read_only, "allowed");
        Ok(Response::new(AllowResponse {}))
    }

    async fn revoke(
        &self,
        request: Request<RevokeRequest>,
    ) -> Result<Response<RevokeResponse>, Status> {
        let id = attachment(request.into_inner().attachment)?;
        let export = self.attachments.export(&id);
        let told = id.clone();
        let closed = self
            .change(move |attachments| attachments.revoke(&id))
            .await?;
        self.service.exports.vacated(Some(&export)).await;
        tracing::info!(attachment = %told, closed, "revoked");
        Ok(Response::new(RevokeResponse {
            closed_sessions: u32::try_from(closed).unwrap_or(u32::MAX),
        }))
    }

    async fn grow(&self, request: Request<GrowRequest>) -> Result<Response<GrowResponse>, Status> {
        let wanted = request.into_inner().size_bytes;
        let store = &self.service.store;
        let size = store
            .grow()
            .map_err(|trouble| Status::unavailable(trouble.to_string()))?;
        if size < wanted {
            return Err(Status::out_of_range(format!(
                "the backing store has {size} bytes, not {wanted}: grow it first"
            )));
        }
        tracing::info!(size, "size served");
        Ok(Response::new(GrowResponse { size_bytes: size }))
    }

    async fn statistics(
        &self,
        _: Request<StatisticsRequest>,
    ) -> Result<Response<StatisticsResponse>, Status> {
        let service = &self.service;
        let attachments = service.exports.all();
        let in_handshake = service.negotiating.load(Ordering::Relaxed);
        Ok(Response::new(StatisticsResponse {
            volume: self.volume.to_string(),
            address: self.address.clone(),
            process_id: std::process::id(),
            size_bytes: service.store.size(),
            epoch: self.epoch,
            uptime_seconds: service.started.elapsed().as_secs(),
            attachments: attachments
                .iter()
                .map(|(export, sessions)| Self::statistics_of(export, *sessions))
                .collect(),
            sessions_in_handshake: u32::try_from(in_handshake).unwrap_or(u32::MAX),
            refused: service
                .refused
                .counts()
                .into_iter()
                .map(|(reason, count)| (reason.to_owned(), count))
                .collect(),
            bytes_in_flight: service.budget.in_flight() as u64,
            certificate_not_after: service.tls.not_after(),
            certificate_problem: service.tls.problem().unwrap_or_default(),
        }))
    }

    async fn drain(&self, _: Request<DrainRequest>) -> Result<Response<DrainResponse>, Status> {
        let mut drain = self.drain.subscribe();
        self.drain.send_if_modified(|state| {
            let begins = *state == Drain::No;
            if begins {
                *state = Drain::Wanted;
            }
            begins
        });
        let done = drain
            .wait_for(|state| matches!(state, Drain::Done(_)))
            .await
            .map_err(|_| Status::unavailable("the server ended before it was drained"))?
            .clone();
        match done {
            Drain::Done(Err(problem)) => Err(Status::data_loss(problem)),
            _ => Ok(Response::new(DrainResponse {})),
        }
    }
}
