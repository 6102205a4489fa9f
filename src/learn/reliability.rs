//! The reliability head: the probability that a probe over a route is answered.
//!
//! The rule:
//! - Bagging (Breiman, 1996): each of [`TREES`] linfa decision trees sees a bootstrap of as many
//!   lost as delivered probes, because losses are rare (balanced bagging; Chen, Liaw and Breiman,
//!   2004). A leaf adds its share of delivered probes, so that the sum
//!   over the trees lies between 0 and 1.
//! - The sum is made a probability by Platt's sigmoid, fitted by linfa on the calibration rows,
//!   where losses are as rare as they are.
//!
//! linfa prunes siblings that vote alike and breaks ties between classes by the order of a hash
//! map, which differs from run to run. Lost probes therefore weigh [`LOST_WEIGHT`]: with at most
//! [`BAG_ROWS_MAX`] of them no sum of their weights is a whole number, and no leaf is tied.

use linfa::composing::platt_scaling::{Platt, platt_newton_method};
use linfa::traits::Fit;
use linfa::{DatasetBase, ParamGuard};
use linfa_trees::{DecisionTree, TreeNode};
use ndarray::{Array1, Array2, ShapeBuilder};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;

use super::regressor::Binned;
use crate::engine::predict::{FeatureVector, ReliabilityHead, Trees};

/// Fewest lost probes among the fit rows. A guess: fewer say little of what they have in common.
pub const LOSSES_MIN: usize = 30;
/// Fewest lost probes among the calibration rows.
pub const LOSSES_CALIBRATE_MIN: usize = 10;
/// Trees, and their depth.
pub const TREES: usize = 25;
const DEPTH: usize = 5;
/// Fewest rows in a leaf.
const LEAF_ROWS_MIN: f32 = 5.0;
/// Most lost probes that one tree sees, and as many delivered ones.
const BAG_ROWS_MAX: usize = 2_000;
/// Weight of a lost probe in the bag. Sums of up to twice [`BAG_ROWS_MAX`] weights are exact.
const LOST_WEIGHT: f32 = 1.0 + 1.0 / 2_048.0;

/// What was known when a probe left, and whether it was answered.
pub(super) type Outcome<'a> = (&'a FeatureVector, bool);

/// Fits the head. The same rows and seed give the same head.
///
/// # Errors
/// Why there is none, in one sentence.
pub(super) fn fit(
    rows: &[Outcome<'_>],
    calibration: &[Outcome<'_>],
    seed: u64,
) -> Result<ReliabilityHead, String> {
    let positions = |answered| -> Vec<usize> {
        (0..rows.len()).filter(|row| rows[*row].1 == answered).collect()
    };
    let (delivered, lost) = (positions(true), positions(false));
    for (what, count, needed) in [
        ("lost probes to fit on", lost.len(), LOSSES_MIN),
        ("answered probes to fit on", delivered.len(), LOSSES_MIN),
        ("lost probes to calibrate on", losses(calibration), LOSSES_CALIBRATE_MIN),
    ] {
        if count < needed {
            return Err(format!("no forecast of delivery: {count} {what}, {needed} are needed"));
        }
    }
    let binned = Binned::new(rows.iter().map(|(features, _)| *features).collect());
    let mut random = Pcg64Mcg::seed_from_u64(seed);
    let mut trees = Trees::default();
    if binned.columns() == 0 {
        return Err("no forecast of delivery: no feature differs between the rows".into());
    }
    let columns: Vec<usize> = (0..binned.columns()).collect();
    for _ in 0..TREES {
        let count = lost.len().min(BAG_ROWS_MAX);
        let mut draw = |from: &[usize]| -> Vec<usize> {
            (0..count).map(|_| from[random.random_range(0..from.len())]).collect()
        };
        let bag = [draw(&lost), draw(&delivered)].concat();
        let tree = grow(&binned, &bag, count, &columns).map_err(refused)?;
        let root = push(tree.root_node(), &binned, &columns, &mut trees);
        let root = root.ok_or("no forecast of delivery: linfa's trees have an unknown form")?;
        trees.roots.push(root);
        set_leaves(&mut trees, root, &bag, rows);
    }
    trees.count_cover(rows.iter().map(|(features, _)| *features));
    let (platt_a, platt_b) = platt(&trees, calibration)?;
    Ok(ReliabilityHead { trees, platt_a, platt_b })
}

/// Lost probes among the rows.
pub(super) fn losses(rows: &[Outcome<'_>]) -> usize {
    rows.iter().filter(|(_, answered)| !answered).count()
}

fn refused(error: impl std::fmt::Display) -> String {
    format!("no forecast of delivery: linfa refused the rows ({error})")
}

/// A tree on a bag whose first `lost` rows are the lost ones.
fn grow(
    binned: &Binned<'_>,
    bag: &[usize],
    lost: usize,
    columns: &[usize],
) -> Result<DecisionTree<f64, bool>, String> {
    let shape = (bag.len(), columns.len()).f();
    let records = Array2::from_shape_vec(shape, binned.matrix::<f64>(bag, columns));
    let answered: Array1<bool> = (0..bag.len()).map(|row| row >= lost).collect();
    let weights = answered.map(|answered| if *answered { 1.0 } else { LOST_WEIGHT });
    let dataset = DatasetBase::new(records.map_err(|error| error.to_string())?, answered)
        .with_weights(weights);
    let parameters = DecisionTree::params()
        .max_depth(Some(DEPTH))
        .min_weight_leaf(LEAF_ROWS_MIN)
        .min_weight_split(2.0 * LEAF_ROWS_MIN);
    parameters.fit(&dataset).map_err(|error: linfa::Error| error.to_string())
}

/// Appends a node and all below it, children behind their parent; leaves are empty.
fn push(
    node: &TreeNode<f64, bool>,
    binned: &Binned<'_>,
    columns: &[usize],
    trees: &mut Trees,
) -> Option<u32> {
    if node.is_leaf() {
        return Some(trees.push_leaf(0.0));
    }
    let (column, between, _) = node.split();
    let (feature, threshold) = binned.split(*columns.get(column)?, between)?;
    let parent = trees.push_split(feature, threshold);
    let children = node.children();
    let [Some(left), Some(right)] = children.as_slice() else { return None };
    let left = push(left, binned, columns, trees)?;
    let right = push(right, binned, columns, trees)?;
    trees.set_children(parent, left, right);
    Some(parent)
}

/// Sets each leaf of the newest tree to its share of delivered probes of the bag, divided by the
/// number of trees. (linfa tells only which class is more frequent.)
fn set_leaves(trees: &mut Trees, root: u32, bag: &[usize], rows: &[Outcome<'_>]) {
    let mut counts = vec![(0_u32, 0_u32); trees.nodes.len()];
    for (features, answered) in bag.iter().map(|row| rows[*row]) {
        let node = trees.leaf(root, features);
        counts[node].0 += u32::from(answered);
        counts[node].1 += 1;
    }
    let nodes = trees.nodes.iter_mut().zip(counts).skip(root as usize);
    for (node, (answered, all)) in nodes.filter(|(node, _)| node.is_leaf()) {
        node.value = f64::from(answered) / f64::from(all.max(1)) / TREES as f64;
    }
}

/// Slope and offset of the sigmoid (Platt, 1999, with the Newton method of Lin, Lin and Weng,
/// 2007).
fn platt(trees: &Trees, calibration: &[Outcome<'_>]) -> Result<(f64, f64), String> {
    let votes: Array1<f64> = calibration.iter().map(|row| trees.evaluate(row.0)).collect();
    let answered: Array1<bool> = calibration.iter().map(|row| row.1).collect();
    let parameters = Platt::<f64, ()>::params().check().map_err(refused)?;
    platt_newton_method(votes.view(), answered.view(), &parameters).map_err(refused)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::predict::schema::{FEATURES, MISSING};

    /// A tenth of the probes leave over a bad link, of which 60 % are lost, of the others 2 %.
    fn rows(seed: u64, count: usize) -> Vec<(FeatureVector, bool)> {
        let mut random = Pcg64Mcg::seed_from_u64(seed);
        let mut draw = || {
            let mut row: FeatureVector = std::array::from_fn(|_| random.random_range(0.0..100.0));
            row[random.random_range(0..FEATURES.len())] = MISSING;
            let bad = row[7] > 90.0;
            (row, !random.random_bool(if bad { 0.6 } else { 0.02 }))
        };
        (0..count).map(|_| draw()).collect()
    }

    fn seen(rows: &[(FeatureVector, bool)]) -> Vec<Outcome<'_>> {
        rows.iter().map(|(features, answered)| (features, *answered)).collect()
    }

    #[test]
    fn the_probability_of_delivery_is_found_and_calibrated() {
        let (fit_rows, calibration, later) = (rows(1, 1_500), rows(2, 1_000), rows(3, 2_000));
        let head = fit(&seen(&fit_rows), &seen(&calibration), 1).unwrap();
        assert_eq!(head.trees.roots.len(), TREES);
        head.trees.validate(FEATURES.len()).unwrap();
        let mean = |bad: bool| {
            let class: Vec<f64> = later
                .iter()
                .filter(|(row, _)| (row[7] > 90.0) == bad)
                .map(|(row, _)| head.probability(row))
                .collect();
            class.iter().sum::<f64>() / class.len() as f64
        };
        let (good, bad) = (mean(false), mean(true));
        assert!((good - 0.98).abs() < 0.02 && (bad - 0.4).abs() < 0.1, "{good} {bad}");
    }

    #[test]
    fn the_votes_lie_between_none_and_all() {
        let (fit_rows, calibration) = (rows(4, 1_000), rows(5, 500));
        let head = fit(&seen(&fit_rows), &seen(&calibration), 1).unwrap();
        for (row, _) in rows(6, 500) {
            let votes = head.trees.evaluate(&row);
            assert!((0.0..=1.0 + 1e-9).contains(&votes), "{votes}");
        }
    }

    #[test]
    fn the_same_rows_and_seed_give_the_same_head() {
        let (fit_rows, calibration) = (rows(7, 600), rows(8, 300));
        let head = |seed| fit(&seen(&fit_rows), &seen(&calibration), seed).unwrap();
        let first = head(1);
        // The hash maps inside linfa are keyed anew each time.
        for _ in 0..3 {
            assert_eq!(head(1), first);
        }
        assert_ne!(head(2), first);
    }

    #[test]
    fn weights_of_lost_probes_are_exact_and_never_whole() {
        let mut sum = 0.0_f32;
        for count in 1..=BAG_ROWS_MAX {
            sum += LOST_WEIGHT;
            assert_eq!(f64::from(sum), count as f64 * (1.0 + 1.0 / 2_048.0));
            assert_ne!(sum.fract(), 0.0);
        }
    }

    #[test]
    fn too_few_losses_are_told() {
        let fine = rows(9, 1_000);
        let never: Vec<_> = fine.iter().map(|(row, _)| (*row, true)).collect();
        let always: Vec<_> = fine.iter().map(|(row, _)| (*row, false)).collect();
        for (fitted, calibration, told) in [
            (&never, &fine, "0 lost probes to fit on, 30"),
            (&always, &fine, "0 answered probes to fit on, 30"),
            (&fine, &never, "0 lost probes to calibrate on, 10"),
        ] {
            let why = fit(&seen(fitted), &seen(calibration), 1).unwrap_err();
            assert!(why.contains(told), "{why}");
        }
        let same = [1.0; FEATURES.len()];
        let constant: Vec<_> = fine.iter().map(|(_, answered)| (same, *answered)).collect();
        let why = fit(&seen(&constant), &seen(&constant), 1).unwrap_err();
        assert!(why.contains("no feature differs"), "{why}");
    }
}
