//! Stands between a node and a server, and does to connections what networks do.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

pub(crate) struct Relay {
    pub(crate) address: SocketAddr,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    /// The clients' ends of the connections that live, in the order in which they came.
    connections: Mutex<BTreeMap<usize, TcpStream>>,
    silent: AtomicBool,
    accepted: AtomicUsize,
}

impl Relay {
    pub(crate) fn to(server: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let state = Arc::new(State::default());
        let shared = state.clone();
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let Ok(client) = client else { return };
                let _ = shared.relay(client, server);
            }
        });
        Ok(Self { address, state })
    }

    /// Connections so far.
    pub(crate) fn accepted(&self) -> usize {
        self.state.accepted.load(Ordering::Relaxed)
    }

    /// Ends the oldest connection that lives.
    pub(crate) fn cut_one(&self) {
        if let Some((_, connection)) = self.state.connections.lock().unwrap().pop_first() {
            let _ = connection.shutdown(Shutdown::Both);
        }
    }

    /// Passes nothing on any more, on any connection, and ends none.
    pub(crate) fn fall_silent(&self) {
        self.state.silent.store(true, Ordering::Relaxed);
    }
}

impl State {
    fn relay(self: &Arc<Self>, client: TcpStream, server: SocketAddr) -> io::Result<()> {
        let server = TcpStream::connect(server)?;
        let number = self.accepted.fetch_add(1, Ordering::Relaxed);
        let mut connections = self.connections.lock().unwrap();
        connections.insert(number, client.try_clone()?);
        self.pass(number, client.try_clone()?, server.try_clone()?);
        self.pass(number, server, client);
        Ok(())
    }

    fn pass(self: &Arc<Self>, number: usize, mut from: TcpStream, mut to: TcpStream) {
        let state = self.clone();
        std::thread::spawn(move || {
            let mut buffer = vec![0; 64 << 10];
            while let Ok(count @ 1..) = from.read(&mut buffer) {
                while state.silent.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(20));
                }
                if to.write_all(&buffer[..count]).is_err() {
                    break;
                }
            }
            let _ = to.shutdown(Shutdown::Both);
            let _ = from.shutdown(Shutdown::Both);
            state.connections.lock().unwrap().remove(&number);
        });
    }
}
