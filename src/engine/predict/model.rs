//! The contract between the router and anything that forecasts.

use super::schema::FeatureVector;
use super::shap::Explanation;

/// Largest latency that is believed (ms); a forecast beyond it counts as failed.
pub const LATENCY_MS_MAX: f64 = 60_000.0;

/// Smallest round trip (ms): the clock counts microseconds, and ln 0 is not a number.
pub const RTT_MS_MIN: f64 = 0.001;

/// How far a forecast lies above the truth, ln(ms); both count as [`RTT_MS_MIN`] at least.
pub fn ln_error(forecast_ms: f64, truth_ms: f64) -> f64 {
    forecast_ms.max(RTT_MS_MIN).ln() - truth_ms.max(RTT_MS_MIN).ln()
}

/// A forecast of the next end-to-end round trip over a route.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prediction {
    /// Round-trip time (ms), above 0.
    pub latency_ms: f64,
    /// Lower and upper end (ms) of the interval that holds the truth in the share of cases that
    /// the model states; `None` when it states none.
    pub interval_ms: Option<(f64, f64)>,
    /// What forecasts are compared by where models are judged on them alone (ms), at least `latency_ms`: a
    /// pessimistic bound, because the lowest of many noisy forecasts is too low (see [`Ranking`](super::Ranking)). Routers
    /// compare by a [`Prospect`](super::Prospect).
    pub bound_ms: f64,
    /// How far off such forecasts were, on the ln scale: about the relative error; above 0.
    pub scale: Option<f64>,
    /// Probability that the route delivers, 0 to 1; `None` when nobody says so who has earned it.
    pub delivery: Option<f64>,
    /// Bandwidth that a tunnel gets on the route (bytes/s), above 0.
    pub bandwidth: Option<f64>,
}

impl Prediction {
    /// A forecast of the latency alone.
    pub fn of_latency(latency_ms: f64) -> Self {
        Self {
            latency_ms,
            interval_ms: None,
            bound_ms: latency_ms,
            scale: None,
            delivery: None,
            bandwidth: None,
        }
    }

    /// Whether every number is one that can be.
    pub fn is_sane(&self) -> bool {
        self.latency_ms > 0.0
            && self.latency_ms <= LATENCY_MS_MAX
            && self.bound_ms >= self.latency_ms
            && self.bound_ms.is_finite()
            && self.delivery.is_none_or(|delivery| (0.0..=1.0).contains(&delivery))
            && self.bandwidth.is_none_or(|bandwidth| bandwidth.is_finite() && bandwidth > 0.0)
    }
}

/// Something that forecasts route quality from features.
pub trait QualityModel: Send + Sync {
    /// What decisions are logged under: a version or the name of a rule.
    fn version(&self) -> &str;

    /// A forecast, or `None` when these features do not allow one.
    fn predict(&self, features: &FeatureVector) -> Option<Prediction>;

    /// The latency forecast on the ln(ms) scale as an expectation and what each feature adds;
    /// `None` when these features allow no forecast, or the model cannot say.
    fn explain(&self, _features: &FeatureVector) -> Option<Explanation> {
        None
    }
}
