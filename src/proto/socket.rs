//! gRPC over unix sockets: binding so that only our own user can connect, and connecting.

use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::{UnixListener, UnixStream};
use tokio::time::{Instant, sleep};
use tonic::transport::{Channel, Endpoint};

/// The longest path of a socket, in bytes: sun_path has 108 with its NUL.
pub const LONGEST_PATH: usize = 107;

/// How long the socket of an owner that was just killed may take to go, and how often it is asked for.
const LET_GO: Duration = Duration::from_secs(1);
const ASK_AGAIN: Duration = Duration::from_millis(20);

/// Listens as [`bind`] does. An owner that was just killed may seem to listen still, through a process that it was
/// starting at that moment; it is waited for.
pub async fn listen(path: &Path) -> io::Result<UnixListener> {
    let deadline = Instant::now() + LET_GO;
    loop {
        match bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < deadline => {
                sleep(ASK_AGAIN).await;
            }
            bound => return bound,
        }
    }
}

/// Listens on a socket of mode 0600. A socket that nobody answers on is a dead process' and is replaced; one that is
/// answered is in use.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    if path.as_os_str().len() > LONGEST_PATH {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("a socket's path has at most {LONGEST_PATH} bytes"),
        ));
    }
    match std::fs::symlink_metadata(path) {
        Ok(there) if !there.file_type().is_socket() => {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                "something that is not a socket is in the way",
            ));
        }
        _ => {}
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => {
            return Err(io::Error::new(
                io::ErrorKind::AddrInUse,
                "another process answers on this socket",
            ));
        }
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path)?;
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    // Bound beside and renamed: nobody can connect before the mode is set. The kubelet takes every socket in its
    // registry for a plugin, unless the name begins with a dot.
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidFilename.into());
    };
    let beside = directory.join(format!(".{}", name.display()));
    match std::fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&beside)?;
    std::fs::set_permissions(&beside, std::fs::Permissions::from_mode(0o600))?;
    std::fs::rename(&beside, path)?;
    Ok(listener)
}

/// Connects to a socket.
pub async fn connect(path: &Path) -> Result<Channel, tonic::transport::Error> {
    let path = path.to_owned();
    // The authority is not used on a unix socket, but HTTP/2 wants one.
    Endpoint::from_static("http://localhost")
        .connect_with_connector(tower::service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        }))
        .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_dead_socket_is_replaced_and_a_live_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let first = bind(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(
            bind(&path).map_err(|error| error.kind()).unwrap_err(),
            io::ErrorKind::AddrInUse
        );
        drop(first);
        bind(&path).unwrap();
        std::fs::write(directory.path().join("file"), "not a socket").unwrap();
        assert!(bind(&directory.path().join("file")).is_err());
        assert_eq!(
            std::fs::read(directory.path().join("file")).unwrap(),
            b"not a socket"
        );
        let long = directory.path().join("x".repeat(100));
        assert!(bind(&long).is_err());
    }
}
