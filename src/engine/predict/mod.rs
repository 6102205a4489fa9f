//! Predict: from what is known about a route now to a forecast of what it will deliver next.
//!
//! [`schema`] names the features, [`route_features`] computes them, a [`QualityModel`] turns them into
//! a [`Prediction`], and the [`RoutePredictor`] always sets the baselines beside it. [`watch`] finds
//! a model out that does worse than the moving average, [`drift`] a change in its residuals,
//! [`profile`] a change in the features; an [`Explanation`] says what each feature contributed.

mod adaptive;
mod baseline;
mod card;
mod choice;
mod comparing;
mod delivery;
pub mod drift;
mod features;
mod foresight;
mod forest;
mod ledger;
mod mix;
mod model;
pub mod posterior;
mod predictor;
pub mod profile;
pub mod prospects;
mod ranking;
pub mod schema;
mod shap;
mod streams;
mod trees;
pub mod watch;

pub use adaptive::{AdaptiveInterval, Surprise, spanning};
pub use baseline::{LastValue, Level, MovingAverage};
pub use card::{ClassCard, RankingCard, ReliabilityCard, ThroughputCard};
pub use choice::{CHOICES_REMEMBERED_MAX, KnownChoice, KnownOffer};
pub use comparing::Comparing;
pub use delivery::{DeliveryWatch, LiveDelivery};
pub use features::route_features;
pub use foresight::Foresight;
pub use forest::{
    FORMAT, FORMAT_VERSION, ForestModel, Head, Interval, ModelCard, ModelError, Reference,
    ReliabilityHead, SCALE_RANGE, Score,
};
pub use ledger::{Ledger, Paid};
pub use mix::{EXPERTS, Mix};
pub use model::{Prediction, QualityModel, RTT_MS_MIN, ln_error};
pub use predictor::{Forecast, RoutePredictor};
pub use ranking::{
    CENTRES_COUNT, CHOICES_MIN, Centre, MARGINS, PESSIMISMS, Prospect, Ranking, RankingTuner,
    STALE_INTERVALS_MAX, blend_ms,
};
pub use schema::FeatureVector;
pub use shap::Explanation;
pub use streams::{Mixed, OWN_AFTER, STREAMS_MAX, Streams};
pub use trees::{DEPTH_MAX, NODES_MAX, Node, Trees};
