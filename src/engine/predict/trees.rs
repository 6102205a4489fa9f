//! Gradient-boosted trees as flat arrays, and the one evaluator for all heads of a model.

use serde::{Deserialize, Serialize};

use super::schema::{FeatureVector, MISSING};

/// Most nodes of all trees together: 1,000 trees of depth 8.
pub const NODES_MAX: usize = 512_000;
/// In `feature`: this node is a leaf.
pub(super) const LEAF: u16 = u16::MAX;

/// All trees in parallel arrays, one entry a node; children stand behind their parent.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trees {
    /// Sum before the first tree.
    pub base: f64,
    /// Index of each tree's root.
    pub roots: Vec<u32>,
    /// Feature that the node splits on; 65,535 for a leaf.
    pub feature: Vec<u16>,
    /// Rows with `feature <= threshold` go left.
    pub threshold: Vec<f64>,
    /// Where a row goes whose feature is [`MISSING`]: left when true.
    pub missing_left: Vec<bool>,
    /// Index of the left child.
    pub left: Vec<u32>,
    /// Index of the right child.
    pub right: Vec<u32>,
    /// What a leaf adds, the learning rate included.
    pub value: Vec<f64>,
    /// Training weight that reached the node (rows, or XGBoost's sum of Hessians): what the
    /// expectation of an explanation is taken over.
    pub cover: Vec<f64>,
}

impl Trees {
    /// Appends a leaf and returns its index.
    pub fn push_leaf(&mut self, value: f64) -> u32 {
        self.push(LEAF, 0.0, value)
    }

    /// Appends a split and returns its index; children are set by [`Trees::set_children`]. A
    /// missing value, being far below every threshold, goes left.
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
        self.missing_left.push(true);
        self.left.push(0);
        self.right.push(0);
        self.value.push(value);
        self.cover.push(0.0);
        index
    }

    /// Whether a node is a leaf.
    pub fn is_leaf(&self, node: usize) -> bool {
        self.feature[node] == LEAF
    }

    /// The child of a split that a row goes to.
    pub fn child(&self, node: usize, features: &FeatureVector) -> usize {
        let value = features[self.feature[node] as usize];
        let left =
            if value == MISSING { self.missing_left[node] } else { value <= self.threshold[node] };
        (if left { self.left[node] } else { self.right[node] }) as usize
    }

    /// The sum over all trees for one row.
    pub fn evaluate(&self, features: &FeatureVector) -> f64 {
        let mut sum = self.base;
        for &root in &self.roots {
            let mut node = root as usize;
            while !self.is_leaf(node) {
                node = self.child(node, features);
            }
            sum += self.value[node];
        }
        sum
    }

    /// Sets each node's cover to the number of these rows that reach it.
    pub fn count_cover<'a>(&mut self, rows: impl IntoIterator<Item = &'a FeatureVector>) {
        self.cover.fill(0.0);
        for features in rows {
            for &root in &self.roots {
                let mut node = root as usize;
                self.cover[node] += 1.0;
                while self.feature[node] != LEAF {
                    node = self.child(node, features);
                    self.cover[node] += 1.0;
                }
            }
        }
    }

    /// Checks lengths, indices and numbers, so that evaluation cannot leave the arrays or loop.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn validate(&self, feature_count: usize) -> Result<(), String> {
        let nodes = self.feature.len();
        if nodes > NODES_MAX {
            return Err(format!("{nodes} nodes exceed the limit of {NODES_MAX}"));
        }
        let lengths = [
            self.threshold.len(),
            self.missing_left.len(),
            self.left.len(),
            self.right.len(),
            self.value.len(),
            self.cover.len(),
        ];
        if lengths.iter().any(|length| *length != nodes) {
            return Err("the node arrays differ in length".into());
        }
        if self.roots.is_empty() || self.roots.iter().any(|root| *root as usize >= nodes) {
            return Err("a root points outside the nodes".into());
        }
        if !self.base.is_finite() {
            return Err("the base is not a finite number".into());
        }
        for node in 0..nodes {
            let numbers = [self.threshold[node], self.value[node], self.cover[node]];
            if numbers.iter().any(|number| !number.is_finite()) || self.cover[node] < 0.0 {
                return Err(format!("node {node} holds a number that is not finite"));
            }
            if self.is_leaf(node) {
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
