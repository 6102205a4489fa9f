//! Behaviour in simulated worlds: the real engine, virtual time, a seed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use meshwise::engine::Intervals;
use meshwise::engine::event::{Answer, Command, CommandError, Input, ServiceSpec};
use meshwise::engine::measure::{EventKind, HealthPolicy, ProbeKind, RouteReport, Sample};
use meshwise::engine::overlay::{Objective, ServiceKind};
use meshwise::engine::predict::{FeatureVector, LastValue, Prediction, QualityModel};
use meshwise::engine::route::{PathPolicy, Reservation, ReservationState};
use meshwise::engine::traffic::message::Bottleneck;
use meshwise::engine::types::{Route, ServiceName, Timestamp, TunnelId};
use meshwise::sim::{LinkModel, Traffic, World};

const START: Timestamp = Timestamp(1_760_000_000_000_000);
const TUNNEL: TunnelId = TunnelId(1);

const fn seconds(s: u64) -> Duration {
    Duration::from_secs(s)
}

/// S, A, B, C, D, T: S-A-C-T at 60 ms round trip, S-B-D-T at 90 ms, and no link S-T.
fn diamond(seed: u64) -> World {
    let mut world = World::new(seed, START);
    for index in 0..6 {
        let bootstrap: &[usize] = match index {
            0 => &[],
            1 | 2 => &[0],
            3 => &[1],
            4 => &[2],
            _ => &[3, 4],
        };
        world.add_node(bootstrap, PathPolicy::default(), Intervals::default());
    }
    for (a, b, delay_ms) in
        [(0, 1, 10.0), (1, 3, 10.0), (3, 5, 10.0), (0, 2, 15.0), (2, 4, 15.0), (4, 5, 15.0)]
    {
        world.set_link(a, b, LinkModel { jitter_ms: 1.0, ..LinkModel::delay(delay_ms) });
    }
    world
}

fn open(world: &mut World, from: usize, to: usize) {
    open_with(world, from, to, TUNNEL, None);
}

fn open_with(world: &mut World, from: usize, to: usize, tunnel: TunnelId, reserve: Option<u64>) {
    let destination = world.id(to);
    world.command(
        from,
        Command::OpenTunnel {
            tunnel,
            destination,
            forced: None,
            objective: Objective::Balanced,
            beside: None,
            reserve,
        },
    );
}

fn current(world: &World, node: usize) -> Option<Route> {
    let (_, destination) = world.engine(node).tunnels().next()?;
    destination.current.as_ref().map(|(route, _)| route.clone())
}

fn service(name: &str) -> ServiceSpec {
    ServiceSpec {
        name: name.parse().unwrap(),
        kind: ServiceKind::Tcp,
        metadata: BTreeMap::new(),
        allowed: vec![],
        ttl_s: 150,
        objective: Objective::Balanced,
        delegation: None,
        health: HealthPolicy::of_kind(ServiceKind::Tcp),
    }
}

#[test]
fn the_better_way_round_the_diamond_is_taken() {
    let mut world = diamond(1);
    world.run_for(seconds(10));
    assert!((0..6).all(|node| world.engine(node).joined_after().is_some()));
    open(&mut world, 0, 5);
    world.run_for(seconds(5));
    assert_eq!(current(&world, 0), Some(world.route(&[0, 1, 3, 5])));
    let backup = world.engine(0).tunnels().next().unwrap().1.backup.clone();
    assert_eq!(backup.map(|backup| backup.route), Some(world.route(&[0, 2, 4, 5])));
}

#[test]
fn a_route_that_turned_bad_is_left_and_taken_again_when_it_is_good() {
    let mut world = diamond(2);
    world.run_for(seconds(10));
    open(&mut world, 0, 5);
    world.run_for(seconds(5));
    world.set_link(1, 3, LinkModel::delay(110.0));
    world.run_for(seconds(8));
    assert_eq!(current(&world, 0), Some(world.route(&[0, 2, 4, 5])));
    world.set_link(1, 3, LinkModel::delay(10.0));
    world.run_for(seconds(60));
    assert_eq!(current(&world, 0), Some(world.route(&[0, 1, 3, 5])));
}

#[test]
fn a_route_that_the_data_plane_left_is_left_at_once_and_only_once() {
    let mut world = diamond(4);
    world.run_for(seconds(10));
    open(&mut world, 0, 5);
    world.run_for(seconds(5));
    let used = |world: &World| {
        let (_, destination) = world.engine(0).tunnels().next().unwrap();
        (destination.current.clone().unwrap().0, destination.route_id, destination.backup.clone())
    };
    let (route, route_id, backup) = used(&world);
    let backup = backup.unwrap();
    assert_eq!(route, world.route(&[0, 1, 3, 5]));
    world.input(0, Input::RouteBroken { tunnel: TUNNEL, route_id, at: 1 });
    let moved = used(&world);
    assert_eq!((&moved.0, moved.1), (&backup.route, backup.route_id));
    assert_eq!(moved.2, None, "the route that was left is no backup");
    world.input(0, Input::RouteSilent { tunnel: TUNNEL, route_id });
    assert_eq!(used(&world), moved, "old news");
    world.input(0, Input::RouteSilent { tunnel: TUNNEL, route_id: moved.1 });
    let (_, destination) = world.engine(0).tunnels().next().unwrap();
    assert!(!destination.reachable, "both ways are silent");
    world.run_for(seconds(5));
    let (_, destination) = world.engine(0).tunnels().next().unwrap();
    assert!(destination.reachable, "probes are answered again");
}

#[test]
fn what_traffic_met_on_a_route_becomes_a_sample_for_each_route_and_slice() {
    let mut world = diamond(5);
    world.run_for(seconds(10));
    open(&mut world, 0, 5);
    world.run_for(seconds(1));
    let report = |route_id| RouteReport {
        route: world.route(&[0, 1, 3, 5]),
        route_id,
        sent: 100,
        received: 99,
        bytes: 120_000,
        marked: 3,
        rtt_us: Some(60_000),
        back_sent: 50,
        back_received: 50,
        back_marked: 0,
        duration_us: 500_000,
    };
    let (used, stale) = (report(1), report(0));
    let mut input = |tunnel, report: &RouteReport| {
        world.input(0, Input::Routes(vec![(tunnel, report.clone())]));
    };
    input(TUNNEL, &stale);
    (0..20).for_each(|_| input(TUNNEL, &used));
    input(TunnelId(2), &used);
    input(TUNNEL, &used);
    let slices = world.samples(0).iter().filter_map(|sample| match sample {
        Sample::RouteSlice { at, tunnel, report } => Some((*at, *tunnel, report.clone())),
        _ => None,
    });
    let slices: Vec<_> = slices.collect();
    let told: Vec<_> = slices.iter().map(|(_, t, r)| (*t, r.route_id, r.sent)).collect();
    assert_eq!(told, [(TUNNEL, 0, 100), (TUNNEL, 1, 2_000)], "only of tunnels that are open");
    assert!(slices[0].0 < slices[1].0 && slices[1].2.duration_us == 10_000_000);
}

#[test]
fn a_data_plane_that_is_ahead_is_given_a_number_to_follow() {
    let mut world = diamond(6);
    world.run_for(seconds(10));
    open(&mut world, 0, 5);
    world.run_for(seconds(5));
    let number = |world: &World| world.engine(0).tunnels().next().unwrap().1.route_id;
    let before = number(&world);
    world.input(0, Input::RouteSilent { tunnel: TUNNEL, route_id: before + 1 });
    assert!(number(&world) > before + 1, "it used a backup that is none any more");
    assert_eq!(current(&world, 0), Some(world.route(&[0, 1, 3, 5])), "which says nothing of this");
}

#[test]
fn a_route_that_turned_bad_for_good_is_left_within_two_seconds() {
    let step = Duration::from_millis(50);
    // At every phase of the interval between two decisions. Probes still come back in time.
    for phase in 0..8 {
        let mut world = diamond(7 + u64::from(phase));
        world.run_for(seconds(10));
        open(&mut world, 0, 5);
        world.run_for(seconds(10) + phase * 5 * step);
        world.set_link(1, 3, LinkModel::delay(60.0));
        let turned_at = world.now();
        while current(&world, 0) != Some(world.route(&[0, 2, 4, 5])) {
            world.run_for(step);
            let after = world.now().since(turned_at);
            assert!(after < seconds(2), "phase {phase}: not within {after:?}");
        }
        println!("phase {phase}: {:?}", world.now().since(turned_at));
    }
}

#[test]
fn a_route_that_turned_bad_is_left_within_two_seconds_whatever_was_before() {
    let [upper, lower] = [(1, 3), (2, 4)];
    for seed in 50..54 {
        let mut world = diamond(seed);
        let way = |world: &World, (first, second): (usize, usize)| {
            Some(world.route(&[0, first, second, 5]))
        };
        let left_after = |world: &mut World, link: (usize, usize)| {
            world.set_link(link.0, link.1, LinkModel::delay(60.0));
            let (turned_at, slow) = (world.now(), way(world, link));
            assert_eq!(current(world, 0), slow);
            while current(world, 0) == slow {
                world.run_for(Duration::from_millis(50));
                let after = world.now().since(turned_at);
                assert!(after < seconds(2), "{seed}: not within {after:?}");
            }
            world.now().since(turned_at)
        };
        let mend = |world: &mut World, (a, b): (usize, usize), delay_ms| {
            world.set_link(a, b, LinkModel { jitter_ms: 1.0, ..LinkModel::delay(delay_ms) });
        };
        world.run_for(seconds(10));
        open(&mut world, 0, 5);
        world.run_for(seconds(10));
        // It is kept back for longer each time, the last time for 16 s.
        for _ in 0..4 {
            left_after(&mut world, upper);
            mend(&mut world, upper, 10.0);
            let mended_at = world.now();
            while current(&world, 0) != way(&world, upper) {
                world.run_for(Duration::from_millis(50));
                assert!(world.now().since(mended_at) < seconds(20));
            }
            if seed % 2 == 0 {
                world.run_for(seconds(5));
            }
        }
        left_after(&mut world, upper);
        mend(&mut world, upper, 10.0);
        world.run_for(seconds(6));
        // The other one turns bad while it is.
        println!("{seed}: {:?}", left_after(&mut world, lower));
        assert_eq!(current(&world, 0), way(&world, upper));
    }
}

/// 20 datagrams a second, as in the figures of the README.
const PINGS: Traffic = Traffic { every: Duration::from_millis(50), bytes: 100 };

#[test]
fn a_silent_cut_under_traffic_is_left_by_the_receipts_within_the_figure() {
    let silent = |loss| LinkModel { loss, ..LinkModel::delay(10.0) };
    for phase in 0..5 {
        let mut world = diamond(40 + u64::from(phase));
        world.run_for(seconds(10));
        open(&mut world, 0, 5);
        world.run_for(seconds(5));
        world.send(0, TUNNEL, PINGS);
        world.run_for(seconds(3) + phase * Duration::from_millis(11));
        let before = world.travelled(0, TUNNEL);
        assert!(before.longest_gap < Duration::from_millis(60) && before.losses == 0, "{before:?}");
        world.set_link(1, 3, silent(1.0));
        world.run_for(seconds(2));
        let after = world.travelled(0, TUNNEL);
        assert_eq!((after.losses, after.moves), (1, 1), "{after:?}");
        assert!(after.longest_gap < Duration::from_millis(300), "{after:?}");
        assert_eq!(current(&world, 0), Some(world.route(&[0, 2, 4, 5])));
        assert_eq!(world.breaches(), [] as [String; 0]);
    }
}

#[test]
fn a_relay_whose_next_link_is_gone_says_so() {
    let mut world = diamond(45);
    world.run_for(seconds(10));
    open(&mut world, 0, 5);
    world.run_for(seconds(5));
    // So often that the notice of the relay is back before its advertisement has spread.
    world.send(0, TUNNEL, Traffic { every: Duration::from_micros(200), bytes: 100 });
    world.run_for(seconds(1));
    world.kill(3);
    world.run_for(seconds(1));
    let travelled = world.travelled(0, TUNNEL);
    assert_eq!((travelled.losses, travelled.moves), (1, 1), "{travelled:?}");
    assert!(travelled.longest_gap < Duration::from_millis(60), "{travelled:?}");
    assert_eq!(world.breaches(), [] as [String; 0]);
}

#[test]
fn each_node_of_a_route_sets_a_reservation_aside_until_the_tunnel_moves_or_ends() {
    let mut world = diamond(46);
    world.run_for(seconds(10));
    open_with(&mut world, 0, 5, TUNNEL, Some(625_000));
    world.run_for(seconds(1));
    let state = |world: &World, tunnel| world.engine(0).reservation(tunnel).map(|r| r.state);
    assert_eq!(state(&world, TUNNEL), Some(ReservationState::Granted));
    let held = |world: &World, way: &[usize]| {
        let there = way.windows(2).map(|ends| world.promised(ends[0], ends[1]));
        let back = way.windows(2).map(|ends| world.promised(ends[1], ends[0]));
        there.chain(back).collect::<Vec<u64>>()
    };
    let (near, far) = ([0, 1, 3, 5], [0, 2, 4, 5]);
    assert_eq!((held(&world, &near), held(&world, &far)), (vec![625_000; 6], vec![0; 6]));
    // A link that was never busy counts for 2.5 MB/s, of which one neighbour gets 40 %.
    let (second, third) = (TunnelId(2), TunnelId(3));
    open_with(&mut world, 0, 5, second, Some(625_000));
    world.run_for(seconds(1));
    assert_eq!(state(&world, second), Some(ReservationState::Granted), "on another route");
    assert_eq!((held(&world, &near), held(&world, &far)), (vec![625_000; 6], vec![625_000; 6]));
    open_with(&mut world, 0, 5, third, Some(625_000));
    world.run_for(seconds(1));
    let full = Bottleneck { from: world.id(0), to: world.id(1), available: 375_000 };
    let refused = Reservation { rate: 625_000, state: ReservationState::Refused(Some(full)) };
    assert_eq!(world.engine(0).reservation(third), Some(refused));
    assert_eq!(held(&world, &near), [625_000; 6], "who was refused holds nothing");
    world.command(0, Command::CloseTunnel(third));
    world.command(0, Command::CloseTunnel(second));
    world.kill(3);
    world.run_for(seconds(3));
    assert_eq!(held(&world, &far), [625_000; 6], "it is asked for on the new route");
    assert_eq!((world.promised(0, 1), world.promised(1, 0)), (0, 625_000));
    world.run_for(seconds(30));
    assert_eq!(world.promised(1, 0), 0, "what nobody could release is forgotten");
    world.command(0, Command::CloseTunnel(TUNNEL));
    world.run_for(seconds(1));
    assert_eq!(held(&world, &far), [0; 6]);
    assert_eq!(world.breaches(), [] as [String; 0]);
}

#[test]
fn a_link_that_is_too_narrow_marks_drops_and_is_known_by_its_rate() {
    let mut world = diamond(47);
    world.set_link(1, 3, LinkModel { rate: Some(200_000.0), ..LinkModel::delay(10.0) });
    world.run_for(seconds(10));
    let only = Some(world.route(&[0, 1, 3, 5]));
    let destination = world.id(5);
    world.command(
        0,
        Command::OpenTunnel {
            tunnel: TUNNEL,
            destination,
            forced: only,
            objective: Objective::Balanced,
            beside: None,
            reserve: None,
        },
    );
    // Twice what the link carries.
    world.send(0, TUNNEL, Traffic { every: Duration::from_millis(10), bytes: 4_000 });
    world.run_for(seconds(40));
    let travelled = world.travelled(0, TUNNEL);
    let share = travelled.arrived as f64 / travelled.sent as f64;
    assert!((0.45..0.55).contains(&share), "{travelled:?}");
    let (from, to) = (world.id(1), world.id(3));
    let quality = world.engine(0).graph().quality(from, to).unwrap();
    assert!((quality.bandwidth.unwrap() - 200_000.0).abs() < 2_000.0, "{quality:?}");
    assert!(quality.utilisation > 0.95, "{quality:?}");
    let marked = world
        .samples(0)
        .iter()
        .any(|sample| matches!(sample, Sample::RouteSlice { report, .. } if report.marked > 100));
    assert!(marked, "receipts tell of marks");
}

#[test]
fn a_node_that_starts_again_joins_and_its_traffic_flows_again() {
    let mut world = diamond(48);
    world.run_for(seconds(10));
    for again in [false, true] {
        if again {
            world.kill(0);
            world.start(0);
            world.run_for(seconds(5));
        }
        open(&mut world, 0, 5);
        world.run_for(seconds(1));
        world.send(0, TUNNEL, PINGS);
        world.run_for(seconds(10));
        let travelled = world.travelled(0, TUNNEL);
        assert!(travelled.arrived >= 190, "{again}: {travelled:?}");
    }
    world.kill(5);
    assert!(!world.is_running(5) && !world.is_connected(3, 5));
    world.run_for(seconds(5));
    world.start(5);
    world.run_for(seconds(10));
    let arrived = world.travelled(0, TUNNEL).arrived;
    world.run_for(seconds(10));
    assert!(world.travelled(0, TUNNEL).arrived >= arrived + 190);
    assert_eq!(world.breaches(), [] as [String; 0]);
}

#[test]
fn a_killed_relay_is_left_at_once() {
    let mut world = diamond(3);
    world.run_for(seconds(10));
    open(&mut world, 0, 5);
    world.run_for(seconds(5));
    world.kill(3);
    world.run_for(Duration::from_millis(500));
    assert_eq!(current(&world, 0), Some(world.route(&[0, 2, 4, 5])));
}

#[test]
fn a_silent_cut_is_noticed_by_probes_and_is_on_record() {
    let mut world = diamond(4);
    world.run_for(seconds(10));
    open(&mut world, 0, 5);
    world.run_for(seconds(5));
    world.set_link(1, 3, LinkModel { loss: 1.0, ..LinkModel::delay(10.0) });
    world.run_for(seconds(2));
    assert_eq!(current(&world, 0), Some(world.route(&[0, 2, 4, 5])));
    let lost = |sample: &&Sample| {
        matches!(sample, Sample::Probe { kind: ProbeKind::Route, rtt_us: None, .. })
    };
    assert!(world.samples(0).iter().any(|sample| lost(&sample)), "failures are samples too");
}

#[test]
fn services_are_published_found_and_withdrawn() {
    let mut world = diamond(5);
    world.run_for(seconds(10));
    let name: ServiceName = "byronwade.local".parse().unwrap();
    world.command(5, Command::Publish { request: 1, service: service("byronwade.local") });
    world.run_for(seconds(1));
    assert!(matches!(world.answer(5, 1), Some(Ok(Answer::Published { .. }))));
    for (request, from_dht) in [(2, false), (3, true)] {
        world.command(0, Command::Resolve { request, name: name.clone(), from_dht });
        world.run_for(seconds(1));
        let Some(Ok(Answer::Resolved { providers, from_gossip })) = world.answer(0, request) else {
            panic!("{:?}", world.answer(0, request));
        };
        assert_eq!((providers.len(), *from_gossip), (1, !from_dht));
        assert_eq!(providers[0].0.node_id(), world.id(5));
    }
    world.command(5, Command::Withdraw { request: 4, name: name.clone() });
    world.run_for(seconds(1));
    world.command(0, Command::Resolve { request: 5, name: name.clone(), from_dht: false });
    world.run_for(seconds(1));
    assert_eq!(world.answer(0, 5), Some(&Err(CommandError::UnknownName(name))));
}

#[test]
fn a_service_outlives_many_times_its_time_to_live() {
    let mut world = diamond(6);
    world.run_for(seconds(10));
    world.command(5, Command::Publish { request: 1, service: service("byronwade.local") });
    world.run_for(seconds(1_000));
    let name = "byronwade.local".parse().unwrap();
    let registry = world.engine(0).services().registry();
    assert_eq!(registry.resolve(&name, world.now()).count(), 1);
}

#[test]
fn a_node_that_comes_late_knows_everything_at_once() {
    let mut world = diamond(7);
    world.run_for(seconds(10));
    world.command(5, Command::Publish { request: 1, service: service("byronwade.local") });
    world.run_for(seconds(1));
    let late = world.add_node(&[0], PathPolicy::default(), Intervals::default());
    world.set_link(0, late, LinkModel::delay(5.0));
    world.run_for(seconds(1));
    assert!(world.engine(late).joined_after().is_some());
    let name = "byronwade.local".parse().unwrap();
    let registry = world.engine(late).services().registry();
    assert_eq!(registry.resolve(&name, world.now()).count(), 1);
    assert_eq!(world.engine(late).graph().origins().count(), 7);
    let join = world.samples(late).iter().find_map(|sample| match sample {
        Sample::Event { kind: EventKind::Join, started_at, done_at, .. } => {
            Some(done_at.since(*started_at))
        }
        _ => None,
    });
    assert!(join.unwrap() < seconds(1));
}

#[test]
fn a_node_connects_to_three_when_there_are_three() {
    let mut world = World::new(8, START);
    for index in 0..6 {
        let bootstrap: &[usize] = if index == 0 { &[] } else { &[0] };
        world.add_node(bootstrap, PathPolicy::default(), Intervals::default());
        for other in 0..index {
            world.set_link(other, index, LinkModel::delay(5.0));
        }
    }
    world.run_for(seconds(30));
    for node in 0..6 {
        assert!(world.engine(node).peers().len() >= 3, "node {node}");
    }
}

#[test]
fn the_same_seed_gives_the_same_world() {
    let run = |seed| {
        let mut world = diamond(seed);
        world.run_for(seconds(10));
        open(&mut world, 0, 5);
        world.run_for(seconds(20));
        (world.samples(0).to_vec(), world.decisions(0).to_vec())
    };
    assert_eq!(run(9), run(9));
    assert_ne!(run(9).0, run(10).0);
}

#[test]
fn garbage_by_gossip_is_dropped_and_nothing_changes() {
    use meshwise::engine::event::Input;
    let mut world = diamond(11);
    world.run_for(seconds(10));
    let before = world.engine(0).graph().origins().count();
    for (token, bytes) in [vec![], vec![0xff; 10], vec![0; 20_000]].into_iter().enumerate() {
        let from = world.id(1);
        world.input(0, Input::Gossip { token: 1_000_000 + token as u64, from, bytes });
    }
    let from = world.id(1);
    world.input(0, Input::SyncReceived { from, bytes: vec![9; 50] });
    world.run_for(seconds(5));
    assert_eq!(world.engine(0).graph().origins().count(), before);
}

/// Forecasts the last value times this.
struct Times(&'static str, f64);

impl QualityModel for Times {
    fn version(&self) -> &str {
        self.0
    }

    fn predict(&self, features: &FeatureVector) -> Option<Prediction> {
        LastValue.predict(features).map(|last| Prediction::of_latency(self.1 * last.latency_ms))
    }
}

#[test]
fn a_model_that_does_worse_than_the_moving_average_stops_deciding_by_itself() {
    for (harmful, factor) in [(false, 1.0), (true, 1.5), (true, f64::NAN)] {
        let mut world = diamond(21);
        world.run_for(seconds(10));
        open(&mut world, 0, 5);
        world.run_for(seconds(10));
        world.input(0, Input::Model(Some(Arc::new(Times("champion", factor)))));
        world.input(0, Input::Challenger(Some(Arc::new(Times("challenger", 1.01)))));
        world.run_for(seconds(5));
        let decision = world.decisions(0).last().unwrap();
        assert_eq!(decision.model_version, "champion");
        assert_eq!(decision.challenger_version.as_deref(), Some("challenger"));
        let forecast = &decision.candidates[0].forecast;
        let (last, shadow) = (forecast.last_value.unwrap(), forecast.challenger.unwrap());
        assert!((shadow.latency_ms - 1.01 * last.latency_ms).abs() < 1e-9);
        // The links of one way swing, and the last value follows sooner than the moving average.
        for step in 0..150_u32 {
            let delay_ms = if step % 20 < 10 { 10.0 } else { 12.0 };
            world.set_link(0, 1, LinkModel::delay(delay_ms));
            world.run_for(seconds(2));
        }
        let decides = world.engine(0).predictor().version();
        assert_eq!(decides, if harmful { "moving-average" } else { "champion" }, "{factor}");
        assert_eq!(world.decisions(0).last().unwrap().model_version, decides);
        let watch = world.engine(0).predictor().watch();
        assert!(watch.challenger().probes > 300, "{watch:?}");
        assert_eq!(watch.champion().probes > 0, !harmful);
    }
}

/// How often a node probed each of these links in so many seconds.
fn link_probes<const N: usize>(
    world: &mut World,
    node: usize,
    to: [usize; N],
    for_s: u64,
) -> [usize; N] {
    let before = world.samples(node).len();
    world.run_for(seconds(for_s));
    let ids = to.map(|neighbour| world.id(neighbour));
    ids.map(|id| {
        let of = |sample: &&Sample| {
            matches!(sample, Sample::Probe { kind: ProbeKind::Link, route, .. }
                if route.destination() == id)
        };
        world.samples(node)[before..].iter().filter(of).count()
    })
}

#[test]
fn links_are_probed_less_while_they_are_steady_and_nobody_uses_them_in_a_calm_mesh() {
    let mut world = diamond(41);
    let first = link_probes(&mut world, 0, [1, 2], 10);
    assert!(first.iter().all(|probes| *probes >= 7), "nothing is known yet: {first:?}");
    world.run_for(seconds(20));
    let idle = link_probes(&mut world, 0, [1, 2], 20);
    assert!(idle.iter().all(|probes| (9..=11).contains(probes)), "every 2 s: {idle:?}");
    world.set_link(0, 2, LinkModel { jitter_ms: 1.0, ..LinkModel::delay(40.0) });
    let changed = link_probes(&mut world, 0, [1, 2], 10);
    assert!(changed[0] <= 6 && changed[1] >= 7, "news is looked at: {changed:?}");
    world.run_for(seconds(30));
    open(&mut world, 0, 5);
    world.run_for(seconds(5));
    let used = link_probes(&mut world, 0, [1, 2], 20);
    assert!(used.iter().all(|probes| *probes >= 19), "every second: {used:?}");
}

#[test]
fn links_are_probed_at_full_rate_while_peers_come_and_go() {
    let mut world = diamond(42);
    world.run_for(seconds(30));
    let before = link_probes(&mut world, 5, [3], 20);
    world.kill(4);
    world.start(4);
    world.run_for(seconds(20));
    world.kill(4);
    world.run_for(seconds(20));
    let restless = link_probes(&mut world, 5, [3], 20);
    assert!(before[0] <= 11 && restless[0] >= 19, "{before:?} {restless:?}");
}
