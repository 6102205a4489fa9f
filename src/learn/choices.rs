//! What forecasts are for: what the choices by them would have cost.
//!
//! A node probes every candidate of its tunnels, so that for most decisions the cost of each is known: the
//! next answered probe, sent at the decision or at most [`FORECAST_AGE_US_MAX`] after it. On decisions of
//! which all candidates that lived have one, every forecaster takes the lowest bound, without a margin for
//! the route in use, and stands beside what was decided, the direct link, a rule of four metrics and the
//! best in hindsight. Unlike [`super::judging`] this needs no exploration; it leaves out what happens to
//! a route because it carries traffic.

use std::collections::HashMap;

use serde::Serialize;

use super::LearnError;
use super::compare::Named;
use super::evaluate::FORECAST_AGE_US_MAX;
use super::judging::ask;
use crate::engine::measure::ProbeKind;
use crate::engine::predict::schema::{MISSING, index};
use crate::engine::predict::{FeatureVector, MovingAverage, QualityModel};
use crate::store::{CandidateRow, Reader};

/// Unit of the four metrics where no direct link is among the candidates (ms).
const UNIT_MS: f64 = 100.0;

/// What one rule's choices cost.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Choice {
    /// Version, baseline or rule.
    pub name: String,
    /// Decisions in which it had a choice.
    pub decisions: usize,
    /// Mean round trip of its choices (ms).
    pub mean_ms: f64,
    /// Mean round trip of what was decided in the same ones (ms).
    pub decided_ms: f64,
}

/// A decision all of whose candidates' outcomes are known.
struct Known {
    candidates: Vec<CandidateRow>,
    costs_ms: Vec<f64>,
    decided: usize,
}

/// The choices of these forecasters and of the rules that need no model, on the decisions made at
/// `since_us` (µs since the epoch) or later. Empty without such decisions.
///
/// # Errors
/// [`LearnError::Store`].
pub(super) fn choices(
    reader: &Reader,
    since_us: u64,
    named: &[&Named],
) -> Result<Vec<Choice>, LearnError> {
    let known = known(reader, since_us)?;
    let of = |name: &str, choose: &dyn Fn(&Known) -> Option<usize>| {
        let (mut decisions, mut sum, mut decided) = (0, 0.0, 0.0);
        for one in &known {
            let Some(chosen) = choose(one) else { continue };
            decisions += 1;
            sum += one.costs_ms[chosen];
            decided += one.costs_ms[one.decided];
        }
        let mean = |sum: f64| sum / f64::from(decisions.max(1));
        (decisions > 0).then(|| Choice {
            name: name.to_owned(),
            decisions: decisions as usize,
            mean_ms: mean(sum),
            decided_ms: mean(decided),
        })
    };
    let by_forecast = |named: &&Named| {
        of(named.name(), &|one| {
            lowest(&one.candidates, |row| Some(ask(named.model(), row)?.bound_ms))
        })
    };
    let mut all: Vec<Option<Choice>> = vec![of("as decided", &|one| Some(one.decided))];
    all.extend(named.iter().map(by_forecast));
    all.push(of("four-metric", &|one| four_metric(&one.candidates)));
    all.push(of("direct", &|one| one.candidates.iter().position(is_direct)));
    let hindsight = |one: &Known| {
        let costs = one.costs_ms.iter().enumerate();
        costs.min_by(|(_, a), (_, b)| a.total_cmp(b)).map(|(at, _)| at)
    };
    all.push(of("best in hindsight", &hindsight));
    Ok(all.into_iter().flatten().collect())
}

fn known(reader: &Reader, since_us: u64) -> Result<Vec<Known>, LearnError> {
    let mut probes: HashMap<String, Vec<(u64, Option<u64>)>> = HashMap::new();
    for probe in reader.probes(ProbeKind::Route, since_us)? {
        probes.entry(probe.route).or_default().push((probe.sent_us, probe.rtt_us));
    }
    let mut all = Vec::new();
    for mut row in reader.decisions_apart(since_us, FORECAST_AGE_US_MAX)? {
        row.candidates.retain(|candidate| candidate.alive);
        let next = |candidate: &CandidateRow| {
            let of_route = probes.get(&candidate.route)?;
            let at = of_route.partition_point(|(sent_us, _)| *sent_us < row.at_us);
            let (sent_us, rtt_us) = of_route.get(at)?;
            // The first one: to pass over lost ones would make routes that lose look free.
            let in_time = sent_us - row.at_us <= FORECAST_AGE_US_MAX;
            rtt_us.filter(|_| in_time).map(|rtt_us| rtt_us as f64 / 1e3)
        };
        let costs_ms: Option<Vec<f64>> = row.candidates.iter().map(next).collect();
        let decided = row.candidates.iter().position(|candidate| candidate.chosen);
        if let (Some(costs_ms), Some(decided), true) = (costs_ms, decided, row.candidates.len() > 1)
        {
            all.push(Known { candidates: row.candidates, costs_ms, decided });
        }
    }
    Ok(all)
}

/// The candidate of the lowest number; `None` when one has none.
fn lowest(rows: &[CandidateRow], of: impl Fn(&CandidateRow) -> Option<f64>) -> Option<usize> {
    let numbers: Vec<f64> = rows.iter().map(of).collect::<Option<_>>()?;
    (0..numbers.len()).min_by(|a, b| numbers[*a].total_cmp(&numbers[*b]))
}

fn is_direct(row: &CandidateRow) -> bool {
    row.route.matches('>').count() == 1
}

/// Moving average, jitter and error of the mean in units of the direct link's average, and loss, a quarter
/// each, as the replay's rule of that name has it without its memory of the route in use.
fn four_metric(rows: &[CandidateRow]) -> Option<usize> {
    let features =
        |row: &CandidateRow| -> Option<FeatureVector> { row.features.as_slice().try_into().ok() };
    let average = |features: &FeatureVector| Some(MovingAverage.predict(features)?.latency_ms);
    let direct = rows.iter().find(|row| is_direct(row)).and_then(|row| average(&features(row)?));
    let unit = direct.unwrap_or(UNIT_MS);
    lowest(rows, |row| {
        let features = features(row)?;
        let first = |of: [usize; 2]| {
            of.into_iter().map(|at| features[at]).find(|value| *value != MISSING).unwrap_or(0.0)
        };
        let jitter = first(const { [index("route_jitter_ms"), index("link_jitter_sum_ms")] });
        let error = first(const { [index("route_error60_ms"), index("link_error60_sum_ms")] });
        let loss = first(const { [index("route_loss"), index("link_loss")] });
        Some(0.25 * ((average(&features)? + jitter + error) / unit + loss))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::predict::schema::FEATURES;

    fn row(route: &str, average_ms: f64, loss: f64) -> CandidateRow {
        let mut features = vec![MISSING; FEATURES.len()];
        features[const { index("route_mean5_ms") }] = average_ms;
        features[const { index("route_loss") }] = loss;
        CandidateRow {
            route: route.into(),
            alive: true,
            chosen: false,
            score: 0.5,
            baseline_score: 0.5,
            predicted_ms: None,
            predicted_interval_ms: None,
            challenger_ms: None,
            moving_average_ms: None,
            last_value_ms: None,
            propensity: None,
            features,
        }
    }

    #[test]
    fn four_metrics_weigh_loss_against_latency() {
        let pick = |loss| four_metric(&[row("a>b", 100.0, 0.0), row("a>c>b", 80.0, loss)]);
        assert_eq!((pick(0.1), pick(0.3)), (Some(1), Some(0)));
        let mut older = row("a>b", 1.0, 0.0);
        older.features.pop();
        assert_eq!(four_metric(&[older, row("a>c>b", 80.0, 0.0)]), None, "another schema");
        assert!(is_direct(&row("a>b", 1.0, 0.0)) && !is_direct(&row("a>c>b", 1.0, 0.0)));
    }
}
