//! Decisions that try another route.

use super::*;

const SHARE: f64 = 0.1;

/// Ways of 20, 22, 24 and 60 ms, of which the first is in use.
fn exploring() -> World {
    let policy = PathPolicy { explore: SHARE, ..PathPolicy::default() };
    let mut world = parallel(policy, &[20.0, 22.0, 24.0, 60.0]);
    world.open();
    let first = world.decide(0);
    assert_eq!((first.reason, first.propensity()), (Reason::First, 1.0));
    world
}

fn propensities(decision: &Decision) -> Vec<f64> {
    decision.candidates.iter().map(|candidate| candidate.propensity).collect()
}

#[test]
fn a_share_of_decisions_tries_what_is_nearly_as_good_and_returns() {
    let mut world = exploring();
    let mut taken = BTreeMap::new();
    for step in 1..=4_000 {
        let decision = world.decide(2 * step);
        assert_eq!(propensities(&decision), [0.9, 0.05, 0.05, 0.0]);
        let route = world.current();
        assert_eq!(decision.candidates[decision.chosen.unwrap()].route, route);
        *taken.entry(route.relays()[0].0[0]).or_insert(0) += 1;
        let explores = decision.reason == Reason::Explored;
        assert_eq!(explores, world.used().is_exploring());
        assert_eq!(decision.propensity(), if explores { 0.05 } else { 0.9 });
        // As if it had never left.
        assert_eq!(world.used().usual(), Some(&(super::route(&[0, 1, 9]), Timestamp(0))));
        assert_eq!(counterfactual(&PathPolicy::default(), &decision).is_none(), explores);
    }
    assert_eq!(taken.len(), 3, "{taken:?}");
    for relay in [2, 3] {
        assert!((140..=260).contains(&taken[&relay]), "5 %: {taken:?}");
    }
}

#[test]
fn the_same_seed_tries_the_same() {
    let tries = || {
        let mut world = exploring();
        (1..200).map(|step| world.decide(2 * step).reason).collect::<Vec<_>>()
    };
    assert_eq!(tries(), tries());
}

#[test]
fn what_has_a_reason_to_be_where_it_is_does_not_explore() {
    let mut world = exploring();
    let alone = |decision: &Decision| {
        let sum: f64 = propensities(decision).iter().sum();
        assert_eq!((decision.propensity(), sum), (1.0, 1.0), "{:?}", decision.reason);
    };
    // Lost, then held: the first way is quick again, and the change is too recent.
    world.kill(&[0, 1, 9]);
    let lost = world.decide(2);
    assert_eq!(lost.reason, Reason::CurrentDead);
    alone(&lost);
    for at_s in 4..200 {
        world.router.reserve(TUNNEL, 1_000);
        alone(&world.decide(at_s));
    }
    let mut fixed = exploring();
    fixed.router.open(TUNNEL, node(9), Some(route(&[0, 2, 9])), Objective::Balanced, None);
    for at_s in 1..100 {
        alone(&fixed.decide(at_s));
    }
    let mut quiet = parallel(PathPolicy::default(), &[20.0, 22.0, 24.0]);
    quiet.open();
    for at_s in 0..100 {
        alone(&quiet.decide(at_s));
        assert_eq!(quiet.used().changes, 1);
    }
}

#[test]
fn a_tried_route_that_dies_is_left_for_where_it_came_from() {
    let mut world = exploring();
    let tried = (1..).find(|step| world.decide(2 * step).reason == Reason::Explored).unwrap();
    let relay = world.current().relays()[0].0[0];
    world.kill(&[0, relay, 9]);
    let decision = world.decide(2 * tried + 1);
    assert!(decision.changed && decision.reason != Reason::CurrentDead, "{:?}", decision.reason);
    assert_ne!(world.current(), route(&[0, relay, 9]));
    // The data plane leaves by itself, too.
    let mut world = exploring();
    while world.decide(2).reason != Reason::Explored {}
    assert!(world.router.moved_to_backup(TUNNEL, Timestamp(3_000_000)));
    assert!(!world.used().is_exploring());
    assert_eq!(world.used().usual(), world.used().current.as_ref());
}
