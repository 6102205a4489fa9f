//! Four data planes: S, the relays A and B, and T. The test carries what their links write.

use tokio::sync::mpsc;

use super::*;
use crate::engine::forward::Binding;
use crate::engine::traffic::{ASKS_MAX, PATIENCE};
use crate::engine::types::{Route, TunnelId};
use crate::net::link::{LANES, Link};
use crate::net::watch::tests::written;

const TUNNEL: u16 = 5;
const S: u8 = 0;
const A: u8 = 1;
const B: u8 = 2;
const T: u8 = 9;
const LINKS: [(u8, u8); 8] = [(S, A), (A, S), (A, T), (T, A), (S, B), (B, S), (B, T), (T, B)];
const CAPACITY: f64 = 1_250_000.0;
const RATE: u64 = 250_000;

fn node(byte: u8) -> NodeId {
    NodeId([byte; 8])
}

fn route(nodes: &[u8]) -> Route {
    Route::new(nodes.iter().map(|n| node(*n)).collect::<Vec<_>>()).unwrap()
}

fn far_end(tunnel: u16) -> FarEnd {
    FarEnd { node: node(T), tunnel: TunnelId(tunnel), ours: true }
}

fn caller(tunnel: u16) -> FarEnd {
    FarEnd { node: node(S), tunnel: TunnelId(tunnel), ours: false }
}

fn key() -> RouteKey {
    RouteKey::new(&[7; 32])
}

struct Mesh {
    planes: BTreeMap<u8, DataPlane>,
    links: BTreeMap<(u8, u8), std::sync::Arc<Link>>,
    events: mpsc::Receiver<Input>,
    tunnels: BTreeMap<TunnelId, Binding>,
    capacity: BTreeMap<(u8, u8), f64>,
}

impl Mesh {
    /// Links that carry [`CAPACITY`], except some.
    fn new(slower: &[((u8, u8), f64)]) -> Self {
        let (sender, events) = mpsc::channel(64);
        let planes = [S, A, B, T].map(|me| (me, DataPlane::new(node(me), sender.clone())));
        let planes = BTreeMap::from(planes);
        let mut links = BTreeMap::new();
        for (from, to) in LINKS {
            let link = std::sync::Arc::new(Link::new(node(to), None));
            assert!(planes[&from].add_link(link.clone()));
            links.insert((from, to), link);
        }
        let mut capacity = BTreeMap::from(LINKS.map(|link| (link, CAPACITY)));
        capacity.extend(slower.iter().copied());
        let mesh = Self { planes, links, events, tunnels: BTreeMap::new(), capacity };
        [S, A, B, T].into_iter().for_each(|at| mesh.set_snapshot(at));
        mesh
    }

    fn set_snapshot(&self, at: u8) {
        let tunnels = if at == S { self.tunnels.clone() } else { BTreeMap::new() };
        let of = self.capacity.iter().filter(|((from, _), _)| *from == at);
        let capacity = of.map(|((_, to), capacity)| (node(*to), *capacity)).collect();
        let snapshot = ForwardingSnapshot { tunnels, capacity, ..ForwardingSnapshot::default() };
        self.planes[&at].set_snapshot(std::sync::Arc::new(snapshot));
    }

    /// S has a tunnel with a reservation over this relay; its handshake is done.
    fn open(&mut self, tunnel: u16, relay: u8, route_id: u32) {
        let binding = Binding {
            destination: node(T),
            route: Some(route(&[S, relay, T])),
            reachable: true,
            route_id,
            backup: None,
            copies: false,
            capacity: None,
            reserved: Some(RATE),
        };
        if self.tunnels.insert(TunnelId(tunnel), binding).is_none() {
            self.planes[&S].flows.set_key(far_end(tunnel), key(), &std::sync::Arc::default());
            self.planes[&T].flows.set_key(caller(tunnel), key(), &std::sync::Arc::default());
        }
        self.set_snapshot(S);
    }

    /// S does what is due after so long. Returns what travels then.
    fn due(&self, after: Duration) -> usize {
        let s = &self.planes[&S];
        s.reserve_all(s.flows.now() + after);
        self.pump()
    }

    /// Carries datagrams until there are none. Returns how many.
    fn pump(&self) -> usize {
        let mut carried = 0;
        loop {
            let before = carried;
            for ((from, to), link) in &self.links {
                for datagram in written(link) {
                    carried += 1;
                    self.planes[to].received(node(*from), datagram);
                }
            }
            if carried == before {
                return carried;
            }
        }
    }

    /// What S's engine is told.
    fn told(&mut self) -> Vec<(u16, u32, Result<(), Option<Bottleneck>>)> {
        let inputs = std::iter::from_fn(|| self.events.try_recv().ok());
        let answers = inputs.filter_map(|input| match input {
            Input::ReserveAnswered { tunnel, route_id, result } => {
                Some((tunnel.0, route_id, result))
            }
            _ => None,
        });
        answers.collect()
    }

    /// The links that have promised something, and how much.
    fn promised(&self) -> Vec<(u8, u8, u64)> {
        let of = |(from, to): (u8, u8)| {
            let plane = &self.planes[&from];
            (from, to, plane.reservations.ledger().promised(node(to), plane.flows.now()))
        };
        LINKS.map(of).into_iter().filter(|(.., rate)| *rate > 0).collect()
    }

    fn dropped(&self, at: u8, why: &str) -> u64 {
        self.planes[&at].counters().dropped().get(why).copied().unwrap_or(0)
    }
}

/// Both directions of the way over a relay.
fn both(relay: u8, rate: u64) -> Vec<(u8, u8, u64)> {
    [(S, relay), (relay, S), (relay, T), (T, relay)].map(|(from, to)| (from, to, rate)).to_vec()
}

fn full(from: u8, to: u8, available: u64) -> Result<(), Option<Bottleneck>> {
    Err(Some(Bottleneck { from: node(from), to: node(to), available }))
}

#[test]
fn every_link_of_a_route_sets_the_rate_aside_until_one_is_full() {
    let mut mesh = Mesh::new(&[]);
    for tunnel in [5, 6] {
        mesh.open(tunnel, A, 1);
        assert_eq!(mesh.due(Duration::ZERO), 4, "two there and two back");
        assert_eq!(mesh.told(), [(tunnel, 1, Ok(()))]);
    }
    assert_eq!(mesh.promised(), both(A, 2 * RATE));
    mesh.open(7, A, 1);
    mesh.due(Duration::ZERO);
    assert_eq!(mesh.told(), [(7, 1, full(S, A, 0))]);
    assert_eq!(mesh.promised(), both(A, 2 * RATE));
}

#[test]
fn a_tunnel_with_a_reservation_goes_first() {
    let first = |reserves: bool| {
        let mut mesh = Mesh::new(&[]);
        mesh.open(TUNNEL, A, 1);
        if reserves {
            mesh.due(Duration::ZERO);
        }
        let link = &mesh.links[&(A, T)];
        // On the same lane.
        for tunnel in [TUNNEL + LANES as u16, TUNNEL] {
            let header = Header::new(DatagramKind::Data, TunnelId(tunnel), 1, 1, route(&[S, A, T]));
            (0..20).for_each(|_| mesh.planes[&A].received(node(S), header.encode(&[0; 1_000])));
        }
        Header::decode(&written(link)[0]).unwrap().0.tunnel.0
    };
    assert_eq!((first(false), first(true)), (TUNNEL + LANES as u16, TUNNEL));
}

#[test]
fn who_refuses_is_named_and_nobody_keeps_anything() {
    for (from, to) in [(A, T), (A, S), (T, A)] {
        let mut mesh = Mesh::new(&[((from, to), 500_000.0)]);
        mesh.open(TUNNEL, A, 3);
        mesh.due(Duration::ZERO);
        assert_eq!(mesh.told(), [(TUNNEL, 3, full(from, to, 200_000))]);
        assert_eq!(mesh.promised(), []);
        assert_eq!(mesh.due(Duration::ZERO), 0, "it is asked again with the next slice");
        mesh.due(RENEW_EVERY);
        assert_eq!(mesh.told().len(), 1);
    }
}

#[test]
fn a_relay_that_cannot_do_both_does_neither_and_passes_nothing_on() {
    let mesh = Mesh::new(&[((A, S), 500_000.0)]);
    let asked = Header::new(DatagramKind::Reserve, TunnelId(TUNNEL), 1, 9, route(&[S, A, T]));
    mesh.planes[&A].received(node(S), asked.encode(&encode_reserve(RATE)));
    assert_eq!(mesh.promised(), []);
    assert!(written(&mesh.links[&(A, T)]).is_empty());
    let (answer, payload) = (written(&mesh.links[&(A, S)]), Answer::decode);
    let (header, bytes) = Header::decode(&answer[0]).unwrap();
    let refused = Answer::Refused { position: 1, side: Side::Previous, available: 200_000 };
    assert_eq!((payload(bytes), header.route, header.reply), (Ok(refused), route(&[A, S]), true));
}

#[test]
fn what_a_closed_tunnel_held_is_free() {
    let mut mesh = Mesh::new(&[]);
    mesh.open(TUNNEL, A, 1);
    mesh.due(Duration::ZERO);
    mesh.tunnels.clear();
    // The connection ends before the route goes.
    mesh.planes[&T].take_key(caller(TUNNEL), None);
    assert_eq!(mesh.promised().len(), 3, "T has nobody to ask and frees its own");
    mesh.set_snapshot(S);
    mesh.pump();
    assert_eq!(mesh.promised(), []);
}

#[test]
fn a_lost_link_frees_what_it_had_promised() {
    let mut mesh = Mesh::new(&[]);
    mesh.open(TUNNEL, A, 1);
    mesh.due(Duration::ZERO);
    assert!(mesh.planes[&A].remove_link(&mesh.links[&(A, T)].clone()));
    let left: Vec<_> = both(A, RATE).into_iter().filter(|l| (l.0, l.1) != (A, T)).collect();
    assert_eq!(mesh.promised(), left);
}

#[test]
fn a_promise_is_asked_for_again_each_slice() {
    let mut mesh = Mesh::new(&[]);
    mesh.open(TUNNEL, A, 1);
    mesh.due(Duration::ZERO);
    assert_eq!(mesh.due(RENEW_EVERY / 2), 0);
    assert_eq!(mesh.due(RENEW_EVERY), 4);
    assert_eq!(mesh.told(), [(TUNNEL, 1, Ok(())), (TUNNEL, 1, Ok(()))]);
    assert_eq!(mesh.promised(), both(A, RATE));
}

#[test]
fn a_tunnel_that_moves_takes_its_reservation_along() {
    let mut mesh = Mesh::new(&[]);
    mesh.open(TUNNEL, A, 1);
    mesh.due(Duration::ZERO);
    mesh.open(TUNNEL, B, 2);
    mesh.due(Duration::ZERO);
    assert_eq!(mesh.told(), [(TUNNEL, 1, Ok(())), (TUNNEL, 2, Ok(()))]);
    assert_eq!(mesh.promised(), both(B, RATE));
    // The same route under another number: the late release changes nothing.
    mesh.open(TUNNEL, B, 3);
    mesh.due(Duration::ZERO);
    assert_eq!(mesh.promised(), both(B, RATE));
}

#[test]
fn silence_is_a_refusal_after_some_requests() {
    let mut mesh = Mesh::new(&[]);
    mesh.open(TUNNEL, A, 1);
    let s = &mesh.planes[&S];
    let begun = s.flows.now();
    let mut lost = Vec::new();
    for step in 0..=ASKS_MAX {
        s.reserve_all(begun + PATIENCE * step);
        lost.extend(written(&mesh.links[&(S, A)]));
    }
    let rates: Vec<u64> =
        lost.iter().map(|d| decode_reserve(Header::decode(d).unwrap().1).unwrap()).collect();
    assert_eq!(rates, [RATE, RATE, RATE, 0]);
    assert!(lost[1] == lost[0] && lost[2] == lost[0], "the same request");
    assert_eq!(mesh.told(), [(TUNNEL, 1, Err(None))]);
    assert_eq!(mesh.promised(), []);
}

#[test]
fn strangers_neither_ask_the_target_nor_answer_the_source() {
    let mut mesh = Mesh::new(&[]);
    let payload = encode_reserve(RATE);
    let kind = DatagramKind::Reserve;
    let asked = Header::new(kind, TunnelId(TUNNEL), 1, 9, route(&[S, A, T]));
    mesh.planes[&A].received(node(S), asked.encode(&payload[1..]));
    assert_eq!((mesh.dropped(A, "malformed"), mesh.pump()), (1, 0));
    mesh.open(TUNNEL, A, 1);
    let s = &mesh.planes[&S];
    s.reserve_all(s.flows.now());
    let sent = written(&mesh.links[&(S, A)]).remove(0);
    for (tag, why) in [(0, "untagged"), (1, "forged")] {
        let forged = Header { tag, position: 2, ..asked.clone() };
        mesh.planes[&T].received(node(A), forged.encode(&payload));
        assert_eq!(mesh.dropped(T, why), 1);
    }
    assert_eq!(mesh.pump(), 0);
    assert_eq!(mesh.promised(), [(S, A, RATE)]);
    let (request, _) = Header::decode(&sent).unwrap();
    let answer = |nodes: &[u8]| {
        let (kind, tunnel) = (DatagramKind::ReserveAnswer, request.tunnel);
        let header = Header::new(kind, tunnel, 1, request.sequence, route(nodes));
        Header { reply: true, position: nodes.len() as u8 - 1, ..header }
    };
    let granted = Answer::Granted { position: 2 };
    let refused = Answer::Refused { position: 1, side: Side::Next, available: 0 };
    let cases = [
        (Header { tag: 1, ..answer(&[T, A, S]) }, A, granted, "no true tag"),
        (answer(&[T, A, S]), A, granted, "no tag"),
        (answer(&[B, S]), B, refused, "not of the route"),
        (Header { route_id: 2, ..answer(&[A, S]) }, A, refused, "another route"),
        (Header { sequence: 1, ..answer(&[A, S]) }, A, refused, "another request"),
        (answer(&[T, A, S]), A, refused, "not who it says"),
    ];
    for (before, (header, from, answer, what)) in (0..).zip(cases) {
        assert_eq!(mesh.dropped(S, "reserve-answer-not-believed"), before);
        mesh.planes[&S].received(node(from), header.encode(&answer.encode()));
        assert_eq!(mesh.dropped(S, "reserve-answer-not-believed"), before + 1, "{what}");
    }
    assert_eq!(mesh.told(), []);
    mesh.planes[&S].received(node(A), answer(&[A, S]).encode(&refused.encode()));
    assert_eq!(mesh.told(), [(TUNNEL, 1, full(A, T, 0))]);
}
