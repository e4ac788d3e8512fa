//! Keeps the processors from going to sleep.
//!
//! A processor with nothing to do halts, and in a virtual machine it takes the host tens of microseconds to have it go on: more
//! than a small request costs. With something to do that gives way to everything else, it never halts, and what is
//! measured is the servers.

use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};

/// One busy process for each processor, of the scheduling policy `SCHED_IDLE`, until it is dropped.
pub(crate) struct Awake(Vec<Child>);

impl Awake {
    pub(crate) fn keep() -> Result<Self> {
        let mut awake = Self(Vec::new());
        for _ in 0..std::thread::available_parallelism()?.get() {
            let busy = Command::new("chrt")
                .args(["--idle", "0", "sh", "-c", "while :; do :; done"])
                .stdin(Stdio::null())
                .spawn()
                .context("start chrt")?;
            awake.0.push(busy);
        }
        Ok(awake)
    }
}

impl Drop for Awake {
    fn drop(&mut self) {
        for busy in &mut self.0 {
            // It has nothing to lose, and may have ended already.
            let _ = busy.kill();
            let _ = busy.wait();
        }
    }
}
