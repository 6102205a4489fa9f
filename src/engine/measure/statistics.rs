//! The statistics that every window of round-trip times is summed up in, for links and routes
//! alike. The offline feature builder computes the same ones with polars.

use super::window::Window;

/// Longest window of any statistic.
pub const WINDOW: usize = 60;
/// Names of the statistics, in the order of [`Statistics::values`].
pub const STATISTICS: [&str; 21] = [
    "last",
    "mean5",
    "mean20",
    "mean60",
    "median3",
    "p10_5",
    "p25_5",
    "median_5",
    "p90_5",
    "p10_20",
    "p25_20",
    "median_20",
    "p90_20",
    "p10_60",
    "p25_60",
    "median_60",
    "p90_60",
    "error60",
    "deviation5",
    "deviation60",
    "min60",
];

/// Statistics over the newest [`WINDOW`] round-trip times (ms).
///
/// Quantiles are linear between order statistics (type 7 of Hyndman and Fan, 1996); deviations
/// are population standard deviations, 0 of a single value; the error is the deviation of the
/// window over the root of its length.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Statistics {
    /// In the order of [`STATISTICS`].
    pub values: [f64; STATISTICS.len()],
    /// Round-trip times in the window, 1 to [`WINDOW`].
    pub count: usize,
}

impl Statistics {
    /// Of a window that holds at least one value; `None` of an empty one.
    pub fn of(window: &Window<f64>) -> Option<Self> {
        let mut newest = [0.0; WINDOW];
        let mut count = 0;
        for (slot, value) in newest.iter_mut().zip(window.newest(WINDOW)) {
            *slot = value;
            count += 1;
        }
        let all = &newest[..count];
        let last = *all.last()?;
        let tail = |length: usize| &all[count.saturating_sub(length)..];
        let (three, five, twenty) = (tail(3), tail(5), tail(20));
        let (mean5, deviation5) = moments(five);
        let (mean20, _) = moments(twenty);
        let (mean60, deviation60) = moments(all);
        let [_, _, median3, _, _] = quantiles(three);
        let [_, p10_5, median_5, p25_5, p90_5] = quantiles(five);
        let [_, p10_20, median_20, p25_20, p90_20] = quantiles(twenty);
        let [min60, p10_60, median_60, p25_60, p90_60] = quantiles(all);
        let error60 = deviation60 / (count as f64).sqrt();
        let values = [
            last,
            mean5,
            mean20,
            mean60,
            median3,
            p10_5,
            p25_5,
            median_5,
            p90_5,
            p10_20,
            p25_20,
            median_20,
            p90_20,
            p10_60,
            p25_60,
            median_60,
            p90_60,
            error60,
            deviation5,
            deviation60,
            min60,
        ];
        Some(Self { values, count })
    }
}

/// Mean and population standard deviation of at least one value.
fn moments(values: &[f64]) -> (f64, f64) {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (mean, (squares / count).sqrt())
}

/// Minimum, 10th percentile, median, 25th and 90th percentile of 1 to [`WINDOW`] values.
fn quantiles(values: &[f64]) -> [f64; 5] {
    let mut sorted = [0.0; WINDOW];
    let sorted = &mut sorted[..values.len()];
    sorted.copy_from_slice(values);
    sorted.sort_unstable_by(f64::total_cmp);
    [0.0, 0.1, 0.5, 0.25, 0.9].map(|q| {
        let position = (sorted.len() - 1) as f64 * q;
        let (low, high) = (position.floor() as usize, position.ceil() as usize);
        sorted[low] + (sorted[high] - sorted[low]) * (position - low as f64)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(values: &[f64]) -> Statistics {
        let mut window = Window::new(WINDOW);
        values.iter().for_each(|value| window.push(*value));
        Statistics::of(&window).unwrap()
    }

    fn named(statistics: &Statistics, name: &str) -> f64 {
        statistics.values[STATISTICS.iter().position(|other| *other == name).unwrap()]
    }

    #[test]
    fn statistics_of_known_values() {
        let found = of(&[9.0, 1.0, 4.0, 2.0, 3.0, 10.0]);
        for (name, value) in [
            ("last", 10.0),
            ("mean5", 4.0),
            ("mean60", 29.0 / 6.0),
            ("median3", 3.0),
            ("median_5", 3.0),
            ("p90_5", 7.6),
            ("p25_60", 2.25),
            ("deviation5", 10.0_f64.sqrt()),
            ("min60", 1.0),
        ] {
            assert!((named(&found, name) - value).abs() < 1e-12, "{name}");
        }
        let deviation = named(&found, "deviation60");
        assert!((named(&found, "error60") - deviation / 6.0_f64.sqrt()).abs() < 1e-12);
        assert_eq!(found.count, 6);
    }

    #[test]
    fn one_value_has_no_deviation_and_none_has_no_statistics() {
        let found = of(&[7.0]);
        assert_eq!((named(&found, "median_60"), named(&found, "error60")), (7.0, 0.0));
        assert_eq!(Statistics::of(&Window::new(WINDOW)), None);
    }

    #[test]
    fn only_the_newest_values_count() {
        let mut values = vec![1_000.0; 30];
        values.extend(vec![5.0; WINDOW]);
        assert_eq!(of(&values), of(&[5.0; WINDOW]));
    }
}
