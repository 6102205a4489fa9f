//! The predictor that keeps a model honest by always asking the baselines too.

use std::sync::Arc;

use super::baseline::{LastValue, MovingAverage};
use super::model::{Prediction, QualityModel};
use super::schema::FeatureVector;

/// What is forecast for one route, by everyone asked.
#[derive(Clone, Debug, PartialEq)]
pub struct Forecast {
    /// The features that the forecasts are made from.
    pub features: FeatureVector,
    /// The trained model's forecast; `None` without a model, when it is switched off or failed.
    pub model: Option<Prediction>,
    /// The moving average's.
    pub moving_average: Option<Prediction>,
    /// The last value's.
    pub last_value: Option<Prediction>,
}

impl Forecast {
    /// The forecast that the router acts on: the model's, else the moving average's.
    pub fn best(&self) -> Option<Prediction> {
        self.model.or(self.moving_average)
    }
}

/// The trained model in use, if any, beside the baselines that are always there.
#[derive(Clone, Default)]
pub struct RoutePredictor {
    model: Option<Arc<dyn QualityModel>>,
    enabled: bool,
    failures: u64,
}

impl RoutePredictor {
    /// Without a model. `enabled` is the operator's switch: when off, no model is asked.
    pub fn new(enabled: bool) -> Self {
        Self { model: None, enabled, failures: 0 }
    }

    /// Replaces the model; `None` goes back to the moving average.
    pub fn set_model(&mut self, model: Option<Arc<dyn QualityModel>>) {
        self.model = model;
    }

    /// Version of the model that decides now; `moving-average` without one.
    pub fn version(&self) -> String {
        match &self.model {
            Some(model) if self.enabled => model.version().to_owned(),
            _ => MovingAverage.version().to_owned(),
        }
    }

    /// The model that decides now; `None` without one, or when it is switched off.
    pub fn model(&self) -> Option<Arc<dyn QualityModel>> {
        self.model.clone().filter(|_| self.enabled)
    }

    /// Forecasts of the model that were missing or absurd and were replaced by the moving
    /// average.
    pub fn failures(&self) -> u64 {
        self.failures
    }

    /// Asks the model and the baselines.
    pub fn forecast(&mut self, features: FeatureVector) -> Forecast {
        let moving_average = MovingAverage.predict(&features);
        let model = match &self.model {
            // Without any history there is nothing that the model was trained on.
            Some(model) if self.enabled && moving_average.is_some() => {
                let prediction = model.predict(&features).filter(Prediction::is_sane);
                if prediction.is_none() {
                    self.failures += 1;
                }
                prediction
            }
            _ => None,
        };
        Forecast { features, model, moving_average, last_value: LastValue.predict(&features) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::predict::schema::{FEATURES, MISSING, index_of};

    struct Constant(f64);

    impl QualityModel for Constant {
        fn version(&self) -> &str {
            "constant"
        }

        fn predict(&self, _: &FeatureVector) -> Option<Prediction> {
            Some(Prediction::of_latency(self.0))
        }
    }

    fn features() -> FeatureVector {
        let mut features = [MISSING; FEATURES.len()];
        features[index_of("route_mean5_ms").unwrap()] = 30.0;
        features
    }

    #[test]
    fn the_model_decides_and_the_baseline_stands_beside_it() {
        let mut predictor = RoutePredictor::new(true);
        assert_eq!(predictor.version(), "moving-average");
        predictor.set_model(Some(Arc::new(Constant(20.0))));
        let forecast = predictor.forecast(features());
        assert_eq!(forecast.best().unwrap().latency_ms, 20.0);
        assert_eq!(forecast.moving_average.unwrap().latency_ms, 30.0);
        assert_eq!(predictor.version(), "constant");
    }

    #[test]
    fn an_absurd_model_is_replaced_by_the_moving_average_and_counted() {
        for absurd in [f64::NAN, f64::INFINITY, -1.0, 0.0, 1e9] {
            let mut predictor = RoutePredictor::new(true);
            predictor.set_model(Some(Arc::new(Constant(absurd))));
            assert_eq!(predictor.forecast(features()).best().unwrap().latency_ms, 30.0);
            assert_eq!(predictor.failures(), 1);
        }
    }

    #[test]
    fn the_switch_turns_the_model_off() {
        let mut predictor = RoutePredictor::new(false);
        predictor.set_model(Some(Arc::new(Constant(20.0))));
        assert_eq!(predictor.forecast(features()).best().unwrap().latency_ms, 30.0);
        assert_eq!(predictor.version(), "moving-average");
    }
}
