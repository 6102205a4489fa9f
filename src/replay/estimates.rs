//! What meshwise knows of each link, as the ranking rules need it: one square table a round.

use std::collections::BTreeSet;

use super::world::Quantity;
use crate::engine::measure::window_statistics::quantile;
use crate::engine::measure::worth::Known;
use crate::engine::predict::posterior::{Measured, additive};
use crate::engine::predict::prospects::{Evidence, LEVEL_VALUES, MEAN_VALUES, prospects};
use crate::engine::predict::{CENTRES_COUNT, Prospect, STALE_INTERVALS_MAX};

/// Share of the way that a last value of throughput is drawn towards the prior (chosen on the
/// first two dates of the cloud trace among 0.1 to 0.7).
const PRIOR_SHARE: f64 = 0.1;
/// What was measured on all links: moments (s) and values (ms), each in order.
#[derive(Clone, Debug)]
pub struct Seen {
    nodes: usize,
    links: Vec<Vec<(f64, f64)>>,
    constants: BTreeSet<(usize, usize)>,
}

impl Seen {
    /// Nothing yet. `constants`: links that the whole trace holds one value of, as of a formality.
    pub fn new(nodes: usize, constants: BTreeSet<(usize, usize)>) -> Self {
        Self { nodes, links: vec![Vec::new(); nodes * nodes], constants }
    }

    /// A link was measured.
    pub fn push(&mut self, src: usize, dst: usize, t_s: f64, ms: f64) {
        self.links[src * self.nodes + dst].push((t_s, ms));
    }

    /// The first value at or after a moment; a constant link stays what it was.
    pub fn from(&self, src: usize, dst: usize, t_s: f64) -> Option<f64> {
        let seen = &self.links[src * self.nodes + dst];
        let at = seen.partition_point(|(then, _)| *then < t_s);
        let constant = seen.first().filter(|_| self.constants.contains(&(src, dst)));
        seen.get(at).or(constant).map(|(_, ms)| *ms)
    }

    /// The newest values of a link, oldest first, filled up with the other direction's.
    fn newest(&self, src: usize, dst: usize, count: usize) -> Vec<(f64, f64)> {
        let tail = |seen: &Vec<(f64, f64)>, count: usize| {
            seen[seen.len().saturating_sub(count)..].to_vec()
        };
        let own = tail(&self.links[src * self.nodes + dst], count);
        if own.len() >= LEVEL_VALUES {
            return own;
        }
        let mut values = tail(&self.links[dst * self.nodes + src], LEVEL_VALUES - own.len());
        // At equal times the own value stands last.
        values.extend(own);
        values.sort_by(|a, b| a.0.total_cmp(&b.0));
        values
    }

    /// What is known between each two nodes, whichever end measured it, row by row.
    pub fn known(&self, now_s: f64, round_s: f64) -> Vec<Option<Known>> {
        let of = |src: usize, dst: usize| {
            let ends = [(src, dst), (dst, src)].map(|(a, b)| &self.links[a * self.nodes + b]);
            let lasts = ends.iter().filter_map(|seen| seen.last());
            let (at_s, last_ms) = lasts.max_by(|a, b| a.0.total_cmp(&b.0))?;
            let tails = ends.map(|seen| &seen[seen.len().saturating_sub(MEAN_VALUES)..]);
            let mut both = tails.concat();
            both.sort_by(|a, b| a.0.total_cmp(&b.0));
            let changes = both.windows(2).map(|pair| (pair[1].1 / pair[0].1).ln().abs());
            let changes = changes.fold((0.0, 0.0), |(sum, count), c| (sum + c, count + 1.0));
            let age_rounds = ((now_s - at_s) / round_s.max(1e-3)).max(0.0);
            Some(Known { last_ms: *last_ms, changes, age_rounds })
        };
        (0..self.nodes * self.nodes).map(|at| of(at / self.nodes, at % self.nodes)).collect()
    }

    fn measured(&self, src: usize, dst: usize) -> Measured {
        let seen = &self.links[src * self.nodes + dst];
        let newest = &seen[seen.len().saturating_sub(MEAN_VALUES)..];
        Measured::of(&newest.iter().map(|(_, ms)| *ms).collect::<Vec<f64>>())
    }
}

/// The prospects of all links at the begin of a round.
pub struct Estimates {
    nodes: usize,
    links: Vec<Option<Prospect>>,
}

impl Estimates {
    /// Of what was seen by `now_s`. The first centre, the forecast, is the level here: the model
    /// sees routes, not links.
    pub fn new(seen: &Seen, quantity: Quantity, now_s: f64) -> Self {
        match quantity {
            Quantity::Latency => Self::of_latency(seen, now_s),
            Quantity::Throughput => Self::of_throughput(seen),
        }
    }

    /// Throughput is limited at the ends more than between them, and measured rarely: the last
    /// value drawn towards what both ends have elsewhere, and only that where nothing was measured.
    fn of_throughput(seen: &Seen) -> Self {
        let nodes = seen.nodes;
        let last = |link: &Vec<(f64, f64)>| link.last().map(|(_, ms)| ms.ln());
        let lasts: Vec<Option<f64>> = seen.links.iter().map(last).collect();
        let prior = additive(nodes, &lasts);
        let link = |(own, prior): (&Option<f64>, &f64)| {
            let ln = own.map_or(*prior, |own| own + PRIOR_SHARE * (prior - own));
            let spread = if own.is_some() { 0.0 } else { ln.exp() * PRIOR_SHARE };
            Some(Prospect {
                centre_ms: [ln.exp(); CENTRES_COUNT],
                spread_ms: [spread; CENTRES_COUNT],
                ..Prospect::default()
            })
        };
        let known = lasts.iter().any(Option::is_some);
        let links = lasts.iter().zip(&prior).map(|both| link(both).filter(|_| known)).collect();
        Self { nodes, links }
    }

    fn of_latency(seen: &Seen, now_s: f64) -> Self {
        let nodes = seen.nodes;
        let evidence = |(src, dst): (usize, usize)| {
            let newest = seen.newest(src, dst, MEAN_VALUES);
            let (at_s, _) = *newest.last()?;
            let overdue = (now_s - at_s) / usual_gap_s(&newest) - 1.0;
            let evidence = Evidence {
                values_ms: newest.iter().map(|(_, ms)| *ms).collect(),
                own: seen.measured(src, dst),
                overdue: overdue.clamp(0.0, STALE_INTERVALS_MAX),
            };
            Some(((src, dst), evidence))
        };
        let pairs = (0..nodes * nodes).map(|index| (index / nodes, index % nodes));
        let found = prospects(nodes, &pairs.filter_map(evidence).collect());
        let mut links = vec![None; nodes * nodes];
        for ((src, dst), prospect) in found {
            links[src * nodes + dst] = Some(prospect);
        }
        Self { nodes, links }
    }

    /// A link; `None` when neither direction was ever measured.
    pub fn link(&self, src: usize, dst: usize) -> Option<&Prospect> {
        self.links[src * self.nodes + dst].as_ref()
    }

    /// A route: sums over its links, or for throughput the narrowest link.
    pub fn route(
        &self,
        quantity: Quantity,
        (src, dst): (usize, usize),
        relay: Option<usize>,
    ) -> Option<Prospect> {
        let Some(relay) = relay else { return self.link(src, dst).copied() };
        let (a, b) = (self.link(src, relay)?, self.link(relay, dst)?);
        Some(match quantity {
            Quantity::Latency => a.and(b),
            Quantity::Throughput => a.joined(b, f64::max),
        })
    }
}

/// Median time between measurements; infinite of fewer than three, which tell nothing.
fn usual_gap_s(values: &[(f64, f64)]) -> f64 {
    // Both directions may be measured at one moment.
    let gaps = values.windows(2).map(|pair| pair[1].0 - pair[0].0).filter(|gap| *gap > 0.0);
    let gaps: Vec<f64> = gaps.collect();
    let median = if gaps.len() < 2 { None } else { quantile(&gaps, 0.5) };
    median.map_or(f64::INFINITY, |gap| gap.max(1e-3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_known_by_either_direction_and_silence_makes_it_stale() {
        let mut seen = Seen::new(3, BTreeSet::from([(1, 2)]));
        for (t_s, ms) in [(0.0, 10.0), (2.0, 10.0), (4.0, 10.0)] {
            seen.push(0, 1, t_s, ms);
        }
        seen.push(1, 0, 5.0, 30.0);
        seen.push(1, 2, 3.0, 5.0);
        let at = |now_s| Estimates::new(&seen, Quantity::Latency, now_s);
        let link = *at(13.0).link(0, 1).unwrap();
        assert_eq!((link.centre_ms[1], link.centre_ms[3]), (10.0, 30.0));
        assert!((link.stale_ms - 10.0 * (8.0 / 2.0 - 1.0)).abs() < 1e-9, "{}", link.stale_ms);
        assert_eq!(at(6.5).link(0, 1).unwrap().stale_ms, 0.0, "not overdue");
        assert_eq!(at(99.0).link(1, 2).unwrap().stale_ms, 0.0, "measured once");
        assert!(at(13.0).link(0, 2).is_none());
        let route = at(13.0).route(Quantity::Latency, (0, 2), Some(1)).unwrap();
        assert_eq!(route.centre_ms[1], 15.0);
        assert_eq!(seen.from(1, 2, 99.0), Some(5.0), "measured once for all");
        assert_eq!(seen.from(1, 0, 99.0), None, "not measured since");
    }

    #[test]
    fn throughput_never_measured_is_what_both_ends_have_elsewhere() {
        let mut seen = Seen::new(4, BTreeSet::new());
        for (a, b) in [(0, 1), (0, 2), (1, 2), (2, 1), (1, 0), (2, 0), (3, 1), (3, 2)] {
            seen.push(a, b, 0.0, if a == 3 { 8.0 } else { 1.0 });
        }
        let estimates = Estimates::new(&seen, Quantity::Throughput, 1.0);
        let foreseen = estimates.link(3, 0).unwrap().centre_ms[1];
        assert!((foreseen - 8.0).abs() < 0.5, "{foreseen}");
        let narrowest = estimates.route(Quantity::Throughput, (3, 2), Some(1)).unwrap();
        assert!(narrowest.centre_ms[1] > 7.0);
    }
}
