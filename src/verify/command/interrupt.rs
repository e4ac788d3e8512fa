//! Ctrl-C: the first ends the run, so that what was found is still told; the second ends the process.

use std::io;
use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc;
use std::thread;

use tokio::runtime::Builder;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::verify::Cancel;

/// Numbers of signal(7).
const SIGINT: u8 = 2;
const SIGTERM: u8 = 15;

/// Which signal came, once one did.
#[derive(Debug)]
pub(super) struct Interrupt(Arc<AtomicU8>);

impl Interrupt {
    /// From now on signals end the run, for as long as the process lives.
    pub(super) fn watch(cancel: &Cancel) -> io::Result<Self> {
        let (came, cancel) = (Arc::new(AtomicU8::new(0)), cancel.clone());
        let (ready, watching) = mpsc::channel();
        let seen = came.clone();
        thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                let runtime = Builder::new_current_thread().enable_io().build();
                let prepared = runtime.and_then(|runtime| {
                    let entered = runtime.enter();
                    let signals = (
                        signal(SignalKind::interrupt())?,
                        signal(SignalKind::terminate())?,
                    );
                    drop(entered);
                    Ok((runtime, signals))
                });
                match prepared {
                    Ok((runtime, (mut interrupt, mut terminate))) => {
                        // Whoever waits for it may be gone, with the process.
                        let _ = ready.send(Ok(()));
                        runtime.block_on(async {
                            let first = next(&mut interrupt, &mut terminate).await;
                            seen.store(first, Ordering::Relaxed);
                            cancel.cancel();
                            let second = next(&mut interrupt, &mut terminate).await;
                            process::exit(128 + i32::from(second));
                        });
                    }
                    Err(error) => {
                        let _ = ready.send(Err(error));
                    }
                }
            })?;
        watching
            .recv()
            .unwrap_or_else(|_| Err(io::Error::other("the watching thread ended")))?;
        Ok(Self(came))
    }

    /// The signal that ended the run, if one did.
    pub(super) fn signal(&self) -> Option<u8> {
        Some(self.0.load(Ordering::Relaxed)).filter(|signal| *signal != 0)
    }
}

async fn next(interrupt: &mut Signal, terminate: &mut Signal) -> u8 {
    tokio::select! {
        _ = interrupt.recv() => SIGINT,
        _ = terminate.recv() => SIGTERM,
    }
}
