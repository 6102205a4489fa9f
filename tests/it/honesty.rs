//! Relays that answer probes and do not pass on what they should, in simulated worlds: they are found
//! out by what real traffic meets, avoided, and tried again at a bounded rate.

use std::time::Duration;

use meshwise::engine::Intervals;
use meshwise::engine::event::{Command, Input};
use meshwise::engine::measure::RouteReport;
use meshwise::engine::overlay::Objective;
use meshwise::engine::route::{Destination, PathPolicy};
use meshwise::engine::traffic::message::Bottleneck;
use meshwise::engine::types::{NodeId, Timestamp, TunnelId};
use meshwise::sim::{Fate, LinkModel, Traffic, World};

const START: Timestamp = Timestamp(1_760_000_000_000_000);
const TUNNEL: TunnelId = TunnelId(1);
/// Time that a report covers, as in the data plane.
const REPORT: Duration = Duration::from_millis(500);
const S: usize = 0;
const A: usize = 1;
const B: usize = 2;
const T: usize = 3;

/// S-A-T at 40 ms round trip, S-B-T at 60 ms, and nothing else; a tunnel from S to T.
fn diamond(seed: u64, objective: Objective, reserve: Option<u64>) -> World {
    let mut world = World::new(seed, START);
    for index in [S, A, B, T] {
        let bootstrap: &[usize] = match index {
            S => &[],
            T => &[A, B],
            _ => &[S],
        };
        world.add_node(bootstrap, PathPolicy::default(), Intervals::default());
    }
    for (relay, delay_ms) in [(A, 10.0), (B, 15.0)] {
        for end in [S, T] {
            world.set_link(end, relay, LinkModel { jitter_ms: 0.5, ..LinkModel::delay(delay_ms) });
        }
    }
    world.run_for(Duration::from_secs(10));
    let destination = world.id(T);
    let (forced, beside) = (None, None);
    let tunnel = TUNNEL;
    world.command(
        S,
        Command::OpenTunnel { tunnel, destination, forced, objective, beside, reserve },
    );
    world.run_for(Duration::from_secs(5));
    world
}

fn used(world: &World) -> &Destination {
    world.engine(S).tunnels().next().unwrap().1
}

fn relay(world: &World) -> NodeId {
    used(world).current.as_ref().unwrap().0.relays()[0]
}

/// Sends so many datagrams, and tells S half a second later what the receipts would. Returns how many
/// arrived.
fn send(world: &mut World, datagrams: u64) -> u64 {
    let route_id = used(world).route_id;
    let route = used(world).current.clone().unwrap().0;
    let fates = (0..datagrams).map(|_| world.forward(S, TUNNEL).unwrap().1);
    let received = fates.filter(|fate| *fate == Fate::Delivered).count() as u64;
    world.run_for(REPORT);
    let rtt_us = if route.relays()[0] == world.id(A) { 40_000 } else { 60_000 };
    let report = RouteReport {
        route,
        route_id,
        sent: datagrams,
        received,
        bytes: 1_200 * datagrams,
        marked: 0,
        rtt_us: Some(rtt_us),
        back_sent: 0,
        back_received: 0,
        back_marked: 0,
        duration_us: REPORT.as_micros() as u64,
    };
    world.input(S, Input::Routes(vec![(TUNNEL, report)]));
    received
}

/// The relays that S doubts, and what it thinks they deliver.
fn doubted(world: &World) -> Vec<(NodeId, f64)> {
    let decision = world.decisions(S).last().unwrap();
    decision.candidates.iter().flat_map(|candidate| candidate.doubted.clone()).collect()
}

#[test]
fn a_relay_that_drops_a_third_of_the_data_and_no_probe_is_left_and_stays_left() {
    let objectives =
        [Objective::Balanced, Objective::Latency, Objective::Throughput, Objective::Reliability];
    for (seed, objective) in (1..).zip(objectives) {
        let mut world = diamond(seed, objective, None);
        assert_eq!(relay(&world), world.id(A));
        (0..10).for_each(|_| assert_eq!(send(&mut world, 100), 100));
        assert!(doubted(&world).is_empty());
        world.set_dropper(A, 0.3);
        let turned_at = world.now();
        while relay(&world) == world.id(A) {
            send(&mut world, 100);
            let after = world.now().since(turned_at);
            assert!(after <= Duration::from_secs(5), "{objective}: not within {after:?}");
        }
        println!("{objective}: {:?}", world.now().since(turned_at));
        for _ in 0..120 {
            assert_eq!(send(&mut world, 100), 100, "{objective}: all arrive, over who is honest");
            assert_eq!(relay(&world), world.id(B));
        }
        let [(dropper, delivers)] = doubted(&world)[..] else { panic!("{:?}", doubted(&world)) };
        assert_eq!(dropper, world.id(A), "the honest one is not doubted");
        assert!((0.6..0.9).contains(&delivers), "{delivers}");
    }
}

#[test]
fn a_relay_that_drops_is_left_by_what_receipts_say_whatever_its_share() {
    for (seed, share, bound_s) in [(11, 0.3, 10), (12, 0.6, 5), (13, 1.0, 2)] {
        let mut world = diamond(seed, Objective::Balanced, None);
        world.send(S, TUNNEL, Traffic { every: Duration::from_millis(10), bytes: 200 });
        world.run_for(Duration::from_secs(5));
        assert_eq!(relay(&world), world.id(A));
        assert!(doubted(&world).is_empty());
        world.set_dropper(A, share);
        let turned_at = world.now();
        while relay(&world) == world.id(A) {
            world.run_for(Duration::from_millis(100));
            let after = world.now().since(turned_at);
            assert!(after <= Duration::from_secs(bound_s), "{share}: not within {after:?}");
        }
        println!("{share}: {:?}", world.now().since(turned_at));
        // In the first minute a route that fell silent is tried again some times.
        world.run_for(Duration::from_secs(60));
        let before = world.travelled(S, TUNNEL);
        world.run_for(Duration::from_secs(20));
        let after = world.travelled(S, TUNNEL);
        let lost = (after.sent - before.sent) - (after.arrived - before.arrived);
        assert!(lost < 100, "{share}: {lost} of 2,000 lost later on");
    }
}

#[test]
fn a_dropper_is_used_where_there_is_nothing_else_and_its_share_is_known() {
    let mut world = diamond(5, Objective::Balanced, None);
    world.kill(B);
    world.set_dropper(A, 0.3);
    (0..120).for_each(|_| _ = send(&mut world, 100));
    assert_eq!(relay(&world), world.id(A));
    let [(_, delivers)] = doubted(&world)[..] else { panic!("{:?}", doubted(&world)) };
    assert!((0.62..0.78).contains(&delivers), "{delivers}");
}

#[test]
fn a_dropper_is_tried_again_now_and_then_and_taken_back_when_it_has_stopped() {
    let mut world = diamond(6, Objective::Balanced, None);
    world.set_dropper(A, 0.3);
    let hour = |world: &mut World| {
        let (mut arrived, before) = (0, used(world).changes);
        (0..7_200).for_each(|_| arrived += send(world, 20));
        (used(world).changes - before, arrived as f64 / (7_200.0 * 20.0))
    };
    let (changes, arrived) = hour(&mut world);
    println!("{changes} changes, {arrived} arrived");
    assert!((3..=20).contains(&changes), "{changes}");
    assert!(arrived > 0.98, "{arrived}");
    world.set_dropper(A, 0.0);
    let (_, arrived) = hour(&mut world);
    assert!(arrived > 0.999, "{arrived}");
    assert_eq!(relay(&world), world.id(A));
    assert!(doubted(&world).is_empty());
}

#[test]
fn a_route_that_falls_silent_whenever_it_is_used_is_taken_ever_more_seldom() {
    let mut world = diamond(7, Objective::Balanced, None);
    let silence = |world: &mut World, s: u64| {
        let mut silenced = 0;
        for _ in 0..5 * s {
            world.run_for(Duration::from_millis(200));
            // Its probes are answered, its traffic is not.
            if relay(world) == world.id(A) {
                let route_id = used(world).route_id;
                world.input(S, Input::RouteSilent { tunnel: TUNNEL, route_id });
                silenced += 1;
            }
        }
        silenced
    };
    let first = silence(&mut world, 60);
    let later = silence(&mut world, 300);
    println!("{first} times in the first minute, {later} in five more");
    assert!((3..=6).contains(&first), "{first}");
    assert!((3..=6).contains(&later), "{later}");
    // Nothing else is there: it is used, whatever it did.
    while relay(&world) == world.id(B) {
        world.run_for(REPORT);
    }
    let route_id = used(&world).route_id;
    world.input(S, Input::RouteSilent { tunnel: TUNNEL, route_id });
    assert_eq!(relay(&world), world.id(B));
    world.run_for(Duration::from_secs(2));
    world.kill(B);
    world.run_for(Duration::from_secs(1));
    assert_eq!(relay(&world), world.id(A));
    assert!(used(&world).reachable);
}

#[test]
fn a_reservation_that_the_best_route_refuses_is_asked_of_the_next() {
    let mut world = diamond(8, Objective::Balanced, Some(1_000));
    let bottleneck = Bottleneck { from: world.id(A), to: world.id(T), available: 7 };
    let answer = |world: &mut World, result| {
        let route_id = used(world).route_id;
        world.input(S, Input::ReserveAnswered { tunnel: TUNNEL, route_id, result });
        world.forwarding(S).tunnels[&TUNNEL].route.clone().unwrap().relays()[0]
    };
    let [a, b] = [A, B].map(|relay| world.id(relay));
    assert_eq!(relay(&world), a);
    assert_eq!(answer(&mut world, Err(Some(bottleneck))), b, "the data plane is told at once");
    assert_eq!(answer(&mut world, Ok(())), b);
    world.run_for(Duration::from_secs(60));
    assert_eq!(relay(&world), b, "where it is granted it stays");
}

#[test]
fn a_route_that_turns_bad_whenever_it_is_used_is_taken_ever_more_seldom() {
    let mut world = diamond(9, Objective::Balanced, None);
    let link = |delay_ms| LinkModel { jitter_ms: 0.5, ..LinkModel::delay(delay_ms) };
    let minutes = |world: &mut World, minutes: u64| {
        let before = used(world).changes;
        for _ in 0..60 * minutes {
            let delay_ms = if relay(world) == world.id(A) { 110.0 } else { 10.0 };
            world.set_link(A, T, link(delay_ms));
            world.run_for(Duration::from_secs(1));
        }
        used(world).changes - before
    };
    let changes = [(); 3].map(|()| minutes(&mut world, 2));
    println!("{changes:?} changes in two minutes each");
    assert!(changes[1] < changes[0] && changes[2] <= 6, "{changes:?}");
}

#[test]
fn nobody_is_doubted_for_a_link_that_is_said_to_be_lossy() {
    let mut world = diamond(10, Objective::Latency, None);
    world.kill(B);
    world.set_link(A, T, LinkModel { loss: 0.15, ..LinkModel::delay(10.0) });
    world.run_for(Duration::from_secs(70));
    let arrived: u64 = (0..60).map(|_| send(&mut world, 100)).sum();
    assert!((4_800..5_400).contains(&arrived), "{arrived}");
    assert!(doubted(&world).is_empty(), "{:?}", doubted(&world));
}
