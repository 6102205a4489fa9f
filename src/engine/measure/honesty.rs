//! What relays do to real traffic, against what their links claim.
//!
//! A relay that answers every probe and throws away a part of what it forwards is not found by
//! probes. It is by receipts: of what was sent over a route, a share arrives, and its links (and the
//! probes over it) promise another. Where less arrives than promised, the relays of the route share
//! the blame equally, until routes that have only some of them in common tell them apart: each report
//! moves the shares of its relays so far that their product comes closer to what it says (Kaczmarz,
//! 1937, on logarithms). One report alone counts for half of what it says at most.
//!
//! A route is judged in both directions, each by itself: what its far end has received, and what came
//! back of what that has sent.
//!
//! Losses that come with marks are a full queue's, not a relay's. Without traffic a relay regains
//! half of what it lost every [`HALF_LIFE`]: so long it takes until it is tried again.
//!
//! Credibility (see [`LinkHistories`](super::LinkHistories)) is about the same claims, but about
//! their round-trip times and by probes alone. It is a feature of the model, so it has to come out the
//! same from the store; the reports that are judged here are kept as sums of ten seconds only.

use std::collections::BTreeMap;
use std::time::Duration;

use super::RouteReport;
use crate::engine::types::{NodeId, Timestamp};

/// How long until half of a doubt is forgotten. A guess: a relay that drops 30 % and is a tenth
/// better otherwise is tried again after about eight minutes, which costs it seconds to be found out.
pub const HALF_LIFE: Duration = Duration::from_secs(300);
/// Smaller doubts are not told from noise and short queues (a share).
pub const DOUBT_MIN: f64 = 0.05;
/// The least that a relay is believed to deliver (a share): what delivers nothing is silent.
pub const DELIVERS_MIN: f64 = 0.05;
/// Most relays that are doubted at one time; the least doubted makes room. All relays that the
/// routes of this node's tunnels can have.
pub const RELAYS_MAX: usize = 1_024;
/// What a report can count at most (a share of the distance to what it says): a short outage is no
/// habit.
const GAIN_MAX: f64 = 0.5;
/// A report of so many datagrams counts for half of that: of 50, one that is lost is 2 points.
const DATAGRAMS_HALF: f64 = 50.0;

#[derive(Clone, Copy, Debug)]
struct Doubt {
    /// Natural logarithm of the share that is delivered, at most 0.
    ln: f64,
    at: Timestamp,
}

impl Doubt {
    fn ln(&self, now: Timestamp) -> f64 {
        self.ln * 0.5f64.powf(now.since(self.at).as_secs_f64() / HALF_LIFE.as_secs_f64())
    }
}

/// The relays that delivered less than was claimed. See the module documentation for the rule.
#[derive(Clone, Debug, Default)]
pub struct Honesty {
    relays: BTreeMap<NodeId, Doubt>,
}

impl Honesty {
    /// Traffic met this on a route of which a share of `claimed` (0 to 1) was to arrive, there and
    /// back.
    pub fn carried(&mut self, report: &RouteReport, claimed: f64, now: Timestamp) {
        let relays = report.route.relays();
        let there = (report.sent, report.received, report.marked);
        let back = (report.back_sent, report.back_received, report.back_marked);
        for (sent, received, marked) in [there, back] {
            if sent > 0 && !relays.is_empty() {
                let lost = sent.saturating_sub(received).saturating_sub(marked);
                self.delivered(relays, sent as f64, lost as f64, claimed, now);
            }
        }
    }

    /// Of so many datagrams that relays were to pass on in one direction, so many were lost.
    fn delivered(&mut self, relays: &[NodeId], sent: f64, lost: f64, claimed: f64, now: Timestamp) {
        let arrived = 1.0 - lost / sent;
        let met_ln = (arrived / claimed.max(DELIVERS_MIN)).clamp(DELIVERS_MIN, 1.0).ln();
        let known_ln: f64 = relays.iter().map(|relay| self.ln(*relay, now)).sum();
        let gain = GAIN_MAX * sent / (sent + DATAGRAMS_HALF);
        let step = gain * (met_ln - known_ln) / relays.len() as f64;
        for relay in relays {
            let ln = (self.ln(*relay, now) + step).max(DELIVERS_MIN.ln());
            if ln >= 0.0 {
                self.relays.remove(relay);
                continue;
            }
            if self.relays.len() >= RELAYS_MAX && !self.relays.contains_key(relay) {
                self.forget_least(now);
            }
            self.relays.insert(*relay, Doubt { ln, at: now });
        }
    }

    /// The relays that deliver less than their links claim, and the share that they do deliver
    /// (`DELIVERS_MIN` to 1 - `DOUBT_MIN`, in whole percent).
    pub fn doubted(&self, now: Timestamp) -> BTreeMap<NodeId, f64> {
        let share = |doubt: &Doubt| (100.0 * doubt.ln(now).exp()).round() / 100.0;
        let all = self.relays.iter().map(|(relay, doubt)| (*relay, share(doubt)));
        all.filter(|(_, share)| *share <= 1.0 - DOUBT_MIN).collect()
    }

    fn ln(&self, relay: NodeId, now: Timestamp) -> f64 {
        self.relays.get(&relay).map_or(0.0, |doubt| doubt.ln(now))
    }

    fn forget_least(&mut self, now: Timestamp) {
        let least = self.relays.iter().max_by(|(_, a), (_, b)| a.ln(now).total_cmp(&b.ln(now)));
        if let Some(relay) = least.map(|(relay, _)| *relay) {
            self.relays.remove(&relay);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::types::Route;

    fn node(number: u16) -> NodeId {
        let [high, low] = number.to_be_bytes();
        NodeId([0, 0, 0, 0, 0, 0, high, low])
    }

    /// From node 0 over these relays to node 9,999.
    fn report(relays: &[u16], sent: u64, received: u64) -> RouteReport {
        let nodes = [0].into_iter().chain(relays.iter().copied()).chain([9_999]);
        RouteReport {
            route: Route::new(nodes.map(node).collect::<Vec<_>>()).unwrap(),
            route_id: 1,
            sent,
            received,
            bytes: 0,
            marked: 0,
            rtt_us: None,
            back_sent: 0,
            back_received: 0,
            back_marked: 0,
            duration_us: 500_000,
        }
    }

    fn at(s: u64) -> Timestamp {
        Timestamp(s * 1_000_000)
    }

    fn doubted(honesty: &Honesty, now: Timestamp) -> Vec<(NodeId, f64)> {
        honesty.doubted(now).into_iter().collect()
    }

    #[test]
    fn who_drops_is_doubted_by_as_much_and_a_single_report_tells_half_of_it_at_most() {
        let mut honesty = Honesty::default();
        honesty.carried(&report(&[1], 5, 3), 1.0, at(0));
        assert!(doubted(&honesty, at(0)).is_empty(), "a few datagrams");
        honesty.carried(&report(&[2], 1_000_000, 490_000), 1.0, at(0));
        assert_eq!(honesty.doubted(at(0))[&node(2)], 0.7, "half of what it says");
        honesty = Honesty::default();
        for _ in 0..100 {
            honesty.carried(&report(&[1], 100, 70), 1.0, at(0));
        }
        assert_eq!(doubted(&honesty, at(0)), [(node(1), 0.7)]);
        for _ in 0..100 {
            honesty.carried(&report(&[1], 100, 100), 1.0, at(0));
        }
        assert!(doubted(&honesty, at(0)).is_empty(), "it has stopped");
    }

    #[test]
    fn what_links_claim_to_lose_and_what_queues_dropped_is_nobodys_fault() {
        let mut honesty = Honesty::default();
        for _ in 0..100 {
            honesty.carried(&report(&[1], 100, 70), 0.7, at(0));
            honesty.carried(&RouteReport { marked: 30, ..report(&[2], 100, 70) }, 1.0, at(0));
            honesty.carried(&report(&[3], 100, 97), 1.0, at(0));
            honesty.carried(&report(&[4], 0, 0), 1.0, at(0));
            honesty.carried(&report(&[], 100, 0), 1.0, at(0));
        }
        assert!(doubted(&honesty, at(0)).is_empty(), "{honesty:?}");
    }

    #[test]
    fn who_drops_answers_only_is_doubted_too() {
        let back = |received, marked| RouteReport {
            back_sent: 100,
            back_received: received,
            back_marked: marked,
            ..report(&[1], 100, 100)
        };
        let mut honesty = Honesty::default();
        (0..100).for_each(|_| honesty.carried(&back(100, 0), 1.0, at(0)));
        (0..100).for_each(|_| honesty.carried(&back(70, 30), 1.0, at(0)));
        assert!(doubted(&honesty, at(0)).is_empty(), "a full queue");
        (0..100).for_each(|_| honesty.carried(&back(70, 0), 1.0, at(0)));
        let [(relay, delivers)] = doubted(&honesty, at(0))[..] else { panic!("{honesty:?}") };
        assert_eq!(relay, node(1));
        assert!((0.7..0.85).contains(&delivers), "{delivers}, between the two directions");
    }

    #[test]
    fn relays_share_the_blame_until_other_routes_tell_them_apart() {
        let mut honesty = Honesty::default();
        for _ in 0..100 {
            honesty.carried(&report(&[1, 3], 200, 140), 1.0, at(0));
        }
        assert_eq!(doubted(&honesty, at(0)), [(node(1), 0.84), (node(3), 0.84)]);
        for _ in 0..100 {
            honesty.carried(&report(&[1, 4], 200, 200), 1.0, at(0));
            honesty.carried(&report(&[1, 3], 200, 140), 1.0, at(0));
        }
        assert_eq!(doubted(&honesty, at(0)), [(node(3), 0.7)]);
    }

    #[test]
    fn a_doubt_is_forgotten_slowly_and_only_so_many_are_kept() {
        let mut honesty = Honesty::default();
        for _ in 0..100 {
            honesty.carried(&report(&[1], 100, 49), 1.0, at(0));
        }
        let after = |half_lives: u64| doubted(&honesty, at(half_lives * HALF_LIFE.as_secs()));
        assert_eq!(after(0), [(node(1), 0.49)]);
        assert_eq!(after(1), [(node(1), 0.7)]);
        assert_eq!(after(5), []);
        for relay in 2..1_100 {
            honesty.carried(&report(&[relay], 1_000, 500), 1.0, at(1));
        }
        assert_eq!(honesty.relays.len(), RELAYS_MAX);
        assert!(honesty.relays.contains_key(&node(1)), "the one most doubted stays");
    }
}
