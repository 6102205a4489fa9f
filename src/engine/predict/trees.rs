//! Gradient-boosted trees as one array of nodes, and the one evaluator for all heads of a model.
//!
//! In memory all that a step of the evaluation reads stands side by side, and where a missing value
//! goes is part of what the step looks up ([`slots`]), so that it needs no question of its own. In
//! the model file there is an array for each field. `benches/predict.rs` prints what this is worth.

use serde::{Deserialize, Serialize};

use super::schema::{FEATURES, FeatureVector, MISSING};

/// Most nodes of all trees together: 1,000 trees of depth 8.
pub const NODES_MAX: usize = 512_000;
/// Deepest node, the root being at 0: explanations descend by recursion.
pub const DEPTH_MAX: u8 = 64;
/// In the model file, and as a slot: this node is a leaf.
const LEAF: u16 = u16::MAX;

/// Each feature twice: with a missing value far below all thresholds, and far above.
pub(super) type Slots = [f64; 2 * FEATURES.len()];

/// What nodes look up.
pub(super) fn slots(features: &FeatureVector) -> Slots {
    let mut slots = [0.0; 2 * FEATURES.len()];
    for (pair, value) in slots.chunks_exact_mut(2).zip(features) {
        let missing = *value == MISSING;
        pair[0] = if missing { f64::NEG_INFINITY } else { *value };
        pair[1] = if missing { f64::INFINITY } else { *value };
    }
    slots
}

/// A split or a leaf.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Node {
    /// Split: rows with `feature <= value` go left. Leaf: what it adds, the learning rate included.
    pub value: f64,
    /// Indices of the left and the right child; no meaning for a leaf.
    pub children: [u32; 2],
    /// Twice the feature, plus 1 when missing values go right; [`LEAF`] for a leaf.
    slot: u16,
}

impl Node {
    /// Whether it is a leaf.
    pub fn is_leaf(&self) -> bool {
        self.slot == LEAF
    }

    /// Feature that the node splits on; no meaning for a leaf.
    pub fn feature(&self) -> u16 {
        self.slot / 2
    }

    /// Whether a row goes left whose feature is [`MISSING`]; no meaning for a leaf.
    pub fn missing_left(&self) -> bool {
        self.slot.is_multiple_of(2)
    }

    /// Index of the child that a row goes to.
    pub(super) fn child(&self, slots: &Slots) -> usize {
        let left = slots[usize::from(self.slot)] <= self.value;
        self.children[usize::from(!left)] as usize
    }
}

/// All trees, children behind their parent.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "TreeArrays", into = "TreeArrays")]
pub struct Trees {
    /// Sum before the first tree.
    pub base: f64,
    /// Index of each tree's root.
    pub roots: Vec<u32>,
    /// The nodes of all trees.
    pub nodes: Vec<Node>,
    /// Training weight that reached each node (rows, or XGBoost's sum of Hessians): what the
    /// expectation of an explanation is taken over.
    pub cover: Vec<f64>,
}

impl Trees {
    /// Appends a leaf and returns its index.
    pub fn push_leaf(&mut self, value: f64) -> u32 {
        self.push(LEAF, value)
    }

    /// Appends a split and returns its index; children are set by [`Trees::set_children`]. A
    /// missing value, being far below every threshold, goes left, unless
    /// [`Trees::set_missing_left`] says otherwise.
    pub fn push_split(&mut self, feature: u16, threshold: f64) -> u32 {
        // A feature beyond the schema stays beyond it, for `validate` to find.
        self.push(feature.min(LEAF / 2 - 1) * 2, threshold)
    }

    /// Sets where a split sends rows whose feature is missing.
    pub fn set_missing_left(&mut self, split: u32, left: bool) {
        let node = &mut self.nodes[split as usize];
        node.slot = node.feature() * 2 + u16::from(!left);
    }

    /// Sets the children of a split.
    pub fn set_children(&mut self, parent: u32, left: u32, right: u32) {
        self.nodes[parent as usize].children = [left, right];
    }

    fn push(&mut self, slot: u16, value: f64) -> u32 {
        let index = self.nodes.len() as u32;
        self.nodes.push(Node { value, children: [0, 0], slot });
        self.cover.push(0.0);
        index
    }

    /// The sum over all trees for one row.
    pub fn evaluate(&self, features: &FeatureVector) -> f64 {
        let slots = slots(features);
        let mut sum = self.base;
        for &root in &self.roots {
            let mut node = &self.nodes[root as usize];
            while !node.is_leaf() {
                node = &self.nodes[node.child(&slots)];
            }
            sum += node.value;
        }
        sum
    }

    /// Index of the leaf that a row ends in, in the tree with this root.
    pub fn leaf(&self, root: u32, features: &FeatureVector) -> usize {
        let slots = slots(features);
        let mut node = root as usize;
        while !self.nodes[node].is_leaf() {
            node = self.nodes[node].child(&slots);
        }
        node
    }

    /// Sets each node's cover to the number of these rows that reach it.
    pub fn count_cover<'a>(&mut self, rows: impl IntoIterator<Item = &'a FeatureVector>) {
        self.cover.fill(0.0);
        for features in rows {
            let slots = slots(features);
            for &root in &self.roots {
                let mut node = root as usize;
                self.cover[node] += 1.0;
                while !self.nodes[node].is_leaf() {
                    node = self.nodes[node].child(&slots);
                    self.cover[node] += 1.0;
                }
            }
        }
    }

    /// Checks lengths, indices, depth and numbers, so that neither evaluation nor explanation can
    /// leave the arrays, loop, or descend without end.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn validate(&self, feature_count: usize) -> Result<(), String> {
        let nodes = self.nodes.len();
        if nodes > NODES_MAX {
            return Err(format!("{nodes} nodes exceed the limit of {NODES_MAX}"));
        }
        if self.cover.len() != nodes {
            return Err("the node arrays differ in length".into());
        }
        if self.roots.is_empty() || self.roots.iter().any(|root| *root as usize >= nodes) {
            return Err("a root points outside the nodes".into());
        }
        if !self.base.is_finite() {
            return Err("the base is not a finite number".into());
        }
        // Links from the root; 0 for roots and for what nothing leads to.
        let mut depths = vec![0_u8; nodes];
        for (index, node) in self.nodes.iter().enumerate() {
            let cover = self.cover[index];
            if !node.value.is_finite() || !cover.is_finite() || cover < 0.0 {
                return Err(format!("node {index} holds a number that is not finite or negative"));
            }
            if node.is_leaf() {
                continue;
            }
            if usize::from(node.feature()) >= feature_count {
                return Err(format!("node {index} splits on a feature that does not exist"));
            }
            if depths[index] >= DEPTH_MAX {
                return Err(format!("a tree is deeper than {DEPTH_MAX}"));
            }
            for child in node.children.map(|child| child as usize) {
                // Behind their parent: evaluation ends after at most `nodes` steps. One parent:
                // explanation visits a node once.
                if child <= index || child >= nodes || depths[child] != 0 {
                    return Err(format!("node {index} has a child in the wrong place"));
                }
                depths[child] = depths[index] + 1;
            }
        }
        if self.roots.iter().any(|root| depths[*root as usize] != 0) {
            return Err("a root lies inside another tree".into());
        }
        Ok(())
    }
}

/// [`Trees`] in the model file: parallel arrays, one entry a node.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct TreeArrays {
    base: f64,
    roots: Vec<u32>,
    /// 65,535 for a leaf.
    feature: Vec<u16>,
    /// 0 for a leaf.
    threshold: Vec<f64>,
    missing_left: Vec<bool>,
    left: Vec<u32>,
    right: Vec<u32>,
    /// 0 for a split.
    value: Vec<f64>,
    cover: Vec<f64>,
}

impl From<Trees> for TreeArrays {
    fn from(Trees { base, roots, nodes, cover }: Trees) -> Self {
        let file_feature = |node: &Node| if node.is_leaf() { LEAF } else { node.feature() };
        let when = |wanted: bool, node: &Node| if wanted { node.value } else { 0.0 };
        Self {
            base,
            roots,
            feature: nodes.iter().map(file_feature).collect(),
            threshold: nodes.iter().map(|node| when(!node.is_leaf(), node)).collect(),
            missing_left: nodes.iter().map(|node| node.is_leaf() || node.missing_left()).collect(),
            left: nodes.iter().map(|node| node.children[0]).collect(),
            right: nodes.iter().map(|node| node.children[1]).collect(),
            value: nodes.iter().map(|node| when(node.is_leaf(), node)).collect(),
            cover,
        }
    }
}

impl TryFrom<TreeArrays> for Trees {
    type Error = String;

    fn try_from(arrays: TreeArrays) -> Result<Self, String> {
        let TreeArrays { base, roots, feature, threshold, missing_left, left, right, value, cover } =
            arrays;
        let lengths = [threshold.len(), missing_left.len(), left.len(), right.len(), value.len()];
        if lengths.iter().any(|length| *length != feature.len()) {
            return Err("the node arrays differ in length".into());
        }
        let mut trees = Self { base, roots, ..Self::default() };
        for index in 0..feature.len() {
            let node = if feature[index] == LEAF {
                trees.push_leaf(value[index])
            } else {
                let node = trees.push_split(feature[index], threshold[index]);
                trees.set_missing_left(node, missing_left[index]);
                node
            };
            trees.set_children(node, left[index], right[index]);
        }
        trees.cover = cover;
        Ok(trees)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::predict::schema::FEATURES;

    #[test]
    fn a_missing_value_goes_where_the_node_says() {
        let mut trees = Trees { base: 10.0, ..Trees::default() };
        let root = trees.push_split(3, 5.0);
        let (left, right) = (trees.push_leaf(1.0), trees.push_leaf(2.0));
        trees.set_children(root, left, right);
        trees.roots.push(root);
        let mut row = [0.0; FEATURES.len()];
        for (value, missing_left, expected) in [
            (5.0, true, 11.0),
            (5.000_1, true, 12.0),
            (5.0, false, 11.0),
            (MISSING, true, 11.0),
            (MISSING, false, 12.0),
            (2.0 * MISSING, false, 11.0),
        ] {
            row[3] = value;
            trees.set_missing_left(root, missing_left);
            assert_eq!(trees.evaluate(&row), expected, "{value} {missing_left}");
        }
    }

    #[test]
    fn the_file_has_an_array_for_each_field_of_one_length() {
        let mut trees = Trees { base: 0.5, ..Trees::default() };
        let root = trees.push_split(3, 5.0);
        let (left, right) = (trees.push_leaf(1.0), trees.push_leaf(2.0));
        trees.set_children(root, left, right);
        trees.roots.push(root);
        let text = serde_json::to_string(&trees).unwrap();
        assert!(text.contains(r#""threshold":[5.0,0.0,0.0]"#), "{text}");
        assert!(text.contains(r#""value":[0.0,1.0,2.0]"#), "{text}");
        assert_eq!(serde_json::from_str::<Trees>(&text).unwrap(), trees);
        let short = text.replace("[0.0,1.0,2.0]", "[0.0,1.0]");
        let error = serde_json::from_str::<Trees>(&short).unwrap_err().to_string();
        assert!(error.contains("differ in length"), "{error}");
    }

    #[test]
    fn a_tree_that_is_too_deep_or_no_tree_is_refused() {
        let chain = |depth: u8| {
            let mut trees = Trees::default();
            let mut node = trees.push_split(0, 1.0);
            trees.roots.push(node);
            for level in 0..depth {
                let left = trees.push_leaf(0.0);
                let last = level + 1 == depth;
                let right = if last { trees.push_leaf(0.0) } else { trees.push_split(0, 1.0) };
                trees.set_children(node, left, right);
                node = right;
            }
            trees
        };
        assert_eq!(chain(DEPTH_MAX).validate(1), Ok(()));
        assert!(chain(DEPTH_MAX + 1).validate(1).unwrap_err().contains("deeper"));
        let mut shared = chain(2);
        shared.nodes[0].children[0] = shared.nodes[0].children[1];
        assert!(shared.validate(1).unwrap_err().contains("wrong place"));
        let mut inside = chain(2);
        inside.roots.push(2);
        assert!(inside.validate(1).unwrap_err().contains("inside"));
    }
}
