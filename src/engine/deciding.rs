//! When to decide about which tunnel: each at its own interval, so that not all of a node's tunnels
//! move at the same moment, and sooner when there is a reason.
//!
//! A tunnel whose route is lost is decided at once. One that is unreachable is decided soon after any
//! link or route came back; one whose route turned bad, that is, twice in a row much slower than what
//! the last decision was made on, is decided now, but not more often than [`SOONEST`].

use std::collections::BTreeMap;
use std::time::Duration;

use crate::engine::types::{Timestamp, TunnelId};

/// Shortest time between two decisions about a tunnel whose route still delivers.
pub const SOONEST: Duration = Duration::from_millis(200);
/// How long a tunnel without a route waits after a link came: others may come with it.
pub const UNREACHABLE_AFTER: Duration = Duration::from_millis(50);
/// The interval between two decisions varies by this share in both directions.
const JITTER: f64 = 0.1;
/// Observations in a row that are worse than expected before a route has turned bad.
const BAD_IN_A_ROW: u32 = 2;
/// How much slower than expected is worse: by this factor ...
const BAD_FACTOR: f64 = 1.2;
/// ... and by so many milliseconds.
const BAD_MS: f64 = 5.0;
/// How much more loss than expected is worse (a share).
const BAD_LOSS: f64 = 0.03;

/// What the last decision about a tunnel was made on.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Expected {
    /// Round-trip time forecast for the route in use (ms).
    pub(super) rtt_ms: Option<f64>,
    /// Sum of the advertised round-trip times of its links (ms).
    pub(super) links_ms: Option<f64>,
    /// Share of its probes that were lost, 0 to 1.
    pub(super) loss: f64,
}

#[derive(Clone, Copy, Debug)]
struct Tunnel {
    due_at: Timestamp,
    decided_at: Option<Timestamp>,
    expected: Expected,
    /// Round trips in a row that were much slower than expected, and reports that lost much more.
    slow: u32,
    lossy: u32,
    /// It was too much of either.
    bad: bool,
}

/// See the module documentation.
#[derive(Clone, Debug, Default)]
pub(super) struct Deciding {
    tunnels: BTreeMap<TunnelId, Tunnel>,
}

/// Whether a round-trip time (ms) is much worse than the expected one.
fn is_worse(rtt_ms: f64, expected_ms: f64) -> bool {
    rtt_ms > expected_ms * BAD_FACTOR && rtt_ms > expected_ms + BAD_MS
}

impl Deciding {
    /// A tunnel is open: it is decided now.
    pub(super) fn open(&mut self, tunnel: TunnelId, now: Timestamp) {
        let expected = Expected::default();
        let open =
            Tunnel { due_at: now, decided_at: None, expected, slow: 0, lossy: 0, bad: false };
        self.tunnels.insert(tunnel, open);
    }

    /// A tunnel is closed.
    pub(super) fn close(&mut self, tunnel: TunnelId) {
        self.tunnels.remove(&tunnel);
    }

    /// To be decided at `at`, if not before, whatever was decided when.
    pub(super) fn by(&mut self, tunnel: TunnelId, at: Timestamp) {
        if let Some(known) = self.tunnels.get_mut(&tunnel) {
            known.due_at = known.due_at.min(at);
        }
    }

    /// To be decided now, or [`SOONEST`] after the last decision.
    pub(super) fn soon(&mut self, tunnel: TunnelId, now: Timestamp) {
        if let Some(known) = self.tunnels.get_mut(&tunnel) {
            let at = known.decided_at.map_or(now, |at| now.max(at + SOONEST));
            known.due_at = known.due_at.min(at);
        }
    }

    /// The tunnels that are due.
    pub(super) fn due(&self, now: Timestamp) -> Vec<TunnelId> {
        let due = self.tunnels.iter().filter(|(_, known)| known.due_at <= now);
        due.map(|(tunnel, _)| *tunnel).collect()
    }

    /// When the next one is.
    pub(super) fn next_timeout(&self) -> Option<Timestamp> {
        self.tunnels.values().map(|known| known.due_at).min()
    }

    /// A tunnel was decided, on this; the next time is after `interval`, give or take a tenth by
    /// `random` (0 to 1).
    pub(super) fn decided(
        &mut self,
        tunnel: TunnelId,
        expected: Expected,
        now: Timestamp,
        interval: Duration,
        random: f64,
    ) {
        if let Some(known) = self.tunnels.get_mut(&tunnel) {
            let factor = 1.0 - JITTER + 2.0 * JITTER * random.clamp(0.0, 1.0);
            let due_at = now + interval.mul_f64(factor);
            let decided_at = Some(now);
            *known = Tunnel { due_at, decided_at, expected, slow: 0, lossy: 0, bad: false };
        }
    }

    /// A round trip over the route in use of a tunnel took so long (ms), and so many of what was sent
    /// were lost (a share, where known).
    pub(super) fn met(&mut self, tunnel: TunnelId, rtt_ms: f64, loss: Option<f64>, now: Timestamp) {
        let Some(known) = self.tunnels.get_mut(&tunnel) else { return };
        let expected = known.expected;
        let slow = expected.rtt_ms.is_some_and(|expected_ms| is_worse(rtt_ms, expected_ms));
        known.slow = if slow { known.slow + 1 } else { 0 };
        // A probe in time says nothing about the loss of traffic.
        if let Some(loss) = loss {
            let lossy = loss > expected.loss + BAD_LOSS;
            known.lossy = if lossy { known.lossy + 1 } else { 0 };
        }
        if known.slow.max(known.lossy) >= BAD_IN_A_ROW {
            known.bad = true;
            self.soon(tunnel, now);
        }
    }

    /// Whether the route in use of a tunnel has turned bad since the last decision.
    pub(super) fn has_turned_bad(&self, tunnel: TunnelId) -> bool {
        self.tunnels.get(&tunnel).is_some_and(|known| known.bad)
    }

    /// The tunnel would leave a route that has turned bad, and may not yet.
    pub(super) fn still_bad(&mut self, tunnel: TunnelId) {
        if let Some(known) = self.tunnels.get_mut(&tunnel) {
            known.bad = true;
        }
    }

    /// The links of the route in use are now advertised with this sum (ms).
    pub(super) fn advertised(&mut self, tunnel: TunnelId, links_ms: f64, now: Timestamp) {
        let expected = self.tunnels.get(&tunnel).and_then(|known| known.expected.links_ms);
        if expected.is_some_and(|expected_ms| is_worse(links_ms, expected_ms)) {
            self.soon(tunnel, now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: TunnelId = TunnelId(1);
    const TWO: TunnelId = TunnelId(2);
    const INTERVAL: Duration = Duration::from_secs(2);

    fn at(ms: u64) -> Timestamp {
        Timestamp(ms * 1_000)
    }

    fn decided(on: Expected) -> Deciding {
        let mut deciding = Deciding::default();
        deciding.open(ONE, at(0));
        deciding.open(TWO, at(0));
        assert_eq!(deciding.due(at(0)), [ONE, TWO]);
        deciding.decided(ONE, on, at(0), INTERVAL, 0.5);
        deciding.decided(TWO, on, at(0), INTERVAL, 1.0);
        deciding
    }

    #[test]
    fn each_tunnel_has_its_own_time() {
        let mut deciding = decided(Expected::default());
        assert_eq!(deciding.next_timeout(), Some(at(2_000)));
        assert_eq!(deciding.due(at(2_000)), [ONE]);
        assert_eq!(deciding.due(at(2_200)), [ONE, TWO]);
        deciding.by(TWO, at(10));
        assert_eq!(deciding.due(at(10)), [TWO]);
        deciding.close(TWO);
        deciding.close(ONE);
        assert_eq!(deciding.next_timeout(), None);
    }

    #[test]
    fn loss_of_traffic_counts_although_probes_come_back_in_time() {
        let mut deciding =
            decided(Expected { rtt_ms: Some(60.0), links_ms: Some(60.0), loss: 0.0 });
        deciding.met(ONE, 60.0, Some(0.3), at(500));
        deciding.met(ONE, 60.0, None, at(750));
        assert_eq!(deciding.due(at(750)), []);
        deciding.met(ONE, 60.0, Some(0.3), at(1_000));
        assert_eq!(deciding.due(at(1_000)), [ONE]);
    }

    #[test]
    fn a_route_that_turned_bad_is_looked_at_soon_and_not_for_one_outlier() {
        let expected = Expected { rtt_ms: Some(60.0), links_ms: Some(60.0), loss: 0.0 };
        let mut deciding = decided(expected);
        let due_after = |values: &[(f64, Option<f64>)]| {
            let mut deciding = deciding.clone();
            for (rtt_ms, loss) in values {
                deciding.met(ONE, *rtt_ms, *loss, at(300));
            }
            deciding.due(at(300)) == [ONE]
        };
        assert!(due_after(&[(160.0, None), (160.0, None)]));
        assert!(!due_after(&[(160.0, None), (60.0, None), (160.0, None)]), "outliers");
        assert!(!due_after(&[(70.0, None), (70.0, None)]), "hardly slower");
        assert!(due_after(&[(60.0, Some(0.05)), (60.0, Some(0.05))]));
        assert!(!due_after(&[(60.0, Some(0.02)), (60.0, Some(0.02))]));
        deciding.advertised(ONE, 65.0, at(300));
        assert!(deciding.due(at(300)).is_empty());
        deciding.advertised(ONE, 90.0, at(100));
        assert_eq!(deciding.next_timeout(), Some(at(0) + SOONEST));
    }
}
