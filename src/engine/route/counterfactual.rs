//! By what bounds on round trips the decision would have come out otherwise.

use super::candidate::{Candidate, Decision};
use super::router::PathPolicy;
use super::score::forecast_for_score;
use super::switching::Reason;

/// The runner-up of a decision, and the bounds with which it would take the place of the route
/// in use. Each holds by itself: all other bounds and links stay as they are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Counterfactual {
    /// Index of the best other candidate that is alive.
    pub runner_up: usize,
    /// It wins when its own bound is below this (ms); `None` when none is low enough.
    pub falls_below_ms: Option<f64>,
    /// It wins when the bound of the route in use is above this (ms); `None` when none is high
    /// enough.
    pub rises_above_ms: Option<f64>,
}

/// The counterfactual of a decision that was made by this policy. `None` without a choice: no
/// route in use, no other candidate alive, a path fixed by the operator, or one drawn by chance.
///
/// A tunnel's route is left when another scores better by the policy's margin; where nothing is in use
/// yet, the best score wins. The bound of the route to beat counts as lower by the margin of the rule. The time that a choice is held and the cap on moves are left aside. Between routes of
/// different [`Standing`](super::candidate::Standing) no forecast decides.
pub fn counterfactual(policy: &PathPolicy, decision: &Decision) -> Option<Counterfactual> {
    if matches!(decision.reason, Reason::Forced | Reason::Explored) {
        return None;
    }
    let chosen = decision.chosen?;
    let mut others = decision.candidates.iter().enumerate();
    let (runner_up, other) = others.find(|(at, c)| *at != chosen && c.alive)?;
    let in_use = &decision.candidates[chosen];
    let factor = 1.0 + decision.damping;
    let weights = policy.weights_for(decision.wanted.objective);
    if in_use.standing != other.standing {
        return Some(Counterfactual { runner_up, falls_below_ms: None, rises_above_ms: None });
    }
    let needed = |candidate: &Candidate, target: f64| {
        let (factor, share) = (candidate.factor(&weights), 1.0 - candidate.margin);
        let counted_ms = candidate.bound_ms? * share;
        let needed_ms = forecast_for_score(&weights, factor, candidate.score, counted_ms, target)?;
        // Of a margin of 1 nothing is left that could rise or fall.
        Some(needed_ms / share).filter(|ms| ms.is_finite())
    };
    Some(Counterfactual {
        runner_up,
        falls_below_ms: needed(other, in_use.score * factor),
        rises_above_ms: needed(in_use, other.score / factor),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::measure::LinkQuality;
    use crate::engine::overlay::wire::Objective;

    use crate::engine::predict::Prediction;
    use crate::engine::route::Candidate;

    use crate::engine::route::candidate::{Overlap, Standing};
    use crate::engine::route::score::{RouteQuality, route_score};
    use crate::engine::route::switching::Current;
    use crate::engine::types::{NodeId, Route, Timestamp};

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

    fn score_for(objective: Objective, hops: u8, forecast_ms: f64) -> f64 {
        let quality = RouteQuality {
            links: &links(hops),
            loss: 0.0,
            probes: 0,
            delivers: 1.0,
            forecast_ms,
            forecast_bandwidth: None,
            forecast_delivery: None,
        };
        route_score(&PathPolicy::default().weights_for(objective), &quality)
    }

    fn score(hops: u8, ms: f64) -> f64 {
        score_for(Objective::Balanced, hops, ms)
    }

    fn candidate(hops: u8, ms: f64) -> Candidate {
        let nodes: Vec<NodeId> = (0..=hops).map(|byte| NodeId([byte; 8])).collect();
        let unknown = Candidate::unknown(Route::new(nodes).unwrap());
        let mut candidate = Candidate { bound_ms: Some(ms), score: score(hops, ms), ..unknown };
        candidate.forecast.model = Some(Prediction::of_latency(ms));
        candidate
    }

    fn decision(candidates: Vec<Candidate>, chosen: usize, reason: Reason) -> Decision {
        Decision { reason, ..Decision::held(0, candidates, chosen) }
    }

    /// Whether a tunnel on a 2-hop route leaves it for one of 3 hops.
    fn leaves(objective: Objective, margin: f64, in_use_ms: f64, other_ms: f64) -> bool {
        // As the score says it, not as the router turns one score into another.
        let to_beat = score_for(objective, 2, in_use_ms * (1.0 - margin));
        let in_use = Current { score: Some(to_beat), since: Timestamp(0), turned_bad: false };
        let other = Some(score_for(objective, 3, other_ms));
        let now = Timestamp(60_000_000);
        PathPolicy::default().switching.decide(Some(in_use), other, false, now).0
    }

    #[test]
    fn the_thresholds_are_where_the_router_would_decide_otherwise() {
        let policy = PathPolicy::default();
        for (objective, margin, in_use_ms, other_ms) in [
            (Objective::Balanced, 0.0, 80.0, 90.0),
            (Objective::Balanced, 0.0, 80.0, 60.0),
            (Objective::Balanced, 0.0, 200.0, 200.0),
            (Objective::Balanced, 0.2, 150.0, 160.0),
            (Objective::Balanced, 0.3, 200.0, 100.0),
            (Objective::Latency, 0.0, 80.0, 90.0),
            (Objective::Latency, 0.2, 150.0, 160.0),
            (Objective::Throughput, 0.0, 80.0, 10.0),
            (Objective::Throughput, 0.1, 80.0, 10.0),
        ] {
            let leaves = |in_use_ms, other_ms| leaves(objective, margin, in_use_ms, other_ms);
            let mut candidates = vec![candidate(2, in_use_ms), candidate(3, other_ms)];
            candidates[0].margin = margin;
            candidates[0].score = score_for(objective, 2, in_use_ms * (1.0 - margin));
            candidates[1].score = score_for(objective, 3, other_ms);
            let mut made = decision(candidates, 0, Reason::Best);
            made.wanted.objective = objective;
            let found = counterfactual(&policy, &made).unwrap();
            assert_eq!(found.runner_up, 1);
            if let Some(below) = found.falls_below_ms {
                assert!(leaves(in_use_ms, below * 0.999_999), "{found:?}");
                assert!(!leaves(in_use_ms, below * 1.000_001), "{found:?}");
            } else {
                assert!(!leaves(in_use_ms, 0.0), "{found:?}");
            }
            let above = found.rises_above_ms.unwrap();
            assert!(leaves(above * 1.000_001, other_ms), "{found:?}");
            assert!(!leaves(above * 0.999_999, other_ms), "{found:?}");
        }
    }

    #[test]
    fn between_routes_of_different_standing_no_forecast_decides() {
        let policy = PathPolicy::default();
        let mut made = decision(vec![candidate(3, 80.0), candidate(2, 60.0)], 0, Reason::Best);
        assert!(counterfactual(&policy, &made).unwrap().falls_below_ms.is_some());
        let apart = Standing::default();
        for standing in [
            Standing { held: true, ..apart },
            Standing { refused: true, ..apart },
            Standing { overlap: Overlap::Relay, ..apart },
        ] {
            made.candidates[1].standing = standing;
            let found = counterfactual(&policy, &made).unwrap();
            assert_eq!((found.falls_below_ms, found.rises_above_ms), (None, None));
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
        (stays.candidates[0].margin, stays.candidates[0].score) = (1.0, score(2, 0.0));
        let found = counterfactual(&policy, &stays).unwrap();
        assert_eq!((found.falls_below_ms, found.rises_above_ms), (None, None), "stays for ever");
    }

    #[test]
    fn without_a_choice_there_is_nothing_to_turn() {
        let policy = PathPolicy::default();
        let two = || vec![candidate(1, 5.0), candidate(2, 9.0)];
        assert!(counterfactual(&policy, &decision(two(), 0, Reason::Best)).is_some());
        for chosen_otherwise in [Reason::Forced, Reason::Explored] {
            assert_eq!(counterfactual(&policy, &decision(two(), 0, chosen_otherwise)), None);
        }
        let mut dead = two();
        dead[1].alive = false;
        assert_eq!(counterfactual(&policy, &decision(dead, 0, Reason::Best)), None);
        let mut none = decision(two(), 0, Reason::NoRoute);
        none.chosen = None;
        assert_eq!(counterfactual(&policy, &none), None);
        // Where nothing is in use yet, nothing damps.
        let mut asked = decision(vec![candidate(2, 80.0), candidate(2, 80.0)], 0, Reason::First);
        asked.damping = 0.0;
        let found = counterfactual(&policy, &asked).unwrap();
        assert!((found.falls_below_ms.unwrap() - 80.0).abs() < 1e-6, "{found:?}");
    }
}
