//! Routes that are kept back: because they failed, or because they refuse a reservation.

use super::*;
use crate::engine::traffic::message::Bottleneck;

#[test]
fn a_route_that_failed_is_held_while_another_lives_and_is_no_backup_where_there_is_one() {
    let mut world = parallel(PathPolicy::default(), &[20.0, 30.0, 40.0]);
    world.open();
    world.decide(0);
    world.histories.failed(&route(&[0, 2, 9]), Timestamp(0));
    let decision = world.decide(1);
    assert_eq!(world.backup_of(TUNNEL), route(&[0, 3, 9]));
    let held: Vec<bool> = decision.candidates.iter().map(|c| c.standing.held).collect();
    assert_eq!(held, [false, false, true], "behind the others, whatever its score");
    world.kill(&[0, 1, 9]);
    world.kill(&[0, 3, 9]);
    world.decide(1);
    assert_eq!(world.current(), route(&[0, 2, 9]), "nothing else is there");
    world.histories.probed(&route(&[0, 3, 9]), Timestamp(1), Some(900_000));
    world.histories.failed(&route(&[0, 2, 9]), Timestamp(2_500_000));
    let decision = world.decide(5);
    assert_eq!((decision.reason, world.current()), (Reason::Better, route(&[0, 3, 9])));
    assert_eq!(world.decide(9).reason, Reason::Better, "the hold is over");
}

#[test]
fn a_route_that_turned_bad_is_left_for_one_that_is_kept_back_where_no_other_is_better() {
    let turned = |others_ms: &[f64], refused: bool| {
        let mut world = parallel(PathPolicy::default(), &[20.0, 30.0, 40.0][..others_ms.len() + 1]);
        world.open();
        world.decide(0);
        world.measured(&[0, 1, 9], 300.0);
        for (relay, ms) in (2..).zip(others_ms) {
            world.measured(&[0, relay, 9], *ms);
        }
        world.histories.failed(&route(&[0, 2, 9]), Timestamp(4_000_000));
        if refused {
            let narrow = LinkQuality { bandwidth: Some(900.0), ..link(15.0) };
            let free = link(10.0);
            world.qualities(&[(0, 1, free), (1, 9, free), (0, 2, narrow), (2, 9, narrow)]);
            world.router.reserve(TUNNEL, 1_000);
        }
        [false, true].map(|turned_bad| {
            world.turned_bad = turned_bad;
            (world.decide(5).reason, world.current().relays()[0].0[0])
        })
    };
    let (stays, moves) = ((Reason::Best, 1), (Reason::Better, 2));
    assert_eq!(turned(&[60.0], false), [stays, moves]);
    assert_eq!(turned(&[299.0], false), [stays, stays], "hardly better");
    assert_eq!(turned(&[60.0], true), [stays, stays], "it is too narrow, too");
    assert_eq!(turned(&[60.0, 900.0], false), [stays, moves], "the free one is worse");
    assert_eq!(turned(&[60.0, 80.0], false)[0], (Reason::Better, 3), "the free one is better");
}

/// A tunnel with a reservation over four ways; each answer is about the route in use then.
fn asked(answers: &[Result<(), u64>]) -> (World, Vec<(Reason, u8)>) {
    let mut world = parallel(PathPolicy::default(), &[20.0, 30.0, 40.0, 50.0]);
    world.open();
    world.router.reserve(TUNNEL, 1_000);
    world.decide(0);
    let answer = |answer: &Result<(), u64>| {
        let available = |available| Some(Bottleneck { from: node(0), to: node(1), available });
        let route_id = world.used().route_id;
        let again = world.router.reserve_answered(TUNNEL, route_id, answer.map_err(available));
        let reason = if again { world.decide(0).reason } else { Reason::Best };
        (reason, world.current().relays()[0].0[0])
    };
    let found = answers.iter().map(answer).collect();
    (world, found)
}

#[test]
fn a_reservation_is_asked_of_the_next_routes_and_stays_where_it_is_granted() {
    let state = |world: &World| world.used().reservation.unwrap().state;
    let (mut world, found) = asked(&[Err(5), Err(6), Ok(())]);
    assert_eq!(found, [(Reason::Refused, 2), (Reason::Refused, 3), (Reason::Best, 3)]);
    assert_eq!(state(&world), ReservationState::Granted);
    let decision = world.decide(60);
    assert_eq!((decision.reason, world.current()), (Reason::Best, route(&[0, 3, 9])));
    let refused: Vec<_> = decision.candidates.iter().map(|c| c.standing.refused).collect();
    assert_eq!(refused, [false, false, true, true]);
    // Old news changes nothing.
    assert!(!world.router.reserve_answered(TUNNEL, 1, Err(None)));
    assert_eq!(state(&world), ReservationState::Granted);
    world.kill(&[0, 3, 9]);
    world.decide(61);
    assert!(world.used().refused.is_empty(), "all may be asked again");
}

#[test]
fn when_three_routes_refuse_the_one_with_most_left_is_named_and_nobody_else_is_asked() {
    let (mut world, found) = asked(&[Err(5), Err(6), Err(7), Err(8), Ok(())]);
    let reasons: Vec<_> = found.iter().map(|(reason, _)| *reason).collect();
    assert_eq!(reasons[..2], [Reason::Refused; 2]);
    assert!(!reasons[2..].contains(&Reason::Refused), "{found:?}");
    assert_eq!(world.used().reservation.unwrap().state, ReservationState::Granted);
    let (refused, _) = asked(&[Err(5), Err(7), Err(6)]);
    let Reservation { state: ReservationState::Refused(Some(bottleneck)), .. } =
        refused.used().reservation.unwrap()
    else {
        panic!("{:?}", refused.used().reservation);
    };
    assert_eq!(bottleneck.available, 7);
    world.router.open(TUNNEL, node(9), Some(route(&[0, 1, 9])), Objective::Balanced, None);
    world.router.reserve(TUNNEL, 1_000);
    world.decide(70);
    assert!(world.router.reserve_answered(TUNNEL, 1, Err(None)));
    assert_eq!(world.decide(70).reason, Reason::Forced);
    let state = world.used().reservation.unwrap().state;
    assert_eq!(state, ReservationState::Refused(None), "a fixed path is not left");
}

#[test]
fn a_route_whose_links_claim_too_little_is_not_asked_first() {
    let mut world = World::new();
    let way = |relay, ms, left| {
        let quality = LinkQuality { bandwidth: Some(left), ..link(ms) };
        [(0, relay, quality), (relay, 9, quality)]
    };
    world.qualities(&[way(1, 10.0, 900.0), way(2, 20.0, 1_100.0)].concat());
    world.open();
    world.router.reserve(TUNNEL, 1_000);
    world.decide(0);
    assert_eq!(world.current(), route(&[0, 2, 9]));
}
