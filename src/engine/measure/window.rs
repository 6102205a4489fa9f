//! A bounded window over the newest values, and its statistics.

use std::collections::VecDeque;

/// The newest `capacity` values, oldest first.
#[derive(Clone, Debug)]
pub struct Window<T> {
    values: VecDeque<T>,
    capacity: usize,
}

impl<T: Copy> Window<T> {
    /// An empty window. `capacity` is at least 1.
    pub fn new(capacity: usize) -> Self {
        Self { values: VecDeque::new(), capacity: capacity.max(1) }
    }

    /// Adds the newest value and forgets the oldest one when full.
    pub fn push(&mut self, value: T) {
        if self.values.len() == self.capacity {
            self.values.pop_front();
        }
        self.values.push_back(value);
    }

    /// Number of values held.
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// Whether nothing was pushed yet.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// The newest value.
    pub fn last(&self) -> Option<T> {
        self.values.back().copied()
    }

    /// The newest `count` values, oldest first.
    pub fn newest(&self, count: usize) -> impl Iterator<Item = T> + '_ {
        self.values.iter().skip(self.values.len().saturating_sub(count)).copied()
    }
}

/// Arithmetic mean; `None` of nothing.
pub fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// The `q`-quantile, 0 to 1, linear between order statistics (type 7 of Hyndman and Fan, 1996,
/// the default of NumPy and polars); `None` of nothing.
pub fn quantile(values: &[f64], q: f64) -> Option<f64> {
    if values.is_empty() {
        return None;
    }
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let position = (sorted.len() - 1) as f64 * q.clamp(0.0, 1.0);
    let low = position.floor() as usize;
    let high = position.ceil() as usize;
    Some(sorted[low] + (sorted[high] - sorted[low]) * (position - low as f64))
}

/// Natural logarithm of the ratio of two round-trip times (ms), each at least a microsecond.
pub fn ln_ratio(above_ms: f64, below_ms: f64) -> f64 {
    (above_ms.max(1e-3) / below_ms.max(1e-3)).ln()
}

/// Mean absolute difference between consecutive values (the jitter of RFC 3550, section 6.4.1,
/// without its smoothing); `None` of fewer than two.
pub fn mean_absolute_difference(values: &[f64]) -> Option<f64> {
    let differences: Vec<f64> = values.windows(2).map(|pair| (pair[1] - pair[0]).abs()).collect();
    mean(&differences)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_of_known_values() {
        assert_eq!(mean(&[1.0, 2.0, 6.0]), Some(3.0));
        assert_eq!(quantile(&[3.0, 1.0, 2.0, 4.0], 0.5), Some(2.5));
        assert_eq!(quantile(&[10.0], 0.9), Some(10.0));
        assert_eq!(mean_absolute_difference(&[1.0, 4.0, 2.0]), Some(2.5));
        assert_eq!(mean_absolute_difference(&[1.0]), None);
        assert_eq!((mean(&[]), quantile(&[], 0.5)), (None, None));
    }

    #[test]
    fn a_window_forgets_the_oldest() {
        let mut window = Window::new(3);
        for value in 1..=5 {
            window.push(value);
        }
        assert_eq!(window.newest(10).collect::<Vec<_>>(), [3, 4, 5]);
        assert_eq!(window.newest(2).collect::<Vec<_>>(), [4, 5]);
        assert_eq!(window.last(), Some(5));
    }
}
