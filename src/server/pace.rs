//! How much a session lets come together before it looks.
//!
//! A session that answers as fast as its client asks is woken for each request, and pays more for that than for the
//! request. A client with many requests in flight does not mind if a few of them are taken together; one that waits for
//! each answer does. Which kind it is shows when nobody answers for a moment: so now and then a busy session is silent, and
//! of what comes meanwhile it waits for half from then on. That is at most half of what the client has in flight, so the
//! client always has answers to go on with, and no request waits for longer than the other half took to come.

use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

/// How long a session is silent, at most: for as long as more comes in each of its steps. Who has everything in flight
/// sends no more, and is not kept waiting for longer.
pub(super) const SILENCE: Duration = Duration::from_millis(2);
pub(super) const STEP: Duration = Duration::from_micros(250);

/// How long it waits for its share at most: twice what half of the longest silence's bytes take at the speed that was seen, for
/// clients send in fits. So long may a request be late once, when all others have stopped.
pub(super) const MOMENT: Duration = SILENCE;

/// The part of what came in the silence that is waited for, and the part of it that is waited for when it did not come.
const SHARE: usize = 2;

/// Bytes that are waited for at most. The socket has room for twice as many.
const MOST: usize = 256 << 10;

/// Fewer are one small request.
const LEAST: usize = 100;

/// Waits between two silences, where they lead to something and where they do not: fewer than one request in a thousand
/// notices.
const OFTEN: u32 = 2 << 10;
const SELDOM: u32 = 16 << 10;

/// Waits before the first.
const SOON: u32 = 512;

/// The part of a processor that a session must be using to be silent, and to go on waiting for its share. Who has
/// time to spare answers at once.
const BUSY: f64 = 0.4;
const STILL_BUSY: f64 = 0.15;

#[derive(Debug)]
pub(super) struct Pace {
    /// Bytes that are waited for; 1 is whatever comes.
    low_water: usize,
    /// Waits from one silence to the next, and until the next.
    interval: u32,
    left: u32,
    /// When the last silence was due, and the processor time of this thread until then.
    since: Instant,
    used: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            low_water: 1,
            interval: SOON,
            left: SOON,
            since: Instant::now(),
            used: Duration::ZERO,
        }
    }
}

impl Pace {
    /// Bytes to wait for, for a [`MOMENT`] at most; 1 is whatever comes, for however long.
    pub(super) fn low_water(&self) -> usize {
        self.low_water
    }

    /// Counts a wait; whether it is time to be silent first.
    pub(super) fn is_silence_due(&mut self) -> bool {
        self.left -= 1;
        self.left == 0 && self.is_worthwhile()
    }

    fn is_worthwhile(&mut self) -> bool {
        let used = thread_time();
        let load = (used.saturating_sub(self.used)).as_secs_f64()
            / self.since.elapsed().as_secs_f64().max(f64::EPSILON);
        (self.since, self.used) = (Instant::now(), used);
        let busy = if self.low_water > 1 { STILL_BUSY } else { BUSY };
        if load < busy {
            self.look_at_once();
        }
        load >= busy
    }

    /// So many bytes came while the session was silent.
    pub(super) fn heard(&mut self, bytes: usize) {
        let share = (bytes / SHARE).min(MOST);
        if share < LEAST {
            return self.look_at_once();
        }
        self.low_water = share;
        self.interval = OFTEN;
        self.left = OFTEN;
    }

    /// What was waited for did not come, but so many bytes did.
    pub(super) fn vain(&mut self, bytes: usize) {
        self.low_water = self.low_water.min(bytes) / SHARE;
        if self.low_water < LEAST {
            self.look_at_once();
        }
    }

    fn look_at_once(&mut self) {
        self.low_water = 1;
        self.interval = (2 * self.interval).min(SELDOM);
        self.left = self.interval;
    }
}

/// The processor time that this thread has used.
fn thread_time() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Has so many waits go by; how often the session was silent, when so many bytes come in a silence.
    fn waits(pace: &mut Pace, count: u32, heard: usize) -> u32 {
        let mut silences = 0;
        for _ in 0..count {
            pace.left -= 1;
            if pace.left == 0 {
                pace.heard(heard);
                silences += 1;
            }
        }
        silences
    }

    #[test]
    fn a_part_of_many_requests_is_waited_for() {
        let mut pace = Pace::default();
        assert_eq!(waits(&mut pace, SOON, 64 * 50), 1);
        assert_eq!(pace.low_water(), 32 * 50);
        assert_eq!(waits(&mut pace, 10 * OFTEN, 8 << 20), 10);
        assert_eq!(pace.low_water(), MOST);
    }

    #[test]
    fn who_waits_for_each_answer_hardly_ever_meets_a_silence() {
        let mut pace = Pace::default();
        let silences = waits(&mut pace, 1_000_000, 50);
        assert!(silences < 1_000_000 / 10_000, "{silences}");
        assert_eq!(pace.low_water(), 1);
    }

    #[test]
    fn what_does_not_come_is_not_waited_for_again() {
        let mut pace = Pace::default();
        pace.heard(64 * 50);
        for (came, left) in [(1599, 799), (5000, 399), (300, 150), (4, 1)] {
            pace.vain(came);
            assert_eq!(pace.low_water(), left);
        }
        pace.heard(64 * 4178);
        pace.vain(0);
        assert_eq!(pace.low_water(), 1);
    }

    #[test]
    fn a_session_with_time_to_spare_is_never_silent() {
        // The time that this test's thread has used before is not the session's.
        let mut pace = Pace {
            used: thread_time(),
            ..Pace::default()
        };
        std::thread::sleep(Duration::from_millis(50));
        let silences = (0..SOON).filter(|_| pace.is_silence_due()).count();
        assert_eq!(silences, 0);
        assert_eq!(pace.left, 2 * SOON);
    }

    #[test]
    fn a_busy_session_is_silent_now_and_then() {
        let mut pace = Pace {
            used: thread_time(),
            ..Pace::default()
        };
        while thread_time() - pace.used < Duration::from_millis(20) {
            std::hint::spin_loop();
        }
        // The machine may have given the processor to others meanwhile.
        pace.since = Instant::now() - Duration::from_millis(25);
        assert!((0..SOON).any(|_| pace.is_silence_due()));
    }
}
