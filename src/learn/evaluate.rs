//! Evaluation: forecasts against what then happened.

use std::collections::HashMap;

use polars::prelude::*;

use super::{LearnError, frame_error};
use crate::engine::measure::ProbeKind;
pub use crate::engine::predict::RTT_MS_MIN;
use crate::engine::predict::{Score, ln_error};
use crate::store::{CandidatePredictionRow, ProbeRow};

/// A forecast within this share of the truth is good.
pub const ACCURATE_SHARE: f64 = 0.2;
/// A forecast within this of the truth is good too (ms): below, scheduling decides.
pub const ACCURATE_MS: f64 = 5.0;
/// A forecast older than this says nothing about a probe (µs): ten decision intervals.
pub const FORECAST_AGE_US_MAX: u64 = 10_000_000;

/// The live comparison of the model with the baselines.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Realised {
    /// Answered probes that were compared, the same ones for all forecasters.
    pub rows: usize,
    /// The model; `None` when it forecast none of the probes. Then the baselines are scored on
    /// all probes that both of them forecast.
    pub model: Option<Score>,
    /// The moving average.
    pub moving_average: Score,
    /// The last value.
    pub last_value: Score,
    /// When the first probe that was compared left (µs since the epoch); 0 without any.
    pub since_us: u64,
}

/// Scores pairs of truth and forecast (ms); all zero of nothing.
pub fn score(pairs: impl IntoIterator<Item = (f64, f64)>) -> Score {
    let (mut count, mut good, mut absolute, mut squared) = (0_usize, 0_usize, 0.0, 0.0);
    for (truth_ms, forecast_ms) in pairs {
        let error_ms = (forecast_ms - truth_ms).abs();
        let error_ln = ln_error(forecast_ms, truth_ms);
        count += 1;
        good += usize::from(error_ms <= (ACCURATE_SHARE * truth_ms).max(ACCURATE_MS));
        absolute += error_ms;
        squared += error_ln * error_ln;
    }
    let share = |sum: f64| if count == 0 { 0.0 } else { sum / count as f64 };
    Score { accuracy: share(good as f64), mae_ms: share(absolute), rmse_ln: share(squared).sqrt() }
}

/// Joins each answered route probe with the newest forecast for its route made before it left,
/// at most [`FORECAST_AGE_US_MAX`] old, and scores the forecasters on the same probes. The inputs
/// may be in any order.
///
/// # Errors
/// [`LearnError::Frame`] when polars refuses, which no input is known to cause.
pub fn realised_accuracy(
    predictions: &[CandidatePredictionRow],
    probes: &[ProbeRow],
) -> Result<Realised, LearnError> {
    let joined = join(predictions, probes).map_err(frame_error("compare forecasts and probes"))?;
    let with_model: Vec<&Compared> =
        joined.iter().filter(|row| row.predicted_ms.is_some()).collect();
    let has_model = !with_model.is_empty();
    let rows = if has_model { with_model } else { joined.iter().collect() };
    let scored = |forecast: fn(&Compared) -> Option<f64>| {
        score(rows.iter().filter_map(|row| Some((row.rtt_ms, forecast(row)?))))
    };
    Ok(Realised {
        rows: rows.len(),
        model: has_model.then(|| scored(|row| row.predicted_ms)),
        moving_average: scored(|row| Some(row.moving_average_ms)),
        last_value: scored(|row| Some(row.last_value_ms)),
        since_us: rows.first().map_or(0, |row| row.sent_us),
    })
}

/// A probe with the forecasts that were made for it.
struct Compared {
    sent_us: u64,
    rtt_ms: f64,
    predicted_ms: Option<f64>,
    moving_average_ms: f64,
    last_value_ms: f64,
}

/// In order of `sent_us`; probes without both baselines are left out.
fn join(
    predictions: &[CandidatePredictionRow],
    probes: &[ProbeRow],
) -> PolarsResult<Vec<Compared>> {
    let mut ids: HashMap<&str, u32> = HashMap::new();
    let mut predictions: Vec<&CandidatePredictionRow> = predictions.iter().collect();
    predictions.sort_by_key(|row| row.at_us);
    let mut id = |route| {
        let next = ids.len() as u32;
        *ids.entry(route).or_insert(next)
    };
    let values = |value: fn(&CandidatePredictionRow) -> Option<f64>| {
        predictions.iter().map(|row| value(row)).collect::<Vec<Option<f64>>>()
    };
    let route_ids: Vec<u32> = predictions.iter().map(|row| id(row.route.as_str())).collect();
    let at_us: Vec<i64> = predictions.iter().map(|row| row.at_us as i64).collect();
    let right = DataFrame::new(
        predictions.len(),
        vec![
            Column::new("route_id".into(), route_ids),
            Column::new("at_us".into(), at_us),
            Column::new("predicted_ms".into(), values(|row| row.predicted_ms)),
            Column::new("moving_average_ms".into(), values(|row| row.moving_average_ms)),
            Column::new("last_value_ms".into(), values(|row| row.last_value_ms)),
        ],
    )?;

    let mut answered: Vec<(&ProbeRow, u64)> = probes
        .iter()
        .filter(|probe| probe.kind == ProbeKind::Route)
        .filter_map(|probe| Some((probe, probe.rtt_us?)))
        .collect();
    answered.sort_by_key(|(probe, _)| probe.sent_us);
    let route_ids: Vec<u32> = answered.iter().map(|(probe, _)| id(probe.route.as_str())).collect();
    let sent_us: Vec<i64> = answered.iter().map(|(probe, _)| probe.sent_us as i64).collect();
    let left = DataFrame::new(
        answered.len(),
        vec![Column::new("route_id".into(), route_ids), Column::new("sent_us".into(), sent_us)],
    )?;
    let found = left.join_asof_by(
        &right,
        "sent_us",
        "at_us",
        ["route_id"],
        ["route_id"],
        AsofStrategy::Backward,
        Some(AnyValue::Int64(FORECAST_AGE_US_MAX as i64)),
        false,
        false,
    )?;
    let column = |name| found.column(name)?.f64().map(Float64Chunked::to_vec);
    let (predicted, average) = (column("predicted_ms")?, column("moving_average_ms")?);
    let last = column("last_value_ms")?;
    let compared = answered.iter().enumerate().filter_map(|(index, (probe, rtt_us))| {
        Some(Compared {
            sent_us: probe.sent_us,
            rtt_ms: *rtt_us as f64 / 1e3,
            predicted_ms: predicted[index],
            moving_average_ms: average[index]?,
            last_value_ms: last[index]?,
        })
    });
    Ok(compared.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn probe(route: &str, sent_us: u64, rtt_us: Option<u64>) -> ProbeRow {
        let done_us = sent_us + rtt_us.unwrap_or(1_000_000);
        let (kind, route) = (ProbeKind::Route, route.into());
        ProbeRow { kind, route, hops: 1, sent_us, done_us, rtt_us }
    }

    fn forecast(
        route: &str,
        at_us: u64,
        predicted_ms: Option<f64>,
        average_ms: f64,
    ) -> CandidatePredictionRow {
        CandidatePredictionRow {
            route: route.into(),
            at_us,
            predicted_ms,
            moving_average_ms: Some(average_ms),
            last_value_ms: Some(average_ms + 1.0),
            model_version: "v1".into(),
            challenger_ms: None,
            challenger_version: None,
        }
    }

    #[test]
    fn a_score_of_known_values() {
        // 20 % of 100 ms; 5 ms at 10 ms; just outside both.
        let found = score([(100.0, 120.0), (10.0, 15.0), (100.0, 79.0), (10.0, 4.9)]);
        assert_eq!(found.accuracy, 0.5);
        assert!((found.mae_ms - (20.0 + 5.0 + 21.0 + 5.1) / 4.0).abs() < 1e-12);
        let e = std::f64::consts::E;
        assert!((score([(10.0, 10.0 * e), (10.0, 10.0 / e)]).rmse_ln - 1.0).abs() < 1e-12);
        assert_eq!(score([]), Score::default());
        assert!(score([(0.0, 0.0)]).rmse_ln.is_finite());
    }

    #[test]
    fn each_probe_meets_the_newest_fresh_forecast_made_before_it() {
        let second = 1_000_000;
        let predictions = [
            forecast("a>b", 100 * second, Some(10.0), 50.0),
            forecast("a>b", 102 * second, Some(20.0), 60.0),
            forecast("a>c", 103 * second, Some(99.0), 99.0),
        ];
        let only = |sent_us| {
            let probes = [probe("a>b", sent_us, Some(20_000))];
            realised_accuracy(&predictions, &probes).unwrap()
        };
        for (sent_us, error_ms) in [
            (101 * second, Some(10.0)),
            (102 * second, Some(10.0)),
            (102 * second + 1, Some(0.0)),
            (112 * second, Some(0.0)),
            (112 * second + 1, None),
            (100 * second, None),
        ] {
            let realised = only(sent_us);
            assert_eq!(realised.model.map(|score| score.mae_ms), error_ms, "at {sent_us}");
            assert_eq!(realised.since_us, if error_ms.is_some() { sent_us } else { 0 });
        }
    }

    #[test]
    fn all_are_scored_on_the_same_probes() {
        let predictions = [
            forecast("a>b", 10, Some(21.0), 40.0),
            forecast("a>b", 20, None, 20.0),
            forecast("a>b", 30, Some(19.0), 40.0),
        ];
        let probes = [
            probe("a>b", 31, Some(20_000)),
            probe("a>b", 11, Some(20_000)),
            probe("a>b", 21, Some(20_000)),
            probe("a>b", 32, None),
            probe("z>b", 33, Some(20_000)),
        ];
        let realised = realised_accuracy(&predictions, &probes).unwrap();
        assert_eq!((realised.rows, realised.since_us), (2, 11));
        assert_eq!(realised.model.unwrap().accuracy, 1.0);
        assert_eq!(realised.moving_average.accuracy, 0.0, "the good guess at 20 does not count");
        assert_eq!(realised.last_value.mae_ms, 21.0);
    }

    #[test]
    fn without_a_model_the_baselines_are_still_scored() {
        let predictions = [forecast("a>b", 10, None, 20.0)];
        let probes = [probe("a>b", 11, Some(20_000)), probe("a>b", 12, Some(40_000))];
        let realised = realised_accuracy(&predictions, &probes).unwrap();
        assert_eq!((realised.rows, realised.model), (2, None));
        assert_eq!(realised.moving_average.accuracy, 0.5);
        assert_eq!(realised_accuracy(&[], &probes).unwrap(), Realised::default());
        assert_eq!(realised_accuracy(&predictions, &[]).unwrap(), Realised::default());
    }
}
