//! The owner's end of a server's control socket, with a deadline on every call. `server` has the other end.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use tokio::net::UnixStream;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::proto::control::control_client::ControlClient;
use crate::proto::control::{
    AllowRequest, DrainRequest, GrowRequest, RevokeRequest, StatisticsRequest, StatisticsResponse,
};
use crate::proto::socket;
use crate::volumes::{AttachmentId, VolumeId};

/// A server answers these from memory, or after one small durable write.
const PROMPT: Duration = Duration::from_secs(10);

/// Revoking and draining wait for writes that are under way, which wait for the disk.
const PATIENT: Duration = Duration::from_secs(60);

/// Why a server did not do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error("nobody answers on the control socket")]
    Absent,
    #[error("cannot connect to the control socket")]
    Connect(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("the server did not answer {call} within {} s", .within.as_secs())]
    TimedOut {
        call: &'static str,
        within: Duration,
    },
    #[error("the server refused {call}: {}", .status.message())]
    Refused { call: &'static str, status: Status },
    #[error("the control socket is that of {found:?}")]
    Stranger { found: String },
}

impl ControlError {
    /// Whether the server was not there, or ended before it answered: the next one may do it.
    pub fn is_absence(&self) -> bool {
        match self {
            Self::Absent | Self::Connect(_) => true,
            Self::Refused { status, .. } => {
                matches!(
                    status.code(),
                    Code::Unavailable | Code::Cancelled | Code::Unknown
                )
            }
            Self::TimedOut { .. } | Self::Stranger { .. } => false,
        }
    }
}

/// What a running server says of itself.
#[derive(Debug)]
pub struct Description {
    pub address: SocketAddr,
    pub process: i32,
    pub size_bytes: u64,
    pub epoch: u64,
    pub allowed: Vec<AttachmentId>,
}

/// A connection to a server. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Control {
    client: ControlClient<Channel>,
}

impl Control {
    /// Connects; `Absent` where no process listens.
    pub async fn connect(path: &Path) -> Result<Self, ControlError> {
        match UnixStream::connect(path).await {
            Ok(_) => {}
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                ) =>
            {
                return Err(ControlError::Absent);
            }
            Err(error) => return Err(ControlError::Connect(error.into())),
        }
        let channel = tokio::time::timeout(PROMPT, socket::connect(path))
            .await
            .map_err(|_| ControlError::TimedOut {
                call: "the connection",
                within: PROMPT,
            })?
            .map_err(|error| ControlError::Connect(error.into()))?;
        Ok(Self {
            client: ControlClient::new(channel),
        })
    }

    /// Asks the server what it is; refuses one that serves another volume.
    pub async fn describe(&self, volume: &VolumeId) -> Result<Description, ControlError> {
        let mut client = self.client.clone();
        let statistics = within(
            PROMPT,
            "Statistics",
            client.statistics(StatisticsRequest {}),
        );
        parse(statistics.await?, volume)
    }

    pub async fn allow(
        &self,
        attachment: &AttachmentId,
        read_only: bool,
    ) -> Result<(), ControlError> {
        let request = AllowRequest {
            attachment: attachment.to_string(),
            read_only,
        };
        within(PROMPT, "Allow", self.client.clone().allow(request)).await?;
        Ok(())
    }

    pub async fn revoke(&self, attachment: &AttachmentId) -> Result<(), ControlError> {
        let request = RevokeRequest {
            attachment: attachment.to_string(),
        };
        within(PATIENT, "Revoke", self.client.clone().revoke(request)).await?;
        Ok(())
    }

    pub async fn grow(&self, size_bytes: u64) -> Result<(), ControlError> {
        let request = GrowRequest { size_bytes };
        within(PROMPT, "Grow", self.client.clone().grow(request)).await?;
        Ok(())
    }

    /// Returns when the data is durable; the process ends after that.
    pub async fn drain(&self) -> Result<(), ControlError> {
        within(PATIENT, "Drain", self.client.clone().drain(DrainRequest {})).await?;
        Ok(())
    }
}

async fn within<T>(
    within: Duration,
    call: &'static str,
    answer: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> Result<T, ControlError> {
    tokio::time::timeout(within, answer)
        .await
        .map_err(|_| ControlError::TimedOut { call, within })?
        .map(tonic::Response::into_inner)
        .map_err(|status| ControlError::Refused { call, status })
}

fn parse(answer: StatisticsResponse, volume: &VolumeId) -> Result<Description, ControlError> {
    if answer.volume != volume.as_str() {
        return Err(ControlError::Stranger {
            found: answer.volume.chars().take(64).collect(),
        });
    }
    let unusable = |what: String| ControlError::Stranger { found: what };
    Ok(Description {
        address: answer
            .address
            .parse()
            .map_err(|_| unusable(format!("a server without an address: {}", answer.address)))?,
        process: i32::try_from(answer.process_id)
            .ok()
            .filter(|id| *id > 0)
            .ok_or_else(|| unusable(format!("a server of process {}", answer.process_id)))?,
        size_bytes: answer.size_bytes,
        epoch: answer.epoch,
        // A name that is no attachment id was never allowed from here.
        allowed: answer
            .attachments
            .into_iter()
            .filter_map(|attachment| attachment.id.parse().ok())
            .collect(),
    })
}
