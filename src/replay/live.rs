//! The rule that a node runs, beside the one that the replay tunes: the live predictor, the live score
//! and the live damping on the same candidates' numbers.
//!
//! Each source has a [`RoutePredictor`] of its own, as each node has: champion and baselines mixed by
//! what this source saw, its interval, and the watch that drops a champion which does worse than the moving
//! average. A decision weighs the routes of least advertised cost (as many as the router's k shortest
//! paths, with at most one relay), the direct link and the route in use by the rule that a node begins with,
//! scores them for an objective ([`route_score`]), and leaves the route in use as
//! [`SwitchingPolicy`](crate::engine::route::SwitchingPolicy) has it. It knows what meshwise knows: the same measurements, advertisements
//! and model.
//!
//! What a node has and this has not: a rule learned from its own choices, histories of whole routes from probing them, the warm backup, and
//! what receipts say of relays. Traces hold links only.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::meshwise::{Meshwise, Weighed, ms_of_bandwidth, of_throughput, timestamp};
use super::policy::{Pair, Relay};
use super::world::Quantity;
use crate::engine::measure::LinkQuality;
use crate::engine::overlay::Objective;
use crate::engine::predict::{
    FeatureVector, Forecast, ForestModel, Prediction, Prospect, QualityModel, RoutePredictor,
};
use crate::engine::route::graph::link_cost_ms;
use crate::engine::route::score::{RouteQuality, route_score};
use crate::engine::route::switching::Current;
use crate::engine::route::{PathPolicy, ScoreWeights};
use crate::engine::types::Timestamp;

/// What the two rules of a decision chose: for what is replayed, and balanced as a node does when nothing
/// is said.
pub type Chosen = [Relay; 2];

/// One objective's routes in use.
struct Rule {
    weights: ScoreWeights,
    in_use: BTreeMap<Pair, (Relay, Timestamp)>,
}

/// The live rule of every node.
pub struct Live {
    quantity: Quantity,
    policy: PathPolicy,
    predictors: Vec<RoutePredictor>,
    rules: [Rule; 2],
    /// Whether a source sees what the direct link does although it takes another route.
    sees_direct: bool,
    /// When the newest forecast was made: each at a moment of its own, as the predictors tell them apart.
    stamp: Timestamp,
    /// Outcomes by the moment in which they are known: source, when it was sent, round trip (ms), and what
    /// the route was compared by.
    due: BTreeMap<Timestamp, Vec<(usize, Timestamp, f64, Prospect)>>,
}

/// One route as it was weighed.
struct Route {
    relay: Relay,
    links: Vec<LinkQuality>,
    features: FeatureVector,
    forecast: Forecast,
    prospect: Prospect,
    /// What it is compared by (ms).
    bound_ms: f64,
}

impl Live {
    /// Without models, and with nothing in use. `sees_direct`: whether a source sees what the direct link
    /// does although it takes another route, as when everything is measured.
    pub fn new(nodes: usize, quantity: Quantity, sees_direct: bool) -> Self {
        let policy = PathPolicy::default();
        let own = match quantity {
            Quantity::Latency => Objective::Latency,
            Quantity::Throughput => Objective::Throughput,
        };
        let rule =
            |objective| Rule { weights: policy.weights_for(objective), in_use: BTreeMap::new() };
        Self {
            quantity,
            policy,
            predictors: vec![RoutePredictor::new(true); nodes],
            rules: [own, Objective::Balanced].map(rule),
            sees_direct,
            stamp: Timestamp(0),
            due: BTreeMap::new(),
        }
    }

    /// Puts a model into use on every node.
    pub fn promote(&mut self, model: &Arc<ForestModel>) {
        let model: Arc<dyn QualityModel> = match self.quantity {
            Quantity::Latency => model.clone(),
            Quantity::Throughput => Arc::new(OfThroughput(model.clone())),
        };
        self.predictors.iter_mut().for_each(|predictor| predictor.set_model(Some(model.clone())));
    }

    /// Decides for a pair beside meshwise, whose features are taken where it weighed the same route.
    /// `truth` says what a route will turn out to cost (ms) and when that will be known (s): the predictor
    /// learns from it then, of the routes that the source sees.
    pub fn decide(
        &mut self,
        known: &Meshwise,
        weighed: &Weighed,
        truth: impl Fn(Relay) -> Option<(f64, f64)>,
    ) -> Chosen {
        let (pair, now) = (weighed.pair, timestamp(weighed.t_s));
        let (routes, destination) = (self.routes(known, weighed), known.id(pair.1));
        let predictor = &mut self.predictors[pair.0];
        let ranking = known.first_rule();
        let routes: Vec<Route> = routes
            .into_iter()
            .filter_map(|relay| {
                let links = links(known, pair, relay)?;
                let features = known.features_of(weighed, relay)?;
                let forecast = predictor.forecast(destination, features);
                let prospect = predictor.compared(known.prospect(pair, relay), &forecast)?;
                let bound_ms = ranking.bound_ms(&prospect);
                Some(Route { relay, links, features, forecast, prospect, bound_ms })
            })
            .collect();
        let has_direct = routes.iter().any(|route| route.relay.is_none());
        let switching = self.policy.switching;
        let chosen = std::array::from_fn(|at| {
            let rule = &mut self.rules[at];
            let current = rule.in_use.get(&pair).copied();
            let score = |route: &Route| {
                let to_beat = match has_direct {
                    true => route.relay.is_none(),
                    false => current.is_some_and(|(relay, _)| relay == route.relay),
                };
                rule.score(route, if to_beat { ranking.margin } else { 0.0 })
            };
            let mut best: Option<(&Route, f64)> = None;
            for route in &routes {
                let score = score(route);
                if best.is_none_or(|(_, least)| score > least) {
                    best = Some((route, score));
                }
            }
            let used = current.and_then(|(relay, _)| routes.iter().find(|r| r.relay == relay));
            let view = current.map(|(_, since)| Current {
                score: used.map(&score),
                since,
                turned_bad: false,
            });
            let is_current = best.is_some_and(|(b, _)| current.is_some_and(|(r, _)| b.relay == r));
            let (change, _) = switching.decide(view, best.map(|(_, score)| score), is_current, now);
            match (change, best) {
                (true, Some((best, _))) => {
                    rule.in_use.insert(pair, (best.relay, now));
                    best.relay
                }
                // Nothing is known of any route: the direct link, if there is one.
                _ => current.and_then(|(relay, _)| relay),
            }
        });
        let seen = routes.iter().filter(|route| {
            chosen.contains(&route.relay) || self.sees_direct && route.relay.is_none()
        });
        for route in seen {
            let Some((ms, known_at_s)) = truth(route.relay) else { continue };
            self.stamp = now.max(Timestamp(self.stamp.0 + 1));
            self.predictors[pair.0].probe_sent(self.stamp, destination, || route.features);
            let outcome = (pair.0, self.stamp, ms, route.prospect);
            self.due.entry(timestamp(known_at_s)).or_default().push(outcome);
        }
        chosen
    }

    /// The direct link and the relays of least advertised cost, as many as the router looks at, and
    /// what is in use.
    fn routes(&self, known: &Meshwise, weighed: &Weighed) -> Vec<Relay> {
        let pair = weighed.pair;
        let cost = |relay: Relay| {
            let link = |a, b| known.link_quality(a, b).map(link_cost_ms);
            match relay {
                None => link(pair.0, pair.1),
                Some(relay) => Some(link(pair.0, relay)? + link(relay, pair.1)?),
            }
        };
        let all = std::iter::once(None).chain(known.relays(pair).map(Some));
        let mut all: Vec<(f64, Relay)> =
            all.filter_map(|relay| Some((cost(relay)?, relay))).collect();
        let order = |a: &(f64, Relay), b: &(f64, Relay)| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1));
        let count = self.policy.candidates;
        if all.len() > count {
            all.select_nth_unstable_by(count - 1, order);
            all.truncate(count);
        }
        all.sort_by(order);
        let mut routes: Vec<Relay> = all.into_iter().map(|(_, relay)| relay).collect();
        if !routes.contains(&None) && cost(None).is_some() {
            routes.push(None);
        }
        for rule in &self.rules {
            if let Some((relay, _)) = rule.in_use.get(&pair)
                && !routes.contains(relay)
            {
                routes.push(*relay);
            }
        }
        routes
    }

    /// The outcomes that are known by now.
    pub fn resolve(&mut self, now_s: f64) {
        let now = timestamp(now_s);
        let later = self.due.split_off(&now);
        let due = std::mem::replace(&mut self.due, later);
        for (source, sent_at, ms, prospect) in due.into_values().flatten() {
            let rtt_us = (ms * 1e3).round() as u64;
            self.predictors[source].comparing_mut().foresaw(&prospect, ms);
            self.predictors[source].probe_completed(sent_at, Some(rtt_us), now);
        }
    }
}

/// What is advertised of the links of a route.
fn links(known: &Meshwise, (src, dst): Pair, relay: Relay) -> Option<Vec<LinkQuality>> {
    let hops = match relay {
        None => vec![(src, dst)],
        Some(relay) => vec![(src, relay), (relay, dst)],
    };
    hops.into_iter().map(|(a, b)| known.link_quality(a, b).copied()).collect()
}

impl Rule {
    /// With a bound that counts as lower by the margin.
    fn score(&self, route: &Route, margin: f64) -> f64 {
        let Some(prediction) = route.forecast.best() else { return 0.0 };
        let quality = RouteQuality {
            links: &route.links,
            loss: 0.0,
            probes: 0,
            delivers: 1.0,
            forecast_ms: route.bound_ms * (1.0 - margin),
            forecast_bandwidth: prediction.bandwidth,
            forecast_delivery: prediction.delivery,
        };
        route_score(&self.weights, &quality)
    }
}

/// The throughput head as a model of both what a megabit takes and what a route carries.
struct OfThroughput(Arc<ForestModel>);

impl QualityModel for OfThroughput {
    fn version(&self) -> &str {
        &self.0.version
    }

    fn predict(&self, features: &FeatureVector) -> Option<Prediction> {
        let prediction = of_throughput(self.0.throughput.as_ref()?, features)?;
        let bandwidth = Some(ms_of_bandwidth(prediction.latency_ms));
        Some(Prediction { bandwidth, ..prediction })
    }
}
