//! The model file: one JSON document that describes itself.
//!
//! It holds format and version, feature names with the schema hash, the heads, the ranking rule,
//! and a card that says what it was trained on and how it did. Loading checks every index, so that
//! evaluation cannot leave the arrays or loop.
//!
//! The trees of a head predict how far, in ln(unit), the next value lies above a reference that is
//! known at the time. In XGBoost's words the reference is the base margin. Trees cannot
//! extrapolate: without it, a route that is slower than everything in the training data could
//! never be predicted to be.

use serde::{Deserialize, Serialize};

use super::baseline::{LastValue, Level, MovingAverage};
use super::card::{ClassCard, RankingCard, ReliabilityCard, ThroughputCard};
use super::model::{Prediction, QualityModel};
use super::profile::FeatureProfile;
use super::ranking::{Centre, Ranking};
use super::schema::{self, FEATURES, FeatureVector, MISSING, schema_hash};
use super::shap::Explanation;
use super::trees::Trees;

/// First field of every model file.
pub const FORMAT: &str = "meshwise-forest";
/// Version of the file layout.
pub const FORMAT_VERSION: u32 = 2;

/// A trained model, as stored and as evaluated.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ForestModel {
    /// Always [`FORMAT`].
    pub format: String,
    /// Always [`FORMAT_VERSION`].
    pub format_version: u32,
    /// Name of this version, unique within a registry.
    pub version: String,
    /// [`schema_hash`] of the features that the trees were grown on.
    pub schema_hash: String,
    /// Names of those features, in order.
    pub feature_names: Vec<String>,
    /// Forecasts the next end-to-end round trip, ln(ms).
    pub latency: Head,
    /// Forecasts the bandwidth of the route, ln(bytes/s); asked when its card
    /// [says that it may](ThroughputCard::earns_its_place).
    pub throughput: Option<Head>,
    /// Forecasts the probability that the route delivers; asked when its card
    /// [says that it may](ReliabilityCard::earns_its_place).
    pub reliability: Option<ReliabilityHead>,
    /// How the router turns forecasts into a choice. Always about the forecast: a file with another
    /// centre was written before rules were chosen in training, when the router went by
    /// [`Ranking::FORECAST`], and is read as that.
    pub ranking: Ranking,
    /// What it was trained on and how it did.
    pub card: ModelCard,
}

/// A forecast that is there without a model, from which the trees predict the distance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reference {
    /// [`LastValue`].
    LastValue,
    /// [`MovingAverage`].
    MovingAverage,
    /// [`Level`].
    Level,
    /// The bandwidth of the narrowest link (bytes/s).
    LinkBandwidth,
    /// None: the trees predict the logarithm itself.
    Zero,
}

impl Reference {
    /// The reference, ln(ms) or ln(bytes/s); `None` when nothing is known of the route.
    pub fn ln(self, features: &FeatureVector) -> Option<f64> {
        let latency = |baseline: &dyn QualityModel| {
            baseline.predict(features).map(|prediction| prediction.latency_ms.ln())
        };
        match self {
            Self::LastValue => latency(&LastValue),
            Self::MovingAverage => latency(&MovingAverage),
            Self::Level => latency(&Level),
            Self::LinkBandwidth => {
                let bandwidth = features[schema::index("link_bandwidth_min")];
                (bandwidth != MISSING && bandwidth > 0.0).then(|| bandwidth.ln())
            }
            Self::Zero => Some(0.0),
        }
    }
}

/// A regressor of one positive quantity on the natural-log scale, with its interval.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Head {
    /// What is predicted, such as `ln_route_rtt_ms`.
    pub target: String,
    /// What the trees predict the distance from.
    pub reference: Reference,
    /// The trees of the forecast.
    pub trees: Trees,
    /// The trees of ln(scale): how far off, on the ln scale, such forecasts were. `None`: 1.
    pub scale: Option<Trees>,
    /// Split-conformal interval.
    pub interval: Interval,
}

/// Smallest and largest scale that is believed, on the ln scale: 0.1 % and a factor of 20.
pub const SCALE_RANGE: (f64, f64) = (0.001, 3.0);

impl Head {
    /// The forecast (ln unit); `None` when its reference is not known.
    pub fn ln(&self, features: &FeatureVector) -> Option<f64> {
        Some(self.reference.ln(features)? + self.trees.evaluate(features))
    }

    /// How far off forecasts from such features were on the ln scale: the geometric mean of the
    /// absolute error, within [`SCALE_RANGE`]; 1 without a scale model.
    pub fn scale(&self, features: &FeatureVector) -> f64 {
        let scale = self.scale.as_ref().map(|trees| trees.evaluate(features).exp());
        scale.map_or(1.0, |scale| scale.clamp(SCALE_RANGE.0, SCALE_RANGE.1))
    }

    /// Checks trees and numbers.
    fn validate(&self) -> Result<(), String> {
        self.trees.validate(FEATURES.len())?;
        if let Some(scale) = &self.scale {
            scale.validate(FEATURES.len())?;
        }
        if !self.interval.low.is_finite() || !self.interval.high.is_finite() {
            return Err("its interval is not finite".into());
        }
        Ok(())
    }
}

/// Split-conformal interval on the natural-log scale (Lei et al., 2018): the truth lay between
/// `forecast + low * scale` and `forecast + high * scale` in `coverage` of the calibration rows.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Interval {
    /// Share of calibration rows inside, 0 to 1.
    pub coverage: f64,
    /// Times the scale, added to the forecast for the lower end.
    pub low: f64,
    /// Times the scale, added to the forecast for the upper end.
    pub high: f64,
}

/// Bagged classification trees with calibrated probabilities.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReliabilityHead {
    /// Each tree adds its share of votes for "delivers"; the sum is 0 to 1.
    pub trees: Trees,
    /// Slope of Platt's sigmoid (Platt, 1999): probability = 1 / (1 + exp(a * votes + b)).
    pub platt_a: f64,
    /// Offset of Platt's sigmoid.
    pub platt_b: f64,
}

impl ReliabilityHead {
    /// Probability that the route delivers, 0 to 1.
    pub fn probability(&self, features: &FeatureVector) -> f64 {
        1.0 / (1.0 + (self.platt_a * self.trees.evaluate(features) + self.platt_b).exp())
    }
}

/// How a forecaster did on the test rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Score {
    /// Share of rows within max(20 % of the truth, 5 ms), 0 to 1.
    pub accuracy: f64,
    /// Mean absolute error (ms).
    pub mae_ms: f64,
    /// Root mean squared error of ln(ms).
    pub rmse_ln: f64,
}

/// What a model was trained on, and how it did on the newest rows, which it never saw.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelCard {
    /// Time of the newest row that training saw (µs since the epoch), so that the same rows and
    /// seed give the same file.
    pub created_us: u64,
    /// First and last moment of the training rows (µs since the epoch).
    pub trained_from_us: u64,
    /// See `trained_from_us`.
    pub trained_to_us: u64,
    /// Answered rows that the latency head was fitted on, the oldest.
    pub rows_train: usize,
    /// Answered rows after them: reference, shrinkage, scale, intervals and
    /// the ranking rule come from these.
    pub rows_calibrate: usize,
    /// Answered rows after those, which nothing was chosen on: all figures below are of these.
    pub rows_test: usize,
    /// Seed of the fit.
    pub seed: u64,
    /// Commit of the program that trained it; `unknown` when that was not built in a checkout,
    /// `imported` or `shipped` when it was not trained here. Written when the model is registered,
    /// not by the training: the same rows and seed give the same model with any program that
    /// trains alike. `None` in older files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
    /// The library's parameters, as text.
    pub parameters: String,
    /// Factor that the latency head's leaves were multiplied by, 0 to 1; 0: the reference alone.
    pub shrink: f64,
    /// This model on the test rows.
    pub model: Score,
    /// The moving average on the same rows.
    pub moving_average: Score,
    /// The last value on the same rows.
    pub last_value: Score,
    /// How the features were distributed over the training rows, in schema order; may be empty.
    #[serde(default)]
    pub profile: Vec<FeatureProfile>,
    /// The robust level on the same rows.
    pub level: Score,
    /// Share of test rows inside the interval, 0 to 1.
    pub coverage: f64,
    /// Mean width of the interval, ln(ms).
    pub width_ln: f64,
    /// The same by class of path; classes without test rows are left out.
    pub classes: Vec<ClassCard>,
    /// The reliability head, when there is one.
    pub reliability: Option<ReliabilityCard>,
    /// The throughput head, when there is one.
    pub throughput: Option<ThroughputCard>,
    /// How the ranking rule was chosen; `None` when it was not.
    #[serde(default)]
    pub ranking: Option<RankingCard>,
    /// What the figures above say against the model, in sentences.
    pub known_failures: Vec<String>,
}

impl ModelCard {
    /// Whether the model may route traffic: it was measured, and does at least as well as the
    /// moving average, both by the share predicted well and by the error that was fitted.
    pub fn earns_its_place(&self) -> bool {
        self.rows_test > 0
            && self.model.accuracy >= self.moving_average.accuracy
            && self.model.rmse_ln <= self.moving_average.rmse_ln
    }
}

/// A model file that cannot be used. The router goes on with the model it has.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ModelError {
    /// Truncated, or not a model at all.
    #[error(
        "the model file is damaged or not a model ({0}); train a new one with 'meshwise model train'"
    )]
    Damaged(String),
    /// Written by another version of the format.
    #[error(
        "the model file has format version {found}, this program reads {FORMAT_VERSION}; train a new one"
    )]
    FormatVersion {
        /// What the file says.
        found: u32,
    },
    /// Trained on other features.
    #[error(
        "the model was trained on feature schema {found}, this program computes {expected}; train a \
         new one with 'meshwise model train'"
    )]
    Schema {
        /// What the file says.
        found: String,
        /// What this program computes.
        expected: String,
    },
}

impl ForestModel {
    /// Reads and checks a model file.
    ///
    /// # Errors
    /// See [`ModelError`]; nothing is half loaded.
    pub fn from_json(bytes: &[u8]) -> Result<Self, ModelError> {
        let mut model: Self = serde_json::from_slice(bytes)
            .map_err(|error| ModelError::Damaged(error.to_string()))?;
        if model.format != FORMAT {
            return Err(ModelError::Damaged(format!("its format is not {FORMAT}")));
        }
        if model.format_version != FORMAT_VERSION {
            return Err(ModelError::FormatVersion { found: model.format_version });
        }
        let expected = schema_hash();
        if model.schema_hash != expected {
            return Err(ModelError::Schema { found: model.schema_hash, expected });
        }
        model.validate().map_err(ModelError::Damaged)?;
        if model.ranking.centre != Centre::Forecast {
            model.ranking = Ranking::FORECAST;
        }
        Ok(model)
    }

    /// The throughput head, when its card says that it may decide.
    fn throughput_in_use(&self) -> Option<&Head> {
        let earns = self.card.throughput.is_some_and(|card| card.earns_its_place());
        self.throughput.as_ref().filter(|_| earns)
    }

    /// The reliability head, when its card says that it may decide.
    fn reliability_in_use(&self) -> Option<&ReliabilityHead> {
        let earns = self.card.reliability.is_some_and(|card| card.earns_its_place());
        self.reliability.as_ref().filter(|_| earns)
    }

    fn validate(&self) -> Result<(), String> {
        self.latency.validate()?;
        if let Some(throughput) = &self.throughput {
            throughput.validate()?;
        }
        if let Some(reliability) = &self.reliability {
            reliability.trees.validate(FEATURES.len())?;
            if !reliability.platt_a.is_finite() || !reliability.platt_b.is_finite() {
                return Err("its calibration is not finite".into());
            }
        }
        let Ranking { pessimism, staleness, margin, .. } = self.ranking;
        let unit = 0.0..=1.0;
        if !(0.0..=10.0).contains(&pessimism)
            || !unit.contains(&staleness)
            || !unit.contains(&margin)
        {
            return Err("its ranking rule is out of range".into());
        }
        Ok(())
    }

    /// Explains the latency forecast: its logarithm (ln ms) is the expectation plus all
    /// contributions. The expectation is the reference of this route plus what the trees add on
    /// average; a contribution is what a feature adds to or takes from that. `None` when the
    /// reference is not known.
    pub fn explain(&self, features: &FeatureVector) -> Option<Explanation> {
        let reference = self.latency.reference.ln(features)?;
        let trees = self.latency.trees.explain(features);
        Some(Explanation { expectation: reference + trees.expectation, ..trees })
    }

    /// The file's text.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("a model holds only numbers, text and lists")
    }
}

impl QualityModel for ForestModel {
    fn version(&self) -> &str {
        &self.version
    }

    fn predict(&self, features: &FeatureVector) -> Option<Prediction> {
        let ln = self.latency.ln(features)?;
        let scale = self.latency.scale(features);
        let Interval { low, high, .. } = self.latency.interval;
        Some(Prediction {
            latency_ms: ln.exp(),
            bound_ms: ln.exp() * (1.0 + self.ranking.pessimism * scale),
            interval_ms: Some(((ln + low * scale).exp(), (ln + high * scale).exp())),
            scale: Some(scale),
            delivery: self.reliability_in_use().map(|head| head.probability(features)),
            bandwidth: self.throughput_in_use().and_then(|head| Some(head.ln(features)?.exp())),
        })
    }

    fn explain(&self, features: &FeatureVector) -> Option<Explanation> {
        Self::explain(self, features)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::engine::predict::schema::index_of;

    /// One tree: half of the last value where that is at most 10 ms, three times as much above.
    fn stump() -> ForestModel {
        let last = index_of("route_last_ms").unwrap() as u16;
        let mut trees = Trees { base: 0.0, ..Trees::default() };
        let root = trees.push_split(last, 10.0);
        let left = trees.push_leaf(0.5_f64.ln());
        let right = trees.push_leaf(3.0_f64.ln());
        trees.set_children(root, left, right);
        trees.roots.push(root);
        ForestModel {
            format: FORMAT.into(),
            format_version: FORMAT_VERSION,
            version: "test".into(),
            schema_hash: schema_hash(),
            feature_names: FEATURES.iter().map(|f| f.name.to_owned()).collect(),
            latency: Head {
                target: "ln_route_rtt_ms".into(),
                reference: Reference::LastValue,
                trees,
                scale: None,
                interval: Interval { coverage: 0.9, low: -0.1, high: 0.1 },
            },
            throughput: None,
            reliability: None,
            ranking: Ranking::FORECAST,
            card: ModelCard::default(),
        }
    }

    #[test]
    fn a_stump_decides_by_its_threshold_and_survives_the_file() {
        let model = ForestModel::from_json(stump().to_json().as_bytes()).unwrap();
        assert_eq!(model, stump());
        let mut features = [0.0; FEATURES.len()];
        for (last, expected) in [(9.0, 4.5), (10.0, 5.0), (20.0, 60.0), (9_000.0, 27_000.0)] {
            features[index_of("route_last_ms").unwrap()] = last;
            let prediction = model.predict(&features).unwrap();
            assert!((prediction.latency_ms - expected).abs() < 1e-9);
            let (low, high) = prediction.interval_ms.unwrap();
            assert!(low < expected && expected < high);
        }
    }

    #[test]
    fn an_explanation_adds_up_to_the_forecast_and_is_reached_through_the_trait() {
        let mut model = stump();
        model.latency.trees.cover = vec![4.0, 3.0, 1.0];
        let model: &dyn QualityModel = &model;
        let mut features = [MISSING; FEATURES.len()];
        assert_eq!(model.explain(&features), None, "nothing is known of the route");
        let last = index_of("route_last_ms").unwrap();
        features[last] = 20.0;
        let found = model.explain(&features).unwrap();
        let average = 0.75 * 0.5_f64.ln() + 0.25 * 3.0_f64.ln();
        assert!((found.expectation - (20.0_f64.ln() + average)).abs() < 1e-12);
        assert!((found.contributions[last] - (3.0_f64.ln() - average)).abs() < 1e-12);
        let forecast = model.predict(&features).unwrap().latency_ms;
        assert!((found.expectation + found.sum() - forecast.ln()).abs() < 1e-12);
        assert_eq!(crate::engine::predict::LastValue.explain(&features), None);
    }

    #[test]
    fn a_rule_that_is_not_about_forecasts_is_read_as_what_the_router_did_with_it() {
        let mut model = stump();
        let read = |model: &ForestModel| ForestModel::from_json(model.to_json().as_bytes());
        model.ranking = Ranking { pessimism: 1.0, margin: 0.2, ..Ranking::FORECAST };
        assert_eq!(read(&model).unwrap(), model);
        model.ranking = Ranking { centre: Centre::Level, ..model.ranking };
        let before = read(&model).unwrap();
        assert_eq!(before.ranking, Ranking::FORECAST);
        let mut features = [MISSING; FEATURES.len()];
        features[index_of("route_last_ms").unwrap()] = 8.0;
        let bound_ms = |model: &ForestModel| model.predict(&features).unwrap().bound_ms;
        assert!((bound_ms(&before) - 4.0 * 1.25).abs() < 1e-9);
        model.ranking = Ranking { pessimism: 2.0, ..Ranking::FORECAST };
        assert!((bound_ms(&model) - 4.0 * 3.0).abs() < 1e-9);
        model.ranking.margin = 1.1;
        assert!(matches!(read(&model), Err(ModelError::Damaged(_))));
    }

    #[test]
    fn delivery_is_forecast_only_where_the_card_beats_the_base_rate() {
        let mut model = stump();
        let mut trees = Trees::default();
        let root = trees.push_leaf(1.0);
        trees.roots.push(root);
        model.reliability = Some(ReliabilityHead { trees, platt_a: 0.0, platt_b: -3.0_f64.ln() });
        let good = ReliabilityCard {
            rows: 500,
            lost: 30,
            brier: 0.04,
            brier_base: 0.05,
            log_loss: 0.2,
            log_loss_base: 0.3,
        };
        let mut features = [MISSING; FEATURES.len()];
        features[index_of("route_last_ms").unwrap()] = 8.0;
        for (card, delivery) in [
            (Some(good), Some(0.75)),
            (None, None),
            (Some(ReliabilityCard { brier: 0.05, ..good }), None),
            (Some(ReliabilityCard { log_loss: 0.4, ..good }), None),
            (Some(ReliabilityCard { lost: 9, ..good }), None),
        ] {
            model.card.reliability = card;
            let found = model.predict(&features).unwrap().delivery;
            assert_eq!(found.map(|p| (p * 1e9).round() / 1e9), delivery, "{card:?}");
        }
    }

    #[test]
    fn a_card_without_word_of_the_ranking_is_read() {
        let text = stump().to_json();
        let before = text.replace("\"ranking\":null,", "");
        assert_ne!(text, before);
        assert_eq!(ForestModel::from_json(before.as_bytes()).unwrap(), stump());
    }

    #[test]
    fn a_card_with_and_without_a_commit_is_read() {
        let mut model = stump();
        assert!(!model.to_json().contains("commit"));
        model.card.commit = Some("0123456789ab".into());
        let text = model.to_json();
        assert!(text.contains("\"commit\":\"0123456789ab\""));
        assert_eq!(ForestModel::from_json(text.as_bytes()).unwrap(), model);
    }

    #[test]
    fn every_truncation_is_refused() {
        let text = stump().to_json();
        for length in 0..text.len() {
            let result = ForestModel::from_json(&text.as_bytes()[..length]);
            assert!(matches!(result, Err(ModelError::Damaged(_))), "at {length}");
        }
    }

    #[test]
    fn another_schema_is_refused_and_both_are_named() {
        let mut model = stump();
        model.schema_hash = "0123456789abcdef".into();
        let error = ForestModel::from_json(model.to_json().as_bytes()).unwrap_err().to_string();
        assert!(error.contains("0123456789abcdef") && error.contains(&schema_hash()), "{error}");
    }

    #[test]
    fn a_loop_a_stray_child_and_a_strange_feature_are_refused() {
        type Damage = fn(&mut Trees);
        let damages: [Damage; 6] = [
            |trees| trees.nodes[0].children[0] = 0,
            |trees| trees.nodes[0].children[1] = 99,
            |trees| assert_eq!(trees.push_split(500, 1.0), 3),
            |trees| trees.roots[0] = 3,
            |trees| trees.roots.clear(),
            |trees| trees.cover.truncate(1),
        ];
        for damage in damages {
            let mut model = stump();
            damage(&mut model.latency.trees);
            let result = ForestModel::from_json(model.to_json().as_bytes());
            assert!(matches!(result, Err(ModelError::Damaged(_))), "{:?}", model.latency.trees);
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            prop_assert!(ForestModel::from_json(&bytes).is_err());
        }

        #[test]
        fn arbitrary_damage_to_a_file_never_panics(at in 0usize..1900, byte in any::<u8>()) {
            let mut bytes = stump().to_json().into_bytes();
            let at = at % bytes.len();
            bytes[at] = byte;
            if let Ok(model) = ForestModel::from_json(&bytes) {
                model.predict(&[0.0; FEATURES.len()]);
            }
        }
    }
}
