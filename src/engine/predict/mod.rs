//! Predict: from what is known about a route now to a forecast of what it will deliver next.
//!
//! [`schema`] names the features, [`route_features`] computes them, a [`QualityModel`] turns them into
//! a [`Prediction`], and the [`RoutePredictor`] always sets the baselines beside it.

mod adaptive;
mod baseline;
mod card;
mod features;
mod forest;
mod mix;
mod model;
mod predictor;
pub mod schema;
mod trees;

pub use adaptive::AdaptiveInterval;
pub use baseline::{LastValue, Level, MovingAverage};
pub use card::{ClassCard, ReliabilityCard, ThroughputCard};
pub use features::route_features;
pub use forest::{
    FORMAT, FORMAT_VERSION, ForestModel, Head, Interval, ModelCard, ModelError, Ranking, Reference,
    ReliabilityHead, SCALE_RANGE, Score,
};
pub use mix::{EXPERTS, Mix};
pub use model::{Prediction, QualityModel};
pub use predictor::{Forecast, RoutePredictor};
pub use schema::FeatureVector;
pub use trees::{NODES_MAX, Trees};
