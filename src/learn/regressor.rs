//! The regressor behind every head: gradient boosting with Huber's loss, tree by tree.
//!
//! smartcore's `XGRegressor` knows only the squared error, under which a few wild values pull
//! every leaf. Here it grows one tree at a time on the residuals clipped to a range, which is the
//! gradient of Huber's loss (Friedman, 2001, "Greedy function approximation", section 4.4): within
//! the range a residual counts as it is, beyond it only its sign.
//!
//! The library sorts every feature in every node. To keep that quick, features are cut into at
//! most [`BINS`] bins of about equal weight first (as LightGBM does; Ke et al., 2017), constant
//! and repeated columns are left out, and each tree sees a part of the rows. A
//! threshold between two bins is the edge between them, so that the trees of the model file ask
//! for the values themselves.

use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;
use serde_json::Value;
use smartcore::linalg::basic::matrix::DenseMatrix;
use smartcore::numbers::basenum::Number;
use smartcore::xgboost::{XGRegressor, XGRegressorParameters};

use super::LearnError;
use crate::engine::predict::schema::{FEATURES, MISSING};
use crate::engine::predict::{FeatureVector, Trees};

/// A bin holds at least this share of the known values of a feature, or one value. At most twice
/// as many bins come of it, and a bin fits into a byte.
const BINS: usize = 127;
/// Most rows that a tree sees. A hundred trees see each of 100,000 rows 25 times, and the time
/// that a tree takes no longer grows.
const TREE_ROWS_MAX: usize = 25_000;
/// A leaf holds at least this share of the rows of its tree (a guess: 2 per mille).
const LEAF_SHARE_MIN: f64 = 0.002;

type Library<T> = XGRegressor<T, f64, DenseMatrix<T>, Vec<f64>>;

/// The features of rows, cut into bins.
pub(super) struct Binned<'a> {
    features: Vec<&'a FeatureVector>,
    columns: Vec<Column>,
}

struct Column {
    feature: u16,
    /// Ascending; a value in bin `k` lies above edge `k - 1` and not above edge `k`.
    edges: Vec<f64>,
    bins: Vec<u8>,
}

impl<'a> Binned<'a> {
    /// Cuts the features of these rows, all of them finite.
    pub(super) fn new(features: Vec<&'a FeatureVector>) -> Self {
        let mut columns: Vec<Column> = Vec::new();
        for feature in 0..FEATURES.len() {
            let edges = edges(features.iter().map(|row| row[feature]).collect());
            if edges.is_empty() {
                continue;
            }
            let bin = |value: f64| edges.partition_point(|edge| *edge < value) as u8;
            let bins: Vec<u8> = features.iter().map(|row| bin(row[feature])).collect();
            if columns.iter().all(|column| column.bins != bins) {
                columns.push(Column { feature: feature as u16, edges, bins });
            }
        }
        Self { features, columns }
    }

    /// Columns that differ from row to row and from each other.
    pub(super) fn columns(&self) -> usize {
        self.columns.len()
    }

    /// The bins of some rows, column by column.
    pub(super) fn matrix<T: From<u8>>(&self, rows: &[usize], columns: &[usize]) -> Vec<T> {
        let bins = |column: &usize| &self.columns[*column].bins;
        columns.iter().flat_map(|c| rows.iter().map(|row| T::from(bins(c)[*row]))).collect()
    }

    /// Feature and threshold of a split between two bins of a column; `None` when there is no
    /// such column or edge.
    pub(super) fn split(&self, column: usize, between: f64) -> Option<(u16, f64)> {
        let column = self.columns.get(column)?;
        Some((column.feature, *column.edges.get(between as usize)?))
    }
}

/// Where to cut a feature: always beside [`MISSING`], and between two values when enough values
/// lie before the cut or the next value alone is frequent enough.
fn edges(mut values: Vec<f64>) -> Vec<f64> {
    values.sort_by(f64::total_cmp);
    let known = values.partition_point(|value| *value <= MISSING);
    let least = (values.len() - known).div_ceil(BINS);
    let mut edges = Vec::new();
    let (mut before, mut last) = (0, None);
    for run in values.chunk_by(|a, b| a == b) {
        let value = run[0];
        if let Some(last) = last
            && (last <= MISSING || before >= least || run.len() >= least)
        {
            let middle = last + (value - last) / 2.0;
            edges.push(if middle < value { middle } else { last });
            before = 0;
        }
        before += run.len();
        last = Some(value);
    }
    edges
}

/// How to fit.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Boosting {
    /// Decides which rows each tree sees.
    pub(super) seed: u64,
    /// Trees.
    pub(super) trees: usize,
    /// Depth of a tree.
    pub(super) depth: u16,
    /// Weight of each tree.
    pub(super) learning_rate: f64,
    /// Fewest rows in a leaf; with many rows it is more, see [`LEAF_SHARE_MIN`].
    pub(super) leaf_rows_min: usize,
    /// Probability that a tree sees a row (stochastic boosting; Friedman, 2002), less when it
    /// would see more than [`TREE_ROWS_MAX`].
    pub(super) subsample: f64,
    /// Residuals are clipped to plus and minus this.
    pub(super) clip: f64,
}

impl Boosting {
    /// Trees whose sum fits `target`, one number for each of `rows`, which are positions in
    /// `binned`. Covers are not counted.
    ///
    /// # Errors
    /// [`LearnError::Fit`] when the library refuses or its trees have another form.
    pub(super) fn fit(
        &self,
        binned: &Binned<'_>,
        rows: &[usize],
        target: &[f64],
    ) -> Result<Trees, LearnError> {
        let clipped = |value: f64| value.clamp(-self.clip, self.clip);
        let base = target.iter().copied().map(clipped).sum::<f64>() / target.len().max(1) as f64;
        let mut trees = constant(base);
        let mut residuals: Vec<f64> = target.iter().map(|value| value - base).collect();
        let mut random = Pcg64Mcg::seed_from_u64(self.seed);
        let share = self.subsample.min(TREE_ROWS_MAX as f64 / rows.len().max(1) as f64);
        let columns: Vec<usize> = (0..binned.columns()).collect();
        for _ in 0..self.trees {
            let seen: Vec<usize> = (0..rows.len()).filter(|_| random.random_bool(share)).collect();
            if seen.is_empty() || columns.is_empty() {
                continue;
            }
            let sample: Vec<usize> = seen.iter().map(|at| rows[*at]).collect();
            let gradient: Vec<f64> = seen.iter().map(|at| clipped(residuals[*at])).collect();
            let library = self.grow::<u8>(binned, &sample, &columns, &gradient)?;
            let root = append(&library, binned, &columns, self.learning_rate, &mut trees)?;
            for (residual, row) in residuals.iter_mut().zip(rows) {
                *residual -= trees.nodes[trees.leaf(root, binned.features[*row])].value;
            }
        }
        Ok(trees)
    }

    /// One tree of the library on these rows and columns.
    fn grow<T: Number + PartialOrd + From<u8>>(
        &self,
        binned: &Binned<'_>,
        rows: &[usize],
        columns: &[usize],
        gradient: &Vec<f64>,
    ) -> Result<Library<T>, LearnError> {
        let wrong = |error: smartcore::error::Failed| LearnError::Fit(error.to_string());
        let bins = binned.matrix(rows, columns);
        let matrix = DenseMatrix::new(rows.len(), columns.len(), bins, true).map_err(wrong)?;
        let share = (rows.len() as f64 * LEAF_SHARE_MIN) as usize;
        let parameters = XGRegressorParameters::default()
            .with_n_estimators(1)
            .with_max_depth(self.depth)
            .with_learning_rate(1.0)
            .with_min_child_weight(self.leaf_rows_min.max(share))
            .with_base_score(0.0)
            .with_subsample(1.0);
        Library::fit(&matrix, gradient, parameters).map_err(wrong)
    }
}

/// Trees that predict the same for all rows.
pub(super) fn constant(value: f64) -> Trees {
    let mut trees = Trees { base: value, ..Trees::default() };
    let root = trees.push_leaf(0.0);
    trees.roots.push(root);
    trees
}

/// All leaves and the base times a factor; only a constant is left of a factor of 0.
pub(super) fn shrunk(mut trees: Trees, factor: f64) -> Trees {
    if factor == 0.0 {
        return constant(0.0);
    }
    trees.base *= factor;
    let leaves = trees.nodes.iter_mut().filter(|node| node.is_leaf());
    leaves.for_each(|leaf| leaf.value *= factor);
    trees
}

/// Appends the library's one tree. It keeps its trees private but serialises them.
fn append<T: Number + PartialOrd + serde::Serialize>(
    library: &Library<T>,
    binned: &Binned<'_>,
    columns: &[usize],
    learning_rate: f64,
    trees: &mut Trees,
) -> Result<u32, LearnError> {
    let value =
        serde_json::to_value(library).map_err(|error| LearnError::Fit(error.to_string()))?;
    let root = push(&value["regressors"][0], binned, columns, learning_rate, trees)
        .ok_or_else(|| LearnError::Fit("its trees have an unknown form".into()))?;
    trees.roots.push(root);
    Ok(root)
}

/// Appends a node and all below it, children behind their parent.
fn push(
    node: &Value,
    binned: &Binned<'_>,
    columns: &[usize],
    learning_rate: f64,
    trees: &mut Trees,
) -> Option<u32> {
    // An inner node has a value too, and a leaf may have a threshold; neither means anything.
    if node["left"].is_null() || node["right"].is_null() {
        return Some(trees.push_leaf(learning_rate * node["value"].as_f64()?));
    }
    let column = *columns.get(usize::try_from(node["split_feature_idx"].as_u64()?).ok()?)?;
    let (feature, threshold) = binned.split(column, node["threshold"].as_f64()?)?;
    let parent = trees.push_split(feature, threshold);
    let left = push(&node["left"], binned, columns, learning_rate, trees)?;
    let right = push(&node["right"], binned, columns, learning_rate, trees)?;
    trees.set_children(parent, left, right);
    Some(parent)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn boosting() -> Boosting {
        Boosting {
            seed: 1,
            trees: 60,
            depth: 3,
            learning_rate: 0.2,
            leaf_rows_min: 5,
            subsample: 0.5,
            clip: 0.5,
        }
    }

    /// All features random, one of them missing in each row.
    fn random_rows(seed: u64, count: usize) -> Vec<FeatureVector> {
        let mut random = Pcg64Mcg::seed_from_u64(seed);
        let mut draw = || {
            let mut row: FeatureVector = std::array::from_fn(|_| random.random_range(0.0..100.0));
            row[random.random_range(0..FEATURES.len())] = MISSING;
            row
        };
        (0..count).map(|_| draw()).collect()
    }

    #[test]
    fn the_evaluator_agrees_with_the_library() {
        let rows = random_rows(1, 500);
        let truth: Vec<f64> =
            rows.iter().map(|row| row[3] + row[8].max(0.0) * row[9].max(0.0)).collect();
        let binned = Binned::new(rows.iter().collect());
        let all: Vec<usize> = (0..rows.len()).collect();
        let columns: Vec<usize> = (0..binned.columns()).collect();
        for (depth, leaves) in [(1, 2), (4, 10), (6, 30)] {
            let boosting = Boosting { depth, ..boosting() };
            let small = boosting.grow::<u8>(&binned, &all, &columns, &truth).unwrap();
            let exact = boosting.grow::<f64>(&binned, &all, &columns, &truth).unwrap();
            let mut trees = constant(0.25);
            append(&small, &binned, &columns, 0.5, &mut trees).unwrap();
            assert!(trees.nodes.len() > leaves, "{}", trees.nodes.len());
            let matrix = binned.matrix(&all, &columns);
            let matrix = DenseMatrix::new(all.len(), columns.len(), matrix, true).unwrap();
            for (row, expected) in rows.iter().zip(exact.predict(&matrix).unwrap()) {
                let found = trees.evaluate(row);
                let expected = 0.25 + 0.5 * expected;
                assert!((found - expected).abs() < 1e-12, "{found} {expected}");
            }
        }
    }

    #[test]
    fn edges_are_where_values_differ_and_never_beyond_a_byte() {
        assert!(edges(vec![]).is_empty());
        assert!(edges(vec![5.0; 9]).is_empty());
        assert_eq!(edges(vec![MISSING, MISSING, 4.0]), [(MISSING + 4.0) / 2.0]);
        assert_eq!(edges(vec![3.0, 1.0, 2.0, 1.0]), [1.5, 2.5]);
        // One rare value below a frequent one, one above it.
        let mut values = vec![1.0; 1_000];
        values.extend([0.2, 2.0]);
        assert_eq!(edges(values), [0.2 + (1.0 - 0.2) / 2.0, 1.5]);
        let next = 1.0_f64.next_up();
        assert_eq!(edges(vec![1.0, next]), [1.0], "the middle is no number of its own");
        let mut random = Pcg64Mcg::seed_from_u64(2);
        let many: Vec<f64> = (0..20_000)
            .map(|_| {
                if random.random_bool(0.5) {
                    random.random_range(0..9).into()
                } else {
                    random.random_range(0.0..9.0)
                }
            })
            .collect();
        let found = edges(many);
        assert!(found.is_sorted() && found.len() > BINS / 2 && found.len() < 2 * BINS);
    }

    #[test]
    fn constant_and_repeated_columns_are_left_out() {
        let mut rows = random_rows(3, 200);
        for row in &mut rows {
            row[5] = 7.0;
            row[6] = 2.0 * row[4];
        }
        for row in &mut rows {
            row[4] = row[4].max(0.0);
            row[6] = row[6].max(0.0);
        }
        let binned = Binned::new(rows.iter().collect());
        let used: Vec<u16> = binned.columns.iter().map(|column| column.feature).collect();
        assert!(used.contains(&4) && !used.contains(&5) && !used.contains(&6), "{used:?}");
        assert_eq!(used.len(), FEATURES.len() - 2);
    }

    #[test]
    fn nothing_to_split_on_gives_the_mean() {
        let row = [1.0; FEATURES.len()];
        let binned = Binned::new(vec![&row; 4]);
        let trees = boosting().fit(&binned, &[0, 1, 2, 3], &[0.1, 0.2, 0.3, 0.4]).unwrap();
        assert!((trees.evaluate(&row) - 0.25).abs() < 1e-12);
        trees.validate(FEATURES.len()).unwrap();
        let none = boosting().fit(&Binned::new(vec![]), &[], &[]).unwrap();
        assert_eq!(none.evaluate(&row), 0.0);
    }

    /// Mean absolute error against the noiseless rule, fitted under noise with wild values.
    fn error_under_heavy_tails(clip: f64) -> f64 {
        let mut sum = 0.0;
        for seed in 0..2 {
            let rows = random_rows(10 + seed, 1_000);
            let mut random = Pcg64Mcg::seed_from_u64(seed);
            let rule = |row: &FeatureVector| if row[3] > 50.0 { 0.3 } else { -0.1 };
            // One value in ten is off by a factor of up to e^3, and always upwards.
            let target: Vec<f64> = rows
                .iter()
                .map(|row| {
                    let wild =
                        if random.random_bool(0.1) { random.random_range(0.5..3.0) } else { 0.0 };
                    rule(row) + random.random_range(-0.05..0.05) + wild
                })
                .collect();
            let binned = Binned::new(rows.iter().collect());
            let all: Vec<usize> = (0..rows.len()).collect();
            let fitted =
                Boosting { clip, trees: 30, ..boosting() }.fit(&binned, &all, &target).unwrap();
            let others = random_rows(20 + seed, 500);
            sum += others.iter().map(|row| (fitted.evaluate(row) - rule(row)).abs()).sum::<f64>()
                / others.len() as f64;
        }
        sum / 2.0
    }

    #[test]
    fn wild_values_pull_the_clipped_fit_less() {
        let (clipped, free) = (error_under_heavy_tails(0.2), error_under_heavy_tails(1e9));
        assert!(clipped < 0.07 && free > 3.0 * clipped, "{clipped} {free}");
    }

    #[test]
    fn a_change_far_beyond_the_clip_is_still_learned() {
        let rows = random_rows(5, 400);
        let rule = |row: &FeatureVector| if row[3] > 50.0 { 1.5 } else { -1.5 };
        let target: Vec<f64> = rows.iter().map(rule).collect();
        let all: Vec<usize> = (0..rows.len()).collect();
        let fitted = Boosting { clip: 0.3, trees: 100, ..boosting() }
            .fit(&Binned::new(rows.iter().collect()), &all, &target)
            .unwrap();
        let mean = random_rows(6, 200)
            .iter()
            .map(|row| (fitted.evaluate(row) - rule(row)).abs())
            .sum::<f64>()
            / 200.0;
        assert!(mean < 0.3, "{mean}");
    }
}
