//! Rolling windows over the values of each key (a route, or a link as one end advertises it), in
//! order of time.

use polars::polars_compute::rolling::{RollingQuantileParams, no_nulls};
use polars::prelude::*;

use crate::engine::measure::window_statistics::ln_ratio;
use crate::engine::measure::{STATISTICS, WINDOW};
use crate::engine::predict::schema::{LINK_STATISTICS, MEDIAN_20, index};

/// How a statistic follows from the newest values, with their number.
enum Rule {
    Last,
    Mean(usize),
    Quantile(usize, f64),
    /// Standard error of the mean.
    Error(usize),
    /// Population standard deviation.
    Deviation(usize),
    Min(usize),
}

/// In the order of [`STATISTICS`].
const RULES: [Rule; STATISTICS.len()] = [
    Rule::Last,
    Rule::Mean(5),
    Rule::Mean(20),
    Rule::Mean(60),
    Rule::Quantile(3, 0.5),
    Rule::Quantile(5, 0.1),
    Rule::Quantile(5, 0.25),
    Rule::Quantile(5, 0.5),
    Rule::Quantile(5, 0.9),
    Rule::Quantile(20, 0.1),
    Rule::Quantile(20, 0.25),
    Rule::Quantile(20, 0.5),
    Rule::Quantile(20, 0.9),
    Rule::Quantile(60, 0.1),
    Rule::Quantile(60, 0.25),
    Rule::Quantile(60, 0.5),
    Rule::Quantile(60, 0.9),
    Rule::Error(60),
    Rule::Deviation(5),
    Rule::Deviation(60),
    Rule::Min(60),
];
/// Positions among the statistics.
pub(super) const LAST: usize = 0;
pub(super) const MIN: usize = STATISTICS.len() - 1;
const MEAN_5: usize = index("link_mean5_sum_ms") - LINK_STATISTICS;
const MEAN_60: usize = index("link_mean60_sum_ms") - LINK_STATISTICS;
const P90_20: usize = index("link_p90_20_sum_ms") - LINK_STATISTICS;

/// The window that a value ends.
#[derive(Clone, Copy)]
pub(super) struct Summary {
    /// In the order of [`STATISTICS`].
    pub(super) statistics: [f64; STATISTICS.len()],
    /// Values in the longest window, 1 to [`WINDOW`].
    pub(super) count: usize,
}

/// For each value the statistics of the window that it ends among the values of its key.
pub(super) fn summaries(keys: &[u32], values: &[f64]) -> PolarsResult<Vec<Summary>> {
    let nothing = Summary { statistics: [0.0; STATISTICS.len()], count: 0 };
    let mut summaries = vec![nothing; values.len()];
    for positions in by_key(keys) {
        let own: Vec<f64> = positions.iter().map(|position| values[*position]).collect();
        for (index, rule) in RULES.iter().enumerate() {
            let found = rolling(&own, rule)?;
            for (position, value) in positions.iter().zip(found) {
                summaries[*position].statistics[index] = value;
            }
        }
        for (before, position) in positions.iter().enumerate() {
            summaries[*position].count = WINDOW.min(before + 1);
        }
    }
    Ok(summaries)
}

/// Mean absolute difference within the newest `window` values of each key; none of one value.
pub(super) fn jitters(
    keys: &[u32],
    values: &[f64],
    window: usize,
) -> PolarsResult<Vec<Option<f64>>> {
    let mut jitters = vec![None; values.len()];
    for positions in by_key(keys) {
        let pairs = positions.windows(2);
        let differences: Vec<f64> =
            pairs.map(|pair| (values[pair[1]] - values[pair[0]]).abs()).collect();
        // A window of 20 values holds 19 differences; the first value of all has none.
        let means = rolling(&differences, &Rule::Mean(window - 1))?;
        for (position, mean) in positions.iter().skip(1).zip(means) {
            jitters[*position] = Some(mean);
        }
    }
    Ok(jitters)
}

/// The failures of a key up to one of its events.
#[derive(Clone, Copy, Default)]
pub(super) struct Failures {
    /// Events so far.
    pub(super) events: usize,
    /// Failures among the newest events of the window.
    pub(super) recent: usize,
    /// Failures in a row.
    pub(super) streak: usize,
    /// The newest failure.
    pub(super) last_us: Option<u64>,
}

/// For each event, which is a time and whether it was a failure, those of its key up to it.
/// `window` events count as recent.
pub(super) fn failures(keys: &[u32], events: &[(u64, bool)], window: usize) -> Vec<Failures> {
    let mut failures = vec![Failures::default(); events.len()];
    for positions in by_key(keys) {
        let mut now = Failures::default();
        for (before, position) in positions.iter().enumerate() {
            let (at_us, failed) = events[*position];
            let gone = before.checked_sub(window).is_some_and(|gone| events[positions[gone]].1);
            now.events += 1;
            now.recent = now.recent + usize::from(failed) - usize::from(gone);
            now.streak = if failed { now.streak + 1 } else { 0 };
            now.last_us = if failed { Some(at_us) } else { now.last_us };
            failures[*position] = now;
        }
    }
    failures
}

/// Last over mean of 5, mean of 5 over mean of 60, 90th percentile over median of 20, each ln.
pub(super) fn shape(statistics: &[f64; STATISTICS.len()]) -> [f64; 3] {
    [(LAST, MEAN_5), (MEAN_5, MEAN_60), (P90_20, MEDIAN_20)]
        .map(|(above, below)| ln_ratio(statistics[above], statistics[below]))
}

/// The positions of each key, in order.
fn by_key(keys: &[u32]) -> Vec<Vec<usize>> {
    let count = keys.iter().max().map_or(0, |most| *most as usize + 1);
    let mut positions = vec![Vec::new(); count];
    for (position, key) in keys.iter().enumerate() {
        positions[*key as usize].push(position);
    }
    positions
}

/// A statistic of each value and those before it in the window.
fn rolling(values: &[f64], rule: &Rule) -> PolarsResult<Vec<f64>> {
    if values.is_empty() {
        // The kernels expect at least one value.
        return Ok(Vec::new());
    }
    let found = match *rule {
        Rule::Last => return Ok(values.to_vec()),
        Rule::Deviation(window) => return Ok(deviations(values, window)),
        Rule::Error(window) => {
            let deviations = deviations(values, window).into_iter().enumerate();
            let errors = deviations.map(|(before, d)| d / (window.min(before + 1) as f64).sqrt());
            return Ok(errors.collect());
        }
        Rule::Mean(window) => no_nulls::rolling_mean(values, window, 1, false, None, None)?,
        Rule::Min(window) => no_nulls::rolling_min(values, window, 1, false, None, None)?,
        Rule::Quantile(window, prob) => {
            let linear = RollingQuantileParams { prob, method: QuantileMethod::Linear };
            let linear = Some(RollingFnParams::Quantile(linear));
            no_nulls::rolling_quantile(values, window, 1, false, None, linear)?
        }
    };
    Ok(Series::try_from((PlSmallStr::EMPTY, found))?.f64()?.no_null_iter().collect())
}

/// Population standard deviations, each in two passes: the variance kernel carries a running sum
/// of squares, in which a value of a minute drowns those of a millisecond after it has left.
fn deviations(values: &[f64], window: usize) -> Vec<f64> {
    let ends = 1..=values.len();
    let deviation = |end: usize| {
        let window = &values[end.saturating_sub(window)..end];
        let mean = window.iter().sum::<f64>() / window.len() as f64;
        let squares: f64 = window.iter().map(|value| (value - mean).powi(2)).sum();
        (squares / window.len() as f64).sqrt()
    };
    ends.map(deviation).collect()
}
