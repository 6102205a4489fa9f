//! What must hold after every event of a world, whatever fails in it. A world looks at what its
//! nodes do from outside, and keeps what it finds wrong in [`World::breaches`].

use super::World;
use crate::engine::forward::{Binding, Header};
use crate::engine::traffic::SHARE_MAX;
use crate::engine::types::{MAX_ROUTE_HOPS, NodeId, Route, TunnelId};

/// Breaches that are kept: the first tell most.
const BREACHES_MAX: usize = 16;

impl World {
    /// What went wrong so far, in words; nothing, unless there is a bug.
    pub fn breaches(&self) -> &[String] {
        &self.breaches
    }

    fn breach(&mut self, what: String) {
        if self.breaches.len() < BREACHES_MAX {
            self.breaches.push(format!("{}: {what}", self.now.as_micros()));
        }
    }

    /// A datagram passes no node twice, and no more nodes than a route may have.
    pub(super) fn check_trail(&mut self, trail: &[usize]) {
        let (last, before) = (trail[trail.len() - 1], &trail[..trail.len() - 1]);
        if before.contains(&last) || trail.len() > MAX_ROUTE_HOPS + 1 {
            self.breach(format!("a datagram took the way {trail:?}"));
        }
    }

    /// A source with another way does not send to a neighbour that it knows to be silent.
    pub(super) fn check_first_hop(&mut self, node: usize, header: &Header) {
        let forwarding = &self.nodes[node].forwarding;
        let first = header.route.nodes()[1];
        let in_use = |binding: &&Binding| binding.route_id == header.route_id;
        let binding = forwarding.tunnels.get(&header.tunnel).filter(in_use);
        if forwarding.down.contains(&first) && binding.is_some_and(|b| b.reachable) {
            self.breach(format!("node {node} sends to {first}, which it knows to be silent"));
        }
    }

    /// What arrives has come to the far end of its tunnel.
    pub(super) fn check_destination(&mut self, source: usize, tunnel: TunnelId, at: usize) {
        let binding = self.nodes[source].forwarding.tunnels.get(&tunnel);
        if binding.is_some_and(|binding| binding.destination != self.id(at)) {
            self.breach(format!("tunnel {tunnel} of node {source} ends at node {at}"));
        }
    }

    /// The promises of a link are at most the share of its capacity that may be promised.
    pub(super) fn check_promises(&mut self, node: usize, neighbour: NodeId) {
        let here = &self.nodes[node];
        let promised = here.plane.ledger.promised(neighbour, self.now) as f64;
        let capacity = here.forwarding.capacity.get(&neighbour).copied().unwrap_or(0.0);
        if promised > SHARE_MAX * capacity {
            self.breach(format!("node {node} promised {promised} of {capacity} to {neighbour}"));
        }
    }

    /// The snapshot that a node forwards by fits its graph, and each tunnel in itself.
    pub(super) fn check_snapshot(&mut self, node: usize) {
        let here = &self.nodes[node];
        let Some(engine) = &here.engine else { return };
        let snapshot = here.forwarding.clone();
        let is_there = |route: &Route| {
            let links_are = route.links().all(|(a, b)| engine.graph().is_link(a, b));
            links_are && self.carries_to(node, route.nodes()[1])
        };
        let is_ours = |route: &Route, binding: &Binding| {
            route.source() == self.id(node) && route.destination() == binding.destination
        };
        let mut wrong = Vec::new();
        for (tunnel, binding) in &snapshot.tunnels {
            let mut say = |what: &str, route: &Route| {
                wrong.push(format!("tunnel {tunnel} of node {node}: {what}: {route}"));
            };
            let Some(route) = &binding.route else { continue };
            if !is_ours(route, binding) {
                say("no route of this tunnel", route);
            }
            if binding.reachable && !is_there(route) {
                say("the route in use is not there", route);
            }
            let Some(backup) = &binding.backup else { continue };
            if !is_ours(&backup.route, binding) || backup.route_id <= binding.route_id {
                say("no backup of this tunnel", &backup.route);
            }
            if backup.route.relays().iter().any(|relay| route.relays().contains(relay)) {
                say("the backup shares a relay", &backup.route);
            }
            if !is_there(&backup.route) {
                say("the backup is not there", &backup.route);
            }
        }
        wrong.into_iter().for_each(|what| self.breach(what));
    }
}
