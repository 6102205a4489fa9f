//! How long datagrams waited in a queue: a histogram of fixed size.
//!
//! Eight buckets an octave, so that a quantile is at most an eighth too high (as in Tene's
//! HdrHistogram). Two histograms take turns, so that the newest one or two slices are known.

use std::time::Duration;

/// Waits below this (µs) count as none.
const LEAST_US: u64 = 16;
/// Longest wait that is told from longer ones: 2^24 µs, 17 s.
const OCTAVES: usize = 20;
const PARTS: usize = 8;
const BUCKETS: usize = OCTAVES * PARTS + 1;

/// Quantiles of a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WaitQuantiles {
    /// Median.
    pub p50: Duration,
    /// 95th percentile.
    pub p95: Duration,
    /// 99th percentile.
    pub p99: Duration,
}

/// The waits of this slice and the one before.
#[derive(Clone, Debug)]
pub struct RecentWaits {
    current: [u32; BUCKETS],
    before: [u32; BUCKETS],
}

impl Default for RecentWaits {
    fn default() -> Self {
        Self { current: [0; BUCKETS], before: [0; BUCKETS] }
    }
}

impl RecentWaits {
    /// One more wait.
    pub fn record(&mut self, wait: Duration) {
        let count = &mut self.current[bucket(wait)];
        *count = count.saturating_add(1);
    }

    /// A new slice begins.
    pub fn turn(&mut self) {
        self.before = std::mem::replace(&mut self.current, [0; BUCKETS]);
    }

    /// Quantiles of both slices together; `None` when nothing waited.
    pub fn quantiles(&self) -> Option<WaitQuantiles> {
        let counts = || {
            let both = self.current.iter().zip(&self.before);
            both.map(|(now, before)| u64::from(*now) + u64::from(*before))
        };
        let total: u64 = counts().sum();
        let quantile = |percent: u64| {
            let rank = (total * percent).div_ceil(100).max(1);
            let mut below = 0;
            let index = counts().position(|count| {
                below += count;
                below >= rank
            });
            index.map(longest)
        };
        Some(WaitQuantiles { p50: quantile(50)?, p95: quantile(95)?, p99: quantile(99)? })
    }
}

fn bucket(wait: Duration) -> usize {
    let us = u64::try_from(wait.as_micros()).unwrap_or(u64::MAX);
    if us < LEAST_US {
        return 0;
    }
    let octave = us.ilog2() as usize;
    let part = (us >> (octave - 3)) as usize % PARTS;
    let index = (octave - LEAST_US.ilog2() as usize) * PARTS + part + 1;
    index.min(BUCKETS - 1)
}

/// The longest wait that falls into a bucket.
fn longest(index: usize) -> Duration {
    let Some(index) = index.checked_sub(1) else { return Duration::ZERO };
    let octave = index / PARTS + LEAST_US.ilog2() as usize;
    let next_part = (index % PARTS + PARTS + 1) as u64;
    Duration::from_micros((next_part << (octave - 3)) - 1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_newest_two_slices_are_known() {
        let mut waits = RecentWaits::default();
        assert_eq!(waits.quantiles(), None);
        for ms in 1..=100 {
            waits.record(Duration::from_millis(ms));
        }
        waits.turn();
        let quantiles = waits.quantiles().unwrap();
        for (quantile, ms) in [(quantiles.p50, 50), (quantiles.p95, 95), (quantiles.p99, 99)] {
            let exact = Duration::from_millis(ms);
            assert!(quantile >= exact && quantile <= exact * 9 / 8, "{quantile:?} of {exact:?}");
        }
        waits.record(Duration::ZERO);
        waits.turn();
        let latest = waits.quantiles().unwrap();
        assert_eq!((latest.p50, latest.p99), (Duration::ZERO, Duration::ZERO));
        waits.turn();
        assert_eq!(waits.quantiles(), None);
    }

    proptest! {
        #[test]
        fn a_bucket_tells_a_wait_to_an_eighth(us in LEAST_US..1 << 24) {
            let told = longest(bucket(Duration::from_micros(us))).as_micros() as u64;
            prop_assert!((us..=us + us / 8).contains(&told), "{} told as {}", us, told);
        }

        #[test]
        fn any_wait_has_a_bucket(us: u64) {
            prop_assert!(bucket(Duration::from_micros(us)) < BUCKETS);
        }
    }
}
