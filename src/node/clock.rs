//! The time that the engine is handed: since the Unix epoch, and never going back.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use crate::engine::types::Timestamp;

/// Reads the system clock once and counts on from there monotonically.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    started: Instant,
    started_at: Timestamp,
}

impl Clock {
    /// A clock that begins now.
    pub fn new() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { started: Instant::now(), started_at: Timestamp(since.as_micros() as u64) }
    }

    /// The time.
    pub fn now(&self) -> Timestamp {
        self.started_at + self.started.elapsed()
    }

    /// When it began.
    pub fn started_at(&self) -> Timestamp {
        self.started_at
    }

    /// The instant of a time to come.
    pub fn instant(&self, at: Timestamp) -> tokio::time::Instant {
        (self.started + at.since(self.started_at)).into()
    }
}

impl Default for Clock {
    fn default() -> Self {
        Self::new()
    }
}
