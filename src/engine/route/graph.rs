//! The overlay graph: every accepted link-state advertisement, and the links that both ends
//! advertise.
//!
//! An advertisement replaces the older one of its origin when its sequence number is higher, and
//! is forgotten [`LIFETIME`] after it was accepted. A link counts when both ends list it, so that
//! nobody can invent a link to a node that does not agree.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::engine::measure::LinkQuality;
use crate::engine::types::{NodeId, Route, Timestamp};

/// An advertisement that was not refreshed is forgotten after this: three refresh intervals.
pub const LIFETIME: Duration = Duration::from_secs(90);
/// Most origins in the graph; advertisements of further ones are dropped and counted. Ten times
/// the size the first networks are built for.
pub const ORIGINS_MAX: usize = 10_000;
/// Cost of a hop beside its delay (ms): what forwarding adds, and the reason why of two equal
/// paths the shorter one wins.
pub const HOP_COST_MS: f64 = 1.0;
/// Delivery below which a link's cost does not grow further.
const DELIVERY_MIN: f64 = 0.05;

#[derive(Clone, Debug)]
struct Advertised {
    sequence: u64,
    accepted_at: Timestamp,
    links: BTreeMap<NodeId, LinkQuality>,
}

/// Why an advertisement was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// Its sequence number is not higher than the known one's.
    Stale,
    /// [`ORIGINS_MAX`] origins are known already.
    Full,
}

/// A change of what is known about one directed link.
pub type LinkChange = (NodeId, NodeId, Option<LinkQuality>);

/// All accepted advertisements.
#[derive(Clone, Debug, Default)]
pub struct OverlayGraph {
    adverts: BTreeMap<NodeId, Advertised>,
    topology: Option<Arc<Topology>>,
}

impl OverlayGraph {
    /// Takes an advertisement and returns what it says of each link, withdrawn ones included.
    ///
    /// # Errors
    /// [`Refused`], with nothing changed.
    pub fn accept(
        &mut self,
        origin: NodeId,
        sequence: u64,
        links: BTreeMap<NodeId, LinkQuality>,
        now: Timestamp,
    ) -> Result<Vec<LinkChange>, Refused> {
        let known = self.adverts.get(&origin);
        match known {
            Some(known) if known.sequence >= sequence => return Err(Refused::Stale),
            None if self.adverts.len() >= ORIGINS_MAX => return Err(Refused::Full),
            _ => {}
        }
        let withdrawn = known.into_iter().flat_map(|known| known.links.keys());
        let withdrawn = withdrawn.filter(|neighbour| !links.contains_key(neighbour));
        let mut changes: Vec<LinkChange> = withdrawn.map(|n| (origin, *n, None)).collect();
        changes.extend(links.iter().map(|(n, quality)| (origin, *n, Some(*quality))));
        self.adverts.insert(origin, Advertised { sequence, accepted_at: now, links });
        self.topology = None;
        Ok(changes)
    }

    /// Forgets advertisements older than [`LIFETIME`], except `me`'s, and returns their links.
    pub fn expire(&mut self, me: NodeId, now: Timestamp) -> Vec<LinkChange> {
        let mut changes = Vec::new();
        self.adverts.retain(|origin, advert| {
            let keep = *origin == me || now.since(advert.accepted_at) < LIFETIME;
            if !keep {
                changes.extend(advert.links.keys().map(|n| (*origin, *n, None)));
            }
            keep
        });
        if !changes.is_empty() {
            self.topology = None;
        }
        changes
    }

    /// What `from` says of its link to `to`.
    pub fn quality(&self, from: NodeId, to: NodeId) -> Option<LinkQuality> {
        self.adverts.get(&from)?.links.get(&to).copied()
    }

    /// Whether both ends advertise this link.
    pub fn is_link(&self, from: NodeId, to: NodeId) -> bool {
        self.quality(from, to).is_some() && self.quality(to, from).is_some()
    }

    /// What is left on the fullest link of a route (bytes/s), as advertised; `None` when it is not
    /// known of every link.
    pub fn residual(&self, route: &Route) -> Option<f64> {
        let left = route.links().map(|(from, to)| {
            let quality = self.quality(from, to)?;
            Some(quality.bandwidth? * (1.0 - quality.utilisation))
        });
        left.reduce(|least, left| Some(least?.min(left?))).flatten()
    }

    /// Every origin with the number of links that it advertises.
    pub fn origins(&self) -> impl Iterator<Item = (NodeId, usize)> + '_ {
        self.adverts.iter().map(|(origin, advert)| (*origin, advert.links.len()))
    }

    /// The links that count, in the compact form that path search wants.
    pub fn topology(&mut self) -> Arc<Topology> {
        if let Some(topology) = &self.topology {
            return topology.clone();
        }
        let nodes: Vec<NodeId> = self.adverts.keys().copied().collect();
        let edges = nodes.iter().map(|from| {
            let links = &self.adverts[from].links;
            let both = links.iter().filter(|(to, _)| self.quality(**to, *from).is_some());
            let edge = both.filter_map(|(to, quality)| {
                Some((nodes.binary_search(to).ok()? as u32, link_cost_ms(quality)))
            });
            edge.collect()
        });
        let topology = Arc::new(Topology { edges: edges.collect(), nodes: nodes.clone() });
        self.topology = Some(topology.clone());
        topology
    }
}

/// Cost of a link for path search (ms): its RTT times the expected number of transmissions
/// (ETX; De Couto et al., 2003, with the loss of the probe's round trip), and [`HOP_COST_MS`].
pub fn link_cost_ms(quality: &LinkQuality) -> f64 {
    quality.rtt_ms / (1.0 - quality.loss).max(DELIVERY_MIN) + HOP_COST_MS
}

/// The links that count: nodes in order of id, edges as (index of the other end, cost in ms).
#[derive(Clone, Debug, Default)]
pub struct Topology {
    /// All nodes, ascending.
    pub nodes: Vec<NodeId>,
    /// For each node its links, ascending by the other end.
    pub edges: Vec<Vec<(u32, f64)>>,
}

impl Topology {
    /// Index of a node.
    pub fn index(&self, node: NodeId) -> Option<u32> {
        self.nodes.binary_search(&node).ok().map(|index| index as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(byte: u8) -> NodeId {
        NodeId([byte; 8])
    }

    fn quality(rtt_ms: f64) -> LinkQuality {
        LinkQuality { rtt_ms, jitter_ms: 0.0, loss: 0.0, bandwidth: None, utilisation: 0.0 }
    }

    fn advertise(graph: &mut OverlayGraph, from: u8, sequence: u64, to: &[u8], at: u64) {
        let links = to.iter().map(|to| (node(*to), quality(10.0))).collect();
        graph.accept(node(from), sequence, links, Timestamp(at)).unwrap();
    }

    #[test]
    fn a_link_counts_when_both_ends_advertise_it() {
        let mut graph = OverlayGraph::default();
        advertise(&mut graph, 1, 1, &[2, 3], 0);
        assert!(!graph.is_link(node(1), node(2)));
        advertise(&mut graph, 2, 1, &[1], 0);
        assert!(graph.is_link(node(1), node(2)) && graph.is_link(node(2), node(1)));
        let topology = graph.topology();
        assert_eq!(topology.edges, [vec![(1, 11.0)], vec![(0, 11.0)]]);
    }

    #[test]
    fn the_fullest_link_limits_a_route_and_an_unknown_one_hides_it() {
        let mut graph = OverlayGraph::default();
        let filled = |bandwidth, utilisation| LinkQuality {
            bandwidth: Some(bandwidth),
            utilisation,
            ..quality(1.0)
        };
        let route = Route::new([node(1), node(2), node(3)]).unwrap();
        let mut say = |from, to, sequence, quality| {
            graph.accept(node(from), sequence, [(node(to), quality)].into(), Timestamp(0)).unwrap();
            graph.residual(&route)
        };
        assert_eq!(say(1, 2, 1, filled(100.0, 0.5)), None);
        assert_eq!(say(2, 3, 1, filled(80.0, 0.75)), Some(20.0));
        assert_eq!(say(1, 2, 2, filled(100.0, 0.9375)), Some(6.25));
        assert_eq!(say(2, 3, 2, quality(1.0)), None);
    }

    #[test]
    fn an_older_advertisement_never_replaces_a_newer_one() {
        let mut graph = OverlayGraph::default();
        advertise(&mut graph, 1, 5, &[2], 0);
        for sequence in [4, 5] {
            let result = graph.accept(node(1), sequence, BTreeMap::new(), Timestamp(9));
            assert_eq!(result, Err(Refused::Stale));
        }
        let changes = graph.accept(node(1), 6, BTreeMap::new(), Timestamp(9)).unwrap();
        assert_eq!(changes, [(node(1), node(2), None)]);
    }

    #[test]
    fn silence_is_forgotten_and_my_own_advertisement_is_not() {
        let mut graph = OverlayGraph::default();
        advertise(&mut graph, 1, 1, &[2], 0);
        advertise(&mut graph, 2, 1, &[1], 0);
        let expiry = Timestamp(0) + LIFETIME;
        assert!(graph.expire(node(1), Timestamp(expiry.0 - 1)).is_empty());
        assert_eq!(graph.expire(node(1), expiry), [(node(2), node(1), None)]);
        assert_eq!(graph.origins().collect::<Vec<_>>(), [(node(1), 1)]);
    }

    #[test]
    fn loss_makes_a_link_dearer() {
        let lossy = LinkQuality { loss: 0.5, ..quality(10.0) };
        assert_eq!(link_cost_ms(&lossy), 21.0);
    }
}
