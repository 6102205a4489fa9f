//! What a link is expected to carry: a pessimistic forecast from its newest bandwidth estimates.

use crate::engine::measure::Window;
use crate::engine::measure::window_statistics::quantile;

/// Estimates that count: with one a slice, those of the last minute of use.
pub const ESTIMATES: usize = 6;
/// Which quantile of them is promised to others. Of six values it lies between the lowest two.
pub const QUANTILE: f64 = 0.1;

/// What a link is counted on to carry while it was never busy (bytes/s): 20 Mbit/s, the least upload that
/// counts as broadband in the USA (FCC, 2024). Of that, flows from one neighbour may have 8 Mbit/s set
/// aside; once a link is busy, its estimates count, and a promise that no longer fits is not renewed.
pub const CAPACITY_UNKNOWN: f64 = 2_500_000.0;

/// The newest bandwidth estimates of one link.
#[derive(Clone, Debug)]
pub struct Capacity {
    estimates: Window<f64>,
}

impl Default for Capacity {
    fn default() -> Self {
        Self { estimates: Window::new(ESTIMATES) }
    }
}

impl Capacity {
    /// A new estimate (bytes/s).
    pub fn estimated(&mut self, bandwidth: f64) {
        self.estimates.push(bandwidth);
    }

    /// The newest estimate (bytes/s).
    pub fn newest(&self) -> Option<f64> {
        self.estimates.last()
    }

    /// What to count on (bytes/s); `None` when the link was never busy.
    pub fn predicted(&self) -> Option<f64> {
        let estimates: Vec<f64> = self.estimates.newest(ESTIMATES).collect();
        quantile(&estimates, QUANTILE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_forecast_is_near_the_lowest_of_the_newest_estimates() {
        let mut capacity = Capacity::default();
        assert_eq!((capacity.newest(), capacity.predicted()), (None, None));
        for estimate in [1.0, 900.0, 500.0, 700.0, 800.0, 600.0, 1_000.0] {
            capacity.estimated(estimate);
        }
        assert_eq!(capacity.newest(), Some(1_000.0));
        assert_eq!(capacity.predicted(), Some(550.0), "the 1.0 is too old");
    }
}
