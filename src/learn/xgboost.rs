//! XGBoost's JSON model as our trees.
//!
//! Read: `Booster.save_model("x.json")` of XGBoost 2 or newer, booster `gbtree`, objective
//! `reg:squarederror`, numeric splits (XGBoost documentation, "Introduction to Model IO"). A leaf's
//! value stands in `split_conditions`. All trees are used, as `Booster.predict` does.
//!
//! XGBoost rounds a feature to 32 bits and goes left when it is *below* the threshold; we compare
//! 64 bits and go left *up to* the threshold. [`boundary`] is the largest 64-bit number that
//! rounds to less, so that every number goes the same way in both.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::engine::predict::schema::FEATURES;
use crate::engine::predict::{DEPTH_MAX, NODES_MAX, Trees};

/// What is read of a file.
pub(super) struct Contents {
    /// The trees; their base is 0.
    pub trees: Trees,
    /// What XGBoost adds to the trees when it is given no base margin.
    pub base_score: f64,
    /// XGBoost's version.
    pub version: String,
}

/// Oldest XGBoost whose files are read (major version).
const VERSION_MIN: u32 = 2;

#[derive(Deserialize)]
struct File {
    learner: Learner,
    version: Vec<u32>,
}

#[derive(Deserialize)]
struct Learner {
    #[serde(default)]
    attributes: BTreeMap<String, String>,
    #[serde(default)]
    feature_names: Vec<String>,
    gradient_booster: Booster,
    learner_model_param: ModelParam,
    objective: Named,
}

#[derive(Deserialize)]
struct Named {
    name: String,
}

#[derive(Deserialize)]
struct Booster {
    name: String,
    model: Option<BoosterModel>,
}

#[derive(Deserialize)]
struct BoosterModel {
    #[serde(default)]
    trees: Vec<Tree>,
    #[serde(default)]
    iteration_indptr: Vec<u64>,
}

#[derive(Deserialize)]
struct ModelParam {
    base_score: String,
    num_feature: String,
    #[serde(default)]
    num_class: String,
    #[serde(default)]
    num_target: String,
}

#[derive(Deserialize)]
struct Tree {
    left_children: Vec<i32>,
    right_children: Vec<i32>,
    split_indices: Vec<u32>,
    split_conditions: Vec<f32>,
    split_type: Vec<u8>,
    default_left: Vec<u8>,
    sum_hessian: Vec<f32>,
    #[serde(default)]
    categories_nodes: Vec<u32>,
}

/// Reads a file.
///
/// # Errors
/// What is wrong and what to do, in words.
pub(super) fn read(json: &[u8]) -> Result<Contents, String> {
    let file: File = serde_json::from_slice(json).map_err(|error| {
        format!(
            "it is damaged or not a JSON model of XGBoost {VERSION_MIN} or newer ({error}); write \
             it with Booster.save_model(\"NAME.json\")"
        )
    })?;
    let version: Vec<String> = file.version.iter().map(u32::to_string).collect();
    let version = version.join(".");
    if file.version.first().is_none_or(|major| *major < VERSION_MIN) {
        return Err(format!(
            "it was written by XGBoost {version}; load and save it with version {VERSION_MIN} or newer"
        ));
    }
    let learner = file.learner;
    check_kind(&learner)?;
    check_features(&learner)?;
    let model = learner.gradient_booster.model.ok_or("it holds no trees")?;
    check_best_iteration(&learner.attributes, model.iteration_indptr.len().saturating_sub(1))?;
    let nodes: usize = model.trees.iter().map(|tree| tree.left_children.len()).sum();
    if nodes > NODES_MAX {
        return Err(format!(
            "it has {nodes} nodes, at most {NODES_MAX} are taken; train fewer or smaller trees"
        ));
    }
    let mut trees = Trees::default();
    for (number, tree) in model.trees.iter().enumerate() {
        let root = append(tree, &mut trees)
            .map_err(|what| format!("tree {number} {what}; save the model again"))?;
        trees.roots.push(root);
    }
    trees.validate(FEATURES.len()).map_err(|what| format!("{what}; save the model again"))?;
    Ok(Contents { trees, base_score: base_score(&learner.learner_model_param)?, version })
}

fn check_kind(learner: &Learner) -> Result<(), String> {
    let (booster, objective) = (&learner.gradient_booster.name, &learner.objective.name);
    if booster != "gbtree" {
        return Err(format!("its booster is '{booster}', only 'gbtree' is taken; train with that"));
    }
    if objective != "reg:squarederror" {
        return Err(format!(
            "its objective is '{objective}', only 'reg:squarederror' on ln(ms) is taken; train \
             with that"
        ));
    }
    let ModelParam { num_class, num_target, .. } = &learner.learner_model_param;
    let one = |text: &str| matches!(text, "" | "0" | "1");
    if !one(num_class) || !one(num_target) {
        return Err("it predicts several values at once; train on ln(ms) alone".into());
    }
    Ok(())
}

/// The columns of another order or schema would be read without a complaint otherwise.
fn check_features(learner: &Learner) -> Result<(), String> {
    let (count, names) = (&learner.learner_model_param.num_feature, &learner.feature_names);
    let expected = FEATURES.len();
    if count.parse() != Ok(expected) || !(names.is_empty() || names.len() == expected) {
        return Err(format!(
            "it was trained on {count} features ({} of them named), this program computes \
             {expected}; train on all columns of 'route_features' from hop_count on, in their order",
            names.len()
        ));
    }
    if names.is_empty() {
        return Err("it does not name its features, so that their order cannot be checked; set \
                    Booster.feature_names to the columns it was trained on and save it again"
            .into());
    }
    let pairs = names.iter().zip(&FEATURES).enumerate();
    match pairs.into_iter().find(|(_, (name, feature))| *name != feature.name) {
        Some((index, (name, feature))) => Err(format!(
            "its feature {index} is '{name}', this program's is '{}'; train on an export of this \
             version, columns in their order",
            feature.name
        )),
        None => Ok(()),
    }
}

/// After early stopping `Booster.predict` and the scikit-learn classes differ in the trees that
/// they use; such a model has to be cut first.
fn check_best_iteration(
    attributes: &BTreeMap<String, String>,
    rounds: usize,
) -> Result<(), String> {
    let Some(best) = attributes.get("best_iteration") else { return Ok(()) };
    match best.parse::<usize>() {
        Ok(best) if best + 1 >= rounds => Ok(()),
        _ => Err(format!(
            "its training stopped early: the best of its {rounds} rounds is number {best}, counted \
             from 0; save Booster[: best_iteration + 1]"
        )),
    }
}

/// `5E-1`, or since XGBoost 3.1 `[5E-1]`.
fn base_score(param: &ModelParam) -> Result<f64, String> {
    let text = param.base_score.trim().trim_start_matches('[').trim_end_matches(']');
    match text.parse::<f32>() {
        Ok(number) if number.is_finite() => Ok(f64::from(number)),
        _ => Err(format!(
            "its base_score is '{}', one finite number is expected; save the model again",
            param.base_score.chars().take(40).collect::<String>()
        )),
    }
}

/// Appends a tree, children behind their parent, and returns its root.
fn append(tree: &Tree, trees: &mut Trees) -> Result<u32, String> {
    let nodes = tree.left_children.len();
    let lengths = [
        tree.right_children.len(),
        tree.split_indices.len(),
        tree.split_conditions.len(),
        tree.split_type.len(),
        tree.default_left.len(),
        tree.sum_hessian.len(),
    ];
    if nodes == 0 || lengths.iter().any(|length| *length != nodes) {
        return Err("has arrays that are empty or differ in length".into());
    }
    if !tree.categories_nodes.is_empty() || tree.split_type.iter().any(|kind| *kind != 0) {
        return Err("splits on categories; all features of the schema are numbers".into());
    }
    let root = trees.nodes.len() as u32;
    let mut seen = vec![false; nodes];
    // Nodes to visit: which, how deep, and below which of ours on which side.
    let mut open = vec![(0_usize, 0_u8, None::<(u32, bool)>)];
    while let Some((node, depth, parent)) = open.pop() {
        if depth > DEPTH_MAX {
            return Err(format!("is deeper than {DEPTH_MAX}"));
        }
        if node >= nodes || std::mem::replace(&mut seen[node], true) {
            return Err("has a child in the wrong place".into());
        }
        let (left, right) = (tree.left_children[node], tree.right_children[node]);
        let condition = tree.split_conditions[node];
        let index = if left == -1 && right == -1 {
            trees.push_leaf(f64::from(condition))
        } else {
            let feature = u16::try_from(tree.split_indices[node]).unwrap_or(u16::MAX);
            if usize::from(feature) >= FEATURES.len() {
                return Err("splits on a feature that does not exist".into());
            }
            let index = trees.push_split(feature, boundary(condition));
            trees.set_missing_left(index, tree.default_left[node] != 0);
            for (child, is_left) in [(right, false), (left, true)] {
                let child = usize::try_from(child).map_err(|_| "has a child in the wrong place")?;
                open.push((child, depth + 1, Some((index, is_left))));
            }
            index
        };
        trees.cover[index as usize] = f64::from(tree.sum_hessian[node]);
        if let Some((parent, is_left)) = parent {
            trees.nodes[parent as usize].children[usize::from(!is_left)] = index;
        }
    }
    Ok(root)
}

/// The largest number that, rounded to 32 bits, is below a finite threshold.
fn boundary(threshold: f32) -> f64 {
    let below = threshold.next_down();
    // Below the least finite number, rounding continues as if the next one were -2^128.
    let below = if below.is_finite() { f64::from(below) } else { -(2.0_f64.powi(128)) };
    // Numbers of 32 bits are far enough apart for the middle to be a number of 64 bits.
    let middle = (below + f64::from(threshold)) / 2.0;
    // The middle itself rounds to whichever neighbour is even.
    if (middle as f32) < threshold { middle } else { middle.next_down() }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_pcg::Pcg64Mcg;

    use super::*;

    #[test]
    fn the_boundary_parts_all_numbers_as_rounding_does() {
        let mut random = Pcg64Mcg::seed_from_u64(1);
        let special = [0.0, -0.0, 1.0, -1.0, f32::MIN_POSITIVE, 1e-45, -1e-45, f32::MAX, f32::MIN];
        let drawn = (0..20_000).map(|_| f32::from_bits(random.random()));
        for threshold in special.into_iter().chain(drawn).filter(|t| t.is_finite()) {
            let found = boundary(threshold);
            assert!(found.is_finite());
            assert!((found as f32) < threshold, "{threshold:e}: {found:e} goes left");
            let next = found.next_up();
            assert!((next as f32) >= threshold, "{threshold:e}: {next:e} goes right");
        }
    }
}
