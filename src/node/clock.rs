//! The time that the engine is handed: since the Unix epoch, and never going back.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::engine::types::Timestamp;

/// How far the system clock may run ahead before it is believed: after a suspend, in which the
/// monotonic clock stands still, or a late correction.
const AHEAD_MAX: Duration = Duration::from_secs(1);

/// Counts monotonically from the system clock, and follows it when it jumps ahead.
#[derive(Clone, Debug)]
pub struct Clock {
    started_at: Timestamp,
    /// A time and the instant at which it was.
    anchor: Arc<Mutex<(Timestamp, Instant)>>,
}

impl Clock {
    /// A clock that begins now.
    pub fn new() -> Self {
        let started_at = system();
        Self { started_at, anchor: Arc::new(Mutex::new((started_at, Instant::now()))) }
    }

    /// The time.
    pub fn now(&self) -> Timestamp {
        self.read(system(), Instant::now())
    }

    fn read(&self, system: Timestamp, instant: Instant) -> Timestamp {
        let mut anchor = self.anchor.lock().unwrap_or_else(PoisonError::into_inner);
        let counted = anchor.0 + instant.saturating_duration_since(anchor.1);
        if system > counted + AHEAD_MAX {
            *anchor = (system, instant);
            return system;
        }
        counted
    }

    /// When it began.
    pub fn started_at(&self) -> Timestamp {
        self.started_at
    }

    /// The instant of a time to come.
    pub fn instant(&self, at: Timestamp) -> tokio::time::Instant {
        let anchor = self.anchor.lock().unwrap_or_else(PoisonError::into_inner);
        (anchor.1 + at.since(anchor.0)).into()
    }
}

impl Default for Clock {
    fn default() -> Self {
        Self::new()
    }
}

fn system() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp(since.as_micros() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_follows_a_jump_ahead_and_never_goes_back() {
        let clock = Clock::new();
        let (start, begun) = *clock.anchor.lock().unwrap();
        let at = |s: u64| begun + Duration::from_secs(s);
        let plus = |s: u64| start + Duration::from_secs(s);
        assert_eq!(clock.read(plus(10), at(10)), plus(10));
        assert_eq!(clock.read(plus(2), at(11)), plus(11), "the system clock was set back");
        assert_eq!(clock.read(plus(500), at(12)), plus(500), "the machine slept");
        assert_eq!(clock.read(plus(501), at(13)), plus(501));
    }
}
