//! One regression head: trees on the distance from a reference, shrunk, with scale and interval.
//!
//! The rule:
//! - The trees are fitted on the fit rows with Huber's loss. Its range follows the rows:
//!   the median distance from the reference, within [`CLIP_RANGE`].
//!   Without a reference it is the distance from the median of the fit rows, which becomes part of
//!   the trees' base.
//! - Leaves are multiplied by the factor of [`SHRINKS`] with the smallest mean absolute error on
//!   the calibration rows. The factor 0 leaves the reference alone, so that a head is never worse
//!   than its reference, up to the noise of those rows.
//! - A smaller regressor is fitted on ln of the absolute error of forecasts out of sample: trees
//!   grown on the older half of the fit rows forecast the newer half. It is kept when the interval
//!   in units of its scale has a smaller interval score on the calibration rows.
//! - The interval is split conformal on the calibration rows.

use super::LearnError;
use super::conformal::{Held, Scored, conformal, held};
use super::regressor::{Binned, Boosting, shrunk};
use crate::engine::predict::{FeatureVector, Head, Reference, SCALE_RANGE};

/// Share of calibration rows that the interval covers.
pub const COVERAGE: f64 = 0.9;
/// Factors for the leaves, the smallest first: of equally good ones the first is taken.
pub const SHRINKS: [f64; 5] = [0.0, 0.25, 0.5, 0.75, 1.0];
/// Residuals are clipped to this many times the median distance from the reference. Of 0.5, 1, 2,
/// 4 and no clip the best on synthetic rows with 30 % of heavy-tailed noise (mean absolute error
/// 0.231 ln units, 0.236 at 2, 0.241 without a clip).
pub const CLIP_MEDIANS: f64 = 1.0;
/// Least and most that residuals are clipped to (ln units): 40 %, and a factor of 2. On the sample
/// export (`notebooks/compare_models.ipynb`) the error of three seeds was 0.0510 ln units at a
/// least clip of 0.2, 0.0502 at 0.35, 0.0506 at 0.7 and 0.0522 without a clip.
pub const CLIP_RANGE: (f64, f64) = (0.35, 0.7);
/// Fewest out-of-sample residuals for a scale model.
pub const SCALE_ROWS_MIN: usize = 100;
/// Trees of the scale model, and their depth.
const SCALE_TREES: usize = 40;
const SCALE_DEPTH: u16 = 3;
/// By this share the interval score must fall for the scale model to be kept.
const SCALE_GAIN_MIN: f64 = 0.01;

/// A row as a head sees it.
#[derive(Clone, Copy)]
pub(super) struct Example<'a> {
    pub(super) sent_us: u64,
    pub(super) done_us: u64,
    pub(super) features: &'a FeatureVector,
    /// What is to be predicted, ln(unit).
    pub(super) truth_ln: f64,
    /// What the trees predict the distance from, ln(unit).
    pub(super) reference_ln: f64,
}

impl Example<'_> {
    fn distance(&self) -> f64 {
        self.truth_ln - self.reference_ln
    }
}

/// A fitted head and what was chosen on the calibration rows.
pub(super) struct Fitted {
    pub(super) head: Head,
    /// Factor of the leaves, one of [`SHRINKS`].
    pub(super) shrink: f64,
    /// What residuals were clipped to (ln units).
    pub(super) clip: f64,
}

/// Fits a head. Both lists are in order of time, and not empty.
///
/// # Errors
/// [`LearnError::Fit`].
pub(super) fn fit(
    target: &str,
    reference: Reference,
    examples: &[Example<'_>],
    calibration: &[Example<'_>],
    boosting: &Boosting,
) -> Result<Fitted, LearnError> {
    let mut distances: Vec<f64> = examples.iter().map(Example::distance).collect();
    let offset = match reference {
        Reference::Zero => median(distances.clone()),
        _ => 0.0,
    };
    distances.iter_mut().for_each(|distance| *distance -= offset);
    let median = median(distances.iter().map(|distance| distance.abs()).collect());
    let clip = (CLIP_MEDIANS * median).clamp(CLIP_RANGE.0, CLIP_RANGE.1);
    let boosting = Boosting { clip, ..boosting.clone() };
    let binned = Binned::new(examples.iter().map(|example| example.features).collect());
    let all: Vec<usize> = (0..examples.len()).collect();
    let grown = boosting.fit(&binned, &all, &distances)?;

    let forecasts: Vec<f64> = calibration.iter().map(|row| grown.evaluate(row.features)).collect();
    let error = |factor: f64| -> f64 {
        let rows = calibration.iter().zip(&forecasts);
        rows.map(|(row, forecast)| (row.distance() - offset - factor * forecast).abs()).sum()
    };
    let shrink = SHRINKS.into_iter().min_by(|a, b| error(*a).total_cmp(&error(*b)));
    let shrink = shrink.unwrap_or_default();
    let mut trees = shrunk(grown, shrink);
    trees.base += offset;
    trees.count_cover(examples.iter().map(|example| example.features));

    let mut head = Head {
        target: target.to_owned(),
        reference,
        trees,
        scale: None,
        interval: conformal(&[], COVERAGE),
    };
    let plain = scored(&head, calibration);
    head.interval = conformal(&plain, COVERAGE);
    let outside = out_of_sample(&binned, examples, &distances, shrink, &boosting)?;
    if outside.len() >= SCALE_ROWS_MIN {
        let (rows, errors): (Vec<usize>, Vec<f64>) = outside.into_iter().unzip();
        let logs: Vec<f64> = errors.iter().map(|error| (error + SCALE_RANGE.0).ln()).collect();
        let boosting = Boosting {
            trees: boosting.trees.min(SCALE_TREES),
            depth: boosting.depth.min(SCALE_DEPTH),
            clip: f64::INFINITY,
            ..boosting
        };
        let mut scale = boosting.fit(&binned, &rows, &logs)?;
        scale.count_cover(rows.iter().map(|row| examples[*row].features));
        let mut scaled = Head { scale: Some(scale), ..head.clone() };
        let rows = scored(&scaled, calibration);
        scaled.interval = conformal(&rows, COVERAGE);
        let without = held(&head.interval, &plain).score;
        if held(&scaled.interval, &rows).score < (1.0 - SCALE_GAIN_MIN) * without {
            head = scaled;
        }
    }
    Ok(Fitted { head, shrink, clip })
}

/// Coverage and width of a head's interval on these rows.
pub(super) fn held_on(head: &Head, examples: &[Example<'_>]) -> Held {
    held(&head.interval, &scored(head, examples))
}

/// Root mean squared error of these rows (ln units), by the head and by its reference alone.
pub(super) fn rmse_ln(head: &Head, examples: &[Example<'_>]) -> (f64, f64) {
    let root = |squares: f64| (squares / examples.len().max(1) as f64).sqrt();
    let own = examples.iter().map(|row| row.distance() - head.trees.evaluate(row.features));
    let reference = examples.iter().map(Example::distance);
    (root(own.map(|error| error * error).sum()), root(reference.map(|error| error * error).sum()))
}

fn scored(head: &Head, examples: &[Example<'_>]) -> Vec<Scored> {
    let scored = |row: &Example<'_>| Scored {
        residual: row.distance() - head.trees.evaluate(row.features),
        scale: head.scale(row.features),
    };
    examples.iter().map(scored).collect()
}

/// Positions and absolute errors of rows that were forecast by trees that had not seen them.
fn out_of_sample(
    binned: &Binned<'_>,
    examples: &[Example<'_>],
    distances: &[f64],
    shrink: f64,
    boosting: &Boosting,
) -> Result<Vec<(usize, f64)>, LearnError> {
    if shrink == 0.0 {
        // The reference needs no fit, so that every row is out of sample.
        return Ok(distances.iter().map(|distance| distance.abs()).enumerate().collect());
    }
    let middle = examples.len() / 2;
    if examples.len() - middle < SCALE_ROWS_MIN {
        return Ok(Vec::new());
    }
    let older: Vec<usize> =
        (0..middle).filter(|row| examples[*row].done_us < examples[middle].sent_us).collect();
    let target: Vec<f64> = older.iter().map(|row| distances[*row]).collect();
    let trees = shrunk(boosting.fit(binned, &older, &target)?, shrink);
    let error = |row: usize| (distances[row] - trees.evaluate(examples[row].features)).abs();
    Ok((middle..examples.len()).map(|row| (row, error(row))).collect())
}

/// The middle value; 0 of nothing.
fn median(mut values: Vec<f64>) -> f64 {
    let middle = values.len() / 2;
    if values.is_empty() {
        return 0.0;
    }
    *values.select_nth_unstable_by(middle, f64::total_cmp).1
}
