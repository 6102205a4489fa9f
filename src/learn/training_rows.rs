//! The rows of a replay's last training as one Parquet file, so that another learner can be fitted on
//! exactly the same ones and compared on the same later ones.
//!
//! One row a usable row of training: `seed`, `split` (`fit`, `calibrate` or `test`), `sent_us`, `done_us`,
//! the features (64 bits, as the trees are grown on; -1,000,000: not known), `truth_ln` (what is
//! forecast, ln ms), `reference_ln` (what the trees predict the distance from, known beforehand) and
//! `forecast_ln` (what our latency head says).

use std::fs::File;
use std::path::Path;

use polars::prelude::*;

use super::rows::{parts, usable_rows};
use super::{LearnError, TrainConfig, TrainRow, file_error, frame_error};
use crate::engine::predict::ForestModel;
use crate::engine::predict::schema::FEATURES;

/// The rows of one seed and what was trained on them.
pub struct TrainedRows<'a> {
    /// Seed of the run.
    pub seed: u64,
    /// All rows that the training was given.
    pub rows: &'a [TrainRow],
    /// The model.
    pub model: &'a ForestModel,
}

/// One row of the file.
struct Line {
    seed: i64,
    split: &'static str,
    row: TrainRow,
    truth_ln: f64,
    reference_ln: f64,
    forecast_ln: f64,
}

/// Writes the answered rows of all seeds, each with the part that it had in the training by `config`;
/// those that no part could use, because they were answered too late, are left out. Returns their number.
///
/// # Errors
/// [`LearnError::File`] or [`LearnError::Frame`] when it cannot be written.
pub fn write_training_rows(
    path: &Path,
    trained: &[TrainedRows<'_>],
    config: &TrainConfig,
) -> Result<usize, LearnError> {
    let mut lines = Vec::new();
    for TrainedRows { seed, rows, model } in trained {
        let rows = usable_rows(rows, config.rows_max, |row| !row.is_traffic());
        let line = |split: &'static str, row: &TrainRow| {
            Some(Line {
                seed: *seed as i64,
                split,
                row: *row,
                truth_ln: row.rtt_ms?.ln(),
                reference_ln: model.latency.reference.ln(&row.features)?,
                forecast_ln: model.latency.ln(&row.features)?,
            })
        };
        let parts = parts(&rows, config);
        lines.extend(parts.known(|row| line("fit", row)).fit);
        lines.extend(parts.known(|row| line("calibrate", row)).calibrate);
        lines.extend(parts.known(|row| line("test", row)).test);
    }
    let mut columns = vec![
        Column::new("seed".into(), lines.iter().map(|l| l.seed).collect::<Vec<_>>()),
        Column::new("split".into(), lines.iter().map(|l| l.split).collect::<Vec<_>>()),
        Column::new(
            "sent_us".into(),
            lines.iter().map(|l| l.row.sent_us as i64).collect::<Vec<_>>(),
        ),
        Column::new(
            "done_us".into(),
            lines.iter().map(|l| l.row.done_us as i64).collect::<Vec<_>>(),
        ),
    ];
    let number = |name: &str, of: &dyn Fn(&Line) -> f64| {
        Column::new(name.into(), lines.iter().map(of).collect::<Vec<_>>())
    };
    for (index, feature) in FEATURES.iter().enumerate() {
        columns.push(number(feature.name, &|line| line.row.features[index]));
    }
    columns.push(number("truth_ln", &|line| line.truth_ln));
    columns.push(number("reference_ln", &|line| line.reference_ln));
    columns.push(number("forecast_ln", &|line| line.forecast_ln));
    let wrong = frame_error("write the training rows");
    let mut frame = DataFrame::new(lines.len(), columns).map_err(&wrong)?;
    let file = File::create(path).map_err(file_error("write", path))?;
    ParquetWriter::new(file).finish(&mut frame).map_err(wrong)?;
    Ok(lines.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::predict::schema::{MISSING, index};
    use crate::learn::{RouteKey, score, train_rows};

    #[test]
    fn the_file_holds_the_parts_of_the_training_and_what_it_came_to() {
        let row = |at: u64| {
            let mut features = [MISSING; FEATURES.len()];
            let level = 20.0 + (at % 17) as f64;
            for name in ["route_mean5_ms", "route_last_ms", "route_median3_ms", "route_median_5_ms"]
            {
                features[crate::engine::predict::schema::index_of(name).unwrap()] = level;
            }
            features[const { index("hop_count") }] = (1 + at % 3) as f64;
            TrainRow {
                key: RouteKey::default(),
                sent_us: at * 1_000_000,
                done_us: at * 1_000_000 + 1,
                rtt_ms: (at % 10 != 3).then_some(level * (1.0 + 0.1 * (at % 3) as f64)),
                bandwidth: None,
                features,
            }
        };
        let rows: Vec<TrainRow> = (0..500).map(row).collect();
        let config = TrainConfig { trees: 20, learning_rate: 0.3, ..TrainConfig::default() };
        let model = train_rows(&rows, &config, 0).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.parquet");
        let trained = TrainedRows { seed: 7, rows: &rows, model: &model };
        // Of 500 rows, 50 were lost.
        assert_eq!(write_training_rows(&path, &[trained], &config).unwrap(), 450);
        let frame = ParquetReader::new(File::open(&path).unwrap()).finish().unwrap();
        assert_eq!(frame.width(), 4 + FEATURES.len() + 3);
        let splits = frame.column("split").unwrap().str().unwrap();
        let count = |name| splits.iter().filter(|split| *split == Some(name)).count();
        let card = &model.card;
        let told = [card.rows_train, card.rows_calibrate, card.rows_test];
        assert_eq!(["fit", "calibrate", "test"].map(count), told);
        // The error on the rows marked as test is the one in the card.
        let number = |name: &str| frame.column(name).unwrap().f64().unwrap().to_vec();
        let pairs = number("truth_ln").into_iter().zip(number("forecast_ln")).zip(splits.iter());
        let test = pairs.filter(|(_, split)| *split == Some("test"));
        let pairs =
            test.map(|((truth, forecast), _)| (truth.unwrap().exp(), forecast.unwrap().exp()));
        assert!((score(pairs).rmse_ln - card.model.rmse_ln).abs() < 1e-9, "{card:?}");
        assert_eq!(number("route_last_ms")[0], Some(20.0));
    }
}
