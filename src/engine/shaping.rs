//! The shape of the mesh around this node: which peers it is linked with. The rules are in
//! [`super::overlay::topology`] and [`super::measure::churn`].

use std::collections::BTreeSet;
use std::sync::Arc;

use super::Engine;
use super::event::{Notice, Output};
use super::overlay::topology::{
    CANDIDATES_MAX, DEGREE_MIN, DEGREE_SLACK, Neighbourhood, Reshape, WELCOME_FACTOR,
};
use super::predict::route_features;
use super::route::graph::Topology;
use super::types::{MAX_ROUTE_HOPS, NodeId, Route, Timestamp};

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

    /// The round trip that is forecast for a link to a node, which may never have been measured (ms): by the
    /// model that decides, and by coordinates alone without one; `None` when neither can say.
    pub fn expected_link_ms(&mut self, node: NodeId, now: Timestamp) -> Option<f64> {
        let route = Route::new([self.me, node]).ok()?;
        let features = route_features(&route, &self.advertised, self.histories.of(&route), now);
        let forecast = self.predictor.forecast(node, features).best()?;
        Some(forecast.latency_ms)
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
        let mut candidates: Vec<NodeId> = self
            .bootstrapper
            .known()
            .filter(|node| !self.peers.contains_key(node))
            .chain(self.unlinked.iter().copied())
            .filter(|node| *node != self.me && !links.contains(node))
            .filter(|node| !self.topology.is_recent(*node))
            .collect();
        candidates.sort_unstable();
        candidates.dedup();
        // Another part of them each time.
        let from = rand::RngExt::random(&mut self.random);
        let candidates = super::joining::random_start(candidates.into_iter(), from);
        let candidates = candidates.take(CANDIDATES_MAX);
        let candidates: Vec<(NodeId, Option<f64>)> =
            candidates.map(|node| (node, self.expected_link_ms(node, now))).collect();
        let topology = self.graph.topology();
        let seen = Neighbourhood {
            me: self.me,
            links: &links,
            candidates: &candidates,
            topology: &topology,
            target: self.degree_target(now),
            full: WELCOME_FACTOR * self.config.degree,
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

    /// Dials one of those who are missing, when it is time, and has links looked for to those who are too far.
    pub(super) fn reunite(&mut self, now: Timestamp) {
        let topology = self.graph.topology();
        if self.reunion.are_too_far(topology.farther_than(self.me, MAX_ROUTE_HOPS), now) {
            self.topology.look_soon(now);
        }
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use ed25519_dalek::SigningKey;

    use super::super::measure::LinkQuality;
    use super::super::overlay::NetworkState;
    use super::super::overlay::topology::SOON;
    use super::super::predict::MovingAverage;
    use super::super::predict::schema::FeatureVector;
    use super::super::predict::{Prediction, QualityModel};
    use super::super::{EngineConfig, types::PublicKey};
    use super::*;

    /// Says that everything takes twice as long.
    struct Doubles;

    impl QualityModel for Doubles {
        fn version(&self) -> &str {
            "doubles"
        }

        fn predict(&self, features: &FeatureVector) -> Option<Prediction> {
            let usual = MovingAverage.predict(features)?;
            Some(Prediction::of_latency(2.0 * usual.latency_ms))
        }
    }

    fn quality(rtt_ms: f64) -> LinkQuality {
        LinkQuality { rtt_ms, jitter_ms: 0.0, loss: 0.0, bandwidth: None, utilisation: 0.0 }
    }

    #[test]
    fn links_are_looked_for_soon_when_nodes_are_farther_than_a_route_may_lead() {
        let start = Timestamp(1_000_000_000_000);
        for (last, soon) in [(MAX_ROUTE_HOPS, false), (MAX_ROUTE_HOPS + 1, true)] {
            let key = SigningKey::from_bytes(&[1; 32]);
            let public = PublicKey(key.verifying_key().to_bytes());
            let root = SigningKey::from_bytes(&[9; 32]);
            let network = NetworkState::found(&root, "home", &public, start);
            let mut engine = Engine::new(EngineConfig::new(key, network), start);
            let line: Vec<NodeId> = std::iter::once(engine.me)
                .chain((1..=last).map(|index| NodeId([index as u8; 8])))
                .collect();
            for (index, node) in line.iter().enumerate() {
                let beside = [index.checked_sub(1), Some(index + 1)];
                let beside = beside.into_iter().flatten().filter_map(|at| line.get(at));
                let links: BTreeMap<_, _> = beside.map(|other| (*other, quality(5.0))).collect();
                engine.graph.accept(*node, start.0, links, start).unwrap();
            }
            engine.topology.start(start);
            engine.reunite(start);
            let looks_at = engine.topology.next_timeout().unwrap();
            assert_eq!(looks_at <= start + SOON, soon, "{last} links away");
        }
    }

    #[test]
    fn a_link_that_was_never_measured_is_expected_by_coordinates_and_by_the_model() {
        let start = Timestamp(1_000_000_000_000);
        let key = SigningKey::from_bytes(&[1; 32]);
        let public = PublicKey(key.verifying_key().to_bytes());
        let root = SigningKey::from_bytes(&[9; 32]);
        let network = NetworkState::found(&root, "home", &public, start);
        let mut engine = Engine::new(EngineConfig::new(key, network), start);
        let (me, far, other) = (engine.me, NodeId([2; 8]), NodeId([3; 8]));
        assert_eq!(engine.expected_link_ms(far, start), None, "nobody knows");
        let mut now = start;
        for _ in 0..100 {
            now = now + Duration::from_secs(1);
            for (a, b, rtt_ms) in [(me, other, 20.0), (other, me, 20.0), (other, far, 30.0)] {
                engine.advertised.advertised(a, now, [(b, Some(quality(rtt_ms)))]);
            }
        }
        let plain = engine.expected_link_ms(far, now).unwrap();
        let coordinates = engine.advertised.coordinates().rtt_ms(me, far).unwrap();
        assert!((plain - coordinates).abs() < 1e-9, "{plain} {coordinates}");
        engine.set_model(Some(Arc::new(Doubles)), now);
        let forecast = engine.expected_link_ms(far, now).unwrap();
        // Mixed with the baselines, as every forecast of a model.
        assert!(forecast > 1.1 * plain && forecast <= 2.0 * plain, "{forecast} {plain}");
    }
}
