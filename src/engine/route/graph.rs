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

mod reached;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use crate::engine::measure::LinkQuality;
use crate::engine::overlay::advertiser::REFRESH_QUIET;
use crate::engine::overlay::registry::CLOCK_SKEW;
use crate::engine::types::{NodeId, Route, Timestamp};
use reached::Reached;

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
    /// Who is reached, until a link comes or goes.
    reached: Reached,
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
        self.reached.outdate();
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
                    self.reached.outdate();
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
mod tests;
