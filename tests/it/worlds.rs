//! Many nodes and flows with faults, in simulated worlds: what must hold at every step.
//!
//! CI plays a few small worlds. The two that take long are run by hand before a release:
//! `cargo test --release --no-default-features --test it -- --ignored worlds`.

use std::collections::BTreeSet;
use std::time::Duration;

use meshwise::engine::Intervals;
use meshwise::engine::event::Command;
use meshwise::engine::overlay::Objective;
use meshwise::engine::route::PathPolicy;
use meshwise::engine::types::{Timestamp, TunnelId};
use meshwise::sim::{Fate, LinkModel, World};
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;

const START: Timestamp = Timestamp(1_760_000_000_000_000);
const STEP: Duration = Duration::from_millis(500);
/// Links of a node when it joins: to these many nodes before it.
const LINKS: usize = 3;
/// A dead neighbour is known to be dead after so long: three link probes, and their time-outs.
const DETECTED: Duration = Duration::from_secs(6);

struct Shape {
    nodes: usize,
    flows: usize,
    steps: usize,
}

/// What happened, to compare runs by.
#[derive(Debug, Default, PartialEq)]
struct Tally {
    delivered: usize,
    lost: usize,
    no_link: usize,
    without_route: usize,
    decisions: usize,
}

/// A random connected graph, flows between random pairs, and a fault every few steps: a link falls
/// silent, comes back, gets slow or lossy; a few nodes die.
fn play(seed: u64, shape: &Shape) -> Tally {
    let mut random = Pcg64Mcg::seed_from_u64(seed);
    let mut world = World::new(seed, START);
    let mut edges: Vec<(usize, usize, LinkModel)> = Vec::new();
    for index in 0..shape.nodes {
        let before: Vec<usize> = (0..index).collect();
        let peers: Vec<usize> = before.sample(&mut random, LINKS).copied().collect();
        for peer in &peers {
            let delay_ms = random.random_range(2.0..40.0);
            let model = LinkModel { delay_ms, jitter_ms: 1.0, loss: 0.0 };
            world.set_link(*peer, index, model);
            edges.push((*peer, index, model));
        }
        world.add_node(&peers, PathPolicy::default(), Intervals::default());
    }
    world.run_for(Duration::from_secs(8));
    let mut flows = Vec::new();
    for flow in 0..shape.flows {
        let ends: Vec<usize> =
            (0..shape.nodes).collect::<Vec<_>>().sample(&mut random, 2).copied().collect();
        let tunnel = TunnelId(flow as u16 + 1);
        let command = Command::OpenTunnel {
            tunnel,
            destination: world.id(ends[1]),
            forced: None,
            objective: Objective::Balanced,
            beside: None,
            reserve: None,
        };
        world.command(ends[0], command);
        flows.push((ends[0], ends[1], tunnel));
    }
    world.run_for(Duration::from_secs(3));

    let mut dead: BTreeSet<usize> = BTreeSet::new();
    let mut silent_since: Vec<(usize, usize, Timestamp)> = Vec::new();
    let mut tally = Tally::default();
    for step in 0..shape.steps {
        if step % 4 == 1 {
            let (a, b, model) = *edges.choose(&mut random).expect("there are links");
            silent_since.retain(|silent| (silent.0, silent.1) != (a, b));
            world.set_link(a, b, model);
            match random.random_range(0..5) {
                0 => {
                    world.set_link(a, b, LinkModel { loss: 1.0, ..model });
                    silent_since.push((a, b, world.now()));
                }
                1 => world.set_link(a, b, LinkModel { delay_ms: model.delay_ms + 100.0, ..model }),
                2 => world.set_link(a, b, LinkModel { loss: 0.3, ..model }),
                3 if dead.len() < shape.nodes / 20 => {
                    let victim = random.random_range(0..shape.nodes);
                    if dead.insert(victim) {
                        world.kill(victim);
                    }
                }
                _ => {
                    if let Some((a, b, _)) = silent_since.pop() {
                        let edge = edges.iter().find(|edge| (edge.0, edge.1) == (a, b));
                        world.set_link(a, b, edge.expect("a link of this world").2);
                    }
                }
            }
        }
        world.run_for(STEP);
        for &(source, target, tunnel) in flows.iter().filter(|(source, ..)| !dead.contains(source))
        {
            check(&world, source, target, tunnel, seed);
            for &(a, b, since) in &silent_since {
                // Detected long ago: nobody hands a datagram to that neighbour any more, unless
                // there is no other way at all.
                if world.now().since(since) > DETECTED {
                    let binding = &world.forwarding(source).tunnels[&tunnel];
                    let route = binding.route.as_ref().filter(|_| binding.reachable);
                    let (a, b) = (world.id(a), world.id(b));
                    let uses = route.is_some_and(|route| {
                        route.links().any(|link| link == (a, b) || link == (b, a))
                    });
                    assert!(!uses, "seed {seed} step {step}: {source} uses a dead link");
                }
            }
            match world.forward(source, tunnel) {
                Some((at, fate)) => {
                    let distinct: BTreeSet<usize> = at.iter().copied().collect();
                    assert_eq!(distinct.len(), at.len(), "seed {seed}: a loop {at:?}");
                    match fate {
                        Fate::Delivered => {
                            assert_eq!(at.last(), Some(&target), "seed {seed}");
                            tally.delivered += 1;
                        }
                        Fate::Lost => tally.lost += 1,
                        Fate::NoLink => tally.no_link += 1,
                    }
                }
                None => tally.without_route += 1,
            }
        }
    }
    tally.decisions = (0..shape.nodes).map(|node| world.decisions(node).len()).sum();
    tally
}

/// What holds for the picture that a node forwards by, whatever happened.
fn check(world: &World, source: usize, target: usize, tunnel: TunnelId, seed: u64) {
    let Some(binding) = world.forwarding(source).tunnels.get(&tunnel) else { return };
    assert_eq!(binding.destination, world.id(target), "seed {seed}");
    let Some(route) = &binding.route else { return };
    assert_eq!(route.nodes()[0], world.id(source), "seed {seed}");
    assert_eq!(route.nodes().last(), Some(&world.id(target)), "seed {seed}");
    assert!(route.hop_count() <= PathPolicy::default().max_hops, "seed {seed}: {route}");
    if let Some(backup) = &binding.backup {
        let shares = backup.route.relays().iter().any(|relay| route.relays().contains(relay));
        assert!(!shares, "seed {seed}: {route} and {} share a relay", backup.route);
        assert!(backup.route_id > binding.route_id, "seed {seed}");
        assert_eq!(backup.route.nodes().last(), Some(&world.id(target)), "seed {seed}");
    }
}

/// Most datagrams arrive although links and nodes fail all the time.
fn assert_useful(tally: &Tally, seed: u64) {
    let all = tally.delivered + tally.lost + tally.no_link + tally.without_route;
    assert!(tally.delivered * 100 > all * 85, "seed {seed}: {tally:?}");
}

#[test]
fn small_worlds_with_faults_keep_every_invariant() {
    let shape = Shape { nodes: 24, flows: 60, steps: 40 };
    for seed in 1..=6 {
        assert_useful(&play(seed, &shape), seed);
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
    let shape = Shape { nodes: 200, flows: 2_000, steps: 60 };
    assert_useful(&play(1, &shape), 1);
}

#[test]
#[ignore = "tens of minutes: 1,000 seeds"]
fn a_thousand_worlds_keep_every_invariant() {
    let shape = Shape { nodes: 24, flows: 60, steps: 40 };
    for seed in 1..=1_000 {
        assert_useful(&play(seed, &shape), seed);
    }
}
