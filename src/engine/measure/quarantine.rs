//! How long a route that failed is kept back, even though its probes are answered.
//!
//! The first time for [`HOLD_FIRST`], then twice as long each time, [`HOLD_MAX`] at most: a route that
//! passes probes and drops data would be taken and left every few seconds. One failure is forgiven for
//! each [`FORGIVES`] after the end of a hold. A failure within a hold is the same failure, or one that
//! had to be risked because nothing else was there.

use std::time::Duration;

use crate::engine::types::Timestamp;

/// The first hold: as long as a choice is kept by default.
pub const HOLD_FIRST: Duration = Duration::from_secs(2);
/// The longest hold.
pub const HOLD_MAX: Duration = Duration::from_secs(60);
/// How long after a hold until one failure is forgiven.
pub const FORGIVES: Duration = Duration::from_secs(60);
/// Failures that are counted: with so many the hold is the longest.
const FAILURES_MAX: u32 = 6;

/// The failures of one route. See the module documentation for the rule.
#[derive(Clone, Copy, Debug, Default)]
pub struct Quarantine {
    failures: u32,
    until: Timestamp,
}

impl Quarantine {
    /// The route had to be left.
    pub fn failed(&mut self, now: Timestamp) {
        if self.is_held(now) {
            return;
        }
        let forgiven = now.since(self.until).as_micros() / FORGIVES.as_micros();
        let left = self.failures.saturating_sub(u32::try_from(forgiven).unwrap_or(u32::MAX));
        self.failures = (left + 1).min(FAILURES_MAX);
        self.until = now + (HOLD_FIRST * 2u32.pow(self.failures - 1)).min(HOLD_MAX);
    }

    /// Whether it should not be used while there is another.
    pub fn is_held(&self, now: Timestamp) -> bool {
        now < self.until
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(s: u64) -> Timestamp {
        Timestamp((1_000_000 + s) * 1_000_000)
    }

    /// Seconds until the hold that begins at `now` ends.
    fn fail(quarantine: &mut Quarantine, now: u64) -> u64 {
        quarantine.failed(at(now));
        (0..).find(|s| !quarantine.is_held(at(now + s))).unwrap()
    }

    #[test]
    fn the_hold_doubles_each_time_and_has_a_limit() {
        let (mut quarantine, mut now) = (Quarantine::default(), 0);
        assert!(!quarantine.is_held(at(0)));
        for hold in [2, 4, 8, 16, 32, 60, 60, 60] {
            assert_eq!(fail(&mut quarantine, now), hold);
            now += hold;
        }
    }

    #[test]
    fn a_failure_within_a_hold_does_not_count_and_time_forgives() {
        let mut quarantine = Quarantine::default();
        assert_eq!(fail(&mut quarantine, 0), 2);
        assert_eq!(fail(&mut quarantine, 1), 1, "the rest of the first");
        assert_eq!(fail(&mut quarantine, 2), 4);
        assert_eq!(fail(&mut quarantine, 6 + 59), 8);
        assert_eq!(fail(&mut quarantine, 73 + 60), 8, "one is forgiven");
        assert_eq!(fail(&mut quarantine, 141 + 600), 2, "all are");
    }
}
