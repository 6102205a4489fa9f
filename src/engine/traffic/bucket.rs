//! A token bucket: what a reserved flow may send before others, and what a neighbour may cost.

use std::time::Duration;

use crate::engine::types::Timestamp;

/// Burst of a bucket: what its rate gives in this time.
const BURST: Duration = Duration::from_millis(100);
/// Smallest burst (bytes): a datagram of any size fits.
const BURST_BYTES_MIN: f64 = 17_000.0;

/// Fills at a rate, up to its burst.
#[derive(Clone, Debug)]
pub(super) struct Bucket {
    rate: f64,
    tokens: f64,
    at: Timestamp,
}

impl Bucket {
    /// A full bucket of `rate` (bytes/s).
    pub(super) fn new(rate: u64, now: Timestamp) -> Self {
        let mut bucket = Self { rate: rate as f64, tokens: 0.0, at: now };
        bucket.tokens = bucket.burst();
        bucket
    }

    /// Another rate from now on; the tokens stay.
    pub(super) fn set_rate(&mut self, rate: u64, now: Timestamp) {
        self.fill(now);
        self.rate = rate as f64;
        self.tokens = self.tokens.min(self.burst());
    }

    /// Takes tokens for so many bytes; false when there are not enough.
    pub(super) fn take(&mut self, bytes: usize, now: Timestamp) -> bool {
        self.fill(now);
        let enough = self.tokens >= bytes as f64;
        if enough {
            self.tokens -= bytes as f64;
        }
        enough
    }

    /// Whether less than half of the burst is left, as of the last time that tokens were taken.
    pub(super) fn is_low(&self) -> bool {
        self.tokens < self.burst() / 2.0
    }

    fn fill(&mut self, now: Timestamp) {
        self.tokens += self.rate * now.since(self.at).as_secs_f64();
        self.tokens = self.tokens.min(self.burst());
        self.at = self.at.max(now);
    }

    fn burst(&self) -> f64 {
        (self.rate * BURST.as_secs_f64()).max(BURST_BYTES_MIN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_gives_its_burst_and_then_its_rate() {
        let start = Timestamp(1_000_000);
        let mut bucket = Bucket::new(1_000_000, start);
        let mut taken = |now: Timestamp| (0..1_000).filter(|_| bucket.take(1_000, now)).count();
        assert_eq!(taken(start), 100);
        assert_eq!(taken(start + Duration::from_millis(10)), 10);
        assert_eq!(taken(start), 0, "time does not go back");
        assert_eq!(taken(start + Duration::from_secs(10)), 100);
        bucket.set_rate(100_000, start + Duration::from_secs(20));
        assert!(bucket.take(17_000, start + Duration::from_secs(20)));
        assert!(!bucket.take(1_000, start + Duration::from_secs(20)));
    }
}
