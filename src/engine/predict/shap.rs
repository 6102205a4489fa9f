//! Why a forecast is what it is: the exact contribution of each feature.
//!
//! Shapley values of the expectation that a tree gives when only some features are known: at a
//! split on an unknown feature both children count, weighted by the cover that reached them
//! (Lundberg, Erion and Lee, "Consistent individualized feature attribution for tree ensembles",
//! 2018, algorithm 2, path-dependent TreeSHAP; Lundberg et al., Nature Machine Intelligence 2020).
//! Features a tree does not use get 0, and all contributions together are the forecast minus the
//! expectation. The cost is leaves x depth^2 instead of 2^features.

use super::schema::{FEATURES, FeatureVector};
use super::trees::{Slots, Trees, slots};

/// A forecast as an expectation plus what each feature adds to it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Explanation {
    /// The forecast when no feature is known, in the unit of the trees.
    pub expectation: f64,
    /// What knowing each feature adds, in the same unit and in the order of [`FEATURES`].
    pub contributions: [f64; FEATURES.len()],
}

impl Explanation {
    /// The sum of all contributions: forecast minus expectation.
    pub fn sum(&self) -> f64 {
        self.contributions.iter().sum()
    }
}

impl Trees {
    /// Explains [`Trees::evaluate`] for one row. Takes time for every leaf; not for the hot path.
    ///
    /// A split that no training weight reached counts both children alike.
    pub fn explain(&self, features: &FeatureVector) -> Explanation {
        let mut walk = Walk {
            trees: self,
            slots: slots(features),
            paths: Vec::new(),
            explanation: Explanation {
                expectation: self.base,
                contributions: [0.0; FEATURES.len()],
            },
        };
        for &root in &self.roots {
            walk.paths.clear();
            walk.paths.push(Step { feature: u16::MAX, zero: 1.0, one: 1.0, weight: 1.0 });
            walk.descend(root as usize, 0, 1.0);
        }
        walk.explanation
    }
}

/// A feature on the way from the root to a node.
#[derive(Clone, Copy)]
struct Step {
    feature: u16,
    /// Share of the cover that goes this way when the feature is not known.
    zero: f64,
    /// 1 when the row goes this way, else 0.
    one: f64,
    /// Weight of all sets of known features that have as many members as steps stand before
    /// this one.
    weight: f64,
}

struct Walk<'a> {
    trees: &'a Trees,
    slots: Slots,
    /// The path of each node from the root to where the walk is, one behind the other.
    paths: Vec<Step>,
    explanation: Explanation,
}

impl Walk<'_> {
    /// Adds everything below a node whose path starts at `start` and ends the list. `reach` is
    /// the share of the cover that comes here.
    fn descend(&mut self, node: usize, start: usize, reach: f64) {
        let at = self.trees.nodes[node];
        if at.is_leaf() {
            let path = &self.paths[start..];
            for index in 1..path.len() {
                let Step { feature, zero, one, .. } = path[index];
                self.explanation.contributions[feature as usize] +=
                    sum_without(path, index) * (one - zero) * at.value;
            }
            self.explanation.expectation += reach * at.value;
            return;
        }
        let hot = at.child(&self.slots);
        let [left, right] = at.children.map(|child| child as usize);
        let covers = (self.trees.cover[left], self.trees.cover[right]);
        let total = covers.0 + covers.1;
        let share = if total > 0.0 { covers.0 / total } else { 0.5 };
        for (child, share) in [(left, share), (right, 1.0 - share)] {
            let one = f64::from(u8::from(child == hot));
            let start_below = self.paths.len();
            self.paths.extend_from_within(start..);
            let path = &self.paths[start_below..];
            // A feature that was split on before stands in the path once, with both conditions.
            let before = path.iter().position(|step| step.feature == at.feature());
            let (mut zero_both, mut one_both) = (share, one);
            if let Some(before) = before {
                zero_both *= path[before].zero;
                one_both *= path[before].one;
                remove(&mut self.paths, start_below, before);
            }
            // Where neither the row nor any cover goes, nothing is added.
            if zero_both > 0.0 || one_both > 0.0 {
                append(&mut self.paths, start_below, at.feature(), zero_both, one_both);
                self.descend(child, start_below, reach * share);
            }
            self.paths.truncate(start_below);
        }
    }
}

/// Adds a feature to the path that starts at `start` (EXTEND).
fn append(paths: &mut Vec<Step>, start: usize, feature: u16, zero: f64, one: f64) {
    paths.push(Step { feature, zero, one, weight: 0.0 });
    let path = &mut paths[start..];
    let last = path.len() - 1;
    let count = path.len() as f64;
    for index in (0..last).rev() {
        let weight = path[index].weight;
        path[index + 1].weight += one * weight * (index + 1) as f64 / count;
        path[index].weight = zero * weight * (last - index) as f64 / count;
    }
}

/// Takes a step out of the path that starts at `start` (UNWIND).
fn remove(paths: &mut Vec<Step>, start: usize, index: usize) {
    let path = &mut paths[start..];
    let last = path.len() - 1;
    let removed = path[index];
    let mut rest = path[last].weight;
    for at in (0..last).rev() {
        let weight = path[at].weight;
        path[at].weight = weight_without(&removed, last, at, weight, &mut rest);
    }
    for at in index..last {
        let next = path[at + 1];
        path[at] = Step { weight: path[at].weight, ..next };
    }
    paths.pop();
}

/// The sum of the weights that the path would have without one of its steps.
fn sum_without(path: &[Step], index: usize) -> f64 {
    let last = path.len() - 1;
    let mut rest = path[last].weight;
    let weights = (0..last).rev().map(|at| {
        let weight = path[at].weight;
        weight_without(&path[index], last, at, weight, &mut rest)
    });
    weights.sum()
}

/// The weight at `at` of a path without the step `removed`; `rest` is carried from the end of the
/// path to its start.
fn weight_without(removed: &Step, last: usize, at: usize, weight: f64, rest: &mut f64) -> f64 {
    let (count, below, above) = ((last + 1) as f64, (at + 1) as f64, (last - at) as f64);
    if removed.one == 0.0 {
        // The walk does not go where both are 0.
        return weight * count / (removed.zero * above);
    }
    let found = *rest * count / (below * removed.one);
    *rest = weight - found * removed.zero * above / count;
    found
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_pcg::Pcg64Mcg;

    use super::*;
    use crate::engine::predict::schema::MISSING;

    /// Random trees over the first `used` features; one node in five has no cover at all.
    fn random_trees(random: &mut Pcg64Mcg, count: usize, depth: u32, used: u16) -> Trees {
        fn grow(trees: &mut Trees, random: &mut Pcg64Mcg, depth: u32, used: u16) -> u32 {
            let node = if depth == 0 || random.random_bool(0.1) {
                trees.push_leaf(random.random_range(-2.0..2.0))
            } else {
                let feature = random.random_range(0..used);
                let parent = trees.push_split(feature, random.random_range(0.0..100.0));
                let left = grow(trees, random, depth - 1, used);
                let right = grow(trees, random, depth - 1, used);
                trees.set_children(parent, left, right);
                trees.set_missing_left(parent, random.random_bool(0.5));
                parent
            };
            let covered = random.random_bool(0.8);
            trees.cover[node as usize] = if covered { random.random_range(0.5..50.0) } else { 0.0 };
            node
        }
        let mut trees = Trees { base: random.random_range(-1.0..1.0), ..Trees::default() };
        for _ in 0..count {
            let root = grow(&mut trees, random, depth, used);
            trees.roots.push(root);
        }
        trees.validate(FEATURES.len()).unwrap();
        trees
    }

    fn random_row(random: &mut Pcg64Mcg) -> FeatureVector {
        std::array::from_fn(|_| {
            if random.random_bool(0.2) { MISSING } else { random.random_range(0.0..100.0) }
        })
    }

    /// The definition: a tree's expectation when the features in `known` (bits) are known.
    fn expectation(trees: &Trees, node: usize, row: &FeatureVector, known: u32) -> f64 {
        let at = trees.nodes[node];
        if at.is_leaf() {
            return at.value;
        }
        if known >> at.feature() & 1 == 1 {
            return expectation(trees, at.child(&slots(row)), row, known);
        }
        let [left, right] = at.children.map(|child| child as usize);
        let total = trees.cover[left] + trees.cover[right];
        let share = if total > 0.0 { trees.cover[left] / total } else { 0.5 };
        share * expectation(trees, left, row, known)
            + (1.0 - share) * expectation(trees, right, row, known)
    }

    /// Shapley values by their definition, over all subsets of the first `used` features.
    fn by_definition(trees: &Trees, row: &FeatureVector, used: u32) -> Explanation {
        let value = |known: u32| -> f64 {
            let of = |root: &u32| expectation(trees, *root as usize, row, known);
            trees.base + trees.roots.iter().map(of).sum::<f64>()
        };
        let factorial = |n: u32| (1..=n).map(f64::from).product::<f64>();
        let mut contributions = [0.0; FEATURES.len()];
        for (feature, contribution) in contributions.iter_mut().enumerate().take(used as usize) {
            for known in (0..1_u32 << used).filter(|known| known >> feature & 1 == 0) {
                let size = known.count_ones();
                let weight = factorial(size) * factorial(used - size - 1) / factorial(used);
                *contribution += weight * (value(known | 1 << feature) - value(known));
            }
        }
        Explanation { expectation: value(0), contributions }
    }

    #[test]
    fn contributions_are_the_shapley_values_of_the_definition() {
        let mut random = Pcg64Mcg::seed_from_u64(1);
        for (depth, used) in [(1, 1), (3, 2), (4, 4), (6, 3), (5, 7)] {
            for _ in 0..30 {
                let trees = random_trees(&mut random, 2, depth, used);
                let row = random_row(&mut random);
                let expected = by_definition(&trees, &row, u32::from(used));
                let found = trees.explain(&row);
                assert!((found.expectation - expected.expectation).abs() < 1e-9);
                for (found, expected) in found.contributions.iter().zip(expected.contributions) {
                    assert!((found - expected).abs() < 1e-9, "{found} {expected}");
                }
            }
        }
    }

    #[test]
    fn contributions_sum_to_the_forecast_minus_the_expectation() {
        let mut random = Pcg64Mcg::seed_from_u64(2);
        for (depth, used) in [(2, 75), (4, 75), (8, 75), (12, 10)] {
            for _ in 0..20 {
                let trees = random_trees(&mut random, 5, depth, used);
                let row = random_row(&mut random);
                let explanation = trees.explain(&row);
                let expected = trees.evaluate(&row) - explanation.expectation;
                assert!((explanation.sum() - expected).abs() < 1e-9, "depth {depth}, {used}");
                assert!(explanation.contributions.iter().any(|value| value.abs() > 1e-3));
            }
        }
    }

    #[test]
    fn a_feature_that_no_tree_uses_contributes_nothing() {
        let mut random = Pcg64Mcg::seed_from_u64(3);
        let trees = random_trees(&mut random, 10, 5, 6);
        let found = trees.explain(&random_row(&mut random));
        assert!(found.contributions[6..].iter().all(|value| *value == 0.0));
    }
}
