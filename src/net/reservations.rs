//! Reservations on the wire: what tunnels of this node ask the nodes of their routes for, what this
//! node sets aside for others, and the answers.
//!
//! A request travels the route of its tunnel. Each node asks its [`Ledger`] for both of its links,
//! one for each direction, and lets the flow go first there; who cannot tells the source, and passes
//! nothing on. The target answers when everybody could. When to ask is decided by [`Asking`].
//!
//! All of it is soft state: the source asks again each [`RENEW_EVERY`], and what nobody asks for
//! is forgotten after [`LIFETIME`]. When a tunnel is closed, moves or is refused, rate 0 travels
//! over the route that was asked. The target, whose key is gone by then, releases what it holds
//! when the connection ends.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::flows::{Proof, hold};
use super::plane::{DataPlane, FarEnd};
use super::watch::name_of;
use crate::engine::event::Input;
use crate::engine::forward::{DatagramKind, ForwardingSnapshot, Header, Heard, RouteKey};
use crate::engine::traffic::message::{Answer, Bottleneck, Side, decode_reserve, encode_reserve};
use crate::engine::traffic::{
    Asked, Asking, FlowKey, LIFETIME, Ledger, RENEW_EVERY, Request, State, Step, Way,
};
use crate::engine::types::{NodeId, Timestamp};

/// What this node's tunnels have asked for, which is bounded by their number, and what its links
/// have promised, which the ledger bounds.
#[derive(Default)]
pub(super) struct Reservations {
    ledger: Mutex<Ledger>,
    wishes: Mutex<BTreeMap<FarEnd, Asking<RouteKey>>>,
}

impl Reservations {
    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wishes(&self) -> MutexGuard<'_, BTreeMap<FarEnd, Asking<RouteKey>>> {
        self.wishes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A link is gone.
    pub(super) fn forget(&self, link: NodeId) {
        self.ledger().forget(link);
    }
}

impl DataPlane {
    // --- the source ----------------------------------------------------------------------------

    /// Takes what a new snapshot wants; what it no longer wants is released.
    pub(super) fn follow_reservations(&self, snapshot: &ForwardingSnapshot) {
        let wanted = snapshot.tunnels.iter().filter_map(|(tunnel, binding)| {
            let far_end = FarEnd { node: binding.destination, tunnel: *tunnel, ours: true };
            Some((far_end, binding.reserved?))
        });
        let wanted: BTreeMap<FarEnd, u64> = wanted.collect();
        let mut wishes = self.reservations.wishes();
        let mut gone = Vec::new();
        wishes.retain(|far_end, wish| {
            let stays = wanted.contains_key(far_end);
            if !stays {
                gone.extend(wish.asked().cloned());
            }
            stays
        });
        for (far_end, rate) in wanted {
            wishes.entry(far_end).or_insert(Asking::new(rate)).rate = rate;
        }
        drop(wishes);
        gone.iter().for_each(|asked| self.release(asked));
    }

    /// A tunnel has another key: its far end, which may have been restarted, is asked soon.
    pub(super) fn reserve_anew(&self, far_end: FarEnd) {
        if let Some(wish) = self.reservations.wishes().get_mut(&far_end) {
            wish.renew();
            self.awake.early.notify_one();
        }
    }

    /// Asks for what is due in all tunnels; returns when to come again.
    pub(super) fn reserve_all(&self, now: Timestamp) -> Timestamp {
        let far_ends: Vec<FarEnd> = self.reservations.wishes().keys().copied().collect();
        let due = far_ends.into_iter().filter_map(|far_end| self.reserve(far_end, now));
        due.fold(now + RENEW_EVERY, Timestamp::min)
    }

    /// Does what is due for one tunnel; returns when to come again. Before the handshake there is
    /// nothing to be done.
    fn reserve(&self, far_end: FarEnd, now: Timestamp) -> Option<Timestamp> {
        let way = {
            let flow = self.flows.of(far_end)?;
            let flow = hold(&flow);
            let (route, route_id) = flow.out.route()?;
            let (tunnel, route) = (far_end.tunnel, route.clone());
            Way { tunnel, route, route_id, key: flow.key()?.clone() }
        };
        let mut wishes = self.reservations.wishes();
        let wish = wishes.get_mut(&far_end)?;
        let rate = wish.rate;
        let (sequence, until, left) = match wish.step(&way, now) {
            Step::Wait(until) => return Some(until),
            Step::Again(until) => {
                if let Some(asked) = wish.asked() {
                    self.send_reserve(&asked.way, asked.sequence, rate);
                }
                return Some(until);
            }
            Step::GiveUp => {
                let sequence = wish.asked().map_or(0, |asked| asked.sequence);
                drop(wishes);
                self.settled(far_end, sequence, Err(None));
                return None;
            }
            Step::Ask { sequence, until, left } => (sequence, until, left),
        };
        drop(wishes);
        match self.set_aside(&request(&way, rate), now) {
            Ok(()) => self.send_reserve(&way, sequence, rate),
            Err((_, available)) => {
                let (from, to) = (self.me, way.route.nodes()[1]);
                self.settled(far_end, sequence, Err(Some(Bottleneck { from, to, available })));
            }
        }
        // After the new one, so that on links of both routes there is no gap.
        if let Some(left) = left {
            self.release(&left);
        }
        Some(until)
    }

    /// The request of this number has its answer: the engine is told, and what a refused one
    /// holds along the route is released.
    fn settled(&self, far_end: FarEnd, sequence: u64, result: Result<(), Option<Bottleneck>>) {
        let mut wishes = self.reservations.wishes();
        let wish = wishes.get_mut(&far_end);
        let asked = wish.and_then(|wish| wish.settle(sequence, result.is_ok()));
        let Some(asked) = asked else { return };
        if result.is_err() {
            self.release(&asked);
        }
        let (tunnel, route_id) = (far_end.tunnel, asked.way.route_id);
        drop(wishes);
        let input = Input::ReserveAnswered { tunnel, route_id, result };
        if self.events.try_send(input).is_err() {
            self.counters.count("event-queue-full");
        }
    }

    /// Gives up what was asked for.
    fn release(&self, asked: &Asked<RouteKey>) {
        if asked.state == State::Refused {
            return;
        }
        let _ = self.set_aside(&request(&asked.way, 0), self.flows.now());
        self.send_reserve(&asked.way, asked.sequence, 0);
    }

    fn send_reserve(&self, way: &Way<RouteKey>, sequence: u64, rate: u64) {
        let payload = encode_reserve(rate);
        let kind = DatagramKind::Reserve;
        let mut header = Header::new(kind, way.tunnel, way.route_id, sequence, way.route.clone());
        header.seal(&way.key, &payload);
        self.send(way.route.nodes()[1], header.encode(&payload));
    }

    /// An answer. That of the target is sealed; a relay has no key, and is believed when its refusal
    /// came back over the part of the route that was asked, as each hop has checked.
    pub(super) fn reserve_answered(&self, header: &Header, payload: &[u8]) {
        let Ok(answer) = Answer::decode(payload) else { return self.counters.count("malformed") };
        let result = self.believed(header, payload, answer);
        let Some((far_end, result)) = result else {
            return self.counters.count("reserve-answer-not-believed");
        };
        self.settled(far_end, header.sequence, result.map_err(Some));
    }

    fn believed(
        &self,
        header: &Header,
        payload: &[u8],
        answer: Answer,
    ) -> Option<(FarEnd, Result<(), Bottleneck>)> {
        let tunnel = header.tunnel;
        let node = self.snapshot.load().tunnels.get(&tunnel)?.destination;
        let far_end = FarEnd { node, tunnel, ours: true };
        let wishes = self.reservations.wishes();
        let wish = wishes.get(&far_end)?;
        let result = wish.believe(header, answer)?;
        let key = &wish.asked()?.way.key;
        (result.is_err() || header.verifies(key, payload)).then_some((far_end, result))
    }

    // --- relays and the target -----------------------------------------------------------------

    /// A request that is to be passed on. Returns whether it may be.
    pub(super) fn relays_reserve(&self, datagram: &[u8]) -> bool {
        let Ok((header, payload)) = Header::decode(datagram) else {
            self.counters.count("malformed");
            return false;
        };
        self.may_reserve(&header, payload).is_some()
    }

    /// A request that has come to its end. A stranger's claims nothing.
    pub(super) fn reserve_arrived(&self, header: &Header, payload: &[u8]) {
        let (node, tunnel) = (header.route.source(), header.tunnel);
        let flow = self.flows.of(FarEnd { node, tunnel, ours: false });
        let Some(flow) = flow else { return self.counters.count("not-for-this-node") };
        let mut flow = hold(&flow);
        let proof = flow.judge(header, payload);
        let key = flow.key().cloned();
        drop(flow);
        let (Proof::Proved(Heard::New), Some(key)) = (proof, key) else {
            return self.counters.count(name_of(proof));
        };
        if self.may_reserve(header, payload).is_some_and(|rate| rate > 0) {
            let answer = Answer::Granted { position: header.position };
            self.answer_reserve(header, answer, Some(&key));
        }
    }

    /// Sets aside what a request wants, or tells its source why not. Returns the rate.
    fn may_reserve(&self, header: &Header, payload: &[u8]) -> Option<u64> {
        let rate = decode_reserve(payload).ok().filter(|_| !header.reply);
        let Some(rate) = rate else {
            self.counters.count("malformed");
            return None;
        };
        let (position, route_id) = (header.position, header.route_id);
        let (at, now) = (usize::from(position), self.flows.now());
        let Header { route, tunnel, .. } = header;
        match self.set_aside(&Request { route, at, tunnel: *tunnel, route_id, rate }, now) {
            Ok(()) => Some(rate),
            Err((side, available)) => {
                let answer = Answer::Refused { position, side, available };
                self.answer_reserve(header, answer, None);
                None
            }
        }
    }

    /// Answers over the way that a request took so far; sealed with a key.
    fn answer_reserve(&self, asked: &Header, answer: Answer, key: Option<&RouteKey>) {
        let Some(route) = asked.way_back() else { return };
        let (kind, payload) = (DatagramKind::ReserveAnswer, answer.encode());
        let header = Header::new(kind, asked.tunnel, asked.route_id, asked.sequence, route);
        let mut header = Header { reply: true, ..header };
        if let Some(key) = key {
            header.seal(key, &payload);
        }
        self.send(header.route.nodes()[1], header.encode(&payload));
    }

    /// A caller's connection has ended: what this node set aside for the way back is free.
    pub(super) fn caller_left(&self, far_end: FarEnd) {
        let (me, links) = (self.me, self.links.load());
        let flow =
            FlowKey { ingress: me, source: me, target: far_end.node, tunnel: far_end.tunnel };
        for neighbour in self.reservations.ledger().end(flow) {
            if let Some(link) = links.get(&neighbour) {
                link.grant(flow, 0, Duration::ZERO);
            }
        }
    }

    /// Sets aside what a request wants, see [`Ledger::set_aside`], and tells the links.
    fn set_aside(&self, request: &Request<'_>, now: Timestamp) -> Result<(), (Side, u64)> {
        let snapshot = self.snapshot.load();
        let mut ledger = self.reservations.ledger();
        // Under the lock of the ledger, so that nothing is promised on a link that is forgotten.
        let links = self.links.load();
        let capacity = |node: NodeId| {
            let known = snapshot.capacity.get(&node).copied().unwrap_or(0.0);
            links.contains_key(&node).then_some(known)
        };
        let mut grants = Vec::new();
        let result = ledger.set_aside(self.me, request, capacity, now, &mut grants);
        for (neighbour, flow, rate) in grants {
            let lifetime = if rate > 0 { LIFETIME } else { Duration::ZERO };
            links.get(&neighbour).iter().for_each(|link| link.grant(flow, rate, lifetime));
        }
        result
    }
}

/// What the source of a way asks itself for.
fn request(way: &Way<RouteKey>, rate: u64) -> Request<'_> {
    let Way { route, tunnel, route_id, .. } = way;
    Request { route, at: 0, tunnel: *tunnel, route_id: *route_id, rate }
}

#[cfg(test)]
mod tests;
