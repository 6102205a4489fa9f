use proptest::prelude::*;

use super::*;
use crate::engine::types::TunnelId;

const START: Timestamp = Timestamp(1_000_000);

fn flow(ingress: u8, tunnel: u16) -> FlowKey {
    FlowKey {
        ingress: NodeId([ingress; 8]),
        source: NodeId([ingress; 8]),
        target: NodeId([99; 8]),
        tunnel: TunnelId(tunnel),
    }
}

fn any_lane(_: usize) -> bool {
    true
}

fn lane_of(key: &FlowKey) -> usize {
    usize::from(key.tunnel.0) % LANES
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

impl FairQueue<FlowKey> {
    fn push_data(&mut self, key: FlowKey, bytes: usize, now: Timestamp) {
        self.push(key, lane_of(&key), Class::Data, bytes, key, now);
    }
}

/// Serves `total` bytes of a queue in which every flow always has something waiting, each with
/// datagrams of its own sizes in turn, and returns what each flow got.
fn shares(
    flows: &[FlowKey],
    sizes: impl Fn(usize, usize) -> usize,
    total: usize,
) -> BTreeMap<FlowKey, usize> {
    let mut queue = FairQueue::with_limits(usize::MAX, usize::MAX);
    let mut counts: BTreeMap<FlowKey, (usize, usize)> = BTreeMap::new();
    for (index, key) in flows.iter().enumerate() {
        for turn in 0..3 {
            queue.push_data(*key, sizes(index, turn), START);
        }
        counts.insert(*key, (index, 3));
    }
    let mut got: BTreeMap<FlowKey, usize> = flows.iter().map(|key| (*key, 0)).collect();
    let mut served = 0;
    while served < total {
        let popped = queue.pop(START, any_lane).unwrap();
        served += popped.bytes;
        *got.get_mut(&popped.item).unwrap() += popped.bytes;
        let (index, turn) = counts.get_mut(&popped.item).unwrap();
        queue.push_data(popped.item, sizes(*index, *turn), START);
        *turn += 1;
    }
    got
}

fn of_ingress(got: &BTreeMap<FlowKey, usize>, ingress: u8) -> f64 {
    let flows = got.iter().filter(|(key, _)| key.ingress.0[0] == ingress);
    let all: usize = got.values().sum();
    flows.map(|(_, bytes)| *bytes).sum::<usize>() as f64 / all as f64
}

proptest! {
    #[test]
    fn flows_get_fair_shares_whatever_their_sizes_and_their_neighbours(
        neighbours in proptest::collection::vec(1u16..=8, 1..5),
        sizes in proptest::collection::vec(100usize..4_353, 1..40),
    ) {
        let flows: Vec<FlowKey> = (0u8..).zip(&neighbours)
            .flat_map(|(ingress, count)| (0..*count).map(move |tunnel| flow(ingress, tunnel)))
            .collect();
        let size = |index: usize, turn: usize| sizes[(index * 7 + turn) % sizes.len()];
        let total = 200_000 * flows.len();
        let got = shares(&flows, size, total);
        for (key, bytes) in got {
            let share = bytes as f64 / 200_000.0;
            prop_assert!((0.8..1.2).contains(&share), "{:?} got {}", key, share);
        }
    }

    #[test]
    fn bytes_are_conserved_and_flows_stay_in_order(
        steps in proptest::collection::vec(
            (0u8..4, 0u16..12, 1usize..5_000, 0u64..30, 0usize..4, any::<bool>()), 1..400),
    ) {
        let mut queue = FairQueue::with_limits(60_000, 10);
        let mut now = START;
        let (mut pushed, mut popped, mut number) = ((0u64, 0u64), 0u64, 0u64);
        let mut newest: BTreeMap<(FlowKey, bool), u64> = BTreeMap::new();
        let mut check = |taken: Popped<(FlowKey, bool, u64)>| {
            let (key, is_control, number) = taken.item;
            let before = newest.insert((key, is_control), number);
            before.is_none_or(|before| before < number)
        };
        for (ingress, tunnel, bytes, wait_ms, pops, is_control) in steps {
            now = now + ms(wait_ms);
            let key = flow(ingress, tunnel);
            // Control datagrams that exceed their part wait as data does, behind none of it here.
            let is_control = is_control && tunnel == 0 && bytes < 100;
            let class = if is_control { Class::Control } else { Class::Data };
            number += 1;
            queue.push(key, lane_of(&key), class, bytes, (key, is_control, number), now);
            pushed = (pushed.0 + 1, pushed.1 + bytes as u64);
            if tunnel == 5 {
                queue.grant(key, 10_000, now + ms(500), now);
            }
            for lane in 0..pops {
                if let Some(taken) = queue.pop(now, |open| pops == 3 || open == lane) {
                    prop_assert!(pops == 3 || taken.lane == lane);
                    popped += 1;
                    prop_assert!(check(taken));
                }
            }
            prop_assert!(queue.bytes() <= 60_000);
            prop_assert!(queue.places.len() <= 10);
            let table: usize = queue.table.iter().map(|flow| flow.bytes).sum();
            let control: usize = queue.control.iter().map(|(_, waiting)| waiting.bytes).sum();
            prop_assert_eq!(table + control, queue.bytes());
            let waiting: usize = queue.table.iter().map(|flow| flow.items.len()).sum();
            let waiting = (waiting + queue.control.len()) as u64;
            prop_assert_eq!(pushed.0, popped + waiting + queue.dropped());
            prop_assert_eq!(queue.waiting.iter().sum::<usize>() as u64, waiting);
        }
        while let Some(taken) = queue.pop(now, any_lane) {
            popped += 1;
            prop_assert!(check(taken));
        }
        prop_assert_eq!(pushed.0, popped + queue.dropped());
        prop_assert_eq!(queue.bytes(), 0);
        prop_assert!(queue.places.is_empty() && queue.reserved.is_empty());
    }
}

#[test]
fn a_neighbour_with_a_thousand_flows_counts_as_eight() {
    let flood: Vec<FlowKey> = (0..1_000).map(|tunnel| flow(1, tunnel)).collect();
    let share = |others: u16| {
        let others = (0..others).map(|tunnel| flow(2, tunnel));
        let flows: Vec<FlowKey> = flood.iter().copied().chain(others).collect();
        of_ingress(&shares(&flows, |_, _| 1_000, 20_000_000), 2)
    };
    for (others, expected) in [(8, 0.5), (20, 0.5), (1, 1.0 / 9.0)] {
        let got = share(others);
        assert!((got - expected).abs() < 0.01, "{others} flows got {got}");
    }
}

#[test]
fn a_flood_does_not_push_others_out_of_a_full_queue() {
    let mut queue = FairQueue::default();
    for round in 0..40 {
        for tunnel in 0..1_000 {
            queue.push_data(flow(1, tunnel), 1_000, START);
        }
        for tunnel in 0..100 {
            queue.push_data(flow(2, tunnel), 1_000, START);
        }
        assert!(queue.bytes() <= BYTES_MAX, "round {round}");
    }
    // Bytes are taken from who has most of them, flows from who has most of those.
    let waits = |ingress: u8| {
        let flows = queue.table.iter().filter(|flow| flow.key.ingress.0[0] == ingress);
        flows.map(|flow| flow.items.len()).sum::<usize>()
    };
    assert!(waits(2) >= 1_000 * 95 / 100 && waits(1) <= 1_050, "{} and {}", waits(1), waits(2));
}

#[test]
fn who_sends_little_waits_for_one_datagram() {
    let mut queue = FairQueue::default();
    for tunnel in 0..50 {
        for _ in 0..10 {
            queue.push_data(flow(1, tunnel), 1_000, START);
        }
    }
    let sent = |queue: &mut FairQueue<FlowKey>, key: FlowKey| {
        (1..).find(|_| queue.pop(START, any_lane).unwrap().item == key).unwrap()
    };
    // Each has had its first turn.
    for _ in 0..260 {
        queue.pop(START, any_lane);
    }
    queue.push_data(flow(2, 0), 100, START);
    assert!(sent(&mut queue, flow(2, 0)) <= 2, "another neighbour");
    queue.push_data(flow(1, 70), 100, START);
    assert!(sent(&mut queue, flow(1, 70)) <= 2, "another flow of the same");
}

#[test]
fn control_goes_first_for_a_tenth_of_the_bytes() {
    let mut queue = FairQueue::default();
    let mut bytes = (0, 0);
    for _ in 0..20 {
        queue.push_data(flow(1, 1), 4_000, START);
    }
    for _ in 0..2_000 {
        queue.push_data(flow(1, 1), 4_000, START);
        for _ in 0..10 {
            queue.push(flow(2, 2), 0, Class::Control, 400, flow(2, 2), START);
        }
        let popped = queue.pop(START, any_lane).unwrap();
        if popped.item == flow(2, 2) { bytes.0 += popped.bytes } else { bytes.1 += popped.bytes }
    }
    let share = bytes.0 as f64 / (bytes.0 + bytes.1) as f64;
    assert!((0.5..0.62).contains(&share), "a tenth first, the rest in fair shares: {share}");
    let mut idle = FairQueue::default();
    idle.push_data(flow(1, 1), 4_000, START);
    idle.push(flow(1, 2), 0, Class::Control, 50, flow(1, 2), START);
    assert_eq!(idle.pop(START, any_lane).unwrap().item, flow(1, 2));
}

#[test]
fn a_reservation_is_kept_under_load_and_ends() {
    let mut queue = FairQueue::default();
    let reserved = flow(1, 500);
    let end = START + ms(2_000);
    queue.grant(reserved, 500_000, end, START);
    // A link of 1 MB/s with twenty other flows: 1,000 bytes every ms.
    let mut got = [0, 0];
    for slot in 0..4_000 {
        let now = START + ms(slot);
        queue.push_data(reserved, 500, now);
        for tunnel in 0..20 {
            queue.push_data(flow(1, tunnel), 1_000, now);
        }
        let popped = queue.pop(now, any_lane).unwrap();
        if popped.item == reserved {
            got[usize::from(now >= end)] += popped.bytes;
            assert!(now >= end || popped.waited <= ms(5), "{:?}", popped.waited);
        }
    }
    assert!(got[0] >= 900_000, "half of the link was reserved: {}", got[0]);
    assert!(got[1] <= 200_000, "a twentieth is the fair share: {}", got[1]);
}

#[test]
fn late_datagrams_are_marked_and_those_of_who_does_not_react_dropped() {
    let mut queue = FairQueue::default();
    let key = flow(1, 1);
    (0..3).for_each(|_| queue.push_data(key, 1_000, START));
    let late = START + MARK_AFTER + ms(1);
    let marked = |queue: &mut FairQueue<FlowKey>, after| queue.pop(after, any_lane).unwrap().marked;
    assert!(!marked(&mut queue, START + MARK_AFTER));
    assert!(marked(&mut queue, late) && marked(&mut queue, late), "little waits for long");
    // A pile.
    let size = PILE_BYTES / 4;
    (0..20).for_each(|_| queue.push_data(key, size, START));
    let mut marks = |after: Timestamp| (0..4).filter(|_| marked(&mut queue, after)).count();
    assert_eq!((marks(late), marks(late + ms(9)), marks(late + STANDING)), (0, 0, 4));
    assert_eq!(marks(late + STANDING), 4, "it goes on");
    assert_eq!(marks(late + STANDING), 4, "to its end");
    // A stall: everything is late, and leaves at once.
    for _ in 0..10 {
        queue.push_data(key, size, START + ms(100));
    }
    let after = START + ms(500);
    let all = std::iter::from_fn(|| queue.pop(after, any_lane)).map(|popped| popped.marked);
    assert_eq!(all.collect::<Vec<_>>(), [false; 10]);
    assert_eq!(queue.dropped(), 0);
    // Twice what the link carries, for 2 s: waits stay near the bound.
    let mut longest = Duration::ZERO;
    for slot in 0..2_000 {
        let now = after + ms(slot);
        queue.push_data(key, 500, now);
        queue.push_data(key, 500, now);
        let waited = queue.pop(now, any_lane).unwrap().waited;
        if slot > 500 {
            longest = longest.max(waited);
        }
    }
    assert!(longest <= DROP_AFTER, "{longest:?}");
    assert!(queue.dropped() > 1_500, "{}", queue.dropped());
}

#[test]
fn a_closed_lane_holds_up_only_its_flows() {
    let mut queue = FairQueue::default();
    for tunnel in 0..4 {
        queue.push_data(flow(1, tunnel), 1_000, START);
    }
    let only = |open: usize| move |lane: usize| lane == open;
    let first: Vec<FlowKey> =
        std::iter::from_fn(|| queue.pop(START, only(1))).map(|popped| popped.item).collect();
    assert_eq!(first, [flow(1, 1), flow(1, 3)]);
    assert_eq!(queue.pop(START, any_lane).unwrap().item, flow(1, 0));
    assert_eq!(queue.pop(START, only(1)), None);
    assert_eq!(queue.pop(START, only(0)).unwrap().item, flow(1, 2));
}

#[test]
fn a_neighbour_whose_lane_was_closed_for_long_does_not_take_all_afterwards() {
    let mut queue = FairQueue::with_limits(usize::MAX, usize::MAX);
    let (blocked, other) = (flow(1, 1), flow(2, 0));
    for _ in 0..2_000 {
        queue.push_data(blocked, 1_000, START);
        queue.push_data(other, 1_000, START);
    }
    for _ in 0..1_000 {
        assert_eq!(queue.pop(START, |lane| lane == 0).unwrap().item, other);
    }
    let of_other = (0..200).filter(|_| queue.pop(START, any_lane).unwrap().item == other).count();
    assert!((85..=100).contains(&of_other), "{of_other} of 200");
}
