//! Many nodes and flows with faults, in simulated worlds: what must hold at every step.
//!
//! CI plays some small worlds. Those that take long are run by hand before a release:
//! `cargo test --release --no-default-features --test it -- --ignored worlds --nocapture`.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use meshwise::engine::Intervals;
use meshwise::engine::event::Command;
use meshwise::engine::measure::LinkState;
use meshwise::engine::overlay::Objective;
use meshwise::engine::overlay::advertiser::REFRESH_QUIET;
use meshwise::engine::route::{PathPolicy, ReservationState};
use meshwise::engine::types::{Timestamp, TunnelId};
use meshwise::sim::{LinkModel, Traffic, World};
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;

const START: Timestamp = Timestamp(1_760_000_000_000_000);
const STEP: Duration = Duration::from_millis(500);
/// Links of a node when it joins: to these many nodes before it.
const LINKS: usize = 3;
/// A dead neighbour is known to be dead after so long: three link probes, and their time-outs.
const DETECTED: Duration = Duration::from_secs(6);
/// What an ordinary flow sends: 12 kB/s, and one that fills a link.
const SOME: Traffic = Traffic { every: Duration::from_millis(100), bytes: 1_200 };
const MUCH: Traffic = Traffic { every: Duration::from_millis(10), bytes: 12_000 };
/// Every so many flows one has a reservation (bytes/s).
const RESERVED_EVERY: usize = 8;
const RESERVED: u64 = 60_000;

struct Shape {
    nodes: usize,
    flows: usize,
    steps: usize,
}

/// What happened, to compare runs by.
#[derive(Debug, Default, PartialEq)]
struct Tally {
    sent: u64,
    arrived: u64,
    moves: u64,
    losses: u64,
    decisions: usize,
    granted: usize,
    refused: usize,
}

struct Flow {
    source: usize,
    target: usize,
    tunnel: TunnelId,
    reserve: Option<u64>,
}

/// A world with what the test knows of it.
struct Played {
    world: World,
    random: Pcg64Mcg,
    seed: u64,
    edges: Vec<(usize, usize, LinkModel)>,
    flows: Vec<Flow>,
    dead: BTreeSet<usize>,
    /// Links that fell silent, since when.
    silent: BTreeMap<(usize, usize), Timestamp>,
    /// A link that is silent for one step only.
    flaps: Option<(usize, usize, LinkModel)>,
}

impl Played {
    /// A random connected graph, and flows between random pairs.
    fn new(seed: u64, shape: &Shape) -> Self {
        let mut random = Pcg64Mcg::seed_from_u64(seed);
        let mut world = World::new(seed, START);
        let mut edges = Vec::new();
        for index in 0..shape.nodes {
            let before: Vec<usize> = (0..index).collect();
            let peers: Vec<usize> = before.sample(&mut random, LINKS).copied().collect();
            for peer in &peers {
                let delay_ms = random.random_range(2.0..40.0);
                let rate = Some(random.random_range(1e6..4e6));
                let model = LinkModel { delay_ms, jitter_ms: 1.0, loss: 0.0, rate };
                world.set_link(*peer, index, model);
                edges.push((*peer, index, model));
            }
            world.add_node(&peers, PathPolicy::default(), Intervals::default());
        }
        world.run_for(Duration::from_secs(8));
        let all: Vec<usize> = (0..shape.nodes).collect();
        let flows = (0..shape.flows).map(|flow| {
            let ends: Vec<usize> = all.sample(&mut random, 2).copied().collect();
            let reserve = (flow % RESERVED_EVERY == 0).then_some(RESERVED);
            Flow { source: ends[0], target: ends[1], tunnel: TunnelId(flow as u16 + 1), reserve }
        });
        let flows: Vec<Flow> = flows.collect();
        let (dead, silent) = Default::default();
        let mut played = Self { world, random, seed, edges, flows, dead, silent, flaps: None };
        (0..shape.flows).for_each(|flow| played.open(flow));
        played.world.run_for(Duration::from_secs(3));
        played
    }

    fn open(&mut self, flow: usize) {
        let Flow { source, target, tunnel, reserve } = self.flows[flow];
        let command = Command::OpenTunnel {
            tunnel,
            destination: self.world.id(target),
            forced: None,
            objective: Objective::ALL[flow % 4],
            beside: None,
            reserve,
        };
        self.world.command(source, command);
        self.world.send(source, tunnel, SOME);
    }

    /// A link falls silent, for good or for a moment, gets slow or lossy, or is well again; a node dies
    /// or starts again; a flow sends a lot, or no longer.
    fn fault(&mut self) {
        let (a, b, model) = *self.edges.choose(&mut self.random).expect("there are links");
        let set = |world: &mut World, model| world.set_link(a, b, model);
        let well = !self.silent.contains_key(&(a, b));
        match self.random.random_range(0..8) {
            0 => {
                set(&mut self.world, LinkModel { loss: 1.0, ..model });
                self.silent.entry((a, b)).or_insert(self.world.now());
            }
            1 if well => {
                set(&mut self.world, LinkModel { loss: 1.0, ..model });
                self.flaps = Some((a, b, model));
            }
            2 if well => {
                set(&mut self.world, LinkModel { delay_ms: model.delay_ms + 100.0, ..model });
            }
            3 if well => set(&mut self.world, LinkModel { loss: 0.3, ..model }),
            4 if self.dead.len() < self.edges.len() / (20 * LINKS) => {
                let victim = self.random.random_range(0..=self.edges[self.edges.len() - 1].1);
                if self.dead.insert(victim) {
                    self.world.kill(victim);
                }
            }
            5 => {
                if let Some(back) = self.dead.pop_first() {
                    self.world.start(back);
                    let own = |flow: &usize| self.flows[*flow].source == back;
                    let own: Vec<usize> = (0..self.flows.len()).filter(own).collect();
                    own.into_iter().for_each(|flow| self.open(flow));
                }
            }
            6 => {
                let flow = self.flows.choose(&mut self.random).expect("there are flows");
                let traffic = if self.random.random() { MUCH } else { SOME };
                if !self.dead.contains(&flow.source) {
                    self.world.send(flow.source, flow.tunnel, traffic);
                }
            }
            _ => {
                if let Some(((a, b), _)) = self.silent.pop_first() {
                    let edge = self.edges.iter().find(|edge| (edge.0, edge.1) == (a, b));
                    self.world.set_link(a, b, edge.expect("a link of this world").2);
                }
            }
        }
    }

    /// What is seen from outside after a step; what concerns single events the world checks itself.
    fn check(&self, step: usize) {
        let (world, seed) = (&self.world, self.seed);
        assert_eq!(world.breaches(), [] as [String; 0], "seed {seed} step {step}");
        let detected =
            self.silent.iter().filter(|(_, since)| world.now().since(**since) > DETECTED);
        for ((a, b), _) in detected {
            for (here, there) in [(*a, *b), (*b, *a)] {
                // A connection that is younger than the silence is new, and carries nothing yet.
                let mut links = world.is_running(here).then(|| world.engine(here).links());
                let state = links.as_mut().and_then(|l| l.find(|link| link.0 == world.id(there)));
                let is_up = state.is_some_and(|(_, state, _)| state == LinkState::Up);
                assert!(!is_up, "seed {seed} step {step}: {here} does not miss {there}");
            }
            let (a, b) = (world.id(*a), world.id(*b));
            for flow in self.flows.iter().filter(|flow| !self.dead.contains(&flow.source)) {
                let binding = &world.forwarding(flow.source).tunnels[&flow.tunnel];
                let route = binding.route.as_ref().filter(|_| binding.reachable);
                let uses = route.is_some_and(|route| {
                    route.links().any(|link| link == (a, b) || link == (b, a))
                });
                assert!(!uses, "seed {seed} step {step}: {} uses a dead link", flow.source);
            }
        }
    }

    /// What was sent and what arrived, all in all.
    fn travelled(&self, flow: &Flow) -> (u64, u64) {
        let travelled = self.world.travelled(flow.source, flow.tunnel);
        (travelled.sent, travelled.arrived)
    }
}

fn play(seed: u64, shape: &Shape) -> Tally {
    let mut played = Played::new(seed, shape);
    let mut tally = Tally::default();
    for step in 0..shape.steps {
        if let Some((a, b, model)) = played.flaps.take() {
            played.world.set_link(a, b, model);
        }
        if step % 3 == 1 {
            played.fault();
        }
        let dead = played.dead.clone();
        let alive = |flow: &&Flow| !dead.contains(&flow.source) && !dead.contains(&flow.target);
        let count = |played: &Played| {
            let flows = played.flows.iter().filter(alive).map(|flow| played.travelled(flow));
            flows.fold((0, 0), |sum, (sent, arrived)| (sum.0 + sent, sum.1 + arrived))
        };
        let before = count(&played);
        played.world.run_for(STEP);
        let after = count(&played);
        tally.sent += after.0 - before.0;
        tally.arrived += after.1 - before.1;
        played.check(step);
    }
    let world = &played.world;
    for flow in &played.flows {
        let travelled = world.travelled(flow.source, flow.tunnel);
        tally.moves += travelled.moves;
        tally.losses += travelled.losses;
        let engine = world.is_running(flow.source).then(|| world.engine(flow.source));
        match engine.and_then(|engine| engine.reservation(flow.tunnel)).map(|r| r.state) {
            Some(ReservationState::Granted) => tally.granted += 1,
            Some(ReservationState::Refused(_)) => tally.refused += 1,
            _ => {}
        }
    }
    tally.decisions = (0..shape.nodes).map(|node| world.decisions(node).len()).sum();
    tally
}

/// Most datagrams arrive although links and nodes fail all the time, and links are full.
fn assert_useful(tally: &Tally, seed: u64) {
    assert!(tally.arrived * 100 > tally.sent * 80, "seed {seed}: {tally:?}");
    assert!(tally.losses > 0 && tally.granted > 0, "seed {seed}: {tally:?}");
}

const SMALL: Shape = Shape { nodes: 24, flows: 60, steps: 40 };

#[test]
fn small_worlds_with_faults_keep_every_invariant() {
    for seed in 1..=10 {
        let tally = play(seed, &SMALL);
        println!("seed {seed}: {tally:?}");
        assert_useful(&tally, seed);
    }
}

#[test]
fn the_same_seed_is_the_same_world() {
    let shape = Shape { nodes: 12, flows: 20, steps: 20 };
    assert_eq!(play(7, &shape), play(7, &shape));
    assert_ne!(play(7, &shape), play(8, &shape));
}

#[test]
#[ignore = "minutes: 200 nodes with 2,000 flows"]
fn a_large_world_keeps_every_invariant() {
    let tally = play(1, &Shape { nodes: 200, flows: 2_000, steps: 60 });
    println!("{tally:?}");
    assert_useful(&tally, 1);
}

#[test]
#[ignore = "many minutes: 1,000 seeds"]
fn a_thousand_worlds_keep_every_invariant() {
    let mut wrong = Vec::new();
    for seed in 1..=1_000 {
        let played = std::panic::catch_unwind(|| {
            let tally = play(seed, &SMALL);
            println!("seed {seed}: {tally:?}");
            assert_useful(&tally, seed);
        });
        if played.is_err() {
            wrong.push(seed);
        }
    }
    assert!(wrong.is_empty(), "seeds {wrong:?}");
}

/// 1,000 nodes of which 300 an hour leave and as many come, each connected to three or more, with
/// 200 tunnels: what such a world costs.
#[test]
#[ignore = "minutes, and gigabytes: 1,000 nodes with churn"]
fn a_thousand_nodes_come_and_go() {
    const NODES: usize = 1_000;
    const VIRTUAL_S: u64 = 120;
    let mut random = Pcg64Mcg::seed_from_u64(1);
    let mut world = World::new(1, START);
    world.stay_lean();
    let begun = std::time::Instant::now();
    let join = |world: &mut World, random: &mut Pcg64Mcg, index: usize| {
        let others: Vec<usize> = (0..index).filter(|other| world.is_running(*other)).collect();
        // More links are possible than are wanted, so that lost ones can be replaced.
        let near: Vec<usize> = others.sample(random, 2 * LINKS).copied().collect();
        for other in &near {
            let delay_ms = random.random_range(2.0..40.0);
            world.set_link(*other, index, LinkModel::delay(delay_ms));
        }
        world.add_node(&near[..near.len().min(LINKS)], PathPolicy::default(), Intervals::default());
    };
    for index in 0..NODES {
        join(&mut world, &mut random, index);
        world.run_for(Duration::from_millis(20));
    }
    let report = |world: &World, what: &str| {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let memory = status.lines().find(|line| line.starts_with("VmRSS")).unwrap_or("VmRSS: ?");
        // Time on a processor, in the nanoseconds of the scheduler: the machine may be busy.
        let spent = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
        let spent_ns: f64 = spent.split(' ').next().and_then(|ns| ns.parse().ok()).unwrap_or(0.0);
        let (now_s, wall_s) = (world.now().since(START).as_secs(), begun.elapsed().as_secs());
        let spent_s = spent_ns / 1e9;
        println!("{what}: {now_s} s of the world in {spent_s:.0} s ({wall_s} s passed), {memory}");
    };
    report(&world, "joined");
    for tunnel in 1..=200 {
        let ends: Vec<usize> =
            (0..NODES).collect::<Vec<_>>().sample(&mut random, 2).copied().collect();
        let command = Command::OpenTunnel {
            tunnel: TunnelId(tunnel),
            destination: world.id(ends[1]),
            forced: None,
            objective: Objective::Balanced,
            beside: None,
            reserve: None,
        };
        world.command(ends[0], command);
        world.send(ends[0], TunnelId(tunnel), SOME);
    }
    let mut count = NODES;
    for step in 0..VIRTUAL_S / 12 {
        let running: Vec<usize> = (0..count).filter(|node| world.is_running(*node)).collect();
        world.kill(*running.choose(&mut random).expect("many are running"));
        world.run_for(Duration::from_secs(6));
        join(&mut world, &mut random, count);
        count += 1;
        world.run_for(Duration::from_secs(6));
        assert_eq!(world.breaches(), [] as [String; 0]);
        if step % 5 == 0 {
            report(&world, "churn");
        }
    }
    // Who joined last was told of at most 512 nodes by each peer; the others say it themselves.
    world.run_for(REFRESH_QUIET + Duration::from_secs(2));
    let running = (0..count).filter(|node| world.is_running(*node));
    let known: Vec<usize> =
        running.map(|node| world.engine(node).graph().origins().count()).collect();
    report(&world, "done");
    println!("origins known: {:?} to {:?}", known.iter().min(), known.iter().max());
    assert!(known.iter().all(|known| *known >= NODES), "{known:?}");
}
