//! A token bucket: what a reserved flow may send before others, what a neighbour may cost, and how
//! much is taken from whom ([`crate::engine::overlay::gossip`]).

use std::time::Duration;

use crate::engine::types::Timestamp;

/// Burst of a flow's bucket: what its rate gives in this time.
const BURST: Duration = Duration::from_millis(100);
/// Smallest burst (bytes): a datagram of any size fits.
const BURST_BYTES_MIN: f64 = 50_000.0;

/// Fills at a rate, up to its burst.
#[derive(Clone, Debug)]
pub(in crate::engine) struct Bucket {
    rate: f64,
    burst: f64,
    tokens: f64,
    at: Timestamp,
}

impl Bucket {
    /// A full bucket for the bytes of a flow, of `rate` (bytes/s).
    pub(in crate::engine) fn new(rate: u64, now: Timestamp) -> Self {
        Self::with_burst(rate as f64, burst_bytes(rate), now)
    }

    /// A full bucket of `rate` (tokens/s) that holds `burst` tokens.
    pub(in crate::engine) fn with_burst(rate: f64, burst: f64, now: Timestamp) -> Self {
        Self { rate, burst, tokens: burst, at: now }
    }

    /// Another rate for the bytes of a flow from now on; the tokens stay.
    pub(in crate::engine) fn set_rate(&mut self, rate: u64, now: Timestamp) {
        self.fill(now);
        (self.rate, self.burst) = (rate as f64, burst_bytes(rate));
        self.tokens = self.tokens.min(self.burst);
    }

    /// Takes so many tokens (bytes, of a flow); false when there are not enough.
    pub(in crate::engine) fn take(&mut self, tokens: usize, now: Timestamp) -> bool {
        self.fill(now);
        let enough = self.tokens >= tokens as f64;
        if enough {
            self.tokens -= tokens as f64;
        }
        enough
    }

    /// How long it takes until there is a token.
    pub(in crate::engine) fn wait(&self) -> Duration {
        Duration::from_secs_f64(((1.0 - self.tokens) / self.rate).max(0.0))
    }

    /// Whether less than half of the burst is left, as of the last time that tokens were taken.
    pub(super) fn is_low(&self) -> bool {
        self.tokens < self.burst / 2.0
    }

    /// Whether it is full at `now`: as good as a new one.
    pub(in crate::engine) fn is_full(&mut self, now: Timestamp) -> bool {
        self.fill(now);
        self.tokens >= self.burst
    }

    fn fill(&mut self, now: Timestamp) {
        self.tokens += self.rate * now.since(self.at).as_secs_f64();
        self.tokens = self.tokens.min(self.burst);
        self.at = self.at.max(now);
    }
}

fn burst_bytes(rate: u64) -> f64 {
    (rate as f64 * BURST.as_secs_f64()).max(BURST_BYTES_MIN)
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
        assert!(bucket.take(50_000, start + Duration::from_secs(20)));
        assert!(!bucket.take(1_000, start + Duration::from_secs(20)));
    }
}
