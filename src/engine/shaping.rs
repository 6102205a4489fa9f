//! The shape of the mesh around this node: which peers it is linked with. The rules are in
//! [`super::overlay::topology`] and [`super::measure::churn`].

use std::collections::BTreeSet;
use std::sync::Arc;

use super::Engine;
use super::event::{Notice, Output};
use super::overlay::topology::{DEGREE_MIN, DEGREE_SLACK, Neighbourhood, Reshape};
use super::route::graph::Topology;
use super::types::{NodeId, Timestamp};

/// A node takes links that others want up to so many times its target, so that newcomers find room.
const WELCOME_FACTOR: usize = 2;

impl Engine {
    /// Links that this node wants: more of them while peers come and go.
    fn degree_target(&self, now: Timestamp) -> usize {
        let target = self.config.degree;
        let restless = self.churn.is_restless(self.peers.len(), now);
        if restless { target + target.div_ceil(2) } else { target }
    }

    /// The links that count, in the compact form that path search reads.
    pub fn topology(&mut self) -> Arc<Topology> {
        self.graph.topology()
    }

    /// Peers that this node is connected with and keeps no link to.
    pub fn unlinked(&self) -> &BTreeSet<NodeId> {
        &self.unlinked
    }

    /// A peer is here: it becomes a neighbour while there is room.
    pub(super) fn welcome(&mut self, node: NodeId, now: Timestamp) {
        self.topology.start(now);
        self.reunion.start(now);
        let waiting = self.pending.iter().filter(|peer| !self.links.is_connected(**peer));
        let linked = self.links.all().count() + waiting.count();
        let full = linked >= WELCOME_FACTOR * self.degree_target(now).max(DEGREE_SLACK);
        if full || self.topology.is_given_up(node) {
            self.unlinked.insert(node);
            self.aim = true;
        } else {
            self.pending.insert(node);
        }
    }

    /// A peer is gone.
    pub(super) fn farewell(&mut self, node: NodeId, now: Timestamp) {
        self.unlinked.remove(&node);
        self.pending.remove(&node);
        self.churn.left(now);
        let links = self.links.all().count();
        if links + self.pending.len() == 0 {
            self.unlinked.clear();
            self.topology.is_alone(now);
            self.aim = true;
        } else if links < DEGREE_MIN {
            self.topology.look_soon(now);
        }
    }

    /// Makes a link, gives one up, or leaves all as they are.
    pub(super) fn shape(&mut self, now: Timestamp) {
        // A peer that keeps no link to this node is no neighbour, and no candidate either.
        self.pending.clear();
        let links: BTreeSet<NodeId> = self.links.all().map(|(node, ..)| node).collect();
        let expected = self.advertised.coordinates();
        let mut candidates: Vec<(NodeId, Option<f64>)> = self
            .bootstrapper
            .known()
            .filter(|node| !self.peers.contains_key(node))
            .chain(self.unlinked.iter().copied())
            .filter(|node| *node != self.me && !links.contains(node))
            .map(|node| (node, expected.rtt_ms(self.me, node)))
            .collect();
        candidates.sort_by_key(|(node, _)| *node);
        candidates.dedup_by_key(|(node, _)| *node);
        // Another part of them each time.
        let candidates: Vec<_> = super::joining::random_start(
            candidates.into_iter(),
            rand::RngExt::random(&mut self.random),
        )
        .collect();
        let topology = self.graph.topology();
        let seen = Neighbourhood {
            me: self.me,
            links: &links,
            candidates: &candidates,
            topology: &topology,
            target: self.degree_target(now),
            max_hops: self.config.paths.max_hops,
        };
        for change in self.topology.poll(&seen, now) {
            match change {
                Reshape::Make(node) => {
                    self.unlinked.remove(&node);
                    if !self.peers.contains_key(&node)
                        && let Some(addresses) = self.bootstrapper.addresses(node)
                    {
                        self.outputs.push_back(Output::Dial(addresses.to_vec()));
                    }
                }
                Reshape::GiveUp(node) => {
                    self.unlinked.insert(node);
                }
            }
            self.aim = true;
            self.notice(Notice::Shape(change));
        }
    }

    /// Dials one of those who are missing, when it is time.
    pub(super) fn reunite(&mut self, now: Timestamp) {
        let topology = self.graph.topology();
        let reached = topology.reached_from(self.me);
        let missing = self.bootstrapper.known().filter(|node| {
            *node != self.me && !self.peers.contains_key(node) && !reached.contains(node)
        });
        let random = || rand::RngExt::random(&mut self.random);
        let Some(node) = self.reunion.poll(missing, reached.len(), random, now) else { return };
        if let Some(addresses) = self.bootstrapper.addresses(node) {
            self.outputs.push_back(Output::Dial(addresses.to_vec()));
        }
    }
}
