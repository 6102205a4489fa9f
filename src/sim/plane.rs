//! The data planes of a world, as `net` has them: each datagram is encoded, travels hop by hop, and
//! every node on its way decides by itself; tunnels that carry traffic are watched by their receipts
//! and leave a silent route for the backup.
//!
//! Left out, because it is the business of the two ends: keys and tags, sending again what may be
//! lost, and everything that QUIC does.

use std::collections::BTreeMap;
use std::time::Duration;

use rand::RngExt;

use super::traffic::{Traffic, Travelled};
use super::{Event, World, ms};
use crate::engine::event::Input;
use crate::engine::forward::{
    Arrivals, Binding, DatagramKind, Delivery, Drop, Due, Header, HeaderView, Heard, OwnEnd,
    REPORT_EVERY, Receipt, Verdict, decide,
};
use crate::engine::traffic::{Asking, Ledger};
use crate::engine::types::{NodeId, Route, Timestamp, TunnelId};

/// Shortest sleep of the watch, as in `net`.
const SLEEP_MIN: Duration = Duration::from_millis(4);

/// The data plane of one node.
#[derive(Default)]
pub(super) struct Plane {
    pub(super) ledger: Ledger,
    /// The tunnels of this node that carry traffic or want a reservation.
    pub(super) flows: BTreeMap<TunnelId, Flow>,
    /// What arrived from callers.
    callers: BTreeMap<(NodeId, TunnelId), Arrivals>,
    /// When the watch is called next; 0 when it is not.
    wake_at: Timestamp,
    report_at: Timestamp,
}

impl Plane {
    /// A caller shakes hands anew.
    pub(super) fn forget_caller(&mut self, source: NodeId, tunnel: TunnelId) {
        self.callers.remove(&(source, tunnel));
    }
}

/// A tunnel of a node.
#[derive(Default)]
pub(super) struct Flow {
    /// The route in use and its number.
    pub(super) route: Option<(Route, u32)>,
    sequence: u64,
    own: OwnEnd,
    pub(super) asking: Option<Asking<()>>,
    pub(super) traffic: Option<Traffic>,
    /// Grows whenever other traffic begins.
    pub(super) turn: u32,
    pub(super) travelled: Travelled,
}

impl Flow {
    fn route_id(&self) -> u32 {
        self.route.as_ref().map_or(0, |(_, route_id)| *route_id)
    }

    fn next_sequence(&mut self) -> u64 {
        self.sequence += 1;
        self.sequence
    }
}

/// A datagram that leaves for another node, or is under way to it.
pub(super) struct Datagram {
    pub(super) from: usize,
    pub(super) to: usize,
    pub(super) bytes: Vec<u8>,
    /// What it takes on a link (bytes).
    weight: usize,
    /// The nodes that had it, source first: what the header claims is not what is checked.
    pub(super) trail: Vec<usize>,
}

impl World {
    // --- sending -------------------------------------------------------------------------------

    /// Sends a datagram from its source; `extra` is what its payload would take (bytes). Returns
    /// false when there is no such link.
    pub(super) fn leave_source(
        &mut self,
        node: usize,
        header: &Header,
        payload: &[u8],
        extra: usize,
    ) -> bool {
        let bytes = header.encode(payload);
        let weight = bytes.len() + extra;
        let datagram = Datagram { from: node, to: node, bytes, weight, trail: vec![node] };
        self.transmit(header.route.nodes()[1], Box::new(datagram))
    }

    /// Hands a datagram that is at node `to` to the link to its next node.
    fn transmit(&mut self, next: NodeId, mut datagram: Box<Datagram>) -> bool {
        let (Some(&to), from) = (self.by_id.get(&next), datagram.to) else { return false };
        let model = self.link(from, to).filter(|_| self.nodes[from].connected.contains(&to));
        let Some(model) = model else { return false };
        let random: f64 = self.random.random();
        let jitter = (2.0 * self.random.random::<f64>() - 1.0) * model.jitter_ms;
        let Some((wait, marked)) = self.queue(from, to, datagram.weight, model.rate) else {
            return true;
        };
        if random < model.loss {
            return true;
        }
        if marked {
            Header::mark_congestion(&mut datagram.bytes);
        }
        (datagram.from, datagram.to) = (from, to);
        let delay = ms((model.delay_ms + jitter).max(0.0));
        self.plan(self.now + wait + delay, Event::Datagram(datagram));
        true
    }

    /// A tunnel of this node has a packet to send.
    pub(super) fn send_packet(&mut self, node: usize, tunnel: TunnelId) {
        self.follow(node, tunnel);
        let now = self.now;
        let Some(flow) = self.nodes[node].plane.flows.get_mut(&tunnel) else { return };
        let Some(traffic) = flow.traffic else { return };
        flow.travelled.sent += 1;
        let Some((route, route_id)) = flow.route.clone() else { return };
        let sequence = flow.next_sequence();
        let header = Header::new(DatagramKind::Data, tunnel, route_id, sequence, route);
        let receipt = flow.own.sent(sequence, header.length() + traffic.bytes, now);
        let header = Header { receipt, ..header };
        let wake_at = flow.own.watch.next_timeout(now);
        self.check_first_hop(node, &header);
        if !self.leave_source(node, &header, &[], traffic.bytes) {
            self.leave(node, tunnel, Some(0));
        }
        if let Some(at) = wake_at {
            self.watch_by(node, at);
        }
    }

    fn send_beat(&mut self, node: usize, tunnel: TunnelId) {
        let now = self.now;
        let Some(flow) = self.nodes[node].plane.flows.get_mut(&tunnel) else { return };
        let Some((route, route_id)) = flow.route.clone() else { return };
        let sequence = flow.next_sequence();
        let header = Header::new(DatagramKind::Beat, tunnel, route_id, sequence, route);
        let header = Header { receipt: true, resumed: flow.own.resumes(), ..header };
        flow.own.beat(sequence, now);
        self.leave_source(node, &header, &[], 0);
    }

    // --- routes --------------------------------------------------------------------------------

    /// A node forwards by a new snapshot.
    pub(super) fn snapshot_taken(&mut self, node: usize) {
        let snapshot = self.nodes[node].forwarding.clone();
        self.follow_reservations(node, &snapshot);
        let flows = self.nodes[node].plane.flows.keys();
        let tunnels: Vec<TunnelId> = flows.copied().collect();
        if tunnels.is_empty() {
            return;
        }
        tunnels.into_iter().for_each(|tunnel| self.follow(node, tunnel));
        self.watch_by(node, self.now);
    }

    /// A tunnel takes the route of the snapshot, unless the one in use is newer.
    pub(super) fn follow(&mut self, node: usize, tunnel: TunnelId) {
        let snapshot = self.nodes[node].forwarding.clone();
        let Some(binding) = snapshot.tunnels.get(&tunnel) else { return };
        let Some(flow) = self.nodes[node].plane.flows.get(&tunnel) else { return };
        if let Some((route, route_id)) = binding.newer_than(flow.route_id()) {
            self.take_route(node, tunnel, route.clone(), route_id);
        }
    }

    fn take_route(&mut self, node: usize, tunnel: TunnelId, route: Route, route_id: u32) {
        let now = self.now;
        let Some(flow) = self.nodes[node].plane.flows.get_mut(&tunnel) else { return };
        let moves = flow.route.replace((route, route_id)).is_some();
        flow.sequence = 0;
        flow.own.moved(now);
        if moves {
            flow.travelled.moves += 1;
            flow.own.resume(true);
            self.send_beat(node, tunnel);
        }
    }

    /// Leaves a route that is lost for the backup, if there is one, and tells the engine; once for
    /// each loss.
    fn leave(&mut self, node: usize, tunnel: TunnelId, broken_at: Option<usize>) {
        let Some(flow) = self.nodes[node].plane.flows.get_mut(&tunnel) else { return };
        let route_id = flow.route_id();
        if !flow.own.lost(route_id, broken_at.is_none()) {
            return;
        }
        flow.travelled.losses += 1;
        let input = match broken_at {
            None => Input::RouteSilent { tunnel, route_id },
            Some(at) => Input::RouteBroken { tunnel, route_id, at },
        };
        self.plan(self.now, Event::Input(node, Box::new(input)));
        let snapshot = self.nodes[node].forwarding.clone();
        let binding: Option<&Binding> = snapshot.tunnels.get(&tunnel);
        let way_out = binding.and_then(|b| b.way_out(route_id, |to| self.carries_to(node, to)));
        if let Some(backup) = way_out {
            self.take_route(node, tunnel, backup.route.clone(), backup.route_id);
        }
    }

    /// A link of this node is gone: what it promised, and routes in use that begin with it.
    pub(super) fn link_lost(&mut self, node: usize, neighbour: NodeId) {
        let plane = &mut self.nodes[node].plane;
        plane.ledger.forget(neighbour);
        let begins = |flow: &Flow| {
            flow.route.as_ref().is_some_and(|(route, _)| route.nodes()[1] == neighbour)
        };
        let lost = plane.flows.iter().filter(|(_, flow)| begins(flow));
        let lost: Vec<TunnelId> = lost.map(|(tunnel, _)| *tunnel).collect();
        lost.into_iter().for_each(|tunnel| self.leave(node, tunnel, Some(0)));
    }

    /// Whether a node may hand datagrams to this neighbour.
    pub(super) fn carries_to(&self, node: usize, neighbour: NodeId) -> bool {
        let here = &self.nodes[node];
        self.by_id.get(&neighbour).is_some_and(|to| here.connected.contains(to))
            && !here.forwarding.down.contains(&neighbour)
    }

    // --- what is due ---------------------------------------------------------------------------

    /// The watch of a node wants to be called at this time, if not before.
    pub(super) fn watch_by(&mut self, node: usize, at: Timestamp) {
        let (at, now) = (at.max(self.now), self.now);
        let wake_at = &mut self.nodes[node].plane.wake_at;
        if *wake_at < now || at < *wake_at {
            *wake_at = at;
            self.plan(at, Event::Watch(node));
        }
    }

    /// Does what is due in all tunnels of a node.
    pub(super) fn watch(&mut self, node: usize) {
        let now = self.now;
        if self.nodes[node].engine.is_none() || self.nodes[node].plane.wake_at != now {
            return;
        }
        self.nodes[node].plane.wake_at = Timestamp(0);
        let tunnels: Vec<TunnelId> = self.nodes[node].plane.flows.keys().copied().collect();
        let mut next: Option<Timestamp> = None;
        for tunnel in tunnels {
            let Some(flow) = self.nodes[node].plane.flows.get_mut(&tunnel) else { continue };
            match flow.own.watch.due(now) {
                Some(Due::Beat) => self.send_beat(node, tunnel),
                Some(Due::Silent) => self.leave(node, tunnel, None),
                None => {}
            }
            let asks_at = self.reserve(node, tunnel);
            let Some(flow) = self.nodes[node].plane.flows.get(&tunnel) else { continue };
            let watch_at = flow.own.watch.next_timeout(now).map(|at| at.max(now + SLEEP_MIN));
            next = next.into_iter().chain(watch_at).chain(asks_at).min();
        }
        let plane = &mut self.nodes[node].plane;
        if plane.report_at <= now {
            plane.report_at = now + REPORT_EVERY;
            self.report(node);
        }
        // While a tunnel is in use, it is reported about too.
        if let Some(next) = next {
            let report_at = self.nodes[node].plane.report_at;
            self.watch_by(node, next.min(report_at));
        }
    }

    /// Tells the engine what traffic met in tunnels that are in use.
    fn report(&mut self, node: usize) {
        let now = self.now;
        let flows = self.nodes[node].plane.flows.iter_mut();
        let reports = flows.filter_map(|(tunnel, flow)| {
            let (route, route_id) = flow.route.clone().filter(|_| flow.own.watch.is_in_use(now))?;
            Some((*tunnel, flow.own.report(route, route_id, (0, Receipt::default()), now)))
        });
        let reports: Vec<_> = reports.collect();
        if !reports.is_empty() {
            self.plan(now, Event::Input(node, Box::new(Input::Routes(reports))));
        }
    }

    // --- receiving -----------------------------------------------------------------------------

    /// A datagram reaches a node.
    pub(super) fn received(&mut self, mut datagram: Box<Datagram>) {
        let Datagram { from, to, .. } = *datagram;
        if self.nodes[to].engine.is_none() || !self.nodes[to].connected.contains(&from) {
            return;
        }
        datagram.trail.push(to);
        self.check_trail(&datagram.trail);
        let Ok(view) = HeaderView::parse(&datagram.bytes) else { return };
        let verdict = decide(&view, self.id(to), self.id(from), |next| self.carries_to(to, next));
        let is_request = view.kind() == DatagramKind::Reserve;
        match verdict {
            Verdict::Drop(Drop::NoLink) => self.say_broken(to, &datagram.bytes),
            Verdict::Drop(_) => {}
            Verdict::Forward(_) if is_request && !self.relays_reserve(to, &datagram.bytes) => {}
            Verdict::Forward(_) if view.kind() == DatagramKind::Data && self.drops(to) => {}
            Verdict::Forward(next) => {
                Header::advance(&mut datagram.bytes);
                self.transmit(next, datagram);
            }
            Verdict::Deliver => self.arrived(to, &datagram.bytes),
        }
    }

    fn arrived(&mut self, node: usize, bytes: &[u8]) {
        let Ok((header, payload)) = Header::decode(bytes) else { return };
        match header.kind {
            DatagramKind::Data | DatagramKind::Beat => self.packet_arrived(node, &header),
            DatagramKind::Receipt => self.receipt_arrived(node, &header, payload),
            DatagramKind::Broken => self.broken_arrived(node, &header),
            DatagramKind::Reserve => self.reserve_arrived(node, &header, payload),
            DatagramKind::ReserveAnswer => self.reserve_answered(node, &header, payload),
            // Probes are not sent as datagrams here.
            DatagramKind::Probe | DatagramKind::ProbeAnswer => {}
        }
    }

    fn packet_arrived(&mut self, node: usize, header: &Header) {
        let (source, tunnel) = (header.route.source(), header.tunnel);
        let arrivals = self.nodes[node].plane.callers.entry((source, tunnel)).or_default();
        let heard = arrivals.heard(header);
        if heard != Heard::New {
            return;
        }
        let payload = arrivals.over(header.route_id).encode();
        if header.receipt {
            let (route_id, sequence) = (header.route_id, header.sequence);
            let (kind, route) = (DatagramKind::Receipt, header.route.reversed());
            let receipt = Header::new(kind, tunnel, route_id, sequence, route);
            self.leave_source(node, &Header { reply: true, ..receipt }, &payload, 0);
        }
        if header.kind == DatagramKind::Data {
            self.delivered(node, header);
        }
    }

    fn receipt_arrived(&mut self, node: usize, header: &Header, payload: &[u8]) {
        let now = self.now;
        let flow = self.nodes[node].plane.flows.get_mut(&header.tunnel);
        let (Some(flow), Some(receipt)) = (flow, Receipt::decode(payload)) else { return };
        if header.route_id != flow.route_id() {
            flow.own.watch.answered_late(now);
        } else if flow.own.receipt(header.sequence, receipt, now) == Some(Delivery::Starves) {
            self.leave(node, header.tunnel, None);
        }
    }

    /// A relay that cannot pass on a datagram of a tunnel tells the one who opened it.
    fn say_broken(&mut self, node: usize, bytes: &[u8]) {
        let Ok((header, _)) = Header::decode(bytes) else { return };
        let of_a_tunnel = matches!(header.kind, DatagramKind::Data | DatagramKind::Beat);
        let Some(route) = header.way_back().filter(|_| of_a_tunnel && !header.reply) else {
            return;
        };
        let Header { tunnel, route_id, sequence, .. } = header;
        let notice = Header::new(DatagramKind::Broken, tunnel, route_id, sequence, route);
        self.leave_source(node, &Header { reply: true, ..notice }, &[], 0);
    }

    fn broken_arrived(&mut self, node: usize, header: &Header) {
        let Some(flow) = self.nodes[node].plane.flows.get(&header.tunnel) else { return };
        let Some((route, route_id)) = &flow.route else { return };
        let nodes = header.route.nodes().len();
        let is_part = nodes < route.nodes().len() && header.route.leads_back_over(route);
        if is_part && header.route_id == *route_id && header.sequence <= flow.sequence {
            self.leave(node, header.tunnel, Some(nodes - 1));
        }
    }
}
