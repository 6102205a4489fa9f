//! meshwise's own decisions in a replay: the engine's histories, features, model, ranking and
//! interval, fed by the trace instead of a network.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use super::knowledge::Knowledge;
use super::policy::{Pair, Relay};
use super::world::{Quantity, TraceWorld};
use crate::engine::measure::{LinkHistories, LinkQuality, STATISTICS};
use crate::engine::predict::schema::{LINK_STATISTICS, MISSING};
use crate::engine::predict::{
    AdaptiveInterval, FeatureVector, ForestModel, LastValue, Level, Mix, MovingAverage, Prospect,
    QualityModel, Ranking, RankingTuner, route_features,
};
use crate::engine::types::{NodeId, Route, Timestamp};
use crate::learn::TrainRow;

/// Candidates of a decision beside the direct link, as the router's.
pub const CANDIDATES: usize = 8;
/// Rounds after which a decision is resolved with the outcomes that are known by then.
const RESOLVE_ROUNDS: usize = 16;
/// Newest training rows kept.
pub const ROWS_MAX: usize = 30_000;
/// Values of a pair after which its interval follows its own errors, not those of all.
const OWN_INTERVAL_AFTER: usize = 30;
/// The trace's zero, so that nothing happens before the epoch.
const EPOCH_S: f64 = 86_400.0;

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
    features: FeatureVector,
    /// What each expert of the mix said, ln(ms).
    experts: [Option<f64>; 4],
    /// The model's own offsets of the interval, ln.
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
}

/// The learned policy.
pub struct Meshwise {
    quantity: Quantity,
    ids: Vec<NodeId>,
    links: LinkHistories,
    /// Bounds of all links for the search of candidates; infinite when unknown.
    bounds: Vec<f64>,
    /// What was measured on each link: moments (s) and values (ms).
    seen: Vec<Vec<(f64, f64)>>,
    pending: VecDeque<Weighed>,
    rows: VecDeque<TrainRow>,
    champion: Option<Arc<ForestModel>>,
    mix: Mix,
    interval: AdaptiveInterval,
    intervals: BTreeMap<Pair, (AdaptiveInterval, usize)>,
    tuner: RankingTuner,
    ranking: Ranking,
}

fn timestamp(t_s: f64) -> Timestamp {
    Timestamp(((t_s + EPOCH_S) * 1e6) as u64)
}

impl Meshwise {
    /// Knows nothing yet.
    pub fn new(world: &TraceWorld, quantity: Quantity) -> Self {
        let nodes = world.nodes();
        Self {
            quantity,
            ids: world.ids.clone(),
            links: LinkHistories::default(),
            bounds: vec![f64::INFINITY; nodes * nodes],
            seen: vec![Vec::new(); nodes * nodes],
            pending: VecDeque::new(),
            rows: VecDeque::new(),
            champion: None,
            mix: Mix::default(),
            interval: AdaptiveInterval::new(0.9),
            intervals: BTreeMap::new(),
            tuner: RankingTuner::default(),
            ranking: Ranking::default(),
        }
    }

    /// The model in use.
    pub fn champion(&self) -> Option<&Arc<ForestModel>> {
        self.champion.as_ref()
    }

    /// Puts a model into use.
    pub fn promote(&mut self, model: Arc<ForestModel>) {
        self.champion = Some(model);
        self.mix = Mix::default();
    }

    /// The rule in use.
    pub fn ranking(&self) -> Ranking {
        self.ranking
    }

    /// Weights of the mix: model, moving average, last value, level.
    pub fn weights(&self) -> [f64; 4] {
        self.mix.weights()
    }

    /// The rows to train on, oldest first.
    pub fn rows(&self) -> Vec<TrainRow> {
        self.rows.iter().cloned().collect()
    }

    fn nodes(&self) -> usize {
        self.ids.len()
    }

    /// Before the decisions of a round: the rule that did best so far, and the bound of every
    /// link by it.
    pub fn begin_round(&mut self) {
        self.ranking = self.tuner.best();
        let nodes = self.nodes();
        for src in 0..nodes {
            for dst in (0..nodes).filter(|dst| *dst != src) {
                let of = |a: usize, b: usize| {
                    let link = self.links.link(self.ids[a], self.ids[b])?;
                    link.quality()?;
                    Some(self.ranking.bound_ms(&prospect(&link.statistics()?.values, None)))
                };
                let bound = of(src, dst).or_else(|| of(dst, src));
                self.bounds[src * nodes + dst] = bound.unwrap_or(f64::INFINITY);
            }
        }
    }

    /// Weighs the direct link and the most promising relays, and chooses. `None` when nothing is
    /// known of any route.
    pub fn decide(&self, pair: Pair, known: &Knowledge, round: usize, t_s: f64) -> Option<Weighed> {
        let nodes = self.nodes();
        let bound = |a: usize, b: usize| self.bounds[a * nodes + b];
        let cost = |relay| TraceWorld::route_cost(self.quantity, pair, relay, bound);
        let mut relays: Vec<(f64, usize)> = known
            .relays(pair)
            .map(|relay| (cost(Some(relay)), relay))
            .filter(|(ms, _)| ms.is_finite())
            .collect();
        if relays.len() > CANDIDATES {
            relays.select_nth_unstable_by(CANDIDATES - 1, |a, b| a.0.total_cmp(&b.0));
            relays.truncate(CANDIDATES);
        }
        relays.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        let direct = cost(None).is_finite() || relays.is_empty();
        let routes = direct.then_some(None).into_iter();
        let routes = routes.chain(relays.into_iter().map(|(_, relay)| Some(relay)));
        let candidates: Vec<Candidate> =
            routes.filter_map(|relay| self.weigh(pair, relay, known, t_s)).collect();
        let prospects: Vec<Prospect> = candidates.iter().map(|c| c.prospect).collect();
        let direct = candidates.iter().position(|candidate| candidate.relay.is_none());
        let chosen = self.ranking.choose(&prospects, direct)?;
        Some(Weighed { t_s, round, pair, candidates, chosen })
    }

    fn features(&self, pair: Pair, relay: Relay, t_s: f64) -> Option<FeatureVector> {
        let ends = [Some(pair.0), relay, Some(pair.1)];
        let route = Route::new(ends.into_iter().flatten().map(|n| self.ids[n]).collect::<Vec<_>>());
        Some(route_features(&route.ok()?, &self.links, None, timestamp(t_s)))
    }

    fn weigh(&self, pair: Pair, relay: Relay, known: &Knowledge, t_s: f64) -> Option<Candidate> {
        let features = self.features(pair, relay, t_s)?;
        let (naive_ms, level_ms, model) = match self.quantity {
            Quantity::Latency => {
                let of = |baseline: &dyn QualityModel| baseline.predict(&features);
                let model = self.champion.as_ref().and_then(|model| model.predict(&features));
                let naive = [of(&LastValue)?.latency_ms, of(&MovingAverage)?.latency_ms];
                (naive, of(&Level)?.latency_ms, model)
            }
            Quantity::Throughput => {
                let last = known.route(pair, relay, |n| n.last);
                let average = known.route(pair, relay, |n| n.average);
                if !last.is_finite() {
                    return None;
                }
                let head = self.champion.as_ref().and_then(|model| model.throughput.as_ref());
                let model = head.and_then(|head| {
                    let ln = head.ln(&features)?;
                    let scale = head.scale(&features);
                    // Bytes a second to milliseconds a megabit: the logarithm turns its sign.
                    let ms = (TO_MS_PER_MEGABIT - ln).exp();
                    let mut prediction = crate::engine::predict::Prediction::of_latency(ms);
                    prediction.scale = Some(scale);
                    prediction.interval_ms = Some((
                        ms * (-head.interval.high * scale).exp(),
                        ms * (-head.interval.low * scale).exp(),
                    ));
                    Some(prediction)
                });
                ([last, average], known.route(pair, relay, |n| n.mean()), model)
            }
        };
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
            .unwrap_or((-0.2, 0.2));
        let own = self.intervals.get(&pair).filter(|(_, seen)| *seen >= OWN_INTERVAL_AFTER);
        let interval = own.map_or(&self.interval, |(interval, _)| interval);
        let (low, high) = interval.apply(forecast_ms.ln(), offsets.0, offsets.1);
        let statistics: Option<&[f64; STATISTICS.len()]> =
            features[LINK_STATISTICS..][..STATISTICS.len()].try_into().ok();
        let mut prospect = match statistics.filter(|values| values[0] != MISSING) {
            Some(values) if self.quantity == Quantity::Latency => {
                prospect(values, model.and_then(|m| m.scale).map(|scale| (forecast_ms, scale)))
            }
            _ => {
                let spread = known.route(pair, relay, |n| n.standard_error());
                Prospect { centre_ms: [forecast_ms, level_ms, naive_ms[1]], spread_ms: [spread; 3] }
            }
        };
        prospect.centre_ms[0] = forecast_ms;
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

    /// What the chosen route then cost: the mix and the interval learn from it.
    pub fn delivered(&mut self, weighed: &Weighed, index: usize, ms: f64) {
        let candidate = &weighed.candidates[index];
        let (truth, forecast) = (ms.max(1e-3).ln(), candidate.forecast_ms.ln());
        let (low, high) = candidate.offsets;
        self.mix.observe(truth, candidate.experts);
        self.interval.observe(truth, forecast, low, high);
        let shared = &self.interval;
        let own = self.intervals.entry(weighed.pair).or_insert_with(|| (shared.clone(), 0));
        own.0.observe(truth, forecast, low, high);
        own.1 += 1;
    }

    /// A training row for a link that is about to be measured.
    pub fn link_row(&mut self, (src, dst): Pair, t_s: f64, ms: Option<f64>) {
        let Some(features) = self.features((src, dst), None, t_s) else { return };
        if MovingAverage.predict(&features).is_some() {
            self.push_row(features, t_s, t_s, ms);
        }
    }

    fn push_row(&mut self, features: FeatureVector, sent_s: f64, done_s: f64, ms: Option<f64>) {
        if self.rows.len() == ROWS_MAX {
            self.rows.pop_front();
        }
        let (rtt_ms, bandwidth) = match self.quantity {
            Quantity::Latency => (ms, None),
            Quantity::Throughput => {
                (ms.map(|_| 1.0), ms.map(|ms| (TO_MS_PER_MEGABIT - ms.ln()).exp()))
            }
        };
        let (sent_us, done_us) = (timestamp(sent_s).0, timestamp(done_s).0 + 1);
        self.rows.push_back(TrainRow { sent_us, done_us, rtt_ms, bandwidth, features });
    }

    /// The measurements of one node in a round, as its advertisement spreads them.
    pub fn advertised(&mut self, src: usize, measured: &[(usize, f64, Option<f64>, f64)]) {
        let Some(at) = measured.iter().map(|(_, t_s, ..)| *t_s).reduce(f64::max) else { return };
        let nodes = self.nodes();
        let mut changes = Vec::new();
        for &(dst, t_s, ms, loss) in measured {
            let known = self.links.link(self.ids[src], self.ids[dst]).and_then(|l| l.quality());
            let (rtt_ms, jitter_ms) = match (ms, known) {
                (Some(ms), known) => {
                    self.seen[src * nodes + dst].push((t_s, ms));
                    (ms, known.map_or(0.0, |known| (ms - known.rtt_ms).abs()))
                }
                (None, Some(known)) => (known.rtt_ms, known.jitter_ms),
                (None, None) => continue,
            };
            let bandwidth = (self.quantity == Quantity::Throughput)
                .then(|| (TO_MS_PER_MEGABIT - rtt_ms.ln()).exp());
            let quality = LinkQuality { rtt_ms, jitter_ms, loss, bandwidth, utilisation: 0.0 };
            changes.push((self.ids[dst], Some(quality)));
        }
        self.links.advertised(self.ids[src], timestamp(at), changes);
    }

    /// Keeps a decision until the outcomes of its candidates are known.
    pub fn keep(&mut self, weighed: Weighed) {
        self.pending.push_back(weighed);
    }

    /// After a round's measurements: decisions whose outcomes are known by now tune the ranking
    /// and become training rows.
    pub fn resolve(&mut self, round: usize, now_s: f64) {
        for _ in 0..self.pending.len() {
            let Some(weighed) = self.pending.pop_front() else { return };
            let outcomes: Vec<Option<f64>> = weighed
                .candidates
                .iter()
                .map(|candidate| self.outcome(weighed.pair, candidate.relay, weighed.t_s))
                .collect();
            let all = outcomes.iter().all(Option::is_some);
            if !all && round < weighed.round + RESOLVE_ROUNDS {
                self.pending.push_back(weighed);
                continue;
            }
            let known = weighed.candidates.iter().zip(&outcomes);
            let known: Vec<_> = known.filter_map(|(c, ms)| Some((c, (*ms)?))).collect();
            let prospects: Vec<Prospect> = known.iter().map(|(c, _)| c.prospect).collect();
            let costs: Vec<f64> = known.iter().map(|(_, ms)| *ms).collect();
            let direct = known.iter().position(|(c, _)| c.relay.is_none());
            if direct.is_some() || weighed.candidates[0].relay.is_some() {
                self.tuner.observe(&prospects, direct, &costs);
            }
            let over_relays: Vec<(FeatureVector, f64)> = known
                .iter()
                .filter(|(c, _)| c.relay.is_some())
                .map(|(c, ms)| (c.features, *ms))
                .collect();
            // One relay route a decision: eight of one pair say nearly the same.
            let pick =
                weighed.round.wrapping_mul(31).wrapping_add(weighed.pair.0 * 7 + weighed.pair.1);
            if let Some((features, ms)) = over_relays.get(pick % over_relays.len().max(1)) {
                self.push_row(*features, weighed.t_s, now_s, Some(*ms));
            }
        }
    }

    /// What a route cost by the first measurements of its hops at or after a moment, as far as
    /// they were made.
    fn outcome(&self, pair: Pair, relay: Relay, t_s: f64) -> Option<f64> {
        let nodes = self.nodes();
        let ms = TraceWorld::route_cost(self.quantity, pair, relay, |a, b| {
            let seen = &self.seen[a * nodes + b];
            let at = seen.partition_point(|(then, _)| *then < t_s);
            // A link that is measured once for all, like a formality, is a constant.
            let constant = (seen.len() == 1).then(|| seen[0]);
            seen.get(at).copied().or(constant).map_or(f64::INFINITY, |(_, ms)| ms)
        });
        ms.is_finite().then_some(ms)
    }
}

/// ln of (bytes a second times milliseconds a megabit): 125,000 bytes are a megabit, 1,000 ms a
/// second.
const TO_MS_PER_MEGABIT: f64 = 18.643_824_295_266_69;

/// Forecast, level and mean with their spreads, from the statistics of a route's links.
fn prospect(values: &[f64; STATISTICS.len()], forecast: Option<(f64, f64)>) -> Prospect {
    let [last, _, _, mean60, median3, ..] = *values;
    let named = |offset: usize| values[offset];
    let level = (median3 + named(MEDIAN_5)) / 2.0;
    let (deviation5, deviation60) = (named(DEVIATION_5), named(DEVIATION_60));
    let spread = (deviation5 + deviation60) / 2.0;
    let (ms, own) =
        forecast.map_or((level.max(last.min(level)), spread), |(ms, scale)| (ms, ms * scale));
    Prospect { centre_ms: [ms, level, mean60], spread_ms: [own, spread, deviation60] }
}

/// Positions among the [`STATISTICS`].
const MEDIAN_5: usize = 7;
const DEVIATION_5: usize = 18;
const DEVIATION_60: usize = 19;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_statistics_are_where_they_are_looked_for() {
        for (index, name) in [
            (0, "last"),
            (3, "mean60"),
            (4, "median3"),
            (MEDIAN_5, "median_5"),
            (DEVIATION_5, "deviation5"),
            (DEVIATION_60, "deviation60"),
        ] {
            assert_eq!(STATISTICS[index], name);
        }
        assert!((TO_MS_PER_MEGABIT - 125_000_000.0_f64.ln()).abs() < 1e-9);
    }
}
