//! What a decision about a route costs in an overlay of 100, 1,000 and 10,000 nodes with 8 links
//! each: the 8 cheapest simple paths and the disjoint backup, their features, forecasts by a model
//! of 100 trees of depth 4, and scores. The bound is 1 ms for 99 of 100 pairs at 1,000 nodes.
//!
//! Prints the 50th and 99th percentile over 2,000 random pairs, of the whole and of the search
//! alone, always without anything kept from before. Times are those of this thread on a processor, so
//! that what else the machine does does not count; it still empties the caches. Then what an advertisement costs that changes the
//! costs of one node's links, and how many decisions have to search after it. petgraph's
//! `k_shortest_path` runs on the same graph and pairs. It computes less, the cost of the k-th
//! shortest walk: walks may pass a node twice, have no hop limit, and it does not say where they
//! lead; there is no backup, and nothing is forecast.
//!
//! `cargo bench --no-default-features --bench routes`

use std::collections::{BTreeMap, BTreeSet};
use std::hint::black_box;
use std::time::Duration;

use criterion::Criterion;
use meshwise::engine::measure::{LinkHistories, LinkQuality, RouteHistories};
use meshwise::engine::predict::schema::{FEATURES, schema_hash};
use meshwise::engine::predict::{
    FORMAT, FORMAT_VERSION, ForestModel, Head, Interval, ModelCard, Ranking, Reference,
    RoutePredictor, Trees,
};
use meshwise::engine::route::candidate::Knowledge;
use meshwise::engine::route::finding::Finding;
use meshwise::engine::route::graph::link_cost_ms;
use meshwise::engine::route::path::PathFinder;
use meshwise::engine::route::{IntelligentRouter, OverlayGraph, PathPolicy};
use meshwise::engine::types::{NodeId, Timestamp};
use petgraph::graph::{DiGraph, NodeIndex};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;
use rustix::time::{ClockId, clock_gettime};

const LINKS: usize = 8;
const CANDIDATES: usize = 8;
const PAIRS: usize = 2_000;
/// Nodes from which they start; each has its router, and the first decision of each, which has to
/// make its tables, counts too.
const SOURCES: usize = 10;
/// Pairs for petgraph where one takes tens of milliseconds.
const PAIRS_SLOW: usize = 100;
const NOW: Timestamp = Timestamp(60_000_000);

fn grow(trees: &mut Trees, random: &mut Pcg64Mcg, depth: u32) -> u32 {
    if depth == 0 {
        return trees.push_leaf(random.random_range(-0.1..0.1));
    }
    let feature = random.random_range(0..FEATURES.len() as u16);
    let parent = trees.push_split(feature, random.random_range(0.0..100.0));
    let left = grow(trees, random, depth - 1);
    let right = grow(trees, random, depth - 1);
    trees.set_children(parent, left, right);
    parent
}

fn forest(random: &mut Pcg64Mcg, count: usize) -> Trees {
    let mut trees = Trees::default();
    for _ in 0..count {
        let root = grow(&mut trees, random, 4);
        trees.roots.push(root);
    }
    trees
}

fn model(random: &mut Pcg64Mcg) -> ForestModel {
    ForestModel {
        format: FORMAT.into(),
        format_version: FORMAT_VERSION,
        version: "bench".into(),
        schema_hash: schema_hash(),
        feature_names: FEATURES.iter().map(|feature| feature.name.to_owned()).collect(),
        latency: Head {
            target: "ln_route_rtt_ms".into(),
            reference: Reference::MovingAverage,
            trees: forest(random, 100),
            scale: Some(forest(random, 40)),
            interval: Interval { coverage: 0.9, low: -1.0, high: 1.0 },
        },
        throughput: None,
        reliability: None,
        ranking: Ranking::default(),
        card: ModelCard::default(),
    }
}

/// Everything that one node knows of an overlay.
struct World {
    random: Pcg64Mcg,
    nodes: Vec<NodeId>,
    links: Vec<BTreeMap<NodeId, LinkQuality>>,
    graph: OverlayGraph,
    histories: LinkHistories,
    sequence: u64,
}

impl World {
    /// A ring, so that all is connected, and random links until everybody has 8 or nearly.
    fn new(count: usize) -> Self {
        let mut random = Pcg64Mcg::seed_from_u64(count as u64);
        let nodes: BTreeSet<NodeId> = (0..count).map(|_| NodeId(random.random())).collect();
        let nodes: Vec<NodeId> = nodes.into_iter().collect();
        let mut pairs = BTreeSet::new();
        let mut degrees = vec![2; nodes.len()];
        for at in 0..nodes.len() {
            let next = (at + 1) % nodes.len();
            pairs.insert((at.min(next), at.max(next)));
        }
        for _ in 0..nodes.len() * LINKS * 4 {
            let [a, b] = [(); 2].map(|()| random.random_range(0..nodes.len()));
            if a != b
                && degrees[a] < LINKS
                && degrees[b] < LINKS
                && pairs.insert((a.min(b), a.max(b)))
            {
                degrees[a] += 1;
                degrees[b] += 1;
            }
        }
        let mut links = vec![BTreeMap::new(); nodes.len()];
        for (a, b) in pairs {
            let rtt_ms = random.random_range(2.0..120.0);
            links[a].insert(nodes[b], quality(rtt_ms, &mut random));
            links[b].insert(nodes[a], quality(rtt_ms, &mut random));
        }
        let (graph, histories) = (OverlayGraph::default(), LinkHistories::default());
        let mut world = Self { random, nodes, links, graph, histories, sequence: 0 };
        for from in 0..world.nodes.len() {
            world.advertise(from);
        }
        world
    }

    fn advertise(&mut self, from: usize) {
        self.sequence += 1;
        let (node, links) = (self.nodes[from], self.links[from].clone());
        let said = links.iter().map(|(to, quality)| (*to, Some(*quality)));
        self.histories.advertised(node, Timestamp(self.sequence), said);
        let taken = self.graph.accept(node, self.sequence, links, Timestamp(self.sequence));
        assert!(taken.is_ok(), "a newer advertisement is taken");
    }

    /// A node's links are all a little faster or slower.
    fn drift(&mut self, from: usize) {
        for quality in self.links[from].values_mut() {
            quality.rtt_ms *= self.random.random_range(0.9..1.1);
        }
    }

    fn pair(&mut self) -> (NodeId, NodeId) {
        let from = self.nodes[self.random.random_range(0..self.nodes.len())];
        (from, self.other_than(from))
    }

    fn other_than(&mut self, node: NodeId) -> NodeId {
        loop {
            let other = self.nodes[self.random.random_range(0..self.nodes.len())];
            if other != node {
                return other;
            }
        }
    }
}

fn quality(rtt_ms: f64, random: &mut Pcg64Mcg) -> LinkQuality {
    LinkQuality {
        rtt_ms: rtt_ms * random.random_range(0.95..1.05),
        jitter_ms: random.random_range(0.1..2.0),
        loss: random.random_range(0.0..0.02),
        bandwidth: Some(random.random_range(1e5..1e7)),
        utilisation: random.random_range(0.0..0.8),
    }
}

fn report(what: &str, mut times: Vec<Duration>) {
    times.sort();
    let at = |share: f64| {
        times
            .get((times.len() as f64 * share) as usize)
            .or(times.last())
            .copied()
            .unwrap_or_default()
    };
    println!(
        "{what:<52} p50 {:>9.1} us  p99 {:>9.1} us  ({} times)",
        at(0.5).as_secs_f64() * 1e6,
        at(0.99).as_secs_f64() * 1e6,
        times.len(),
    );
}

/// Time of this thread on a processor.
fn spent() -> Duration {
    let spent = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(spent.tv_sec as u64, spent.tv_nsec as u32)
}

fn timed<T>(act: impl FnOnce() -> T) -> (Duration, T) {
    let started = spent();
    let answer = black_box(act());
    (spent() - started, answer)
}

fn decisions(world: &mut World, predictor: &mut RoutePredictor, max_hops: usize) {
    let policy = PathPolicy { candidates: CANDIDATES, max_hops, ..PathPolicy::default() };
    let histories = RouteHistories::default();
    let topology = world.graph.topology();
    let (mut whole, mut search) = (Vec::new(), Vec::new());
    let (mut routes, mut forecasts, mut apart) = (0, 0, 0);
    let mut finder = PathFinder::default();
    for _ in 0..SOURCES {
        let (me, _) = world.pair();
        let mut router = IntelligentRouter::new(me, policy, 0);
        for _ in 0..PAIRS / SOURCES {
            let to = world.other_than(me);
            let (time, found) = timed(|| {
                let mut search = finder.between(&topology, me, to, max_hops)?;
                let found = search.k_shortest(CANDIDATES);
                let (first, _) = found.first()?.clone();
                Some((found, search.apart_from(&[first])))
            });
            search.push(time);
            apart += usize::from(found.is_some_and(|(_, apart)| apart.is_some()));
            let mut know = Knowledge {
                graph: &mut world.graph,
                links: &world.histories,
                histories: &histories,
                predictor,
            };
            // Nothing is kept of a destination without a tunnel.
            let (time, decision) = timed(|| router.explain(to, &mut know, NOW));
            whole.push(time);
            routes += decision.candidates.len();
            let by_model = decision.candidates.iter().filter(|c| c.forecast.model.is_some());
            forecasts += by_model.count();
        }
    }
    let pairs = whole.len() as f64;
    println!(
        "at most {max_hops} hops: {:.1} routes a pair, {:.1} of them forecast by the model; \
         a disjoint backup for {:.1} % of pairs",
        routes as f64 / pairs,
        forecasts as f64 / pairs,
        100.0 * apart as f64 / pairs,
    );
    report("  8 paths and backup, forecast and scored", whole);
    report("  8 paths and backup, the search alone", search);
}

/// Costs that move everywhere, and 20 destinations to keep in view.
fn advertisements(world: &mut World, max_hops: usize) {
    let me = world.nodes[0];
    let mut finding = Finding::new(me, CANDIDATES, max_hops);
    let targets: Vec<NodeId> = (0..20).map(|_| world.other_than(me)).collect();
    let (mut accepted, mut asked) = (Vec::new(), Vec::new());
    for _ in 0..200 {
        let from = world.random.random_range(0..world.nodes.len());
        world.drift(from);
        let (node, links) = (world.nodes[from], world.links[from].clone());
        world.sequence += 1;
        let sequence = world.sequence;
        let graph = &mut world.graph;
        accepted.push(
            timed(|| {
                let taken = graph.accept(node, sequence, links, NOW);
                (taken.is_ok(), graph.topology())
            })
            .0,
        );
        for to in &targets {
            asked.push(timed(|| finding.routes(*to, graph)).0);
        }
    }
    report("  an advertisement into the topology", accepted);
    report("  paths after it, kept or searched anew", asked);
}

fn petgraph(world: &mut World, pairs: usize) {
    let mut graph = DiGraph::<(), f64>::new();
    let indices: Vec<NodeIndex> = world.nodes.iter().map(|_| graph.add_node(())).collect();
    let at = |node: &NodeId| world.nodes.binary_search(node).ok().map(|at| indices[at]);
    for (from, links) in indices.iter().zip(&world.links) {
        for (to, quality) in links {
            if let Some(to) = at(to) {
                graph.add_edge(*from, to, link_cost_ms(quality));
            }
        }
    }
    let mut times = Vec::new();
    for _ in 0..pairs {
        let (from, to) = world.pair();
        let at = |node: &NodeId| world.nodes.binary_search(node).ok().map(|at| indices[at]);
        let (Some(from), Some(to)) = (at(&from), at(&to)) else { continue };
        let cost = |edge: petgraph::graph::EdgeReference<'_, f64>| *edge.weight();
        let (time, found) =
            timed(|| petgraph::algo::k_shortest_path(&graph, from, Some(to), CANDIDATES, cost));
        assert!(found.contains_key(&to));
        times.push(time);
    }
    report("petgraph k_shortest_path: cost of the 8th walk", times);
}

/// The whole decision again as criterion measures, over pairs in turn.
fn criterion(world: &mut World, predictor: &mut RoutePredictor, count: usize) {
    let me = world.nodes[0];
    let targets: Vec<NodeId> = (0..PAIRS).map(|_| world.other_than(me)).collect();
    let mut targets = targets.iter().cycle();
    let histories = RouteHistories::default();
    let mut router = IntelligentRouter::new(me, PathPolicy::default(), 0);
    Criterion::default().without_plots().sample_size(20).bench_function(
        &format!("decide, {count} nodes"),
        |bencher| {
            bencher.iter(|| {
                let mut know = Knowledge {
                    graph: &mut world.graph,
                    links: &world.histories,
                    histories: &histories,
                    predictor,
                };
                targets.next().map(|to| black_box(router.explain(*to, &mut know, NOW)))
            });
        },
    );
}

fn main() {
    let mut random = Pcg64Mcg::seed_from_u64(0);
    let mut predictor = RoutePredictor::new(true);
    predictor.set_model(Some(std::sync::Arc::new(model(&mut random))));
    for count in [100, 1_000, 10_000] {
        let mut world = World::new(count);
        println!("\n{count} nodes, {LINKS} links each");
        for max_hops in [4, 8] {
            decisions(&mut world, &mut predictor, max_hops);
        }
        criterion(&mut world, &mut predictor, count);
        petgraph(&mut world, if count > 1_000 { PAIRS_SLOW } else { PAIRS });
        advertisements(&mut world, 4);
    }
}
