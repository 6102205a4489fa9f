//! What is learned of the errors of forecasts, destination by destination.
//!
//! The rule:
//! - Each destination that is probed has a [`Mix`], an [`AdaptiveInterval`] and a [`Surprise`] of its
//!   own: a model may be good on the routes to one node and bad on those to another. All candidates
//!   of one decision lead to one node and are mixed alike, so that none looks better only because
//!   somebody else forecast it.
//! - Until [`OWN_AFTER`] round trips to a destination are known, mix and interval of all decide
//!   there. Its own interval begins as the one of all is when the first round trip comes; its own mix
//!   begins with equal weights, so that [`Mix::slack`] holds for it from its first round trip on.
//! - At most [`STREAMS_MAX`] destinations are kept; the one that longest learned nothing makes room.
//!
//! The replay keeps intervals and surprises by pair of nodes in the same way; of pairs, a node has
//! those that it is an end of.

use std::collections::BTreeMap;

use super::adaptive::{AdaptiveInterval, Surprise, spanning};
use super::mix::{EXPERTS, Mix};
use crate::engine::types::NodeId;

/// Destinations with a stream of their own: as many as tunnels may be open.
pub const STREAMS_MAX: usize = 1_024;
/// Round trips to a destination after which its own mix and interval decide there: with a tunnel of 8
/// candidates 4 s, and more than half of what a mix remembers. The replay's number.
pub const OWN_AFTER: u64 = 30;
/// Share of round trips that the intervals are to hold.
const COVERAGE: f64 = 0.9;

/// A forecast that was mixed: what it was made of, for [`Streams::observe`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mixed {
    /// What the experts said, ln(ms), in the order of [`EXPERTS`].
    pub experts: [Option<f64>; EXPERTS.len()],
    /// The mixed forecast, ln(ms).
    pub ln: f64,
    /// How far the interval reaches below and above the forecast before it is stretched, ln.
    pub offsets: Option<(f64, f64)>,
    /// The interval as stated, ln(ms).
    pub interval: Option<(f64, f64)>,
}

/// What was learned of one destination, or of all.
#[derive(Clone, Copy, Debug)]
struct Stream {
    mix: Mix,
    interval: AdaptiveInterval,
    surprise: Surprise,
    /// When it learned last, counted in round trips to all destinations.
    learned: u64,
}

impl Stream {
    fn new() -> Self {
        let interval = AdaptiveInterval::new(COVERAGE);
        Self { mix: Mix::new(), interval, surprise: Surprise::default(), learned: 0 }
    }

    fn observe(&mut self, ln_truth: f64, mixed: &Mixed) {
        if let Some((low, high)) = mixed.offsets {
            self.surprise.observe(ln_truth - mixed.ln, low, high);
            self.interval.observe(ln_truth, mixed.ln, low, high);
        }
        self.mix.observe(ln_truth, mixed.experts);
    }
}

/// The mixes and intervals of one model.
#[derive(Clone, Debug)]
pub struct Streams {
    all: Stream,
    own: BTreeMap<NodeId, Stream>,
}

impl Default for Streams {
    fn default() -> Self {
        Self { all: Stream::new(), own: BTreeMap::new() }
    }
}

impl Streams {
    /// Mixes what the experts say (ln(ms)) of a route to a destination; `offsets`: how far the model's
    /// interval reaches below and above its forecast, ln. `None` when nobody says anything.
    pub fn mix(
        &self,
        destination: NodeId,
        experts: [Option<f64>; EXPERTS.len()],
        offsets: Option<(f64, f64)>,
    ) -> Option<Mixed> {
        let own = self.own.get(&destination);
        let decides = own.filter(|own| own.mix.rounds() >= OWN_AFTER).unwrap_or(&self.all);
        let ln = decides.mix.combine(experts)?;
        let surprise = own.map_or(Surprise::default(), |own| own.surprise);
        let offsets = offsets.map(|offsets| surprise.widen(spanning(offsets, ln, &experts)));
        let interval = offsets.map(|(low, high)| decides.interval.apply(ln, low, high));
        Some(Mixed { experts, ln, offsets, interval })
    }

    /// The round trip over such a route, ln(ms), turned out to be this.
    pub fn observe(&mut self, destination: NodeId, ln_truth: f64, mixed: &Mixed) {
        if !self.own.contains_key(&destination) && self.own.len() >= STREAMS_MAX {
            let stalest = self.own.iter().min_by_key(|(_, own)| own.learned);
            if let Some(stalest) = stalest.map(|(destination, _)| *destination) {
                self.own.remove(&stalest);
            }
        }
        let begins = Stream { interval: self.all.interval, ..Stream::new() };
        let own = self.own.entry(destination).or_insert(begins);
        self.all.learned += 1;
        own.learned = self.all.learned;
        own.observe(ln_truth, mixed);
        self.all.observe(ln_truth, mixed);
    }

    /// The mix over all destinations.
    pub fn all(&self) -> &Mix {
        &self.all.mix
    }

    /// The destination where the mix did worst beside the moving average; `None` before any has a mix
    /// of its own in use.
    pub fn worst(&self) -> Option<(NodeId, &Mix)> {
        let in_use = self.own.iter().filter(|(_, own)| own.mix.rounds() >= OWN_AFTER);
        let mixes = in_use.map(|(destination, own)| (*destination, &own.mix));
        mixes.max_by(|(_, a), (_, b)| a.excess().total_cmp(&b.excess()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(number: u16) -> NodeId {
        let [high, low] = number.to_be_bytes();
        NodeId([0, 0, 0, 0, 0, 0, high, low])
    }

    const SAID: [Option<f64>; 4] = [Some(3.0), Some(3.2), Some(3.2), Some(3.2)];

    /// A round trip to a node; returns the forecast for it.
    fn learn(streams: &mut Streams, to: u16, ln_truth: f64) -> Mixed {
        let mixed = streams.mix(node(to), SAID, Some((-0.1, 0.1))).unwrap();
        streams.observe(node(to), ln_truth, &mixed);
        mixed
    }

    #[test]
    fn each_destination_follows_who_is_right_there() {
        let mut streams = Streams::default();
        for round in 0..OWN_AFTER {
            // The model is right about 1, which is probed three times as often.
            for _ in 0..3 {
                learn(&mut streams, 1, 3.0);
            }
            let there = learn(&mut streams, 2, 3.2);
            if round > 5 {
                assert!(there.ln < 3.15, "what all learned decides at first: {}", there.ln);
            }
        }
        assert!((learn(&mut streams, 1, 3.0).ln - 3.0).abs() < 0.01);
        assert!((learn(&mut streams, 2, 3.2).ln - 3.2).abs() < 0.01);
        let new = streams.mix(node(3), SAID, None).unwrap();
        assert_eq!((new.ln, new.interval), (streams.all().combine(SAID).unwrap(), None));
        let (worst, mix) = streams.worst().unwrap();
        assert_eq!(worst, node(2));
        assert!(mix.excess() <= mix.slack() && mix.rounds() == OWN_AFTER + 1, "{mix:?}");
    }

    #[test]
    fn an_interval_reaches_as_far_as_the_experts_disagree() {
        let mixed = Streams::default().mix(node(1), SAID, Some((-0.01, 0.01))).unwrap();
        let (low, high) = mixed.interval.unwrap();
        assert!(low < 3.001 && high > 3.199, "{low} to {high}");
    }

    #[test]
    fn intervals_are_widened_where_they_did_not_hold() {
        let mut streams = Streams::default();
        for round in 0..200 {
            learn(&mut streams, 1, 3.2);
            learn(&mut streams, 2, if round % 2 == 0 { 2.2 } else { 4.2 });
        }
        let width = |to| {
            let (low, high) =
                streams.mix(node(to), SAID, Some((-0.1, 0.1))).unwrap().interval.unwrap();
            high - low
        };
        assert!(width(1) < 0.2 && width(2) > 1.5, "{} {}", width(1), width(2));
    }

    #[test]
    fn the_destination_that_longest_learned_nothing_makes_room() {
        let mut streams = Streams::default();
        for to in 0..STREAMS_MAX as u16 {
            learn(&mut streams, to, 3.0);
        }
        learn(&mut streams, 0, 3.0);
        learn(&mut streams, STREAMS_MAX as u16, 3.0);
        assert_eq!(streams.own.len(), STREAMS_MAX);
        assert!(streams.own.contains_key(&node(0)) && !streams.own.contains_key(&node(1)));
    }
}
