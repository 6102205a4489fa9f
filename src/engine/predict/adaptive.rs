//! The interval of a model, kept honest online (adaptive conformal inference).
//!
//! A split-conformal interval covers what it states as long as the world stays as it was in the
//! calibration rows. Here each end is stretched by a factor that follows the misses: by quantile
//! tracking (Angelopoulos, Candes and Tibshirani, 2023, "Conformal PID control", section 2.1; the
//! idea is that of Gibbs and Candes, 2021), on the ln of the factor:
//!
//! ```text
//! ln factor += RATE * (1 if the truth lay beyond this end, else 0, minus the stated share)
//! ```
//!
//! As the ln of a factor stays within plus and minus [`LN_FACTOR_MAX`], after `n` observations the
//! share missed at an end differs from the stated one by at most `2 * LN_FACTOR_MAX / (RATE * n)`,
//! whatever the data are, as long as the limit is not reached.

/// How quickly the ends follow. One miss widens its end by about 10 %; without misses it takes
/// 14 observations to come back from one at 90 %. A guess between 0.05, which takes 60 misses to
/// follow a route that became 20 times as noisy, and 0.2, which jumps by a fifth at each miss.
pub const RATE: f64 = 0.1;
/// Largest ln of a factor in either direction: about 150 times as wide or narrow as the model
/// says. Beyond, the model and not its interval is wrong.
pub const LN_FACTOR_MAX: f64 = 5.0;
/// Smallest distance of an end from the forecast before it is stretched, on the ln scale (0.1 %):
/// what has no width cannot be widened.
pub const OFFSET_MIN: f64 = 0.001;

/// Farthest that an end may lie from the forecast, on the ln scale (a factor of 20): an interval
/// that is wider says nothing more.
pub const REACH_MAX: f64 = 3.0;

/// Stretches the interval of one stream of forecasts, such as those of the routes to one node.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdaptiveInterval {
    /// Share missed at each end.
    tail: f64,
    ln_low: f64,
    ln_high: f64,
}

impl AdaptiveInterval {
    /// For intervals that cover `coverage` of the truths, 0 to 1, half of the misses at each end.
    pub fn new(coverage: f64) -> Self {
        Self { tail: (1.0 - coverage.clamp(0.0, 1.0)) / 2.0, ln_low: 0.0, ln_high: 0.0 }
    }

    /// Lower and upper end (ln unit) around a forecast (ln unit). `low` and `high` are the
    /// model's own offsets from it, below and above 0.
    pub fn apply(&self, ln_forecast: f64, low: f64, high: f64) -> (f64, f64) {
        let low = low.min(-OFFSET_MIN) * self.ln_low.exp();
        let high = high.max(OFFSET_MIN) * self.ln_high.exp();
        (ln_forecast + low.max(-REACH_MAX), ln_forecast + high.min(REACH_MAX))
    }

    /// What became of a forecast, with the offsets that the model stated then. Values that are no
    /// numbers teach nothing.
    pub fn observe(&mut self, ln_truth: f64, ln_forecast: f64, low: f64, high: f64) {
        let (bottom, top) = self.apply(ln_forecast, low, high);
        if ![ln_truth, bottom, top].iter().all(|value| value.is_finite()) {
            return;
        }
        let follow = |ln_factor: f64, missed: bool| {
            let step = RATE * (f64::from(u8::from(missed)) - self.tail);
            (ln_factor + step).clamp(-LN_FACTOR_MAX, LN_FACTOR_MAX)
        };
        (self.ln_low, self.ln_high) =
            (follow(self.ln_low, ln_truth < bottom), follow(self.ln_high, ln_truth > top));
    }

    /// Factors of the lower and of the upper offset.
    pub fn stretch(&self) -> (f64, f64) {
        (self.ln_low.exp(), self.ln_high.exp())
    }
}

/// Offsets (ln unit, `low` below and `high` above 0) of an interval around a forecast `ln`, widened where they
/// do not reach what one of the `experts` said, of which the forecast is a mix: after a change, last value and
/// level disagree before any error is known.
pub fn spanning((low, high): (f64, f64), ln: f64, experts: &[Option<f64>]) -> (f64, f64) {
    let reach = |(low, high): (f64, f64), said: &f64| (low.min(said - ln), high.max(said - ln));
    experts.iter().flatten().fold((low, high), reach)
}

/// How quickly surprise follows: the last two or so errors count.
const SURPRISE_GAIN: f64 = 0.5;
/// Largest error that counts, in half widths of the interval.
const SURPRISE_MAX: f64 = 40.0;

/// Widens the intervals of one stream after errors that they did not foresee: when a level changed,
/// forecasts lag for a few values. The stretch of [`AdaptiveInterval`] takes the average back.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Surprise {
    /// Mean of the latest errors, in half widths.
    level: f64,
}

impl Surprise {
    /// Offsets, widened.
    pub fn widen(&self, (low, high): (f64, f64)) -> (f64, f64) {
        (low * (1.0 + self.level), high * (1.0 + self.level))
    }

    /// A forecast with these widened offsets was off by `error_ln`.
    pub fn observe(&mut self, error_ln: f64, low: f64, high: f64) {
        let half_width = (high - low).max(2.0 * OFFSET_MIN) / 2.0 / (1.0 + self.level);
        let error = (error_ln.abs() / half_width).min(SURPRISE_MAX);
        if error.is_finite() {
            self.level += SURPRISE_GAIN * (error - self.level);
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_pcg::Pcg64Mcg;

    use super::*;

    const COUNT: usize = 5_000;

    /// Shares inside over the first and the second half. The noise at `step` is triangular, of
    /// width `noise(step)` to each side; the model believes it to be `believed`.
    fn coverage(believed: f64, noise: impl Fn(usize) -> f64, seed: u64) -> [f64; 2] {
        let mut random = Pcg64Mcg::seed_from_u64(seed);
        let mut interval = AdaptiveInterval::new(0.9);
        // The 5th and the 95th percentile of a triangle of half width 1.
        let end = 1.0 - 0.1_f64.sqrt();
        let mut inside = [0.0; 2];
        for step in 0..COUNT {
            let forecast = random.random_range(0.0..5.0);
            let noise_here: f64 = random.random_range(-0.5..0.5) + random.random_range(-0.5..0.5);
            let truth = forecast + noise(step) * noise_here;
            let (low, high) = (-end * believed, end * believed);
            let (bottom, top) = interval.apply(forecast, low, high);
            inside[2 * step / COUNT] += f64::from(u8::from(bottom <= truth && truth <= top));
            interval.observe(truth, forecast, low, high);
        }
        inside.map(|count| count / (COUNT / 2) as f64)
    }

    #[test]
    fn the_stated_coverage_is_kept_by_wrong_models_and_changing_worlds() {
        type Noise = fn(usize) -> f64;
        let worlds: [(&str, f64, Noise); 5] = [
            ("right", 1.0, |_| 1.0),
            ("three times too narrow", 1.0 / 3.0, |_| 1.0),
            ("three times too wide", 3.0, |_| 1.0),
            ("noise doubles", 1.0, |step| if step < COUNT / 2 { 1.0 } else { 2.0 }),
            ("noise in waves", 1.0, |step| 1.5 + (step as f64 / 200.0).sin()),
        ];
        for (world, believed, noise) in worlds {
            for seed in 0..5 {
                let [first, second] = coverage(believed, noise, seed);
                for share in [first, second, (first + second) / 2.0] {
                    assert!((0.88..=0.92).contains(&share), "{world}, seed {seed}: {share}");
                }
            }
        }
    }

    #[test]
    fn each_end_follows_its_own_misses() {
        let mut interval = AdaptiveInterval::new(0.9);
        for _ in 0..50 {
            interval.observe(1.0, 0.0, -0.1, 0.1);
        }
        let (low, high) = interval.stretch();
        assert!(low < 1.0 && high > 9.0, "{low} {high}");
        let (bottom, top) = interval.apply(0.0, -0.1, 0.1);
        assert!(bottom > -0.1 && top > 0.9, "{bottom} {top}");
    }

    #[test]
    fn the_stretch_is_bounded_and_strange_values_teach_nothing() {
        let mut interval = AdaptiveInterval::new(0.9);
        for _ in 0..10_000 {
            interval.observe(1e9, 0.0, -0.1, 0.1);
        }
        let (low, high) = interval.stretch();
        assert_eq!((low, high), ((-LN_FACTOR_MAX).exp(), LN_FACTOR_MAX.exp()));
        let before = interval;
        interval.observe(f64::NAN, 0.0, -0.1, 0.1);
        interval.observe(0.0, f64::INFINITY, -0.1, 0.1);
        assert_eq!(interval, before);
        // A model without a width gets one.
        let mut interval = AdaptiveInterval::new(0.9);
        assert_eq!(interval.apply(2.0, 0.0, 0.0), (2.0 - OFFSET_MIN, 2.0 + OFFSET_MIN));
        interval.observe(2.1, 2.0, 0.0, 0.0);
        assert!(interval.apply(2.0, 0.0, 0.0).1 > 2.0 + OFFSET_MIN);
    }

    #[test]
    fn an_interval_holds_what_every_expert_said() {
        let experts = [Some(3.0), None, Some(3.5), Some(2.95)];
        let (low, high) = spanning((-0.1, 0.1), 3.1, &experts);
        assert!((low + 0.15).abs() < 1e-12 && (high - 0.4).abs() < 1e-12, "{low} {high}");
        assert_eq!(spanning((-0.5, 0.5), 3.1, &experts), (-0.5, 0.5));
    }

    #[test]
    fn after_a_surprise_intervals_are_wide_for_a_while() {
        let mut surprise = Surprise::default();
        let offsets = (-0.1, 0.1);
        for _ in 0..50 {
            let (low, high) = surprise.widen(offsets);
            surprise.observe(0.01, low, high);
        }
        assert!(surprise.widen(offsets).1 < 0.12);
        let (low, high) = surprise.widen(offsets);
        surprise.observe(1.0, low, high);
        assert!(surprise.widen(offsets).1 > 0.3);
        for _ in 0..20 {
            let (low, high) = surprise.widen(offsets);
            surprise.observe(0.01, low, high);
        }
        assert!(surprise.widen(offsets).1 < 0.12, "and narrow again");
    }

    #[test]
    fn no_interval_reaches_beyond_a_factor_of_twenty() {
        let mut interval = AdaptiveInterval::new(0.9);
        for _ in 0..200 {
            interval.observe(9.0, 0.0, -1.0, 1.0);
        }
        assert_eq!(interval.apply(0.0, -1.0, 1.0).1, REACH_MAX);
    }
}
