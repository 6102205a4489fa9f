//! The data plane: what arrives on a lane is passed on, taken or dropped; what tunnels and probes
//! send gets its route from the engine's snapshot. No waiting, no model, no decision of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use arc_swap::{ArcSwap, ArcSwapOption};
use tokio::sync::{Notify, mpsc};

use super::counters::Counters;
use super::emulation::Emulator;
use super::flows::{End, Flow, Flows, Proof, hold, is_handshake};
use super::link::{Link, LinkCounters};
use super::probes::{Allowances, Probes};
use super::reservations::Reservations;
use super::watch::Awake;
use crate::config::EmulatedLink;
use crate::engine::event::Input;
use crate::engine::forward::{
    DatagramKind, Drop, ForwardingSnapshot, Header, HeaderView, Heard, Verdict, decide,
};
use crate::engine::measure::LinkReport;
use crate::engine::measure::link::NEIGHBOURS_MAX;
use crate::engine::traffic::Passing;
use crate::engine::types::{NodeId, Timestamp, TunnelId};

/// Packets waiting for the tunnels of this node; beyond, they are dropped.
pub const INBOUND_MAX: usize = 4_096;
/// Those of them that prove nothing: handshakes, and whatever a stranger sends. A flood of them leaves
/// the others their places.
pub const UNPROVED_INBOUND_MAX: usize = 256;
/// Fixed half of the virtual addresses: an IPv6 unique local prefix (RFC 4193) of our own.
const PREFIX: [u8; 8] = [0xfd, b'm', b'e', b's', b'h', b'w', b's', 0];
/// Set in the port of a virtual address when the other end opened the tunnel.
const THEIRS: u16 = 0x8000;

/// The far end of a tunnel as a virtual address, which is all that QUIC sees of a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FarEnd {
    /// The node.
    pub node: NodeId,
    /// The tunnel.
    pub tunnel: TunnelId,
    /// Whether this node opened it.
    pub ours: bool,
}

impl FarEnd {
    /// As a socket address.
    pub fn to_addr(self) -> SocketAddr {
        let mut octets = [0; 16];
        octets[..8].copy_from_slice(&PREFIX);
        octets[8..].copy_from_slice(&self.node.0);
        let port = self.tunnel.0 | if self.ours { 0 } else { THEIRS };
        SocketAddr::new(IpAddr::V6(Ipv6Addr::from(octets)), port)
    }

    /// From a socket address; `None` when it is not one of ours.
    pub fn from_addr(addr: SocketAddr) -> Option<Self> {
        let IpAddr::V6(ip) = addr.ip() else { return None };
        let octets = ip.octets();
        if octets[..8] != PREFIX {
            return None;
        }
        let node = NodeId(octets[8..].try_into().ok()?);
        let tunnel = TunnelId(addr.port() & !THEIRS);
        Some(Self { node, tunnel, ours: addr.port() & THEIRS == 0 })
    }
}

/// A packet for a tunnel of this node.
#[derive(Debug)]
pub struct Inbound {
    /// Where it came from.
    pub from: SocketAddr,
    /// The datagram that brought it.
    datagram: Vec<u8>,
    /// Where in it the packet begins.
    begins_at: usize,
    /// It met congestion.
    pub congestion: bool,
    /// Its place among those that prove nothing, when it is one.
    pub(super) _place: Option<Place>,
}

impl Inbound {
    /// The packet.
    pub fn packet(&self) -> &[u8] {
        &self.datagram[self.begins_at..]
    }
}

/// A place among the packets of the queue that prove nothing; free again when it is dropped.
#[derive(Debug)]
pub(super) struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(taken: &Arc<AtomicUsize>) -> Option<Self> {
        let more = |taken| (taken < UNPROVED_INBOUND_MAX).then_some(taken + 1);
        let taken_now = taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        taken_now.is_ok().then(|| Self(taken.clone()))
    }
}

impl std::ops::Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// See the module documentation.
pub struct DataPlane {
    pub(super) me: NodeId,
    pub(super) snapshot: ArcSwap<ForwardingSnapshot>,
    pub(super) links: ArcSwap<BTreeMap<NodeId, Arc<Link>>>,
    emulator: ArcSwapOption<Emulator>,
    /// The only neighbours that links may exist to, on a node that emulates.
    only: ArcSwapOption<BTreeSet<NodeId>>,
    /// Woken when the peers without a link have changed.
    unlinked_changed: Notify,
    pub(super) flows: Flows,
    pub(super) awake: Awake,
    pub(super) reservations: Reservations,
    pub(super) probes: Probes,
    inbound: mpsc::Sender<Inbound>,
    unproved: Arc<AtomicUsize>,
    pub(super) allowances: Allowances,
    inbound_receiver: Mutex<Option<mpsc::Receiver<Inbound>>>,
    pub(super) events: mpsc::Sender<Input>,
    pub(super) counters: Counters,
    tap: ArcSwapOption<mpsc::Sender<Vec<u8>>>,
}

impl DataPlane {
    /// A data plane without links; what it measures goes to `events`.
    pub fn new(me: NodeId, events: mpsc::Sender<Input>) -> Self {
        let (inbound, receiver) = mpsc::channel(INBOUND_MAX);
        Self {
            me,
            snapshot: ArcSwap::default(),
            links: ArcSwap::default(),
            emulator: ArcSwapOption::empty(),
            only: ArcSwapOption::empty(),
            unlinked_changed: Notify::new(),
            flows: Flows::default(),
            awake: Awake::default(),
            reservations: Reservations::default(),
            probes: Probes::default(),
            inbound,
            unproved: Arc::default(),
            allowances: Allowances::default(),
            inbound_receiver: Mutex::new(Some(receiver)),
            events,
            counters: Counters::default(),
            tap: ArcSwapOption::empty(),
        }
    }

    /// The same, but it passes on so much for each neighbour (bytes/s); 0 is unlimited.
    pub fn with_relay_rate(self, relay_rate: u64) -> Self {
        Self { allowances: Allowances::with_relay_rate(relay_rate), ..self }
    }

    /// The node that this is.
    pub fn me(&self) -> NodeId {
        self.me
    }

    /// What was counted.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Copies every datagram that is passed on for others to `tap`, as a packet capture would.
    pub fn set_tap(&self, tap: mpsc::Sender<Vec<u8>>) {
        self.tap.store(Some(Arc::new(tap)));
    }

    /// Changes the emulated conditions of a link. Returns false when this node does not emulate.
    pub fn emulate(&self, neighbour: NodeId, link: EmulatedLink) -> bool {
        let emulator = self.emulator.load();
        emulator.as_ref().inspect(|emulator| emulator.set(neighbour, link)).is_some()
    }

    pub(super) fn set_emulator(
        &self,
        emulator: Option<Arc<Emulator>>,
        only: Option<BTreeSet<NodeId>>,
    ) {
        self.emulator.store(emulator);
        self.only.store(only.map(Arc::new));
    }

    /// What stands between the queues and the lanes of this node's links.
    pub(super) fn emulator(&self) -> Option<Arc<Emulator>> {
        self.emulator.load_full()
    }

    /// Whether there may be a link to this peer.
    pub(super) fn may_link(&self, peer: NodeId) -> bool {
        self.only.load().as_ref().is_none_or(|only| only.contains(&peer))
            && !self.snapshot.load().unlinked.contains(&peer)
    }

    /// Waits until there may be a link to this peer, or until there may not.
    pub(super) async fn until_link(&self, peer: NodeId, allowed: bool) {
        loop {
            let mut changed = std::pin::pin!(self.unlinked_changed.notified());
            changed.as_mut().enable();
            if self.may_link(peer) == allowed {
                return;
            }
            changed.await;
        }
    }

    pub(super) fn set_snapshot(&self, snapshot: Arc<ForwardingSnapshot>) {
        let before = self.snapshot.swap(snapshot.clone());
        if before.unlinked != snapshot.unlinked {
            self.unlinked_changed.notify_waiters();
        }
        self.flows.close(|far_end| snapshot.tunnels.contains_key(&far_end.tunnel));
        self.follow_all(&snapshot);
        self.follow_reservations(&snapshot);
    }

    /// Whether any candidate route of a tunnel of this node is alive.
    pub(super) fn is_reachable(&self, tunnel: TunnelId) -> bool {
        self.snapshot.load().tunnels.get(&tunnel).is_some_and(|binding| binding.reachable)
    }

    /// Whether bandwidth is to be set aside for a tunnel of this node.
    pub(super) fn is_reserving(&self, tunnel: TunnelId) -> bool {
        let snapshot = self.snapshot.load();
        snapshot.tunnels.get(&tunnel).is_some_and(|binding| binding.reserved.is_some())
    }

    /// Whether the far end of a tunnel of this node answers, as far as is known.
    pub(super) fn answers(&self, tunnel: TunnelId) -> bool {
        let snapshot = self.snapshot.load();
        let node = snapshot.tunnels.get(&tunnel).map(|binding| binding.destination);
        let flow = node.and_then(|node| self.flows.of(FarEnd { node, tunnel, ours: true }));
        flow.is_none_or(|flow| match &hold(&flow).end {
            End::Own(own) => own.answers(),
            End::Their(_) => true,
        })
    }

    /// What the route of a tunnel of this node can carry (bytes/s), where that is known.
    pub(super) fn capacity(&self, tunnel: TunnelId) -> Option<f64> {
        self.snapshot.load().tunnels.get(&tunnel).and_then(|binding| binding.capacity)
    }

    /// Adds a link, or replaces the one to the same neighbour. Returns false when there are
    /// [`NEIGHBOURS_MAX`] others.
    pub(super) fn add_link(&self, link: Arc<Link>) -> bool {
        let fits = |links: &BTreeMap<NodeId, Arc<Link>>| {
            links.len() < NEIGHBOURS_MAX || links.contains_key(&link.neighbour())
        };
        let before = self.links.rcu(|links| {
            let mut links = BTreeMap::clone(links);
            if fits(&links) {
                links.insert(link.neighbour(), link.clone());
            }
            links
        });
        fits(&before)
    }

    /// Removes a link. Returns false when another one has taken its place.
    pub(super) fn remove_link(&self, link: &Arc<Link>) -> bool {
        let is_it = |links: &BTreeMap<NodeId, Arc<Link>>| {
            links.get(&link.neighbour()).is_some_and(|known| Arc::ptr_eq(known, link))
        };
        let before = self.links.rcu(|links| {
            let mut links = BTreeMap::clone(links);
            if is_it(&links) {
                links.remove(&link.neighbour());
            }
            links
        });
        let removed = is_it(&before);
        if removed {
            self.reservations.forget(link.neighbour());
            self.link_lost(link.neighbour());
        }
        removed
    }

    pub(super) fn take_slice(&self) -> Vec<(NodeId, LinkReport)> {
        self.links.load().iter().map(|(node, link)| (*node, link.take_report())).collect()
    }

    /// The counters of all links.
    pub fn links(&self) -> BTreeMap<NodeId, LinkCounters> {
        self.links.load().iter().map(|(node, link)| (*node, link.counters())).collect()
    }

    pub(super) fn take_inbound(&self) -> Option<mpsc::Receiver<Inbound>> {
        self.inbound_receiver.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Datagrams arrived from a neighbour. Those that go on leave by the neighbour that they go to,
    /// as many at once as come in a row.
    pub(super) fn received_all(&self, from: NodeId, datagrams: impl Iterator<Item = Vec<u8>>) {
        let mut passing: Option<NodeId> = None;
        let mut batch = Vec::new();
        for bytes in datagrams {
            let Some((next, bytes)) = self.judge(from, bytes) else { continue };
            if let Some(before) = passing.replace(next).filter(|before| *before != next) {
                self.send_all(before, batch.drain(..));
            }
            batch.push(bytes);
        }
        if let Some(next) = passing {
            self.send_all(next, batch.drain(..));
        }
    }

    #[cfg(test)]
    pub(super) fn received(&self, from: NodeId, bytes: Vec<u8>) {
        self.received_all(from, std::iter::once(bytes));
    }

    /// A datagram arrived from a neighbour. Returns it, and where to, when it goes on.
    fn judge(&self, from: NodeId, mut bytes: Vec<u8>) -> Option<(NodeId, Vec<u8>)> {
        let Ok(view) = HeaderView::parse(&bytes) else {
            self.counters.count("malformed");
            return None;
        };
        let verdict = decide(&view, self.me, from, |node| self.carries_to(node));
        match verdict {
            Verdict::Drop(why) => {
                self.counters.count(why.as_str());
                if why == Drop::NoLink {
                    self.say_broken(&bytes);
                }
            }
            Verdict::Forward(_)
                if view.kind() == DatagramKind::Reserve && !self.relays_reserve(&bytes) => {}
            Verdict::Forward(next) => {
                // What keeps routes and reservations alive is small, and is not held back.
                let passing = match view.kind() {
                    DatagramKind::Data => {
                        self.allowances.passes(from, bytes.len(), || self.flows.now())
                    }
                    _ => Passing::Freely,
                };
                match passing {
                    Passing::Freely => {}
                    Passing::Marked => Header::mark_congestion(&mut bytes),
                    Passing::Dropped => {
                        self.counters.count("relay-rate");
                        return None;
                    }
                }
                Header::advance(&mut bytes);
                self.counters.forwards(bytes.len());
                if let Some(tap) = self.tap.load().as_ref() {
                    let _ = tap.try_send(bytes.clone());
                }
                return Some((next, bytes));
            }
            Verdict::Deliver => self.arrived(from, bytes),
        }
        None
    }

    fn arrived(&self, from: NodeId, bytes: Vec<u8>) {
        let Ok((header, payload)) = Header::decode(&bytes) else {
            return self.counters.count("malformed");
        };
        match header.kind {
            DatagramKind::Data => self.deliver(&header, bytes),
            DatagramKind::Probe => self.answer_probe(from, &header),
            DatagramKind::ProbeAnswer => self.probe_answered(&header),
            DatagramKind::Beat => self.beat_arrived(&header, payload),
            DatagramKind::Receipt => self.receipt_arrived(&header, payload),
            DatagramKind::Broken => self.broken_arrived(&header),
            DatagramKind::Reserve => self.reserve_arrived(&header, payload),
            DatagramKind::ReserveAnswer => self.reserve_answered(&header, payload),
        }
    }

    /// Sends packets of a tunnel. Without a route they are lost, as on any network.
    pub(super) fn send_packets<'a>(
        &self,
        to: SocketAddr,
        packets: impl Iterator<Item = &'a [u8]> + Clone,
    ) {
        let Some(far_end) = FarEnd::from_addr(to) else {
            return self.counters.count("not-a-tunnel-address");
        };
        let now = self.flows.now();
        let flow = if far_end.ours {
            let snapshot = self.snapshot.load();
            let binding = snapshot.tunnels.get(&far_end.tunnel);
            let binding = binding.filter(|binding| binding.destination == far_end.node);
            binding.map(|binding| {
                let flow = self.flows.of_or_new(far_end);
                self.follow(&mut hold(&flow), binding, now);
                flow
            })
        } else {
            self.flows.of(far_end)
        };
        let Some(flow) = flow else { return self.counters.count("no-route") };
        let mut flow = hold(&flow);
        let mut is_new = false;
        // What waits before it is being sent again, and goes first.
        let is_resending = flow.out.waiting() > 0;
        for packet in packets.clone() {
            if !flow.pace.allows(packet.len(), now) {
                flow.tries.withhold(packet.len(), Instant::now());
                continue;
            }
            if let Some((route, route_id)) = flow.claimed_way(packet) {
                let header = Header::new(DatagramKind::Data, far_end.tunnel, route_id, 0, route);
                let header = Header { reply: true, ..header };
                self.send(header.route.nodes()[1], header.encode(packet));
            } else if flow.out.route().is_none() {
                self.counters.count("no-route");
            } else {
                if flow.out.push(packet.to_vec(), now) {
                    self.counters.count("resend-queue-full");
                }
                is_new = true;
            }
        }
        if is_new && !is_resending {
            self.send_waiting(&mut flow, usize::MAX, now);
        }
        self.plan(&mut flow, now);
        for packet in packets {
            if let Some((next, copy)) = flow.copy_of(packet, now)
                && self.carries_to(next)
            {
                self.send(next, copy);
            }
        }
    }

    /// Sends what waits in a tunnel, up to about this many bytes.
    pub(super) fn send_waiting(&self, flow: &mut Flow, bytes_max: usize, now: Timestamp) {
        let mut bytes = 0;
        let mut batch = Vec::new();
        let mut towards = None;
        while bytes < bytes_max.max(1)
            && let Some((next, datagram)) = flow.next_datagram(now)
        {
            bytes += datagram.len();
            // The route, and with it the neighbour, stays while the flow is held.
            towards = Some(next);
            batch.push(datagram);
        }
        if let Some(next) = towards
            && !self.send_all(next, batch.into_iter())
        {
            self.route_broken(flow, 0, now);
        }
    }

    /// Whether datagrams may be handed to this neighbour.
    pub(super) fn carries_to(&self, neighbour: NodeId) -> bool {
        let links = self.links.load();
        links.contains_key(&neighbour) && !self.snapshot.load().down.contains(&neighbour)
    }

    /// Returns false when there is no such link.
    pub(super) fn send(&self, next: NodeId, bytes: Vec<u8>) -> bool {
        self.send_all(next, std::iter::once(bytes))
    }

    /// Returns false when there is no such link.
    fn send_all(&self, next: NodeId, datagrams: impl Iterator<Item = Vec<u8>>) -> bool {
        let links = self.links.load();
        let Some(link) = links.get(&next) else {
            datagrams.for_each(|_| self.counters.count("no-link"));
            return false;
        };
        link.enqueue_batch(datagrams);
        true
    }

    fn deliver(&self, header: &Header, datagram: Vec<u8>) {
        let begins_at = header.length();
        let packet = &datagram[begins_at..];
        let node = header.route.source();
        let far_end = FarEnd { node, tunnel: header.tunnel, ours: header.reply };
        let flow =
            if header.reply { self.flows.of(far_end) } else { Some(self.flows.of_or_new(far_end)) };
        let mut is_proved = false;
        if let Some(flow) = flow {
            let (mut flow, now) = (hold(&flow), self.flows.now());
            let (proof, handshake) = (flow.judge(header, packet), is_handshake(packet));
            flow.came_over(header, proof, handshake, now);
            match proof {
                // QUIC would drop it too.
                Proof::Proved(Heard::Replayed) => return self.counters.count("replayed"),
                Proof::Proved(heard) => {
                    is_proved = true;
                    if let End::Own(own) = &mut flow.end {
                        own.heard(now);
                        self.plan(&mut flow, now);
                    } else if header.receipt && heard == Heard::New {
                        self.send_receipt(&flow, header);
                    }
                }
                // A caller that was restarted shakes hands under another key: QUIC decides.
                Proof::Forged if !handshake => {
                    self.counters.count("forged");
                    if flow.is_starved_by(header, now) {
                        self.starved(&mut flow, now);
                    }
                    return;
                }
                Proof::Forged | Proof::Unknown => {}
            }
        }
        let place = match is_proved {
            true => None,
            false => match Place::take(&self.unproved) {
                Some(place) => Some(place),
                None => return self.counters.count("unproved-queue-full"),
            },
        };
        let (from, congestion) = (far_end.to_addr(), header.congestion);
        let inbound = Inbound { from, datagram, begins_at, congestion, _place: place };
        if self.inbound.try_send(inbound).is_err() {
            self.counters.count("inbound-queue-full");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::types::Route;

    fn node(byte: u8) -> NodeId {
        NodeId([byte; 8])
    }

    #[test]
    fn far_ends_survive_being_addresses() {
        for ours in [true, false] {
            let far_end = FarEnd { node: node(7), tunnel: TunnelId(300), ours };
            assert_eq!(FarEnd::from_addr(far_end.to_addr()), Some(far_end));
        }
        assert_eq!(FarEnd::from_addr("127.0.0.1:1".parse().unwrap()), None);
    }

    #[test]
    fn wrong_datagrams_are_counted_drops() {
        let (events, _receiver) = mpsc::channel(8);
        let plane = DataPlane::new(node(1), events);
        let route =
            |nodes: &[u8]| Route::new(nodes.iter().map(|n| node(*n)).collect::<Vec<_>>()).unwrap();
        let header = |position, nodes: &[u8]| Header {
            position,
            ..Header::new(DatagramKind::Data, TunnelId(1), 1, 0, route(nodes))
        };
        plane.received(node(0), vec![1, 2, 3]);
        plane.received(node(0), header(1, &[0, 2]).encode(b""));
        plane.received(node(5), header(1, &[0, 1]).encode(b""));
        plane.received(node(0), header(1, &[0, 1, 2]).encode(b""));
        plane.send_packets("[::1]:9".parse().unwrap(), [&b"x"[..]].into_iter());
        let beat = Header { kind: DatagramKind::Beat, ..header(1, &[0, 1]) };
        plane.received(node(0), beat.encode(b""));
        let expected = BTreeMap::from([
            ("malformed", 1),
            ("misaddressed", 1),
            ("wrong-neighbour", 1),
            ("no-link", 1),
            ("not-a-tunnel-address", 1),
            ("not-for-this-node", 1),
        ]);
        assert_eq!(plane.counters().dropped(), expected);
        plane.received(node(0), header(1, &[0, 1]).encode(b"hello"));
        let inbound = plane.take_inbound().unwrap().try_recv().unwrap();
        assert_eq!(inbound.packet(), b"hello");
    }
}
