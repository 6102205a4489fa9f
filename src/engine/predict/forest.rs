//! The model file and its evaluator: gradient-boosted trees as flat arrays.
//!
//! A file is one JSON document that describes itself: format and version, target, feature names
//! with the schema hash, the trees, the interval, and a card that says what it was trained on and
//! how it did. Loading checks every index, so that evaluation cannot leave the arrays or loop.
//!
//! The trees predict how far, in ln(ms), the next round trip lies above a reference that is known
//! at the time (`base + sum of leaves`; a node sends a row left when `feature <= threshold`). In
//! XGBoost's words the reference is the base margin. Trees cannot extrapolate: without it, a route
//! that is slower than everything in the training data could never be predicted to be.

use serde::{Deserialize, Serialize};

use super::baseline::{LastValue, MovingAverage};
use super::model::{Prediction, QualityModel};
use super::schema::{FEATURES, FeatureVector, schema_hash};

/// First field of every model file.
pub const FORMAT: &str = "meshwise-forest";
/// Version of the file layout.
pub const FORMAT_VERSION: u32 = 1;
/// Most nodes of all trees together: 1,000 trees of depth 8.
pub const NODES_MAX: usize = 512_000;
/// In `feature`: this node is a leaf.
const LEAF: u16 = u16::MAX;

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
    /// What is predicted: `ln_route_rtt_ms`.
    pub target: String,
    /// What the trees predict the distance from.
    pub reference: Reference,
    /// [`schema_hash`] of the features that the trees were grown on.
    pub schema_hash: String,
    /// Names of those features, in order.
    pub feature_names: Vec<String>,
    /// The trees.
    pub trees: Trees,
    /// Split-conformal interval.
    pub interval: Interval,
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
}

impl Reference {
    /// The reference, ln(ms); `None` when nothing is known of the route.
    pub fn ln_ms(self, features: &FeatureVector) -> Option<f64> {
        let prediction = match self {
            Self::LastValue => LastValue.predict(features),
            Self::MovingAverage => MovingAverage.predict(features),
        };
        prediction.map(|prediction| prediction.latency_ms.ln())
    }
}

/// All trees in parallel arrays, one entry a node; children stand behind their parent.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trees {
    /// Prediction before the first tree, ln(ms) above the reference.
    pub base: f64,
    /// Index of each tree's root.
    pub roots: Vec<u32>,
    /// Feature that the node splits on; 65,535 for a leaf.
    pub feature: Vec<u16>,
    /// Rows with `feature <= threshold` go left.
    pub threshold: Vec<f64>,
    /// Index of the left child.
    pub left: Vec<u32>,
    /// Index of the right child.
    pub right: Vec<u32>,
    /// What a leaf adds, the learning rate included.
    pub value: Vec<f64>,
}

impl Trees {
    /// Appends a leaf and returns its index.
    pub fn push_leaf(&mut self, value: f64) -> u32 {
        self.push(LEAF, 0.0, value)
    }

    /// Appends a split and returns its index; children are set by [`Trees::set_children`].
    pub fn push_split(&mut self, feature: u16, threshold: f64) -> u32 {
        self.push(feature, threshold, 0.0)
    }

    /// Sets the children of a split.
    pub fn set_children(&mut self, parent: u32, left: u32, right: u32) {
        self.left[parent as usize] = left;
        self.right[parent as usize] = right;
    }

    fn push(&mut self, feature: u16, threshold: f64, value: f64) -> u32 {
        let index = self.feature.len() as u32;
        self.feature.push(feature);
        self.threshold.push(threshold);
        self.left.push(0);
        self.right.push(0);
        self.value.push(value);
        index
    }

    /// The sum over all trees for one row.
    pub fn evaluate(&self, features: &FeatureVector) -> f64 {
        let mut sum = self.base;
        for &root in &self.roots {
            let mut node = root as usize;
            while self.feature[node] != LEAF {
                let goes_left = features[self.feature[node] as usize] <= self.threshold[node];
                node = if goes_left { self.left[node] } else { self.right[node] } as usize;
            }
            sum += self.value[node];
        }
        sum
    }

    /// Checks lengths, indices and numbers.
    fn validate(&self, feature_count: usize) -> Result<(), String> {
        let nodes = self.feature.len();
        if nodes > NODES_MAX {
            return Err(format!("{nodes} nodes exceed the limit of {NODES_MAX}"));
        }
        let same_length =
            [self.threshold.len(), self.left.len(), self.right.len(), self.value.len()]
                .iter()
                .all(|length| *length == nodes);
        if !same_length {
            return Err("the node arrays differ in length".into());
        }
        if self.roots.is_empty() || self.roots.iter().any(|root| *root as usize >= nodes) {
            return Err("a root points outside the nodes".into());
        }
        if !self.base.is_finite() {
            return Err("the base is not a finite number".into());
        }
        for node in 0..nodes {
            if !self.threshold[node].is_finite() || !self.value[node].is_finite() {
                return Err(format!("node {node} holds a number that is not finite"));
            }
            if self.feature[node] == LEAF {
                continue;
            }
            if self.feature[node] as usize >= feature_count {
                return Err(format!("node {node} splits on a feature that does not exist"));
            }
            // Children behind their parent: evaluation ends after at most `nodes` steps.
            let (left, right) = (self.left[node] as usize, self.right[node] as usize);
            if left <= node || right <= node || left >= nodes || right >= nodes {
                return Err(format!("node {node} has a child in the wrong place"));
            }
        }
        Ok(())
    }
}

/// Split-conformal interval on the natural-log scale (Lei et al., 2018): the truth lay between
/// `prediction + low` and `prediction + high` in `coverage` of the held-out rows.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Interval {
    /// Share of held-out rows inside, 0 to 1.
    pub coverage: f64,
    /// Added to the prediction for the lower end, ln(ms).
    pub low: f64,
    /// Added to the prediction for the upper end, ln(ms).
    pub high: f64,
}

/// How a forecaster did on the held-out rows.
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
    /// When training ended (µs since the epoch).
    pub created_us: u64,
    /// First and last moment of the training rows (µs since the epoch).
    pub trained_from_us: u64,
    /// See `trained_from_us`.
    pub trained_to_us: u64,
    /// Rows fitted on.
    pub rows_train: usize,
    /// Newest rows held out.
    pub rows_test: usize,
    /// Seed of the fit.
    pub seed: u64,
    /// The library's parameters, as text.
    pub parameters: String,
    /// This model on the held-out rows.
    pub model: Score,
    /// The moving average on the same rows.
    pub moving_average: Score,
    /// The last value on the same rows.
    pub last_value: Score,
}

impl ModelCard {
    /// Whether the model may route traffic: it does at least as well as the moving average, both
    /// by the share predicted well and by the error that was fitted.
    pub fn earns_its_place(&self) -> bool {
        self.model.accuracy >= self.moving_average.accuracy
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
        let model: Self = serde_json::from_slice(bytes)
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
        model.trees.validate(FEATURES.len()).map_err(ModelError::Damaged)?;
        if !model.interval.low.is_finite() || !model.interval.high.is_finite() {
            return Err(ModelError::Damaged("its interval is not finite".into()));
        }
        Ok(model)
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
        let log = self.reference.ln_ms(features)? + self.trees.evaluate(features);
        Some(Prediction {
            latency_ms: log.exp(),
            interval_ms: Some(((log + self.interval.low).exp(), (log + self.interval.high).exp())),
        })
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
            target: "ln_route_rtt_ms".into(),
            reference: Reference::LastValue,
            schema_hash: schema_hash(),
            feature_names: FEATURES.iter().map(|f| f.name.to_owned()).collect(),
            trees,
            interval: Interval { coverage: 0.9, low: -0.1, high: 0.1 },
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
            |trees| trees.left[0] = 0,
            |trees| trees.right[0] = 99,
            |trees| trees.feature[0] = 500,
            |trees| trees.roots[0] = 3,
            |trees| trees.roots.clear(),
            |trees| trees.value.truncate(1),
        ];
        for damage in damages {
            let mut model = stump();
            damage(&mut model.trees);
            let result = ForestModel::from_json(model.to_json().as_bytes());
            assert!(matches!(result, Err(ModelError::Damaged(_))), "{:?}", model.trees);
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            prop_assert!(ForestModel::from_json(&bytes).is_err());
        }

        #[test]
        fn arbitrary_damage_to_a_file_never_panics(at in 0usize..900, byte in any::<u8>()) {
            let mut bytes = stump().to_json().into_bytes();
            let at = at % bytes.len();
            bytes[at] = byte;
            if let Ok(model) = ForestModel::from_json(&bytes) {
                model.predict(&[0.0; FEATURES.len()]);
            }
        }
    }
}
