//! Policies that explore: they learn from what their own choices cost.

use std::collections::BTreeMap;

use rand_pcg::Pcg64Mcg;

use super::knowledge::Knowledge;
use super::policy::{Pair, Policy, Relay};

/// Exploration of UCB1 (Auer et al., 2002: 2 under the root).
const UCB1_EXPLORATION: f64 = 2.0;
/// Exploration of VIA's modified UCB1 (Jiang et al., 2016, section 4.4: 0.1).
const VIA_EXPLORATION: f64 = 0.1;
/// Standard errors of VIA's confidence bounds (Jiang et al., 2016: 95 %).
const VIA_BOUND: f64 = 1.96;
/// Share of the history that a new value weighs: what an arm cost long ago fades.
const FADE: f64 = 0.3;

/// What an arm cost.
#[derive(Clone, Copy, Debug, Default)]
struct Arm {
    pulls: f64,
    ms: f64,
}

type Arms = BTreeMap<(Pair, Relay), Arm>;

fn pull(arms: &mut Arms, pair: Pair, relay: Relay, ms: f64) {
    let arm = arms.entry((pair, relay)).or_default();
    arm.pulls += 1.0;
    let gain = (1.0 / arm.pulls).max(FADE);
    arm.ms += gain * (ms - arm.ms);
}

fn routes(pair: Pair, known: &Knowledge) -> impl Iterator<Item = Relay> + '_ {
    let all = std::iter::once(None).chain(known.relays(pair).map(Some));
    all.filter(move |relay| known.route(pair, *relay, |n| n.last).is_finite())
}

/// UCB1 for each pair over all its routes; the reward is half of the direct route's last latency over
/// the cost, at most 1.
#[derive(Default)]
pub struct Ucb1 {
    arms: Arms,
    pulls: BTreeMap<Pair, f64>,
}

impl Policy for Ucb1 {
    fn name(&self) -> &'static str {
        "ucb1"
    }

    fn choose(&mut self, pair: Pair, known: &Knowledge, _: &mut Pcg64Mcg) -> Relay {
        let total = *self.pulls.entry(pair).and_modify(|n| *n += 1.0).or_insert(1.0);
        let unit = known.route(pair, None, |n| n.last);
        let unit = if unit.is_finite() { unit } else { 100.0 };
        let index = |relay: Relay| match self.arms.get(&(pair, relay)) {
            Some(arm) => {
                let reward = (unit / arm.ms.max(1e-3)).min(2.0) / 2.0;
                reward + (UCB1_EXPLORATION * total.ln() / arm.pulls).sqrt()
            }
            None => f64::INFINITY,
        };
        // Untried arms in order, the direct link first.
        let best = routes(pair, known).map(|relay| (relay, index(relay)));
        best.fold((None, f64::NEG_INFINITY), |best, next| if next.1 > best.1 { next } else { best })
            .0
    }

    fn learn(&mut self, pair: Pair, relay: Relay, ms: f64) {
        pull(&mut self.arms, pair, relay, ms);
    }
}

/// Prediction-guided exploration (VIA; Jiang et al., 2016): bounds from the history of the links,
/// the routes whose lower bound is below the smallest upper bound, and among those a UCB1 whose
/// unit is the mean upper bound.
#[derive(Default)]
pub struct Via {
    arms: Arms,
    pulls: BTreeMap<Pair, f64>,
}

impl Policy for Via {
    fn name(&self) -> &'static str {
        "via"
    }

    fn choose(&mut self, pair: Pair, known: &Knowledge, _: &mut Pcg64Mcg) -> Relay {
        let total = *self.pulls.entry(pair).and_modify(|n| *n += 1.0).or_insert(1.0);
        let bound = |relay: Relay, sign: f64| {
            known.route(pair, relay, |n| n.average + sign * VIA_BOUND * n.standard_error())
        };
        let all: Vec<(Relay, f64, f64)> = routes(pair, known)
            .map(|relay| (relay, bound(relay, -1.0), bound(relay, 1.0)))
            .collect();
        let least_upper = all.iter().map(|(_, _, upper)| *upper).fold(f64::INFINITY, f64::min);
        let top: Vec<_> = all.into_iter().filter(|(_, low, _)| *low <= least_upper).collect();
        let unit = top.iter().map(|(_, _, upper)| upper).sum::<f64>() / top.len().max(1) as f64;
        let index = |relay: Relay| {
            let predicted = known.route(pair, relay, |n| n.average);
            let (ms, pulls) = match self.arms.get(&(pair, relay)) {
                Some(arm) => (arm.ms.min(1e9), arm.pulls + 1.0),
                None => (predicted, 1.0),
            };
            let ms = (ms * (pulls - 1.0) + predicted) / pulls;
            ms / unit - (VIA_EXPLORATION * total.ln() / pulls).sqrt()
        };
        let indexed = top.into_iter().map(|(relay, _, _)| (relay, index(relay)));
        indexed
            .fold((None, f64::INFINITY), |best, next| if next.1 < best.1 { next } else { best })
            .0
    }

    fn learn(&mut self, pair: Pair, relay: Relay, ms: f64) {
        pull(&mut self.arms, pair, relay, ms);
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;
    use crate::replay::world::Quantity;

    fn play(policy: &mut dyn Policy, rounds: usize) -> Vec<Relay> {
        let mut known = Knowledge::new(4, Quantity::Latency, false, []);
        for _ in 0..5 {
            // By the measurements all look alike, and vary; only by use relay 2 turns out best.
            for (src, dst, ms) in
                [(0, 1, 100.0), (0, 2, 50.0), (2, 1, 52.0), (0, 3, 50.0), (3, 1, 51.0)]
            {
                known.measured(src, dst, Some(ms * 0.8));
                known.measured(src, dst, Some(ms * 1.2));
            }
        }
        let mut random = Pcg64Mcg::seed_from_u64(1);
        let mut chosen = Vec::new();
        for _ in 0..rounds {
            let relay = policy.choose((0, 1), &known, &mut random);
            policy.learn((0, 1), relay, if relay == Some(2) { 60.0 } else { 110.0 });
            chosen.push(relay);
        }
        chosen
    }

    #[test]
    fn both_find_what_only_use_shows() {
        for policy in [&mut Ucb1::default() as &mut dyn Policy, &mut Via::default()] {
            let chosen = play(policy, 400);
            let late = chosen[200..].iter().filter(|relay| **relay == Some(2)).count();
            assert!(late > 120, "{}: {late} of 200", policy.name());
        }
    }
}
