//! Where nodes are, and who can reach whom: delays that follow from places, a network that is cut in
//! two, and nodes that vanish without a word.

use std::collections::BTreeSet;
use std::time::Duration;

use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;

use super::{Event, LinkModel, World};
use crate::engine::event::Input;

/// A connection that nothing comes over ends after this: what QUIC waits in `net` (the default of
/// libp2p-quic).
pub const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);

/// A square on which nodes lie, each at a random place, and any two of which can connect. The delay
/// between two grows with their distance; it is computed when it is asked for, so that a thousand
/// nodes need no table of half a million pairs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Space {
    /// One-way delay between nodes at the same place (ms).
    pub nearest_ms: f64,
    /// What the length of a side adds to it (ms).
    pub side_ms: f64,
    /// See [`LinkModel::jitter_ms`].
    pub jitter_ms: f64,
    /// Other seeds put nodes at other places.
    pub seed: u64,
}

impl Space {
    fn place(&self, node: usize) -> (f64, f64) {
        let mut random = Pcg64Mcg::seed_from_u64(self.seed.wrapping_add(node as u64));
        (random.random(), random.random())
    }

    fn between(&self, a: usize, b: usize) -> LinkModel {
        let ((ax, ay), (bx, by)) = (self.place(a), self.place(b));
        let delay_ms = self.nearest_ms + self.side_ms * (ax - bx).hypot(ay - by);
        LinkModel { jitter_ms: self.jitter_ms, ..LinkModel::delay(delay_ms) }
    }
}

impl World {
    /// From now on any two nodes can connect; links that were set stay as they were set.
    pub fn lay_out(&mut self, space: Space) {
        self.space = Some(space);
    }

    /// Cuts these nodes off from all others, newcomers included: nothing passes any more, and
    /// connections between the two sides end when their time is out.
    pub fn part(&mut self, cut_off: BTreeSet<usize>) {
        self.cut_off = cut_off;
        for a in self.cut_off.clone() {
            let peers = self.nodes[a].connected.iter().copied();
            let over: Vec<usize> = peers.filter(|b| self.is_parted(a, *b)).collect();
            over.into_iter().for_each(|b| self.plan_lost(a, b));
        }
    }

    /// Ends what [`World::part`] began.
    pub fn heal(&mut self) {
        self.cut_off.clear();
    }

    /// Stops a node without a word, as when the power fails: its neighbours find out by themselves,
    /// and their connections to it end when their time is out.
    pub fn vanish(&mut self, index: usize) {
        self.stop(index);
        for peer in self.nodes[index].connected.clone() {
            self.plan_lost(index, peer);
        }
    }

    /// Whether nothing passes between two nodes.
    pub(super) fn is_parted(&self, a: usize, b: usize) -> bool {
        !self.cut_off.is_empty() && self.cut_off.contains(&a) != self.cut_off.contains(&b)
    }

    /// How the link between two nodes behaves now; `None` when they cannot be linked.
    pub(super) fn link(&self, a: usize, b: usize) -> Option<LinkModel> {
        let set = self.links.get(&(a.min(b), a.max(b))).copied();
        let link = set.or_else(|| Some(self.space?.between(a, b)))?;
        Some(if self.is_parted(a, b) { LinkModel { loss: 1.0, ..link } } else { link })
    }

    fn plan_lost(&mut self, a: usize, b: usize) {
        self.plan(self.now + CONNECTION_TIMEOUT, Event::Lost(a, b));
    }

    /// The time of a connection is out, if nothing came over it.
    pub(super) fn connection_lost(&mut self, a: usize, b: usize) {
        if self.is_parted(a, b) || !self.is_running(a) || !self.is_running(b) {
            self.close(a, b);
        }
    }

    /// Closes the connection between two nodes, if there is one; both see it at once.
    pub(super) fn close(&mut self, a: usize, b: usize) {
        if !self.nodes[a].connected.remove(&b) {
            return;
        }
        self.nodes[b].connected.remove(&a);
        for (here, there) in [(a, b), (b, a)] {
            if self.is_running(here) {
                let gone = self.id(there);
                let input = Input::PeerDisconnected(gone);
                self.plan(self.now, Event::Input(here, Box::new(input)));
                self.link_lost(here, gone);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Intervals;
    use crate::engine::measure::LinkState;
    use crate::engine::route::PathPolicy;
    use crate::engine::types::Timestamp;

    fn pair() -> World {
        let mut world = World::new(1, Timestamp(1_760_000_000_000_000));
        world.lay_out(Space { nearest_ms: 2.0, side_ms: 40.0, jitter_ms: 0.0, seed: 1 });
        world.add_node(&[], PathPolicy::default(), Intervals::default());
        world.add_node(&[0], PathPolicy::default(), Intervals::default());
        world.run_for(Duration::from_secs(5));
        assert!(world.is_connected(0, 1));
        world
    }

    fn up(world: &World, node: usize) -> usize {
        world.engine(node).links().filter(|(_, state, _)| *state == LinkState::Up).count()
    }

    #[test]
    fn who_vanishes_or_is_cut_off_is_missed_and_comes_back() {
        let mut world = pair();
        world.part([1].into());
        world.run_for(Duration::from_secs(9));
        assert!(world.is_connected(0, 1) && up(&world, 0) == 0 && up(&world, 1) == 0);
        world.run_for(Duration::from_secs(2));
        assert!(!world.is_connected(0, 1));
        assert!(world.engine(0).peers().is_empty() && world.engine(1).peers().is_empty());
        world.run_for(Duration::from_secs(30));
        assert!(!world.is_connected(0, 1), "no dial passes");
        world.heal();
        world.run_for(Duration::from_secs(60));
        assert!(world.is_connected(0, 1) && up(&world, 0) == 1);
        world.vanish(1);
        world.run_for(Duration::from_secs(9));
        assert!(up(&world, 0) == 0 && world.engine(0).peers().len() == 1);
        world.run_for(Duration::from_secs(2));
        assert!(world.engine(0).peers().is_empty());
        world.start(1);
        world.run_for(Duration::from_secs(5));
        assert!(up(&world, 0) == 1 && up(&world, 1) == 1);
    }

    #[test]
    fn delays_are_the_same_both_ways_and_differ_between_pairs() {
        let space = Space { nearest_ms: 2.0, side_ms: 40.0, jitter_ms: 0.0, seed: 7 };
        let delay = |a, b| space.between(a, b).delay_ms;
        assert_eq!(delay(3, 4), delay(4, 3));
        assert_eq!(delay(3, 3), 2.0);
        let all: Vec<f64> = (1..200).map(|b| delay(0, b)).collect();
        assert!(all.iter().all(|ms| (2.0..=2.0 + 40.0 * 2f64.sqrt()).contains(ms)));
        assert!(all.iter().any(|ms| *ms > 20.0) && all.iter().any(|ms| *ms < 10.0));
    }
}
