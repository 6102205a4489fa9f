//! The routes in use are watched, and left when they fall silent: receipts and beats between the two
//! ends of a tunnel, the notice of a relay whose next link is gone, the move to the backup that the
//! snapshot names, and what is told the engine. The rules are
//! [`RouteWatch`](crate::engine::forward::RouteWatch) and [`OwnEnd`](crate::engine::forward::OwnEnd);
//! this carries them out.
//!
//! Only tunnels of which something is due are looked at: each has one timer at most.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use quinn::Connection;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::flows::{End, Flow, Proof, hold};
use super::plane::{DataPlane, FarEnd};
use super::sending::{KEPT_FOR, RESEND_BYTES, RESEND_EVERY};
use super::tries::Tries;
use crate::engine::event::Input;
use crate::engine::forward::{
    Binding, DatagramKind, Delivery, Due, ForwardingSnapshot, Header, Heard, REPORT_EVERY, Receipt,
    RouteKey, Seen,
};
use crate::engine::types::{NodeId, Route, Timestamp, TunnelId};

/// How often what is kept of a tunnel is looked through for what is too old.
const SWEEP_EVERY: Duration = Duration::from_secs(1);
/// Shortest sleep while nothing is sent again: bounds what many tunnels cost.
const SLEEP_MIN: Duration = Duration::from_millis(4);
/// Notices of broken routes that a relay sends in a second; further datagrams are dropped without.
pub const BROKEN_PER_S: u64 = 100;
/// Names the secret that both ends draw from their TLS session (RFC 5705).
const KEY_LABEL: &[u8] = b"meshwise-route/1";

/// When the watch wakes, and for which tunnels.
#[derive(Default)]
pub(super) struct Awake {
    timers: Mutex<Timers>,
    pub(super) early: Notify,
    /// Second in which broken routes were told, and how many.
    told: AtomicU64,
}

/// The tunnels of which something is due: those in use, and those with packets that are kept.
#[derive(Default)]
struct Timers {
    due: BTreeSet<(Timestamp, FarEnd)>,
    /// Until when the watch sleeps; in the past while it does not.
    wakes_at: Timestamp,
}

impl Awake {
    fn lock(&self) -> MutexGuard<'_, Timers> {
        self.timers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The watch looks at a tunnel at this time, or sooner.
    fn set(&self, flow: &mut Flow, at: Timestamp) {
        if flow.due_at.is_some_and(|due_at| due_at <= at) {
            return;
        }
        let mut timers = self.lock();
        if let Some(before) = flow.due_at.replace(at) {
            timers.due.remove(&(before, flow.far_end));
        }
        timers.due.insert((at, flow.far_end));
        if at < timers.wakes_at {
            self.early.notify_one();
        }
    }

    /// Takes out what is due.
    fn take_due(&self, now: Timestamp) -> Vec<(Timestamp, FarEnd)> {
        let mut timers = self.lock();
        timers.wakes_at = now;
        let mut due = Vec::new();
        while timers.due.first().is_some_and(|(at, _)| *at <= now) {
            due.extend(timers.due.pop_first());
        }
        due
    }

    /// Until when the watch is to sleep, at most `at_most`.
    fn sleep(&self, at_most: Timestamp) -> Timestamp {
        let mut timers = self.lock();
        let first = timers.due.first().map_or(at_most, |(at, _)| *at);
        timers.wakes_at = first.min(at_most);
        timers.wakes_at
    }

    /// All tunnels of this node of which something is due.
    fn own(&self) -> BTreeSet<FarEnd> {
        let timers = self.lock();
        timers.due.iter().map(|(_, far_end)| *far_end).filter(|far_end| far_end.ours).collect()
    }

    /// Whether one more broken route may be told in this second.
    fn may_tell(&self, now: Timestamp) -> bool {
        let second = now.0 / 1_000_000;
        let next = |told: u64| match (told >> 16 == second, told & 0xffff) {
            (true, count) if count >= BROKEN_PER_S => None,
            (true, _) => Some(told + 1),
            (false, _) => Some(second << 16 | 1),
        };
        self.told.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next).is_ok()
    }
}

/// Watches until `stop`.
pub(super) async fn run(plane: Arc<DataPlane>, stop: CancellationToken) {
    let mut report_at = plane.flows.now() + REPORT_EVERY;
    loop {
        let now = plane.flows.now();
        plane.watch_due(now);
        let reserve_at = plane.reserve_all(now);
        if report_at <= now {
            report_at = now + REPORT_EVERY;
            plane.report(now);
        }
        let wakes_at = plane.awake.sleep(reserve_at.min(report_at));
        tokio::select! {
            () = stop.cancelled() => return,
            () = plane.awake.early.notified() => {}
            () = tokio::time::sleep_until(plane.flows.instant(wakes_at).into()) => {}
        }
    }
}

impl DataPlane {
    // --- keys ----------------------------------------------------------------------------------

    /// The handshake of a tunnel is done: from now on its datagrams prove themselves. Returns a
    /// number for [`DataPlane::take_key`]; `None` when TLS gives no secret.
    pub(super) fn set_key(
        &self,
        far_end: FarEnd,
        connection: &Connection,
        tries: &Arc<Tries>,
    ) -> Option<u64> {
        let caller = if far_end.ours { self.me } else { far_end.node };
        let context = [&caller.0[..], &far_end.tunnel.0.to_be_bytes()].concat();
        let mut secret = [0; 32];
        let exported = connection.export_keying_material(&mut secret, KEY_LABEL, &context);
        let number = exported.ok().map(|()| self.flows.set_key(far_end, RouteKey::new(&secret)));
        if let Some(flow) = self.flows.of(far_end).filter(|_| number.is_some()) {
            hold(&flow).tries = tries.clone();
        }
        self.reserve_anew(far_end);
        number
    }

    /// A connection begins. Returns what it shares with the data plane, from its first packet on unless
    /// another connection to the same far end goes on.
    pub(super) fn tries(&self, far_end: Option<FarEnd>) -> Arc<Tries> {
        let tries = Arc::default();
        let flow = far_end.and_then(|far_end| match far_end.ours {
            true => Some(self.flows.of_or_new(far_end)),
            false => self.flows.of(far_end),
        });
        if let Some(flow) = flow {
            let mut flow = hold(&flow);
            if flow.key().is_none() {
                flow.tries = Arc::clone(&tries);
            }
        }
        tries
    }

    /// A connection of this node is closed; see [`Flows::closed`](super::flows::Flows::closed).
    pub(super) fn closed(&self, far_end: FarEnd, number: u64) {
        self.flows.closed(far_end, number);
    }

    /// The connection is gone; with a number, only the key of that number goes.
    pub(super) fn take_key(&self, far_end: FarEnd, number: Option<u64>) {
        self.flows.take_key(far_end, number);
        if !far_end.ours && self.flows.of(far_end).is_none() {
            self.caller_left(far_end);
        }
    }

    // --- what is due ---------------------------------------------------------------------------

    /// Does what is due. A tunnel that is idle costs nothing.
    fn watch_due(&self, now: Timestamp) {
        for (at, far_end) in self.awake.take_due(now) {
            let Some(flow) = self.flows.of(far_end) else { continue };
            let mut flow = hold(&flow);
            // Another one of the same name sets its own timer.
            if flow.due_at != Some(at) {
                continue;
            }
            flow.due_at = None;
            self.watch(&mut flow, now);
            self.plan(&mut flow, now);
        }
    }

    fn watch(&self, flow: &mut Flow, now: Timestamp) {
        flow.out.forget_older_than(now);
        if flow.out.waiting() > 0 {
            self.send_waiting(flow, RESEND_BYTES, now);
        }
        let End::Own(own) = &mut flow.end else { return };
        match own.watch.due(now) {
            Some(Due::Beat) => self.send_beat(flow, now),
            Some(Due::Silent) => {
                self.counters.count("route-silent");
                self.leave(flow, None, now);
            }
            None => {}
        }
    }

    /// Has the watch look at a tunnel when something of it is due next.
    pub(super) fn plan(&self, flow: &mut Flow, now: Timestamp) {
        let resend =
            (flow.out.waiting() > 0 && flow.out.route().is_some()).then_some(now + RESEND_EVERY);
        let forget = flow.out.oldest().map(|at| (at + KEPT_FOR).max(now + SWEEP_EVERY));
        let watch = match &flow.end {
            End::Own(own) => own.watch.next_timeout(now).map(|at| at.max(now + SLEEP_MIN)),
            End::Their(_) => None,
        };
        if let Some(at) = [resend, forget, watch].into_iter().flatten().min() {
            self.awake.set(flow, at);
        }
    }

    /// Tells the engine what traffic met in tunnels that are in use.
    fn report(&self, now: Timestamp) {
        let mut reports = Vec::new();
        for flow in self.awake.own().into_iter().filter_map(|far_end| self.flows.of(far_end)) {
            let mut flow = hold(&flow);
            let Some((route, route_id)) = flow.out.route() else { continue };
            let (tunnel, route) = (flow.far_end.tunnel, route.clone());
            let back_route = flow.arrivals.newest().map_or(0, |seen| seen.route_id);
            let back = flow.arrivals.over(back_route);
            let End::Own(own) = &mut flow.end else { continue };
            if !own.watch.is_in_use(now) {
                continue;
            }
            reports.push((tunnel, own.report(route, route_id, (back_route, back), now)));
        }
        if !reports.is_empty() && self.events.try_send(Input::Routes(reports)).is_err() {
            self.counters.count("event-queue-full");
        }
    }

    // --- routes --------------------------------------------------------------------------------

    /// All tunnels of this node take the routes of a new snapshot.
    pub(super) fn follow_all(&self, snapshot: &ForwardingSnapshot) {
        let now = self.flows.now();
        for (tunnel, binding) in &snapshot.tunnels {
            let far_end = FarEnd { node: binding.destination, tunnel: *tunnel, ours: true };
            if let Some(flow) = self.flows.of(far_end) {
                self.follow(&mut hold(&flow), binding, now);
            }
        }
    }

    /// Takes the route of the snapshot, unless the one in use is newer.
    pub(super) fn follow(&self, flow: &mut Flow, binding: &Binding, now: Timestamp) {
        if let Some((route, route_id)) = binding.newer_than(flow.out.route_id()) {
            self.take_route(flow, route.clone(), route_id, now);
        }
        flow.copies.follow(binding.backup.as_ref().filter(|_| binding.copies));
    }

    /// Moves a tunnel of this node. What may be lost with the route before is sent again, so that
    /// nothing new overtakes it; the far end is told to do the same.
    fn take_route(&self, flow: &mut Flow, route: Route, route_id: u32, now: Timestamp) {
        let moves = flow.out.route().is_some();
        flow.out.move_to(route, route_id);
        let proves = flow.key().is_some();
        let End::Own(own) = &mut flow.end else { return };
        own.moved(now);
        if moves {
            own.resume(proves);
            self.send_beat(flow, now);
            flow.out.resend(now);
            self.send_waiting(flow, RESEND_BYTES, now);
            self.plan(flow, now);
        }
    }

    /// Leaves a route that is lost for the backup, if there is one, and tells the engine; once for
    /// each loss.
    fn leave(&self, flow: &mut Flow, broken_at: Option<usize>, now: Timestamp) {
        let (tunnel, left) = (flow.far_end.tunnel, flow.out.route_id());
        let End::Own(own) = &mut flow.end else { return };
        if !own.lost(left, broken_at.is_none()) {
            return;
        }
        let input = match broken_at {
            None => Input::RouteSilent { tunnel, route_id: left },
            Some(at) => Input::RouteBroken { tunnel, route_id: left, at },
        };
        if self.events.try_send(input).is_err() {
            self.counters.count("event-queue-full");
        }
        let snapshot = self.snapshot.load();
        let binding = snapshot.tunnels.get(&tunnel);
        let way_out = binding.and_then(|b| b.way_out(left, |node| self.carries_to(node)));
        if let Some(backup) = way_out {
            self.take_route(flow, backup.route.clone(), backup.route_id, now);
        }
    }

    /// The link after node `at` of the route in use is gone.
    pub(super) fn route_broken(&self, flow: &mut Flow, at: usize, now: Timestamp) {
        self.leave(flow, Some(at), now);
    }

    /// The route in use answers and delivers nothing. For what follows from that it is silent.
    pub(super) fn starved(&self, flow: &mut Flow, now: Timestamp) {
        self.counters.count("route-starves");
        self.leave(flow, None, now);
    }

    /// A link of this node is gone: routes in use that begin with it are lost.
    pub(super) fn link_lost(&self, neighbour: NodeId) {
        let now = self.flows.now();
        for flow in self.flows.all() {
            let mut flow = hold(&flow);
            let first = flow.out.route().map(|(route, _)| route.nodes()[1]);
            if flow.far_end.ours && first == Some(neighbour) {
                self.route_broken(&mut flow, 0, now);
            }
        }
    }

    // --- datagrams about routes ----------------------------------------------------------------

    fn send_beat(&self, flow: &mut Flow, now: Timestamp) {
        let Some(key) = flow.key().cloned() else { return };
        let Some((route, route_id)) = flow.out.route() else { return };
        let (route, tunnel) = (route.clone(), flow.far_end.tunnel);
        let sequence = flow.out.next_sequence();
        let seen = flow.arrivals.newest().map(|seen| seen.encode());
        let payload = seen.as_ref().map_or(&[][..], |seen| &seen[..]);
        let End::Own(own) = &mut flow.end else { return };
        let header = Header::new(DatagramKind::Beat, tunnel, route_id, sequence, route);
        let mut header = Header { receipt: true, resumed: own.resumes(), ..header };
        own.beat(sequence, now);
        header.seal(&key, payload);
        self.send(header.route.nodes()[1], header.encode(payload));
    }

    /// Answers a datagram that asked, on the way that it took.
    pub(super) fn send_receipt(&self, flow: &Flow, asked: &Header) {
        let Some(key) = flow.key() else { return };
        let payload = flow.arrivals.over(asked.route_id).encode();
        let (tunnel, route) = (asked.tunnel, asked.route.reversed());
        let kind = DatagramKind::Receipt;
        let header = Header::new(kind, tunnel, asked.route_id, asked.sequence, route);
        let mut header = Header { reply: true, ..header };
        header.seal(key, &payload);
        self.send(header.route.nodes()[1], header.encode(&payload));
    }

    /// A beat of a caller: it is answered, and says up to where the caller has received.
    pub(super) fn beat_arrived(&self, header: &Header, payload: &[u8]) {
        let far_end =
            FarEnd { node: header.route.source(), tunnel: header.tunnel, ours: header.reply };
        let Some(flow) = self.flows.of(far_end).filter(|_| !header.reply) else {
            return self.counters.count("not-for-this-node");
        };
        let (mut flow, now) = (hold(&flow), self.flows.now());
        let proof = flow.judge(header, payload);
        if proof != Proof::Proved(Heard::New) {
            return self.counters.count(name_of(proof));
        }
        flow.came_over(header, proof, false, now);
        if let Some(seen) = Seen::decode(payload) {
            flow.out.arrived(seen.route_id, seen.highest);
        }
        self.send_receipt(&flow, header);
        let in_use = flow.out.route_id() == header.route_id;
        let End::Their(their) = &mut flow.end else { return };
        if header.resumed && in_use && header.route_id > their.resumed {
            their.resumed = header.route_id;
            flow.out.resend(now);
            self.send_waiting(&mut flow, RESEND_BYTES, now);
            self.plan(&mut flow, now);
        }
    }

    /// A receipt of a provider.
    pub(super) fn receipt_arrived(&self, header: &Header, payload: &[u8]) {
        let far_end =
            FarEnd { node: header.route.source(), tunnel: header.tunnel, ours: header.reply };
        let Some(flow) = self.flows.of(far_end).filter(|_| header.reply) else {
            return self.counters.count("not-for-this-node");
        };
        let (mut flow, now) = (hold(&flow), self.flows.now());
        let proof = flow.judge(header, payload);
        let (Proof::Proved(_), Some(receipt)) = (proof, Receipt::decode(payload)) else {
            return self.counters.count(name_of(proof));
        };
        let in_use = flow.out.route_id();
        let End::Own(own) = &mut flow.end else { return };
        if header.route_id != in_use {
            if own.watch.answered_late(now) {
                self.counters.count("route-left-too-early");
            }
            return;
        }
        match own.receipt(header.sequence, receipt, now) {
            Some(Delivery::Delivers) => flow.out.arrived(in_use, receipt.highest),
            // What has not arrived is kept for the next route.
            None | Some(Delivery::Withholds) => {}
            Some(Delivery::Starves) => self.starved(&mut flow, now),
        }
    }

    /// A relay that cannot pass on a datagram of a tunnel tells the one who opened it.
    pub(super) fn say_broken(&self, datagram: &[u8]) {
        let Ok((header, _)) = Header::decode(datagram) else { return };
        let of_a_tunnel = matches!(header.kind, DatagramKind::Data | DatagramKind::Beat);
        // The loss of a copy is no news: the packet itself travels over the route in use.
        let matters = of_a_tunnel && !header.reply && !header.copy;
        if !matters || !self.awake.may_tell(self.flows.now()) {
            return;
        }
        let Some(route) = header.way_back() else { return };
        let (kind, tunnel) = (DatagramKind::Broken, header.tunnel);
        let notice = Header::new(kind, tunnel, header.route_id, header.sequence, route);
        let notice = Header { reply: true, ..notice };
        let back = notice.route.nodes()[1];
        if self.links.load().contains_key(&back) {
            self.send(back, notice.encode(&[]));
        }
    }

    /// A relay says that a route is broken. It has no key; it is believed when the notice came back
    /// over the route in use, as each hop has checked, and names something that is under way.
    pub(super) fn broken_arrived(&self, header: &Header) {
        let believed = self.own_flow(header).is_some_and(|flow| {
            let mut flow = hold(&flow);
            let Some((route, route_id)) = flow.out.route() else { return false };
            let nodes = header.route.nodes();
            let is_part = nodes.len() < route.nodes().len() && header.route.leads_back_over(route);
            let is_it = is_part && header.route_id == route_id;
            if !is_it || !flow.out.is_under_way(header.sequence) {
                return false;
            }
            self.route_broken(&mut flow, nodes.len() - 1, self.flows.now());
            true
        });
        if !believed {
            self.counters.count("broken-not-believed");
        }
    }

    /// The tunnel of this node that a relay writes about: its far end is not the sender.
    fn own_flow(&self, header: &Header) -> Option<Arc<Mutex<Flow>>> {
        let tunnel: TunnelId = header.tunnel;
        let node = self.snapshot.load().tunnels.get(&tunnel)?.destination;
        self.flows.of(FarEnd { node, tunnel, ours: true }).filter(|_| header.reply)
    }
}

/// The name under which a datagram that is not believed is counted.
pub(super) fn name_of(proof: Proof) -> &'static str {
    match proof {
        Proof::Proved(Heard::New) => "malformed",
        Proof::Proved(Heard::Replayed | Heard::Stale) => "replayed",
        Proof::Unknown => "untagged",
        Proof::Forged => "forged",
    }
}

#[cfg(test)]
pub(super) mod tests;
