//! When forecasts of delivery are acted on.
//!
//! The rule:
//! - A model says how likely a route is to deliver only when its card shows that its head did better
//!   on later rows than the share delivered before ([`ReliabilityCard`]); otherwise the head is not
//!   evaluated at all.
//! - On this node it has to go on doing so. Of each completed route probe, lost or not, the squared
//!   error of the forecast and that of what was measured of the route until then (Brier, 1950) enter
//!   a weighted mean. While, over at least [`PROBES_MIN`] probes, the forecast's exceeds the measured
//!   one's by more than the slack, no forecast of delivery is acted on. So a head that was trained
//!   where much is lost, as the shipped one, does not count against routes where nothing is.
//! - It is asked on, and acted on again when its mean is back within the slack.
//!
//! What the score makes of a forecast says `engine::route::score`.
//!
//! [`ReliabilityCard`]: super::ReliabilityCard

use serde::{Deserialize, Serialize};

use super::schema::{FeatureVector, MISSING, index};
use super::watch::{MEMORY_PROBES, PROBES_MIN, SLACK_SHARE};
use crate::engine::measure::{HISTORY_WINDOW, end_to_end_loss};

/// By this much the forecast's mean squared error may exceed the measured one's in any case: that of
/// a loss of 1 % that is forecast where nothing is lost.
pub const SLACK: f64 = 0.0001;

/// Rolling squared errors of forecast and measured delivery over the same completed route probes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LiveDelivery {
    /// Probes so far, lost ones included.
    pub probes: u64,
    /// Weighted mean squared error of the forecast probability, 0 to 1.
    pub forecast: f64,
    /// That of the share that was measured when the probe left.
    pub measured: f64,
}

/// Sets what became of probes beside what was said of their delivery.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct DeliveryWatch(LiveDelivery);

impl DeliveryWatch {
    /// A probe was answered or lost that was forecast to come back with one probability, and by what
    /// was measured with another.
    pub fn observe(&mut self, forecast: f64, measured: f64, answered: bool) {
        let truth = f64::from(u8::from(answered));
        let live = &mut self.0;
        live.probes += 1;
        // The plain mean at first: no error weighs more because it came early.
        let weight = 1.0 / live.probes.min(MEMORY_PROBES) as f64;
        live.forecast += weight * ((forecast - truth).powi(2) - live.forecast);
        live.measured += weight * ((measured - truth).powi(2) - live.measured);
    }

    /// Whether forecasts of delivery may be acted on.
    pub fn allows(&self) -> bool {
        let LiveDelivery { probes, forecast, measured } = self.0;
        probes < PROBES_MIN || forecast <= measured * (1.0 + SLACK_SHARE) + SLACK
    }

    /// The figures.
    pub fn live(&self) -> LiveDelivery {
        self.0
    }
}

/// What was measured of a route's delivery, 0 to 1, as the score sees it; `None` when nothing is
/// known of its links.
pub(super) fn measured(features: &FeatureVector) -> Option<f64> {
    let claimed = features[const { index("link_loss") }];
    let (lost, probes) =
        (features[const { index("route_loss") }], features[const { index("route_count") }]);
    if claimed == MISSING {
        return None;
    }
    let (lost, probes) = if lost == MISSING { (0.0, 0.0) } else { (lost, probes) };
    Some(1.0 - end_to_end_loss(claimed, lost, (probes as usize).min(HISTORY_WINDOW)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::predict::schema::FEATURES;

    #[test]
    fn forecasts_count_while_they_keep_up_with_what_was_measured() {
        let mut watch = DeliveryWatch::default();
        // Nothing is lost where 5 % were forecast.
        for _ in 1..PROBES_MIN {
            watch.observe(0.95, 1.0, true);
            assert!(watch.allows(), "too few to tell");
        }
        watch.observe(0.95, 1.0, true);
        assert!(!watch.allows());
        // Then every tenth is, as forecast, and the measured share lags behind.
        for index in 0..2_000 {
            watch.observe(0.9, 0.99, index % 10 > 0);
        }
        assert!(watch.allows(), "{:?}", watch.live());
        assert!((watch.live().forecast - 0.09).abs() < 0.01, "{:?}", watch.live());
    }

    #[test]
    fn what_was_measured_is_what_the_links_claim_and_the_probes_met() {
        let mut features = [MISSING; FEATURES.len()];
        assert_eq!(measured(&features), None);
        features[index("link_loss")] = 0.1;
        assert!((measured(&features).unwrap() - 0.9).abs() < 1e-12);
        features[index("route_loss")] = 0.5;
        features[index("route_count")] = 60.0;
        // 6 of 60 claimed, 10 of the newest 20 lost.
        assert!((measured(&features).unwrap() - 0.8).abs() < 1e-12);
    }
}
