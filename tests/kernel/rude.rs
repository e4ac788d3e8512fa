//! A server that serves a volume rightly, but speaks TLS as others do: it sends tickets, and new keys now and then.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, bail};
use hawser::nbd::request::RawRequest;
use hawser::nbd::server::{Exports, Handshake, Limits, Plain, PlainStep, Secured, Step};
use hawser::nbd::{Command, Errno, ExportInfo, ExportName, TransmissionFlags, reply};
use hawser::tls::{self, ServerOptions, ServerTls};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use crate::node::Served;

pub(crate) struct Rude {
    pub(crate) address: SocketAddr,
    /// How often new keys were sent.
    pub(crate) rekeyed: Arc<AtomicUsize>,
}

struct Service {
    config: Arc<ServerConfig>,
    export: Export,
    data: File,
    /// Replies of a session before it gets new keys.
    patience: usize,
    rekeyed: Arc<AtomicUsize>,
}

struct Export(ExportInfo);

impl Exports for Export {
    fn find(&self, _: &ExportName) -> Option<ExportInfo> {
        Some(self.0.clone())
    }

    fn names(&self) -> Vec<ExportName> {
        Vec::new()
    }
}

impl Rude {
    /// Serves the data of a volume whose own server does not run.
    pub(crate) fn serve(volume: &Served, patience: usize) -> Result<Self> {
        let options = ServerOptions {
            tls12: false,
            clients: vec![tls::client_identity(&volume.volume)],
        };
        let config = ServerTls::load(&volume.certificates(), options)?.config();
        let mut config = ServerConfig::clone(&config);
        config.send_tls13_tickets = 2;
        let data = File::options().read(true).write(true).open(volume.data())?;
        let flags = TransmissionFlags::HAS_FLAGS
            .with(TransmissionFlags::SEND_FLUSH)
            .with(TransmissionFlags::CAN_MULTI_CONN);
        let info = ExportInfo {
            size: data.metadata()?.len(),
            flags,
            block_sizes: None,
            description: None,
        };
        let rekeyed = Arc::new(AtomicUsize::new(0));
        let service = Arc::new(Service {
            config: Arc::new(config),
            export: Export(info),
            data,
            patience,
            rekeyed: rekeyed.clone(),
        });
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        std::thread::spawn(move || {
            for socket in listener.incoming().map_while(Result::ok) {
                let service = service.clone();
                // A client that goes away ends its session: that is no failure of the scenario.
                std::thread::spawn(move || service.session(socket));
            }
        });
        Ok(Self { address, rekeyed })
    }
}

impl Service {
    fn session(&self, mut socket: TcpStream) -> Result<()> {
        let handshake = starttls(&mut socket)?;
        let tls = ServerConnection::new(self.config.clone())?;
        let mut stream = StreamOwned::new(tls, socket);
        let mut options = Secured::new(handshake, Limits::default());
        loop {
            let mut bytes = vec![0; options.wanted()];
            stream.read_exact(&mut bytes)?;
            match options.receive(&bytes, &self.export)? {
                Step::Continue => {}
                Step::Reply(reply) => stream.write_all(&reply)?,
                Step::Transmit { reply, .. } => {
                    stream.write_all(&reply)?;
                    break;
                }
                Step::Close(_) => bail!("the client left"),
            }
        }
        for answered in 0.. {
            let mut header = [0; RawRequest::LENGTH];
            stream.read_exact(&mut header)?;
            let request = RawRequest::parse(&header)?;
            let mut payload = vec![0; request.payload() as usize];
            stream.read_exact(&mut payload)?;
            if answered == self.patience {
                self.rekeyed.fetch_add(1, Ordering::Relaxed);
                stream.conn.refresh_traffic_keys()?;
            }
            let reply = self.answer(&request, payload).context("carried out")?;
            stream.write_all(&reply)?;
        }
        Ok(())
    }

    fn answer(&self, request: &RawRequest, mut payload: Vec<u8>) -> Result<Vec<u8>> {
        let mut errno = Errno::default();
        match request.command {
            Command::WRITE => self.data.write_all_at(&payload, request.offset)?,
            Command::READ => {
                payload.resize(request.length as usize, 0);
                self.data.read_exact_at(&mut payload, request.offset)?;
            }
            Command::FLUSH => self.data.sync_all()?,
            Command::DISC => bail!("the client said goodbye"),
            _ => errno = Errno::EINVAL,
        }
        let mut bytes = reply::simple(request.cookie, errno).to_vec();
        if request.command == Command::READ {
            bytes.append(&mut payload);
        }
        Ok(bytes)
    }
}

fn starttls(socket: &mut TcpStream) -> Result<Handshake> {
    let (mut plain, greeting) = Plain::new(Limits::default());
    socket.write_all(&greeting)?;
    loop {
        let mut bytes = vec![0; plain.wanted()];
        socket.read_exact(&mut bytes)?;
        plain = match plain.receive(&bytes)? {
            PlainStep::Continue(next) => next,
            PlainStep::Reply(next, reply) => {
                socket.write_all(&reply)?;
                next
            }
            PlainStep::StartTls { ack, handshake } => {
                socket.write_all(&ack)?;
                return Ok(handshake);
            }
            PlainStep::Close(_) => bail!("the client left"),
        };
    }
}
