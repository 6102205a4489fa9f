//! What one neighbour may have this node do for it and for those behind it: answers to probes, and
//! bytes that are passed on.
//!
//! Answers are limited to [`ANSWERS_RATE`], and to [`SOURCE_RATE`] of them for each node that asks through
//! the neighbour, so that none can drown the others' probes and make their routes look dead. The probes of
//! the link itself have their own. What is passed on is limited where the operator says so
//! (`[relay] rate`), by a token bucket for each neighbour, so that none uses up what the others may
//! send. While less than half of the bucket is left, datagrams are marked: who reacts to marks stays
//! within the rate and loses little; who does not, loses what is too much.

use std::collections::BTreeMap;

use super::bucket::Bucket;
use crate::engine::types::{NodeId, Timestamp};

/// Answers to the probes that one neighbour brings (bytes/s): about a thousand of two hops. A guess:
/// some hundred nodes behind it that each probe ten times a second.
pub const ANSWERS_RATE: u64 = 64_000;

/// Answers at once (bytes): some 260 of two hops, as of many tunnels that open together. A guess.
const ANSWERS_BURST: f64 = 17_000.0;
/// The same for one of the nodes behind it (bytes/s). A guess: a hundred probes a second.
pub const SOURCE_RATE: u64 = 8_000;
/// Nodes behind a neighbour whose answers are counted apart; one of them makes room.
pub const SOURCES_MAX: usize = 256;

/// What becomes of a datagram that is to be passed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passing {
    /// It goes on.
    Freely,
    /// It goes on with a mark.
    Marked,
    /// It is too much.
    Dropped,
}

/// See the module documentation. Time is an argument and never goes back.
#[derive(Clone, Debug)]
pub struct Allowance {
    own_answers: Bucket,
    answers: Bucket,
    of_source: BTreeMap<NodeId, Bucket>,
    passing: Option<Bucket>,
}

impl Allowance {
    /// Of a neighbour that may have `rate` passed on (bytes/s); 0 is unlimited.
    pub fn new(rate: u64, now: Timestamp) -> Self {
        let passing = (rate > 0).then(|| Bucket::new(rate, now));
        Self {
            own_answers: Bucket::with_burst(ANSWERS_RATE as f64, ANSWERS_BURST, now),
            answers: Bucket::with_burst(ANSWERS_RATE as f64, ANSWERS_BURST, now),
            of_source: BTreeMap::new(),
            passing,
        }
    }

    /// Whether a probe is answered by so many bytes; `source` is who asks through the neighbour, `None`
    /// the neighbour itself.
    pub fn answers(&mut self, source: Option<NodeId>, bytes: usize, now: Timestamp) -> bool {
        let Some(source) = source else { return self.own_answers.take(bytes, now) };
        if self.of_source.len() >= SOURCES_MAX && !self.of_source.contains_key(&source) {
            self.of_source.pop_first();
        }
        let full = || Bucket::with_burst(SOURCE_RATE as f64, SOURCE_RATE as f64, now);
        let its_own = self.of_source.entry(source).or_insert_with(full);
        its_own.take(bytes, now) && self.answers.take(bytes, now)
    }

    /// What becomes of a datagram of so many bytes that is to be passed on.
    pub fn passes(&mut self, bytes: usize, now: Timestamp) -> Passing {
        let Some(bucket) = &mut self.passing else { return Passing::Freely };
        match bucket.take(bytes, now) {
            false => Passing::Dropped,
            true if bucket.is_low() => Passing::Marked,
            true => Passing::Freely,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const START: Timestamp = Timestamp(1_000_000);

    /// Datagrams of 1,000 bytes at so many bytes a second for 10 s: shares marked and dropped.
    fn offered(allowance: &mut Allowance, rate: u64) -> (f64, f64) {
        let (mut marked, mut dropped) = (0, 0);
        let all = rate / 100;
        for number in 0..all {
            let now = START + Duration::from_micros(number * 1_000_000_000 / rate);
            match allowance.passes(1_000, now) {
                Passing::Freely => {}
                Passing::Marked => marked += 1,
                Passing::Dropped => dropped += 1,
            }
        }
        (marked as f64 / all as f64, dropped as f64 / all as f64)
    }

    #[test]
    fn who_stays_within_the_rate_passes_and_twice_of_it_loses_half() {
        assert_eq!(offered(&mut Allowance::new(0, START), 10_000_000), (0.0, 0.0));
        assert_eq!(offered(&mut Allowance::new(1_000_000, START), 900_000), (0.0, 0.0));
        let (marked, dropped) = offered(&mut Allowance::new(1_000_000, START), 2_000_000);
        assert!((0.48..0.5).contains(&dropped), "{dropped}");
        assert!(marked > 0.45, "{marked}");
    }

    #[test]
    fn probes_are_answered_up_to_a_rate() {
        let mut allowance = Allowance::new(0, START);
        let flood = |allowance: &mut Allowance, source, now| {
            (0..10_000).filter(|_| allowance.answers(source, 64, now)).count()
        };
        let [attacker, other] = [1, 2].map(|byte| Some(NodeId([byte; 8])));
        assert_eq!(flood(&mut allowance, attacker, START), 125, "a burst");
        assert_eq!(flood(&mut allowance, attacker, START + Duration::from_millis(100)), 12);
        let later = START + Duration::from_millis(200);
        assert_eq!(flood(&mut allowance, other, later), 125, "the others are answered");
        assert_eq!(flood(&mut allowance, None, later), 265, "and the neighbour");
    }
}
