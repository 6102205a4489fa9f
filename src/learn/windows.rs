//! Rolling windows over the probes of each route, in order of completion.

use polars::polars_compute::rolling::{RollingQuantileParams, no_nulls};
use polars::prelude::*;

use super::frames::{Ids, frame, rtt_ms};
use crate::engine::measure::HISTORY_WINDOW;
use crate::engine::measure::window_statistics::ln_ratio;
use crate::store::ProbeRow;

/// After each completed probe: the share lost of the window, and how many in a row.
pub(super) fn completed_windows<'a>(
    completed: &[&'a ProbeRow],
    ids: &mut Ids<'a>,
) -> PolarsResult<DataFrame> {
    let lost = completed.iter().map(|p| f64::from(p.rtt_us.is_none())).collect::<Vec<_>>();
    let whole = frame(vec![
        Column::new(
            "route_id".into(),
            completed.iter().map(|p| ids.of(&p.route)).collect::<Vec<_>>(),
        ),
        Column::new(
            "completed_us".into(),
            completed.iter().map(|p| p.done_us as i64).collect::<Vec<_>>(),
        ),
        Column::new("lost".into(), lost),
    ])?;
    per_route(&whole, |mut part| {
        let lost = contiguous(&part, "lost")?;
        let streak = lost.iter().scan(0.0, |streak, lost| {
            *streak = if *lost > 0.0 { *streak + 1.0 } else { 0.0 };
            Some(*streak)
        });
        let streak: Vec<f64> = streak.collect();
        part.with_column(rolling_mean("route_loss", &lost, HISTORY_WINDOW)?)?;
        part.with_column(Column::new("route_failure_streak".into(), streak))?;
        Ok(part)
    })
}

/// The windows over answered probes that the schema has, without the last value.
pub(super) const ANSWERED_WINDOWS: [&str; 8] = [
    "route_mean5_ms",
    "route_mean20_ms",
    "route_p10_ms",
    "route_median_ms",
    "route_p90_ms",
    "route_jitter_ms",
    "route_trend_ln",
    "route_drift_ln",
];

/// After each answered probe: its round trip and the statistics of the window that it ends.
pub(super) fn answered_windows<'a>(
    answered: &[&'a ProbeRow],
    ids: &mut Ids<'a>,
) -> PolarsResult<DataFrame> {
    let whole = frame(vec![
        Column::new(
            "route_id".into(),
            answered.iter().map(|p| ids.of(&p.route)).collect::<Vec<_>>(),
        ),
        Column::new(
            "answered_us".into(),
            answered.iter().map(|p| p.done_us as i64).collect::<Vec<_>>(),
        ),
        Column::new("route_last_ms".into(), answered.iter().map(|p| rtt_ms(p)).collect::<Vec<_>>()),
    ])?;
    per_route(&whole, |mut part| {
        let rtts = contiguous(&part, "route_last_ms")?;
        // A window of 20 values holds 19 differences; the first value of all has none.
        let differences: Vec<f64> = rtts.windows(2).map(|pair| (pair[1] - pair[0]).abs()).collect();
        let jitter = rolling_mean("route_jitter_ms", &differences, HISTORY_WINDOW - 1)?;
        let first = (!rtts.is_empty()).then_some(None);
        let jitter: Vec<Option<f64>> = first.into_iter().chain(jitter.f64()?.iter()).collect();
        let mean5 = rolling_mean("route_mean5_ms", &rtts, 5)?;
        let mean20 = rolling_mean("route_mean20_ms", &rtts, HISTORY_WINDOW)?;
        let ratios = |name: &str, above: &[f64], below: &[f64]| {
            let ratios = above.iter().zip(below).map(|(above, below)| ln_ratio(*above, *below));
            Column::new(name.into(), ratios.collect::<Vec<_>>())
        };
        let (short, long) = (values(&mean5)?, values(&mean20)?);
        for column in [
            ratios("route_trend_ln", &rtts, &short),
            ratios("route_drift_ln", &short, &long),
            mean5,
            mean20,
            rolling_quantile("route_p10_ms", &rtts, 0.1)?,
            rolling_quantile("route_median_ms", &rtts, 0.5)?,
            rolling_quantile("route_p90_ms", &rtts, 0.9)?,
            Column::new("route_jitter_ms".into(), jitter),
        ] {
            part.with_column(column)?;
        }
        Ok(part)
    })
}

/// Applies `windows` to the rows of each route and puts the results below each other.
fn per_route(
    whole: &DataFrame,
    windows: impl Fn(DataFrame) -> PolarsResult<DataFrame>,
) -> PolarsResult<DataFrame> {
    if whole.height() == 0 {
        return windows(whole.clone());
    }
    let mut result: Option<DataFrame> = None;
    for part in whole.partition_by_stable(["route_id"], true)? {
        let part = windows(part)?;
        match &mut result {
            Some(result) => {
                result.vstack_mut_owned(part)?;
            }
            None => result = Some(part),
        }
    }
    let mut result = result.unwrap_or_default();
    result.rechunk_mut();
    Ok(result)
}

fn contiguous(frame: &DataFrame, name: &str) -> PolarsResult<Vec<f64>> {
    values(frame.column(name)?)
}

fn values(column: &Column) -> PolarsResult<Vec<f64>> {
    Ok(column.f64()?.no_null_iter().collect())
}

/// Mean of each value and at most `window - 1` before it.
fn rolling_mean(name: &str, values: &[f64], window: usize) -> PolarsResult<Column> {
    if values.is_empty() {
        // The kernel expects at least one.
        return Ok(Column::new_empty(name.into(), &DataType::Float64));
    }
    let means = no_nulls::rolling_mean(values, window, 1, false, None, None)?;
    Ok(Series::try_from((PlSmallStr::from(name), means))?.into_column())
}

/// Linear quantile of each value and at most [`HISTORY_WINDOW`]` - 1` before it.
fn rolling_quantile(name: &str, values: &[f64], q: f64) -> PolarsResult<Column> {
    if values.is_empty() {
        return Ok(Column::new_empty(name.into(), &DataType::Float64));
    }
    let linear = RollingQuantileParams { prob: q, method: QuantileMethod::Linear };
    let parameters = Some(RollingFnParams::Quantile(linear));
    let found = no_nulls::rolling_quantile(values, HISTORY_WINDOW, 1, false, None, parameters)?;
    Ok(Series::try_from((PlSmallStr::from(name), found))?.into_column())
}
