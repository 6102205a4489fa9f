//! Why a route was chosen, as JSON. Units are in the names.
//!
//! What only the driver knows is taken from it in one look ([`Asked::look`]); what takes time, the
//! contributions and the look into the store, is worked out elsewhere ([`Asked::answer`]).

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::types::route_ids;
use crate::engine::overlay::wire::Objective;
use crate::engine::predict::schema::{FEATURES, MISSING};
use crate::engine::predict::{Centre, Forecast, Prediction, QualityModel};
use crate::engine::route::{self, Decision};
use crate::engine::types::{NodeId, Route, TunnelId};
use crate::node::View;
use crate::store::{OutcomeRow, Reader};

/// `GET /v1/routes/NAME|NODE|PEER`, with `?tunnel=NUMBER` about this one
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Explanation {
    /// When (µs since the epoch).
    pub at_us: u64,
    /// The far end.
    pub destination: String,
    /// The tunnel that the decision is about; none when nothing is open.
    pub tunnel: Option<u16>,
    /// The other tunnels to what was asked for, each with a route of its own.
    pub other_tunnels: Vec<u16>,
    /// The other paths of this tunnel, each with a route of its own, by the numbers that `?tunnel=` takes.
    #[serde(default)]
    pub other_paths: Vec<u16>,
    /// What the score is made of: latency, throughput, reliability or balanced.
    pub objective: Objective,
    /// Routes in use of the tunnels beside which this one was opened: their relays are avoided.
    pub avoided: Vec<Vec<String>>,
    /// What decided.
    pub model_version: String,
    /// Why.
    pub reason: String,
    /// What routes are compared by: forecast, level, mean, cautious or blend.
    pub centre: Centre,
    /// So many of its usual errors are added to that.
    pub pessimism: f64,
    /// Share by which the route to beat counts as faster than that: the direct one, or where there is
    /// none the one in use.
    pub margin: f64,
    /// Probability with which the policy makes this choice, 0 to 1.
    pub propensity: f64,
    /// All candidates, best first.
    pub candidates: Vec<RouteCandidate>,
    /// What would have to be otherwise for the runner-up; none without one.
    pub counterfactual: Option<Counterfactual>,
    /// What came of the newest decision whose outcome is known.
    pub outcome: Option<Outcome>,
}

/// One candidate.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RouteCandidate {
    /// Node ids, source first.
    pub route: Vec<String>,
    /// Links.
    pub hops: usize,
    /// Can carry traffic now.
    pub alive: bool,
    /// In use.
    pub chosen: bool,
    /// Failed of late, and kept back while there is another.
    pub held: bool,
    /// Has not the bandwidth that is to be set aside for the tunnel.
    pub refused: bool,
    /// Its relays that deliver less of real traffic than their links claim.
    pub doubted: Vec<DoubtedRelay>,
    /// What it is compared by (ms): the centre and the pessimism of the rule.
    pub bound_ms: Option<f64>,
    /// Score.
    pub score: f64,
    /// Score on the moving average.
    pub baseline_score: f64,
    /// Probability with which the decision takes it, 0 to 1.
    pub propensity: f64,
    /// The model's forecast (ms).
    pub predicted_ms: Option<f64>,
    /// Its interval (ms).
    pub interval_ms: Option<(f64, f64)>,
    /// The model's forecast of the bandwidth that a tunnel gets (bytes/s); none without a head for
    /// it that has earned its place.
    pub predicted_bandwidth: Option<f64>,
    /// The model's forecast of the share that the route delivers, 0 to 1; none without a head for it
    /// that has earned its place and keeps up with what is measured here.
    pub predicted_delivery: Option<f64>,
    /// The forecast of the model in shadow (ms).
    pub challenger_ms: Option<f64>,
    /// The moving average (ms).
    pub moving_average_ms: Option<f64>,
    /// The last measured value (ms).
    pub last_value_ms: Option<f64>,
    /// What was known, by name; unknown ones are left out.
    pub features: BTreeMap<String, f64>,
    /// What the model's own forecast is made of, before it is mixed with the baselines' to
    /// `predicted_ms`; of the route in use and the runner-up only.
    pub attribution: Option<Attribution>,
}

/// A relay that delivers less than its links claim.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DoubtedRelay {
    /// Its node id.
    pub relay: String,
    /// What it delivers, as a share of what its links claim, 0 to 1.
    pub delivers: f64,
}

/// What a model's forecast is made of: ln(`forecast_ms`) is ln(`expectation_ms`) plus all
/// contributions.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Attribution {
    /// The forecast when only the reference is known (ms).
    pub expectation_ms: f64,
    /// The model's forecast (ms).
    pub forecast_ms: f64,
    /// The sum of all contributions, ln(ms).
    pub sum_ln: f64,
    /// What each feature adds, the largest first; those that add nothing are left out.
    pub contributions: Vec<Contribution>,
}

/// What one feature adds to a forecast.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Contribution {
    /// Its name.
    pub feature: String,
    /// Its value; none when it was not known.
    pub value: Option<f64>,
    /// What it adds, ln(ms): about the relative change of the forecast.
    pub ln: f64,
}

/// What would have to be otherwise for the runner-up to be chosen. Each holds by itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Counterfactual {
    /// The best other candidate that is alive.
    pub runner_up: Vec<String>,
    /// What it is compared by (ms).
    pub bound_ms: Option<f64>,
    /// It wins when that falls below (ms); none when no round trip is low enough.
    pub falls_below_ms: Option<f64>,
    /// It wins when what the route in use is compared by rises above (ms); none when no round trip is
    /// high enough.
    pub rises_above_ms: Option<f64>,
}

/// What came of a decision.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Outcome {
    /// When it was made (µs since the epoch).
    pub at_us: u64,
    /// What decided.
    pub model_version: String,
    /// The route that was in use after it.
    pub route: Vec<String>,
    /// The forecast in use (ms).
    pub forecast_ms: Option<f64>,
    /// Its interval (ms).
    pub interval_ms: Option<(f64, f64)>,
    /// When the next probe of the route left (µs since the epoch).
    pub probed_us: u64,
    /// What it measured (ms); none when it was lost.
    pub measured_ms: Option<f64>,
}

/// What is asked about.
pub(super) struct Meant {
    /// The far end.
    pub(super) destination: NodeId,
    /// The open tunnels to what was named, each with all its paths, of which the first has its number.
    pub(super) open: Vec<Vec<TunnelId>>,
    /// Of their paths this one.
    pub(super) only: Option<TunnelId>,
}

impl Meant {
    fn is_meant(&self, tunnel: &TunnelId) -> bool {
        match &self.only {
            Some(only) => only == tunnel,
            None => self.open.iter().flatten().any(|open| open == tunnel),
        }
    }

    /// The numbers of the other tunnels and of the other paths, when the answer is about this one.
    fn others(&self, about: Option<TunnelId>) -> (Vec<u16>, Vec<u16>) {
        let is_about = |paths: &&Vec<TunnelId>| about.is_some_and(|about| paths.contains(&about));
        let (this, others): (Vec<_>, Vec<_>) = self.open.iter().partition(is_about);
        let tunnels = others.into_iter().filter_map(|paths| paths.first());
        let paths = this.into_iter().flatten().filter(|path| Some(**path) != about);
        (tunnels.map(|tunnel| tunnel.0).collect(), paths.map(|path| path.0).collect())
    }
}

/// What the driver knows about a destination.
pub(super) struct Asked {
    decision: Decision,
    other_tunnels: Vec<u16>,
    other_paths: Vec<u16>,
    counterfactual: Option<route::Counterfactual>,
    model: Option<Arc<dyn QualityModel>>,
}

impl Asked {
    /// The newest decision about a tunnel there, of those that are meant if there is one, unless a single one
    /// is meant; else what would be decided now.
    pub(super) fn look(meant: &Meant, view: &mut View<'_>) -> Self {
        let destination = meant.destination;
        let leads_there =
            |(_, decision): &(&TunnelId, &Decision)| decision.destination == destination;
        let there = || view.decisions.iter().filter(leads_there);
        let made = there().find(|(tunnel, _)| meant.is_meant(tunnel));
        let made = made.or_else(|| there().next().filter(|_| meant.only.is_none()));
        let (other_tunnels, other_paths) = meant.others(made.map(|(tunnel, _)| *tunnel));
        let made = made.map(|(_, decision)| decision.clone());
        let decision = made.unwrap_or_else(|| view.engine.explain(destination, view.now));
        Self {
            other_tunnels,
            other_paths,
            counterfactual: view.engine.counterfactual(&decision),
            // A model that was replaced since cannot explain what it did not decide.
            model: view
                .engine
                .predictor()
                .model()
                .filter(|model| model.version() == decision.model_version),
            decision,
        }
    }

    /// The route in use, or the one that would be; `None` when none is alive.
    pub(super) fn route(&self) -> Option<Route> {
        let chosen = self.decision.chosen.and_then(|index| self.decision.candidates.get(index));
        chosen.map(|candidate| candidate.route.clone())
    }

    /// The whole answer. Blocks: it may take a while to read the store.
    pub(super) fn answer(&self, store: &Path) -> Explanation {
        let decision = &self.decision;
        let runner_up = self.counterfactual.map(|found| found.runner_up);
        let mut candidates: Vec<RouteCandidate> =
            decision.candidates.iter().map(RouteCandidate::of).collect();
        for (index, candidate) in candidates.iter_mut().enumerate() {
            candidate.chosen = decision.chosen == Some(index);
            if candidate.chosen || runner_up == Some(index) {
                let forecast = &decision.candidates[index].forecast;
                candidate.attribution =
                    self.model.as_deref().and_then(|m| attribution(m, forecast));
            }
        }
        let counterfactual = self.counterfactual.map(|found| {
            let other = &decision.candidates[found.runner_up];
            Counterfactual {
                runner_up: route_ids(&other.route),
                bound_ms: other.bound_ms,
                falls_below_ms: found.falls_below_ms,
                rises_above_ms: found.rises_above_ms,
            }
        });
        let destination = decision.destination.to_string();
        // The answer is worth giving without it.
        let outcome = Reader::open(store).and_then(|reader| reader.latest_outcome(&destination));
        Explanation {
            at_us: decision.at.as_micros(),
            destination,
            tunnel: decision.tunnel.map(|tunnel| tunnel.0),
            other_tunnels: self.other_tunnels.clone(),
            other_paths: self.other_paths.clone(),
            objective: decision.wanted.objective,
            avoided: decision.wanted.avoid.iter().map(route_ids).collect(),
            model_version: decision.model_version.clone(),
            reason: decision.reason.as_str().into(),
            centre: decision.ranking.centre,
            pessimism: decision.ranking.pessimism,
            margin: decision.ranking.margin,
            propensity: decision.propensity(),
            candidates,
            counterfactual,
            outcome: outcome.ok().flatten().map(Outcome::of),
        }
    }
}

fn ms(prediction: Option<Prediction>) -> Option<f64> {
    prediction.map(|prediction| prediction.latency_ms)
}

/// `None` when the model did not forecast, or cannot say why.
fn attribution(model: &dyn QualityModel, forecast: &Forecast) -> Option<Attribution> {
    forecast.model?;
    let found = model.explain(&forecast.features)?;
    let parts = FEATURES.iter().zip(forecast.features).zip(found.contributions);
    let mut contributions: Vec<Contribution> = parts
        .filter(|(_, ln)| *ln != 0.0)
        .map(|((feature, value), ln)| Contribution {
            feature: feature.name.to_owned(),
            value: (value != MISSING).then_some(value),
            ln,
        })
        .collect();
    contributions.sort_by(|a, b| b.ln.abs().total_cmp(&a.ln.abs()));
    Some(Attribution {
        expectation_ms: found.expectation.exp(),
        forecast_ms: (found.expectation + found.sum()).exp(),
        sum_ln: found.sum(),
        contributions,
    })
}

impl RouteCandidate {
    /// Neither chosen nor explained yet.
    fn of(candidate: &route::Candidate) -> Self {
        let forecast = &candidate.forecast;
        let features = FEATURES.iter().zip(forecast.features);
        let known = features.filter(|(_, value)| *value != MISSING);
        Self {
            route: route_ids(&candidate.route),
            hops: candidate.route.hop_count(),
            alive: candidate.alive,
            chosen: false,
            held: candidate.standing.held,
            refused: candidate.standing.refused,
            doubted: candidate.doubted.iter().map(DoubtedRelay::of).collect(),
            bound_ms: candidate.bound_ms,
            score: candidate.score,
            baseline_score: candidate.baseline_score,
            propensity: candidate.propensity,
            predicted_ms: ms(forecast.learned()),
            interval_ms: forecast.learned().and_then(|p| p.interval_ms),
            predicted_bandwidth: forecast.learned().and_then(|p| p.bandwidth),
            predicted_delivery: forecast.learned().and_then(|p| p.delivery),
            challenger_ms: ms(forecast.challenger),
            moving_average_ms: ms(forecast.moving_average),
            last_value_ms: ms(forecast.last_value),
            features: known.map(|(f, value)| (f.name.to_owned(), value)).collect(),
            attribution: None,
        }
    }
}

impl DoubtedRelay {
    fn of((relay, delivers): &(NodeId, f64)) -> Self {
        Self { relay: relay.to_string(), delivers: *delivers }
    }
}

impl Outcome {
    fn of(row: OutcomeRow) -> Self {
        Self {
            at_us: row.at_us,
            model_version: row.model_version,
            route: row.route.split('>').map(str::to_owned).collect(),
            forecast_ms: row.predicted_ms.or(row.moving_average_ms),
            interval_ms: row.predicted_interval_ms,
            probed_us: row.probed_us,
            measured_ms: row.rtt_us.map(|us| us as f64 / 1e3),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::predict::schema::index_of;
    use crate::engine::predict::{self, LastValue};
    use crate::engine::route::{Candidate, Reason, Standing};
    use crate::engine::types::{Route, Timestamp, TunnelId};

    /// Says that the last value adds 0.25 and the hop count takes 0.5.
    struct Explained;

    impl QualityModel for Explained {
        fn version(&self) -> &str {
            "v1"
        }

        fn predict(&self, _: &predict::FeatureVector) -> Option<Prediction> {
            None
        }

        fn explain(&self, _: &predict::FeatureVector) -> Option<predict::Explanation> {
            let mut contributions = [0.0; FEATURES.len()];
            contributions[index_of("route_last_ms")?] = 0.25;
            contributions[index_of("hop_count")?] = -0.5;
            Some(predict::Explanation { expectation: 10.0_f64.ln(), contributions })
        }
    }

    fn candidate(relay: u8, model: Option<Prediction>) -> Candidate {
        let route = Route::new([1, relay, 2].map(|byte| NodeId([byte; 8]))).unwrap();
        let unknown = Candidate::unknown(route);
        let mut candidate = Candidate { bound_ms: Some(8.0), propensity: 0.75, ..unknown };
        candidate.forecast.features[index_of("hop_count").unwrap()] = 2.0;
        candidate.forecast.model = model;
        candidate.forecast.moving_average = Some(Prediction::of_latency(9.0));
        candidate
    }

    fn asked(model: Arc<dyn QualityModel>) -> Asked {
        let forecast = Some(Prediction::of_latency(8.0));
        let standing = Standing { held: true, ..Standing::default() };
        let doubted = vec![(NodeId([5; 8]), 0.71)];
        let decision = Decision {
            at: Timestamp(5),
            tunnel: Some(TunnelId(1)),
            destination: NodeId([2; 8]),
            wanted: route::Wanted {
                objective: Objective::Reliability,
                avoid: vec![Route::new([1, 7, 2].map(|byte| NodeId([byte; 8]))).unwrap()],
                ..route::Wanted::default()
            },
            candidates: vec![
                candidate(3, forecast),
                candidate(4, forecast),
                Candidate { standing, doubted, ..candidate(5, None) },
            ],
            chosen: Some(1),
            reason: Reason::Held,
            changed: false,
            model_version: "v1".into(),
            ranking: predict::Ranking { pessimism: 0.5, margin: 0.2, ..predict::Ranking::PLAIN },
            damping: 0.02,
            challenger_version: None,
        };
        let counterfactual = Some(route::Counterfactual {
            runner_up: 0,
            falls_below_ms: Some(7.0),
            rises_above_ms: None,
        });
        let (other_tunnels, other_paths) = (vec![], vec![]);
        Asked { decision, other_tunnels, other_paths, counterfactual, model: Some(model) }
    }

    #[test]
    fn what_is_there_too_are_tunnels_by_their_numbers_and_paths_of_this_one() {
        let tunnels = |numbers: &[u16]| numbers.iter().copied().map(TunnelId).collect::<Vec<_>>();
        let meant = Meant {
            destination: NodeId([2; 8]),
            open: vec![tunnels(&[1]), tunnels(&[4, 5, 6])],
            only: None,
        };
        assert_eq!(meant.others(Some(TunnelId(1))), (vec![4], vec![]));
        assert_eq!(meant.others(Some(TunnelId(5))), (vec![1], vec![4, 6]));
        assert_eq!(meant.others(Some(TunnelId(9))), (vec![1, 4], vec![]), "of another service");
        assert!(meant.is_meant(&TunnelId(6)) && !meant.is_meant(&TunnelId(2)));
    }

    #[test]
    fn the_route_in_use_and_the_runner_up_are_explained() {
        let folder = tempfile::tempdir().unwrap();
        let answer = asked(Arc::new(Explained)).answer(&folder.path().join("none.db"));
        assert_eq!((answer.propensity, answer.reason.as_str()), (0.75, "held"));
        assert_eq!((answer.pessimism, answer.margin), (0.5, 0.2));
        assert_eq!(answer.objective, Objective::Reliability);
        assert_eq!(answer.avoided, [[1, 7, 2].map(|byte| NodeId([byte; 8]).to_string())]);
        let chosen: Vec<bool> = answer.candidates.iter().map(|c| c.chosen).collect();
        assert_eq!(chosen, [false, true, false]);
        assert!(answer.candidates[2].attribution.is_none());
        let held: Vec<bool> = answer.candidates.iter().map(|c| c.held).collect();
        assert_eq!(held, [false, false, true]);
        let doubted = &answer.candidates[2].doubted[0];
        assert_eq!((&doubted.relay, doubted.delivers), (&NodeId([5; 8]).to_string(), 0.71));
        assert!(answer.candidates[0].doubted.is_empty());
        for index in [0, 1] {
            let found = answer.candidates[index].attribution.as_ref().unwrap();
            assert!((found.forecast_ms - 10.0 * (-0.25_f64).exp()).abs() < 1e-9);
            let told: Vec<_> = found.contributions.iter().map(|c| (&*c.feature, c.value)).collect();
            assert_eq!(told, [("hop_count", Some(2.0)), ("route_last_ms", None)]);
        }
        let other = answer.counterfactual.unwrap();
        assert_eq!(other.runner_up, answer.candidates[0].route);
        assert_eq!((other.bound_ms, other.falls_below_ms), (Some(8.0), Some(7.0)));
        assert!(answer.outcome.is_none(), "there is no store");
    }

    #[test]
    fn a_model_that_cannot_say_why_explains_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let answer = asked(Arc::new(LastValue)).answer(&folder.path().join("none.db"));
        assert!(answer.candidates.iter().all(|candidate| candidate.attribution.is_none()));
    }
}
