//! Predict: from what is known about a route now to a forecast of what it will deliver next.
//!
//! [`schema`] names the features, [`route_features`] computes them, a [`QualityModel`] turns them into
//! a [`Prediction`], and the [`RoutePredictor`] always sets the baselines beside it. An
//! [`Explanation`] says what each feature contributed.

mod baseline;
mod features;
mod forest;
mod model;
mod predictor;
pub mod schema;
mod shap;
mod trees;

pub use baseline::{LastValue, Level, MovingAverage};
pub use features::route_features;
pub use forest::{
    FORMAT, FORMAT_VERSION, ForestModel, Head, Interval, ModelCard, ModelError, Ranking, Reference,
    ReliabilityHead, SCALE_RANGE, Score,
};
pub use model::{Prediction, QualityModel};
pub use predictor::{Forecast, RoutePredictor};
pub use schema::FeatureVector;
pub use shap::Explanation;
pub use trees::{DEPTH_MAX, NODES_MAX, Node, Trees};
