//! What a tunnel wants of a route, the routes that were weighed for it, and the choice among them.

use super::graph::OverlayGraph;
use super::router::PathPolicy;
use super::score::{RouteQuality, ScoreWeights, factor, route_score, score_for_forecast};
use super::switching::Reason;
use crate::engine::measure::{
    HISTORY_WINDOW, LinkHistories, LinkQuality, RouteHistories, RouteHistory,
};
use crate::engine::overlay::wire::Objective;
use crate::engine::predict::{
    Forecast, Prediction, Prospect, Ranking, RoutePredictor, route_features,
};
use crate::engine::types::{NodeId, Route, Timestamp, TunnelId};

/// What a tunnel wants of its route.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Wanted {
    /// What its score is made of.
    pub objective: Objective,
    /// Routes in use of the tunnels beside which this one was opened: it shares no relay with them
    /// where that is possible.
    pub avoid: Vec<Route>,
    /// Bandwidth to be set aside for it (bytes/s).
    pub reserve: Option<u64>,
    /// Routes that have refused that.
    pub refused: Vec<Route>,
}

impl Wanted {
    /// Whether a route shares nothing with those to avoid.
    pub fn is_apart(&self, route: &Route) -> bool {
        self.overlap(route) == Overlap::Apart
    }

    /// What a route shares with those to avoid.
    fn overlap(&self, route: &Route) -> Overlap {
        if self.avoid.contains(route) {
            Overlap::Same
        } else if self.avoid.iter().all(|other| disjoint(route, other)) {
            Overlap::Apart
        } else {
            Overlap::Relay
        }
    }

    /// What speaks against a route, of which so much is left (bytes/s) where that is known.
    fn standing(&self, route: &Route, held: bool, residual: Option<f64>) -> Standing {
        let short = self.reserve.zip(residual).is_some_and(|(rate, left)| left < rate as f64);
        let refused = short || self.refused.contains(route);
        Standing { held, refused, overlap: self.overlap(route) }
    }
}

/// What a route shares with routes that are to be avoided.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Overlap {
    /// Nothing.
    #[default]
    Apart,
    /// A relay at least.
    Relay,
    /// It is one of them.
    Same,
}

/// What speaks against a route that lives, whatever its score: the one against which less speaks goes
/// before, the first difference counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Standing {
    /// It had to be left of late, and is kept back while there is another.
    pub held: bool,
    /// It has not the bandwidth that is to be set aside, as its nodes have answered or its links claim.
    pub refused: bool,
    /// What it shares with the tunnel's other paths.
    pub overlap: Overlap,
}

/// Whether two routes between the same ends share no relay and are not the same.
pub fn disjoint(a: &Route, b: &Route) -> bool {
    a != b && !a.relays().iter().any(|relay| b.relays().contains(relay))
}

/// One route that was weighed.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// The route.
    pub route: Route,
    /// Whether it can carry traffic now.
    pub alive: bool,
    /// What speaks against it.
    pub standing: Standing,
    /// Its relays that deliver less than their links claim, and which share of it.
    pub doubted: Vec<(NodeId, f64)>,
    /// What is forecast for it.
    pub forecast: Forecast,
    /// What it is compared by.
    pub prospect: Option<Prospect>,
    /// Its bound by the rule in use (ms), which its score is made of; `None` when nothing is known.
    pub bound_ms: Option<f64>,
    /// It is the route that others have to beat: the direct one, or where there is none the one in use.
    pub stays: bool,
    /// Share by which its bound is lowered in its score therefore; 0 of the others.
    pub margin: f64,
    /// Score, 0 to 1; 0 when dead.
    pub score: f64,
    /// Score on the moving average, 0 to 1; 0 when dead.
    pub baseline_score: f64,
    /// Probability with which the decision takes it, 0 to 1 ([`super::explore`]); those of all
    /// candidates sum to 1 where one is chosen.
    pub propensity: f64,
}

impl Candidate {
    /// It is the route that others have to beat by this margin.
    fn stay(&mut self, weights: &ScoreWeights, margin: f64) {
        (self.stays, self.margin) = (true, margin);
        if let Some(bound_ms) = self.bound_ms {
            let (factor, lower_ms) = (self.factor(weights), bound_ms * (1.0 - margin));
            self.score = score_for_forecast(weights, factor, self.score, bound_ms, lower_ms);
        }
    }

    /// Share that its relays deliver of what their links claim.
    pub fn delivers(&self) -> f64 {
        self.doubted.iter().map(|(_, share)| share).product()
    }

    /// What the terms of its score are multiplied by.
    pub fn factor(&self, weights: &ScoreWeights) -> f64 {
        factor(weights, self.route.hop_count(), self.delivers())
    }
}

/// A choice among candidates, with everything that is needed to judge it later.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// When.
    pub at: Timestamp,
    /// For which tunnel; `None` when somebody only asked.
    pub tunnel: Option<TunnelId>,
    /// Where to.
    pub destination: NodeId,
    /// What was wanted.
    pub wanted: Wanted,
    /// All candidates: those that live, then those against which the least speaks, then by score.
    pub candidates: Vec<Candidate>,
    /// Index of the route in use after the decision.
    pub chosen: Option<usize>,
    /// Why.
    pub reason: Reason,
    /// Whether the route in use changed.
    pub changed: bool,
    /// Version of the model whose forecasts decided.
    pub model_version: String,
    /// How routes were compared.
    pub ranking: Ranking,
    /// Share by which another route had to score better than the one in use.
    pub damping: f64,
    /// Version of the model that was asked in shadow.
    pub challenger_version: Option<String>,
}

impl Decision {
    /// Probability with which the policy made this choice, 0 to 1; 1 of none.
    pub fn propensity(&self) -> f64 {
        let chosen = self.chosen.and_then(|index| self.candidates.get(index));
        chosen.map_or(1.0, |candidate| candidate.propensity)
    }
}

/// The best candidate of those that are kept back, of which nothing else speaks against it that does not
/// against the one at `index`.
pub(super) fn held_back(candidates: &[Candidate], index: usize) -> Option<usize> {
    let otherwise = |candidate: &Candidate| Standing { held: false, ..candidate.standing };
    let bearable = otherwise(&candidates[index]);
    candidates.iter().enumerate().position(|(other, candidate)| {
        let held = candidate.alive && candidate.standing.held && other != index;
        held && otherwise(candidate) <= bearable
    })
}

/// What a decision is made from.
pub struct Knowledge<'a> {
    /// The links that exist.
    pub graph: &'a mut OverlayGraph,
    /// What was advertised of links over time.
    pub links: &'a LinkHistories,
    /// What routes delivered.
    pub histories: &'a RouteHistories,
    /// Who forecasts.
    pub predictor: &'a mut RoutePredictor,
}

impl Knowledge<'_> {
    /// Whether a route can carry traffic: both ends of each of its links advertise it, and it
    /// answers.
    pub fn is_alive(&self, route: &Route) -> bool {
        route.links().all(|(a, b)| self.graph.is_link(a, b)) && !self.histories.is_dead(route)
    }
}

/// Forecasts and scores, in the order of [`Decision::candidates`]. `stay`: the route in use.
pub(super) fn weigh(
    policy: &PathPolicy,
    wanted: &Wanted,
    routes: Vec<Route>,
    stay: Option<&Route>,
    know: &mut Knowledge<'_>,
    now: Timestamp,
) -> Vec<Candidate> {
    let weights = policy.weights_for(wanted.objective);
    let ranking = know.predictor.ranking();
    let candidate = |route: Route| {
        let history = know.histories.of(&route);
        let features = route_features(&route, know.links, history, now);
        let forecast = know.predictor.forecast(route.destination(), features);
        let prospect = know.predictor.prospect(&route, history, &forecast, now);
        let bound_ms = prospect.map(|prospect| ranking.bound_ms(&prospect));
        let links: Option<Vec<LinkQuality>> =
            route.links().map(|(a, b)| know.graph.quality(a, b)).collect();
        let alive = know.is_alive(&route);
        let held = know.histories.is_held(&route, now);
        let standing = wanted.standing(&route, held, know.graph.residual(&route));
        let doubted = know.graph.doubted_on(&route);
        let delivers = doubted.iter().map(|(_, share)| share).product();
        let loss = history.map_or(0.0, RouteHistory::loss);
        let probes = history.map_or(0, |h| h.completed().min(HISTORY_WINDOW as u64) as usize);
        let score = |prediction: Option<Prediction>, ms: Option<f64>| match (&links, prediction, ms)
        {
            (Some(links), Some(prediction), Some(forecast_ms)) if alive => {
                let quality = RouteQuality {
                    links,
                    loss,
                    probes,
                    delivers,
                    forecast_ms,
                    forecast_bandwidth: prediction.bandwidth,
                    forecast_delivery: prediction.delivery,
                };
                route_score(&weights, &quality)
            }
            _ => 0.0,
        };
        let average = forecast.moving_average;
        Candidate {
            score: score(forecast.best(), bound_ms),
            baseline_score: score(average, average.map(|average| average.latency_ms)),
            route,
            alive,
            standing,
            doubted,
            forecast,
            prospect,
            bound_ms,
            stays: false,
            margin: 0.0,
            propensity: 0.0,
        }
    };
    let mut candidates: Vec<Candidate> = routes.into_iter().map(candidate).collect();
    let alive = candidates.iter().filter(|candidate| candidate.alive);
    let best = alive.map(|candidate| candidate.standing).min();
    let mut able = candidates.iter_mut().filter(|c| c.alive && Some(c.standing) == best);
    let direct = |c: &&mut Candidate| c.route.hop_count() == 1;
    // What cannot be taken is no route to stay on.
    let stays = match able.by_ref().find(direct) {
        Some(direct) => Some(direct),
        None => candidates
            .iter_mut()
            .find(|c| c.alive && Some(c.standing) == best && Some(&c.route) == stay),
    };
    if let Some(stays) = stays {
        stays.stay(&weights, ranking.margin);
    }
    candidates.sort_by(|a, b| {
        let by_kind = b.alive.cmp(&a.alive).then(a.standing.cmp(&b.standing));
        by_kind.then(b.score.total_cmp(&a.score)).then_with(|| a.route.cmp(&b.route))
    });
    candidates
}

#[cfg(test)]
impl Candidate {
    /// For tests: a living route of which nothing is known.
    pub(crate) fn unknown(route: Route) -> Self {
        use crate::engine::predict::schema::{FEATURES, MISSING};
        Self {
            route,
            alive: true,
            standing: Standing::default(),
            doubted: Vec::new(),
            forecast: Forecast {
                features: [MISSING; FEATURES.len()],
                model: None,
                mixed: None,
                challenger: None,
                moving_average: None,
                last_value: None,
            },
            prospect: None,
            bound_ms: None,
            stays: false,
            margin: 0.0,
            score: 0.5,
            baseline_score: 0.5,
            propensity: 0.5,
        }
    }
}

#[cfg(test)]
impl Decision {
    /// For tests: tunnel 1 stays with a candidate.
    pub(crate) fn held(at_us: u64, candidates: Vec<Candidate>, chosen: usize) -> Self {
        Self {
            at: Timestamp(at_us),
            tunnel: Some(TunnelId(1)),
            destination: candidates[chosen].route.destination(),
            wanted: Wanted::default(),
            candidates,
            chosen: Some(chosen),
            reason: Reason::Held,
            changed: false,
            model_version: "v1".into(),
            ranking: Ranking::PLAIN,
            damping: 0.02,
            challenger_version: None,
        }
    }
}
