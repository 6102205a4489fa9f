//! When to tell the mesh about one's links.
//!
//! Every [`REFRESH`]; and at once when a link comes, goes, or changes by more than
//! [`CHANGE_SHARE`], but never more often than once a [`GAP`].

use std::collections::BTreeMap;
use std::time::Duration;

use super::wire::LinkStateAdvertisement;
use crate::engine::measure::LinkQuality;
use crate::engine::types::{NodeId, Timestamp};

/// Longest time without an advertisement.
pub const REFRESH: Duration = Duration::from_secs(30);
/// Shortest time between two advertisements of changed quality.
pub const GAP: Duration = Duration::from_secs(1);
/// Shortest time between two advertisements when a link came or went: such news must not wait,
/// and a link needs seconds to flap because it is up only after a probe.
pub const URGENT_GAP: Duration = Duration::from_millis(50);
/// Relative change of a link's quality that is news.
pub const CHANGE_SHARE: f64 = 0.2;

/// Remembers what was said last.
#[derive(Clone, Debug, Default)]
pub struct Advertiser {
    said: BTreeMap<NodeId, LinkQuality>,
    said_at: Option<Timestamp>,
    sequence: u64,
}

impl Advertiser {
    /// The next advertisement, if it is time for one.
    pub fn poll(
        &mut self,
        links: &BTreeMap<NodeId, LinkQuality>,
        now: Timestamp,
    ) -> Option<LinkStateAdvertisement> {
        if self.due_at(links, now)? > now {
            return None;
        }
        self.said.clone_from(links);
        self.said_at = Some(now);
        self.sequence = now.as_micros().max(self.sequence + 1);
        Some(LinkStateAdvertisement { sequence: self.sequence, links: links.clone() })
    }

    /// When to advertise these links; `None` when there never was anything to say.
    pub fn due_at(
        &self,
        links: &BTreeMap<NodeId, LinkQuality>,
        now: Timestamp,
    ) -> Option<Timestamp> {
        let Some(said_at) = self.said_at else { return (!links.is_empty()).then_some(now) };
        let after = |gap: Duration| Some(said_at + gap);
        if !links.keys().eq(self.said.keys()) {
            after(URGENT_GAP)
        } else if links.iter().any(|(node, link)| link.differs_by(&self.said[node], CHANGE_SHARE)) {
            after(GAP)
        } else {
            after(REFRESH)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn links(rtts: &[f64]) -> BTreeMap<NodeId, LinkQuality> {
        let quality = |rtt_ms: f64| LinkQuality {
            rtt_ms,
            jitter_ms: 0.0,
            loss: 0.0,
            bandwidth: None,
            utilisation: 0.0,
        };
        (0..).zip(rtts).map(|(byte, rtt)| (NodeId([byte; 8]), quality(*rtt))).collect()
    }

    fn at(ms: u64) -> Timestamp {
        Timestamp(ms * 1_000)
    }

    #[test]
    fn news_travels_at_once_small_changes_wait_for_the_refresh() {
        let mut advertiser = Advertiser::default();
        assert!(advertiser.poll(&links(&[]), at(0)).is_none(), "nothing to say");
        let first = advertiser.poll(&links(&[50.0]), at(0)).unwrap();
        assert!(advertiser.poll(&links(&[55.0]), at(29_999)).is_none(), "10 % can wait");
        assert!(advertiser.poll(&links(&[55.0]), at(30_000)).is_some());
        assert!(advertiser.poll(&links(&[80.0]), at(30_500)).is_none(), "at most once a second");
        assert!(advertiser.poll(&links(&[80.0]), at(31_000)).is_some());
        assert!(advertiser.poll(&links(&[80.0, 1.0]), at(31_050)).is_some(), "a new link");
        let last = advertiser.poll(&links(&[]), at(31_100)).unwrap();
        assert!(last.links.is_empty(), "the last link going is news too");
        assert!(last.sequence > first.sequence);
    }
}
