//! The policies that meshwise is compared with. Each sees the same measurements.

use std::collections::BTreeMap;

use rand::RngExt;
use rand_pcg::Pcg64Mcg;

use super::knowledge::{Knowledge, Numbers};

/// Share by which RON's choice must be better than the route in use (Andersen et al., 2001).
const RON_HYSTERESIS: f64 = 0.05;
/// Share by which the four-metric rule's choice must be better than the route in use.
const FOUR_METRIC_MARGIN: f64 = 0.1;
/// Relays that random4 looks at.
const RANDOM_RELAYS: usize = 4;

/// Names of all that is compared, in the order of the table: [`all`], what meshwise makes of its own
/// measurements, and the oracles.
pub const NAMES: [&str; 14] = [
    "direct",
    "static",
    "last",
    "ewma",
    "four-metric",
    "random4",
    "ucb1",
    "via",
    "meshwise",
    "last+worth",
    "meshwise-live",
    "meshwise-live-balanced",
    "oracle",
    "split-oracle",
];
/// Position of meshwise among [`NAMES`], which is also the number of simple policies.
pub const MESHWISE: usize = position("meshwise");
/// Position of the hindsight oracle.
pub const ORACLE: usize = position("oracle");
/// Position of the oracle that knows one half of the samples and is scored on the other.
pub const SPLIT_ORACLE: usize = position("split-oracle");

/// Position of a name; one that is not there fails to compile where the result is a constant.
const fn position(name: &str) -> usize {
    let name = name.as_bytes();
    let mut at = 0;
    while at < NAMES.len() {
        let other = NAMES[at].as_bytes();
        let mut byte = 0;
        while byte < name.len() && byte < other.len() && name[byte] == other[byte] {
            byte += 1;
        }
        if byte == name.len() && byte == other.len() {
            return at;
        }
        at += 1;
    }
    panic!("no such policy")
}

/// Source and destination.
pub type Pair = (usize, usize);
/// A relay; `None`: the direct link.
pub type Relay = Option<usize>;

/// Chooses a route for a pair, and may learn from what its own choices cost.
pub trait Policy {
    /// The name in tables and `--json`.
    fn name(&self) -> &'static str;

    /// The relay to use.
    fn choose(&mut self, pair: Pair, known: &Knowledge, random: &mut Pcg64Mcg) -> Relay;

    /// What the choice cost (ms).
    fn learn(&mut self, _pair: Pair, _relay: Relay, _ms: f64) {}
}

/// The simple ones, in the order of [`NAMES`].
pub fn all() -> Vec<Box<dyn Policy>> {
    vec![
        Box::new(Direct),
        Box::new(Static::default()),
        Box::new(Last),
        Box::new(Ewma::default()),
        Box::new(FourMetric::default()),
        Box::new(Random4),
        Box::new(super::bandit::Ucb1::default()),
        Box::new(super::bandit::Via::default()),
    ]
}

/// The direct link, or the first relay that is known where there is none.
struct Direct;

impl Policy for Direct {
    fn name(&self) -> &'static str {
        "direct"
    }

    fn choose(&mut self, pair: Pair, known: &Knowledge, _: &mut Pcg64Mcg) -> Relay {
        if known.is_link(pair) {
            return None;
        }
        known.relays(pair).find(|relay| known.route(pair, Some(*relay), |n| n.last).is_finite())
    }
}

/// What was best when the pair was first asked for, for ever.
#[derive(Default)]
struct Static {
    chosen: BTreeMap<Pair, Relay>,
}

impl Policy for Static {
    fn name(&self) -> &'static str {
        "static"
    }

    fn choose(&mut self, pair: Pair, known: &Knowledge, _: &mut Pcg64Mcg) -> Relay {
        let best = || known.best(pair, known.relays(pair), |n| n.first).0;
        *self.chosen.entry(pair).or_insert_with(best)
    }
}

/// The lowest sum of last values.
struct Last;

impl Policy for Last {
    fn name(&self) -> &'static str {
        "last"
    }

    fn choose(&mut self, pair: Pair, known: &Knowledge, _: &mut Pcg64Mcg) -> Relay {
        known.best(pair, known.relays(pair), |n| n.last).0
    }
}

/// The lowest sum of moving averages, with hysteresis against the route in use, as RON.
#[derive(Default)]
struct Ewma {
    current: BTreeMap<Pair, Relay>,
}

impl Policy for Ewma {
    fn name(&self) -> &'static str {
        "ewma"
    }

    fn choose(&mut self, pair: Pair, known: &Knowledge, _: &mut Pcg64Mcg) -> Relay {
        let average = |n: &Numbers| n.average;
        let (best, ms) = known.best(pair, known.relays(pair), average);
        let current = self.current.entry(pair).or_insert(best);
        if ms < known.route(pair, *current, average) * (1.0 - RON_HYSTERESIS) {
            *current = best;
        }
        *current
    }
}

/// Latency, jitter, loss and error of the average at a quarter each, all in units of the direct
/// route's latency (loss as a share); switches when a tenth better.
#[derive(Default)]
struct FourMetric {
    current: BTreeMap<Pair, Relay>,
}

impl Policy for FourMetric {
    fn name(&self) -> &'static str {
        "four-metric"
    }

    fn choose(&mut self, pair: Pair, known: &Knowledge, _: &mut Pcg64Mcg) -> Relay {
        let direct = known.route(pair, None, |n| n.average);
        let unit = if direct.is_finite() { direct.max(1e-3) } else { 100.0 };
        let metric = |n: &Numbers| 0.25 * ((n.average + n.jitter + n.error) / unit + n.loss);
        let (best, score) = known.best(pair, known.relays(pair), metric);
        let current = self.current.entry(pair).or_insert(None);
        if score < known.route(pair, *current, metric) * (1.0 - FOUR_METRIC_MARGIN) {
            *current = best;
        }
        *current
    }
}

/// The lowest sum of last values among the direct link and four relays drawn anew each time.
struct Random4;

impl Policy for Random4 {
    fn name(&self) -> &'static str {
        "random4"
    }

    fn choose(&mut self, pair: Pair, known: &Knowledge, random: &mut Pcg64Mcg) -> Relay {
        let relays: Vec<usize> = known.relays(pair).collect();
        let draw = |_| relays.get(random.random_range(0..relays.len().max(1))).copied();
        let drawn: Vec<usize> = (0..RANDOM_RELAYS).filter_map(draw).collect();
        known.best(pair, drawn.into_iter(), |n| n.last).0
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;
    use crate::replay::world::Quantity;

    /// Direct 0 to 1: 100 ms; over 2: 40 + 40 ms; over 3: 200 + 200 ms.
    fn known() -> Knowledge {
        let mut known = Knowledge::new(4, Quantity::Latency, false, [(0, 1)]);
        for (src, dst, ms) in
            [(0, 1, 100.0), (0, 2, 40.0), (2, 1, 40.0), (0, 3, 200.0), (3, 1, 200.0)]
        {
            known.measured(src, dst, Some(ms));
        }
        known
    }

    fn choose(name: &str, policies: &mut [Box<dyn Policy>], known: &Knowledge) -> Relay {
        let mut random = Pcg64Mcg::seed_from_u64(1);
        let policy = policies.iter_mut().find(|policy| policy.name() == name).unwrap();
        policy.choose((0, 1), known, &mut random)
    }

    #[test]
    fn the_names_are_those_of_the_policies() {
        let names: Vec<&str> = all().iter().map(|policy| policy.name()).collect();
        assert_eq!(names, NAMES[..MESHWISE]);
        assert_eq!((NAMES[ORACLE], NAMES[SPLIT_ORACLE]), ("oracle", "split-oracle"));
        assert_eq!((SPLIT_ORACLE, NAMES[MESHWISE]), (NAMES.len() - 1, "meshwise"));
    }

    #[test]
    fn each_follows_its_rule() {
        let (mut known, mut policies) = (known(), all());
        for name in ["static", "last", "ewma", "four-metric"] {
            assert_eq!(choose(name, &mut policies, &known), Some(2), "{name}");
        }
        assert_eq!(choose("direct", &mut policies, &known), None);
        // The relay turns slightly worse than direct: hysteresis holds, the last value moves.
        known.measured(0, 2, Some(64.0));
        assert_eq!(choose("last", &mut policies, &known), None);
        assert_eq!(choose("ewma", &mut policies, &known), Some(2));
        assert_eq!(choose("four-metric", &mut policies, &known), Some(2));
        // And far worse.
        known.measured(0, 2, Some(400.0));
        assert_eq!(choose("ewma", &mut policies, &known), None);
        assert_eq!(choose("four-metric", &mut policies, &known), None);
        assert_eq!(choose("static", &mut policies, &known), Some(2), "for ever");
    }

    #[test]
    fn where_no_direct_link_is_the_direct_policy_takes_what_there_is() {
        let mut known = Knowledge::new(4, Quantity::Latency, false, []);
        known.measured(0, 3, Some(5.0));
        known.measured(3, 1, Some(5.0));
        let mut policies = all();
        for name in ["direct", "last", "random4"] {
            let chosen = choose(name, &mut policies, &known);
            assert!(chosen == Some(3) || name == "random4", "{name}: {chosen:?}");
        }
    }
}
