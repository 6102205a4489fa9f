//! One seeded run: rounds of decisions, measurements, training and promotion, in virtual time.

use std::collections::BTreeMap;
use std::sync::Arc;

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_pcg::Pcg64Mcg;

use super::knowledge::Knowledge;
use super::life::Life;
use super::live::Live;
use super::meshwise::{LEVELS, Meshwise, Mixed, Weighed};
pub use super::outcome::Outcome;
use super::outcome::{Decision, Halves, Lessons, key};
use super::policy::{self, MESHWISE, Pair, Policy};
use super::probing::{Cursor, Probe, Prober};
use super::world::{Quantity, TraceWorld};
use super::{ReplayConfig, ReplayError};
use crate::engine::predict::{ForestModel, Prospect, Ranking, RankingTuner};
use crate::learn::{LearnError, TrainConfig, TrainRow, train_rows};

/// Link rows that a round adds to the training data, drawn at random.
const LINK_ROWS_A_ROUND: usize = 3_000;
/// Share of a round's losses: of the newest measurements of a link.
const LOSS_GAIN: f64 = 0.05;
/// A changepoint counts for predictions so long after it (s).
pub const AFTER_CHANGE_S: f64 = 3_600.0;

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
    /// Whether the interval at each of [`LEVELS`] held it.
    pub held: [bool; LEVELS.len()],
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
    /// What the mix did and promised.
    pub mixed: Mixed,
    /// What every fixed ranking rule would have paid in the scored decisions.
    pub rules: RankingTuner,
    /// What meshwise and the direct link paid in the same ones (ms, summed); infinite without a link.
    pub rules_beside_ms: [f64; 2],
    /// Rows and model of one more training at the end; only where they are written down.
    pub trained: Option<Trained>,
    /// Decisions that could not be scored: a chosen link was never measured again.
    pub dropped: usize,
    /// Scored virtual time (s).
    pub scored_s: f64,
}

/// What a model was trained on at the end of a run, and the model, for others to be fitted on the same.
pub struct Trained {
    /// The newest rows.
    pub rows: Vec<TrainRow>,
    /// The model.
    pub model: ForestModel,
}

/// Plays the trace once.
///
/// # Errors
/// [`ReplayError::Learn`] when training fails for another reason than too few rows.
pub fn run(world: &TraceWorld, config: &ReplayConfig, seed: u64) -> Result<Run, ReplayError> {
    let mut play = Play::new(world, config, seed);
    for round in 0..play.rounds {
        play.train(round)?;
        play.decide(round);
        play.measure(round);
    }
    play.finish()
}

/// A run while it goes on.
struct Play<'w> {
    world: &'w TraceWorld,
    config: &'w ReplayConfig,
    random: Pcg64Mcg,
    rounds: usize,
    warmup: usize,
    per_round: usize,
    cursor: Cursor<'w>,
    halves: Halves,
    /// What the simple policies know, and what meshwise measures, each within the same budget.
    known: Knowledge,
    policies: Vec<Box<dyn Policy>>,
    lessons: Lessons,
    prober: Prober,
    own_prober: Prober,
    meshwise: Meshwise,
    live: Live,
    life: Life,
    losses: BTreeMap<Pair, f64>,
    /// When each link was labelled to have changed last (s).
    changed_s: BTreeMap<Pair, f64>,
    result: Run,
}

impl<'w> Play<'w> {
    fn new(world: &'w TraceWorld, config: &'w ReplayConfig, seed: u64) -> Self {
        let (nodes, quantity) = (world.nodes(), config.quantity);
        // With a budget, one end measures a link for both.
        let fresher = config.probes.is_some();
        let rounds = world.rounds.len() - 1;
        let warmup = config.warmup_rounds(rounds);
        let scored_s = world.rounds[rounds] - world.rounds[warmup];
        Self {
            world,
            config,
            random: Pcg64Mcg::seed_from_u64(seed),
            rounds,
            warmup,
            per_round: config.decisions_per_round(rounds - warmup, world.pairs.len()),
            cursor: Cursor::new(world),
            halves: Halves::new(world, world.rounds[warmup]),
            known: Knowledge::new(nodes, quantity, fresher, world.links.keys().copied()),
            policies: policy::all(),
            lessons: Lessons::new(),
            prober: Prober::new(nodes, config.probes),
            own_prober: Prober::new(nodes, config.probes),
            meshwise: Meshwise::new(world, quantity, fresher),
            live: Live::new(nodes, quantity, config.probes.is_none()),
            life: Life::new(quantity),
            losses: BTreeMap::new(),
            changed_s: BTreeMap::new(),
            result: Run { seed, scored_s, ..Run::default() },
        }
    }

    /// On schedule, judges the challenger and trains the next one.
    fn train(&mut self, round: usize) -> Result<(), ReplayError> {
        let due = round > 0
            && round >= self.warmup
            && (round - self.warmup).is_multiple_of(self.config.retrain_rounds(self.rounds));
        if !self.config.learning || !due {
            return Ok(());
        }
        let version = Some(format!("replay-{}-{round}", self.result.seed));
        let train = TrainConfig { seed: self.result.seed, version, ..self.config.train.clone() };
        let champion = self.meshwise.champion().map(AsRef::as_ref);
        if let Some(model) = self.life.train(&self.meshwise.rows(), champion, &train)? {
            let model = Arc::new(model);
            self.live.promote(&model);
            self.meshwise.promote(model);
        }
        Ok(())
    }

    /// The decisions of a round, for pairs drawn at random.
    fn decide(&mut self, round: usize) {
        let t_s = self.world.rounds[round];
        self.cursor.outcomes_at(t_s);
        if round == 0 {
            return;
        }
        self.meshwise.begin_round(t_s);
        // A pair whose links are never measured again has no outcome.
        let cursor = &self.cursor;
        let alive = |(src, dst): &Pair| cursor.leads_on(*src) && cursor.leads_to(*dst);
        let mut pairs: Vec<Pair> = self.world.pairs.iter().copied().filter(alive).collect();
        let (chosen, _) = pairs.partial_shuffle(&mut self.random, self.per_round);
        for &mut pair in chosen {
            if let Some(weighed) = self.meshwise.decide(pair, round, t_s) {
                self.decide_one(&weighed);
                self.meshwise.keep(weighed);
            }
        }
    }

    fn decide_one(&mut self, weighed: &Weighed) {
        let (pair, t_s) = (weighed.pair, weighed.t_s);
        let Self { world, config, .. } = *self;
        let decision =
            Decision { world, config, cursor: &self.cursor, known: &self.known, t_s, pair };
        let mut relays = decision.play(&mut self.policies, &mut self.random, &mut self.lessons);
        let truth = |relay| Some((decision.cost(relay)?, decision.known_at_s(relay)));
        let live = self.live.decide(&self.meshwise, weighed, truth);
        let own = weighed.candidates[weighed.chosen].relay;
        relays.extend([own, self.meshwise.quickest(pair)]);
        relays.extend(live);
        let scored = weighed.round >= self.warmup;
        let direct_at = weighed.candidates.iter().position(|c| c.relay.is_none());
        let seen = [direct_at, Some(weighed.chosen)].into_iter().flatten();
        // Once, where they are the same.
        for index in seen.take(if direct_at == Some(weighed.chosen) { 1 } else { 2 }) {
            let relay = weighed.candidates[index].relay;
            let Some(truth_ms) = decision.cost(relay) else { continue };
            // With a budget, only the route in use is measured by its traffic.
            if config.probes.is_none() || index == weighed.chosen {
                let known_at_s = decision.known_at_s(relay);
                self.meshwise.expect(weighed, index, truth_ms, known_at_s);
            }
            if scored {
                let after_change = self.is_after_change(pair);
                let candidate = &weighed.candidates[index];
                self.result.forecasts.push(Forecasted {
                    pair,
                    truth_ms,
                    forecast_ms: candidate.forecast_ms,
                    interval_ms: candidate.interval_ms,
                    held: self.meshwise.held_at_levels(candidate, truth_ms),
                    naive_ms: candidate.naive_ms,
                    after_change,
                    t_s,
                });
            }
        }
        if !scored {
            return;
        }
        match decision.outcome(&relays, weighed, &self.halves) {
            Some(outcome) => {
                self.result.tune(weighed, &outcome);
                self.result.outcomes.push(outcome);
            }
            None => self.result.dropped += 1,
        }
    }

    /// Whether the next measurement of a direct link is a labelled change, or lies within an hour after
    /// one.
    fn is_after_change(&self, pair: Pair) -> bool {
        let Some((_, fresh)) = self.cursor.outcome(pair.0, pair.1) else { return false };
        let recent = |then: &f64| fresh.t_s - then <= AFTER_CHANGE_S;
        fresh.changepoint || self.changed_s.get(&pair).is_some_and(recent)
    }

    /// What is measured until the next round begins, and what everybody learns from it.
    fn measure(&mut self, round: usize) {
        let (t_s, until_s) = (self.world.rounds[round], self.world.rounds[round + 1]);
        let all = self.cursor.measurements(until_s);
        for probe in all.iter().filter(|probe| probe.changepoint) {
            self.changed_s.insert(probe.pair, probe.t_s);
        }
        let fair = self.prober.choose(&all, round, None, &mut self.random);
        for probe in &fair {
            self.known.measured(probe.pair.0, probe.pair.1, probe.ms);
        }
        let probes = match self.config.own_probes {
            true => {
                let budget = self.config.probes;
                let worth = budget.and_then(|_| self.meshwise.worth(t_s, until_s - t_s));
                self.own_prober.choose(&all, round, worth.as_deref(), &mut self.random)
            }
            false => fair,
        };
        self.learn(until_s);
        let mut rows: Vec<&Probe> = probes.iter().collect();
        let (picked, _) = rows.partial_shuffle(&mut self.random, LINK_ROWS_A_ROUND);
        for probe in picked {
            self.meshwise.link_row(probe.pair, probe.t_s, probe.ms);
        }
        for said in probes.chunk_by(|one, other| one.pair.0 == other.pair.0) {
            let measured: Vec<_> = said
                .iter()
                .map(|probe| {
                    let loss = self.losses.entry(probe.pair).or_insert(0.0);
                    *loss += LOSS_GAIN * (f64::from(probe.ms.is_none()) - *loss);
                    (probe.pair.1, probe.t_s, probe.ms, *loss)
                })
                .collect();
            self.meshwise.advertised(said[0].pair.0, &measured);
        }
        self.meshwise.resolve(round, until_s);
        self.live.resolve(until_s);
    }

    /// The simple policies hear what their choices cost, as far as it is known by now.
    fn learn(&mut self, until_s: f64) {
        let later = self.lessons.split_off(&key(until_s));
        let due = std::mem::replace(&mut self.lessons, later);
        for (policy, pair, relay, ms) in due.into_values().flatten() {
            self.policies[policy].learn(pair, relay, ms);
        }
    }

    fn finish(mut self) -> Result<Run, ReplayError> {
        let result = &mut self.result;
        (result.models_trained, result.models_promoted) = (self.life.trained, self.life.promoted);
        result.ranking = self.meshwise.ranking();
        result.weights = self.meshwise.weights();
        result.mixed = self.meshwise.mixed();
        result.champion = self.meshwise.champion().cloned();
        let wanted = self.config.out.is_some() && self.config.quantity == Quantity::Latency;
        if wanted && self.config.learning {
            let rows = self.meshwise.rows();
            let version = Some(format!("replay-{}-rows", result.seed));
            let train = TrainConfig { seed: result.seed, version, ..self.config.train.clone() };
            let now_us = rows.last().map_or(0, |row| row.done_us);
            match train_rows(&rows, &train, now_us) {
                Ok(model) => result.trained = Some(Trained { rows, model }),
                Err(LearnError::TooFewRows { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(self.result)
    }
}

impl Run {
    /// What every fixed rule would have paid in a decision all of whose candidates have an outcome.
    fn tune(&mut self, weighed: &Weighed, outcome: &Outcome) {
        if outcome.candidates_ms.len() < 2 {
            return;
        }
        let prospects: Vec<Prospect> = weighed.candidates.iter().map(|c| c.prospect).collect();
        let costs: Vec<f64> = outcome.candidates_ms.iter().map(|(_, cost)| *cost).collect();
        let direct = weighed.candidates.iter().position(|c| c.relay.is_none());
        self.rules.observe(&prospects, weighed.stay, direct, &costs);
        self.rules_beside_ms[0] += outcome.costs_ms[MESHWISE];
        self.rules_beside_ms[1] += outcome.direct_ms;
    }
}
