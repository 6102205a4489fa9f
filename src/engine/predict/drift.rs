//! ADWIN: a window over a stream of numbers that shrinks when their mean has changed (Bifet and
//! Gavalda, "Learning from time-changing data with adaptive windowing", SDM 2007).
//!
//! The window is kept as buckets of 1, 2, 4, ... values, at most [`BUCKETS_MAX`] of a size, with
//! the sum and the spread of each: a few hundred numbers for any stream. Every [`CHECK_EVERY`]
//! values each border between buckets is tried; when the means of both sides differ by more than
//! the paper's bound (its equation 3.1, with the variance of the window), the oldest bucket goes,
//! and that is the alarm.

use std::collections::VecDeque;

/// Probability of a false alarm of one test (the paper's delta).
pub const DELTA: f64 = 0.002;
/// Buckets of one size (the paper's M).
pub const BUCKETS_MAX: usize = 5;
/// Sizes: up to 5 times 2^24 values, beyond which the oldest are forgotten.
const SIZES_MAX: usize = 25;
/// Values between two tests, as in the authors' implementation.
pub const CHECK_EVERY: u64 = 32;
/// Fewest values on each side of a border, as in the authors' implementation.
const SIDE_MIN: f64 = 5.0;
/// The bound holds for values in [0, 1]: residuals of ln(ms) beyond this are cut off, which is an
/// error by the factor e.
pub const RESIDUAL_LN_MAX: f64 = 1.0;

/// Sum, and sum of squared deviations from the mean, of some values.
#[derive(Clone, Copy, Debug, Default)]
struct Bucket {
    sum: f64,
    spread: f64,
}

impl Bucket {
    /// Both together, of `a` and `b` values (Chan, Golub and LeVeque, 1983).
    fn joined(self, a: f64, other: Self, b: f64) -> Self {
        let apart = self.sum / a - other.sum / b;
        Self {
            sum: self.sum + other.sum,
            spread: self.spread + other.spread + a * b / (a + b) * apart * apart,
        }
    }
}

/// Watches the mean of a stream of residuals, ln(ms).
#[derive(Clone, Debug, Default)]
pub struct Adwin {
    /// Entry `i` holds buckets of `2^i` values, the newest first.
    sizes: Vec<VecDeque<Bucket>>,
    values: u64,
}

impl Adwin {
    /// Takes the next residual and says whether the mean has changed. What is no number is left
    /// out.
    pub fn push(&mut self, residual_ln: f64) -> bool {
        if residual_ln.is_nan() {
            return false;
        }
        let cut = residual_ln.clamp(-RESIDUAL_LN_MAX, RESIDUAL_LN_MAX);
        let sum = (cut / RESIDUAL_LN_MAX + 1.0) / 2.0;
        self.insert(Bucket { sum, spread: 0.0 });
        self.values += 1;
        let mut changed = false;
        if self.values.is_multiple_of(CHECK_EVERY) {
            while self.has_changed() {
                self.forget_oldest();
                changed = true;
            }
        }
        changed
    }

    /// Values in the window.
    pub fn width(&self) -> u64 {
        self.buckets().map(|(count, _)| count as u64).sum()
    }

    fn insert(&mut self, bucket: Bucket) {
        let mut carried = Some(bucket);
        for size in 0..SIZES_MAX {
            let Some(bucket) = carried.take() else { return };
            if self.sizes.len() == size {
                self.sizes.push(VecDeque::new());
            }
            let row = &mut self.sizes[size];
            row.push_front(bucket);
            if row.len() > BUCKETS_MAX {
                let count = (1_u64 << size) as f64;
                let (oldest, next) = (row.pop_back(), row.pop_back());
                carried = oldest.zip(next).map(|(a, b)| a.joined(count, b, count));
            }
        }
    }

    /// Number of values and sums of each bucket, the oldest first.
    fn buckets(&self) -> impl Iterator<Item = (f64, Bucket)> + '_ {
        self.sizes.iter().enumerate().rev().flat_map(|(size, row)| {
            row.iter().rev().map(move |bucket| ((1_u64 << size) as f64, *bucket))
        })
    }

    fn has_changed(&self) -> bool {
        let joined = |(a, first): (f64, Bucket), (b, second): (f64, Bucket)| {
            (a + b, first.joined(a, second, b))
        };
        let Some((count, whole)) = self.buckets().reduce(joined) else { return false };
        let variance = whole.spread / count;
        // The borders are many tests: the paper divides delta by ln(n).
        let confidence = (2.0 * count.ln().max(1.0) / DELTA).ln();
        let (mut old, mut old_sum) = (0.0, 0.0);
        self.buckets().any(|(bucket, sums)| {
            old += bucket;
            old_sum += sums.sum;
            let new = count - old;
            if old < SIDE_MIN || new < SIDE_MIN {
                return false;
            }
            let harmonic = 1.0 / (1.0 / old + 1.0 / new);
            let bound = (2.0 / harmonic * variance * confidence).sqrt()
                + 2.0 / (3.0 * harmonic) * confidence;
            (old_sum / old - (whole.sum - old_sum) / new).abs() > bound
        })
    }

    fn forget_oldest(&mut self) {
        while let Some(row) = self.sizes.last_mut() {
            let found = row.pop_back().is_some();
            if row.is_empty() {
                self.sizes.pop();
            }
            if found {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_pcg::Pcg64Mcg;

    use super::*;

    /// Roughly normal: the sum of twelve uniform numbers.
    fn normal(random: &mut Pcg64Mcg, mean: f64, deviation: f64) -> f64 {
        let sum: f64 = (0..12).map(|_| random.random_range(0.0..1.0)).sum();
        mean + deviation * (sum - 6.0)
    }

    #[test]
    fn stationary_noise_gives_almost_no_alarm() {
        let mut alarms = 0;
        for seed in 0..20 {
            let mut random = Pcg64Mcg::seed_from_u64(seed);
            let mut adwin = Adwin::default();
            let deviation = [0.02, 0.1, 0.4][seed as usize % 3];
            alarms +=
                (0..10_000).filter(|_| adwin.push(normal(&mut random, 0.0, deviation))).count();
        }
        assert!(alarms <= 2, "{alarms} alarms in 200,000 values");
    }

    #[test]
    fn a_shift_of_the_mean_is_found_within_a_few_hundred_values() {
        for (deviation, shift) in [(0.02, 0.1), (0.1, 0.2), (0.1, -0.2), (0.3, 0.5)] {
            for seed in 0..10 {
                let mut random = Pcg64Mcg::seed_from_u64(seed);
                let mut adwin = Adwin::default();
                for _ in 0..2_000 {
                    adwin.push(normal(&mut random, 0.0, deviation));
                }
                let found = (1..=2_000).find(|_| adwin.push(normal(&mut random, shift, deviation)));
                let found = found.expect("it is found");
                assert!(found <= 400, "shift {shift} in {deviation}: after {found}");
                // What came before the shift is forgotten before long.
                for _ in 0..2_000 {
                    adwin.push(normal(&mut random, shift, deviation));
                }
                assert!(adwin.width() < 3_000, "{}", adwin.width());
            }
        }
    }

    #[test]
    fn the_window_keeps_every_value_in_few_buckets() {
        let mut random = Pcg64Mcg::seed_from_u64(1);
        let mut adwin = Adwin::default();
        let values: Vec<f64> = (0..5_000).map(|_| normal(&mut random, 0.0, 0.1)).collect();
        for value in &values {
            assert!(!adwin.push(*value));
        }
        assert_eq!(adwin.width(), 5_000);
        assert!(adwin.buckets().count() <= 13 * BUCKETS_MAX);
        let joined = |(a, x): (f64, Bucket), (b, y): (f64, Bucket)| (a + b, x.joined(a, y, b));
        let (count, whole) = adwin.buckets().reduce(joined).unwrap();
        let scaled: Vec<f64> = values.iter().map(|value| (value + 1.0) / 2.0).collect();
        let mean = scaled.iter().sum::<f64>() / count;
        let spread: f64 = scaled.iter().map(|value| (value - mean).powi(2)).sum();
        assert!((whole.sum / count - mean).abs() < 1e-12);
        assert!((whole.spread - spread).abs() < 1e-9);
    }

    #[test]
    fn strange_residuals_are_cut_off_or_left_out() {
        let mut adwin = Adwin::default();
        for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e300] {
            adwin.push(value);
        }
        assert_eq!(adwin.width(), 3);
        assert!(adwin.buckets().all(|(_, bucket)| bucket.sum.is_finite()));
    }
}
