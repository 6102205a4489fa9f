//! The overlay graph: every accepted link-state advertisement, and the links that both ends
//! advertise.
//!
//! An advertisement replaces the older one of its origin when its sequence number is higher, and
//! is forgotten [`LIFETIME`] after it was accepted. A link counts when both ends list it, so that
//! nobody can invent a link to a node that does not agree. What this node found out about relays that
//! deliver less than their links claim is laid upon the claims.
//!
//! What path search reads is kept beside the advertisements. An advertisement of a known origin
//! changes a few of its edges; only when origins come or go is it built anew. The newest changes are
//! kept, so that whoever searched before can tell whether they concern what it found.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crate::engine::measure::LinkQuality;
use crate::engine::overlay::advertiser::REFRESH_QUIET;
use crate::engine::overlay::registry::CLOCK_SKEW;
use crate::engine::types::{NodeId, Route, Timestamp};

/// An advertisement that was not refreshed is forgotten after this: three of the longest times between
/// two refreshes. Links do not live as long: they count while both ends say so, and the end that is
/// left says within seconds that one is gone.
pub const LIFETIME: Duration = REFRESH_QUIET.saturating_mul(3);
/// An advertisement is kept until it is so old, by clocks that differ. One that is taken is younger than
/// [`LIFETIME`] and so kept for at least [`CLOCK_SKEW`], within which the next one comes: whoever's clock is
/// behind is heard all the time or, when that is [`LIFETIME`] or more, never.
const AGE_MAX: Duration = LIFETIME.saturating_add(CLOCK_SKEW);
const _: () = assert!(CLOCK_SKEW.as_secs() > REFRESH_QUIET.as_secs());
/// Most origins in the graph; advertisements of further ones are dropped and counted. Ten times
/// the size the first networks are built for.
pub const ORIGINS_MAX: usize = 10_000;
/// Cost of a hop beside its delay (ms): what forwarding adds, and the reason why of two equal
/// paths the shorter one wins.
pub const HOP_COST_MS: f64 = 1.0;
/// Newest changes of edges that are kept. Who fell further behind has to search anew anyway.
const CHANGES_MAX: usize = 1_024;
/// Delivery below which a link's cost does not grow further.
const DELIVERY_MIN: f64 = 0.05;

/// Whether an advertisement that was signed at this time is young enough to be taken, and told to others.
pub fn is_news(signed_at: Timestamp, now: Timestamp) -> bool {
    now.since(signed_at) < LIFETIME
}

#[derive(Clone, Debug)]
struct Advertised {
    sequence: u64,
    accepted_at: Timestamp,
    links: Arc<BTreeMap<NodeId, LinkQuality>>,
    /// Links that are gone, which the next advertisement will say.
    gone: BTreeSet<NodeId>,
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

/// What happened to one directed edge. Costs are in ms, infinite where there is no edge.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EdgeChange {
    /// Index of the end that pays it.
    pub from: u32,
    /// Index of the other end.
    pub to: u32,
    /// Cost until then.
    pub before_ms: f64,
    /// Cost from then on.
    pub after_ms: f64,
}

/// All accepted advertisements.
#[derive(Clone, Debug, Default)]
pub struct OverlayGraph {
    adverts: BTreeMap<NodeId, Advertised>,
    /// Relays that are not believed, and the share that they deliver of what their links claim.
    doubted: BTreeMap<NodeId, f64>,
    /// `None` when it has to be built anew.
    topology: Option<Arc<Topology>>,
    /// Grows by one with each change of an edge and with each building anew.
    version: u64,
    /// The newest changes since it was built.
    changes: VecDeque<EdgeChange>,
    /// Who is reached from the node that was asked about first, until a link comes or goes: it is asked for
    /// with every look at a name of several providers.
    reached: OnceLock<(NodeId, Arc<BTreeSet<NodeId>>)>,
}

impl OverlayGraph {
    /// Forgets what an origin said. Returns the withdrawn links.
    pub fn forget(&mut self, origin: NodeId) -> Vec<LinkChange> {
        let Some(gone) = self.adverts.remove(&origin) else { return Vec::new() };
        self.outdate();
        gone.links.keys().map(|to| (origin, *to, None)).collect()
    }

    /// Takes an advertisement and returns what it says of each link, withdrawn ones included.
    ///
    /// # Errors
    /// [`Refused`], with nothing changed.
    pub fn accept(
        &mut self,
        origin: NodeId,
        sequence: u64,
        links: impl Into<Arc<BTreeMap<NodeId, LinkQuality>>>,
        now: Timestamp,
    ) -> Result<Vec<LinkChange>, Refused> {
        let links = links.into();
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
        let is_known = known.is_some();
        self.adverts.insert(
            origin,
            Advertised { sequence, accepted_at: now, links, gone: BTreeSet::new() },
        );
        match is_known {
            true => self.patch(origin, changes.iter().map(|(_, neighbour, _)| *neighbour)),
            false => self.outdate(),
        }
        Ok(changes)
    }

    /// A link of `me` is gone, or there again. It no longer counts, or does again, though the next
    /// advertisement may have to wait; only that one says so to others and to who keeps records.
    pub fn own_link(&mut self, me: NodeId, neighbour: NodeId, is_there: bool) {
        let Some(own) = self.adverts.get_mut(&me) else { return };
        let changed = match is_there {
            true => own.gone.remove(&neighbour),
            false => own.links.contains_key(&neighbour) && own.gone.insert(neighbour),
        };
        if changed {
            self.patch(me, [neighbour].into_iter());
        }
    }

    /// Forgets advertisements that came [`LIFETIME`] ago, except `me`'s, and returns their links. One that
    /// was signed longer ago than that, by clocks that differ, goes too: nodes that synchronise would hand
    /// the last word of a node that vanished on to each other, and begin to count anew each time.
    pub fn expire(&mut self, me: NodeId, now: Timestamp) -> Vec<LinkChange> {
        let mut changes = Vec::new();
        let before = self.adverts.len();
        self.adverts.retain(|origin, advert| {
            let is_young = now.since(advert.accepted_at) < LIFETIME
                && now.since(Timestamp(advert.sequence)) < AGE_MAX;
            let keep = *origin == me || is_young;
            if !keep {
                changes.extend(advert.links.keys().map(|n| (*origin, *n, None)));
            }
            keep
        });
        if self.adverts.len() < before {
            self.outdate();
        }
        changes
    }

    /// Sequence number of an origin's newest advertisement.
    pub fn sequence(&self, origin: NodeId) -> Option<u64> {
        self.adverts.get(&origin).map(|advert| advert.sequence)
    }

    /// How old the newest advertisement of each origin was when it came, by the two nodes' clocks
    /// (µs): its way through the mesh, and by how much this node's clock is ahead of the origin's.
    pub fn ages_us(&self) -> impl Iterator<Item = (NodeId, i64)> + '_ {
        let age = |advert: &Advertised| {
            let [came, left] = [advert.accepted_at.as_micros(), advert.sequence];
            i64::try_from(i128::from(came) - i128::from(left)).unwrap_or(i64::MAX)
        };
        self.adverts.iter().map(move |(origin, advert)| (*origin, age(advert)))
    }

    /// These relays deliver only a share (above 0, below 1) of what their links claim; all others
    /// what they claim.
    pub fn doubt(&mut self, relays: BTreeMap<NodeId, f64>) {
        let before = std::mem::replace(&mut self.doubted, relays);
        let now = &self.doubted;
        let either: BTreeSet<NodeId> = before.keys().chain(now.keys()).copied().collect();
        let changed = either.into_iter().filter(|relay| before.get(relay) != now.get(relay));
        for relay in changed.collect::<Vec<_>>() {
            let Some(known) = self.adverts.get(&relay) else { continue };
            let neighbours: Vec<NodeId> = known.links.keys().copied().collect();
            self.patch(relay, neighbours.into_iter());
        }
    }

    /// The relays of a route that deliver less than their links claim, and which share of it.
    pub fn doubted_on(&self, route: &Route) -> Vec<(NodeId, f64)> {
        let relays = route.relays().iter();
        relays.filter_map(|relay| Some((*relay, *self.doubted.get(relay)?))).collect()
    }

    /// What `from` says of its link to `to`.
    pub fn quality(&self, from: NodeId, to: NodeId) -> Option<LinkQuality> {
        let advert = self.adverts.get(&from)?;
        advert.links.get(&to).filter(|_| !advert.gone.contains(&to)).copied()
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

    /// Whether anybody has a link to this node that counts.
    pub fn is_linked(&self, node: NodeId) -> bool {
        let own = self.adverts.get(&node);
        own.is_some_and(|own| own.links.keys().any(|neighbour| self.is_link(node, *neighbour)))
    }

    /// The nodes to which links lead that count, the one where they begin included.
    pub fn reached_from(&self, node: NodeId) -> Arc<BTreeSet<NodeId>> {
        match self.reached.get_or_init(|| (node, Arc::new(self.walk_from(node)))) {
            (from, reached) if *from == node => reached.clone(),
            _ => Arc::new(self.walk_from(node)),
        }
    }

    fn walk_from(&self, node: NodeId) -> BTreeSet<NodeId> {
        let mut reached = BTreeSet::from([node]);
        let mut fringe = vec![node];
        while let Some(at) = fringe.pop() {
            let Some(own) = self.adverts.get(&at) else { continue };
            for neighbour in own.links.keys() {
                if !reached.contains(neighbour) && self.is_link(at, *neighbour) {
                    reached.insert(*neighbour);
                    fringe.push(*neighbour);
                }
            }
        }
        reached
    }

    /// Whether an advertisement of this node is known.
    pub fn is_origin(&self, node: NodeId) -> bool {
        self.adverts.contains_key(&node)
    }

    /// Every origin with what it says of its links.
    pub fn advertised(
        &self,
    ) -> impl Iterator<Item = (NodeId, &BTreeMap<NodeId, LinkQuality>)> + '_ {
        self.adverts.iter().map(|(origin, advert)| (*origin, advert.links.as_ref()))
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
            let neighbours = self.adverts[from].links.keys();
            let edge = |to: &NodeId| self.edge(*from, *to, nodes.binary_search(to).ok()? as u32);
            neighbours.filter_map(edge).collect()
        });
        let topology = Arc::new(Topology { edges: edges.collect(), nodes: nodes.clone() });
        self.topology = Some(topology.clone());
        topology
    }

    /// A number that changes whenever the answer of [`OverlayGraph::topology`] does.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// What happened to edges since a version, oldest first; `None` when that is not known any
    /// more, or when indices have got another meaning.
    pub fn changes_since(&self, version: u64) -> Option<impl Iterator<Item = &EdgeChange>> {
        let behind = usize::try_from(self.version.checked_sub(version)?).ok()?;
        let skip = self.changes.len().checked_sub(behind)?;
        Some(self.changes.iter().skip(skip))
    }

    /// The edge from one node to another, whose index is `to_index`, while both advertise it.
    fn edge(&self, from: NodeId, to: NodeId, to_index: u32) -> Option<Edge> {
        let (there, back) = (self.quality(from, to)?, self.quality(to, from)?);
        // Every relay of a path sends over one link of it.
        let cost_ms = |said: LinkQuality, relay| {
            let delivers = self.doubted.get(&relay).unwrap_or(&1.0);
            link_cost_ms(&LinkQuality { loss: 1.0 - (1.0 - said.loss) * delivers, ..said })
        };
        let (cost_ms, back_ms) = (cost_ms(there, from), cost_ms(back, to));
        Some(Edge { to: to_index, cost_ms, back_ms })
    }

    fn outdate(&mut self) {
        self.topology = None;
        self.reached.take();
        self.version += 1;
        self.changes.clear();
    }

    /// Brings the edges between a known origin and these neighbours up to date.
    fn patch(&mut self, origin: NodeId, neighbours: impl Iterator<Item = NodeId>) {
        let Some(mut kept) = self.topology.take() else { return self.outdate() };
        let topology = Arc::make_mut(&mut kept);
        let Some(from) = topology.index(origin) else { return self.outdate() };
        let neighbours: BTreeSet<NodeId> = neighbours.collect();
        for neighbour in neighbours {
            let Some(to) = topology.index(neighbour) else { continue };
            for (from, to, edge) in [
                (from, to, self.edge(origin, neighbour, to)),
                (to, from, self.edge(neighbour, origin, from)),
            ] {
                let before_ms = topology.cost_ms(from, to);
                topology.set(from, to, edge);
                let after_ms = edge.map_or(f64::INFINITY, |edge| edge.cost_ms);
                if before_ms.is_finite() != after_ms.is_finite() {
                    self.reached.take();
                }
                if before_ms != after_ms {
                    self.version += 1;
                    self.changes.push_back(EdgeChange { from, to, before_ms, after_ms });
                }
            }
        }
        while self.changes.len() > CHANGES_MAX {
            self.changes.pop_front();
        }
        self.topology = Some(kept);
    }
}

/// Cost of a link for path search (ms): its RTT times the expected number of transmissions
/// (ETX; De Couto et al., 2003, with the loss of the probe's round trip), and [`HOP_COST_MS`].
pub fn link_cost_ms(quality: &LinkQuality) -> f64 {
    quality.rtt_ms / (1.0 - quality.loss).max(DELIVERY_MIN) + HOP_COST_MS
}

/// One direction of a link that counts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Edge {
    /// Index of the other end.
    pub to: u32,
    /// Cost in this direction (ms), above 0.
    pub cost_ms: f64,
    /// Cost in the other direction (ms), above 0.
    pub back_ms: f64,
}

/// The links that count: nodes in order of id, and the edges of each.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Topology {
    /// All nodes, ascending.
    pub nodes: Vec<NodeId>,
    /// For each node its edges, ascending by the other end; each has one in the other direction.
    pub edges: Vec<Vec<Edge>>,
}

impl Topology {
    /// Index of a node.
    pub fn index(&self, node: NodeId) -> Option<u32> {
        self.nodes.binary_search(&node).ok().map(|index| index as u32)
    }

    /// The nodes to which a path leads, the first one included, ascending; nobody from a node that is
    /// not there.
    pub fn reached_from(&self, node: NodeId) -> BTreeSet<NodeId> {
        let Some(from) = self.index(node) else { return BTreeSet::new() };
        let mut seen = vec![false; self.nodes.len()];
        seen[from as usize] = true;
        let mut waiting = vec![from];
        while let Some(at) = waiting.pop() {
            for edge in &self.edges[at as usize] {
                if !std::mem::replace(&mut seen[edge.to as usize], true) {
                    waiting.push(edge.to);
                }
            }
        }
        self.nodes.iter().zip(seen).filter(|(_, seen)| *seen).map(|(node, _)| *node).collect()
    }

    /// How many nodes are reached from this one, but by no path of at most so many links.
    pub fn farther_than(&self, node: NodeId, links: usize) -> usize {
        let Some(from) = self.index(node) else { return 0 };
        let mut seen = vec![false; self.nodes.len()];
        seen[from as usize] = true;
        let (mut ring, mut far) = (vec![from], 0);
        for length in 1.. {
            let mut next = Vec::new();
            for edge in ring.iter().flat_map(|at| &self.edges[*at as usize]) {
                if !std::mem::replace(&mut seen[edge.to as usize], true) {
                    next.push(edge.to);
                }
            }
            if next.is_empty() {
                break;
            }
            far += if length > links { next.len() } else { 0 };
            ring = next;
        }
        far
    }

    /// Cost of an edge (ms); infinite when there is none.
    pub fn cost_ms(&self, from: u32, to: u32) -> f64 {
        let edges = &self.edges[from as usize];
        let at = edges.binary_search_by_key(&to, |edge| edge.to);
        at.map_or(f64::INFINITY, |at| edges[at].cost_ms)
    }

    fn set(&mut self, from: u32, to: u32, edge: Option<Edge>) {
        let edges = &mut self.edges[from as usize];
        match (edges.binary_search_by_key(&to, |edge| edge.to), edge) {
            (Ok(at), Some(edge)) => edges[at] = edge,
            (Ok(at), None) => drop(edges.remove(at)),
            (Err(at), Some(edge)) => edges.insert(at, edge),
            (Err(_), None) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn node(byte: u8) -> NodeId {
        NodeId([byte; 8])
    }

    fn quality(rtt_ms: f64) -> LinkQuality {
        LinkQuality { rtt_ms, jitter_ms: 0.0, loss: 0.0, bandwidth: None, utilisation: 0.0 }
    }

    fn advertise(graph: &mut OverlayGraph, from: u8, sequence: u64, to: &[u8], at: u64) {
        let links = to.iter().map(|to| (node(*to), quality(10.0)));
        let links: BTreeMap<_, _> = links.collect();
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
        let edge = |to| vec![Edge { to, cost_ms: 11.0, back_ms: 11.0 }];
        assert_eq!(topology.edges, [edge(1), edge(0)]);
        advertise(&mut graph, 3, 1, &[1], 0);
        advertise(&mut graph, 4, 1, &[5], 0);
        let topology = graph.topology();
        assert_eq!(topology.reached_from(node(2)), [1, 2, 3].map(node).into());
        assert_eq!(topology.reached_from(node(4)), [node(4)].into());
        assert_eq!(topology.reached_from(node(5)), [].into());
        let farther = |links| topology.farther_than(node(2), links);
        assert_eq!([0, 1, 2].map(farther), [2, 1, 0]);
        assert_eq!(topology.farther_than(node(5), 0), 0);
    }

    #[test]
    fn an_own_link_that_is_gone_counts_no_more_and_the_next_advertisement_says_so() {
        let mut graph = OverlayGraph::default();
        advertise(&mut graph, 1, 1, &[2], 0);
        advertise(&mut graph, 2, 1, &[1], 0);
        assert_eq!(graph.topology().edges[0].len(), 1);
        graph.own_link(node(1), node(2), false);
        assert!(!graph.is_link(node(1), node(2)) && graph.topology().edges[0].is_empty());
        graph.own_link(node(1), node(2), true);
        assert!(graph.is_link(node(1), node(2)) && graph.topology().edges[1].len() == 1);
        graph.own_link(node(1), node(2), false);
        graph.own_link(node(1), node(3), false);
        let changes = graph.accept(node(1), 2, BTreeMap::new(), Timestamp(9)).unwrap();
        assert_eq!(changes, [(node(1), node(2), None)]);
        advertise(&mut graph, 1, 3, &[2], 10);
        assert!(graph.is_link(node(1), node(2)), "it came back");
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
            let links = BTreeMap::from([(node(to), quality)]);
            graph.accept(node(from), sequence, links, Timestamp(0)).unwrap();
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
    fn what_was_said_long_ago_is_not_kept_for_its_coming_late() {
        let mut graph = OverlayGraph::default();
        let said = Timestamp(1_760_000_000_000_000);
        let came = said + LIFETIME;
        advertise(&mut graph, 2, said.0, &[1], came.0);
        let last = said + LIFETIME + CLOCK_SKEW;
        assert!(graph.expire(node(1), Timestamp(last.0 - 1)).is_empty());
        assert_eq!(graph.expire(node(1), last), [(node(2), node(1), None)]);
    }

    #[test]
    fn loss_makes_a_link_dearer() {
        let lossy = LinkQuality { loss: 0.5, ..quality(10.0) };
        assert_eq!(link_cost_ms(&lossy), 21.0);
    }

    #[test]
    fn who_is_doubted_is_dearer_to_leave_by_and_nobody_else_is() {
        let mut graph = OverlayGraph::default();
        for (from, to) in [(1, [2, 3]), (2, [1, 3]), (3, [1, 2])] {
            advertise(&mut graph, from, 1, &to, 0);
        }
        graph.topology();
        let version = graph.version();
        graph.doubt([(node(2), 0.5), (node(9), 0.5)].into());
        let costs = |graph: &mut OverlayGraph| {
            let topology = graph.topology();
            [(0, 1), (1, 0), (1, 2), (2, 1), (0, 2)].map(|(a, b)| topology.cost_ms(a, b))
        };
        assert_eq!(costs(&mut graph), [11.0, 21.0, 21.0, 11.0, 11.0]);
        assert_eq!(graph.changes_since(version).unwrap().count(), 2);
        let route = Route::new([node(1), node(2), node(3)]).unwrap();
        assert_eq!(graph.doubted_on(&route), [(node(2), 0.5)]);
        assert_eq!(graph.doubted_on(&Route::new([node(2), node(3)]).unwrap()), []);
        let version = graph.version();
        graph.doubt([(node(2), 0.5), (node(9), 0.25)].into());
        assert_eq!(graph.version(), version, "nothing new of a node that is there");
        graph.doubt(BTreeMap::new());
        assert_eq!(costs(&mut graph), [11.0; 5]);
    }

    #[test]
    fn changes_are_told_until_nodes_come_or_go() {
        let mut graph = OverlayGraph::default();
        for from in 1..=3 {
            advertise(&mut graph, from, 1, &[1, 2, 3].map(|to| if to == from { 9 } else { to }), 0);
        }
        graph.topology();
        let before = graph.version();
        advertise(&mut graph, 1, 2, &[2, 3], 0);
        assert_eq!(graph.version(), before, "nothing new was said of a link that counts");
        advertise(&mut graph, 1, 3, &[2], 0);
        let told: Vec<EdgeChange> = graph.changes_since(before).unwrap().copied().collect();
        let gone = |from, to| EdgeChange { from, to, before_ms: 11.0, after_ms: f64::INFINITY };
        assert_eq!(told, [gone(0, 2), gone(2, 0)]);
        assert_eq!(graph.changes_since(graph.version()).unwrap().count(), 0);
        advertise(&mut graph, 4, 1, &[], 0);
        assert!(graph.changes_since(before).is_none());
    }

    proptest! {
        #[test]
        fn what_is_patched_is_what_would_be_built(
            adverts in proptest::collection::vec(
                (0u8..6, proptest::collection::btree_map(0u8..6, 1u32..9, 0..5), 0u64..30),
                1..40,
            ),
        ) {
            let mut graph = OverlayGraph::default();
            let mut now = 0;
            for (index, (from, links, seconds)) in adverts.into_iter().enumerate() {
                now += seconds * 1_000_000;
                let links = links.into_iter().filter(|(to, _)| *to != from);
                let links = links.map(|(to, ms)| (node(to), quality(ms.into())));
                let links: BTreeMap<_, _> = links.collect();
                let version = graph.version();
                let before = graph.topology();
                graph.reached_from(node(0));
                graph.accept(node(from), index as u64 + 1, links, Timestamp(now)).unwrap();
                graph.expire(node(0), Timestamp(now));
                let patched = graph.topology();
                let anew = OverlayGraph { topology: None, ..graph.clone() }.topology();
                prop_assert_eq!(&patched, &anew);
                prop_assert!(graph.version() != version || before == patched);
                for from in [node(0), node(1)] {
                    prop_assert_eq!(&*graph.reached_from(from), &graph.walk_from(from));
                }
                // Who knows the old edges and is told the changes knows the new ones.
                let Some(changes) = graph.changes_since(version) else { continue };
                let mut costs = BTreeMap::new();
                for (from, edges) in (0..).zip(&before.edges) {
                    costs.extend(edges.iter().map(|edge| ((from, edge.to), edge.cost_ms)));
                }
                for EdgeChange { from, to, before_ms, after_ms } in changes.copied() {
                    let known = costs.insert((from, to), after_ms).unwrap_or(f64::INFINITY);
                    prop_assert_eq!(known, before_ms);
                }
                costs.retain(|_, cost| cost.is_finite());
                let mut expected = BTreeMap::new();
                for (from, edges) in (0..).zip(&patched.edges) {
                    expected.extend(edges.iter().map(|edge| ((from, edge.to), edge.cost_ms)));
                }
                prop_assert_eq!(costs, expected);
            }
        }
    }
}
