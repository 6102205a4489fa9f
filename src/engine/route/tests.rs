//! The router on small worlds.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::candidate::Knowledge;
use super::*;
use crate::engine::forward::Backup;
use crate::engine::measure::{LinkHistories, LinkQuality, RouteHistories};
use crate::engine::overlay::wire::Objective;
use crate::engine::predict::schema::index_of;
use crate::engine::predict::{
    FeatureVector, LastValue, Prediction, QualityModel, Ranking, RoutePredictor,
};
use crate::engine::types::{NodeId, Route, Timestamp, TunnelId};

mod exploring;
mod standing;

const TUNNEL: TunnelId = TunnelId(1);

fn node(byte: u8) -> NodeId {
    NodeId([byte; 8])
}

fn route(nodes: &[u8]) -> Route {
    Route::new(nodes.iter().copied().map(node).collect::<Vec<_>>()).unwrap()
}

fn link(rtt_ms: f64) -> LinkQuality {
    LinkQuality { rtt_ms, jitter_ms: 0.0, loss: 0.0, bandwidth: None, utilisation: 0.0 }
}

/// S=0, T=9, relays 1 (10 ms links), 2 (20 ms links), joined 1-2.
struct World {
    graph: OverlayGraph,
    links: LinkHistories,
    histories: RouteHistories,
    predictor: RoutePredictor,
    router: IntelligentRouter,
    /// Of the route in use.
    turned_bad: bool,
    sequence: u64,
}

impl World {
    fn new() -> Self {
        let links = [(0, 1, 10.0), (1, 9, 10.0), (0, 2, 20.0), (2, 9, 20.0), (1, 2, 5.0)];
        Self::with(PathPolicy::default(), &links)
    }

    fn with(policy: PathPolicy, links: &[(u8, u8, f64)]) -> Self {
        let mut world = Self {
            graph: OverlayGraph::default(),
            links: LinkHistories::default(),
            histories: RouteHistories::default(),
            predictor: RoutePredictor::new(true),
            router: IntelligentRouter::new(node(0), policy, 7),
            turned_bad: false,
            sequence: 0,
        };
        world.links(links);
        world
    }

    fn links(&mut self, links: &[(u8, u8, f64)]) {
        let links: Vec<_> = links.iter().map(|(a, b, ms)| (*a, *b, link(*ms))).collect();
        self.qualities(&links);
    }

    /// These are all links, in both directions.
    fn qualities(&mut self, links: &[(u8, u8, LinkQuality)]) {
        self.sequence += 1;
        for me in 0..=9 {
            let mine = links.iter().filter_map(|(a, b, quality)| match me {
                me if *a == me => Some((node(*b), *quality)),
                me if *b == me => Some((node(*a), *quality)),
                _ => None,
            });
            let mine: BTreeMap<NodeId, LinkQuality> = mine.collect();
            let said = mine.iter().map(|(other, quality)| (*other, Some(*quality)));
            self.links.advertised(node(me), Timestamp(0), said);
            self.graph.accept(node(me), self.sequence, mine, Timestamp(0)).unwrap();
        }
    }

    /// Five probes over a route took this long.
    fn measured(&mut self, nodes: &[u8], ms: f64) {
        for _ in 0..5 {
            self.histories.probed(&route(nodes), Timestamp(1), Some((ms * 1e3) as u64));
        }
    }

    fn kill(&mut self, nodes: &[u8]) {
        for _ in 0..3 {
            self.histories.probed(&route(nodes), Timestamp(1), None);
        }
    }

    fn decide(&mut self, at_s: u64) -> Decision {
        self.decide_for(TUNNEL, Timestamp(at_s * 1_000_000))
    }

    fn decide_for(&mut self, tunnel: TunnelId, at: Timestamp) -> Decision {
        let mut know = Knowledge {
            graph: &mut self.graph,
            links: &self.links,
            histories: &self.histories,
            predictor: &mut self.predictor,
        };
        self.router.decide(tunnel, &mut know, self.turned_bad, at).unwrap()
    }

    fn open(&mut self) {
        self.open_as(TUNNEL, Objective::Balanced, None);
    }

    fn open_as(&mut self, tunnel: TunnelId, objective: Objective, beside: Option<TunnelId>) {
        assert!(self.router.open(tunnel, node(9), None, objective, beside));
    }

    fn used(&self) -> &Destination {
        self.router.tunnel(TUNNEL).unwrap()
    }

    fn current(&self) -> Route {
        self.current_of(TUNNEL)
    }

    fn current_of(&self, tunnel: TunnelId) -> Route {
        self.router.tunnel(tunnel).unwrap().current.clone().unwrap().0
    }

    fn backup_of(&self, tunnel: TunnelId) -> Route {
        self.router.tunnel(tunnel).unwrap().backup.clone().unwrap().route
    }
}

#[test]
fn the_best_route_is_chosen_and_its_backup_is_disjoint() {
    let mut world = World::new();
    world.open();
    let decision = world.decide(0);
    assert_eq!((decision.reason, decision.changed), (Reason::First, true));
    assert_eq!(world.current(), route(&[0, 1, 9]));
    let expected = Backup { route: route(&[0, 2, 9]), route_id: 2 };
    assert_eq!(world.used().backup, Some(expected));
    assert_eq!(decision.candidates.len(), 4);
}

#[test]
fn a_route_that_turned_bad_is_left_by_margin_and_hold() {
    let mut world = World::new();
    world.open();
    world.decide(0);
    for _ in 0..5 {
        world.histories.probed(&route(&[0, 1, 9]), Timestamp(1), Some(200_000));
    }
    assert_eq!(world.decide(1).reason, Reason::Held);
    assert_eq!(world.decide(3).reason, Reason::Better);
    assert_ne!(world.current(), route(&[0, 1, 9]));
}

/// Compares by the forecast, with this margin; the model forecasts the last value.
fn with_margin(world: &mut World, margin: f64) {
    world.predictor.set_model(Some(Arc::new(LastValue)));
    world.predictor.comparing_mut().fix(Ranking { margin, ..Ranking::PLAIN });
}

/// A tunnel on 0-1-9, whose last round trip is `in_use_ms`, beside 0-2-9 with `other_ms`.
fn decided_with(margin: f64, in_use_ms: f64, other_ms: f64) -> Decision {
    let mut policy = PathPolicy::default();
    policy.switching.margin = 0.0;
    let links = [(0, 1, 10.0), (1, 9, 10.0), (0, 2, 20.0), (2, 9, 20.0), (1, 2, 5.0)];
    let mut world = World::with(policy, &links);
    with_margin(&mut world, margin);
    world.router.open(TUNNEL, node(9), None, Objective::default(), None);
    world.decide(0);
    assert_eq!(world.current(), route(&[0, 1, 9]));
    let measured = [(&[0, 1, 9][..], in_use_ms), (&[0, 2, 9], other_ms)];
    for (nodes, ms) in measured {
        for _ in 0..5 {
            let rtt_us = (ms * 1e3) as u64;
            world.histories.probed(&route(nodes), Timestamp(1), Some(rtt_us));
        }
    }
    for nodes in [&[0, 1, 2, 9][..], &[0, 2, 1, 9]] {
        world.histories.probed(&route(nodes), Timestamp(1), Some(900_000));
    }
    world.decide(10)
}

#[test]
fn the_route_in_use_is_left_only_for_a_bound_that_is_lower_by_the_margin() {
    for (margin, other_ms, reason) in [
        (0.0, 90.0, Reason::Better),
        (0.2, 90.0, Reason::Best),
        (0.2, 81.0, Reason::Best),
        (0.2, 79.0, Reason::Better),
        (0.2, 70.0, Reason::Better),
        (0.2, 110.0, Reason::Best),
        (1.0, 1.0, Reason::Best),
    ] {
        let decision = decided_with(margin, 100.0, other_ms);
        assert_eq!(decision.reason, reason, "{margin} {other_ms}");
        assert_eq!(decision.ranking.margin, margin);
    }
}

#[test]
fn the_counterfactual_of_a_decision_is_where_the_router_turns() {
    for (margin, in_use_ms, other_ms) in [(0.0, 100.0, 90.0), (0.2, 100.0, 90.0), (0.2, 80.0, 95.0)]
    {
        let policy = PathPolicy {
            switching: SwitchingPolicy { margin: 0.0, ..SwitchingPolicy::default() },
            ..PathPolicy::default()
        };
        let stays = decided_with(margin, in_use_ms, in_use_ms * 1.5);
        assert_eq!(stays.reason, Reason::Best);
        let found = counterfactual(&policy, &stays).unwrap();
        let below = found.falls_below_ms.unwrap();
        assert!(!decided_with(margin, in_use_ms, below + 0.01).changed, "{below}");
        assert!(decided_with(margin, in_use_ms, below - 0.01).changed, "{below}");
        let stays = decided_with(margin, other_ms * 0.9, other_ms);
        let above = counterfactual(&policy, &stays).unwrap().rises_above_ms.unwrap();
        assert!(!decided_with(margin, above - 0.01, other_ms).changed, "{above}");
        assert!(decided_with(margin, above + 0.01, other_ms).changed, "{above}");
    }
}

#[test]
fn a_dead_route_is_left_at_once_for_one_that_shares_no_relay() {
    let mut world = World::new();
    // The way over both relays is far better than the way over the second alone.
    world.links(&[(0, 1, 10.0), (1, 9, 10.0), (0, 2, 60.0), (2, 9, 10.0), (1, 2, 5.0)]);
    world.open();
    world.decide(0);
    for _ in 0..3 {
        world.histories.probed(&route(&[0, 1, 9]), Timestamp(1), None);
    }
    assert_eq!(world.decide(0).reason, Reason::CurrentDead);
    assert_eq!(world.current(), route(&[0, 2, 9]));
}

#[test]
fn a_withdrawn_link_kills_its_routes() {
    let mut world = World::new();
    world.open();
    world.decide(0);
    world.links(&[(0, 1, 10.0), (0, 2, 20.0), (2, 9, 20.0), (1, 2, 5.0)]);
    assert_eq!(world.decide(0).reason, Reason::CurrentDead);
    assert_eq!(world.current(), route(&[0, 2, 9]));
    world.links(&[(0, 1, 10.0)]);
    let decision = world.decide(1);
    assert_eq!((decision.reason, decision.chosen), (Reason::NoRoute, None));
}

#[test]
fn a_forced_path_stays() {
    let mut world = World::new();
    let forced = Some(route(&[0, 2, 1, 9]));
    world.router.open(TUNNEL, node(9), forced, Objective::Balanced, None);
    let decision = world.decide(0);
    assert_eq!((decision.reason, decision.candidates.len()), (Reason::Forced, 1));
    assert_eq!(world.current(), route(&[0, 2, 1, 9]));
    assert_eq!(world.used().backup, None, "it is not left");
}

#[test]
fn a_route_number_names_one_route_and_the_backup_takes_its_own_along() {
    let mut world = World::new();
    world.open();
    world.decide(0);
    let kill = |world: &mut World, relay: u8| {
        for _ in 0..3 {
            world.histories.probed(&route(&[0, relay, 9]), Timestamp(1), None);
        }
        world.decide(0);
        let used = world.used();
        (used.changes, used.route_id, used.backup.as_ref().map(|backup| backup.route_id))
    };
    assert_eq!(kill(&mut world, 1), (2, 2, None), "the backup, and no other way that lives");
    world.histories.probed(&route(&[0, 1, 9]), Timestamp(2), Some(1_000));
    world.decide(0);
    let backup = world.used().backup.clone().unwrap();
    assert_eq!((backup.route, backup.route_id), (route(&[0, 1, 9]), 3), "a new number");
    assert_eq!(kill(&mut world, 2).1, 3);
}

/// S=0 and T=9 with the relays 1, 2, ... in between, each at so many milliseconds of round trip.
fn parallel(policy: PathPolicy, ms: &[f64]) -> World {
    let relays = (1u8..).zip(ms);
    let links: Vec<_> =
        relays.flat_map(|(relay, ms)| [(0, relay, ms / 2.0), (relay, 9, ms / 2.0)]).collect();
    World::with(policy, &links)
}

#[test]
fn the_backup_is_the_best_scored_one_and_not_the_shortest() {
    let mut world = parallel(PathPolicy::default(), &[20.0, 30.0, 40.0]);
    world.open();
    world.decide(0);
    assert_eq!(world.backup_of(TUNNEL), route(&[0, 2, 9]));
    world.measured(&[0, 2, 9], 400.0);
    world.decide(1);
    let backup = world.used().backup.clone().unwrap();
    assert_eq!((backup.route, backup.route_id), (route(&[0, 3, 9]), 3), "a new number");
    world.kill(&[0, 3, 9]);
    world.decide(2);
    assert_eq!(world.backup_of(TUNNEL), route(&[0, 2, 9]), "it lives at least");
    world.kill(&[0, 2, 9]);
    world.decide(3);
    assert_eq!(world.used().backup, None);
}

#[test]
fn a_dead_route_is_left_for_its_backup_even_when_another_is_a_little_better_by_then() {
    let mut world = parallel(PathPolicy::default(), &[20.0, 30.0, 32.0]);
    world.open();
    world.decide(0);
    world.measured(&[0, 3, 9], 28.0);
    world.decide(1);
    let backup = world.used().backup.clone().unwrap();
    assert_eq!(backup.route, route(&[0, 2, 9]), "it is good enough to be kept");
    world.kill(&[0, 1, 9]);
    assert_eq!(world.decide(2).reason, Reason::CurrentDead);
    let used = world.used();
    assert_eq!((world.current(), used.route_id), (backup.route, backup.route_id));
}

#[test]
fn the_backups_of_many_tunnels_are_spread_over_what_is_equally_good() {
    let mut world = parallel(PathPolicy::default(), &[20.0, 30.0, 32.0, 34.0, 600.0]);
    for tunnel in 0..12 {
        world.open_as(TunnelId(tunnel), Objective::Balanced, None);
        world.decide_for(TunnelId(tunnel), Timestamp(0));
    }
    let mut over = BTreeMap::new();
    for tunnel in 0..12 {
        assert_eq!(world.current_of(TunnelId(tunnel)), route(&[0, 1, 9]));
        *over.entry(world.backup_of(TunnelId(tunnel)).relays()[0]).or_insert(0) += 1;
    }
    assert_eq!(over, [(node(2), 4), (node(3), 4), (node(4), 4)].into());
}

#[test]
fn not_all_tunnels_move_at_once_to_what_is_merely_better_but_all_leave_what_is_dead() {
    let mut world = parallel(PathPolicy::default(), &[20.0, 30.0]);
    let tunnels = (0..40).map(TunnelId);
    for tunnel in tunnels.clone() {
        world.open_as(tunnel, Objective::Balanced, None);
        world.decide_for(tunnel, Timestamp(0));
    }
    world.measured(&[0, 1, 9], 400.0);
    world.measured(&[0, 2, 9], 30.0);
    let round = |at_ms: u64, world: &mut World| {
        let all = tunnels.clone().map(|t| world.decide_for(t, Timestamp(at_ms * 1_000)).reason);
        let all: Vec<Reason> = all.collect();
        let count = |reason| all.iter().filter(|other| **other == reason).count();
        (count(Reason::Better), count(Reason::Capped), count(Reason::CurrentDead))
    };
    assert_eq!(round(5_000, &mut world), (5, 35, 0), "an eighth");
    assert_eq!(round(5_499, &mut world), (0, 35, 0));
    assert_eq!(round(5_500, &mut world), (5, 30, 0));
    world.kill(&[0, 1, 9]);
    assert_eq!(round(5_501, &mut world), (0, 0, 30));
}

#[test]
fn tunnels_beside_one_another_share_no_relay_where_that_is_possible() {
    let mut world = parallel(PathPolicy::default(), &[20.0, 30.0, 300.0]);
    let [first, second, third, fourth] = [1, 2, 3, 4].map(TunnelId);
    world.open_as(first, Objective::Balanced, None);
    for tunnel in [second, third, fourth] {
        world.open_as(tunnel, Objective::Balanced, Some(first));
    }
    let decide = |world: &mut World, at| {
        let reason = world.decide_for(fourth, Timestamp(at)).reason;
        assert_eq!(
            (reason, &world.router.tunnel(fourth).unwrap().current),
            (Reason::NoRoute, &None)
        );
        [first, second, third].map(|t| {
            world.decide_for(t, Timestamp(at));
            world.current_of(t).relays()[0]
        })
    };
    for tunnel in [first, second, third] {
        world.decide_for(tunnel, Timestamp(0));
    }
    let apart = [1, 2, 3].map(node);
    assert_eq!(decide(&mut world, 0), apart, "nothing is left for the fourth");
    assert_eq!(decide(&mut world, 9_000_000), apart, "and nobody chases another");
    // The second's relay becomes the best: the first takes it, and the others make room.
    world.measured(&[0, 1, 9], 90.0);
    world.measured(&[0, 2, 9], 10.0);
    assert_eq!(decide(&mut world, 20_000_000), [2, 1, 3].map(node));
    world.router.close(third);
    world.decide_for(fourth, Timestamp(30_000_000));
    assert_eq!(world.current_of(fourth), route(&[0, 3, 9]), "a way came");
    world.kill(&[0, 3, 9]);
    world.decide_for(fourth, Timestamp(30_000_000));
    assert_ne!(world.current_of(fourth), route(&[0, 3, 9]), "who has a route shares when it dies");
    world.router.close(fourth);
    world.router.close(first);
    let decision = world.decide_for(second, Timestamp(30_000_000));
    assert!(decision.changed && decision.wanted.avoid.is_empty(), "{decision:?}");
    assert_eq!(world.current_of(second), route(&[0, 2, 9]));
}

#[test]
fn a_way_apart_is_looked_for_beyond_the_candidates() {
    // One shortest path and its backup: the third way is no candidate of itself.
    let policy = PathPolicy { candidates: 1, ..PathPolicy::default() };
    let mut world = parallel(policy, &[20.0, 30.0, 40.0]);
    let first = TunnelId(1);
    for (tunnel, beside, relay) in [(1, None, 1), (2, Some(first), 2), (3, Some(first), 3)] {
        world.open_as(TunnelId(tunnel), Objective::Throughput, beside);
        let decision = world.decide_for(TunnelId(tunnel), Timestamp(0));
        assert_eq!(world.current_of(TunnelId(tunnel)), route(&[0, relay, 9]));
        assert_eq!(decision.wanted.avoid.len(), usize::from(tunnel) - 1);
    }
    // And where all have been taken, there is none.
    world.open_as(TunnelId(4), Objective::Throughput, Some(first));
    assert_eq!(world.decide_for(TunnelId(4), Timestamp(0)).reason, Reason::NoRoute);
}

#[test]
fn another_route_with_a_relay_in_common_is_better_than_the_same_one() {
    // From 1 there are two ways to the far end, and none without it.
    let links = [(0, 1, 10.0), (1, 9, 10.0), (1, 2, 10.0), (2, 9, 10.0)];
    let mut world = World::with(PathPolicy::default(), &links);
    world.open();
    world.decide(0);
    for (tunnel, expected) in [(2, Some(route(&[0, 1, 2, 9]))), (3, None)] {
        world.open_as(TunnelId(tunnel), Objective::Throughput, Some(TUNNEL));
        world.decide_for(TunnelId(tunnel), Timestamp(0));
        let current = world.router.tunnel(TunnelId(tunnel)).unwrap().current.clone();
        assert_eq!(current.map(|(route, _)| route), expected);
    }
}

/// Four disjoint ways of two links each, one for every objective.
fn four_ways() -> World {
    let mut world = World::new();
    let way = |relay: u8, ms: f64, loss: f64, bandwidth: f64| {
        let quality = LinkQuality { loss, bandwidth: Some(bandwidth), ..link(ms / 2.0) };
        [(0, relay, quality), (relay, 9, quality)]
    };
    let fast = way(1, 10.0, 0.10, 50_000.0);
    let wide = way(2, 160.0, 0.02, 20_000_000.0);
    let clean = way(3, 150.0, 0.0, 60_000.0);
    let middling = way(4, 70.0, 0.02, 1_000_000.0);
    world.qualities(&[fast, wide, clean, middling].concat());
    world
}

#[test]
fn every_objective_takes_another_way() {
    for (objective, relay) in [
        (Objective::Latency, 1),
        (Objective::Throughput, 2),
        (Objective::Reliability, 3),
        (Objective::Balanced, 4),
    ] {
        let mut world = four_ways();
        world.open_as(TUNNEL, objective, None);
        let decision = world.decide(0);
        let scores: Vec<_> =
            decision.candidates.iter().map(|c| (c.route.relays()[0].0[0], c.score)).collect();
        assert_eq!(world.current(), route(&[0, relay, 9]), "{objective:?} {scores:?}");
        assert_eq!(decision.wanted.objective, objective);
    }
}

/// Says that the way over relay 4 delivers most, whatever is advertised.
struct Foresees;

impl QualityModel for Foresees {
    fn version(&self) -> &str {
        "foresees"
    }

    fn predict(&self, features: &FeatureVector) -> Option<Prediction> {
        let narrowest = features[index_of("link_bandwidth_min").unwrap()];
        let best = narrowest == 1_000_000.0;
        let bandwidth = Some(if best { 30_000_000.0 } else { 100_000.0 });
        let delivery = Some(if best { 0.999 } else { 0.9 });
        Some(Prediction { bandwidth, delivery, ..LastValue.predict(features)? })
    }
}

#[test]
fn forecasts_of_bandwidth_and_of_loss_decide_for_who_wants_room_or_few_losses() {
    for objective in [Objective::Throughput, Objective::Reliability] {
        let mut world = four_ways();
        world.open_as(TUNNEL, objective, None);
        world.decide(0);
        assert_ne!(world.current(), route(&[0, 4, 9]), "{objective:?}");
        let mut world = four_ways();
        world.predictor.set_model(Some(Arc::new(Foresees)));
        world.open_as(TUNNEL, objective, None);
        let decision = world.decide(0);
        assert_eq!(world.current(), route(&[0, 4, 9]), "{objective:?}");
        assert_eq!(decision.candidates[0].forecast.learned().unwrap().delivery, Some(0.999));
        let clean = decision.candidates.iter().find(|c| c.route.relays() == [node(3)]).unwrap();
        assert!(clean.score < clean.baseline_score, "{objective:?} {clean:?}");
    }
}

#[test]
fn the_counterfactual_is_exact_for_every_objective() {
    // What a model says of the two ways that are left turns the decision where it was said to.
    let decided = |objective, in_use_ms: f64, other_ms: f64| {
        let mut policy = PathPolicy::default();
        policy.switching.margin = 0.0;
        let mut world = World::with(policy, &[]);
        let quality = |loss, bandwidth| LinkQuality { loss, bandwidth, ..link(10.0) };
        let (a, b) = (quality(0.001, Some(900_000.0)), quality(0.003, Some(800_000.0)));
        world.qualities(&[(0, 1, a), (1, 9, b), (0, 2, b), (2, 9, b)]);
        with_margin(&mut world, 0.1);
        world.open_as(TUNNEL, objective, None);
        world.decide(0);
        assert_eq!(world.current(), route(&[0, 1, 9]));
        world.measured(&[0, 1, 9], in_use_ms);
        world.measured(&[0, 2, 9], other_ms);
        world.decide(10)
    };
    let mut policy = PathPolicy::default();
    policy.switching.margin = 0.0;
    for objective in [Objective::Latency, Objective::Throughput, Objective::Reliability] {
        let stays = decided(objective, 100.0, 150.0);
        assert_eq!(stays.reason, Reason::Best, "{objective:?}");
        let found = counterfactual(&policy, &stays).unwrap();
        let mut turns = 0;
        if let Some(below) = found.falls_below_ms {
            assert!(!decided(objective, 100.0, below + 0.01).changed, "{objective:?} {below}");
            assert!(decided(objective, 100.0, below - 0.01).changed, "{objective:?} {below}");
            turns += 1;
        }
        if let Some(above) = found.rises_above_ms {
            assert!(!decided(objective, above - 0.01, 150.0).changed, "{objective:?} {above}");
            assert!(decided(objective, above + 0.01, 150.0).changed, "{objective:?} {above}");
            turns += 1;
        }
        assert!(turns > 0 || objective == Objective::Reliability, "{objective:?}");
    }
}

#[test]
fn the_direct_route_stays_until_a_detour_is_lower_by_the_margin_and_is_returned_to() {
    let switching = SwitchingPolicy { margin: 0.0, hold: Duration::ZERO };
    let policy = PathPolicy { switching, ..PathPolicy::default() };
    let links = [(0, 9, 100.0), (0, 1, 20.0), (1, 9, 20.0), (0, 2, 21.0), (2, 9, 21.0)];
    let mut world = World::with(policy, &links);
    with_margin(&mut world, 0.2);
    world.open_as(TUNNEL, Objective::Latency, None);
    let mut use_of = |direct_ms: f64, first_ms: f64, second_ms: f64, at_s| {
        world.measured(&[0, 9], direct_ms);
        world.measured(&[0, 1, 9], first_ms);
        world.measured(&[0, 2, 9], second_ms);
        world.decide(at_s);
        world.current()
    };
    assert_eq!(use_of(100.0, 85.0, 95.0, 1), route(&[0, 9]), "not by a fifth");
    assert_eq!(use_of(100.0, 60.0, 95.0, 2), route(&[0, 1, 9]));
    assert_eq!(use_of(100.0, 60.0, 58.0, 3), route(&[0, 2, 9]), "no margin between detours");
    assert_eq!(use_of(100.0, 85.0, 85.0, 4), route(&[0, 9]));
}

#[test]
fn the_direct_link_is_weighed_and_stayed_on_whatever_others_advertise_and_however_small_the_margin()
{
    // Nine ways that claim to be quicker than the direct link.
    let ways = (1..=8).flat_map(|relay| [(0, relay, 1.0), (relay, 9, 1.0)]);
    let links: Vec<_> = ways.chain([(1, 2, 1.0), (0, 9, 100.0)]).collect();
    let mut world = World::with(PathPolicy::default(), &links);
    with_margin(&mut world, 0.0);
    world.open_as(TUNNEL, Objective::Latency, None);
    let decision = world.decide(0);
    let direct = |c: &&Candidate| c.route == route(&[0, 9]);
    assert!(decision.candidates.iter().find(direct).is_some_and(|c| c.stays && c.margin == 0.0));
    // A second path keeps off the first one's route, and cannot stay on it.
    world.measured(&[0, 9], 0.1);
    world.decide(10);
    assert_eq!(world.current(), route(&[0, 9]));
    world.open_as(TunnelId(2), Objective::Latency, Some(TUNNEL));
    let beside = world.decide_for(TunnelId(2), Timestamp(11_000_000));
    assert!(beside.candidates.iter().find(direct).is_some_and(|c| !c.stays));
}
