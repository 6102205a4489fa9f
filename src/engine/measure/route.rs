//! End-to-end history of every route that was probed.
//!
//! A history holds the newest completed probes of one route, the same ones that the offline
//! feature builder sees when it looks back from the same moment.

use std::collections::BTreeMap;

use super::link::LOSS_WINDOW;
use super::quarantine::Quarantine;
use super::statistics::{Statistics, WINDOW};
use super::window::{Window, mean_absolute_difference};
use crate::engine::types::{Route, Timestamp};

/// Completed probes over which loss and jitter are counted.
pub const HISTORY_WINDOW: usize = 20;
/// Lost probes in a row after which a route is dead.
pub const ROUTE_DEAD_AFTER: u32 = 3;
/// Routes with a history; the one probed longest ago makes room. 8 candidates and a backup for
/// each of about 100 destinations.
pub const HISTORIES_MAX: usize = 1_024;

/// Loss of a route from end to end, 0 to 1: what its links claim together, corrected by the share
/// lost of `probes` probes over the whole route. The claim counts as much as the probes that a link
/// counts its loss over.
pub fn end_to_end_loss(claimed: f64, lost: f64, probes: usize) -> f64 {
    let (claims, probes) = (LOSS_WINDOW as f64, probes as f64);
    (claimed * claims + lost * probes) / (claims + probes)
}

/// What the traffic of one tunnel met on one route, by the receipts of the far end and this node's
/// own counters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteReport {
    /// The route, from this node.
    pub route: Route,
    /// Its number.
    pub route_id: u32,
    /// Datagrams sent over it, up to the newest that a receipt covers.
    pub sent: u64,
    /// Those of them that the far end has received.
    pub received: u64,
    /// Bytes sent over it, headers included.
    pub bytes: u64,
    /// Those received that had met congestion.
    pub marked: u64,
    /// Smoothed round-trip time by the receipts (µs); `None` without a receipt.
    pub rtt_us: Option<u64>,
    /// Datagrams that the far end sent back over it, by their sequence numbers.
    pub back_sent: u64,
    /// Those that this node has received.
    pub back_received: u64,
    /// Those received that had met congestion.
    pub back_marked: u64,
    /// Length of the time that the report covers (µs).
    pub duration_us: u64,
}

impl RouteReport {
    /// This report and the one after it of the same route, as one.
    pub fn and(self, next: Self) -> Self {
        Self {
            sent: self.sent + next.sent,
            received: self.received + next.received,
            bytes: self.bytes + next.bytes,
            marked: self.marked + next.marked,
            rtt_us: next.rtt_us.or(self.rtt_us),
            back_sent: self.back_sent + next.back_sent,
            back_received: self.back_received + next.back_received,
            back_marked: self.back_marked + next.back_marked,
            duration_us: self.duration_us + next.duration_us,
            ..next
        }
    }
}

/// The newest completed probes of one route.
#[derive(Clone, Debug)]
pub struct RouteHistory {
    answered_ms: Window<f64>,
    statistics: Option<Statistics>,
    jitter_ms: Option<f64>,
    lost: Window<bool>,
    lost_at: Option<Timestamp>,
    completed: u64,
    failure_streak: u32,
    last_done_at: Timestamp,
    /// Real traffic over it was not answered, and no probe since.
    silent: bool,
    quarantine: Quarantine,
}

impl RouteHistory {
    fn new() -> Self {
        Self {
            answered_ms: Window::new(WINDOW),
            statistics: None,
            jitter_ms: None,
            lost: Window::new(HISTORY_WINDOW),
            lost_at: None,
            completed: 0,
            failure_streak: 0,
            last_done_at: Timestamp::default(),
            silent: false,
            quarantine: Quarantine::default(),
        }
    }

    /// Round-trip times (ms) of the newest `count` answered probes, oldest first.
    pub fn rtts_ms(&self, count: usize) -> Vec<f64> {
        self.answered_ms.newest(count).collect()
    }

    /// Statistics over the newest answered probes; `None` before the first.
    pub fn statistics(&self) -> Option<&Statistics> {
        self.statistics.as_ref()
    }

    /// Mean absolute difference within the newest [`HISTORY_WINDOW`] answered (ms).
    pub fn jitter_ms(&self) -> Option<f64> {
        self.jitter_ms
    }

    /// When the newest lost probe was given up.
    pub fn lost_at(&self) -> Option<Timestamp> {
        self.lost_at
    }

    /// Share of lost probes among the newest [`HISTORY_WINDOW`], 0 to 1.
    pub fn loss(&self) -> f64 {
        let lost = self.lost.newest(HISTORY_WINDOW).filter(|lost| *lost).count();
        lost as f64 / self.lost.len().max(1) as f64
    }

    /// Probes completed since the node started.
    pub fn completed(&self) -> u64 {
        self.completed
    }

    /// Probes lost in a row up to now.
    pub fn failure_streak(&self) -> u32 {
        self.failure_streak
    }

    /// When the newest probe completed.
    pub fn last_done_at(&self) -> Timestamp {
        self.last_done_at
    }
}

/// The histories of all routes of this node.
#[derive(Clone, Debug, Default)]
pub struct RouteHistories {
    histories: BTreeMap<Route, RouteHistory>,
}

impl RouteHistories {
    /// A probe over `route` completed.
    pub fn probed(&mut self, route: &Route, done_at: Timestamp, rtt_us: Option<u64>) {
        let history = self.entry(route);
        history.completed += 1;
        history.last_done_at = done_at;
        history.lost.push(rtt_us.is_none());
        match rtt_us {
            Some(rtt_us) => {
                history.answered_ms.push(rtt_us as f64 / 1e3);
                history.statistics = Statistics::of(&history.answered_ms);
                history.jitter_ms = mean_absolute_difference(&history.rtts_ms(HISTORY_WINDOW));
                history.failure_streak = 0;
                history.silent = false;
            }
            None => {
                history.failure_streak += 1;
                history.lost_at = Some(done_at);
            }
        }
    }

    /// Traffic over `route` was not answered: it is dead until a probe is. Its statistics stay what
    /// the probes say.
    pub fn silenced(&mut self, route: &Route, at: Timestamp) {
        self.failed(route, at);
        self.entry(route).silent = true;
    }

    /// A route in use had to be left because it failed: it is kept back for a while.
    pub fn failed(&mut self, route: &Route, at: Timestamp) {
        let history = self.entry(route);
        history.quarantine.failed(at);
        if history.completed == 0 {
            history.last_done_at = at;
        }
    }

    /// By how much round trips change from one answered probe of a route to the next: the sum of the
    /// absolute ln ratios, and how many there are. A millisecond is added to each, below which changes
    /// are those of the processors.
    pub fn changes(&self) -> (f64, f64) {
        let mut sum = (0.0, 0.0);
        for history in self.histories.values() {
            let rtts_ms = history.rtts_ms(WINDOW);
            for pair in rtts_ms.windows(2) {
                sum.0 += ((pair[1] + 1.0) / (pair[0] + 1.0)).ln().abs();
                sum.1 += 1.0;
            }
        }
        sum
    }

    /// Whether a route has failed of late and should not be used while there is another.
    pub fn is_held(&self, route: &Route, now: Timestamp) -> bool {
        self.histories.get(route).is_some_and(|known| known.quarantine.is_held(now))
    }

    /// The history of a route that was probed at least once.
    pub fn of(&self, route: &Route) -> Option<&RouteHistory> {
        self.histories.get(route).filter(|history| history.completed > 0)
    }

    /// Whether the newest [`ROUTE_DEAD_AFTER`] probes of this route were all lost, or its traffic is
    /// not answered.
    pub fn is_dead(&self, route: &Route) -> bool {
        let history = self.histories.get(route);
        history.is_some_and(|known| known.silent || known.failure_streak >= ROUTE_DEAD_AFTER)
    }

    fn entry(&mut self, route: &Route) -> &mut RouteHistory {
        if !self.histories.contains_key(route) && self.histories.len() >= HISTORIES_MAX {
            let oldest = self.histories.iter().min_by_key(|(_, history)| history.last_done_at);
            if let Some(oldest) = oldest.map(|(route, _)| route.clone()) {
                self.histories.remove(&oldest);
            }
        }
        self.histories.entry(route.clone()).or_insert_with(RouteHistory::new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::types::NodeId;

    fn route(last: u16) -> Route {
        let [high, low] = last.to_be_bytes();
        Route::new([NodeId([0; 8]), NodeId([9, 0, 0, 0, 0, 0, high, low])]).unwrap()
    }

    #[test]
    fn a_route_is_dead_after_three_losses_and_alive_with_an_answer() {
        let mut histories = RouteHistories::default();
        for at in 1..=3 {
            assert!(!histories.is_dead(&route(1)));
            histories.probed(&route(1), Timestamp(at), None);
        }
        assert!(histories.is_dead(&route(1)));
        histories.probed(&route(1), Timestamp(4), Some(5_000));
        assert!(!histories.is_dead(&route(1)));
        let history = histories.of(&route(1)).unwrap();
        assert_eq!(history.rtts_ms(5), [5.0]);
        assert!((history.loss() - 0.75).abs() < 1e-12);
    }

    #[test]
    fn a_silent_route_is_dead_until_a_probe_is_answered_and_its_statistics_stay() {
        let mut histories = RouteHistories::default();
        histories.silenced(&route(1), Timestamp(1));
        assert!(histories.is_dead(&route(1)));
        assert!(histories.of(&route(1)).is_none(), "it was never probed");
        histories.probed(&route(1), Timestamp(2), None);
        assert!(histories.is_dead(&route(1)));
        histories.probed(&route(1), Timestamp(3), Some(5_000));
        assert!(!histories.is_dead(&route(1)));
        histories.silenced(&route(1), Timestamp(4));
        let history = histories.of(&route(1)).unwrap();
        assert_eq!((history.failure_streak(), history.completed()), (0, 2));
        assert_eq!(history.last_done_at(), Timestamp(3), "of the newest probe");
        assert!(histories.is_dead(&route(1)));
    }

    #[test]
    fn histories_are_bounded_and_the_stalest_makes_room() {
        let mut histories = RouteHistories::default();
        for index in 0..=HISTORIES_MAX as u16 {
            histories.probed(&route(index), Timestamp(u64::from(index) + 1), Some(1));
        }
        assert!(histories.of(&route(0)).is_none());
        assert!(histories.of(&route(1)).is_some());
        assert_eq!(histories.histories.len(), HISTORIES_MAX);
    }
}
