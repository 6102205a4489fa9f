//! Path search on the overlay: the k shortest simple paths (Yen, 1971, with Lawler's partition,
//! 1972), and the cheapest path apart from others.
//!
//! All searches respect a hop limit. A search begins with a table of what is left from each node to
//! the destination within each number of hops (Bellman and Ford, backwards). A path that may not
//! use some nodes costs no less than the table says, so the table is the heuristic of A*, exact
//! where nothing is forbidden. Found paths split what remains into branches: the paths that begin
//! like a found one and leave it at a certain node. A branch is searched only when nothing else can
//! be cheaper than what the table promises of it. Ties are broken by node order, so a search has
//! one answer.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use super::graph::Topology;
use crate::engine::types::{NodeId, Route};

/// Searches paths. Keeps its tables from search to search, because to clear them all would take
/// longer than most searches.
#[derive(Debug, Default)]
pub struct PathFinder {
    /// One more than the longest path (links): the length of a node's row in the tables.
    width: usize,
    /// Grows with every search; an entry in a table counts when its mark is the search's.
    tick: u64,
    /// What is left to the destination within 0, 1, ... hops (ms), a row for each node.
    left_ms: Vec<f64>,
    left_mark: Vec<u64>,
    reached_mark: Vec<u64>,
    /// The cheapest known way to each node with each number of hops (ms), and the node before it.
    best_ms: Vec<f64>,
    best_mark: Vec<u64>,
    before: Vec<u32>,
    banned_mark: Vec<u64>,
    queue: BinaryHeap<Label>,
}

/// A search that knows its ends.
pub struct Search<'a> {
    finder: &'a mut PathFinder,
    topology: &'a Topology,
    from: u32,
    to: u32,
    max_hops: usize,
    /// The mark of this search's rows in the table of what is left.
    mark: u64,
}

#[derive(Debug, PartialEq)]
struct Label {
    estimate_ms: f64,
    cost_ms: f64,
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
        let by_estimate = other.estimate_ms.total_cmp(&self.estimate_ms);
        by_estimate.then(other.node.cmp(&self.node)).then(other.hops.cmp(&self.hops))
    }
}

/// The paths that begin with `root` and do not go on to one of `banned`.
#[derive(Debug)]
struct Branch {
    /// No path in it is cheaper (ms); the cost of the cheapest once that is known.
    bound_ms: f64,
    root: Vec<u32>,
    banned: Vec<u32>,
    /// The cheapest path, once it was searched.
    cheapest: Option<Vec<u32>>,
}

impl Branch {
    /// What to look at first: the cheapest, of equal ones what is not known yet, then by nodes.
    fn order(&self, other: &Self) -> Ordering {
        let by_bound = self.bound_ms.total_cmp(&other.bound_ms);
        let by_cheapest = || self.cheapest.cmp(&other.cheapest);
        by_bound.then_with(by_cheapest).then_with(|| self.root.cmp(&other.root))
    }
}

/// Cost of the cheapest way from a node to each other one (ms), or less; infinite where there is
/// none within `max_hops` links. One edge may be left out, in either direction.
pub fn reach_ms(
    topology: &Topology,
    from: u32,
    max_hops: usize,
    without: Option<(u32, u32)>,
) -> Vec<f64> {
    let is_left_out = |a: u32, b: u32| without == Some((a, b)) || without == Some((b, a));
    let mut reach_ms = vec![f64::INFINITY; topology.nodes.len()];
    reach_ms[from as usize] = 0.0;
    let (mut reached, mut next) = (vec![from], Vec::new());
    for _ in 0..max_hops {
        for &node in &reached {
            let here_ms = reach_ms[node as usize];
            for edge in &topology.edges[node as usize] {
                let there_ms = here_ms + edge.cost_ms;
                if there_ms < reach_ms[edge.to as usize] && !is_left_out(node, edge.to) {
                    reach_ms[edge.to as usize] = there_ms;
                    next.push(edge.to);
                }
            }
        }
        reached.clear();
        std::mem::swap(&mut reached, &mut next);
    }
    reach_ms
}

impl PathFinder {
    /// Prepares for searches between two nodes; `None` when one of them is not there, they are the same,
    /// or `max_hops` is 0.
    pub fn between<'a>(
        &'a mut self,
        topology: &'a Topology,
        from: NodeId,
        to: NodeId,
        max_hops: usize,
    ) -> Option<Search<'a>> {
        let (from, to) = (topology.index(from)?, topology.index(to)?);
        if from == to || max_hops == 0 {
            return None;
        }
        self.fit(topology.nodes.len(), max_hops + 1);
        self.tick += 1;
        let mark = self.tick;
        // The first half of the table is filled outwards from the destination. In the other half
        // only those nodes count that are so near the source that enough hops are left for them:
        // nearly all nodes are on neither side, and are never looked at.
        let half = max_hops / 2;
        self.spread_left(topology, to, half, mark);
        let near = self.near(topology, from, (max_hops - half).saturating_sub(1));
        // Whoever is one hop into a route has one hop less to go.
        for hops in half + 1..max_hops {
            for (node, _) in near.iter().take_while(|(_, used)| used + hops <= max_hops) {
                self.gather_left(topology, *node, hops, mark);
            }
        }
        Some(Search { finder: self, topology, from, to, max_hops, mark })
    }

    /// What is left to `to` within up to so many hops, for every node from which that is enough.
    fn spread_left(&mut self, topology: &Topology, to: u32, max_hops: usize, mark: u64) {
        self.mark_left(to, mark);
        self.left_ms[to as usize * self.width..][..self.width].fill(0.0);
        let (mut reached, mut next) = (vec![to], Vec::new());
        for hops in 1..=max_hops {
            self.tick += 1;
            for &node in &reached {
                let left_ms = self.left_ms[node as usize * self.width + hops - 1];
                for edge in &topology.edges[node as usize] {
                    let cost_ms = left_ms + edge.back_ms;
                    self.mark_left(edge.to, mark);
                    let row = edge.to as usize * self.width;
                    if cost_ms < self.left_ms[row + hops] {
                        self.left_ms[row + hops..row + self.width].fill(cost_ms);
                        if self.reached_mark[edge.to as usize] != self.tick {
                            self.reached_mark[edge.to as usize] = self.tick;
                            next.push(edge.to);
                        }
                    }
                }
            }
            reached.clear();
            std::mem::swap(&mut reached, &mut next);
        }
    }

    /// What is left from a node within so many hops, by what is left from its neighbours.
    fn gather_left(&mut self, topology: &Topology, node: u32, hops: usize, mark: u64) {
        self.mark_left(node, mark);
        let row = node as usize * self.width;
        let mut left_ms = self.left_ms[row + hops];
        for edge in &topology.edges[node as usize] {
            let at = edge.to as usize;
            if self.left_mark[at] == mark {
                left_ms = left_ms.min(edge.cost_ms + self.left_ms[at * self.width + hops - 1]);
            }
        }
        self.left_ms[row + hops..row + self.width].fill(left_ms);
    }

    /// The nodes within so many hops of `from`, nearest first, with their number of hops.
    fn near(&mut self, topology: &Topology, from: u32, max_hops: usize) -> Vec<(u32, usize)> {
        self.tick += 1;
        self.reached_mark[from as usize] = self.tick;
        let mut near = vec![(from, 0)];
        let mut at = 0;
        while let Some(&(node, hops)) = near.get(at)
            && hops < max_hops
        {
            at += 1;
            for edge in &topology.edges[node as usize] {
                if self.reached_mark[edge.to as usize] != self.tick {
                    self.reached_mark[edge.to as usize] = self.tick;
                    near.push((edge.to, hops + 1));
                }
            }
        }
        near
    }

    fn fit(&mut self, nodes: usize, width: usize) {
        if self.banned_mark.len() == nodes && self.width == width {
            return;
        }
        self.width = width;
        for marks in [
            &mut self.left_mark,
            &mut self.reached_mark,
            &mut self.best_mark,
            &mut self.banned_mark,
        ] {
            *marks = vec![0; nodes];
        }
        self.left_ms = vec![f64::INFINITY; nodes * width];
        self.best_ms = vec![f64::INFINITY; nodes * width];
        self.before = vec![0; nodes * width];
    }

    fn mark_left(&mut self, node: u32, mark: u64) {
        let node = node as usize;
        if self.left_mark[node] != mark {
            self.left_mark[node] = mark;
            self.left_ms[node * self.width..][..self.width].fill(f64::INFINITY);
        }
    }
}

impl Search<'_> {
    /// Up to `k` cheapest simple routes, cheapest first, with their costs (ms).
    pub fn k_shortest(&mut self, k: usize) -> Vec<(Route, f64)> {
        let mut found: Vec<(Route, f64)> = Vec::new();
        let mut branches: Vec<Branch> = Vec::new();
        branches.extend(self.branch(vec![self.from], Vec::new()));
        while found.len() < k {
            let first = (0..branches.len()).min_by(|a, b| branches[*a].order(&branches[*b]));
            let Some(mut branch) = first.map(|first| branches.swap_remove(first)) else { break };
            let Some(path) = branch.cheapest.take() else {
                if let Some(path) = self.cheapest(&branch.root, &branch.banned) {
                    branch.bound_ms = self.cost_ms(&path);
                    branch.cheapest = Some(path);
                    branches.push(branch);
                }
                continue;
            };
            let root = branch.root.len();
            for length in root..path.len() {
                let mut banned = vec![path[length]];
                if length == root {
                    banned.append(&mut branch.banned);
                }
                branches.extend(self.branch(path[..length].to_vec(), banned));
            }
            found.extend(self.to_route(&path));
        }
        found
    }

    /// The cheapest route that shares no relay with any of `avoid`, nor its only link when one of
    /// them has no relay, with its cost (ms).
    pub fn apart_from(&mut self, avoid: &[Route]) -> Option<(Route, f64)> {
        self.finder.tick += 1;
        let relays = avoid.iter().flat_map(|route| route.relays());
        for relay in relays.filter_map(|relay| self.topology.index(*relay)) {
            self.finder.banned_mark[relay as usize] = self.finder.tick;
        }
        let is_direct = avoid.iter().any(|route| route.hop_count() == 1);
        let banned = if is_direct { &[self.to][..] } else { &[] };
        let path = self.run(self.from, 0, banned)?;
        self.to_route(&path)
    }

    /// A branch with what the table promises of it; `None` when nothing is in it.
    fn branch(&self, root: Vec<u32>, banned: Vec<u32>) -> Option<Branch> {
        let (&spur, hops) = (root.last()?, root.len());
        if hops > self.max_hops {
            return None;
        }
        let edges = self.topology.edges[spur as usize].iter();
        let open = edges.filter(|edge| !banned.contains(&edge.to) && !root.contains(&edge.to));
        let left_ms = open
            .map(|edge| edge.cost_ms + self.left_ms(edge.to, self.max_hops - hops))
            .fold(f64::INFINITY, f64::min);
        let bound_ms = self.cost_ms(&root) + left_ms;
        bound_ms.is_finite().then_some(Branch { bound_ms, root, banned, cheapest: None })
    }

    /// The cheapest path of a branch.
    fn cheapest(&mut self, root: &[u32], banned: &[u32]) -> Option<Vec<u32>> {
        let (&spur, before) = root.split_last()?;
        self.finder.tick += 1;
        for node in before {
            self.finder.banned_mark[*node as usize] = self.finder.tick;
        }
        let rest = self.run(spur, before.len(), banned)?;
        Some([before, &rest[..]].concat())
    }

    /// A*: the cheapest path from `start`, which is `used` hops into a route, to the destination; not
    /// over nodes with the finder's present mark, and not first to one of `banned`.
    fn run(&mut self, start: u32, used: usize, banned: &[u32]) -> Option<Vec<u32>> {
        let width = self.finder.width;
        let tick = self.finder.tick;
        let slot = |node: u32, hops: usize| node as usize * width + hops;
        self.finder.queue.clear();
        self.reset_best(start);
        self.finder.best_ms[slot(start, used)] = 0.0;
        let label = Label { estimate_ms: 0.0, cost_ms: 0.0, node: start, hops: used };
        self.finder.queue.push(label);
        while let Some(label) = self.finder.queue.pop() {
            if label.cost_ms > self.finder.best_ms[slot(label.node, label.hops)] {
                continue;
            }
            if label.node == self.to {
                let mut nodes = vec![label.node];
                let (mut node, mut hops) = (label.node, label.hops);
                while hops > used {
                    node = self.finder.before[slot(node, hops)];
                    hops -= 1;
                    nodes.push(node);
                }
                nodes.reverse();
                return Some(nodes);
            }
            let hops = label.hops + 1;
            if hops > self.max_hops {
                continue;
            }
            for edge in &self.topology.edges[label.node as usize] {
                let left_ms = self.left_ms(edge.to, self.max_hops - hops);
                if left_ms == f64::INFINITY
                    || self.finder.banned_mark[edge.to as usize] == tick
                    || (hops == used + 1 && banned.contains(&edge.to))
                {
                    continue;
                }
                let cost_ms = label.cost_ms + edge.cost_ms;
                self.reset_best(edge.to);
                // A label with fewer hops that is no dearer dominates this one. (It also keeps
                // paths simple: costs are positive, so coming back to a node is dearer.)
                let row = slot(edge.to, 0);
                if self.finder.best_ms[row + used..=row + hops].iter().any(|ms| *ms <= cost_ms) {
                    continue;
                }
                self.finder.best_ms[row + hops] = cost_ms;
                self.finder.before[row + hops] = label.node;
                let estimate_ms = cost_ms + left_ms;
                self.finder.queue.push(Label { estimate_ms, cost_ms, node: edge.to, hops });
            }
        }
        None
    }

    fn reset_best(&mut self, node: u32) {
        let (node, finder) = (node as usize, &mut *self.finder);
        if finder.best_mark[node] != finder.tick {
            finder.best_mark[node] = finder.tick;
            finder.best_ms[node * finder.width..][..finder.width].fill(f64::INFINITY);
        }
    }

    /// What is left from a node to the destination within so many hops (ms).
    fn left_ms(&self, node: u32, hops: usize) -> f64 {
        let (node, finder) = (node as usize, &*self.finder);
        if finder.left_mark[node] == self.mark {
            finder.left_ms[node * finder.width + hops]
        } else {
            f64::INFINITY
        }
    }

    fn cost_ms(&self, nodes: &[u32]) -> f64 {
        nodes.windows(2).map(|pair| self.topology.cost_ms(pair[0], pair[1])).sum()
    }

    fn to_route(&self, path: &[u32]) -> Option<(Route, f64)> {
        let nodes: Vec<NodeId> =
            path.iter().map(|index| self.topology.nodes[*index as usize]).collect();
        Route::new(nodes).ok().map(|route| (route, self.cost_ms(path)))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::engine::route::candidate::disjoint;
    use crate::engine::route::graph::Edge;

    fn node(byte: u8) -> NodeId {
        NodeId([byte; 8])
    }

    /// Links with the cost of each direction.
    fn directed(nodes: u8, links: &[(u8, u8, f64, f64)]) -> Topology {
        let mut edges = vec![Vec::new(); nodes as usize];
        for (a, b, cost_ms, back_ms) in links.iter().copied() {
            edges[a as usize].push(Edge { to: b.into(), cost_ms, back_ms });
            edges[b as usize].push(Edge { to: a.into(), cost_ms: back_ms, back_ms: cost_ms });
        }
        for edges in &mut edges {
            edges.sort_by_key(|edge| edge.to);
            edges.dedup_by_key(|edge| edge.to);
        }
        Topology { nodes: (0..nodes).map(node).collect(), edges }
    }

    fn topology(nodes: u8, links: &[(u8, u8, f64)]) -> Topology {
        let links: Vec<_> = links.iter().map(|(a, b, cost)| (*a, *b, *cost, *cost)).collect();
        directed(nodes, &links)
    }

    fn k_shortest(t: &Topology, from: u8, to: u8, k: usize, max_hops: usize) -> Vec<(Route, f64)> {
        let mut finder = PathFinder::default();
        let search = finder.between(t, node(from), node(to), max_hops);
        search.map_or_else(Vec::new, |mut search| search.k_shortest(k))
    }

    fn apart_from(t: &Topology, avoid: &Route, max_hops: usize) -> Option<(Route, f64)> {
        let mut finder = PathFinder::default();
        let (from, to) = (avoid.source(), avoid.destination());
        finder.between(t, from, to, max_hops)?.apart_from(std::slice::from_ref(avoid))
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
            for edge in &t.edges[here as usize] {
                if !path.contains(&edge.to) {
                    path.push(edge.to);
                    walk(t, path, cost + edge.cost_ms, to, left - 1, out);
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
        let routes = k_shortest(&t, 0, 3, 8, 4);
        let costs: Vec<f64> = routes.iter().map(|(_, cost)| *cost).collect();
        assert_eq!(costs, [2.0, 3.5, 3.5, 4.0]);
        let (backup, cost) = apart_from(&t, &routes[0].0, 4).unwrap();
        assert_eq!((backup.relays(), cost), (&[node(2)][..], 4.0));
    }

    #[test]
    fn a_direct_route_is_backed_up_by_a_relay() {
        let t = topology(3, &[(0, 1, 1.0), (0, 2, 5.0), (1, 2, 5.0)]);
        let (direct, _) = k_shortest(&t, 0, 1, 1, 4).remove(0);
        assert_eq!(direct.hop_count(), 1);
        let (backup, _) = apart_from(&t, &direct, 4).unwrap();
        assert_eq!(backup.relays(), [node(2)]);
        assert_eq!(apart_from(&t, &backup, 4).unwrap().0, direct);
        assert!(apart_from(&t, &direct, 1).is_none());
    }

    #[test]
    fn nothing_is_found_where_nothing_is() {
        let t = topology(4, &[(0, 1, 1.0), (2, 3, 1.0)]);
        assert!(k_shortest(&t, 0, 3, 8, 4).is_empty());
        assert!(k_shortest(&t, 0, 9, 8, 4).is_empty());
        assert!(k_shortest(&t, 0, 0, 8, 4).is_empty());
        assert!(k_shortest(&t, 0, 1, 8, 0).is_empty());
    }

    proptest! {
        #[test]
        fn k_shortest_agrees_with_brute_force(
            links in proptest::collection::vec((0u8..7, 0u8..7, 1u32..50, 1u32..50), 3..20),
            max_hops in 1usize..8,
            targets in proptest::collection::vec((0u8..7, 0u8..7), 1..4),
        ) {
            let mut seen = BTreeSet::new();
            let links: Vec<_> = links
                .into_iter()
                .filter(|(a, b, ..)| a != b && seen.insert((*a.min(b), *a.max(b))))
                .map(|(a, b, there, back)| (a, b, f64::from(there), f64::from(back)))
                .collect();
            let t = directed(7, &links);
            // One finder for all, so that what an earlier search left behind would show.
            let mut finder = PathFinder::default();
            for (from, to) in targets.into_iter().filter(|(from, to)| from != to) {
                let expected = brute_force(&t, from.into(), to.into(), max_hops);
                let Some(mut search) = finder.between(&t, node(from), node(to), max_hops) else {
                    prop_assert!(expected.is_empty());
                    continue;
                };
                let found = search.k_shortest(8);
                let costs: Vec<f64> = found.iter().map(|(_, cost)| *cost).collect();
                prop_assert_eq!(&costs[..], &expected[..expected.len().min(8)]);
                let distinct: BTreeSet<_> = found.iter().map(|(route, _)| route.clone()).collect();
                prop_assert_eq!(distinct.len(), found.len());
                let all = search.k_shortest(usize::MAX);
                prop_assert_eq!(all.len(), expected.len());
                for avoid in &found {
                    let apart = search.apart_from(std::slice::from_ref(&avoid.0));
                    let expected = all.iter().find(|(route, _)| disjoint(route, &avoid.0));
                    let cost = |found: &(Route, f64)| found.1;
                    prop_assert_eq!(apart.as_ref().map(cost), expected.map(cost));
                    prop_assert!(apart.is_none_or(|(route, _)| disjoint(&route, &avoid.0)));
                }
            }
        }
    }
}
