//! The baselines that every model must beat, and that route traffic when there is none.

use super::model::{Prediction, QualityModel};
use super::schema::{FeatureVector, MISSING, index};

/// The mean of the last 5 answered probes of the route; for a route never probed, the sum of its
/// links' means; for links nobody advertised, the distance by coordinates.
#[derive(Clone, Copy, Debug)]
pub struct MovingAverage;

/// The last answered probe of the route, with the same fallback.
#[derive(Clone, Copy, Debug)]
pub struct LastValue;

/// A robust level: halfway between the medians of the last 3 and of the last 5 answered probes,
/// with the same fallback. Three quick values move it, one outlier does not.
#[derive(Clone, Copy, Debug)]
pub struct Level;

impl QualityModel for MovingAverage {
    fn version(&self) -> &'static str {
        "moving-average"
    }

    fn predict(&self, features: &FeatureVector) -> Option<Prediction> {
        first_known(
            features,
            const { [index("route_mean5_ms"), index("link_mean5_sum_ms"), COORDINATES] },
        )
    }
}

impl QualityModel for LastValue {
    fn version(&self) -> &'static str {
        "last-value"
    }

    fn predict(&self, features: &FeatureVector) -> Option<Prediction> {
        first_known(
            features,
            const { [index("route_last_ms"), index("link_last_sum_ms"), COORDINATES] },
        )
    }
}

impl QualityModel for Level {
    fn version(&self) -> &'static str {
        "level"
    }

    fn predict(&self, features: &FeatureVector) -> Option<Prediction> {
        let three =
            const { [index("route_median3_ms"), index("link_median3_sum_ms"), COORDINATES] };
        let five =
            const { [index("route_median_5_ms"), index("link_median_5_sum_ms"), COORDINATES] };
        let (three, five) = (first_known(features, three)?, first_known(features, five)?);
        Some(Prediction::of_latency((three.latency_ms + five.latency_ms) / 2.0))
    }
}

const COORDINATES: usize = index("coordinate_sum_ms");

fn first_known(features: &FeatureVector, indices: [usize; 3]) -> Option<Prediction> {
    let mut values = indices.into_iter().map(|index| features[index]);
    values.find(|value| *value != MISSING && *value > 0.0).map(Prediction::of_latency)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::predict::schema::FEATURES;

    #[test]
    fn a_route_never_probed_is_judged_by_its_links() {
        let mut features = [MISSING; FEATURES.len()];
        assert_eq!(MovingAverage.predict(&features), None);
        features[index("link_mean5_sum_ms")] = 40.0;
        assert_eq!(MovingAverage.predict(&features).unwrap().latency_ms, 40.0);
        features[index("route_mean5_ms")] = 50.0;
        features[index("route_last_ms")] = 60.0;
        assert_eq!(MovingAverage.predict(&features).unwrap().latency_ms, 50.0);
        assert_eq!(LastValue.predict(&features).unwrap().latency_ms, 60.0);
    }
}
