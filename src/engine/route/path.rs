//! Path search on the overlay: A*, the k shortest simple paths (Yen, 1971), and the best
//! node-disjoint backup.
//!
//! All searches respect a hop limit. A* runs over (node, hops) labels; its heuristic is the
//! number of hops left (a breadth-first search from the destination) times the cheapest link,
//! which never overestimates, and which also cuts every label that cannot arrive within the
//! limit. Ties are broken by node order, so a search has one answer.

use std::cmp::Ordering;
use std::collections::{BTreeSet, BinaryHeap, VecDeque};

use super::graph::Topology;
use crate::engine::types::{NodeId, Route};

/// What a search may not use.
#[derive(Clone, Debug, Default)]
struct Banned {
    nodes: BTreeSet<u32>,
    edges: BTreeSet<(u32, u32)>,
}

/// A path as indices into the topology, with its cost (ms).
#[derive(Clone, Debug, PartialEq)]
struct Path {
    cost: f64,
    nodes: Vec<u32>,
}

impl Path {
    fn order(&self, other: &Path) -> Ordering {
        self.cost.total_cmp(&other.cost).then_with(|| self.nodes.cmp(&other.nodes))
    }
}

/// The cheapest route within `max_hops`, with its cost (ms).
pub fn shortest(
    topology: &Topology,
    from: NodeId,
    to: NodeId,
    max_hops: usize,
) -> Option<(Route, f64)> {
    let search = Search::new(topology, from, to, max_hops)?;
    search.to_route(search.run(search.from, 0, &Banned::default())?)
}

/// Up to `k` cheapest simple routes within `max_hops`, cheapest first, with their costs (ms).
pub fn k_shortest(
    topology: &Topology,
    from: NodeId,
    to: NodeId,
    k: usize,
    max_hops: usize,
) -> Vec<(Route, f64)> {
    let Some(search) = Search::new(topology, from, to, max_hops) else { return Vec::new() };
    let Some(first) = search.run(search.from, 0, &Banned::default()) else { return Vec::new() };
    let mut found = vec![first];
    let mut waiting: Vec<Path> = Vec::new();
    while found.len() < k {
        let last = &found[found.len() - 1];
        for spur_at in 0..last.nodes.len() - 1 {
            let root = &last.nodes[..=spur_at];
            let mut banned =
                Banned { nodes: root[..spur_at].iter().copied().collect(), ..Banned::default() };
            for path in &found {
                if path.nodes.len() > spur_at + 1 && path.nodes[..=spur_at] == *root {
                    banned.edges.insert((path.nodes[spur_at], path.nodes[spur_at + 1]));
                }
            }
            let Some(spur) = search.run(root[spur_at], spur_at, &banned) else { continue };
            let mut nodes = root[..spur_at].to_vec();
            nodes.extend(spur.nodes);
            let path = Path { cost: search.cost(&nodes), nodes };
            if !waiting.iter().any(|other| other.nodes == path.nodes) {
                waiting.push(path);
            }
        }
        let Some(best) = (0..waiting.len()).min_by(|a, b| waiting[*a].order(&waiting[*b])) else {
            break;
        };
        found.push(waiting.swap_remove(best));
    }
    found.into_iter().filter_map(|path| search.to_route(path)).collect()
}

/// The cheapest route from `from` to `to` that shares no relay with any of `avoid`, nor its only
/// link when one of them has no relay, with its cost (ms).
pub fn cheapest_apart(
    topology: &Topology,
    from: NodeId,
    to: NodeId,
    avoid: &[Route],
    max_hops: usize,
) -> Option<(Route, f64)> {
    let search = Search::new(topology, from, to, max_hops)?;
    let relays = avoid.iter().flat_map(|route| route.relays());
    let nodes = relays.filter_map(|relay| topology.index(*relay)).collect();
    let mut edges = BTreeSet::new();
    if avoid.iter().any(|route| route.hop_count() == 1) {
        edges.insert((search.from, search.to));
    }
    search.to_route(search.run(search.from, 0, &Banned { nodes, edges })?)
}

struct Search<'a> {
    topology: &'a Topology,
    from: u32,
    to: u32,
    max_hops: usize,
    /// Fewest hops from each node to the destination; `usize::MAX` when it cannot be reached.
    hops_left: Vec<usize>,
    cheapest_link: f64,
}

#[derive(PartialEq)]
struct Label {
    estimate: f64,
    cost: f64,
    node: u32,
    hops: usize,
}

impl Eq for Label {}

impl PartialOrd for Label {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Label {
    /// Reversed, because `BinaryHeap` yields the greatest first.
    fn cmp(&self, other: &Self) -> Ordering {
        let by_estimate = other.estimate.total_cmp(&self.estimate);
        by_estimate.then(other.node.cmp(&self.node)).then(other.hops.cmp(&self.hops))
    }
}

impl<'a> Search<'a> {
    fn new(topology: &'a Topology, from: NodeId, to: NodeId, max_hops: usize) -> Option<Self> {
        let (from, to) = (topology.index(from)?, topology.index(to)?);
        if from == to {
            return None;
        }
        let mut hops_left = vec![usize::MAX; topology.nodes.len()];
        hops_left[to as usize] = 0;
        let mut queue = VecDeque::from([to]);
        let mut cheapest_link = f64::INFINITY;
        while let Some(node) = queue.pop_front() {
            let next = hops_left[node as usize] + 1;
            for (neighbour, cost) in &topology.edges[node as usize] {
                cheapest_link = cheapest_link.min(*cost);
                // Links count in both directions, so backwards is the same as forwards.
                if next <= max_hops && hops_left[*neighbour as usize] == usize::MAX {
                    hops_left[*neighbour as usize] = next;
                    queue.push_back(*neighbour);
                }
            }
        }
        if !cheapest_link.is_finite() {
            cheapest_link = 0.0;
        }
        Some(Self { topology, from, to, max_hops, hops_left, cheapest_link })
    }

    /// The cheapest path from `start` to the destination, `hops_used` hops into a route.
    fn run(&self, start: u32, hops_used: usize, banned: &Banned) -> Option<Path> {
        let width = self.max_hops + 1;
        let slot = |node: u32, hops: usize| node as usize * width + hops;
        let mut best = vec![f64::INFINITY; self.topology.nodes.len() * width];
        let mut parent = vec![u32::MAX; best.len()];
        let mut queue = BinaryHeap::new();
        best[slot(start, hops_used)] = 0.0;
        queue.push(Label { estimate: 0.0, cost: 0.0, node: start, hops: hops_used });
        while let Some(label) = queue.pop() {
            if label.cost > best[slot(label.node, label.hops)] {
                continue;
            }
            if label.node == self.to {
                let mut nodes = vec![label.node];
                let (mut node, mut hops) = (label.node, label.hops);
                while hops > hops_used {
                    node = parent[slot(node, hops)];
                    hops -= 1;
                    nodes.push(node);
                }
                nodes.reverse();
                return Some(Path { cost: label.cost, nodes });
            }
            let hops = label.hops + 1;
            for &(neighbour, cost) in &self.topology.edges[label.node as usize] {
                let left = self.hops_left[neighbour as usize];
                if left == usize::MAX
                    || hops + left > self.max_hops
                    || banned.nodes.contains(&neighbour)
                    || banned.edges.contains(&(label.node, neighbour))
                {
                    continue;
                }
                let cost = label.cost + cost;
                // A label with fewer hops that is no dearer dominates this one. (It also keeps
                // paths simple: costs are positive, so coming back to a node is dearer.)
                if (hops_used..=hops).any(|fewer| best[slot(neighbour, fewer)] <= cost) {
                    continue;
                }
                best[slot(neighbour, hops)] = cost;
                parent[slot(neighbour, hops)] = label.node;
                let estimate = cost + left as f64 * self.cheapest_link;
                queue.push(Label { estimate, cost, node: neighbour, hops });
            }
        }
        None
    }

    fn cost(&self, nodes: &[u32]) -> f64 {
        let hop = |pair: &[u32]| {
            let edges = &self.topology.edges[pair[0] as usize];
            edges.iter().find(|(to, _)| *to == pair[1]).map_or(f64::INFINITY, |(_, cost)| *cost)
        };
        nodes.windows(2).map(hop).sum()
    }

    fn to_route(&self, path: Path) -> Option<(Route, f64)> {
        let nodes: Vec<NodeId> =
            path.nodes.iter().map(|index| self.topology.nodes[*index as usize]).collect();
        Route::new(nodes).ok().map(|route| (route, path.cost))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn node(byte: u8) -> NodeId {
        NodeId([byte; 8])
    }

    fn topology(nodes: u8, links: &[(u8, u8, f64)]) -> Topology {
        let mut edges = vec![Vec::new(); nodes as usize];
        for (a, b, cost) in links {
            edges[*a as usize].push((u32::from(*b), *cost));
            edges[*b as usize].push((u32::from(*a), *cost));
        }
        for edges in &mut edges {
            edges.sort_by_key(|(to, _)| *to);
            edges.dedup_by_key(|(to, _)| *to);
        }
        Topology { nodes: (0..nodes).map(node).collect(), edges }
    }

    /// Every simple path within the limit, cheapest first: the answer that needs no thought.
    fn brute_force(topology: &Topology, from: u32, to: u32, max_hops: usize) -> Vec<f64> {
        fn walk(
            t: &Topology,
            path: &mut Vec<u32>,
            cost: f64,
            to: u32,
            left: usize,
            out: &mut Vec<f64>,
        ) {
            let here = path[path.len() - 1];
            if here == to {
                out.push(cost);
                return;
            }
            if left == 0 {
                return;
            }
            for (next, edge) in &t.edges[here as usize] {
                if !path.contains(next) {
                    path.push(*next);
                    walk(t, path, cost + edge, to, left - 1, out);
                    path.pop();
                }
            }
        }
        let mut out = Vec::new();
        walk(topology, &mut vec![from], 0.0, to, max_hops, &mut out);
        out.sort_by(f64::total_cmp);
        out
    }

    #[test]
    fn the_diamond_has_its_routes_in_order() {
        let t = topology(4, &[(0, 1, 1.0), (1, 3, 1.0), (0, 2, 2.0), (2, 3, 2.0), (1, 2, 0.5)]);
        let routes = k_shortest(&t, node(0), node(3), 8, 4);
        let costs: Vec<f64> = routes.iter().map(|(_, cost)| *cost).collect();
        assert_eq!(costs, [2.0, 3.5, 3.5, 4.0]);
        assert_eq!(shortest(&t, node(0), node(3), 4).unwrap(), routes[0]);
        let (backup, cost) =
            cheapest_apart(&t, node(0), node(3), &[routes[0].0.clone()], 4).unwrap();
        assert_eq!((backup.relays(), cost), (&[node(2)][..], 4.0));
    }

    #[test]
    fn a_direct_route_is_backed_up_by_a_relay() {
        let t = topology(3, &[(0, 1, 1.0), (0, 2, 5.0), (1, 2, 5.0)]);
        let (direct, _) = shortest(&t, node(0), node(1), 4).unwrap();
        assert_eq!(direct.hop_count(), 1);
        let (backup, _) = cheapest_apart(&t, node(0), node(1), &[direct], 4).unwrap();
        assert_eq!(backup.relays(), [node(2)]);
    }

    #[test]
    fn nothing_is_found_where_nothing_is() {
        let t = topology(4, &[(0, 1, 1.0), (2, 3, 1.0)]);
        assert!(shortest(&t, node(0), node(3), 4).is_none());
        assert!(k_shortest(&t, node(0), node(3), 8, 4).is_empty());
        assert!(shortest(&t, node(0), node(9), 4).is_none());
        assert!(shortest(&t, node(0), node(0), 4).is_none());
    }

    proptest! {
        #[test]
        fn k_shortest_agrees_with_brute_force(
            links in proptest::collection::vec((0u8..7, 0u8..7, 1u32..50), 3..20),
            max_hops in 1usize..5,
        ) {
            let mut seen = BTreeSet::new();
            let links: Vec<_> = links
                .into_iter()
                .filter(|(a, b, _)| a != b && seen.insert((*a.min(b), *a.max(b))))
                .map(|(a, b, cost)| (a, b, f64::from(cost)))
                .collect();
            let t = topology(7, &links);
            let expected = brute_force(&t, 0, 6, max_hops);
            let found = k_shortest(&t, node(0), node(6), 8, max_hops);
            let costs: Vec<f64> = found.iter().map(|(_, cost)| *cost).collect();
            prop_assert_eq!(&costs[..], &expected[..expected.len().min(8)]);
            let distinct: BTreeSet<_> = found.iter().map(|(route, _)| route.clone()).collect();
            prop_assert_eq!(distinct.len(), found.len());
        }
    }
}
