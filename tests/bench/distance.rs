//! How far the machine's processors are from each other.
//!
//! A virtual machine's processors are threads of its host, which has two of them share a cache at one time and be on
//! different sockets at another. What one of them has written then costs the other several times as much, and all that goes
//! through loopback is that. So what counts is measured while they are near.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde_json::{Value, json};

use super::spread::round;

/// Round trips of one look, and looks of which the fastest counts: an interrupt makes others slow.
const TRIPS: u32 = 400;
const LOOKS: u32 = 20;

/// Nanoseconds of a round trip between processors that are near: those that share a cache take some 80, and 30 where
/// they are threads of one core, those of different sockets 400.
const NEAR: f64 = 200.0;

/// How long it is looked for at the beginning. Where it is not found, all counts as near.
const WATCH: Duration = Duration::from_secs(2);

/// How long to let the host do something about it.
const PAUSE: Duration = Duration::from_millis(50);

/// How often something is measured again, and how long is waited before each, before it is taken as it is.
const AGAIN: u32 = 10;
const PATIENCE: Duration = Duration::from_secs(3);

pub(crate) struct Distance {
    /// Two processors, where there are two.
    processors: Option<[usize; 2]>,
    /// Nanoseconds of a round trip between processors that are near enough.
    near: f64,
    /// Those that were seen.
    least: f64,
    most: f64,
    measured: u32,
    again: u32,
    far: u32,
}

impl Distance {
    /// Finds out whether they are ever near.
    pub(crate) fn watch() -> Result<Self> {
        let usable = sched_getaffinity(None)?;
        let mut usable = (0..CpuSet::MAX_CPU).filter(|processor| usable.is_set(*processor));
        let mut distance = Self {
            processors: usable.next().zip(usable.next()).map(<[usize; 2]>::from),
            near: NEAR,
            least: f64::INFINITY,
            most: 0.0,
            measured: 0,
            again: 0,
            far: 0,
        };
        let began = Instant::now();
        while distance.processors.is_some() && began.elapsed() < WATCH {
            distance.is_near()?;
            std::thread::sleep(PAUSE);
        }
        if distance.least > NEAR {
            distance.near = f64::INFINITY;
        }
        Ok(distance)
    }

    /// Measures until the processors are near before and after.
    pub(crate) fn near<T>(&mut self, mut measure: impl FnMut() -> Result<T>) -> Result<T> {
        self.measured += 1;
        for _ in 0..AGAIN {
            let began = Instant::now();
            while !self.is_near()? && began.elapsed() < PATIENCE {
                std::thread::sleep(PAUSE);
            }
            let found = measure()?;
            if self.is_near()? {
                return Ok(found);
            }
            self.again += 1;
        }
        self.far += 1;
        measure()
    }

    /// What the figures are worth.
    pub(crate) fn json(&self) -> Value {
        json!({
            "a cache line's round trip between two processors, ns": [round(self.least), round(self.most)],
            "measured": self.measured,
            "again, because they were far from each other": self.again,
            "though they were": self.far,
        })
    }

    fn is_near(&mut self) -> Result<bool> {
        let Some(processors) = self.processors else {
            return Ok(true);
        };
        let trip = round_trip(processors)?;
        self.least = self.least.min(trip);
        self.most = self.most.max(trip);
        Ok(trip <= self.near)
    }
}

/// Nanoseconds that a cache line takes from one processor to the other and back.
fn round_trip(processors: [usize; 2]) -> Result<f64> {
    let line = AtomicU32::new(0);
    let wait = |value| {
        while line.load(Ordering::Acquire) != value {
            std::hint::spin_loop();
        }
    };
    let [one, other] = processors;
    std::thread::scope(|scope| {
        let there = scope.spawn(|| {
            // Where it cannot be kept on its processor it answers all the same.
            let kept = keep_on(other);
            for turn in 0..LOOKS * TRIPS {
                wait(2 * turn + 1);
                line.store(2 * turn + 2, Ordering::Release);
            }
            kept
        });
        let here = scope.spawn(|| {
            let kept = keep_on(one);
            let mut best = f64::INFINITY;
            for look in 0..LOOKS {
                let began = Instant::now();
                for turn in look * TRIPS..(look + 1) * TRIPS {
                    line.store(2 * turn + 1, Ordering::Release);
                    wait(2 * turn + 2);
                }
                best = best.min(began.elapsed().as_nanos() as f64 / f64::from(TRIPS));
            }
            kept.map(|()| best)
        });
        match (there.join(), here.join()) {
            (Ok(there), Ok(here)) => Ok(there.and(here)?),
            _ => bail!("a thread failed"),
        }
    })
}

fn keep_on(processor: usize) -> rustix::io::Result<()> {
    let mut only = CpuSet::new();
    only.set(processor);
    sched_setaffinity(None, &only)
}
