//! One decision: every policy chooses, and pays what the trace says.

use std::collections::BTreeMap;

use rand_pcg::Pcg64Mcg;

use super::ReplayConfig;
use super::knowledge::Knowledge;
use super::meshwise::Weighed;
use super::policy::{MESHWISE, NAMES, ORACLE, Pair, Policy, Relay, SPLIT_ORACLE};
use super::probing::Cursor;
use super::world::{Sample, TraceWorld};

/// A decision and what every policy's choice cost.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Moment (s).
    pub t_s: f64,
    /// Source and destination.
    pub pair: Pair,
    /// The relay that each policy chose.
    pub relays: [Relay; NAMES.len()],
    /// What it cost (ms).
    pub costs_ms: [f64; NAMES.len()],
    /// What the direct link cost (ms); infinite where there is none.
    pub direct_ms: f64,
    /// What meshwise forecast for its choice (ms).
    pub forecast_ms: f64,
    /// For the judging of other policies: the forecast and the outcome of every candidate, and
    /// which of them meshwise chose.
    pub candidates_ms: Vec<(f64, f64)>,
    /// Index of meshwise's choice among the candidates.
    pub chosen: usize,
}

/// What the choices of policies cost (index of the policy, pair, relay, ms), by the moment in
/// which it is known (µs since the trace began).
pub(super) type Lessons = BTreeMap<u64, Vec<(usize, Pair, Relay, f64)>>;

/// Microseconds since the trace began.
pub(super) fn key(t_s: f64) -> u64 {
    (t_s.max(0.0) * 1e6) as u64
}

/// One decision with its outcomes.
pub(super) struct Decision<'a> {
    pub(super) world: &'a TraceWorld,
    pub(super) config: &'a ReplayConfig,
    pub(super) cursor: &'a Cursor<'a>,
    pub(super) known: &'a Knowledge,
    pub(super) t_s: f64,
    pub(super) pair: Pair,
}

impl Decision<'_> {
    /// What a route cost; `None` when one of its links was never measured again.
    pub(super) fn cost(&self, relay: Relay) -> Option<f64> {
        let ms = TraceWorld::route_cost(self.config.quantity, self.pair, relay, |a, b| {
            self.cursor.outcome(a, b).map_or(f64::INFINITY, |(_, sample)| sample.ms)
        });
        ms.is_finite().then_some(ms)
    }

    /// When the outcome of a route is known: with the last of its hops.
    pub(super) fn known_at_s(&self, relay: Relay) -> f64 {
        let at_s = |a, b| self.cursor.outcome(a, b).map_or(self.t_s, |(_, sample)| sample.t_s);
        let (src, dst) = self.pair;
        relay.map_or_else(|| at_s(src, dst), |relay| at_s(src, relay).max(at_s(relay, dst)))
    }

    /// The route of least cost by some measure of its links.
    fn least(&self, of: impl Fn(usize, usize) -> f64) -> Relay {
        let quantity = self.config.quantity;
        let ms = |relay| TraceWorld::route_cost(quantity, self.pair, relay, &of);
        let relays = (0..self.world.nodes()).filter(|n| *n != self.pair.0 && *n != self.pair.1);
        let routes = relays.map(|relay| (Some(relay), ms(Some(relay))));
        routes.fold((None, ms(None)), |best, next| if next.1 < best.1 { next } else { best }).0
    }

    /// Lets every simple policy choose and pay. They learn from it when it is known.
    pub(super) fn play(
        &self,
        policies: &mut [Box<dyn Policy>],
        random: &mut Pcg64Mcg,
        lessons: &mut Lessons,
    ) -> Vec<Relay> {
        let mut relays = Vec::with_capacity(policies.len());
        for (index, policy) in policies.iter_mut().enumerate() {
            let relay = policy.choose(self.pair, self.known, random);
            if let Some(ms) = self.cost(relay) {
                let lesson = (index, self.pair, relay, ms);
                lessons.entry(key(self.known_at_s(relay))).or_default().push(lesson);
            }
            relays.push(relay);
        }
        relays
    }

    /// The outcome of all choices, the oracles' among them; `chosen` are the others', in the order of
    /// [`NAMES`]. `None` when a link of one was never measured again.
    pub(super) fn outcome(
        &self,
        chosen: &[Relay],
        weighed: &Weighed,
        halves: &Halves,
    ) -> Option<Outcome> {
        let outcome = |a, b| self.cursor.outcome(a, b);
        let mut relays = [None; NAMES.len()];
        relays[..chosen.len()].copy_from_slice(chosen);
        relays[ORACLE] =
            self.least(|a, b| outcome(a, b).map_or(f64::INFINITY, |(_, sample)| sample.ms));
        relays[SPLIT_ORACLE] = self.least(|a, b| halves.mean_ms(a, b, outcome(a, b)));
        let mut costs_ms = [f64::NAN; NAMES.len()];
        for (cost_ms, relay) in costs_ms.iter_mut().zip(relays) {
            *cost_ms = self.cost(relay)?;
        }
        let candidates = weighed.candidates.iter();
        let candidates_ms: Option<Vec<(f64, f64)>> =
            candidates.map(|c| Some((c.forecast_ms, self.cost(c.relay)?))).collect();
        debug_assert_eq!(relays[MESHWISE], weighed.candidates[weighed.chosen].relay);
        Some(Outcome {
            t_s: self.t_s,
            pair: self.pair,
            relays,
            costs_ms,
            direct_ms: self.cost(None).unwrap_or(f64::INFINITY),
            forecast_ms: weighed.candidates[weighed.chosen].forecast_ms,
            candidates_ms: candidates_ms.unwrap_or_default(),
            chosen: weighed.chosen,
        })
    }
}

/// For the split oracle: the mean of every second sample of each link, from a moment on.
pub(super) struct Halves {
    nodes: usize,
    means_ms: Vec<[f64; 2]>,
}

impl Halves {
    pub(super) fn new(world: &TraceWorld, from_s: f64) -> Self {
        let nodes = world.nodes();
        let mut means_ms = vec![[f64::INFINITY; 2]; nodes * nodes];
        for ((src, dst), link) in &world.links {
            let mut sums = [(0.0, 0.0); 2];
            for (index, sample) in link.samples.iter().enumerate() {
                if sample.t_s >= from_s || link.samples.len() == 1 {
                    let (sum, count) = &mut sums[index % 2];
                    *sum += sample.ms;
                    *count += 1.0;
                }
            }
            let mean = |(sum, count): (f64, f64)| if count > 0.0 { sum / count } else { f64::NAN };
            let [even, odd] = sums.map(mean);
            // With one half empty there is nothing to split; the other half stands for both.
            let means =
                [if even.is_nan() { odd } else { even }, if odd.is_nan() { even } else { odd }];
            if !means[0].is_nan() {
                means_ms[src * nodes + dst] = means;
            }
        }
        Self { nodes, means_ms }
    }

    /// Mean of the half that does not hold the outcome.
    fn mean_ms(&self, src: usize, dst: usize, outcome: Option<(usize, Sample)>) -> f64 {
        let Some((index, _)) = outcome else { return f64::INFINITY };
        self.means_ms[src * self.nodes + dst][1 - index % 2]
    }
}
