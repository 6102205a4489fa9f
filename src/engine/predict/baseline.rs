//! The baselines that every model must beat, and that route traffic when there is none.

use super::model::{Prediction, QualityModel};
use super::schema::{FeatureVector, MISSING, index_of};

/// The mean of the last 5 answered probes of the route; for a route never probed, the sum of
/// its links' advertised RTTs.
#[derive(Clone, Copy, Debug)]
pub struct MovingAverage;

/// The last answered probe of the route, with the same fallback.
#[derive(Clone, Copy, Debug)]
pub struct LastValue;

impl QualityModel for MovingAverage {
    fn version(&self) -> &'static str {
        "moving-average"
    }

    fn predict(&self, features: &FeatureVector) -> Option<Prediction> {
        first_known(features, &["route_mean5_ms", "link_rtt_sum_ms"])
    }
}

impl QualityModel for LastValue {
    fn version(&self) -> &'static str {
        "last-value"
    }

    fn predict(&self, features: &FeatureVector) -> Option<Prediction> {
        first_known(features, &["route_last_ms", "link_rtt_sum_ms"])
    }
}

fn first_known(features: &FeatureVector, names: &[&str]) -> Option<Prediction> {
    names
        .iter()
        .filter_map(|name| index_of(name))
        .map(|index| features[index])
        .find(|value| *value != MISSING && *value > 0.0)
        .map(|latency_ms| Prediction { latency_ms, interval_ms: None })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::predict::schema::FEATURES;

    #[test]
    fn a_route_never_probed_is_judged_by_its_links() {
        let mut features = [MISSING; FEATURES.len()];
        assert_eq!(MovingAverage.predict(&features), None);
        features[index_of("link_rtt_sum_ms").unwrap()] = 40.0;
        assert_eq!(MovingAverage.predict(&features).unwrap().latency_ms, 40.0);
        features[index_of("route_mean5_ms").unwrap()] = 50.0;
        features[index_of("route_last_ms").unwrap()] = 60.0;
        assert_eq!(MovingAverage.predict(&features).unwrap().latency_ms, 50.0);
        assert_eq!(LastValue.predict(&features).unwrap().latency_ms, 60.0);
    }
}
