//! Making the plugin known to the kubelet, which finds a socket in its registry, asks who is there, and says what came
//! of it.

use std::path::{Path, PathBuf};

use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use crate::csi::DRIVER_NAME;
use crate::proto::pluginregistration::registration_server::{Registration, RegistrationServer};
use crate::proto::pluginregistration::{
    InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse,
};
use crate::proto::socket;

/// What the kubelet takes a socket in its registry for.
const KIND: &str = "CSIPlugin";

/// The kubelet speaks CSI 1, whichever 1.x this is.
const VERSIONS: [&str; 1] = ["1.0.0"];

/// The socket's name. `@localhost` is for HTTP/2's sake: the kubelet sends the percent-encoded path of the socket as
/// `:authority` (kubernetes#108254), which is none, unless what comes before an `@` makes it userinfo.
#[must_use]
pub(super) fn socket_name() -> String {
    format!("{DRIVER_NAME}-reg@localhost")
}

/// What came of the last attempt.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) enum Registered {
    /// The kubelet has not called yet.
    #[default]
    Awaited,
    Yes,
    No(String),
}

impl Registered {
    /// A kubelet that has not called may be starting still; one that refused has to be heard.
    pub(super) fn check(&self) -> Result<(), String> {
        match self {
            Self::Awaited | Self::Yes => Ok(()),
            Self::No(why) => Err(format!("the kubelet refused the registration: {why}")),
        }
    }
}

/// The service on the registration socket.
pub(super) struct Registrar {
    /// The plugin's socket, as the kubelet sees it.
    endpoint: String,
    state: watch::Sender<Registered>,
}

impl Registrar {
    pub(super) fn new(endpoint: &Path, state: watch::Sender<Registered>) -> Self {
        Self {
            endpoint: endpoint.display().to_string(),
            state,
        }
    }
}

#[tonic::async_trait]
impl Registration for Registrar {
    async fn get_info(&self, _: Request<InfoRequest>) -> Result<Response<PluginInfo>, Status> {
        tracing::info!(endpoint = self.endpoint, "the kubelet asks who is here");
        Ok(Response::new(PluginInfo {
            r#type: KIND.to_owned(),
            name: DRIVER_NAME.to_owned(),
            endpoint: self.endpoint.clone(),
            supported_versions: VERSIONS.map(str::to_owned).to_vec(),
        }))
    }

    async fn notify_registration_status(
        &self,
        request: Request<RegistrationStatus>,
    ) -> Result<Response<RegistrationStatusResponse>, Status> {
        let status = request.into_inner();
        let state = if status.plugin_registered {
            tracing::info!("the kubelet registered this plugin");
            Registered::Yes
        } else {
            let why: String = status.error.chars().take(1024).collect();
            tracing::error!(why, "the kubelet refused the registration");
            Registered::No(why)
        };
        self.state.send_replace(state);
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}

/// The registration socket. The plugin's own socket has to be served before it appears: the kubelet calls at once.
pub(super) struct RegistrationSocket {
    path: PathBuf,
    listener: UnixListener,
}

impl RegistrationSocket {
    /// Makes it in the kubelet's registry, in the place of one that an earlier process left.
    pub(super) async fn make(registry: &Path) -> std::io::Result<Self> {
        let path = registry.join(socket_name());
        let listener = socket::listen(&path).await?;
        Ok(Self { path, listener })
    }

    /// Answers the kubelet until `stop` is ready. The socket is removed then: the kubelet forgets a plugin that is no
    /// more, and remembers it when it is there again.
    pub(super) async fn serve(
        self,
        registrar: Registrar,
        stop: impl Future<Output = ()>,
    ) -> Result<(), tonic::transport::Error> {
        let Self { path, listener } = self;
        let removed = async {
            stop.await;
            if let Err(error) = std::fs::remove_file(&path) {
                tracing::warn!(path = %path.display(), %error, "cannot remove the registration socket");
            }
        };
        Server::builder()
            .add_service(RegistrationServer::new(registrar))
            .serve_with_incoming_shutdown(UnixListenerStream::new(listener), removed)
            .await
    }
}

#[cfg(test)]
mod tests {
    use hyper_util::rt::TokioIo;
    use tokio::net::UnixStream;
    use tokio::sync::oneshot;
    use tonic::transport::{Channel, Endpoint};

    use super::*;
    use crate::proto::pluginregistration::registration_client::RegistrationClient;

    /// grpc-go's authority of a unix socket: its path, percent-encoded as a URL's host.
    fn encoded(path: &Path) -> String {
        path.display()
            .to_string()
            .bytes()
            .map(|byte| match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' | b'@' => {
                    char::from(byte).to_string()
                }
                _ => format!("%{byte:02X}"),
            })
            .collect()
    }

    async fn dial(path: &Path) -> Channel {
        let path = path.to_owned();
        Endpoint::from_shared(format!("http://{}", encoded(&path)))
            .unwrap()
            .connect_with_connector(tower::service_fn(move |_| {
                let path = path.clone();
                async move { UnixStream::connect(path).await.map(TokioIo::new) }
            }))
            .await
            .unwrap()
    }

    #[tokio::test]
    async fn the_kubelet_registers_a_plugin_by_its_own_authority() {
        let registry = tempfile::tempdir().unwrap();
        let (state, told) = watch::channel(Registered::default());
        let socket = RegistrationSocket::make(registry.path()).await.unwrap();
        let path = socket.path.clone();
        let registrar = Registrar::new(Path::new("/var/lib/kubelet/plugins/x/csi.sock"), state);
        let (stop, stopped) = oneshot::channel::<()>();
        let served = tokio::spawn(socket.serve(registrar, async {
            let _ = stopped.await;
        }));
        let mut kubelet = RegistrationClient::new(dial(&path).await);
        let info = kubelet.get_info(InfoRequest {}).await.unwrap().into_inner();
        assert_eq!(info.r#type, "CSIPlugin");
        assert_eq!(info.name, DRIVER_NAME);
        assert_eq!(info.endpoint, "/var/lib/kubelet/plugins/x/csi.sock");
        assert_eq!(info.supported_versions, ["1.0.0"]);
        for (plugin_registered, error, healthy) in
            [(false, "no", false), (true, "", true), (false, "", false)]
        {
            kubelet
                .notify_registration_status(RegistrationStatus {
                    plugin_registered,
                    error: error.to_owned(),
                })
                .await
                .unwrap();
            assert_eq!(told.borrow().check().is_ok(), healthy);
        }
        drop(kubelet);
        stop.send(()).unwrap();
        served.await.unwrap().unwrap();
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_socket_that_a_killed_process_left_is_replaced_and_nothing_else_is_left_in_the_registry()
     {
        let registry = tempfile::tempdir().unwrap();
        let first = RegistrationSocket::make(registry.path()).await.unwrap();
        assert!(RegistrationSocket::make(registry.path()).await.is_err());
        drop(first);
        let _second = RegistrationSocket::make(registry.path()).await.unwrap();
        let names: Vec<_> = std::fs::read_dir(registry.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(names, [socket_name().as_str()]);
        assert_eq!(Registered::default().check(), Ok(()));
    }
}
