//! What drivers and people may look at: the engine's state, and what it would decide.

use std::collections::BTreeMap;
use std::time::Duration;

use super::measure::{LinkQuality, LinkState};
use super::overlay::wire::{PeerAddresses, Signed};
use super::overlay::{Issuer, KnownPeer, Membership};
use super::predict::RoutePredictor;
use super::route::candidate::Knowledge;
use super::route::{self, Counterfactual, Decision, Destination, OverlayGraph};
use super::services::Services;
use super::types::{NodeId, PublicKey, Timestamp, TunnelId};
use super::{Engine, Peer};

impl Engine {
    /// This node's id.
    pub fn me(&self) -> NodeId {
        self.me
    }

    /// This node's identity.
    pub fn key(&self) -> PublicKey {
        self.author.public()
    }

    /// How long it took from the start until the mesh's state arrived from a peer.
    pub fn joined_after(&self) -> Option<Duration> {
        self.joined_at.map(|at| at.since(self.started_at))
    }

    /// The key of a node that this one has seen: a peer, the author of a message, the owner of a name.
    pub fn key_of(&self, node: NodeId) -> Option<PublicKey> {
        let peers = self.peers.values().map(|peer| peer.key);
        let authors = self.membership.seen().map(|(key, _)| *key);
        let owners = self.services.registry().pins().list().map(|pin| pin.owner);
        let claimants = self.services.conflicts().map(|(_, key)| *key);
        let mut keys = peers.chain(authors).chain(owners).chain(claimants).chain([self.key()]);
        keys.find(|key| key.node_id() == node)
    }

    /// Who belongs to the network, as far as it was seen.
    pub fn membership(&self) -> &Membership {
        &self.membership
    }

    /// The holder of the root key, when this node is it.
    pub fn issuer(&self) -> Option<&Issuer> {
        self.issuer.as_ref()
    }

    /// Connected peers.
    pub fn peers(&self) -> &BTreeMap<NodeId, Peer> {
        &self.peers
    }

    /// Connected peers that said where they listen, as they are kept for the next start.
    pub fn known_peers(&self, now: Timestamp) -> Vec<KnownPeer> {
        let peers = self.peers.values().filter(|peer| !peer.addresses.is_empty());
        let peers = peers.map(|p| PeerAddresses { key: p.key, addresses: p.addresses.clone() });
        peers.map(|peer| KnownPeer { peer, seen_at: now }).collect()
    }

    /// What each link is expected to carry (bytes/s), pessimistically, in order of neighbour.
    pub fn capacities(&self) -> impl Iterator<Item = (NodeId, f64)> + '_ {
        self.links.capacities(self.config.paths.capacity_unknown)
    }

    /// How well a node's claims fit what routes over it delivered, 0 to 1; 1 while nothing is known.
    pub fn credibility(&self, node: NodeId) -> f64 {
        self.advertised.credibility(node).unwrap_or(1.0)
    }

    /// This node's links.
    pub fn links(&self) -> impl Iterator<Item = (NodeId, LinkState, Option<LinkQuality>)> + '_ {
        self.links.all()
    }

    /// The overlay graph.
    pub fn graph(&self) -> &OverlayGraph {
        &self.graph
    }

    /// The newest advertisement of each node, as it was signed.
    pub fn advertised(&self) -> impl Iterator<Item = &Signed> + '_ {
        self.advertisements.values().map(|signed| &**signed)
    }

    /// Everything about services.
    pub fn services(&self) -> &Services {
        &self.services
    }

    /// The tunnels and their routes.
    pub fn tunnels(&self) -> impl Iterator<Item = (TunnelId, &Destination)> + '_ {
        self.router.tunnels()
    }

    /// What became of a tunnel's reservation; `None` when it has none, or is not open.
    pub fn reservation(&self, tunnel: TunnelId) -> Option<route::Reservation> {
        self.router.tunnel(tunnel)?.reservation
    }

    /// The forecaster in use.
    pub fn predictor(&self) -> &RoutePredictor {
        &self.predictor
    }

    /// What would be decided for a destination now, without deciding it.
    pub fn explain(&mut self, destination: NodeId, now: Timestamp) -> Decision {
        self.look_at_links(now);
        let mut know = Knowledge {
            graph: &mut self.graph,
            links: &self.advertised,
            histories: &self.histories,
            predictor: &mut self.predictor,
        };
        self.router.explain(destination, &mut know, now)
    }

    /// What would have to be forecast for a decision of this engine to come out otherwise.
    pub fn counterfactual(&self, decision: &Decision) -> Option<Counterfactual> {
        route::counterfactual(&self.config.paths, decision)
    }
}
