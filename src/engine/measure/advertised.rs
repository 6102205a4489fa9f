//! History of every advertised link, and what it says of the nodes that advertise.
//!
//! Each accepted link-state advertisement adds one round-trip time to the window of each of its
//! links; a withdrawal is a failure. From the same advertisements follow each node's deviation
//! from its own normal, its network coordinates, and, together with what routes delivered, its
//! credibility. The offline feature builder sees the same changes in the store.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use super::coordinates::Coordinates;
use super::link::LinkQuality;
use super::statistics::{Statistics, WINDOW};
use super::window::Window;
use crate::engine::types::{NodeId, Route, Timestamp};

/// Links with a history; the one advertised longest ago makes room. 8 links of each of 10,000
/// origins.
pub const LINK_HISTORIES_MAX: usize = 80_000;
/// Gain of the credibility: an advertiser's last 16 or so routes count.
const CREDIBILITY_GAIN: f64 = 1.0 / 16.0;
/// Newest RTTs whose median is a link's usual one.
const USUAL: usize = 20;
/// The newest [`WINDOW`] bits.
const CHANGES_MASK: u64 = (1 << WINDOW) - 1;

/// What one node said of one link over time.
#[derive(Clone, Debug)]
pub struct LinkHistory {
    rtts_ms: Window<f64>,
    /// A bit for each of the newest [`WINDOW`] changes, the newest lowest: whether it withdrew.
    withdrawn: u64,
    /// Of the RTTs, once somebody asked.
    statistics: OnceLock<Option<Box<Statistics>>>,
    quality: Option<LinkQuality>,
    changed_at: Timestamp,
    /// When the advertised RTT was last another than the one before.
    measured_at: Timestamp,
    withdrawn_at: Option<Timestamp>,
    /// Newest changes in a row that told of losses or withdrew it.
    failure_streak: usize,
}

impl LinkHistory {
    fn new() -> Self {
        Self {
            rtts_ms: Window::new(WINDOW),
            withdrawn: 0,
            statistics: OnceLock::new(),
            quality: None,
            changed_at: Timestamp::default(),
            measured_at: Timestamp::default(),
            withdrawn_at: None,
            failure_streak: 0,
        }
    }

    /// The newest quality; `None` while the link is withdrawn.
    pub fn quality(&self) -> Option<&LinkQuality> {
        self.quality.as_ref()
    }

    /// The newest `count` advertised round-trip times (ms), oldest first.
    pub fn rtts_ms(&self, count: usize) -> Vec<f64> {
        self.rtts_ms.newest(count).collect()
    }

    /// Statistics over the advertised RTTs; `None` before the first.
    pub fn statistics(&self) -> Option<&Statistics> {
        let found = self.statistics.get_or_init(|| Statistics::of(&self.rtts_ms).map(Box::new));
        found.as_deref()
    }

    /// When the newest advertisement or withdrawal was accepted.
    pub fn changed_at(&self) -> Timestamp {
        self.changed_at
    }

    /// When the advertised RTT was last another than the one before: an RTT that is repeated to the last
    /// bit was not measured again.
    pub fn measured_at(&self) -> Timestamp {
        self.measured_at
    }

    /// Advertisements in a row, up to now, that told of losses or withdrew the link, at most [`WINDOW`].
    pub fn failure_streak(&self) -> usize {
        self.failure_streak.min(WINDOW)
    }

    /// Withdrawals among the newest [`WINDOW`] changes.
    pub fn withdrawals(&self) -> usize {
        (self.withdrawn & CHANGES_MASK).count_ones() as usize
    }

    /// When the link was last withdrawn.
    pub fn withdrawn_at(&self) -> Option<Timestamp> {
        self.withdrawn_at
    }

    /// Last RTT over the median of the newest 20, ln.
    fn deviation_ln(&self) -> Option<f64> {
        let newest: Vec<f64> = self.rtts_ms.newest(USUAL).collect();
        let (last, median) = (newest.last()?, super::window::quantile(&newest, 0.5)?);
        Some((last.max(1e-3) / median.max(1e-3)).ln())
    }
}

/// The histories of all advertised links.
#[derive(Clone, Debug, Default)]
pub struct LinkHistories {
    links: BTreeMap<(NodeId, NodeId), LinkHistory>,
    deviations_ln: BTreeMap<NodeId, f64>,
    credibilities: BTreeMap<NodeId, f64>,
    coordinates: Coordinates,
}

impl LinkHistories {
    /// An advertisement of `origin` was accepted: for each link its quality, or `None` when it
    /// was withdrawn or forgotten.
    pub fn advertised(
        &mut self,
        origin: NodeId,
        at: Timestamp,
        changes: impl IntoIterator<Item = (NodeId, Option<LinkQuality>)>,
    ) {
        let mut deviations: Vec<f64> = Vec::new();
        for (neighbour, quality) in changes {
            let key = (origin, neighbour);
            if !self.links.contains_key(&key) && self.links.len() >= LINK_HISTORIES_MAX {
                self.forget_stalest();
            }
            let link = self.links.entry(key).or_insert_with(LinkHistory::new);
            link.changed_at = at;
            link.quality = quality;
            let fails = quality.is_none_or(|quality| quality.loss > 0.0);
            link.failure_streak = if fails { link.failure_streak.saturating_add(1) } else { 0 };
            link.withdrawn = link.withdrawn << 1 | u64::from(quality.is_none());
            match quality {
                Some(quality) => {
                    if link.rtts_ms.last() != Some(quality.rtt_ms) {
                        link.measured_at = at;
                    }
                    link.rtts_ms.push(quality.rtt_ms);
                    link.statistics = OnceLock::new();
                    deviations.extend(link.deviation_ln());
                    self.coordinates.measured(origin, neighbour, quality.rtt_ms);
                }
                None => link.withdrawn_at = Some(at),
            }
        }
        if let Some(median) = super::window::quantile(&deviations, 0.5) {
            self.deviations_ln.insert(origin, median);
        }
    }

    /// A probe over a route completed: after `rtt_us`, or lost. Compares what its links claim
    /// with what it delivered; a route with an unknown link says nothing.
    pub fn delivered(&mut self, route: &Route, rtt_us: Option<u64>) {
        let claims: Option<Vec<f64>> =
            route.links().map(|(a, b)| Some(self.link(a, b)?.quality()?.rtt_ms)).collect();
        let Some(claimed_ms) = claims.map(|claims| claims.iter().sum::<f64>()) else { return };
        let error = match rtt_us {
            Some(rtt_us) => {
                (rtt_us as f64 / 1e3 / claimed_ms.max(1e-3)).max(1e-9).ln().abs().min(1.0)
            }
            None => 1.0,
        };
        for (advertiser, _) in route.links() {
            let credibility = self.credibilities.entry(advertiser).or_insert(1.0);
            *credibility += CREDIBILITY_GAIN * (1.0 - error - *credibility);
        }
    }

    /// The history of what `from` says of its link to `to`.
    pub fn link(&self, from: NodeId, to: NodeId) -> Option<&LinkHistory> {
        self.links.get(&(from, to))
    }

    /// The links that are advertised now, in order.
    pub fn live(&self) -> impl Iterator<Item = ((NodeId, NodeId), &LinkHistory)> + '_ {
        let live = self.links.iter().filter(|(_, link)| link.quality.is_some());
        live.map(|(ends, link)| (*ends, link))
    }

    /// Median, over the links of a node's newest advertisement, of ln(last RTT / median of 20):
    /// above 0 when all its links are slower than usual.
    pub fn deviation_ln(&self, node: NodeId) -> Option<f64> {
        self.deviations_ln.get(&node).copied()
    }

    /// How well a node's claims fit what routes over it delivered, 0 to 1; `None` before the
    /// first route.
    pub fn credibility(&self, node: NodeId) -> Option<f64> {
        self.credibilities.get(&node).copied()
    }

    /// Positions of all advertising nodes.
    pub fn coordinates(&self) -> &Coordinates {
        &self.coordinates
    }

    fn forget_stalest(&mut self) {
        let stalest = self.links.iter().min_by_key(|(_, link)| link.changed_at);
        let Some((origin, neighbour)) = stalest.map(|(key, _)| *key) else { return };
        self.links.remove(&(origin, neighbour));
        let from = (origin, NodeId([0; 8]));
        let has_more =
            self.links.range(from..).next().is_some_and(|((other, _), _)| *other == origin);
        if !has_more {
            // Nothing else is known of a node that has no link left.
            self.deviations_ln.remove(&origin);
            self.credibilities.remove(&origin);
            self.coordinates.forget(origin);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(byte: u8) -> NodeId {
        NodeId([byte; 8])
    }

    fn quality(rtt_ms: f64) -> Option<LinkQuality> {
        let (jitter_ms, loss, utilisation) = (0.0, 0.0, 0.0);
        Some(LinkQuality { rtt_ms, jitter_ms, loss, bandwidth: None, utilisation })
    }

    #[test]
    fn a_withdrawn_link_keeps_its_history() {
        let mut links = LinkHistories::default();
        links.advertised(node(1), Timestamp(1), [(node(2), quality(10.0))]);
        links.advertised(node(1), Timestamp(2), [(node(2), None)]);
        let link = links.link(node(1), node(2)).unwrap();
        assert_eq!((link.quality(), link.withdrawn_at()), (None, Some(Timestamp(2))));
        links.advertised(node(1), Timestamp(3), [(node(2), quality(30.0))]);
        let link = links.link(node(1), node(2)).unwrap();
        assert_eq!((link.withdrawals(), link.changed_at()), (1, Timestamp(3)));
        assert_eq!(link.statistics().unwrap().count, 2);
    }

    #[test]
    fn what_is_repeated_was_not_measured_again_and_losses_in_a_row_are_counted() {
        let mut links = LinkHistories::default();
        let mut say = |at, quality| {
            links.advertised(node(1), Timestamp(at), [(node(2), quality)]);
            let link = links.link(node(1), node(2)).unwrap();
            (link.changed_at().0, link.measured_at().0, link.failure_streak())
        };
        let lossy = quality(10.0).map(|quality| LinkQuality { loss: 0.1, ..quality });
        assert_eq!(say(1, quality(10.0)), (1, 1, 0));
        assert_eq!(say(2, lossy), (2, 1, 1));
        assert_eq!(say(3, None), (3, 1, 2));
        assert_eq!(say(4, lossy), (4, 1, 3));
        assert_eq!(say(5, quality(11.0)), (5, 5, 0));
        for at in 6..6 + 2 * WINDOW as u64 {
            assert!(say(at, lossy).2 <= WINDOW);
        }
    }

    #[test]
    fn a_node_that_is_slow_as_a_whole_is_seen_as_such() {
        let mut links = LinkHistories::default();
        let all = |rtt_ms: f64| [2, 3, 4].map(|byte| (node(byte), quality(rtt_ms)));
        for at in 1..=9 {
            links.advertised(node(1), Timestamp(at), all(10.0));
        }
        assert_eq!(links.deviation_ln(node(1)), Some(0.0));
        links.advertised(node(1), Timestamp(10), all(20.0));
        assert!((links.deviation_ln(node(1)).unwrap() - 2.0_f64.ln()).abs() < 1e-12);
        assert_eq!(links.deviation_ln(node(2)), None);
    }

    #[test]
    fn who_promises_what_routes_do_not_deliver_loses_credibility() {
        let mut links = LinkHistories::default();
        links.advertised(
            node(0),
            Timestamp(1),
            [(node(1), quality(10.0)), (node(2), quality(10.0))],
        );
        for relay in [1, 2] {
            links.advertised(node(relay), Timestamp(1), [(node(9), quality(10.0))]);
        }
        let over = |relay| Route::new([node(0), node(relay), node(9)]).unwrap();
        for _ in 0..40 {
            links.delivered(&over(1), Some(20_000));
            links.delivered(&over(2), Some(60_000));
            links.delivered(&over(2), None);
        }
        assert!(links.credibility(node(1)).unwrap() > 0.99);
        assert!(links.credibility(node(2)).unwrap() < 0.1);
        links.delivered(&over(7), None);
        assert_eq!(links.credibility(node(7)), None, "nothing was claimed");
    }
}
