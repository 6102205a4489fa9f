//! How restless the mesh is: the share of a node's peers that leave, by the hour.
//!
//! Where peers come and go, more links are kept and probed more often, so that one that leaves takes
//! no good route with it and is noticed sooner.

use std::collections::VecDeque;
use std::time::Duration;

use crate::engine::types::Timestamp;

/// Departures are counted over this time.
pub const WINDOW: Duration = Duration::from_secs(600);
/// Departures remembered.
const DEPARTURES_MAX: usize = 1_024;
/// Share of the peers leaving in an hour from which on the mesh is restless: 20 % an hour is what
/// file-sharing networks see (Stutzbach and Rejaie, 2006, median sessions of hours).
pub const RESTLESS: f64 = 0.2;
/// Fewest departures in the window that mean anything.
const DEPARTURES_MIN: usize = 2;

/// Counts departures.
#[derive(Clone, Debug, Default)]
pub struct ChurnDetector {
    departures: VecDeque<Timestamp>,
}

impl ChurnDetector {
    /// A peer left, not because this node wanted it to.
    pub fn left(&mut self, now: Timestamp) {
        if self.departures.len() >= DEPARTURES_MAX {
            self.departures.pop_front();
        }
        self.departures.push_back(now);
    }

    /// Share of the peers that leave in an hour, by the last [`WINDOW`]. `peers` are those here now.
    fn per_hour(&self, peers: usize, now: Timestamp) -> f64 {
        let recent = self.departures.iter().filter(|at| now.since(**at) < WINDOW).count();
        if recent < DEPARTURES_MIN {
            return 0.0;
        }
        let hours = WINDOW.as_secs_f64() / 3_600.0;
        recent as f64 / (peers + recent) as f64 / hours
    }

    /// Whether the mesh is restless.
    pub fn is_restless(&self, peers: usize, now: Timestamp) -> bool {
        self.per_hour(peers, now) >= RESTLESS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(s: u64) -> Timestamp {
        Timestamp(s * 1_000_000)
    }

    #[test]
    fn departures_make_restless_for_a_while_and_one_does_not() {
        let mut churn = ChurnDetector::default();
        assert!(!churn.is_restless(8, seconds(0)));
        churn.left(seconds(10));
        assert!(!churn.is_restless(8, seconds(11)), "one may be an accident");
        churn.left(seconds(20));
        assert!(churn.is_restless(8, seconds(21)));
        assert!(
            (churn.per_hour(8, seconds(21)) - 1.2).abs() < 1e-9,
            "2 of 10 in a sixth of an hour"
        );
        assert!(!churn.is_restless(200, seconds(21)), "2 of 200 are few");
        assert!(!churn.is_restless(8, seconds(700)), "long ago");
    }
}
