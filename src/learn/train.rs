//! Training: gradient-boosted trees on ln(ms), judged on the newest rows.
//!
//! The rule:
//! - Rows on which not even the moving average has an opinion are left out: online, the model is
//!   not asked there either.
//! - The split is by time. The newest rows are held out, and no row is fitted whose answer came
//!   after the first held-out probe had left, because nobody could have known it then.
//! - What is fitted is how far ln(ms) lies above a reference that is known when the probe leaves
//!   ([`Reference`], by default the last value), so that levels never seen can be predicted. The
//!   fit starts from the mean of that; the library's trees are flattened into the engine's arrays
//!   with the learning rate folded into the leaves.
//! - The interval is split conformal (Lei et al., 2018) with separate tails: the lower and upper
//!   quantile of the held-out residuals, with the finite-sample correction.
//! - Model, moving average and last value are scored on the same held-out rows.

use polars::prelude::DataFrame;
use serde_json::Value;
use sha2::{Digest, Sha256};
use smartcore::linalg::basic::matrix::DenseMatrix;
use smartcore::xgboost::{XGRegressor, XGRegressorParameters};

use super::dataset::feature_rows;
use super::evaluate::{RTT_MS_MIN, score};
use super::{LearnError, frame_error, registry};
use crate::engine::predict::schema::{FEATURES, schema_hash};
use crate::engine::predict::{
    FORMAT, FORMAT_VERSION, FeatureVector, ForestModel, Head, Interval, LastValue, ModelCard,
    MovingAverage, QualityModel, Ranking, Reference, Trees,
};

/// Fewest usable rows for training. A guess: below, the held-out quarter says nothing.
pub const ROWS_MIN: usize = 100;
/// Fewest rows to fit on, after the split.
pub const ROWS_FIT_MIN: usize = 50;
/// Share of held-out rows that the interval covers.
pub const COVERAGE: f64 = 0.9;
/// What is predicted.
const TARGET: &str = "ln_route_rtt_ms";

type Library = XGRegressor<f64, f64, DenseMatrix<f64>, Vec<f64>>;

/// How to train.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainConfig {
    /// Decides which rows each tree sees.
    pub seed: u64,
    /// Share of rows held out, the newest, 0.05 to 0.9.
    pub holdout_share: f64,
    /// Trees, 1 to 1,000.
    pub trees: usize,
    /// Depth of a tree, 1 to 8.
    pub depth: u16,
    /// Weight of each tree, above 0, at most 1.
    pub learning_rate: f64,
    /// Fewest rows in a leaf, 1 or more.
    pub min_child_weight: usize,
    /// Share of rows that each tree sees, above 0, at most 1 (Friedman, 2002).
    pub subsample: f64,
    /// What the trees predict the distance from.
    pub reference: Reference,
    /// Only the newest so many rows are used.
    pub rows_max: usize,
    /// Name of the version; `None` makes one of time and content.
    pub version: Option<String>,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            seed: 0,
            holdout_share: 0.25,
            trees: 100,
            depth: 4,
            learning_rate: 0.1,
            min_child_weight: 5,
            subsample: 0.8,
            reference: Reference::LastValue,
            rows_max: 50_000,
            version: None,
        }
    }
}

impl TrainConfig {
    fn check(&self) -> Result<(), LearnError> {
        let unit = |value: f64| value > 0.0 && value <= 1.0;
        let share = self.holdout_share;
        let checks = [
            ("holdout_share", share.to_string(), "0.05 to 0.9", (0.05..=0.9).contains(&share)),
            ("trees", self.trees.to_string(), "1 to 1000", (1..=1_000).contains(&self.trees)),
            ("depth", self.depth.to_string(), "1 to 8", (1..=8).contains(&self.depth)),
            (
                "learning_rate",
                self.learning_rate.to_string(),
                "above 0 and at most 1",
                unit(self.learning_rate),
            ),
            ("min_child_weight", "0".into(), "1 or more", self.min_child_weight >= 1),
            (
                "subsample",
                self.subsample.to_string(),
                "above 0 and at most 1",
                unit(self.subsample),
            ),
        ];
        for (name, value, range, good) in checks {
            if !good {
                return Err(LearnError::Config { name, value, range });
            }
        }
        self.version.as_deref().map_or(Ok(()), registry::check_version)
    }
}

/// A usable row.
#[derive(Clone, Copy)]
struct Row {
    sent_us: u64,
    done_us: u64,
    rtt_ms: f64,
    features: FeatureVector,
}

/// Trains on a frame of [`feature_frame`](super::feature_frame), in any order of rows. `now_us`
/// is the time of training (µs since the epoch). The same rows and seed give the same trees.
///
/// # Errors
/// [`LearnError::TooFewRows`], [`LearnError::Config`], [`LearnError::VersionName`],
/// [`LearnError::Frame`] when it is another kind of frame, [`LearnError::Fit`].
pub fn train(
    frame: &DataFrame,
    config: &TrainConfig,
    now_us: u64,
) -> Result<ForestModel, LearnError> {
    config.check()?;
    let rows = usable_rows(frame, config.rows_max)?;
    let few = |rows, needed, what| LearnError::TooFewRows { rows, needed, what };
    if rows.len() < ROWS_MIN {
        return Err(few(rows.len(), ROWS_MIN, "route probes (answered, with a history)"));
    }
    let held = (rows.len() as f64 * config.holdout_share).ceil() as usize;
    let (before, test) = rows.split_at(rows.len() - held.clamp(1, rows.len() - 1));
    let fit_rows: Vec<Row> =
        before.iter().copied().filter(|row| row.done_us < test[0].sent_us).collect();
    if fit_rows.len() < ROWS_FIT_MIN {
        return Err(few(fit_rows.len(), ROWS_FIT_MIN, "rows to fit on beside those held out"));
    }

    let above = |row: &Row| row.rtt_ms.ln() - reference(config, &row.features);
    let truth: Vec<f64> = fit_rows.iter().map(above).collect();
    let features: Vec<FeatureVector> = fit_rows.iter().map(|row| row.features).collect();
    let (library, parameters) = fit(&features, &truth, config)?;
    let mut trees = flatten(&library)?;
    trees.count_cover(&features);

    let residuals = test.iter().map(|row| above(row) - trees.evaluate(&row.features));
    let interval = conformal(residuals.collect(), COVERAGE);
    let scored = |predict: &dyn Fn(&FeatureVector) -> Option<f64>| {
        score(test.iter().filter_map(|row| Some((row.rtt_ms, predict(&row.features)?))))
    };
    let by = |baseline: &dyn QualityModel| {
        scored(&|features| baseline.predict(features).map(|prediction| prediction.latency_ms))
    };
    let card = ModelCard {
        created_us: now_us,
        trained_from_us: fit_rows[0].sent_us,
        trained_to_us: fit_rows.iter().map(|row| row.done_us).max().unwrap_or_default(),
        rows_train: fit_rows.len(),
        rows_test: test.len(),
        seed: config.seed,
        parameters,
        model: scored(&|f| Some((reference(config, f) + trees.evaluate(f)).exp())),
        moving_average: by(&MovingAverage),
        last_value: by(&LastValue),
    };
    Ok(ForestModel {
        format: FORMAT.into(),
        format_version: FORMAT_VERSION,
        version: config.version.clone().unwrap_or_else(|| version_of(&trees, now_us)),
        schema_hash: schema_hash(),
        feature_names: FEATURES.iter().map(|feature| feature.name.to_owned()).collect(),
        latency: Head {
            target: TARGET.into(),
            reference: config.reference,
            trees,
            scale: None,
            interval,
        },
        throughput: None,
        reliability: None,
        ranking: Ranking::default(),
        card,
    })
}

/// The reference of a usable row, ln(ms): every usable row has one.
fn reference(config: &TrainConfig, features: &FeatureVector) -> f64 {
    config.reference.ln(features).unwrap_or_default()
}

/// The newest rows with a history, in order of `sent_us`.
fn usable_rows(frame: &DataFrame, rows_max: usize) -> Result<Vec<Row>, LearnError> {
    let wrong = frame_error("read the training rows");
    let micros = |name| -> Result<Vec<u64>, LearnError> {
        let column = frame.column(name).and_then(|column| column.i64()).map_err(&wrong)?;
        Ok(column.iter().map(|us| us.unwrap_or(0).max(0) as u64).collect())
    };
    let (sent_us, done_us) = (micros("sent_us")?, micros("done_us")?);
    let rtts = frame.column("rtt_ms").and_then(|column| column.f64()).map_err(&wrong)?;
    let mut rows: Vec<Row> = feature_rows(frame)?
        .into_iter()
        .zip(rtts.iter())
        .zip(sent_us.into_iter().zip(done_us))
        .filter_map(|((features, rtt_ms), (sent_us, done_us))| {
            let rtt_ms = rtt_ms.filter(|rtt_ms| rtt_ms.is_finite())?.max(RTT_MS_MIN);
            MovingAverage.predict(&features)?;
            Some(Row { sent_us, done_us, rtt_ms, features })
        })
        .collect();
    rows.sort_by_key(|row| row.sent_us);
    rows.drain(..rows.len().saturating_sub(rows_max));
    Ok(rows)
}

/// The library's fit and its parameters as text.
fn fit(
    features: &[FeatureVector],
    truth: &Vec<f64>,
    config: &TrainConfig,
) -> Result<(Library, String), LearnError> {
    let wrong = |error: smartcore::error::Failed| LearnError::Fit(error.to_string());
    let matrix = matrix(features).map_err(wrong)?;
    let base = truth.iter().sum::<f64>() / truth.len().max(1) as f64;
    let parameters = XGRegressorParameters::default()
        .with_n_estimators(config.trees)
        .with_max_depth(config.depth)
        .with_learning_rate(config.learning_rate)
        .with_min_child_weight(config.min_child_weight)
        .with_base_score(base)
        .with_subsample(config.subsample)
        .with_seed(config.seed);
    let text = format!(
        "smartcore XGRegressor: trees={} depth={} learning_rate={} min_child_weight={} \
         subsample={} lambda={} gamma={} base_score={base}",
        config.trees,
        config.depth,
        config.learning_rate,
        config.min_child_weight,
        config.subsample,
        parameters.lambda,
        parameters.gamma,
    );
    Ok((Library::fit(&matrix, truth, parameters).map_err(wrong)?, text))
}

/// Column by column, which is how the library searches for splits.
fn matrix(rows: &[FeatureVector]) -> Result<DenseMatrix<f64>, smartcore::error::Failed> {
    let columns = (0..FEATURES.len()).flat_map(|index| rows.iter().map(move |row| row[index]));
    DenseMatrix::new(rows.len(), FEATURES.len(), columns.collect(), true)
}

/// The library keeps its trees private but serialises them.
fn flatten(library: &Library) -> Result<Trees, LearnError> {
    let wrong = || LearnError::Fit("its trees have an unknown form".into());
    let value =
        serde_json::to_value(library).map_err(|error| LearnError::Fit(error.to_string()))?;
    let parameter = |name: &str| value["parameters"][name].as_f64().ok_or_else(wrong);
    let mut trees = Trees { base: parameter("base_score")?, ..Trees::default() };
    let learning_rate = parameter("learning_rate")?;
    for tree in value["regressors"].as_array().ok_or_else(wrong)? {
        let root = push(tree, learning_rate, &mut trees).ok_or_else(wrong)?;
        trees.roots.push(root);
    }
    Ok(trees)
}

/// Appends a node and all below it, children behind their parent.
fn push(node: &Value, learning_rate: f64, trees: &mut Trees) -> Option<u32> {
    // An inner node has a value too, and a leaf may have a threshold; neither means anything.
    if node["left"].is_null() || node["right"].is_null() {
        return Some(trees.push_leaf(learning_rate * node["value"].as_f64()?));
    }
    let feature = u16::try_from(node["split_feature_idx"].as_u64()?).ok()?;
    let parent = trees.push_split(feature, node["threshold"].as_f64()?);
    let left = push(&node["left"], learning_rate, trees)?;
    let right = push(&node["right"], learning_rate, trees)?;
    trees.set_children(parent, left, right);
    Some(parent)
}

/// Quantiles of the residuals, each tail at rank `ceil((n + 1) q)`.
fn conformal(mut residuals: Vec<f64>, coverage: f64) -> Interval {
    residuals.sort_by(f64::total_cmp);
    let count = residuals.len();
    let q = 1.0 - (1.0 - coverage) / 2.0;
    let rank = (((count + 1) as f64 * q).ceil() as usize).clamp(1, count.max(1));
    let at = |index: usize| residuals.get(index).copied().unwrap_or(0.0);
    Interval { coverage, low: at(count.saturating_sub(rank)), high: at(rank - 1) }
}

/// Time (ms since the epoch) and content: sorts by age, and two models never share a name.
fn version_of(trees: &Trees, now_us: u64) -> String {
    let text = serde_json::to_vec(trees).unwrap_or_default();
    let digest = Sha256::digest(text);
    let hash: String = digest.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    format!("v{}-{hash}", now_us / 1_000)
}

#[cfg(test)]
mod tests {
    use polars::prelude::*;
    use rand::{RngExt, SeedableRng};
    use rand_pcg::Pcg64Mcg;

    use super::*;
    use crate::engine::predict::schema::{MISSING, index_of};
    use crate::learn::dataset::KEY_COLUMNS;

    /// Rows once a second; `fill` sets features and returns the round trip (ms).
    fn frame_of(count: usize, mut fill: impl FnMut(usize, &mut FeatureVector) -> f64) -> DataFrame {
        let mut rows = vec![[MISSING; FEATURES.len()]; count];
        let rtts: Vec<f64> = rows.iter_mut().enumerate().map(|(i, row)| fill(i, row)).collect();
        let sent_us: Vec<i64> = (0..count as i64).map(|index| index * 1_000_000).collect();
        let done_us: Vec<i64> = sent_us.iter().map(|sent| sent + 500_000).collect();
        let mut columns = vec![
            Column::new(KEY_COLUMNS[0].into(), vec!["a>b"; count]),
            Column::new(KEY_COLUMNS[1].into(), sent_us),
            Column::new(KEY_COLUMNS[2].into(), done_us),
            Column::new(KEY_COLUMNS[3].into(), rtts),
        ];
        for (index, feature) in FEATURES.iter().enumerate() {
            let values: Vec<f64> = rows.iter().map(|row| row[index]).collect();
            columns.push(Column::new(feature.name.into(), values));
        }
        DataFrame::new(count, columns).unwrap()
    }

    fn set(row: &mut FeatureVector, name: &str, value: f64) {
        row[index_of(name).unwrap()] = value;
    }

    fn quick() -> TrainConfig {
        TrainConfig { trees: 25, learning_rate: 0.3, ..TrainConfig::default() }
    }

    /// The round trip is three times the links' when they are busy; the past looks the same in
    /// both cases.
    fn hidden_rule(random: &mut Pcg64Mcg, row: &mut FeatureVector) -> f64 {
        let (links, busy) = (random.random_range(10.0..100.0), random.random_range(0.0..1.0));
        set(row, "link_last_sum_ms", links);
        set(row, "link_utilisation_max", busy);
        set(row, "route_mean5_ms", 2.0 * links);
        set(row, "route_last_ms", random.random_range(1.0..3.0) * links);
        links * if busy > 0.5 { 3.0 } else { 1.0 } * random.random_range(0.97..1.03)
    }

    #[test]
    fn the_evaluator_agrees_with_the_library() {
        let mut random = Pcg64Mcg::seed_from_u64(1);
        let mut draw = || {
            let mut row: FeatureVector = std::array::from_fn(|_| random.random_range(0.0..100.0));
            row[random.random_range(0..FEATURES.len())] = MISSING;
            row
        };
        let rows: Vec<FeatureVector> = (0..500).map(|_| draw()).collect();
        let truth: Vec<f64> =
            rows.iter().map(|row| (row[3] + row[8] * row[9]).abs().ln_1p()).collect();
        let (library, _) = fit(&rows, &truth, &quick()).unwrap();
        let trees = flatten(&library).unwrap();
        assert_eq!(trees.roots.len(), 25);
        assert!(trees.feature.len() > 100, "{}", trees.feature.len());
        let others: Vec<FeatureVector> = (0..1_000).map(|_| draw()).chain(rows).collect();
        let expected = library.predict(&matrix(&others).unwrap()).unwrap();
        for (row, expected) in others.iter().zip(expected) {
            let found = trees.evaluate(row);
            assert!((found - expected).abs() < 1e-12, "{found} {expected}");
        }
    }

    #[test]
    fn the_model_finds_a_rule_that_the_baselines_cannot_see() {
        let mut random = Pcg64Mcg::seed_from_u64(2);
        let frame = frame_of(600, |_, row| hidden_rule(&mut random, row));
        let model = train(&frame, &quick(), 42_000_000).unwrap();
        let card = &model.card;
        assert!(card.model.accuracy > 0.85, "{card:?}");
        assert!(card.moving_average.accuracy < 0.3 && card.last_value.accuracy < 0.5, "{card:?}");
        assert!(card.model.rmse_ln < card.moving_average.rmse_ln && card.earns_its_place());
        assert_eq!((card.rows_train, card.rows_test), (450, 150));
        assert_eq!((card.trained_from_us, card.trained_to_us), (0, 449_500_000));
        // Later rows of the same world: the interval holds what it states.
        let mut inside = 0;
        for _ in 0..500 {
            let mut row = [MISSING; FEATURES.len()];
            let truth = hidden_rule(&mut random, &mut row);
            let (low, high) = model.predict(&row).unwrap().interval_ms.unwrap();
            inside += usize::from(low <= truth && truth <= high);
        }
        assert!((425..=490).contains(&inside), "{inside} of 500 in a 90 % interval");
        let file = ForestModel::from_json(model.to_json().as_bytes()).unwrap();
        assert_eq!(file, model, "the file is accepted and exact");
    }

    #[test]
    fn the_same_rows_and_seed_give_the_same_trees() {
        let train_with = |seed, order: &[IdxSize]| {
            let mut random = Pcg64Mcg::seed_from_u64(3);
            let frame = frame_of(200, |_, row| hidden_rule(&mut random, row));
            let frame = frame.take(&IdxCa::from_slice("order".into(), order)).unwrap();
            train(&frame, &TrainConfig { seed, ..quick() }, 1_000_000).unwrap()
        };
        let forwards: Vec<IdxSize> = (0..200).collect();
        let backwards: Vec<IdxSize> = (0..200).rev().collect();
        let first = train_with(7, &forwards);
        assert_eq!(first, train_with(7, &forwards));
        assert_eq!(first, train_with(7, &backwards), "the order of the frame does not matter");
        let other = train_with(8, &forwards);
        assert_ne!(first.latency.trees, other.latency.trees);
        assert_ne!(first.version, other.version);
        assert!(first.version.starts_with("v1000-"), "{}", first.version);
        assert_eq!(first.version.len(), 14);
    }

    #[test]
    fn no_row_is_fitted_that_was_answered_after_the_first_held_out_probe() {
        let frame = frame_of(200, |_, row| {
            set(row, "route_mean5_ms", 5.0);
            5.0
        });
        // The last 20 of the older rows are answered a minute late.
        let done = frame.column("done_us").unwrap().i64().unwrap().no_null_iter();
        let late =
            |(index, done)| if (130..150).contains(&index) { done + 60_000_000 } else { done };
        let done: Vec<i64> = done.enumerate().map(late).collect();
        let mut frame = frame;
        frame.with_column(Column::new("done_us".into(), done)).unwrap();
        let card = train(&frame, &quick(), 0).unwrap().card;
        assert_eq!((card.rows_train, card.rows_test), (130, 50));
        assert!(card.trained_to_us < 150_000_000, "{}", card.trained_to_us);
    }

    #[test]
    fn strange_inputs_give_a_model_or_a_clear_error() {
        let known = |row: &mut FeatureVector| set(row, "route_mean5_ms", 5.0);
        type Fill = Box<dyn FnMut(usize, &mut FeatureVector) -> f64>;
        let fine: [(&str, Fill); 4] = [
            (
                "constant target",
                Box::new(move |_, row| {
                    known(row);
                    5.0
                }),
            ),
            (
                "zero round trip",
                Box::new(move |_, row| {
                    known(row);
                    0.0
                }),
            ),
            (
                "no numbers",
                Box::new(move |i, row| {
                    known(row);
                    row[1] = f64::NAN;
                    i as f64
                }),
            ),
            (
                "infinite numbers",
                Box::new(move |i, row| {
                    known(row);
                    row[1] = if i % 2 == 0 { f64::INFINITY } else { f64::NEG_INFINITY };
                    1.0 + i as f64
                }),
            ),
        ];
        for (what, fill) in fine {
            let model = train(&frame_of(120, fill), &quick(), 0).expect(what);
            ForestModel::from_json(model.to_json().as_bytes()).expect(what);
        }
        let unknown = train(&frame_of(500, |_, _| 5.0), &quick(), 0).unwrap_err();
        assert!(matches!(unknown, LearnError::TooFewRows { rows: 0, needed: 100, .. }));
        let few = train(
            &frame_of(99, |_, row| {
                known(row);
                5.0
            }),
            &quick(),
            0,
        )
        .unwrap_err();
        assert!(few.to_string().contains("99") && few.to_string().contains("100"), "{few}");
        let other = DataFrame::new(1, vec![Column::new("x".into(), [1.0])]).unwrap();
        assert!(matches!(train(&other, &quick(), 0), Err(LearnError::Frame { .. })));
    }

    #[test]
    fn parameters_out_of_range_are_named() {
        let frame = frame_of(0, |_, _| 1.0);
        for (name, config) in [
            ("trees", TrainConfig { trees: 0, ..quick() }),
            ("depth", TrainConfig { depth: 9, ..quick() }),
            ("learning_rate", TrainConfig { learning_rate: f64::NAN, ..quick() }),
            ("subsample", TrainConfig { subsample: 1.5, ..quick() }),
            ("holdout_share", TrainConfig { holdout_share: 1.0, ..quick() }),
            ("min_child_weight", TrainConfig { min_child_weight: 0, ..quick() }),
        ] {
            let error = train(&frame, &config, 0).unwrap_err().to_string();
            assert!(error.starts_with(name), "{error}");
        }
        let config = TrainConfig { version: Some("../x".into()), ..quick() };
        assert!(matches!(train(&frame, &config, 0), Err(LearnError::VersionName(_))));
    }

    #[test]
    fn conformal_ranks_are_those_of_the_paper() {
        // 19 residuals at 90 %: rank ceil(20 * 0.95) = 19 from each side.
        let interval = conformal((1..=19).map(f64::from).collect(), 0.9);
        assert_eq!((interval.low, interval.high), (1.0, 19.0));
        // 99: rank 95.
        let interval = conformal((1..=99).map(f64::from).rev().collect(), 0.9);
        assert_eq!((interval.low, interval.high), (5.0, 95.0));
    }
}
