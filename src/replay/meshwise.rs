//! meshwise's own decisions in a replay: the engine's histories, features, model, ranking and
//! interval, fed by the trace instead of a network.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use super::estimates::{Estimates, Seen};
use super::knowledge::{Knowledge, Numbers};
use super::policy::{Pair, Relay};
use super::world::{Quantity, TraceWorld};
use crate::engine::measure::worth::{volatility_of_all, worth};
use crate::engine::measure::{LinkHistories, LinkQuality};
use crate::engine::predict::{
    AdaptiveInterval, FeatureVector, Foresight, ForestModel, Head, Mix, MovingAverage, Prediction,
    Prospect, QualityModel, Ranking, RankingTuner, Surprise, route_features, spanning,
};
use crate::engine::types::{NodeId, Route, Timestamp};
use crate::learn::{RouteKey, TrainRow};

/// Candidates of a decision beside the direct link, as the router's.
pub const CANDIDATES: usize = 8;
/// Rounds after which a decision is resolved with the outcomes that are known by then.
const RESOLVE_ROUNDS: usize = 1_024;
/// Smallest half width of an interval before it is adapted (ln).
const OFFSET_MIN: f64 = 0.003;
/// Newest training rows kept.
pub const ROWS_MAX: usize = 30_000;
/// Values of a pair after which its interval follows its own errors, not those of all.
const OWN_INTERVAL_AFTER: usize = 30;
/// The trace's zero, so that nothing happens before the epoch.
pub const EPOCH_S: f64 = 86_400.0;
/// Share of truths that the intervals are to hold.
const STATED: f64 = 0.9;
/// Shares at which intervals are checked, the stated one among them.
pub const LEVELS: [f64; 10] = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, STATED, 0.95];

/// One candidate as it was weighed.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// Over which relay.
    pub relay: Relay,
    /// What the rules compare.
    pub prospect: Prospect,
    /// The forecast (ms).
    pub forecast_ms: f64,
    /// The 90 % interval (ms).
    pub interval_ms: (f64, f64),
    /// The naive forecasts (ms): last value, moving average.
    pub naive_ms: [f64; 2],
    pub(super) features: FeatureVector,
    /// What each expert of the mix said, ln(ms).
    experts: [Option<f64>; 4],
    /// The model's own offsets of the interval, ln.
    offsets: (f64, f64),
}

/// What was forecast of one route, until its outcome is known.
#[derive(Clone, Copy, Debug)]
struct Expected {
    pair: Pair,
    truth_ms: f64,
    forecast_ms: f64,
    experts: [Option<f64>; 4],
    offsets: (f64, f64),
}

/// A decision whose outcomes are still to come.
pub struct Weighed {
    /// Moment (s).
    pub t_s: f64,
    /// Round.
    pub round: usize,
    /// Who asked.
    pub pair: Pair,
    /// The candidates; the direct link first where there is one.
    pub candidates: Vec<Candidate>,
    /// Index of the chosen one.
    pub chosen: usize,
    /// Index of the route that another one had to beat.
    pub stay: Option<usize>,
}

/// What the online mix did and promised, summed over forecasts.
#[derive(Clone, Copy, Debug, Default)]
pub struct Mixed {
    /// Forecasts whose outcome became known.
    pub forecasts: f64,
    /// By how much the loss of the mix may exceed that of the moving average ([`Mix::slack`]), ln(ms).
    pub slack_ln: f64,
    /// By how much it did, ln(ms); below 0, it was better.
    pub excess_ln: f64,
}

/// The learned policy.
pub struct Meshwise {
    quantity: Quantity,
    ids: Vec<NodeId>,
    links: LinkHistories,
    /// What is advertised of each directed link now, row by row.
    qualities: Vec<Option<LinkQuality>>,
    seen: Seen,
    estimates: Estimates,
    known: Knowledge,
    /// Forecasts by the moment in which their outcome is known.
    expected: BTreeMap<Timestamp, Vec<Expected>>,
    /// Decisions without all outcomes, by the round in which to look again.
    pending: BTreeMap<usize, Vec<Weighed>>,
    rows: VecDeque<TrainRow>,
    champion: Option<Arc<ForestModel>>,
    mix: Mix,
    mixed: Mixed,
    interval: AdaptiveInterval,
    /// One for each of [`LEVELS`].
    levels: [AdaptiveInterval; LEVELS.len()],
    intervals: BTreeMap<Pair, (AdaptiveInterval, usize)>,
    surprises: BTreeMap<Pair, Surprise>,
    tuner: RankingTuner,
    ranking: Ranking,
    foresight: Foresight,
    /// By how much links change from value to value (mean absolute ln ratio).
    volatility: f64,
    /// The relay in use by each pair that has no direct link.
    current: BTreeMap<Pair, Relay>,
}

/// A moment of the trace (s) on the engine's clock.
pub(super) fn timestamp(t_s: f64) -> Timestamp {
    Timestamp(((t_s + EPOCH_S) * 1e6) as u64)
}

impl Meshwise {
    /// Knows nothing yet. `fresher`: of a link's two directions the simple statistics follow the
    /// one that was measured last.
    pub fn new(world: &TraceWorld, quantity: Quantity, fresher: bool) -> Self {
        let nodes = world.nodes();
        let once = world.links.iter().filter(|(_, link)| link.samples.len() == 1);
        let constants = once.map(|(pair, _)| *pair).collect();
        Self {
            quantity,
            ids: world.ids.clone(),
            links: LinkHistories::default(),
            qualities: vec![None; nodes * nodes],
            estimates: Estimates::new(&Seen::new(nodes, BTreeSet::new()), quantity, 0.0),
            seen: Seen::new(nodes, constants),
            known: Knowledge::new(nodes, quantity, fresher, world.links.keys().copied()),
            expected: BTreeMap::new(),
            pending: BTreeMap::new(),
            rows: VecDeque::new(),
            champion: None,
            mix: Mix::default(),
            mixed: Mixed::default(),
            interval: AdaptiveInterval::new(STATED),
            levels: LEVELS.map(AdaptiveInterval::new),
            intervals: BTreeMap::new(),
            surprises: BTreeMap::new(),
            tuner: RankingTuner::default(),
            ranking: Ranking::default(),
            foresight: Foresight::default(),
            volatility: 0.0,
            current: BTreeMap::new(),
        }
    }

    /// The id of a node.
    pub fn id(&self, node: usize) -> NodeId {
        self.ids[node]
    }

    /// The model in use.
    pub fn champion(&self) -> Option<&Arc<ForestModel>> {
        self.champion.as_ref()
    }

    /// Puts a model into use.
    pub fn promote(&mut self, model: Arc<ForestModel>) {
        self.champion = Some(model);
        self.foresight = Foresight::default();
        self.mixed.slack_ln += self.mix.slack();
        self.mix = Mix::default();
    }

    /// What the mix did and promised so far.
    pub fn mixed(&self) -> Mixed {
        Mixed { slack_ln: self.mixed.slack_ln + self.mix.slack(), ..self.mixed }
    }

    /// What is advertised of a link, by its own direction or else the other one.
    pub(super) fn link_quality(&self, src: usize, dst: usize) -> Option<&LinkQuality> {
        let of = |a: usize, b: usize| self.qualities[a * self.ids.len() + b].as_ref();
        of(src, dst).or_else(|| of(dst, src))
    }

    /// What a node knows of a route before it learned a rule of its own: the rule to begin with, and
    /// what it compares by the links alone. A node's silent links are withdrawn, not stale.
    pub(super) fn first_rule(&self) -> Ranking {
        Ranking::of_volatility(self.volatility)
    }

    /// See [`Meshwise::first_rule`].
    pub(super) fn prospect(&self, pair: Pair, relay: Relay) -> Option<Prospect> {
        let prospect = self.estimates.route(self.quantity, pair, relay)?;
        Some(Prospect { stale_ms: 0.0, ..prospect })
    }

    /// Every relay that a pair could use.
    pub(super) fn relays(&self, pair: Pair) -> impl Iterator<Item = usize> + '_ {
        self.known.relays(pair)
    }

    /// The features of a route at a decision.
    pub(super) fn features_of(&self, weighed: &Weighed, relay: Relay) -> Option<FeatureVector> {
        let known = weighed.candidates.iter().find(|candidate| candidate.relay == relay);
        let known = known.map(|candidate| candidate.features);
        known.or_else(|| self.features(weighed.pair, relay, weighed.t_s))
    }

    /// The route of the lowest sum of last values, by what meshwise measured.
    pub(super) fn quickest(&self, pair: Pair) -> Relay {
        self.known.best(pair, self.known.relays(pair), |n| n.last).0
    }

    /// Whether the interval at each of [`LEVELS`] around a candidate's forecast holds a truth (ms).
    pub(super) fn held_at_levels(&self, of: &Candidate, truth_ms: f64) -> [bool; LEVELS.len()] {
        let (truth, (low, high)) = (truth_ms.max(1e-3).ln(), of.offsets);
        std::array::from_fn(|at| {
            if LEVELS[at] == STATED {
                return of.interval_ms.0 <= truth_ms && truth_ms <= of.interval_ms.1;
            }
            let (bottom, top) = self.levels[at].apply(of.forecast_ms.ln(), low, high);
            bottom <= truth && truth <= top
        })
    }

    /// The rule in use.
    pub fn ranking(&self) -> Ranking {
        self.ranking
    }

    /// Weights of the mix: model, moving average, last value, level.
    pub fn weights(&self) -> [f64; 4] {
        self.mix.weights()
    }

    /// The rows to train on, in order of time.
    pub fn rows(&self) -> Vec<TrainRow> {
        let mut rows: Vec<TrainRow> = self.rows.iter().copied().collect();
        rows.sort_by_key(|row| (row.sent_us, row.done_us));
        rows
    }

    /// Before the decisions of a round: the rule that did best so far, and what is known of
    /// every link.
    pub fn begin_round(&mut self, now_s: f64) {
        self.volatility = volatility_of_all(&self.seen.known(now_s, 1.0));
        self.tuner.set_fallback(Ranking::of_volatility(self.volatility));
        self.ranking = self.tuner.best();
        self.estimates = Estimates::new(&self.seen, self.quantity, now_s);
    }

    /// How much a measurement between each two nodes is worth, row by row; `None`: all alike.
    pub fn worth(&self, now_s: f64, round_s: f64) -> Option<Vec<f64>> {
        worth(self.ids.len(), &self.seen.known(now_s, round_s))
    }

    /// Weighs the direct link and the most promising relays, and chooses. `None` when nothing is
    /// known of any route.
    pub fn decide(&self, pair: Pair, round: usize, t_s: f64) -> Option<Weighed> {
        let bound = |relay| {
            let prospect = self.estimates.route(self.quantity, pair, relay)?;
            Some(self.ranking.bound_ms(&prospect))
        };
        let relays = self.known.relays(pair);
        let mut relays: Vec<(f64, usize)> =
            relays.filter_map(|relay| Some((bound(Some(relay))?, relay))).collect();
        if relays.len() > CANDIDATES {
            relays.select_nth_unstable_by(CANDIDATES - 1, |a, b| a.0.total_cmp(&b.0));
            relays.truncate(CANDIDATES);
        }
        relays.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        let direct = bound(None).is_some();
        let routes = direct.then_some(None).into_iter();
        let routes = routes.chain(relays.into_iter().map(|(_, relay)| Some(relay)));
        let candidates: Vec<Candidate> =
            routes.filter_map(|relay| self.weigh(pair, relay, t_s)).collect();
        let prospects: Vec<Prospect> = candidates.iter().map(|c| c.prospect).collect();
        let stay = self.stay(pair, candidates.iter().map(|candidate| candidate.relay));
        let chosen = self.ranking.choose(&prospects, stay)?;
        Some(Weighed { t_s, round, pair, candidates, chosen, stay })
    }

    /// The route that another one must beat by the margin: the direct link, or where there is
    /// none the relay in use.
    fn stay(&self, pair: Pair, mut relays: impl Iterator<Item = Relay>) -> Option<usize> {
        let current = self.current.get(&pair).copied();
        relays.position(|relay| relay.is_none() || Some(relay) == current)
    }

    fn route(&self, pair: Pair, relay: Relay) -> Option<Route> {
        let nodes = [Some(pair.0), relay, Some(pair.1)];
        Route::new(nodes.into_iter().flatten().map(|n| self.ids[n]).collect::<Vec<_>>()).ok()
    }

    fn features(&self, pair: Pair, relay: Relay, t_s: f64) -> Option<FeatureVector> {
        Some(route_features(&self.route(pair, relay)?, &self.links, None, timestamp(t_s)))
    }

    fn weigh(&self, pair: Pair, relay: Relay, t_s: f64) -> Option<Candidate> {
        let features = self.features(pair, relay, t_s)?;
        let mut prospect = self.estimates.route(self.quantity, pair, relay)?;
        let level_ms = prospect.centre_ms[1];
        let champion = self.champion.as_ref();
        let model = match self.quantity {
            Quantity::Latency => champion.and_then(|model| model.predict(&features)),
            Quantity::Throughput => {
                let head = champion.and_then(|model| model.throughput.as_ref());
                head.and_then(|head| of_throughput(head, &features))
            }
        };
        // A link that nobody measured has only the level.
        let naive = |of: fn(&Numbers) -> f64| {
            let ms = self.known.route(pair, relay, of);
            if ms.is_finite() { ms } else { level_ms }
        };
        let naive_ms = [naive(|n| n.last), naive(|n| n.average)];
        let ln = |ms: f64| Some(ms.max(1e-3).ln());
        let experts = [
            model.and_then(|prediction| ln(prediction.latency_ms)),
            ln(naive_ms[1]),
            ln(naive_ms[0]),
            ln(level_ms),
        ];
        let forecast_ms = self.mix.combine(experts)?.exp();
        let around = |(low, high): (f64, f64), ms: f64| ((low / ms).ln(), (high / ms).ln());
        let offsets = model
            .and_then(|prediction| Some(around(prediction.interval_ms?, prediction.latency_ms)))
            .unwrap_or_else(|| {
                let local = OFFSET_MIN + prospect.spread_ms[1] / level_ms.max(1e-3);
                (-local, local)
            });
        let surprise = self.surprises.get(&pair).copied().unwrap_or_default();
        let offsets = surprise.widen(spanning(offsets, forecast_ms.ln(), &experts));
        let own = self.intervals.get(&pair).filter(|(_, seen)| *seen >= OWN_INTERVAL_AFTER);
        let interval = own.map_or(&self.interval, |(interval, _)| interval);
        let (low, high) = interval.apply(forecast_ms.ln(), offsets.0, offsets.1);
        if let Some(scale) = model.and_then(|prediction| prediction.scale) {
            prospect.spread_ms[0] = forecast_ms * scale;
        }
        prospect.centre_ms[0] = forecast_ms;
        prospect.foresight = model.is_some().then(|| self.foresight.weight());
        let interval_ms = (low.exp(), high.exp());
        Some(Candidate {
            relay,
            prospect,
            forecast_ms,
            interval_ms,
            naive_ms,
            features,
            experts,
            offsets,
        })
    }

    /// What a route will turn out to cost, and when that will be known: mix and interval learn
    /// from it then.
    pub fn expect(&mut self, weighed: &Weighed, index: usize, truth_ms: f64, known_at_s: f64) {
        let candidate = &weighed.candidates[index];
        let expected = Expected {
            pair: weighed.pair,
            truth_ms,
            forecast_ms: candidate.forecast_ms,
            experts: candidate.experts,
            offsets: candidate.offsets,
        };
        self.expected.entry(timestamp(known_at_s)).or_default().push(expected);
    }

    fn delivered(&mut self, expected: &Expected) {
        let (truth, forecast) = (expected.truth_ms.max(1e-3).ln(), expected.forecast_ms.ln());
        let (low, high) = expected.offsets;
        if let Some(average) = expected.experts[1] {
            self.mixed.forecasts += 1.0;
            self.mixed.excess_ln += (truth - forecast).abs() - (truth - average).abs();
        }
        self.mix.observe(truth, expected.experts);
        self.surprises.entry(expected.pair).or_default().observe(truth - forecast, low, high);
        self.interval.observe(truth, forecast, low, high);
        self.levels.iter_mut().for_each(|level| level.observe(truth, forecast, low, high));
        let shared = &self.interval;
        let own = self.intervals.entry(expected.pair).or_insert_with(|| (*shared, 0));
        own.0.observe(truth, forecast, low, high);
        own.1 += 1;
    }

    /// A training row for a link that is about to be measured.
    pub fn link_row(&mut self, (src, dst): Pair, t_s: f64, ms: Option<f64>) {
        let Some(features) = self.features((src, dst), None, t_s) else { return };
        if MovingAverage.predict(&features).is_some() {
            self.push_row((src, dst), None, features, (t_s, t_s), ms);
        }
    }

    fn push_row(
        &mut self,
        pair: Pair,
        relay: Relay,
        features: FeatureVector,
        (sent_s, done_s): (f64, f64),
        ms: Option<f64>,
    ) {
        let Some(route) = self.route(pair, relay) else { return };
        if self.rows.len() == ROWS_MAX {
            self.rows.pop_front();
        }
        let (rtt_ms, bandwidth) = match self.quantity {
            Quantity::Latency => (ms, None),
            Quantity::Throughput => (ms.map(|_| 1.0), ms.map(ms_of_bandwidth)),
        };
        let (mut sent_us, mut done_us) = (timestamp(sent_s).0, timestamp(done_s).0 + 1);
        if self.quantity == Quantity::Throughput {
            // Dates are all the time there is, days apart: rows of one date are told apart by their
            // order, so that they can be split.
            sent_us += 2 * self.rows.len() as u64;
            done_us = sent_us + 1;
        }
        let key = RouteKey::of(&route.to_string());
        self.rows.push_back(TrainRow { key, sent_us, done_us, rtt_ms, bandwidth, features });
    }

    /// The measurements of one node in a round, as its advertisement spreads them.
    pub fn advertised(&mut self, src: usize, measured: &[(usize, f64, Option<f64>, f64)]) {
        let Some(at) = measured.iter().map(|(_, t_s, ..)| *t_s).reduce(f64::max) else { return };
        let mut changes = Vec::new();
        for &(dst, t_s, ms, loss) in measured {
            self.known.measured(src, dst, ms);
            let known = self.links.link(self.ids[src], self.ids[dst]).and_then(|l| l.quality());
            let (rtt_ms, jitter_ms) = match (ms, known) {
                (Some(ms), known) => {
                    self.seen.push(src, dst, t_s, ms);
                    (ms, known.map_or(0.0, |known| (ms - known.rtt_ms).abs()))
                }
                (None, Some(known)) => (known.rtt_ms, known.jitter_ms),
                (None, None) => continue,
            };
            let bandwidth =
                (self.quantity == Quantity::Throughput).then(|| ms_of_bandwidth(rtt_ms));
            let quality = LinkQuality { rtt_ms, jitter_ms, loss, bandwidth, utilisation: 0.0 };
            self.qualities[src * self.ids.len() + dst] = Some(quality);
            changes.push((self.ids[dst], Some(quality)));
        }
        self.links.advertised(self.ids[src], timestamp(at), changes);
    }

    /// Keeps a decision until the outcomes of its candidates are known.
    pub fn keep(&mut self, weighed: Weighed) {
        if weighed.candidates[0].relay.is_some() {
            self.current.insert(weighed.pair, weighed.candidates[weighed.chosen].relay);
        }
        self.pending.entry(weighed.round).or_default().push(weighed);
    }

    /// After a round's measurements: decisions whose outcomes are known by now tune the ranking
    /// and become training rows.
    pub fn resolve(&mut self, round: usize, now_s: f64) {
        let later = self.expected.split_off(&timestamp(now_s));
        let known = std::mem::replace(&mut self.expected, later);
        known.values().flatten().for_each(|expected| self.delivered(expected));
        let later = self.pending.split_off(&(round + 1));
        let due = std::mem::replace(&mut self.pending, later);
        for weighed in due.into_values().flatten() {
            let outcomes: Vec<Option<f64>> = weighed
                .candidates
                .iter()
                .map(|candidate| self.outcome(weighed.pair, candidate.relay, weighed.t_s))
                .collect();
            let age = round - weighed.round;
            if outcomes.iter().any(Option::is_none) && age < RESOLVE_ROUNDS {
                // Ever rarer: what is silent for long stays silent for long.
                self.pending.entry(round + age.max(1)).or_default().push(weighed);
                continue;
            }
            let stay_on = weighed.stay.map(|at| weighed.candidates[at].relay);
            let known = weighed.candidates.iter().zip(&outcomes);
            let known: Vec<_> = known.filter_map(|(c, ms)| Some((c, (*ms)?))).collect();
            let prospects: Vec<Prospect> = known.iter().map(|(c, _)| c.prospect).collect();
            let costs: Vec<f64> = known.iter().map(|(_, ms)| *ms).collect();
            prospects.iter().zip(&costs).for_each(|(p, ms)| self.foresight.observe(p, *ms));
            // As it was at the decision; where that route's outcome is not known, nothing is said.
            let stay = stay_on.map(|relay| known.iter().position(|(c, _)| c.relay == relay));
            let direct = known.iter().position(|(c, _)| c.relay.is_none());
            match stay {
                Some(None) => {}
                Some(at) => self.tuner.observe(&prospects, at, direct, &costs),
                None => self.tuner.observe(&prospects, None, direct, &costs),
            }
            let over_relays: Vec<(Relay, FeatureVector, f64)> = known
                .iter()
                .filter(|(c, _)| c.relay.is_some())
                .map(|(c, ms)| (c.relay, c.features, *ms))
                .collect();
            // One relay route a decision: eight of one pair say nearly the same.
            let pick =
                weighed.round.wrapping_mul(31).wrapping_add(weighed.pair.0 * 7 + weighed.pair.1);
            if let Some((relay, features, ms)) = over_relays.get(pick % over_relays.len().max(1)) {
                let (relay, features, ms) = (*relay, *features, Some(*ms));
                self.push_row(weighed.pair, relay, features, (weighed.t_s, now_s), ms);
            }
        }
        self.tuner.end_round();
    }

    /// What a route cost by the first measurements of its hops at or after a moment, as far as
    /// they were made.
    fn outcome(&self, pair: Pair, relay: Relay, t_s: f64) -> Option<f64> {
        let ms = TraceWorld::route_cost(self.quantity, pair, relay, |a, b| {
            self.seen.from(a, b, t_s).unwrap_or(f64::INFINITY)
        });
        ms.is_finite().then_some(ms)
    }
}

/// ln of (bytes a second times milliseconds a megabit): 125,000 bytes are a megabit, 1,000 ms a
/// second.
const TO_MS_PER_MEGABIT: f64 = 18.643_824_295_266_69;

/// The time (ms) that a megabit takes at so many bytes a second, and the other way round.
pub(super) fn ms_of_bandwidth(bandwidth: f64) -> f64 {
    (TO_MS_PER_MEGABIT - bandwidth.ln()).exp()
}

/// A forecast of throughput as the time that a megabit takes: the logarithm turns its sign.
pub(super) fn of_throughput(head: &Head, features: &FeatureVector) -> Option<Prediction> {
    let ms = (TO_MS_PER_MEGABIT - head.ln(features)?).exp();
    let scale = head.scale(features);
    let at = |offset: f64| ms * (-offset * scale).exp();
    Some(Prediction {
        interval_ms: Some((at(head.interval.high), at(head.interval.low))),
        scale: Some(scale),
        ..Prediction::of_latency(ms)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_megabit_at_a_megabit_a_second_takes_a_second() {
        assert!((TO_MS_PER_MEGABIT - 125_000_000.0_f64.ln()).abs() < 1e-9);
        assert!(((TO_MS_PER_MEGABIT - 125_000.0_f64.ln()).exp() - 1_000.0).abs() < 1e-6);
    }
}
