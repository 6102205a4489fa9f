//! Training on a frame: its rows as the trainer takes them.

use polars::prelude::DataFrame;

use super::dataset::{KEY_COLUMNS, feature_rows};
use super::{LearnError, RouteKey, TrainConfig, TrainRow, frame_error, train_rows};
use crate::engine::predict::ForestModel;

/// [`train_rows`] on a frame of [`feature_frame`](super::feature_frame), in any order of rows; a
/// row without `rtt_ms` is a lost probe.
///
/// # Errors
/// As [`train_rows`], and [`LearnError::Frame`] when it is another kind of frame.
pub fn train(
    frame: &DataFrame,
    config: &TrainConfig,
    now_us: u64,
) -> Result<ForestModel, LearnError> {
    train_rows(&rows_of(frame)?, config, now_us)
}

/// The rows of a frame; a null `rtt_ms` is a lost probe.
pub(super) fn rows_of(frame: &DataFrame) -> Result<Vec<TrainRow>, LearnError> {
    let wrong = frame_error("read the training rows");
    let micros = |name| -> Result<Vec<u64>, LearnError> {
        let column = frame.column(name).and_then(|column| column.i64()).map_err(&wrong)?;
        Ok(column.iter().map(|us| us.unwrap_or(0).max(0) as u64).collect())
    };
    let (sent_us, done_us) = (micros("sent_us")?, micros("done_us")?);
    let rtts = frame.column("rtt_ms").and_then(|column| column.f64()).map_err(&wrong)?;
    let routes = frame.column(KEY_COLUMNS[0]).and_then(|column| column.str()).map_err(&wrong)?;
    let keys = routes.iter().map(|route| RouteKey::of(route.unwrap_or_default()));
    let measured = keys.zip(rtts.iter()).zip(sent_us.into_iter().zip(done_us));
    Ok(feature_rows(frame)?
        .into_iter()
        .zip(measured)
        .map(|(features, ((key, rtt_ms), (sent_us, done_us)))| TrainRow {
            key,
            sent_us,
            done_us,
            rtt_ms,
            bandwidth: None,
            features,
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use polars::prelude::*;

    use super::*;
    use crate::engine::predict::schema::FEATURES;
    use crate::learn::dataset::KEY_COLUMNS;

    #[test]
    fn a_null_round_trip_is_a_lost_probe() {
        let mut columns = vec![
            Column::new(KEY_COLUMNS[0].into(), ["a>b", "a>c>b"]),
            Column::new("sent_us".into(), [1_i64, 2]),
            Column::new("done_us".into(), [5_i64, 9]),
            Column::new("rtt_ms".into(), [Some(0.004), None]),
        ];
        for (index, feature) in FEATURES.iter().enumerate() {
            let value = index as f64;
            columns.push(Column::new(feature.name.into(), [value, -value]));
        }
        let frame = DataFrame::new(2, columns).unwrap();
        let rows = rows_of(&frame).unwrap();
        let told = |row: &TrainRow| (row.sent_us, row.done_us, row.rtt_ms, row.bandwidth);
        assert_eq!(told(&rows[0]), (1, 5, Some(0.004), None));
        assert_eq!(told(&rows[1]), (2, 9, None, None));
        let keys = [rows[0].key, rows[1].key];
        assert_eq!(keys, ["a>b", "a>c>b"].map(RouteKey::of));
        assert_eq!((rows[0].features[7], rows[1].features[7]), (7.0, -7.0));
        let few = train(&frame, &TrainConfig::default(), 0).unwrap_err();
        assert!(matches!(few, LearnError::TooFewRows { rows: 1, .. }), "{few}");
    }

    #[test]
    fn another_frame_is_refused() {
        let other = DataFrame::new(1, vec![Column::new("x".into(), [1.0])]).unwrap();
        let refused = train(&other, &TrainConfig::default(), 0);
        assert!(matches!(refused, Err(LearnError::Frame { .. })));
    }
}
