//! Network coordinates: a position for every node, so that links never measured have a prior.
//!
//! Vivaldi (Dabek et al., 2004): a Euclidean position and a height, which stands for the node's
//! access link; the RTT between two nodes is the distance of their positions plus both heights.
//! Each measurement moves its sender, the more, the surer the other end is of its own position.

use std::collections::BTreeMap;

use crate::engine::types::NodeId;

/// Dimensions of the Euclidean part; more gain little on the Internet (Dabek et al., section 5.4).
const DIMENSIONS: usize = 3;
/// Gain of the position (Dabek et al., section 3.2: 0.25).
const POSITION_GAIN: f64 = 0.25;
/// Gain of the error estimate (the same).
const ERROR_GAIN: f64 = 0.25;
/// Smallest height (ms).
const HEIGHT_MIN_MS: f64 = 0.1;
/// Most nodes with a position: as many as the overlay graph has origins.
const NODES_MAX: usize = 10_000;

#[derive(Clone, Copy, Debug)]
struct Position {
    at: [f64; DIMENSIONS],
    height_ms: f64,
    /// Relative error of distances from here, 0 to 1.
    error: f64,
}

impl Position {
    /// A new node starts near the origin, in a direction of its own.
    fn new(node: NodeId) -> Self {
        let mut at = [0.0; DIMENSIONS];
        for (axis, byte) in at.iter_mut().zip(node.0) {
            *axis = f64::from(byte) / 255.0 - 0.5;
        }
        Self { at, height_ms: HEIGHT_MIN_MS, error: 1.0 }
    }

    fn distance_ms(&self, other: &Self) -> f64 {
        let squares = self.at.iter().zip(other.at).map(|(a, b)| (a - b).powi(2));
        squares.sum::<f64>().sqrt() + self.height_ms + other.height_ms
    }
}

/// The positions of all nodes that measurements are known of.
#[derive(Clone, Debug, Default)]
pub struct Coordinates {
    positions: BTreeMap<NodeId, Position>,
}

impl Coordinates {
    /// `from` measured this RTT (ms) to `to`.
    pub fn measured(&mut self, from: NodeId, to: NodeId, rtt_ms: f64) {
        let known = |node| self.positions.get(&node).copied();
        let full = self.positions.len() >= NODES_MAX;
        if from == to || (full && (known(from).is_none() || known(to).is_none())) {
            return;
        }
        let mut mine = known(from).unwrap_or_else(|| Position::new(from));
        let theirs = known(to).unwrap_or_else(|| Position::new(to));
        let rtt_ms = rtt_ms.max(HEIGHT_MIN_MS);
        let distance_ms = mine.distance_ms(&theirs);
        let weight = mine.error / (mine.error + theirs.error).max(1e-9);
        let relative = (distance_ms - rtt_ms).abs() / rtt_ms;
        let gain = ERROR_GAIN * weight;
        mine.error = (relative * gain + mine.error * (1.0 - gain)).clamp(0.01, 1.0);
        let force_ms = POSITION_GAIN * weight * (rtt_ms - distance_ms);
        let flat_ms = (distance_ms - mine.height_ms - theirs.height_ms).max(1e-9);
        for (axis, other) in mine.at.iter_mut().zip(theirs.at) {
            *axis += force_ms * (*axis - other) / flat_ms.max(distance_ms * 0.01);
        }
        let share = (mine.height_ms + theirs.height_ms) / distance_ms;
        mine.height_ms = (mine.height_ms + force_ms * share).max(HEIGHT_MIN_MS);
        self.positions.insert(from, mine);
        self.positions.entry(to).or_insert(theirs);
    }

    /// Forgets a node's position.
    pub fn forget(&mut self, node: NodeId) {
        self.positions.remove(&node);
    }

    /// RTT between two nodes by their positions (ms); `None` when either has none.
    pub fn rtt_ms(&self, from: NodeId, to: NodeId) -> Option<f64> {
        Some(self.positions.get(&from)?.distance_ms(self.positions.get(&to)?))
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_pcg::Pcg64Mcg;

    use super::*;

    fn node(byte: u8) -> NodeId {
        NodeId([byte, byte.wrapping_mul(37), byte.wrapping_mul(101), 0, 0, 0, 0, byte])
    }

    #[test]
    fn distances_never_measured_are_foreseen() {
        let mut random = Pcg64Mcg::seed_from_u64(1);
        let places: Vec<[f64; 3]> = (0..30)
            .map(|_| {
                let mut axis = || random.random_range(0.0..100.0);
                [axis(), axis(), axis() / 5.0]
            })
            .collect();
        let rtt_ms = |a: usize, b: usize| {
            let ([ax, ay, ah], [bx, by, bh]) = (places[a], places[b]);
            ((ax - bx).powi(2) + (ay - by).powi(2)).sqrt() + ah + bh
        };
        let mut coordinates = Coordinates::default();
        for _ in 0..20_000 {
            let (a, b) = (random.random_range(0..30), random.random_range(0..30));
            // Pairs whose sum is a multiple of seven are never measured.
            if a != b && (a + b) % 7 != 0 {
                coordinates.measured(node(a as u8), node(b as u8), rtt_ms(a, b));
            }
        }
        let mut errors = Vec::new();
        for a in 0..30 {
            for b in (0..30).filter(|b| *b != a && (a + b) % 7 == 0) {
                let guess = coordinates.rtt_ms(node(a as u8), node(b as u8)).unwrap();
                errors.push((guess / rtt_ms(a, b) - 1.0).abs());
            }
        }
        errors.sort_by(f64::total_cmp);
        assert!(errors[errors.len() / 2] < 0.1, "{}", errors[errors.len() / 2]);
        assert_eq!(coordinates.rtt_ms(node(1), node(99)), None);
    }

    #[test]
    fn absurd_measurements_keep_positions_finite() {
        let mut coordinates = Coordinates::default();
        for rtt_ms in [0.0, 60_000.0, 1e-9, 60_000.0, 0.0] {
            for _ in 0..50 {
                coordinates.measured(node(1), node(2), rtt_ms);
                coordinates.measured(node(2), node(1), rtt_ms);
            }
            assert!(coordinates.rtt_ms(node(1), node(2)).unwrap().is_finite());
        }
        coordinates.measured(node(1), node(1), 5.0);
    }
}
