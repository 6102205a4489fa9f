//! When to tell the mesh about one's links.
//!
//! At once when a link comes, goes, or changes by more than [`CHANGE_SHARE`], but never more often
//! than once a [`GAP`], or a [`SMALL_GAP`] when all that changed are round-trip times by less than
//! [`LARGE_MS`], which on short links is the noise of busy machines; after [`REFRESH`] when one has drifted by more than [`DRIFT_SHARE`]; and after
//! [`REFRESH_QUIET`] when nothing has changed: a mesh in which nothing happens says next to nothing.
//! Who missed an advertisement catches up by synchronisation, and does not depend on the refreshes.

use std::collections::BTreeMap;
use std::time::Duration;

use super::wire::LinkStateAdvertisement;
use crate::engine::measure::LinkQuality;
use crate::engine::measure::link::RTT_STEP_MS;
use crate::engine::types::{NodeId, Timestamp};

/// Longest time without an advertisement while links drift.
pub const REFRESH: Duration = Duration::from_secs(30);
/// Longest time without an advertisement. How long one is believed follows from it
/// ([`LIFETIME`](crate::engine::route::graph::LIFETIME)); a guess: what it costs falls with it, and
/// the only thing that grows is how long the name of a node is kept that vanished.
pub const REFRESH_QUIET: Duration = Duration::from_secs(240);
/// Shortest time between two advertisements of changed quality.
pub const GAP: Duration = Duration::from_secs(1);
/// Shortest time between two advertisements when a link came or went: such news must not wait,
/// and a link needs seconds to flap because it is up only after a probe.
pub const URGENT_GAP: Duration = Duration::from_millis(50);
/// The same when the changes are small.
pub const SMALL_GAP: Duration = Duration::from_secs(10);
/// Change of a round-trip time that is not small (ms).
pub const LARGE_MS: f64 = 5.0;
/// Relative change of a link's quality that is news.
pub const CHANGE_SHARE: f64 = 0.2;
/// Relative change that is worth a refresh.
pub const DRIFT_SHARE: f64 = 0.1;

/// Remembers what was said last.
#[derive(Clone, Debug, Default)]
pub struct Advertiser {
    said: BTreeMap<NodeId, LinkQuality>,
    said_at: Option<Timestamp>,
    sequence: u64,
    /// Others know a newer one, made before the clock was set back.
    outdone: bool,
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
        self.outdone = false;
        self.said.clone_from(links);
        self.said_at = Some(now);
        self.sequence = now.as_micros().max(self.sequence + 1);
        Some(LinkStateAdvertisement { sequence: self.sequence, links: links.clone() })
    }

    /// Others have an advertisement of this node with this sequence number. Returns whether it is newer than
    /// all that were made since the node started: then the next one is due after a [`GAP`], and newer.
    pub fn outdone(&mut self, sequence: u64) -> bool {
        let outdone = sequence > self.sequence;
        self.sequence = self.sequence.max(sequence);
        self.outdone |= outdone;
        outdone
    }

    /// When to advertise these links; `None` when there never was anything to say.
    pub fn due_at(
        &self,
        links: &BTreeMap<NodeId, LinkQuality>,
        now: Timestamp,
    ) -> Option<Timestamp> {
        let Some(said_at) = self.said_at else { return (!links.is_empty()).then_some(now) };
        let after = |gap: Duration| Some(said_at + gap);
        let differs = |share, step_ms| {
            let mut links = links.iter();
            links.any(|(node, link)| link.differs_by(&self.said[node], share, step_ms))
        };
        if !links.keys().eq(self.said.keys()) {
            after(URGENT_GAP)
        } else if self.outdone || differs(CHANGE_SHARE, LARGE_MS) {
            after(GAP)
        } else if differs(CHANGE_SHARE, RTT_STEP_MS) {
            after(SMALL_GAP)
        } else if differs(DRIFT_SHARE, RTT_STEP_MS) {
            after(REFRESH)
        } else {
            after(REFRESH_QUIET)
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

    #[test]
    fn what_is_within_the_noise_of_a_link_is_no_news() {
        let mut advertiser = Advertiser::default();
        let noisy = |rtt: f64| {
            let mut links = links(&[rtt]);
            links.values_mut().for_each(|link| link.jitter_ms = 10.0);
            links
        };
        assert!(advertiser.poll(&noisy(20.0), at(0)).is_some());
        assert!(advertiser.clone().poll(&noisy(34.0), at(100_000)).is_none());
        assert!(advertiser.poll(&noisy(36.0), at(1_000)).is_some());
        let calm = links(&[24.0]);
        assert!(advertiser.poll(&calm, at(2_000)).is_some(), "the noise is over");
    }

    fn at(ms: u64) -> Timestamp {
        Timestamp(ms * 1_000)
    }

    #[test]
    fn a_clock_that_was_set_back_does_not_make_unheard() {
        let mut advertiser = Advertiser::default();
        let links = links(&[20.0]);
        let first = advertiser.poll(&links, at(0)).unwrap();
        assert!(!advertiser.outdone(first.sequence), "its own word");
        let before = at(60_000).as_micros();
        assert!(advertiser.outdone(before));
        assert!(advertiser.poll(&links, at(999)).is_none());
        assert_eq!(advertiser.poll(&links, at(1_000)).unwrap().sequence, before + 1);
        assert!(!advertiser.outdone(before + 1));
        assert!(advertiser.poll(&links, at(3_000)).is_none(), "once");
    }

    #[test]
    fn news_travels_at_once_drift_waits_for_the_refresh_and_quiet_for_longer() {
        let mut advertiser = Advertiser::default();
        assert!(advertiser.poll(&links(&[]), at(0)).is_none(), "nothing to say");
        let first = advertiser.poll(&links(&[50.0]), at(0)).unwrap();
        assert!(advertiser.poll(&links(&[56.0]), at(29_999)).is_none(), "12 % can wait");
        assert!(advertiser.poll(&links(&[54.0]), at(30_000)).is_none(), "8 % is nothing");
        let quiet = REFRESH_QUIET.as_millis() as u64;
        assert!(advertiser.poll(&links(&[54.0]), at(quiet - 1)).is_none());
        assert!(advertiser.clone().poll(&links(&[54.0]), at(quiet)).is_some());
        assert!(advertiser.poll(&links(&[56.0]), at(30_000)).is_some());
        assert!(advertiser.poll(&links(&[80.0]), at(30_500)).is_none(), "at most once a second");
        assert!(advertiser.poll(&links(&[80.0]), at(31_000)).is_some());
        assert!(advertiser.poll(&links(&[80.0, 1.0]), at(31_050)).is_some(), "a new link");
        assert!(advertiser.clone().poll(&links(&[80.0, 4.0]), at(41_049)).is_none(), "3 ms");
        assert!(advertiser.clone().poll(&links(&[80.0, 4.0]), at(41_050)).is_some());
        assert!(advertiser.clone().poll(&links(&[80.0, 7.0]), at(32_050)).is_some(), "6 ms");
        let last = advertiser.poll(&links(&[]), at(31_100)).unwrap();
        assert!(last.links.is_empty(), "the last link going is news too");
        assert!(last.sequence > first.sequence);
    }
}
