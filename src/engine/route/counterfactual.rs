//! What would have to be forecast for the decision to come out otherwise.

use super::router::{Decision, PathPolicy};
use super::score::forecast_for_score;
use super::switching::Reason;

/// The runner-up of a decision, and the forecasts with which it would take the place of the route
/// in use. Each holds by itself: all other forecasts and links stay as they are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Counterfactual {
    /// Index of the best other candidate that is alive.
    pub runner_up: usize,
    /// It wins when its own forecast is below this (ms); `None` when no forecast is low enough.
    pub falls_below_ms: Option<f64>,
    /// It wins when the forecast of the route in use is above this (ms); `None` when no forecast
    /// is high enough.
    pub rises_above_ms: Option<f64>,
}

/// The counterfactual of a decision that was made by this policy. `None` without a choice: no
/// route in use, no other candidate alive, or a path fixed by the operator.
///
/// A tunnel's route is left when another scores better by the policy's margin than it would with a
/// bound that is lower by the margin of the ranking; where nothing is in use yet, the best score
/// wins. The time that a choice is held is left aside.
pub fn counterfactual(policy: &PathPolicy, decision: &Decision) -> Option<Counterfactual> {
    if decision.reason == Reason::Forced {
        return None;
    }
    let chosen = decision.chosen?;
    let mut others = decision.candidates.iter().enumerate();
    let (runner_up, other) = others.find(|(at, c)| *at != chosen && c.alive)?;
    let in_use = &decision.candidates[chosen];
    let (factor, margin) = match decision.tunnel {
        Some(_) => (1.0 + policy.switching.margin, decision.ranking.margin),
        None => (1.0, 0.0),
    };
    // The score is made of the pessimistic bound, which is a fixed multiple of the forecast.
    let needed = |candidate: &super::Candidate, target: f64| {
        let hops = candidate.route.hop_count();
        let best = candidate.forecast.best()?;
        let bound_ms =
            forecast_for_score(&policy.weights, hops, candidate.score, best.bound_ms, target)?;
        Some(bound_ms * best.latency_ms / best.bound_ms)
    };
    Some(Counterfactual {
        runner_up,
        falls_below_ms: needed(other, in_use.score_to_beat(&policy.weights, margin) * factor),
        // What has to rise so far is the bound less the margin; at 1 nothing is left that could.
        rises_above_ms: needed(in_use, other.score / factor)
            .map(|ms| ms / (1.0 - margin))
            .filter(|ms| ms.is_finite()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::measure::LinkQuality;
    use crate::engine::predict::schema::{FEATURES, MISSING};
    use crate::engine::predict::{Forecast, Prediction, Ranking};
    use crate::engine::route::Candidate;
    use crate::engine::route::score::route_score;
    use crate::engine::route::switching::Current;
    use crate::engine::types::{NodeId, Route, Timestamp, TunnelId};

    fn links(hops: u8) -> Vec<LinkQuality> {
        let link = LinkQuality {
            rtt_ms: 9.0,
            jitter_ms: 0.0,
            loss: 0.01 * f64::from(hops),
            bandwidth: None,
            utilisation: 0.1,
        };
        vec![link; usize::from(hops)]
    }

    fn score(hops: u8, ms: f64) -> f64 {
        route_score(&PathPolicy::default().weights, &links(hops), ms)
    }

    fn candidate(hops: u8, ms: f64) -> Candidate {
        let nodes: Vec<NodeId> = (0..=hops).map(|byte| NodeId([byte; 8])).collect();
        let prediction = Some(Prediction::of_latency(ms));
        let features = [MISSING; FEATURES.len()];
        let forecast = Forecast {
            features,
            model: prediction,
            mixed: None,
            challenger: None,
            moving_average: None,
            last_value: None,
        };
        let (route, score) = (Route::new(nodes).unwrap(), score(hops, ms));
        Candidate { route, alive: true, forecast, score, baseline_score: 0.0 }
    }

    fn decision(candidates: Vec<Candidate>, chosen: usize, reason: Reason) -> Decision {
        Decision {
            at: Timestamp(0),
            tunnel: Some(TunnelId(1)),
            destination: NodeId([9; 8]),
            candidates,
            chosen: Some(chosen),
            reason,
            changed: false,
            model_version: "v1".into(),
            ranking: Ranking::PLAIN,
            challenger_version: None,
            propensity: 1.0,
        }
    }

    /// Whether a tunnel on a 2-hop route leaves it for one of 3 hops.
    fn leaves(margin: f64, in_use_ms: f64, other_ms: f64) -> bool {
        // As the score says it, not as the router turns one score into another.
        let to_beat = score(2, in_use_ms * (1.0 - margin));
        let in_use = Current { score: Some(to_beat), since: Timestamp(0) };
        let now = Timestamp(60_000_000);
        PathPolicy::default().switching.decide(Some(in_use), Some(score(3, other_ms)), false, now).0
    }

    #[test]
    fn the_thresholds_are_where_the_router_would_decide_otherwise() {
        let policy = PathPolicy::default();
        for (margin, in_use_ms, other_ms) in [
            (0.0, 80.0, 90.0),
            (0.0, 80.0, 60.0),
            (0.0, 200.0, 200.0),
            (0.2, 150.0, 160.0),
            (0.3, 200.0, 100.0),
        ] {
            let leaves = |in_use_ms, other_ms| leaves(margin, in_use_ms, other_ms);
            let candidates = vec![candidate(2, in_use_ms), candidate(3, other_ms)];
            let mut made = decision(candidates, 0, Reason::Best);
            made.ranking.margin = margin;
            let found = counterfactual(&policy, &made).unwrap();
            assert_eq!(found.runner_up, 1);
            let below = found.falls_below_ms.unwrap();
            assert!(leaves(in_use_ms, below * 0.999_999), "{found:?}");
            assert!(!leaves(in_use_ms, below * 1.000_001), "{found:?}");
            let above = found.rises_above_ms.unwrap();
            assert!(leaves(above * 1.000_001, other_ms), "{found:?}");
            assert!(!leaves(above * 0.999_999, other_ms), "{found:?}");
        }
    }

    #[test]
    fn what_no_forecast_can_turn_is_said() {
        let policy = PathPolicy::default();
        let candidates = vec![candidate(1, 5.0), candidate(4, 90.0)];
        let found = counterfactual(&policy, &decision(candidates, 0, Reason::Best)).unwrap();
        assert_eq!(found.falls_below_ms, None, "four hops cost more than 5 ms");
        assert!(found.rises_above_ms.is_some());
        let mut stays = decision(vec![candidate(2, 80.0), candidate(2, 90.0)], 0, Reason::Best);
        stays.ranking.margin = 1.0;
        let found = counterfactual(&policy, &stays).unwrap();
        assert_eq!((found.falls_below_ms, found.rises_above_ms), (None, None), "stays for ever");
    }

    #[test]
    fn without_a_choice_there_is_nothing_to_turn() {
        let policy = PathPolicy::default();
        let two = || vec![candidate(1, 5.0), candidate(2, 9.0)];
        assert!(counterfactual(&policy, &decision(two(), 0, Reason::Best)).is_some());
        assert_eq!(counterfactual(&policy, &decision(two(), 0, Reason::Forced)), None);
        let mut dead = two();
        dead[1].alive = false;
        assert_eq!(counterfactual(&policy, &decision(dead, 0, Reason::Best)), None);
        let mut none = decision(two(), 0, Reason::NoRoute);
        none.chosen = None;
        assert_eq!(counterfactual(&policy, &none), None);
        // Where nothing is in use yet, no margin protects the best.
        let mut asked = decision(vec![candidate(2, 80.0), candidate(2, 80.0)], 0, Reason::First);
        asked.tunnel = None;
        asked.ranking.margin = 0.2;
        let found = counterfactual(&policy, &asked).unwrap();
        assert!((found.falls_below_ms.unwrap() - 80.0).abs() < 1e-6, "{found:?}");
    }
}
