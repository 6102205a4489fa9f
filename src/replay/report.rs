//! What a replay says: one row a policy, the quality of the forecasts, all with intervals.
//!
//! Intervals are 95 % and come from a block bootstrap: the decisions of all seeds are grouped by
//! time into blocks, and blocks are drawn with replacement (Künsch, 1989), because decisions of
//! one moment share what happened then.

use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;
use serde::Serialize;

use super::meshwise::{LEVELS, Mixed};
use super::policy::{MESHWISE, NAMES, ORACLE};
use super::run::{Forecasted, Outcome, Run};
use crate::engine::measure::window_statistics::quantile;
use crate::engine::predict::Ranking;
use crate::learn::evaluate::{ACCURATE_MS, ACCURATE_SHARE};

/// Blocks of time; fewer when there are fewer moments.
const BLOCKS_MAX: usize = 60;
/// Bootstrap draws.
const DRAWS: usize = 400;
/// A choice is worse than direct when it costs this much more.
const WORSE_SHARE: f64 = 0.1;

/// A number with its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Bounded {
    /// The number.
    pub value: f64,
    /// Lower and upper end.
    pub ci: (f64, f64),
}

/// Quantiles of what a policy's choices cost.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Latency {
    /// Mean (ms).
    pub mean: f64,
    /// Median (ms).
    pub p50: f64,
    /// 95th percentile (ms).
    pub p95: f64,
    /// 99th percentile (ms).
    pub p99: f64,
}

/// How one policy did.
#[derive(Clone, Debug, Serialize)]
pub struct PolicyReport {
    /// Its name.
    pub name: &'static str,
    /// What its choices cost.
    pub latency_ms: Latency,
    /// Its cost over the direct route's, summed over decisions; null where no direct link is.
    pub relative_to_direct: Option<f64>,
    /// (direct - policy) / (direct - oracle), summed over decisions.
    pub share_of_oracle_gain: Option<f64>,
    /// Share of decisions that cost more than a tenth above direct.
    pub worse_than_direct_10pct: Option<f64>,
    /// Changes of route for each pair and hour of scored time.
    pub route_changes_per_hour: f64,
    /// Intervals of these figures and the mean (ms).
    pub ci: Intervals,
    /// Mean cost above meshwise's (ms): above 0, meshwise is better.
    pub above_meshwise_ms: Bounded,
}

/// Intervals of a policy's figures.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Intervals {
    /// Of `relative_to_direct`.
    pub relative_to_direct: Option<(f64, f64)>,
    /// Of `share_of_oracle_gain`.
    pub share_of_oracle_gain: Option<(f64, f64)>,
    /// Of `worse_than_direct_10pct`.
    pub worse_than_direct_10pct: Option<(f64, f64)>,
    /// Of the mean (ms).
    pub mean_ms: (f64, f64),
}

/// How good meshwise's forecasts of fresh, later end-to-end measurements were.
#[derive(Clone, Debug, Serialize)]
pub struct PredictionReport {
    /// Forecasts that were compared.
    pub forecasts: usize,
    /// Share within max(20 % of the truth, 5 ms), averaged over pairs.
    pub accuracy: f64,
    /// The same within max(10 %, 5 ms).
    pub accuracy_10pct: f64,
    /// The same within max(15 %, 5 ms).
    pub accuracy_15pct: f64,
    /// Accuracy of the last value and of the moving average on the same measurements.
    pub naive_accuracy: [f64; 2],
    /// Median absolute relative error.
    pub mdape: f64,
    /// 1 - sum of absolute errors over sum of truths.
    pub one_minus_nmae: f64,
    /// Rank correlation of forecast and truth (Spearman).
    pub spearman: f64,
    /// 1 - mean absolute ln error over that of the best naive predictor.
    pub skill_vs_best_naive: Bounded,
    /// Which naive predictor was best.
    pub best_naive: &'static str,
    /// Share of truths inside the 90 % interval.
    pub coverage_90: f64,
    /// The same within an hour after a labelled change; null without labels.
    pub coverage_90_after_change: Option<f64>,
    /// Mean width of the interval over the truth.
    pub width_90: f64,
    /// Stated and observed coverage at ten levels, the intervals adapted online at each.
    pub calibration: Vec<Calibration>,
    /// By how much the mean absolute ln error of the mix may exceed the moving average's, as the mix
    /// itself states it ([`Mix::slack`](crate::engine::predict::Mix::slack)): for outcomes that are known at once.
    pub slack_ln: f64,
    /// By how much it did, outcomes as late as they are; below 0, the mix was better.
    pub excess_over_moving_average_ln: f64,
    /// The pair whose forecasts were worst against the moving average, and by how much in mean
    /// absolute ln error; below 0, no pair was worse.
    pub worst_pair: (String, f64),
}

/// Coverage at one level.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Calibration {
    /// What the interval is to hold.
    pub nominal: f64,
    /// What it held.
    pub observed: f64,
}

/// The fixed ranking rule that would have been best, known only afterwards, among the candidates that
/// meshwise looked at.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct HindsightReport {
    /// The rule.
    pub rule: Ranking,
    /// What it would have paid (ms, mean).
    pub mean_ms: f64,
    /// What meshwise paid on the same decisions (ms, mean).
    pub meshwise_ms: f64,
    /// The rule's cost over the direct route's; null where no direct link is.
    pub relative_to_direct: Option<f64>,
    /// Decisions of which the outcome of every candidate is known.
    pub decisions: u64,
}

/// All scored decisions by block of time.
struct Blocks<'a> {
    blocks: Vec<Vec<&'a Outcome>>,
}

/// What sums a block adds to: cost of policy, direct, oracle, meshwise, decisions worse than direct,
/// and count.
type Sums = [f64; 6];

/// Items in order of time, cut into blocks; what happened in one moment stays together.
fn in_blocks<T>(mut items: Vec<T>, t_s: impl Fn(&T) -> f64) -> Vec<Vec<T>> {
    items.sort_by(|a, b| t_s(a).total_cmp(&t_s(b)));
    let mut moments: Vec<f64> = items.iter().map(&t_s).collect();
    moments.dedup();
    let per_block = moments.len().div_ceil(BLOCKS_MAX).max(1);
    let starts: Vec<f64> = moments.chunks(per_block).map(|chunk| chunk[0]).collect();
    let mut blocks: Vec<Vec<T>> = starts.iter().map(|_| Vec::new()).collect();
    for item in items {
        let at = starts.partition_point(|start| *start <= t_s(&item)).saturating_sub(1);
        blocks[at].push(item);
    }
    blocks
}

impl<'a> Blocks<'a> {
    fn new(runs: &'a [Run]) -> Self {
        let outcomes = runs.iter().flat_map(|run| &run.outcomes).collect();
        Self { blocks: in_blocks(outcomes, |outcome: &&Outcome| outcome.t_s) }
    }

    fn sums(&self, policy: usize) -> Vec<Sums> {
        let sum = |block: &Vec<&Outcome>| {
            block.iter().fold([0.0; 6], |mut sums, outcome| {
                let cost_ms = outcome.costs_ms[policy];
                sums[0] += cost_ms;
                sums[1] += outcome.direct_ms;
                sums[2] += outcome.costs_ms[ORACLE];
                sums[3] += outcome.costs_ms[MESHWISE];
                sums[4] += f64::from(cost_ms > outcome.direct_ms * (1.0 + WORSE_SHARE));
                sums[5] += 1.0;
                sums
            })
        };
        self.blocks.iter().map(sum).collect()
    }
}

fn total(blocks: &[Sums], drawn: impl Iterator<Item = usize>) -> Sums {
    drawn.fold([0.0; 6], |mut sums, at| {
        sums.iter_mut().zip(blocks[at]).for_each(|(sum, more)| *sum += more);
        sums
    })
}

/// A figure of all blocks with its bootstrap interval. The same draws for every call.
fn bounded(blocks: &[Sums], figure: impl Fn(&Sums) -> f64) -> Bounded {
    let value = figure(&total(blocks, 0..blocks.len()));
    let mut random = Pcg64Mcg::seed_from_u64(0);
    let draw = |_| {
        let drawn: Vec<usize> =
            (0..blocks.len()).map(|_| random.random_range(0..blocks.len())).collect();
        figure(&total(blocks, drawn.into_iter()))
    };
    let draws: Vec<f64> = (0..DRAWS).map(draw).collect();
    let at = |q| quantile(&draws, q).unwrap_or(value);
    Bounded { value, ci: (at(0.025), at(0.975)) }
}

/// One row a policy.
pub fn policies(runs: &[Run]) -> Vec<PolicyReport> {
    let blocks = Blocks::new(runs);
    let outcomes: Vec<&Outcome> = runs.iter().flat_map(|run| &run.outcomes).collect();
    if outcomes.is_empty() {
        return Vec::new();
    }
    let has_direct = outcomes.iter().all(|outcome| outcome.direct_ms.is_finite());
    let row = |(policy, name): (usize, &'static str)| {
        let costs: Vec<f64> = outcomes.iter().map(|outcome| outcome.costs_ms[policy]).collect();
        let at = |q| quantile(&costs, q).unwrap_or(0.0);
        let sums = blocks.sums(policy);
        let mean = bounded(&sums, |s| s[0] / s[5]);
        let relative = has_direct.then(|| bounded(&sums, |s| s[0] / s[1]));
        let gain = |s: &Sums| (s[1] - s[0]) / (s[1] - s[2]).max(1e-9);
        let some_gain = sums.iter().any(|s| s[1] - s[2] > 1e-6);
        let share = (has_direct && some_gain).then(|| bounded(&sums, gain));
        let worse = has_direct.then(|| bounded(&sums, |s| s[4] / s[5]));
        PolicyReport {
            name,
            latency_ms: Latency { mean: mean.value, p50: at(0.5), p95: at(0.95), p99: at(0.99) },
            relative_to_direct: relative.map(|bounded| bounded.value),
            share_of_oracle_gain: share.map(|bounded| bounded.value),
            worse_than_direct_10pct: worse.map(|bounded| bounded.value),
            route_changes_per_hour: changes_per_hour(runs, policy),
            ci: Intervals {
                relative_to_direct: relative.map(|bounded| bounded.ci),
                share_of_oracle_gain: share.map(|bounded| bounded.ci),
                worse_than_direct_10pct: worse.map(|bounded| bounded.ci),
                mean_ms: mean.ci,
            },
            above_meshwise_ms: bounded(&sums, |s| (s[0] - s[3]) / s[5]),
        }
    };
    NAMES.into_iter().enumerate().map(row).collect()
}

/// The best fixed rule over all seeds; `None` without a decision all of whose outcomes are known.
pub fn best_fixed_rule(runs: &[Run]) -> Option<HindsightReport> {
    let mut costs: Vec<(Ranking, f64)> = Vec::new();
    for run in runs {
        for (index, (rule, cost)) in run.rules.ledger().costs().enumerate() {
            match costs.get_mut(index) {
                Some((_, sum)) => *sum += cost,
                None => costs.push((*rule, cost)),
            }
        }
    }
    let decisions: u64 = runs.iter().map(|run| u64::from(run.rules.ledger().choices())).sum();
    let (rule, cost) = costs.into_iter().min_by(|(_, a), (_, b)| a.total_cmp(b))?;
    let beside = |at: usize| runs.iter().map(|run| run.rules_beside_ms[at]).sum::<f64>();
    let mean = |sum: f64| sum / decisions as f64;
    let direct = Some(beside(1)).filter(|ms| ms.is_finite());
    (decisions > 0).then(|| HindsightReport {
        rule,
        mean_ms: mean(cost),
        meshwise_ms: mean(beside(0)),
        relative_to_direct: direct.map(|direct| cost / direct),
        decisions,
    })
}

/// Changes between consecutive decisions of a pair, for each pair and hour.
fn changes_per_hour(runs: &[Run], policy: usize) -> f64 {
    let mut changes = 0.0;
    let mut pair_hours = 0.0;
    for run in runs {
        let mut current = std::collections::BTreeMap::new();
        for outcome in &run.outcomes {
            let relay = outcome.relays[policy];
            if current.insert(outcome.pair, relay).is_some_and(|before| before != relay) {
                changes += 1.0;
            }
        }
        pair_hours += current.len() as f64 * run.scored_s / 3_600.0;
    }
    changes / f64::max(pair_hours, 1e-9)
}

/// The quality of all forecasts; `None` without any.
pub fn prediction(runs: &[Run], names: &[String]) -> Option<PredictionReport> {
    let forecasts: Vec<&Forecasted> = runs.iter().flat_map(|run| &run.forecasts).collect();
    if forecasts.is_empty() {
        return None;
    }
    let mut by_pair: std::collections::BTreeMap<_, Vec<&Forecasted>> = Default::default();
    for forecast in &forecasts {
        by_pair.entry(forecast.pair).or_default().push(forecast);
    }
    let accuracy = |share: f64, of: &dyn Fn(&Forecasted) -> f64| {
        let good =
            |f: &&&Forecasted| (of(f) - f.truth_ms).abs() <= (share * f.truth_ms).max(ACCURATE_MS);
        let of_pair =
            |all: &Vec<&Forecasted>| all.iter().filter(good).count() as f64 / all.len() as f64;
        by_pair.values().map(of_pair).sum::<f64>() / by_pair.len() as f64
    };
    let model = |f: &Forecasted| f.forecast_ms;
    let naive = |index: usize| move |f: &Forecasted| f.naive_ms[index];
    let count = forecasts.len() as f64;
    let ape: Vec<f64> = forecasts
        .iter()
        .map(|f| (f.forecast_ms - f.truth_ms).abs() / f.truth_ms.max(1e-3))
        .collect();
    let absolute: f64 = forecasts.iter().map(|f| (f.forecast_ms - f.truth_ms).abs()).sum();
    let truths: f64 = forecasts.iter().map(|f| f.truth_ms).sum();
    let (index, best_naive) = if ln_error(&forecasts, naive(0)) <= ln_error(&forecasts, naive(1)) {
        (0, "last value")
    } else {
        (1, "moving average")
    };
    let inside = |f: &&&Forecasted| f.interval_ms.0 <= f.truth_ms && f.truth_ms <= f.interval_ms.1;
    let after: Vec<&Forecasted> = forecasts.iter().copied().filter(|f| f.after_change).collect();
    let covered = |all: &[&Forecasted]| all.iter().filter(inside).count() as f64 / all.len() as f64;
    let width = |f: &&Forecasted| (f.interval_ms.1 - f.interval_ms.0) / f.truth_ms.max(1e-3);
    let excess = |(pair, all): (&(usize, usize), &Vec<&Forecasted>)| {
        let name = format!("{} > {}", names[pair.0], names[pair.1]);
        (name, ln_error(all, model) - ln_error(all, naive(1)))
    };
    let worst_pair = by_pair.iter().map(excess).max_by(|a, b| a.1.total_cmp(&b.1));
    let at_level = |(at, nominal): (usize, f64)| {
        let held = forecasts.iter().filter(|forecast| forecast.held[at]).count();
        Calibration { nominal, observed: held as f64 / count }
    };
    let mixed = runs.iter().fold(Mixed::default(), |sum, Run { mixed, .. }| Mixed {
        forecasts: sum.forecasts + mixed.forecasts,
        slack_ln: sum.slack_ln + mixed.slack_ln,
        excess_ln: sum.excess_ln + mixed.excess_ln,
    });
    let a_forecast = |ln: f64| ln / mixed.forecasts.max(1.0);
    Some(PredictionReport {
        forecasts: forecasts.len(),
        accuracy: accuracy(ACCURATE_SHARE, &model),
        accuracy_10pct: accuracy(0.1, &model),
        accuracy_15pct: accuracy(0.15, &model),
        naive_accuracy: [accuracy(ACCURATE_SHARE, &naive(0)), accuracy(ACCURATE_SHARE, &naive(1))],
        mdape: quantile(&ape, 0.5).unwrap_or(0.0),
        one_minus_nmae: 1.0 - absolute / truths.max(1e-9),
        spearman: spearman(&forecasts),
        skill_vs_best_naive: skill(&forecasts, index),
        best_naive,
        coverage_90: covered(&forecasts),
        coverage_90_after_change: (!after.is_empty()).then(|| covered(&after)),
        width_90: forecasts.iter().map(width).sum::<f64>() / count,
        calibration: LEVELS.into_iter().enumerate().map(at_level).collect(),
        slack_ln: a_forecast(mixed.slack_ln),
        excess_over_moving_average_ln: a_forecast(mixed.excess_ln),
        worst_pair: worst_pair.unwrap_or_default(),
    })
}

fn ln_error(forecasts: &[&Forecasted], of: impl Fn(&Forecasted) -> f64) -> f64 {
    let ln = |ms: f64| ms.max(1e-3).ln();
    let errors = forecasts.iter().map(|f| (ln(of(f)) - ln(f.truth_ms)).abs());
    errors.sum::<f64>() / forecasts.len().max(1) as f64
}

/// Skill against one naive predictor.
fn skill(forecasts: &[&Forecasted], naive: usize) -> Bounded {
    let of = |all: &Vec<&Forecasted>| {
        let count = all.len() as f64;
        let model = ln_error(all, |f| f.forecast_ms) * count;
        [model, ln_error(all, |f| f.naive_ms[naive]) * count, 0.0, 0.0, 0.0, count]
    };
    let blocks = in_blocks(forecasts.to_vec(), |forecast: &&Forecasted| forecast.t_s);
    let sums: Vec<Sums> = blocks.iter().map(of).collect();
    bounded(&sums, |s| 1.0 - s[0] / s[1].max(1e-12))
}

fn spearman(forecasts: &[&Forecasted]) -> f64 {
    let ranks = |of: &dyn Fn(&Forecasted) -> f64| {
        let mut order: Vec<usize> = (0..forecasts.len()).collect();
        order.sort_by(|a, b| of(forecasts[*a]).total_cmp(&of(forecasts[*b])));
        let mut ranks = vec![0.0; order.len()];
        let mut at = 0;
        while at < order.len() {
            let value = of(forecasts[order[at]]);
            let ties = order[at..].iter().take_while(|i| of(forecasts[**i]) == value).count();
            for index in &order[at..at + ties] {
                ranks[*index] = at as f64 + (ties as f64 - 1.0) / 2.0;
            }
            at += ties;
        }
        ranks
    };
    let (a, b) = (ranks(&|f| f.forecast_ms), ranks(&|f| f.truth_ms));
    let mean = (a.len() as f64 - 1.0) / 2.0;
    let product: f64 = a.iter().zip(&b).map(|(a, b)| (a - mean) * (b - mean)).sum();
    let squares = |ranks: &[f64]| ranks.iter().map(|rank| (rank - mean).powi(2)).sum::<f64>();
    product / (squares(&a) * squares(&b)).sqrt().max(1e-12)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::predict::{CENTRES_COUNT, Prospect};

    fn outcome(t_s: f64, cost: f64) -> Outcome {
        let mut costs_ms = [cost; NAMES.len()];
        costs_ms[ORACLE] = 50.0;
        let mut relays = [None; NAMES.len()];
        relays[0] = (t_s as usize).is_multiple_of(2).then_some(5);
        Outcome {
            t_s,
            pair: (0, 1),
            relays,
            costs_ms,
            direct_ms: 100.0,
            forecast_ms: cost,
            candidates_ms: Vec::new(),
            chosen: 0,
        }
    }

    #[test]
    fn figures_of_known_decisions() {
        let outcomes = (0..10).map(|at| outcome(f64::from(at), if at < 2 { 120.0 } else { 70.0 }));
        let run = Run { outcomes: outcomes.collect(), scored_s: 3_600.0, ..Run::default() };
        let rows = policies(&[run]);
        let row = &rows[0];
        assert!((row.relative_to_direct.unwrap() - 0.8).abs() < 1e-12);
        assert!((row.share_of_oracle_gain.unwrap() - 0.4).abs() < 1e-12);
        assert!((row.worse_than_direct_10pct.unwrap() - 0.2).abs() < 1e-12);
        let (low, high) = row.ci.worse_than_direct_10pct.unwrap();
        assert!(low < 0.2 && high > 0.2, "{low} {high}");
        assert_eq!(row.route_changes_per_hour, 9.0);
        let (low, high) = row.ci.relative_to_direct.unwrap();
        assert!(low < 0.8 && high > 0.8 && low >= 0.7 && high <= 1.2);
        assert_eq!(row.above_meshwise_ms.value, 0.0);
    }

    #[test]
    fn the_best_fixed_rule_is_that_of_all_seeds() {
        let prospect = |ms| Prospect {
            centre_ms: [ms; CENTRES_COUNT],
            spread_ms: [0.0; CENTRES_COUNT],
            ..Prospect::default()
        };
        let run = |relay_ms: f64, times: usize| {
            let mut run = Run::default();
            for _ in 0..times {
                // The relay looks a tenth better than the direct link of 100 ms.
                run.rules.observe(
                    &[prospect(100.0), prospect(90.0)],
                    Some(0),
                    Some(0),
                    &[100.0, relay_ms],
                );
                run.rules_beside_ms[0] += 100.0;
                run.rules_beside_ms[1] += 100.0;
            }
            run
        };
        let found = best_fixed_rule(&[run(150.0, 2), run(60.0, 1)]).unwrap();
        assert!(found.rule.margin >= 0.1, "it stays: {:?}", found.rule);
        assert_eq!((found.mean_ms, found.meshwise_ms, found.decisions), (100.0, 100.0, 3));
        let found = best_fixed_rule(&[run(150.0, 2), run(60.0, 9)]).unwrap();
        assert!(found.rule.margin < 0.1, "it goes: {:?}", found.rule);
        assert!((found.relative_to_direct.unwrap() - (300.0 + 540.0) / 1_100.0).abs() < 1e-12);
        assert_eq!(best_fixed_rule(&[Run::default()]), None);
    }

    #[test]
    fn forecasts_are_averaged_over_pairs() {
        let forecast = |pair, truth_ms, forecast_ms| Forecasted {
            pair,
            truth_ms,
            forecast_ms,
            interval_ms: (90.0, 110.0),
            held: std::array::from_fn(|level| level >= 4 && truth_ms < 150.0),
            naive_ms: [2.0 * truth_ms, 1.5 * truth_ms],
            after_change: false,
            t_s: 0.0,
        };
        // One pair with three good forecasts, one with a bad one.
        let forecasts = vec![
            forecast((0, 1), 100.0, 100.0),
            forecast((0, 1), 100.0, 110.0),
            forecast((0, 1), 100.0, 119.0),
            forecast((1, 0), 200.0, 100.0),
        ];
        let mixed = Mixed { forecasts: 4.0, slack_ln: 0.4, excess_ln: -0.2 };
        let run = Run { forecasts, mixed, ..Run::default() };
        let names = ["a".to_owned(), "b".to_owned()];
        let report = prediction(&[run], &names).unwrap();
        assert!((report.accuracy - 0.5).abs() < 1e-12);
        assert!((report.coverage_90 - 0.75).abs() < 1e-12);
        assert_eq!(report.best_naive, "moving average");
        assert!((report.slack_ln - 0.1).abs() < 1e-12);
        assert!((report.excess_over_moving_average_ln + 0.05).abs() < 1e-12);
        assert!(report.skill_vs_best_naive.value > 0.0);
        assert_eq!(report.worst_pair.0, "b > a");
        let observed: Vec<f64> = report.calibration.iter().map(|level| level.observed).collect();
        assert_eq!((observed[3], observed[4], observed.len()), (0.0, 0.75, 10));
        assert!(prediction(&[], &names).is_none());
    }
}
