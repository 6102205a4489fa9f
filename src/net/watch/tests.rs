//! Two data planes, S and T, and relays A and B between them that the test plays itself.

use std::collections::{BTreeMap, BTreeSet};

use tokio::sync::mpsc;

use super::*;
use crate::engine::forward::{Backup, HeaderView};
use crate::net::link::{LANES, Link};
use crate::net::plane::Inbound;

const KEY: [u8; 32] = [7; 32];
const TUNNEL: TunnelId = TunnelId(5);
const S: u8 = 0;
const A: u8 = 1;
const B: u8 = 2;
const T: u8 = 9;

fn node(byte: u8) -> NodeId {
    NodeId([byte; 8])
}

fn route(nodes: &[u8]) -> Route {
    Route::new(nodes.iter().map(|n| node(*n)).collect::<Vec<_>>()).unwrap()
}

/// A data plane with links to A and B.
struct End {
    plane: DataPlane,
    links: BTreeMap<u8, Arc<Link>>,
    inbound: mpsc::Receiver<Inbound>,
    events: mpsc::Receiver<Input>,
}

/// What a link would write now: datagrams, taken from their frames.
pub(in crate::net) fn written(link: &Arc<Link>) -> Vec<Vec<u8>> {
    let mut datagrams = Vec::new();
    for lane in 0..LANES {
        loop {
            let mut frames = Vec::new();
            link.take(lane, &mut frames);
            let mut rest = frames.as_slice();
            if rest.is_empty() {
                break;
            }
            while let [high, low, after @ ..] = rest {
                let (datagram, next) =
                    after.split_at(usize::from(u16::from_be_bytes([*high, *low])));
                datagrams.push(datagram.to_vec());
                rest = next;
            }
        }
    }
    datagrams
}

impl End {
    fn new(me: u8) -> Self {
        let (sender, events) = mpsc::channel(64);
        let plane = DataPlane::new(node(me), sender);
        let inbound = plane.take_inbound().unwrap();
        let mut links = BTreeMap::new();
        for neighbour in [A, B] {
            let link = Arc::new(Link::new(node(neighbour), None));
            assert!(plane.add_link(link.clone()));
            links.insert(neighbour, link);
        }
        Self { plane, links, inbound, events }
    }

    /// What was sent to a neighbour.
    fn sent_to(&mut self, neighbour: u8) -> Vec<Vec<u8>> {
        written(&self.links[&neighbour])
    }

    /// The packets that QUIC would get.
    fn packets(&mut self) -> Vec<u8> {
        std::iter::from_fn(|| self.inbound.try_recv().ok().map(|inbound| inbound.packet()[0]))
            .collect()
    }

    fn dropped(&self, why: &str) -> u64 {
        self.plane.counters().dropped().get(why).copied().unwrap_or(0)
    }

    fn send(&self, far_end: FarEnd, packets: impl IntoIterator<Item = u8>) {
        for packet in packets {
            self.plane.send_packets(far_end.to_addr(), [&[packet][..]].into_iter());
        }
    }
}

struct Pair {
    s: End,
    t: End,
}

const TO_T: FarEnd = FarEnd { node: NodeId([T; 8]), tunnel: TUNNEL, ours: true };
const TO_S: FarEnd = FarEnd { node: NodeId([S; 8]), tunnel: TUNNEL, ours: false };

fn snapshot(used: (u8, u32), backup: Option<(u8, u32)>) -> Arc<ForwardingSnapshot> {
    let over = |relay| route(&[S, relay, T]);
    let backup = backup.map(|(relay, route_id)| Backup { route: over(relay), route_id });
    let binding = Binding {
        destination: node(T),
        route: Some(over(used.0)),
        reachable: true,
        route_id: used.1,
        backup,
        copies: false,
        capacity: None,
        reserved: None,
    };
    let tunnels = BTreeMap::from([(TUNNEL, binding)]);
    Arc::new(ForwardingSnapshot { tunnels, ..ForwardingSnapshot::default() })
}

impl Pair {
    /// A tunnel over A with the backup B, whose handshake is done.
    fn new() -> Self {
        let pair = Self { s: End::new(S), t: End::new(T) };
        pair.s.plane.set_snapshot(snapshot((A, 1), Some((B, 2))));
        pair.s.plane.flows.set_key(TO_T, RouteKey::new(&KEY), &Arc::default());
        pair.t.plane.flows.set_key(TO_S, RouteKey::new(&KEY), &Arc::default());
        pair
    }

    /// A relay passes on what waits for it, in both directions, until nothing does.
    fn relay(&mut self, relay: u8) {
        loop {
            let (up, down) = (self.s.sent_to(relay), self.t.sent_to(relay));
            if up.is_empty() && down.is_empty() {
                return;
            }
            for (datagrams, to) in [(up, &self.t), (down, &self.s)] {
                for mut datagram in datagrams {
                    Header::advance(&mut datagram);
                    to.plane.received(node(relay), datagram);
                }
            }
        }
    }

    /// The route number over which S sends.
    fn used(&self) -> u32 {
        hold(&self.s.plane.flows.of(TO_T).unwrap()).out.route_id()
    }

    /// S notices that its route is silent.
    fn silence(&self) {
        let flow = self.s.plane.flows.of(TO_T).unwrap();
        self.s.plane.leave(&mut hold(&flow), None, self.s.plane.flows.now());
    }
}

#[test]
fn packets_and_receipts_travel_and_settle_what_is_kept() {
    let mut pair = Pair::new();
    pair.s.send(TO_T, 0..5);
    pair.relay(A);
    assert_eq!(pair.t.packets(), [0, 1, 2, 3, 4]);
    pair.t.send(TO_S, 10..13);
    pair.relay(A);
    assert_eq!(pair.s.packets(), [10, 11, 12]);
    let flow = pair.s.plane.flows.of(TO_T).unwrap();
    let flow = hold(&flow);
    let super::super::flows::End::Own(own) = &flow.end else { panic!("S opened it") };
    assert!(own.watch.rtt_us().is_some(), "the first packet asked for a receipt");
    assert_eq!(own.arrived().received, 1, "which left before the others arrived");
    assert_eq!(flow.arrivals.over(1).received, 3);
}

#[test]
fn the_good_byes_of_a_closed_tunnel_make_no_route_silent() {
    let pair = Pair::new();
    let number = pair.s.plane.flows.set_key(TO_T, RouteKey::new(&KEY), &Arc::default());
    let watched = || {
        let flow = pair.s.plane.flows.of(TO_T).unwrap();
        let super::super::flows::End::Own(own) = &hold(&flow).end else { panic!("S called") };
        own.watch.next_timeout(pair.s.plane.flows.now()).is_some()
    };
    pair.s.send(TO_T, [0]);
    assert!(watched());
    pair.s.plane.closed(TO_T, number);
    pair.s.send(TO_T, [1]);
    assert!(!watched(), "nobody answers a good-bye");
    pair.s.plane.take_key(TO_T, None);
    pair.s.plane.flows.set_key(TO_T, RouteKey::new(&KEY), &Arc::default());
    pair.s.send(TO_T, [2]);
    assert!(watched(), "the next connection");
}

#[test]
fn what_was_lost_with_a_silent_route_is_sent_again_in_order_by_both_ends() {
    let mut pair = Pair::new();
    pair.s.send(TO_T, [0]);
    pair.relay(A);
    pair.t.send(TO_S, [10]);
    pair.relay(A);
    assert_eq!((pair.t.packets(), pair.s.packets()), (vec![0], vec![10]));
    pair.s.send(TO_T, 1..4);
    pair.t.send(TO_S, 11..14);
    // A falls silent: what it has is lost.
    assert_eq!((pair.s.sent_to(A).len(), pair.t.sent_to(A).len()), (3, 3));
    pair.silence();
    assert_eq!(pair.used(), 2);
    let silent = Input::RouteSilent { tunnel: TUNNEL, route_id: 1 };
    let told = pair.s.events.try_recv().unwrap();
    assert!(matches!((told, silent), (
        Input::RouteSilent { tunnel: a, route_id: b },
        Input::RouteSilent { tunnel: c, route_id: d },
    ) if a == c && b == d));
    pair.s.send(TO_T, [4]);
    pair.relay(B);
    assert_eq!(pair.t.packets(), [1, 2, 3, 4]);
    assert_eq!(pair.s.packets(), [11, 12, 13]);
    assert_eq!((pair.t.sent_to(A), pair.s.sent_to(A)), (vec![], vec![]));
    assert_eq!((pair.t.dropped("replayed"), pair.s.dropped("replayed")), (0, 0));
}

#[test]
fn a_late_snapshot_does_not_call_back_and_a_newer_one_does() {
    let mut pair = Pair::new();
    pair.s.send(TO_T, [0]);
    pair.silence();
    pair.s.plane.set_snapshot(snapshot((A, 1), None));
    assert_eq!(pair.used(), 2, "the engine did not know yet");
    pair.silence();
    assert_eq!(pair.used(), 2, "no other route");
    pair.s.plane.set_snapshot(snapshot((B, 2), Some((A, 3))));
    assert_eq!(pair.used(), 2);
    pair.s.plane.set_snapshot(snapshot((A, 4), None));
    assert_eq!(pair.used(), 4);
    let told = std::iter::from_fn(|| pair.s.events.try_recv().ok()).count();
    assert_eq!(told, 2, "each loss is told once");
}

#[test]
fn a_link_that_is_gone_is_left_at_once() {
    let mut pair = Pair::new();
    pair.s.send(TO_T, [0]);
    assert!(pair.s.plane.remove_link(&pair.s.links[&A].clone()));
    assert_eq!(pair.used(), 2);
    pair.relay(B);
    assert_eq!(pair.t.packets(), [0]);
}

#[test]
fn a_relay_tells_of_its_broken_link_and_only_the_route_itself_is_believed() {
    let mut pair = Pair::new();
    pair.s.send(TO_T, [0]);
    let datagram = pair.s.sent_to(A).pop().unwrap();
    let relay = End::new(A);
    // The relay knows S as a neighbour, and not T.
    let link = Arc::new(Link::new(node(S), None));
    relay.plane.add_link(link.clone());
    relay.plane.received(node(S), datagram.clone());
    let notices = written(&link);
    assert_eq!((notices.len(), relay.dropped("no-link")), (1, 1));
    let (notice, _) = Header::decode(&notices[0]).unwrap();
    assert_eq!(notice.kind, DatagramKind::Broken);
    for forged in [
        Header { route: route(&[B, S]), ..notice.clone() },
        Header { route_id: 2, ..notice.clone() },
        Header { sequence: 77, ..notice.clone() },
        Header { tunnel: TunnelId(6), ..notice.clone() },
        Header { route: route(&[T, A, S]), position: 2, ..notice.clone() },
    ] {
        let from = forged.route.nodes()[usize::from(forged.position) - 1];
        pair.s.plane.received(from, forged.encode(&[]));
    }
    assert_eq!((pair.used(), pair.s.dropped("broken-not-believed")), (1, 5));
    pair.s.plane.received(node(A), notices[0].clone());
    assert_eq!(pair.used(), 2);
    let told = pair.s.events.try_recv().unwrap();
    assert!(matches!(told, Input::RouteBroken { tunnel: TUNNEL, route_id: 1, at: 1 }));
}

#[test]
fn a_silent_neighbour_gets_nothing_to_pass_on() {
    let relay = End::new(7);
    let header = Header::new(DatagramKind::Data, TUNNEL, 1, 1, route(&[B, 7, A]));
    relay.plane.received(node(B), header.encode(&[]));
    let down = BTreeSet::from([node(A)]);
    let snapshot = ForwardingSnapshot { down, ..ForwardingSnapshot::default() };
    relay.plane.set_snapshot(Arc::new(snapshot));
    relay.plane.received(node(B), header.encode(&[]));
    assert_eq!((relay.plane.counters().forwarded().0, relay.dropped("no-link")), (1, 1));
}

#[test]
fn notices_are_bounded_and_nobody_is_told_of_what_comes_back() {
    let mut relay = End::new(7);
    let header = Header::new(DatagramKind::Data, TUNNEL, 1, 1, route(&[B, 7, T]));
    let reply = Header { reply: true, ..header.clone() };
    relay.plane.received(node(B), reply.encode(&[]));
    assert!(relay.sent_to(B).is_empty());
    let mut told = 0;
    for _ in 0..3 * BROKEN_PER_S {
        relay.plane.received(node(B), header.encode(&[]));
        told += relay.sent_to(B).len() as u64;
    }
    // The second may change in between.
    assert!((1..=2 * BROKEN_PER_S).contains(&told), "{told}");
}

#[test]
fn the_way_back_of_a_live_tunnel_cannot_be_stolen() {
    let mut pair = Pair::new();
    pair.s.send(TO_T, [0]);
    pair.relay(A);
    for tag in [0, 99] {
        for kind in [DatagramKind::Data, DatagramKind::Beat] {
            let stolen = Header::new(kind, TUNNEL, 9, 9, route(&[S, B, T]));
            let stolen = Header { tag, resumed: true, position: 2, ..stolen };
            pair.t.plane.received(node(B), stolen.encode(&[1]));
        }
    }
    pair.t.send(TO_S, [10]);
    assert!(pair.t.sent_to(B).is_empty());
    pair.relay(A);
    assert_eq!(pair.s.packets(), [10]);
    assert_eq!((pair.t.dropped("forged"), pair.t.dropped("untagged")), (2, 1));
}

#[test]
fn replays_reach_nobody_and_forged_receipts_settle_nothing() {
    let mut pair = Pair::new();
    pair.s.send(TO_T, [0]);
    let datagram = pair.s.sent_to(A).pop().unwrap();
    let mut arrived = datagram.clone();
    Header::advance(&mut arrived);
    for _ in 0..3 {
        pair.t.plane.received(node(A), arrived.clone());
    }
    assert_eq!((pair.t.packets(), pair.t.dropped("replayed")), (vec![0], 2));
    let mut receipt = pair.t.sent_to(A).pop().unwrap();
    assert_eq!(HeaderView::parse(&receipt).unwrap().kind(), DatagramKind::Receipt);
    Header::advance(&mut receipt);
    let mut forged = receipt.clone();
    *forged.last_mut().unwrap() ^= 1;
    let settled = |pair: &Pair| {
        let flow = pair.s.plane.flows.of(TO_T).unwrap();
        let flow = hold(&flow);
        !flow.out.is_under_way(1) || flow.out.waiting() > 0
    };
    pair.s.plane.received(node(A), forged);
    assert_eq!(pair.s.dropped("forged"), 1);
    let rtt = |pair: &Pair| {
        let flow = pair.s.plane.flows.of(TO_T).unwrap();
        let super::super::flows::End::Own(own) = &hold(&flow).end else { return None };
        own.watch.rtt_us()
    };
    assert!(!settled(&pair) && rtt(&pair).is_none());
    pair.s.plane.received(node(A), receipt);
    assert!(rtt(&pair).is_some());
}

/// Passes on all but the packets of tunnels, in which it changes a bit, or passes on everything.
fn relay_dishonestly(pair: &mut Pair, damages: [bool; 2]) {
    let (up, down) = (pair.s.sent_to(A), pair.t.sent_to(A));
    for (datagrams, to, damages) in [(up, &pair.t, damages[0]), (down, &pair.s, damages[1])] {
        for mut datagram in datagrams {
            if damages && HeaderView::parse(&datagram).unwrap().kind() == DatagramKind::Data {
                *datagram.last_mut().unwrap() ^= 64;
            }
            Header::advance(&mut datagram);
            to.plane.received(node(A), datagram);
        }
    }
}

#[test]
fn a_route_that_answers_and_damages_what_it_carries_is_left_with_nothing_lost() {
    for damages in [[true, false], [false, true]] {
        let mut pair = Pair::new();
        pair.s.send(TO_T, [0]);
        pair.relay(A);
        pair.t.send(TO_S, [10]);
        pair.relay(A);
        let begun = std::time::Instant::now();
        let mut packet = 0;
        while pair.used() == 1 {
            assert!(begun.elapsed() < Duration::from_secs(10), "it stays");
            packet += 1;
            pair.s.send(TO_T, [packet]);
            pair.t.send(TO_S, [100 + packet]);
            let flow = pair.s.plane.flows.of(TO_T).unwrap();
            pair.s.plane.send_beat(&mut hold(&flow), pair.s.plane.flows.now());
            (0..2).for_each(|_| relay_dishonestly(&mut pair, damages));
            std::thread::sleep(Duration::from_millis(20));
        }
        assert!(begun.elapsed() >= crate::engine::forward::STARVED_FOR);
        assert_eq!(pair.s.dropped("route-starves"), 1);
        pair.relay(B);
        // One whose receipt was still under way is there twice, which QUIC sorts out.
        let (mut at_t, mut at_s) = (pair.t.packets(), pair.s.packets());
        at_t.dedup();
        at_s.dedup();
        let all = |first: u8, from: u8| [first].into_iter().chain(from + 1..=from + packet);
        assert!(all(0, 0).eq(at_t.iter().copied()), "{at_t:?}");
        assert!(all(10, 100).eq(at_s.iter().copied()), "{at_s:?}");
    }
}

#[test]
fn what_proves_nothing_leaves_room_for_what_does() {
    let mut pair = Pair::new();
    let stranger = Header::new(DatagramKind::Data, TunnelId(77), 1, 1, route(&[S, A, T]));
    let forged = Header { position: 2, ..stranger }.encode(&[1]);
    for _ in 0..5_000 {
        pair.t.plane.received(node(A), forged.clone());
    }
    let full = 5_000 - crate::net::plane::UNPROVED_INBOUND_MAX as u64;
    assert_eq!(pair.t.dropped("unproved-queue-full"), full);
    pair.s.send(TO_T, [3]);
    pair.relay(A);
    let packets = pair.t.packets();
    assert_eq!((packets.len() as u64, packets.last()), (5_000 - full + 1, Some(&3)));
    pair.t.plane.received(node(A), forged.clone());
    assert_eq!(pair.t.packets(), [1], "there is room again");
}

#[test]
fn reports_say_what_traffic_met_and_only_of_what_is_in_use() {
    let mut pair = Pair::new();
    for packet in 0..4 {
        pair.s.send(TO_T, [packet]);
        pair.relay(A);
        std::thread::sleep(crate::engine::forward::ASK_GAP);
    }
    pair.t.send(TO_S, [10, 11]);
    pair.relay(A);
    pair.s.plane.report(pair.s.plane.flows.now());
    let Input::Routes(reports) = pair.s.events.try_recv().unwrap() else { panic!("a report") };
    let (tunnel, report) = &reports[0];
    assert_eq!((*tunnel, report.route_id, report.route.clone()), (TUNNEL, 1, route(&[S, A, T])));
    assert_eq!((report.sent, report.received, report.marked), (4, 4, 0));
    assert_eq!((report.back_sent, report.back_received), (2, 2));
    assert!(report.rtt_us.is_some() && report.bytes > 4 * 27);
    let later = pair.s.plane.flows.now() + crate::engine::forward::IN_USE;
    pair.s.plane.report(later);
    assert!(pair.s.events.try_recv().is_err());
}

#[test]
fn idle_tunnels_are_not_looked_at() {
    let mut pair = Pair::new();
    let idle: Vec<FarEnd> =
        (10..200).map(|tunnel| FarEnd { tunnel: TunnelId(tunnel), ..TO_S }).collect();
    for far_end in &idle {
        pair.t.plane.flows.set_key(*far_end, RouteKey::new(&KEY), &Arc::default());
    }
    pair.s.send(TO_T, [0]);
    pair.relay(A);
    pair.t.send(TO_S, [10]);
    pair.relay(A);
    let begun = pair.s.plane.flows.now();
    let watched = |pair: &Pair| [&pair.s, &pair.t].map(|end| end.plane.awake.lock().due.len());
    assert_eq!(watched(&pair), [1, 1]);
    let mut beats = 0;
    for step in 1..=300 {
        let now = begun + step * Duration::from_millis(50);
        pair.s.plane.watch_due(now);
        pair.t.plane.watch_due(now);
        beats += written(&pair.s.links[&A]).len();
        if step == 150 {
            assert_eq!(watched(&pair)[0], 1, "in use");
        }
    }
    assert!(beats > 50, "{beats}");
    assert_eq!(watched(&pair), [0, 0]);
    pair.s.send(TO_T, [1]);
    assert_eq!(watched(&pair), [1, 0], "the next packet");
}

/// The snapshot of a tunnel that wants reliability.
fn copied(used: (u8, u32), backup: Option<(u8, u32)>) -> Arc<ForwardingSnapshot> {
    let mut snapshot = ForwardingSnapshot::clone(&snapshot(used, backup));
    snapshot.tunnels.values_mut().for_each(|binding| binding.copies = true);
    Arc::new(snapshot)
}

fn flags(datagrams: &[Vec<u8>]) -> Vec<bool> {
    datagrams.iter().map(|datagram| Header::decode(datagram).unwrap().0.copy).collect()
}

#[test]
fn small_packets_also_travel_over_the_backup_and_move_nothing() {
    let mut pair = Pair::new();
    pair.s.send(TO_T, [0]);
    assert_eq!(pair.s.sent_to(B).len(), 0, "nobody wants copies");
    pair.s.plane.set_snapshot(copied((A, 1), Some((B, 2))));
    for round in 1..4 {
        pair.s.send(TO_T, [round]);
        pair.relay(A);
        pair.relay(B);
    }
    assert_eq!(pair.t.packets(), [0, 1, 1, 2, 2, 3, 3]);
    let flow = |pair: &Pair| {
        let flow = pair.t.plane.flows.of(TO_S).unwrap();
        let flow = hold(&flow);
        let way = flow.out.route().map(|(route, route_id)| (route.relays()[0], route_id));
        (way, flow.arrivals.over(1).received, flow.arrivals.newest().map(|seen| seen.route_id))
    };
    assert_eq!(flow(&pair), (Some((node(A), 1)), 4, Some(1)), "copies count for no route");
    // What one route loses, the other one brings; also on the way back.
    pair.s.send(TO_T, [4]);
    assert_eq!(flags(&pair.s.sent_to(A)), [false]);
    pair.relay(B);
    assert_eq!(pair.t.packets(), [4]);
    pair.t.send(TO_S, [10]);
    assert_eq!(flags(&pair.t.sent_to(A)), [false]);
    pair.relay(B);
    assert_eq!(pair.s.packets(), [10]);
    // A copy that is replayed reaches nobody, and one that is made the packet itself neither.
    pair.s.send(TO_T, [5]);
    let mut copy = pair.s.sent_to(B).pop().unwrap();
    Header::advance(&mut copy);
    pair.t.plane.received(node(B), copy.clone());
    pair.t.plane.received(node(B), copy.clone());
    let (header, _) = Header::decode(&copy).unwrap();
    pair.t.plane.received(node(B), Header { copy: false, ..header }.encode(&[5]));
    assert_eq!(pair.t.packets(), [5]);
    assert_eq!((pair.t.dropped("replayed"), pair.t.dropped("forged")), (1, 1));
}

#[test]
fn large_packets_and_much_at_once_are_not_copied() {
    use crate::net::copies::{BUSY_PACKETS, COPIED_BYTES_MAX};
    let mut pair = Pair::new();
    pair.s.plane.set_snapshot(copied((A, 1), Some((B, 2))));
    for (bytes, copies) in [(COPIED_BYTES_MAX, 1), (COPIED_BYTES_MAX + 1, 0)] {
        pair.s.plane.send_packets(TO_T.to_addr(), [&vec![0; bytes][..]].into_iter());
        assert_eq!(pair.s.sent_to(B).len(), copies, "{bytes}");
    }
    pair.s.plane.send_packets(TO_T.to_addr(), [&[0xc0; 100][..]].into_iter());
    assert_eq!(pair.s.sent_to(B).len(), 0, "a handshake has no key yet");
    pair.s.send(TO_T, std::iter::repeat_n(1, 2 * BUSY_PACKETS));
    assert!((1..BUSY_PACKETS).contains(&pair.s.sent_to(B).len()), "a transfer");
    pair.silence();
    pair.s.sent_to(B);
    pair.s.send(TO_T, [2]);
    assert_eq!((pair.used(), flags(&pair.s.sent_to(B))), (2, vec![false]), "the backup is in use");
}

#[test]
fn nobody_is_told_that_a_copy_was_lost() {
    let mut pair = Pair::new();
    pair.s.plane.set_snapshot(copied((A, 1), Some((B, 2))));
    pair.s.send(TO_T, [0]);
    let copy = pair.s.sent_to(B).pop().unwrap();
    let relay = End::new(B);
    let link = Arc::new(Link::new(node(S), None));
    relay.plane.add_link(link.clone());
    relay.plane.received(node(S), copy);
    assert_eq!((written(&link).len(), relay.dropped("no-link")), (0, 1));
}

/// A packet of a handshake, as T and S would get it.
const HELLO: u8 = 0xc1;

impl Pair {
    /// A tunnel over A with the backup B, whose handshake is to come.
    fn strangers() -> Self {
        let pair = Self { s: End::new(S), t: End::new(T) };
        pair.s.plane.set_snapshot(snapshot((A, 1), Some((B, 2))));
        pair
    }

    fn shake_hands(&self) {
        self.s.plane.flows.set_key(TO_T, RouteKey::new(&KEY), &Arc::default());
        self.t.plane.flows.set_key(TO_S, RouteKey::new(&KEY), &Arc::default());
    }
}

#[test]
fn a_tunnel_opens_though_its_first_route_is_dead() {
    let mut pair = Pair::strangers();
    pair.s.send(TO_T, [HELLO]);
    assert_eq!(flags(&pair.s.sent_to(A)), [false], "lost there");
    pair.relay(B);
    assert_eq!(pair.t.packets(), [HELLO]);
    pair.t.send(TO_S, [HELLO + 1]);
    pair.relay(B);
    assert_eq!(pair.s.packets(), [HELLO + 1]);
    pair.shake_hands();
    pair.s.send(TO_T, [1]);
    assert_eq!(flags(&pair.s.sent_to(A)), [false], "lost too");
    pair.relay(B);
    assert_eq!(pair.t.packets(), [1]);
    pair.t.send(TO_S, [11]);
    pair.relay(B);
    assert_eq!(pair.s.packets().first(), Some(&11));
    pair.silence();
    pair.relay(B);
    assert_eq!(pair.used(), 2);
}

#[test]
fn nothing_is_copied_any_more_when_the_first_route_answers() {
    let mut pair = Pair::strangers();
    pair.s.send(TO_T, [HELLO]);
    pair.relay(A);
    assert_eq!(flags(&pair.s.sent_to(B)), [true]);
    pair.shake_hands();
    pair.s.send(TO_T, [1]);
    assert_eq!(flags(&pair.s.sent_to(B)), [true], "nothing was answered yet");
    pair.relay(A);
    pair.s.send(TO_T, [2]);
    assert_eq!(pair.s.sent_to(B).len(), 0);
    pair.relay(A);
    assert_eq!(pair.t.packets(), [HELLO, 1, 2]);
}

#[test]
fn the_answer_to_a_handshake_comes_back_over_the_route_in_use_though_a_copy_was_quicker() {
    for order in [[A, B], [B, A]] {
        let mut pair = Pair::strangers();
        pair.s.send(TO_T, [HELLO]);
        order.into_iter().for_each(|relay| pair.relay(relay));
        pair.t.send(TO_S, [HELLO + 1]);
        assert_eq!((pair.t.sent_to(A).len(), pair.t.sent_to(B).len()), (1, 0), "{order:?}");
    }
}
