//! From the decisions in the store to what [`judge`](super::offpolicy::judge) judges on.
//!
//! The outcome of a decision is the next answered probe of the chosen route, sent at the decision
//! or at most [`FORECAST_AGE_US_MAX`] after it. Decisions for one destination closer to each
//! other than that would share one outcome and count it several times, so that only such are read that lie
//! further apart.
//!
//! Only candidates to which the log gave a chance take part: of the others nothing can be known, and a
//! decision with one such candidate is none. What is judged is thus a policy that has the router's
//! limits (it does not leave a route that was taken just now, or take one that is much worse) and another
//! preference within them.

use std::collections::HashMap;

use super::LearnError;
use super::evaluate::FORECAST_AGE_US_MAX;
use super::offpolicy::LoggedDecision;
use crate::engine::measure::ProbeKind;
use crate::engine::predict::Prediction;
use crate::store::{CandidateRow, DecisionRow, FEATURES_APART, Reader};

// Decisions that keep their features lie no farther apart than those that are judged.
const _: () = assert!(FEATURES_APART.as_micros() as u64 <= FORECAST_AGE_US_MAX);

/// What the policy to be judged makes of the candidates of one decision, in their order.
#[derive(Clone, Debug, PartialEq)]
pub struct Preference {
    /// With which probability it takes each; sum 1.
    pub target: Vec<f64>,
    /// The direct model's round trip of each (ms).
    pub predicted_ms: Vec<f64>,
}

impl Preference {
    /// Of a policy that takes the lowest bound, the first of equal ones; its forecasts are the direct
    /// model. `None` without candidates, or when one of them has no forecast.
    pub fn lowest(
        candidates: &[CandidateRow],
        forecast: impl FnMut(&CandidateRow) -> Option<Prediction>,
    ) -> Option<Self> {
        let forecasts: Vec<Prediction> = candidates.iter().map(forecast).collect::<Option<_>>()?;
        let bounds = forecasts.iter().map(|forecast| forecast.bound_ms).enumerate();
        let (best, _) = bounds.min_by(|(_, a), (_, b)| a.total_cmp(b))?;
        let mut target = vec![0.0; forecasts.len()];
        target[best] = 1.0;
        Some(Self { target, predicted_ms: forecasts.iter().map(|f| f.latency_ms).collect() })
    }
}

/// Logged decisions, and what had to be left out.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Logged {
    /// In order of time; costs are round trips in ms.
    pub decisions: Vec<LoggedDecision>,
    /// When the first and the last of them was made (µs since the epoch).
    pub span_us: Option<(u64, u64)>,
    /// Decisions in which one candidate had all the probability, or of which it was not logged.
    pub without_choice: usize,
    /// Decisions whose chosen route answered no probe in time. When there are many, costs look lower
    /// than they were.
    pub without_outcome: usize,
    /// Decisions on which the policy to be judged had no preference.
    pub without_preference: usize,
}

/// Reads the decisions made at `since_us` (µs since the epoch) or later, asks `policy` what it
/// makes of the candidates that had a chance, and adds what the chosen one turned out to cost.
///
/// # Errors
/// [`LearnError::Store`].
pub fn logged_decisions(
    reader: &Reader,
    since_us: u64,
    mut policy: impl FnMut(&[CandidateRow]) -> Option<Preference>,
) -> Result<Logged, LearnError> {
    let mut outcomes: HashMap<String, Vec<(u64, u64)>> = HashMap::new();
    for probe in reader.probes(ProbeKind::Route, since_us)? {
        if let Some(rtt_us) = probe.rtt_us {
            outcomes.entry(probe.route).or_default().push((probe.sent_us, rtt_us));
        }
    }
    let mut logged = Logged::default();
    for row in reader.decisions_apart(since_us, FORECAST_AGE_US_MAX)? {
        let DecisionRow { at_us, mut candidates, .. } = row;
        candidates.retain(|candidate| candidate.propensity.is_some_and(|chance| chance > 0.0));
        let chosen = candidates.iter().position(|candidate| candidate.chosen);
        let Some(chosen) = chosen.filter(|_| candidates.len() > 1) else {
            logged.without_choice += 1;
            continue;
        };
        let outcome = outcomes.get(&candidates[chosen].route).and_then(|answers| {
            let next = answers.partition_point(|(sent_us, _)| *sent_us < at_us);
            let (sent_us, rtt_us) = answers.get(next)?;
            (sent_us - at_us <= FORECAST_AGE_US_MAX).then_some(*rtt_us as f64 / 1e3)
        });
        let Some(cost) = outcome else {
            logged.without_outcome += 1;
            continue;
        };
        let Some(Preference { target, predicted_ms }) = policy(&candidates) else {
            logged.without_preference += 1;
            continue;
        };
        let propensities = candidates.iter().filter_map(|candidate| candidate.propensity).collect();
        let first_us = logged.span_us.map_or(at_us, |(first_us, _)| first_us);
        logged.span_us = Some((first_us, at_us));
        let predicted = predicted_ms;
        logged.decisions.push(LoggedDecision { propensities, chosen, cost, target, predicted });
    }
    Ok(logged)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::measure::Sample;

    use crate::engine::route::{Candidate, Decision, Reason};
    use crate::engine::types::{NodeId, Route, Timestamp};
    use crate::learn::offpolicy::{OffPolicyError, judge};
    use crate::store::{Retention, Writer};

    const START_US: u64 = 1_700_000_000_000_000;
    const SECOND: u64 = 1_000_000;

    fn route(relay: u8) -> Route {
        Route::new([NodeId([1; 8]), NodeId([relay; 8]), NodeId([2; 8])]).unwrap()
    }

    /// A decision for relay 7, which was taken with this probability and else 8, and never 9; forecast at
    /// 20, 10 and 5 ms.
    fn decision(at_us: u64, propensity: f64) -> Decision {
        let candidate = |relay, average_ms, propensity| {
            let mut candidate = Candidate { propensity, ..Candidate::unknown(route(relay)) };
            candidate.forecast.moving_average = Some(Prediction::of_latency(average_ms));
            candidate
        };
        let candidates = vec![
            candidate(7, 20.0, propensity),
            candidate(8, 10.0, 1.0 - propensity),
            candidate(9, 5.0, 0.0),
        ];
        Decision { reason: Reason::Best, ..Decision::held(START_US + at_us, candidates, 0) }
    }

    fn probe(relay: u8, at_us: u64, rtt_ms: Option<u64>) -> Sample {
        Sample::Probe {
            kind: ProbeKind::Route,
            route: route(relay),
            sent_at: Timestamp(START_US + at_us),
            done_at: Timestamp(START_US + at_us + SECOND),
            rtt_us: rtt_ms.map(|ms| ms * 1_000),
        }
    }

    fn read(decisions: &[Decision], probes: &[Sample], by: Policy) -> Logged {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store.db");
        let writer = Writer::start(&path, Retention::default()).unwrap();
        decisions.iter().for_each(|decision| writer.decision(decision.clone(), 1));
        probes.iter().for_each(|probe| writer.write(probe.clone()));
        writer.flush().unwrap();
        logged_decisions(&Reader::open(&path).unwrap(), 0, by).unwrap()
    }

    type Policy = fn(&[CandidateRow]) -> Option<Preference>;
    const BY_AVERAGE: Policy =
        |rows| Preference::lowest(rows, |row| row.moving_average_ms.map(Prediction::of_latency));

    #[test]
    fn a_decision_meets_the_next_answer_of_its_route() {
        let decisions = [decision(100 * SECOND, 0.9)];
        let at = |sent_us, relay, rtt_ms| {
            let before = probe(7, 100 * SECOND - 1, Some(99));
            read(&decisions, &[before, probe(relay, sent_us, rtt_ms)], BY_AVERAGE)
        };
        for sent_us in [100 * SECOND, 110 * SECOND] {
            let logged = at(sent_us, 7, Some(30));
            let [found] = &logged.decisions[..] else { panic!("{logged:?}") };
            // What had no chance is no candidate, although it is forecast to be the fastest.
            assert_eq!(found.target, [0.0, 1.0]);
            assert_eq!(found.predicted, [20.0, 10.0]);
            assert_eq!((found.chosen, found.cost), (0, 30.0));
            assert_eq!(found.propensities[0], 0.9);
            assert!((found.propensities[1] - 0.1).abs() < 1e-12);
            assert_eq!(logged.span_us, Some((START_US + 100 * SECOND, START_US + 100 * SECOND)));
        }
        for unfit in [
            at(110 * SECOND + 1, 7, Some(30)),
            at(101 * SECOND, 8, Some(30)),
            at(101 * SECOND, 7, None),
        ] {
            assert_eq!((unfit.decisions.len(), unfit.without_outcome), (0, 1));
        }
    }

    #[test]
    fn what_had_no_choice_or_shares_its_outcome_is_left_out() {
        let mut forced = decision(0, 0.9);
        forced.reason = Reason::Forced;
        let mut asked = decision(SECOND, 0.9);
        asked.tunnel = None;
        let mut nowhere = decision(2 * SECOND, 0.9);
        (nowhere.chosen, nowhere.reason) = (None, Reason::NoRoute);
        let mut decisions = vec![forced, asked, nowhere];
        decisions.extend((20..60).map(|second| decision(second * SECOND, 0.9)));
        let probes: Vec<Sample> = (0..80).map(|s| probe(7, s * SECOND, Some(s))).collect();
        let logged = read(&decisions, &probes, BY_AVERAGE);
        let costs: Vec<f64> = logged.decisions.iter().map(|decision| decision.cost).collect();
        assert_eq!(costs, [20.0, 30.0, 40.0, 50.0]);
        assert_eq!((logged.without_outcome, logged.without_preference), (0, 0));
        let nobody = read(&decisions, &probes, |_| None);
        assert_eq!((nobody.decisions.len(), nobody.without_preference), (0, 4));
    }

    #[test]
    fn the_log_of_a_router_that_never_explores_holds_nothing_to_judge_on() {
        let of = |propensity| {
            let decisions: Vec<Decision> =
                (0..300).map(|i| decision(10 * i * SECOND, propensity)).collect();
            let probes: Vec<Sample> = (0..3_000).map(|s| probe(7, s * SECOND, Some(30))).collect();
            read(&decisions, &probes, BY_AVERAGE)
        };
        let silent = of(1.0);
        assert_eq!((silent.decisions.len(), silent.without_choice), (0, 300));
        let error = judge(&silent.decisions).unwrap_err();
        assert!(matches!(error, OffPolicyError::TooFew { decisions: 0, .. }), "{error}");
        assert_eq!(of(0.9).decisions.len(), 300);
    }
}
