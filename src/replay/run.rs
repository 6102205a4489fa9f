//! One seeded run: rounds of decisions, measurements, training and promotion, in virtual time.

use std::collections::BTreeMap;
use std::sync::Arc;

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_pcg::Pcg64Mcg;

use super::knowledge::Knowledge;
use super::life::Life;
use super::meshwise::{Meshwise, Weighed};
use super::policy::{self, Pair, Policy, Relay};
use super::probing::{Cursor, Probe, Prober};
use super::world::{Sample, TraceWorld};
use super::{ReplayConfig, ReplayError};
use crate::engine::predict::{ForestModel, Ranking};
use crate::learn::TrainConfig;

/// Link rows that a round adds to the training data, drawn at random.
const LINK_ROWS_A_ROUND: usize = 3_000;
/// Share of a round's losses: of the newest measurements of a link.
const LOSS_GAIN: f64 = 0.05;
/// A changepoint counts for predictions so long after it (s).
pub const AFTER_CHANGE_S: f64 = 3_600.0;

/// Names of what is compared, in the order of [`Outcome::costs_ms`].
pub const NAMES: [&str; 11] = [
    "direct",
    "static",
    "last",
    "ewma",
    "four-metric",
    "random4",
    "ucb1",
    "via",
    "meshwise",
    "oracle",
    "split-oracle",
];
/// Position of meshwise among [`NAMES`].
pub const MESHWISE: usize = 8;

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

/// A forecast and what came of it.
#[derive(Clone, Copy, Debug)]
pub struct Forecasted {
    /// Source and destination.
    pub pair: Pair,
    /// What was measured (ms).
    pub truth_ms: f64,
    /// What was forecast (ms).
    pub forecast_ms: f64,
    /// The 90 % interval (ms).
    pub interval_ms: (f64, f64),
    /// The naive forecasts (ms): last value, moving average.
    pub naive_ms: [f64; 2],
    /// The truth is a labelled change of the direct link, or lies within an hour after one.
    pub after_change: bool,
    /// Moment of the forecast (s).
    pub t_s: f64,
}

/// What a run gave.
#[derive(Default)]
pub struct Run {
    /// The seed.
    pub seed: u64,
    /// All scored decisions.
    pub outcomes: Vec<Outcome>,
    /// All scored forecasts.
    pub forecasts: Vec<Forecasted>,
    /// Models that were trained.
    pub models_trained: usize,
    /// Models that were promoted.
    pub models_promoted: usize,
    /// The last champion.
    pub champion: Option<Arc<ForestModel>>,
    /// The rule at the end.
    pub ranking: Ranking,
    /// Weights of the mix at the end.
    pub weights: [f64; 4],
    /// Decisions that could not be scored: a chosen link was never measured again.
    pub dropped: usize,
    /// Scored virtual time (s).
    pub scored_s: f64,
}

/// What the choices of policies cost (index of the policy, pair, relay, ms), by the moment in
/// which it is known.
type Lessons = BTreeMap<u64, Vec<(usize, Pair, Relay, f64)>>;

/// Microseconds since the trace began.
fn key(t_s: f64) -> u64 {
    (t_s.max(0.0) * 1e6) as u64
}

/// Plays the trace once.
///
/// # Errors
/// [`ReplayError::Learn`] when training fails for another reason than too few rows.
pub fn run(world: &TraceWorld, config: &ReplayConfig, seed: u64) -> Result<Run, ReplayError> {
    let mut random = Pcg64Mcg::seed_from_u64(seed);
    // With a budget, one end measures a link for both.
    let fresher = config.probes.is_some();
    let mut known =
        Knowledge::new(world.nodes(), config.quantity, fresher, world.links.keys().copied());
    let mut meshwise = Meshwise::new(world, config.quantity, fresher);
    let mut policies = policy::all();
    let mut cursor = Cursor::new(world);
    let rounds = world.rounds.len() - 1;
    let warmup = config.warmup_rounds(rounds);
    let halves = Halves::new(world, world.rounds[warmup]);
    let per_round = config.decisions_per_round(rounds - warmup, world.pairs.len());
    let mut losses: BTreeMap<Pair, f64> = BTreeMap::new();
    // What the simple policies know, and what meshwise does, each within the same budget.
    let mut prober = Prober::new(world.nodes(), config.probes);
    let mut own_prober = Prober::new(world.nodes(), config.probes);
    let mut lessons: Lessons = BTreeMap::new();
    let mut changed_s: BTreeMap<Pair, f64> = BTreeMap::new();
    let mut life = Life::new(config.quantity);
    let mut result = Run { seed, ..Run::default() };
    result.scored_s = world.rounds[rounds] - world.rounds[warmup];

    for round in 0..rounds {
        let t_s = world.rounds[round];
        cursor.outcomes_at(t_s);
        if config.learning
            && round > 0
            && round >= warmup
            && (round - warmup).is_multiple_of(config.retrain_rounds(rounds))
        {
            let version = Some(format!("replay-{seed}-{round}"));
            let train = TrainConfig { seed, version, ..config.train.clone() };
            let champion = meshwise.champion().map(AsRef::as_ref);
            if let Some(model) = life.train(&meshwise.rows(), champion, &train)? {
                meshwise.promote(Arc::new(model));
            }
        }
        if round > 0 {
            meshwise.begin_round(t_s);
            // A pair whose links are never measured again has no outcome.
            let alive = |(src, dst): &Pair| cursor.leads_on(*src) && cursor.leads_to(*dst);
            let mut pairs: Vec<Pair> = world.pairs.iter().copied().filter(alive).collect();
            let (chosen, _) = pairs.partial_shuffle(&mut random, per_round);
            for &mut pair in chosen {
                let Some(weighed) = meshwise.decide(pair, round, t_s) else { continue };
                let scored = round >= warmup;
                let decision =
                    Decision { world, config, cursor: &cursor, known: &known, t_s, pair };
                let outcome = decision.play(
                    &mut policies,
                    &weighed,
                    &halves,
                    &mut random,
                    &mut lessons,
                    scored,
                );
                let direct_at = weighed.candidates.iter().position(|c| c.relay.is_none());
                let changed = changed_s.get(&pair).copied();
                for index in [direct_at, Some(weighed.chosen)].into_iter().flatten() {
                    let relay = weighed.candidates[index].relay;
                    let Some(truth_ms) = decision.cost(relay) else { continue };
                    // With a budget, only the route in use is measured by its traffic.
                    if config.probes.is_none() || index == weighed.chosen {
                        let known_at_s = decision.known_at_s(relay);
                        meshwise.expect(&weighed, index, truth_ms, known_at_s);
                    }
                    if !scored {
                        continue;
                    }
                    let fresh = cursor.outcome(pair.0, pair.1).map(|(_, sample)| sample);
                    let after_change = fresh.is_some_and(|sample| {
                        let recent =
                            changed.is_some_and(|then| sample.t_s - then <= AFTER_CHANGE_S);
                        sample.changepoint || recent
                    });
                    let candidate = &weighed.candidates[index];
                    result.forecasts.push(Forecasted {
                        pair,
                        truth_ms,
                        forecast_ms: candidate.forecast_ms,
                        interval_ms: candidate.interval_ms,
                        naive_ms: candidate.naive_ms,
                        after_change,
                        t_s,
                    });
                    if Some(weighed.chosen) == direct_at {
                        break;
                    }
                }
                match outcome {
                    Some(outcome) if scored => result.outcomes.push(outcome),
                    None if scored => result.dropped += 1,
                    _ => {}
                }
                meshwise.keep(weighed);
            }
        }
        let until_s = world.rounds[round + 1];
        let all = cursor.measurements(until_s);
        for probe in all.iter().filter(|probe| probe.changepoint) {
            changed_s.insert(probe.pair, probe.t_s);
        }
        for probe in prober.choose(&all, round, None, &mut random) {
            known.measured(probe.pair.0, probe.pair.1, probe.ms);
        }
        let worth = config.probes.and_then(|_| meshwise.worth(t_s, until_s - t_s));
        let probes = own_prober.choose(&all, round, worth.as_deref(), &mut random);
        let later = lessons.split_off(&key(until_s));
        for (policy, pair, relay, ms) in
            std::mem::replace(&mut lessons, later).into_values().flatten()
        {
            policies[policy].learn(pair, relay, ms);
        }
        let mut rows: Vec<&Probe> = probes.iter().collect();
        let (picked, _) = rows.partial_shuffle(&mut random, LINK_ROWS_A_ROUND);
        for probe in picked {
            meshwise.link_row(probe.pair, probe.t_s, probe.ms);
        }
        for said in probes.chunk_by(|one, other| one.pair.0 == other.pair.0) {
            let measured: Vec<_> = said
                .iter()
                .map(|probe| {
                    let loss = losses.entry(probe.pair).or_insert(0.0);
                    *loss += LOSS_GAIN * (f64::from(probe.ms.is_none()) - *loss);
                    (probe.pair.1, probe.t_s, probe.ms, *loss)
                })
                .collect();
            meshwise.advertised(said[0].pair.0, &measured);
        }
        meshwise.resolve(round, until_s);
    }
    (result.models_trained, result.models_promoted) = (life.trained, life.promoted);
    result.ranking = meshwise.ranking();
    result.weights = meshwise.weights();
    result.champion = meshwise.champion().cloned();
    Ok(result)
}

/// For the split oracle: the mean of every second sample of each link, from a moment on.
struct Halves {
    nodes: usize,
    means_ms: Vec<[f64; 2]>,
}

impl Halves {
    fn new(world: &TraceWorld, from_s: f64) -> Self {
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

/// One decision with its outcomes.
struct Decision<'a> {
    world: &'a TraceWorld,
    config: &'a ReplayConfig,
    cursor: &'a Cursor<'a>,
    known: &'a Knowledge,
    t_s: f64,
    pair: Pair,
}

impl Decision<'_> {
    /// What a route cost; `None` when one of its links was never measured again.
    fn cost(&self, relay: Relay) -> Option<f64> {
        let ms = TraceWorld::route_cost(self.config.quantity, self.pair, relay, |a, b| {
            self.cursor.outcome(a, b).map_or(f64::INFINITY, |(_, sample)| sample.ms)
        });
        ms.is_finite().then_some(ms)
    }

    /// When the outcome of a route is known: with the last of its hops.
    fn known_at_s(&self, relay: Relay) -> f64 {
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

    /// Lets every policy choose and pay.
    fn play(
        &self,
        policies: &mut [Box<dyn Policy>],
        weighed: &Weighed,
        halves: &Halves,
        random: &mut Pcg64Mcg,
        lessons: &mut Lessons,
        scored: bool,
    ) -> Option<Outcome> {
        let mut relays = [None; NAMES.len()];
        let mut costs_ms = [f64::NAN; NAMES.len()];
        let mut whole = true;
        for (index, policy) in policies.iter_mut().enumerate() {
            relays[index] = policy.choose(self.pair, self.known, random);
            match self.cost(relays[index]) {
                Some(ms) => {
                    let lesson = (index, self.pair, relays[index], ms);
                    lessons.entry(key(self.known_at_s(relays[index]))).or_default().push(lesson);
                    costs_ms[index] = ms;
                }
                None => whole = false,
            }
        }
        if !scored {
            return None;
        }
        let outcome = |a, b| self.cursor.outcome(a, b);
        relays[MESHWISE] = weighed.candidates[weighed.chosen].relay;
        relays[MESHWISE + 1] =
            self.least(|a, b| outcome(a, b).map_or(f64::INFINITY, |(_, sample)| sample.ms));
        relays[MESHWISE + 2] = self.least(|a, b| halves.mean_ms(a, b, outcome(a, b)));
        for index in MESHWISE..NAMES.len() {
            match self.cost(relays[index]) {
                Some(ms) => costs_ms[index] = ms,
                None => whole = false,
            }
        }
        if !whole {
            return None;
        }
        let candidates = weighed.candidates.iter();
        let candidates_ms: Option<Vec<(f64, f64)>> =
            candidates.map(|c| Some((c.forecast_ms, self.cost(c.relay)?))).collect();
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
