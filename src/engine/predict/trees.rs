//! Gradient-boosted trees as one array of nodes, and the one evaluator for all heads of a model.
//!
//! In memory all that a step of the evaluation reads stands side by side, which is three times as
//! fast as an array for each field; in the model file there is an array for each field.

use serde::{Deserialize, Serialize};

use super::schema::{FeatureVector, MISSING};

/// Most nodes of all trees together: 1,000 trees of depth 8.
pub const NODES_MAX: usize = 512_000;
/// Deepest node, the root being at 0: explanations descend by recursion.
pub const DEPTH_MAX: u8 = 64;
/// In [`Node::feature`]: this node is a leaf.
pub const LEAF: u16 = u16::MAX;

/// A split or a leaf.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Node {
    /// Split: rows with `feature <= value` go left. Leaf: what it adds, the learning rate included.
    pub value: f64,
    /// Index of the left child; no meaning for a leaf.
    pub left: u32,
    /// Index of the right child; no meaning for a leaf.
    pub right: u32,
    /// Feature that the node splits on; [`LEAF`] for a leaf.
    pub feature: u16,
    /// Where a row goes whose feature is [`MISSING`]: left when true.
    pub missing_left: bool,
}

impl Node {
    /// Whether it is a leaf.
    pub fn is_leaf(&self) -> bool {
        self.feature == LEAF
    }

    /// Index of the child that a row goes to.
    pub fn child(&self, features: &FeatureVector) -> usize {
        let value = features[self.feature as usize];
        let missing = value == MISSING;
        // Without branches: which way a row goes cannot be foreseen by the processor either.
        let left = (missing & self.missing_left) | (!missing & (value <= self.value));
        [self.right, self.left][usize::from(left)] as usize
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
    /// missing value, being far below every threshold, goes left.
    pub fn push_split(&mut self, feature: u16, threshold: f64) -> u32 {
        self.push(feature, threshold)
    }

    /// Sets the children of a split.
    pub fn set_children(&mut self, parent: u32, left: u32, right: u32) {
        let parent = &mut self.nodes[parent as usize];
        (parent.left, parent.right) = (left, right);
    }

    fn push(&mut self, feature: u16, value: f64) -> u32 {
        let index = self.nodes.len() as u32;
        self.nodes.push(Node { value, left: 0, right: 0, feature, missing_left: true });
        self.cover.push(0.0);
        index
    }

    /// The sum over all trees for one row.
    pub fn evaluate(&self, features: &FeatureVector) -> f64 {
        let mut sum = self.base;
        for &root in &self.roots {
            let mut node = &self.nodes[root as usize];
            while !node.is_leaf() {
                node = &self.nodes[node.child(features)];
            }
            sum += node.value;
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
                while !self.nodes[node].is_leaf() {
                    node = self.nodes[node].child(features);
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
            if node.feature as usize >= feature_count {
                return Err(format!("node {index} splits on a feature that does not exist"));
            }
            if depths[index] >= DEPTH_MAX {
                return Err(format!("a tree is deeper than {DEPTH_MAX}"));
            }
            for child in [node.left as usize, node.right as usize] {
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
        let when = |wanted: bool, node: &Node| if wanted { node.value } else { 0.0 };
        Self {
            base,
            roots,
            feature: nodes.iter().map(|node| node.feature).collect(),
            threshold: nodes.iter().map(|node| when(!node.is_leaf(), node)).collect(),
            missing_left: nodes.iter().map(|node| node.missing_left).collect(),
            left: nodes.iter().map(|node| node.left).collect(),
            right: nodes.iter().map(|node| node.right).collect(),
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
        let node = |index: usize| Node {
            value: if feature[index] == LEAF { value[index] } else { threshold[index] },
            left: left[index],
            right: right[index],
            feature: feature[index],
            missing_left: missing_left[index],
        };
        Ok(Self { base, roots, nodes: (0..feature.len()).map(node).collect(), cover })
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
            trees.nodes[0].missing_left = missing_left;
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
        shared.nodes[0].left = shared.nodes[0].right;
        assert!(shared.validate(1).unwrap_err().contains("wrong place"));
        let mut inside = chain(2);
        inside.roots.push(2);
        assert!(inside.validate(1).unwrap_err().contains("inside"));
    }
}
