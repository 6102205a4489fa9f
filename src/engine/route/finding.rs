//! The candidate paths of this node to its destinations, found once and kept while they hold.
//!
//! What was found holds until a change of the graph concerns it: a change of a link of one of the
//! paths, or a link that came or became cheaper and is so near that a path over it might be one of
//! the cheapest. How near a link is follows from one table for all destinations: the cheapest way
//! from this node to each. No tolerance is involved: what is kept is what would be found anew, but
//! for the choice between paths of equal cost.
//!
//! Where no path is short enough, longer ones are looked for, up to what a datagram can carry: after
//! many nodes are lost, the mesh needs a while until everybody is near again, and a long route is
//! better than none. Those are not kept, so that a short one is taken as soon as there is one.

use std::collections::{BTreeMap, BTreeSet};

use super::candidate::disjoint;
use super::graph::{EdgeChange, OverlayGraph, Topology};
use super::path::{PathFinder, reach_ms};
use crate::engine::types::{MAX_ROUTE_HOPS, NodeId, Route};

/// Sums of the same costs in another order differ by less than this share.
const ROUNDING: f64 = 1e-9;

/// The paths to one destination.
#[derive(Clone, Debug)]
struct Found {
    /// Of the graph in which they were looked for or found to hold.
    version: u64,
    /// They are longer than paths should be: to be looked for again in every graph.
    is_makeshift: bool,
    routes: Vec<Route>,
    /// Their links, as indices.
    links: BTreeSet<(u32, u32)>,
    /// A link that became cheaper matters when a path over it may cost no more than this (ms).
    cheaper_ms: f64,
    /// A link that came matters when a path over it may cost no more than this (ms).
    new_ms: f64,
}

/// Finds and keeps the candidate paths of one node.
#[derive(Debug)]
pub struct Finding {
    me: NodeId,
    candidates: usize,
    max_hops: usize,
    finder: PathFinder,
    found: BTreeMap<NodeId, Found>,
    /// Cost of the cheapest way to each node (ms), in that version of the graph.
    reach_ms: Option<(u64, Vec<f64>)>,
}

impl Finding {
    /// For paths from `me` of at most `max_hops` links where there is one, so many candidates to
    /// each destination.
    pub fn new(me: NodeId, candidates: usize, max_hops: usize) -> Self {
        let (finder, found) = (PathFinder::default(), BTreeMap::new());
        Self { me, candidates, max_hops, finder, found, reach_ms: None }
    }

    /// The k shortest paths to a node, cheapest first, and the cheapest one that shares no relay
    /// with the first, when none of the k does.
    pub fn routes(&mut self, node: NodeId, graph: &mut OverlayGraph) -> Vec<Route> {
        let topology = graph.topology();
        let version = graph.version();
        if self.holds(node, &topology, graph)
            && let Some(found) = self.found.get_mut(&node)
        {
            found.version = version;
            return found.routes.clone();
        }
        let found = self.search(node, &topology, version);
        let routes = found.routes.clone();
        self.found.insert(node, found);
        routes
    }

    /// The link to a node, where there is one.
    pub fn direct(&self, node: NodeId, graph: &OverlayGraph) -> Option<Route> {
        let route = graph.is_link(self.me, node).then(|| Route::new([self.me, node]));
        route?.ok()
    }

    /// The cheapest path to a node that shares nothing with these routes.
    pub fn apart_from(
        &mut self,
        node: NodeId,
        avoid: &[Route],
        graph: &mut OverlayGraph,
    ) -> Option<Route> {
        let topology = graph.topology();
        let is_makeshift = self.found.get(&node).is_some_and(|found| found.is_makeshift);
        let max_hops = if is_makeshift { MAX_ROUTE_HOPS } else { self.max_hops };
        let mut search = self.finder.between(&topology, self.me, node, max_hops)?;
        search.apart_from(avoid).map(|(route, _)| route)
    }

    /// Forgets what was found of a destination.
    pub fn forget(&mut self, node: NodeId) {
        self.found.remove(&node);
    }

    fn search(&mut self, node: NodeId, topology: &Topology, version: u64) -> Found {
        let found = self.search_within(node, topology, version, self.max_hops);
        if !found.routes.is_empty() || self.max_hops == MAX_ROUTE_HOPS {
            return found;
        }
        let found = self.search_within(node, topology, version, MAX_ROUTE_HOPS);
        Found { is_makeshift: true, ..found }
    }

    fn search_within(
        &mut self,
        node: NodeId,
        topology: &Topology,
        version: u64,
        max_hops: usize,
    ) -> Found {
        let none = f64::NEG_INFINITY;
        let mut found = Found {
            version,
            is_makeshift: false,
            routes: Vec::new(),
            links: BTreeSet::new(),
            cheaper_ms: none,
            new_ms: f64::INFINITY,
        };
        let search = self.finder.between(topology, self.me, node, max_hops);
        let Some(mut search) = search else { return found };
        let mut paths = search.k_shortest(self.candidates);
        if paths.len() == self.candidates {
            // Others exist, and the dearest of these has to be beaten.
            found.cheaper_ms = paths.last().map_or(none, |(_, cost_ms)| *cost_ms);
        }
        let first = paths.first().map(|(route, _)| route.clone());
        let is_apart =
            |(route, _): &&(Route, f64)| first.as_ref().is_some_and(|f| disjoint(f, route));
        let mut apart = paths.iter().find(is_apart).cloned();
        if apart.is_none() {
            apart = search.apart_from(first.as_slice());
            paths.extend(apart.clone());
        }
        if let Some((_, cost_ms)) = apart
            && found.cheaper_ms > none
        {
            found.cheaper_ms = found.cheaper_ms.max(cost_ms);
            found.new_ms = found.cheaper_ms;
        }
        let index = |node| topology.index(node).unwrap_or(u32::MAX);
        let links = paths.iter().flat_map(|(route, _)| route.links());
        found.links = links.map(|(from, to)| (index(from), index(to))).collect();
        found.routes = paths.into_iter().map(|(route, _)| route).collect();
        found
    }

    /// Whether what was found of a destination is what would be found now.
    fn holds(&mut self, node: NodeId, topology: &Topology, graph: &OverlayGraph) -> bool {
        let Some(found) = self.found.get(&node) else { return false };
        if found.version == graph.version() {
            return true;
        }
        if found.is_makeshift {
            return false;
        }
        let Some(mut changes) = graph.changes_since(found.version) else { return false };
        let (Some(me), Some(node)) = (topology.index(self.me), topology.index(node)) else {
            return false;
        };
        let version = graph.version();
        let is_known = self.reach_ms.as_ref().is_some_and(|(known, _)| *known == version);
        if !is_known {
            self.reach_ms = Some((version, reach_ms(topology, me, self.max_hops - 1, None)));
        }
        let Some((_, reach_ms)) = &self.reach_ms else { return false };
        changes.all(|EdgeChange { from, to, before_ms, after_ms }| {
            if found.links.contains(&(*from, *to)) {
                return false;
            }
            let limit_ms = if before_ms.is_finite() { found.cheaper_ms } else { found.new_ms };
            let path_ms = reach_ms[*from as usize] + after_ms;
            // No simple path comes back or goes on, and an infinite one is none.
            after_ms > before_ms
                || *to == me
                || *from == node
                || path_ms == f64::INFINITY
                || path_ms > limit_ms + limit_ms.abs() * ROUNDING
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::engine::measure::LinkQuality;
    use crate::engine::types::Timestamp;

    fn node(byte: u8) -> NodeId {
        NodeId([byte; 8])
    }

    fn accept(graph: &mut OverlayGraph, from: u8, sequence: u64, links: &BTreeMap<u8, u32>) {
        let quality = |ms: u32| LinkQuality {
            rtt_ms: f64::from(ms),
            jitter_ms: 0.0,
            loss: 0.0,
            bandwidth: None,
            utilisation: 0.0,
        };
        let links = links.iter().filter(|(to, _)| **to != from);
        let links: BTreeMap<_, _> = links.map(|(to, ms)| (node(*to), quality(*ms))).collect();
        graph.accept(node(from), sequence, links, Timestamp(0)).unwrap();
    }

    fn cost_ms(graph: &mut OverlayGraph, route: &Route) -> f64 {
        let topology = graph.topology();
        let index = |node| topology.index(node).unwrap();
        route.links().map(|(a, b)| topology.cost_ms(index(a), index(b))).sum()
    }

    /// A line of direct links 0-1 and 0-2-1, and a far part 3-4 that hangs on 2.
    fn world() -> (OverlayGraph, Vec<BTreeMap<u8, u32>>) {
        let mut links = vec![BTreeMap::new(); 5];
        for (a, b, ms) in [(0, 1, 10), (0, 2, 20), (1, 2, 20), (2, 3, 10), (3, 4, 5), (1, 3, 90)] {
            links[usize::from(a)].insert(b, ms);
            links[usize::from(b)].insert(a, ms);
        }
        let mut graph = OverlayGraph::default();
        for (from, links) in (0..).zip(&links) {
            accept(&mut graph, from, 1, links);
        }
        (graph, links)
    }

    #[test]
    fn where_no_path_is_short_enough_a_long_one_is_taken_until_there_is() {
        let mut links = vec![BTreeMap::new(); 7];
        for a in 0..6_u8 {
            links[usize::from(a)].insert(a + 1, 10);
            links[usize::from(a + 1)].insert(a, 10);
        }
        let mut graph = OverlayGraph::default();
        for (from, links) in (0..).zip(&links) {
            accept(&mut graph, from, 1, links);
        }
        let mut finding = Finding::new(node(0), 2, 4);
        let mut hops = |graph: &mut OverlayGraph| -> Vec<usize> {
            finding.routes(node(6), graph).iter().map(Route::hop_count).collect()
        };
        assert_eq!(hops(&mut graph), [6]);
        for (a, b) in [(1, 4), (4, 1)] {
            links[a].insert(b as u8, 90);
            accept(&mut graph, a as u8, 2, &links[a]);
        }
        assert_eq!(hops(&mut graph), [4], "dearer, and as short as paths should be");
    }

    #[test]
    fn what_does_not_concern_a_destination_is_not_searched_again() {
        let (mut graph, mut links) = world();
        let mut finding = Finding::new(node(0), 2, 4);
        let found = finding.routes(node(1), &mut graph);
        assert_eq!(found.len(), 2);
        // Whether paths were looked for again: what is kept has lost its last path here.
        let searches = |finding: &mut Finding, graph: &mut OverlayGraph| {
            finding.found.get_mut(&node(1)).unwrap().routes.truncate(1);
            finding.routes(node(1), graph).len() == 2
        };
        let mut say = |from: u8, to: u8, ms: u32, sequence: u64, graph: &mut OverlayGraph| {
            links[usize::from(from)].insert(to, ms);
            accept(graph, from, sequence, &links[usize::from(from)]);
            searches(&mut finding, graph)
        };
        assert!(!say(3, 4, 500, 2, &mut graph), "dearer, and on no path");
        assert!(!say(2, 3, 12, 2, &mut graph), "dearer, and near");
        assert!(!say(3, 1, 70, 3, &mut graph), "cheaper, but far");
        assert!(!say(1, 0, 1, 2, &mut graph), "the other direction");
        assert!(say(2, 1, 30, 3, &mut graph), "on a path");
        assert!(say(2, 3, 2, 4, &mut graph), "cheaper and near");
        accept(&mut graph, 7, 1, &BTreeMap::new());
        assert!(searches(&mut finding, &mut graph), "a node came");
    }

    proptest! {
        #[test]
        fn what_is_kept_is_as_good_as_what_would_be_found(
            first in proptest::collection::vec((0u8..8, 0u8..8, 1u32..60), 8..24),
            later in proptest::collection::vec((0u8..8, 0u8..8, 0u32..60, any::<bool>()), 1..60),
            candidates in 1usize..6,
            max_hops in 1usize..5,
        ) {
            let mut links = vec![BTreeMap::new(); 8];
            for (a, b, ms) in first {
                links[usize::from(a)].insert(b, ms);
                links[usize::from(b)].insert(a, ms);
            }
            let mut graph = OverlayGraph::default();
            for (from, links) in (0..).zip(&links) {
                accept(&mut graph, from, 1, links);
            }
            let mut finding = Finding::new(node(0), candidates, max_hops);
            for (sequence, (from, to, ms, ask)) in (2..).zip(later) {
                // Nought withdraws.
                match ms {
                    0 => drop(links[usize::from(from)].remove(&to)),
                    ms => drop(links[usize::from(from)].insert(to, ms)),
                }
                accept(&mut graph, from, sequence, &links[usize::from(from)]);
                // Not after each change, so that several are looked at together.
                for target in if ask { [5, 6, 7].as_slice() } else { &[] } {
                    let kept = finding.routes(node(*target), &mut graph);
                    let anew = Finding::new(node(0), candidates, max_hops)
                        .routes(node(*target), &mut graph);
                    let mut costs = |routes: &[Route]| -> Vec<f64> {
                        routes.iter().map(|route| cost_ms(&mut graph, route)).collect()
                    };
                    prop_assert_eq!(costs(&kept), costs(&anew), "{:?} {:?}", kept, anew);
                }
            }
        }
    }
}
