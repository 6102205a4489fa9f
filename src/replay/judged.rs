//! Are estimates from logged decisions right? Checked where the truth is known.
//!
//! From the decisions of a run a log is drawn as an exploring router would have written it: at
//! each, every candidate has a chance, the one of the lowest forecast the largest, and only the
//! cost of the drawn one is kept. From that log the estimators say what meshwise's choices would
//! have cost; the trace says what they did cost.

use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;
use serde::Serialize;

use super::run::{Outcome, Run};
use crate::learn::offpolicy::{Estimates, LoggedDecision, judge};

/// Share of the log's choices that are drawn evenly among the candidates.
const EXPLORATION: f64 = 0.5;
/// Logs that are drawn to see how often the interval holds the truth.
const LOGS: usize = 200;
/// Decisions of a log.
const LOG_DECISIONS: usize = 2_000;

/// What estimators say of meshwise's choices, beside the truth.
#[derive(Clone, Debug, Serialize)]
pub struct JudgedReport {
    /// What meshwise's choices cost (ms, mean over all decisions with a choice).
    pub truth_ms: f64,
    /// The estimates from the first log that was not refused; null when all were.
    pub estimates: Option<Estimates>,
    /// Logs drawn, each with its own seed.
    pub logs: usize,
    /// Logs whose doubly robust interval holds the truth.
    pub covered: usize,
    /// Logs on which the estimate was refused, because too little is known of the choices.
    pub refused: usize,
}

/// Draws logs from the decisions and compares estimates with the truth; `None` without enough
/// decisions that had a choice.
pub fn check(runs: &[Run]) -> Option<JudgedReport> {
    let outcomes: Vec<&Outcome> = runs
        .iter()
        .flat_map(|run| &run.outcomes)
        .filter(|outcome| outcome.candidates_ms.len() >= 2)
        .collect();
    if outcomes.len() < LOG_DECISIONS {
        return None;
    }
    let cost = |outcome: &&Outcome| outcome.candidates_ms[outcome.chosen].1;
    let truth_ms = outcomes.iter().map(cost).sum::<f64>() / outcomes.len() as f64;
    let mut first = None;
    let (mut covered, mut refused) = (0, 0);
    for log in 0..LOGS {
        let mut random = Pcg64Mcg::seed_from_u64(log as u64);
        let decisions: Vec<LoggedDecision> = (0..LOG_DECISIONS)
            .map(|_| logged(outcomes[random.random_range(0..outcomes.len())], &mut random))
            .collect();
        match judge(&decisions) {
            Ok(estimates) => {
                let robust = estimates.doubly_robust;
                covered += usize::from(robust.low <= truth_ms && truth_ms <= robust.high);
                first = first.or(Some(estimates));
            }
            Err(_) => refused += 1,
        }
    }
    Some(JudgedReport { truth_ms, estimates: first, logs: LOGS, covered, refused })
}

fn logged(outcome: &Outcome, random: &mut Pcg64Mcg) -> LoggedDecision {
    let candidates = &outcome.candidates_ms;
    let count = candidates.len();
    let lowest = (0..count).min_by(|a, b| candidates[*a].0.total_cmp(&candidates[*b].0));
    let mut propensities = vec![EXPLORATION / count as f64; count];
    propensities[lowest.unwrap_or(0)] += 1.0 - EXPLORATION;
    let explores = random.random_bool(EXPLORATION);
    let chosen = if explores { random.random_range(0..count) } else { lowest.unwrap_or(0) };
    let mut target = vec![0.0; count];
    target[outcome.chosen] = 1.0;
    LoggedDecision {
        propensities,
        chosen,
        cost: candidates[chosen].1,
        target,
        predicted: candidates.iter().map(|(forecast_ms, _)| *forecast_ms).collect(),
    }
}
