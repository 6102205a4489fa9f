//! The shape of the mesh: which links a node makes, and which it gives up.
//!
//! Every link is probed and advertised, so a node wants few, and the right ones. What a link is worth
//! is by how much routes to everybody get longer without it; what a new one would be worth follows
//! from what its round trip is expected to be. A node below its target degree links to the best
//! candidate; one at its target takes a candidate that is worth much more than its least valuable
//! link; one above its target gives up a link that is worth nothing to anybody: to a neighbour that has
//! more than its target too, or when it has far too many, to any. Otherwise the neighbour would have to
//! make another link, somebody else to give one up for that, and the mesh would never come to rest.
//! For the same reason routes that get shorter by no more than [`STRETCH`] allows are not shorter.
//!
//! **Pruning never parts the mesh**, whoever prunes at the same time and however old the picture is
//! that each has. All links have a rank that follows from the ids of their ends alone. A link is
//! given up only when its ends are joined by another path whose links all have lower ranks. By
//! induction over the ranks, the ends of every link that was ever given up stay joined by links that
//! were not (the cycle property of minimum spanning forests: the links of lowest rank in each cut
//! are never given up). Links that die are not pruning's doing; who loses one links anew.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use crate::engine::route::graph::Topology;
use crate::engine::route::path::reach_ms;
use crate::engine::types::{NodeId, Timestamp};

/// How often the shape is looked at while there are too few links, or far too many.
pub const INTERVAL: Duration = Duration::from_secs(5);
/// When it is looked at after a loss that leaves fewer than [`DEGREE_MIN`].
pub const SOON: Duration = Duration::from_secs(1);
/// How often it is looked at otherwise.
pub const SETTLED_INTERVAL: Duration = Duration::from_secs(30);
/// Links made and given up in a minute, together.
pub const CHANGES_PER_MINUTE: usize = 6;
/// A node that was linked with, or whose link was given up, is no candidate before.
pub const HOLD: Duration = Duration::from_secs(600);
/// Such nodes that are remembered; the oldest makes room.
pub const RECENT_MAX: usize = 256;
/// Neither end of a link that is given up is left with fewer than these.
pub const DEGREE_MIN: usize = 3;
/// A node lets others link with it up to so many times its target, so that newcomers find room.
pub const WELCOME_FACTOR: usize = 2;
/// Links beyond the target that a more valuable candidate may add; pruning brings them back.
pub const DEGREE_SLACK: usize = 2;
/// Candidates looked at each time: each costs one search of the whole graph.
pub const CANDIDATES_MAX: usize = 16;
/// Mean shortening of all routes below which a candidate is not worth a change.
pub const GAIN_MIN: f64 = 0.02;
/// A candidate must be worth so many times the least valuable link.
pub const GAIN_FACTOR: f64 = 2.0;
/// A route is as good as another one that it exceeds by no more than this (factor, or ms).
pub const STRETCH: (f64, f64) = (1.2, 2.0);
/// Links of the path that takes a link's place.
pub const DETOUR_LINKS_MAX: usize = 3;

/// What to do about the links of this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reshape {
    /// Connect to this node.
    Make(NodeId),
    /// Give the link to this neighbour up.
    GiveUp(NodeId),
}

/// What a node sees when it looks at its links.
pub struct Neighbourhood<'a> {
    /// This node.
    pub me: NodeId,
    /// The neighbours that it is linked with.
    pub links: &'a BTreeSet<NodeId>,
    /// Nodes that it could link with, and the round trip that is expected (ms) where one is.
    pub candidates: &'a [(NodeId, Option<f64>)],
    /// The links of the mesh.
    pub topology: &'a Topology,
    /// Links that it wants to have.
    pub target: usize,
    /// Who has so many links lets nobody link with it, if it wants as many as this node does.
    pub full: usize,
    /// Longest route that is looked for (links): who is farther is not reached.
    pub max_hops: usize,
}

/// Decides about links, seldom.
#[derive(Clone, Debug, Default)]
pub struct TopologyManager {
    /// What was done lately, and when.
    recent: BTreeMap<NodeId, (Reshape, Timestamp)>,
    changes: VecDeque<Timestamp>,
    next_at: Option<Timestamp>,
}

impl TopologyManager {
    /// When [`TopologyManager::poll`] wants to be called next.
    pub fn next_timeout(&self) -> Option<Timestamp> {
        self.next_at
    }

    /// Starts looking, when it does not yet.
    pub fn start(&mut self, now: Timestamp) {
        self.next_at.get_or_insert(now + INTERVAL);
    }

    /// Looks within a second: few links are left.
    pub fn look_soon(&mut self, now: Timestamp) {
        let soon = now + SOON;
        self.next_at = Some(self.next_at.map_or(soon, |at| at.min(soon)));
    }

    /// Whether this node was lately tried or given up.
    pub fn is_recent(&self, node: NodeId) -> bool {
        self.recent.contains_key(&node)
    }

    /// Whether the link to this node was lately given up.
    pub fn is_given_up(&self, node: NodeId) -> bool {
        matches!(self.recent.get(&node), Some((Reshape::GiveUp(_), _)))
    }

    /// Every node is a candidate again: this one has no links left.
    pub fn is_alone(&mut self, now: Timestamp) {
        self.recent.clear();
        self.next_at = Some(now);
    }

    /// What to change now: one link made and one given up at most, or as many made as are missing to
    /// [`DEGREE_MIN`].
    pub fn poll(&mut self, seen: &Neighbourhood<'_>, now: Timestamp) -> Vec<Reshape> {
        if self.next_at.is_none_or(|at| at > now) {
            return Vec::new();
        }
        let is_settled = (seen.target..=seen.target + DEGREE_SLACK).contains(&seen.links.len());
        self.next_at = Some(now + if is_settled { SETTLED_INTERVAL } else { INTERVAL });
        self.recent.retain(|_, (_, since)| now.since(*since) < HOLD);
        while self.changes.front().is_some_and(|at| now.since(*at) >= Duration::from_secs(60)) {
            self.changes.pop_front();
        }
        let left = CHANGES_PER_MINUTE.saturating_sub(self.changes.len());
        if left == 0 {
            return Vec::new();
        }
        let mut changes = self.wanted(seen);
        changes.truncate(left);
        for change in &changes {
            self.remember(*change, now);
            self.changes.push_back(now);
        }
        changes
    }

    fn remember(&mut self, change: Reshape, now: Timestamp) {
        if self.recent.len() >= RECENT_MAX
            && let Some(oldest) = self.recent.iter().min_by_key(|(_, (_, since))| *since)
        {
            let oldest = *oldest.0;
            self.recent.remove(&oldest);
        }
        let (Reshape::Make(node) | Reshape::GiveUp(node)) = change;
        self.recent.insert(node, (change, now));
    }

    fn wanted(&self, seen: &Neighbourhood<'_>) -> Vec<Reshape> {
        let Some(me) = seen.topology.index(seen.me) else {
            // Nothing is known of the mesh: any link is good.
            let any = seen.candidates.iter().map(|(node, _)| *node);
            let any = any.filter(|node| !self.is_recent(*node) && !seen.links.contains(node));
            let missing = usize::from(seen.links.len() < seen.target);
            let missing = missing.max(missing_most(seen));
            return any.take(missing).map(Reshape::Make).collect();
        };
        let from_me = reach_ms(seen.topology, me, seen.max_hops, None);
        let mut changes = Vec::new();
        let least = self.least_valuable(seen, me, &from_me);
        let best = self.best_candidates(seen, &from_me);
        let links = seen.links.len();
        for (node, gain) in best.into_iter().take(missing_most(seen).max(1)) {
            let replaces = least.is_none_or(|(_, loss, _)| gain > GAIN_FACTOR * loss);
            let worth = gain > GAIN_MIN && replaces && links < seen.target + DEGREE_SLACK;
            if links < seen.target || worth {
                changes.push(Reshape::Make(node));
            }
        }
        if let Some((node, _, true)) = least
            && links > seen.target
            && (links > seen.target + DEGREE_SLACK || has_spare(seen, node))
        {
            changes.push(Reshape::GiveUp(node));
        }
        changes
    }

    /// The candidates by which routes get shorter most, and by how much, the best first. While links
    /// are missing, those that miss some too come before all others, and those that are full come last:
    /// whoever shortens all routes has many links, and would let nobody in.
    fn best_candidates(&self, seen: &Neighbourhood<'_>, from_me: &[f64]) -> Vec<(NodeId, f64)> {
        let room = |node: NodeId| {
            let index = seen.topology.index(node);
            let has = index.map(|index| seen.topology.edges[index as usize].len());
            // Who has advertised links and has none any more is gone, as a rule.
            let misses = has.is_none_or(|has| has > 0 && has < seen.target);
            let is_full = has.is_some_and(|has| has >= seen.full);
            (seen.links.len() < seen.target && misses, !is_full)
        };
        let usual = usual_cost_ms(seen);
        let candidates = seen.candidates.iter().filter(|(node, _)| {
            *node != seen.me && !seen.links.contains(node) && !self.is_recent(*node)
        });
        let valued = candidates.take(CANDIDATES_MAX).map(|(node, expected_ms)| {
            let link_ms = expected_ms.unwrap_or(usual);
            let gain = match seen.topology.index(*node) {
                Some(index) => {
                    let hops = seen.max_hops.saturating_sub(1);
                    let from_there = reach_ms(seen.topology, index, hops, None);
                    mean(from_me.iter().zip(&from_there).map(|(now, there)| {
                        let then = link_ms + there;
                        let is_worth = *now > 0.0 && *now - then > STRETCH.1;
                        if is_worth { shortening(*now, then) } else { 0.0 }
                    }))
                }
                // It joins those that have no link yet.
                None => GAIN_MIN,
            };
            (*node, gain)
        });
        let mut valued: Vec<(NodeId, f64)> = valued.collect();
        valued.sort_by(|(a, one), (b, other)| room(*b).cmp(&room(*a)).then(other.total_cmp(one)));
        valued
    }

    /// The link that this node's own routes need least, by how much they get longer without it on
    /// average, and whether it can be given up; those that can come first.
    fn least_valuable(
        &self,
        seen: &Neighbourhood<'_>,
        me: u32,
        from_me: &[f64],
    ) -> Option<(NodeId, f64, bool)> {
        let links = seen.links.iter().filter_map(|node| Some((*node, seen.topology.index(*node)?)));
        let valued = links.map(|(node, there)| {
            let reach = |from, without| reach_ms(seen.topology, from, seen.max_hops, without);
            let without = reach(me, Some((me, there)));
            let loss =
                mean(from_me.iter().zip(&without).map(|(now, then)| shortening(*then, *now)));
            let nobody_suffers = can_be_given_up(seen.topology, me, there)
                && keeps_good_routes(from_me, &without)
                && keeps_good_routes(&reach(there, None), &reach(there, Some((me, there))));
            (node, loss, nobody_suffers)
        });
        valued.min_by(|one, other| {
            let spare = |it: &(NodeId, f64, bool)| has_spare(seen, it.0);
            let can = other.2.cmp(&one.2);
            can.then(spare(other).cmp(&spare(one))).then(one.1.total_cmp(&other.1))
        })
    }
}

/// Whether a neighbour has more links than a node wants.
fn has_spare(seen: &Neighbourhood<'_>, node: NodeId) -> bool {
    let index = seen.topology.index(node);
    index.is_some_and(|index| seen.topology.edges[index as usize].len() > seen.target)
}

/// Links that are missing to the least that a node may have.
fn missing_most(seen: &Neighbourhood<'_>) -> usize {
    DEGREE_MIN.min(seen.target).saturating_sub(seen.links.len())
}

/// Up to which cost a route is as good as one of this cost (ms).
fn as_good_ms(cost_ms: f64) -> f64 {
    (STRETCH.0 * cost_ms).max(cost_ms + STRETCH.1)
}

/// Whether every route is nearly as good as before, none being out of reach that was not.
fn keeps_good_routes(before_ms: &[f64], after_ms: &[f64]) -> bool {
    before_ms.iter().zip(after_ms).all(|(before, after)| *after <= as_good_ms(*before))
}

/// By which share a route gets shorter: 1 for one that was not there, 0 for one that gets longer.
fn shortening(before_ms: f64, after_ms: f64) -> f64 {
    match (before_ms.is_finite(), after_ms.is_finite()) {
        (false, true) => 1.0,
        (true, true) if before_ms > 0.0 => (1.0 - after_ms / before_ms).max(0.0),
        _ => 0.0,
    }
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0.0), |(sum, count), value| (sum + value, count + 1.0));
    if count == 0.0 { 0.0 } else { sum / count }
}

/// What a link of this node costs in the middle (ms): the guess for a node that nothing is known of.
fn usual_cost_ms(seen: &Neighbourhood<'_>) -> f64 {
    let Some(me) = seen.topology.index(seen.me) else { return 0.0 };
    let mut costs: Vec<f64> =
        seen.topology.edges[me as usize].iter().map(|edge| edge.cost_ms).collect();
    costs.sort_by(f64::total_cmp);
    costs.get(costs.len() / 2).copied().unwrap_or(0.0)
}

/// Rank of a link, the same seen from both ends. Mixing by SplitMix64 (Steele, Lea and Flood, 2014);
/// links of equal rank are told apart by the ids themselves.
fn rank(a: NodeId, b: NodeId) -> (u64, NodeId, NodeId) {
    let (low, high) = (a.min(b), a.max(b));
    let mix = |seed: u64| {
        let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    (mix(mix(u64::from_be_bytes(low.0)) ^ u64::from_be_bytes(high.0)), low, high)
}

/// Whether nobody loses a good route with this link, and the mesh cannot fall apart: a short path of
/// links of lower rank joins its ends, hardly longer than the link, and both ends keep enough links.
fn can_be_given_up(topology: &Topology, a: u32, b: u32) -> bool {
    let enough = |end: u32| topology.edges[end as usize].len() > DEGREE_MIN;
    let cost = topology.cost_ms(a, b);
    let limit = as_good_ms(cost);
    let name = |index: u32| topology.nodes[index as usize];
    let highest = rank(name(a), name(b));
    if !enough(a) || !enough(b) || !cost.is_finite() {
        return false;
    }
    // Bellman-Ford by number of links over the links of lower rank.
    let mut reached = BTreeMap::from([(a, 0.0)]);
    for _ in 0..DETOUR_LINKS_MAX {
        let mut next = reached.clone();
        for (at, so_far) in &reached {
            for edge in &topology.edges[*at as usize] {
                let cost = so_far + edge.cost_ms;
                let is_lower = rank(name(*at), name(edge.to)) < highest;
                if is_lower && cost <= limit && next.get(&edge.to).is_none_or(|known| cost < *known)
                {
                    next.insert(edge.to, cost);
                }
            }
        }
        reached = next;
    }
    reached.contains_key(&b)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::engine::route::graph::Edge;
    use crate::engine::types::MAX_ROUTE_HOPS;

    fn node(byte: u8) -> NodeId {
        NodeId([byte; 8])
    }

    /// Nodes 1 to `nodes`, links with their costs (ms).
    fn mesh(nodes: u8, links: &[(u8, u8, f64)]) -> Topology {
        let mut edges = vec![Vec::new(); usize::from(nodes)];
        for (a, b, cost_ms) in links {
            for (from, to) in [(a, b), (b, a)] {
                let to = u32::from(to - 1);
                edges[usize::from(from - 1)].push(Edge {
                    to,
                    cost_ms: *cost_ms,
                    back_ms: *cost_ms,
                });
            }
        }
        for edges in &mut edges {
            edges.sort_by_key(|edge| edge.to);
            edges.dedup_by_key(|edge| edge.to);
        }
        Topology { nodes: (1..=nodes).map(node).collect(), edges }
    }

    fn everybody_linked(nodes: u8, cost_ms: f64) -> Topology {
        let pairs = (1..=nodes).flat_map(|a| (a + 1..=nodes).map(move |b| (a, b, cost_ms)));
        mesh(nodes, &pairs.collect::<Vec<_>>())
    }

    fn neighbours(topology: &Topology, me: u8) -> BTreeSet<NodeId> {
        let edges = &topology.edges[usize::from(me - 1)];
        edges.iter().map(|edge| topology.nodes[edge.to as usize]).collect()
    }

    /// What node `me` does when it looks for the first time.
    fn look(
        topology: &Topology,
        me: u8,
        candidates: &[(NodeId, Option<f64>)],
        target: usize,
    ) -> Vec<Reshape> {
        let links = neighbours(topology, me);
        let mut manager = TopologyManager::default();
        manager.start(Timestamp(0));
        let (full, max_hops) = (WELCOME_FACTOR * target, MAX_ROUTE_HOPS);
        let (links, me) = (&links, node(me));
        let seen = Neighbourhood { me, links, candidates, topology, target, full, max_hops };
        assert_eq!(manager.poll(&seen, Timestamp(1)), [], "not before it is time");
        manager.poll(&seen, Timestamp(0) + INTERVAL)
    }

    #[test]
    fn below_the_target_the_candidate_that_shortens_most_is_taken() {
        // 1 - 2 - 3 - 4 - 5 in a line; 5 is expected to be near, 3 as far as it is.
        let line: Vec<_> = (1..5).map(|a| (a, a + 1, 50.0)).collect();
        let line = mesh(5, &line);
        let candidates = [(node(3), Some(100.0)), (node(5), Some(20.0)), (node(4), None)];
        let [best, second] = [5, 4].map(|byte| Reshape::Make(node(byte)));
        assert_eq!(look(&line, 1, &candidates, 3), [best, second], "two are missing to the least");
        assert_eq!(look(&line, 2, &candidates, 3), [best]);
        assert_eq!(look(&line, 1, &[], 3), []);
    }

    #[test]
    fn while_links_are_missing_those_who_miss_some_too_come_first() {
        // 5 has the four links that it wants; 6 is farther and has one.
        let star: Vec<_> = [1, 2, 3, 4].map(|a| (a, 5, 50.0)).into();
        let links =
            [&star[1..], &[(1, 2, 50.0), (1, 3, 50.0), (1, 4, 50.0), (5, 6, 90.0)]].concat();
        let mesh = mesh(6, &links);
        let candidates = [(node(5), Some(1.0)), (node(6), Some(80.0))];
        assert_eq!(look(&mesh, 1, &candidates, 4), [Reshape::Make(node(6))]);
    }

    #[test]
    fn who_is_full_comes_last() {
        // 5 is a hub that shortens all routes, and has no room; 4 is at the end of a line.
        let hub: Vec<_> = (6..16).map(|a| (a, 5, 10.0)).collect();
        let links = [&hub[..], &[(1, 2, 50.0), (2, 3, 50.0), (3, 4, 50.0), (3, 5, 50.0)]].concat();
        let line: Vec<_> = (16..21).map(|a| (4, a, 50.0)).collect();
        let mesh = mesh(20, &[&links[..], &line].concat());
        let candidates = [(node(5), Some(1.0)), (node(4), Some(80.0))];
        let [hub, line] = [5, 4].map(|byte| Reshape::Make(node(byte)));
        assert_eq!(look(&mesh, 1, &candidates, 4), [line, hub]);
        assert_eq!(look(&mesh, 1, &candidates, 6)[0], hub, "it has room then");
    }

    #[test]
    fn who_has_no_link_any_more_does_not_come_first() {
        // 7 was here, and nobody has a link to it; 5 has what it wants, and is there.
        let star: Vec<_> = [2, 3, 4, 6].map(|a| (a, 5, 50.0)).into();
        let links = [&star[..], &[(1, 2, 50.0), (1, 3, 50.0), (1, 4, 50.0)]].concat();
        let candidates = [(node(7), Some(1.0)), (node(5), Some(1.0))];
        assert_eq!(look(&mesh(7, &links), 1, &candidates, 4), [Reshape::Make(node(5))]);
    }

    #[test]
    fn at_the_target_only_a_much_better_candidate_is_taken() {
        let line: Vec<_> = (1..5).map(|a| (a, a + 1, 50.0)).collect();
        let line = mesh(5, &line);
        // The only link of node 1 carries everything: nothing replaces it.
        assert_eq!(look(&line, 1, &[(node(5), Some(20.0))], 1), []);
        let mut links: Vec<_> = (1..5).map(|a| (a, a + 1, 50.0)).collect();
        links.extend([(1, 3, 99.0), (1, 4, 149.0)]);
        let redundant = mesh(5, &links);
        assert_eq!(look(&redundant, 1, &[(node(5), Some(20.0))], 3), [Reshape::Make(node(5))]);
        assert_eq!(look(&redundant, 1, &[(node(5), Some(198.0))], 3), [], "worth nothing");
    }

    #[test]
    fn above_the_target_links_worth_nothing_are_given_up_until_few_are_left() {
        let mut topology = everybody_linked(12, 1.5);
        let mut given_up = 0;
        for round in 0..40 {
            let me = 1 + round % 12;
            for change in look(&topology, me, &[], 4) {
                let Reshape::GiveUp(other) = change else { panic!("{change:?}") };
                let (a, b) = (u32::from(me - 1), topology.index(other).unwrap());
                topology.edges[a as usize].retain(|edge| edge.to != b);
                topology.edges[b as usize].retain(|edge| edge.to != a);
                given_up += 1;
            }
        }
        assert!(given_up > 10, "{given_up}");
        let degrees = topology.edges.iter().map(Vec::len);
        assert!(degrees.clone().all(|degree| degree >= DEGREE_MIN), "{degrees:?}");
        // A link that is much shorter than every way round stays.
        let mut links: Vec<_> = Vec::new();
        for a in 1..=6 {
            links.extend((a + 1..=6).map(|b| (a, b, if (a, b) == (1, 2) { 1.0 } else { 90.0 })));
        }
        let topology = mesh(6, &links);
        assert!(!can_be_given_up(&topology, 0, 1));
    }

    #[test]
    fn a_link_given_up_is_not_made_again_for_a_while_and_changes_are_bounded() {
        let topology = everybody_linked(12, 1.5);
        let mut links = neighbours(&topology, 1);
        let mut manager = TopologyManager::default();
        manager.start(Timestamp(0));
        let mut given_up = Vec::new();
        let mut now = Timestamp(0);
        let mut look = |links: &BTreeSet<NodeId>, now| {
            let seen = Neighbourhood {
                me: node(1),
                links,
                candidates: &[],
                topology: &topology,
                target: 4,
                full: 8,
                max_hops: MAX_ROUTE_HOPS,
            };
            manager.poll(&seen, now)
        };
        for _ in 0..11 {
            now = now + INTERVAL;
            for change in look(&links, now) {
                let Reshape::GiveUp(node) = change else { panic!("{change:?}") };
                links.remove(&node);
                given_up.push(node);
            }
        }
        assert_eq!(given_up.len(), CHANGES_PER_MINUTE);
        let later = now + HOLD + INTERVAL;
        let mut later_manager = manager.clone();
        assert!(given_up.iter().all(|n| manager.is_recent(*n) && manager.is_given_up(*n)));
        let seen = Neighbourhood {
            me: node(1),
            links: &links,
            candidates: &[],
            topology: &topology,
            target: 4,
            full: 8,
            max_hops: MAX_ROUTE_HOPS,
        };
        later_manager.poll(&seen, later);
        assert!(!given_up.iter().any(|node| later_manager.is_recent(*node)), "not for ever");
        manager.is_alone(now);
        assert!(!given_up.iter().any(|node| manager.is_recent(*node)));
    }

    fn is_connected(topology: &Topology) -> bool {
        reach_ms(topology, 0, topology.nodes.len(), None).iter().all(|cost| cost.is_finite())
    }

    proptest! {
        /// Everybody gives up everything that it may at the same time, on the same old picture.
        #[test]
        fn pruning_together_never_parts_the_mesh(
            nodes in 4_u8..16,
            picks in proptest::collection::vec((any::<u8>(), any::<u8>(), 1.0_f64..100.0), 10..120),
        ) {
            let mut links: Vec<(u8, u8, f64)> = (1..nodes).map(|a| (a, a + 1, 20.0)).collect();
            let picks = picks.iter().map(|(a, b, cost)| (a % nodes + 1, b % nodes + 1, *cost));
            links.extend(picks.filter(|(a, b, _)| a != b).map(|(a, b, c)| (a.min(b), a.max(b), c)));
            let before = mesh(nodes, &links);
            prop_assert!(is_connected(&before));
            let mut after = before.clone();
            let mut given_up = 0;
            for a in 0..u32::from(nodes) {
                for edge in before.edges[a as usize].clone() {
                    if can_be_given_up(&before, a, edge.to) {
                        given_up += 1;
                        after.edges[a as usize].retain(|kept| kept.to != edge.to);
                        after.edges[edge.to as usize].retain(|kept| kept.to != a);
                    }
                }
            }
            prop_assert!(is_connected(&after), "{given_up} given up");
        }
    }
}
