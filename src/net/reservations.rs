//! Reservations on the wire: what tunnels of this node ask the nodes of their routes for, what this
//! node sets aside for others, and the answers.
//!
//! A request travels the route of its tunnel. Each node asks its [`Ledger`] for both of its links,
//! one for each direction, and lets the flow go first there; who cannot tells the source, and passes
//! nothing on. The target answers when everybody could.
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
use crate::engine::traffic::{Claim, FlowKey, LIFETIME, Ledger, Refusal};
use crate::engine::types::{NodeId, Route, Timestamp, TunnelId};

/// How often a reservation is asked for again.
pub const RENEW_EVERY: Duration = super::SLICE;
/// How long an answer may take before the same is asked again.
pub const PATIENCE: Duration = Duration::from_millis(350);
/// So many unanswered requests are a refusal: after about a second.
pub const ASKS_MAX: u32 = 3;

/// A route to ask, with what proves it.
#[derive(Clone)]
struct Way {
    tunnel: TunnelId,
    route: Route,
    route_id: u32,
    key: RouteKey,
}

#[derive(Clone, Copy, PartialEq)]
enum State {
    /// So many requests are unanswered; the next step is due then.
    Waiting(u32, Timestamp),
    Granted,
    /// Nothing is held.
    Refused,
}

/// The newest request of a tunnel.
struct Asked {
    way: Way,
    sequence: u64,
    state: State,
}

/// What a tunnel of this node wants.
struct Wish {
    rate: u64,
    asked: Option<Asked>,
    /// When to ask again.
    renew_at: Timestamp,
}

/// What this node's tunnels have asked for, which is bounded by their number, and what its links
/// have promised, which the ledger bounds.
#[derive(Default)]
pub(super) struct Reservations {
    ledger: Mutex<Ledger>,
    wishes: Mutex<BTreeMap<FarEnd, Wish>>,
}

impl Reservations {
    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wishes(&self) -> MutexGuard<'_, BTreeMap<FarEnd, Wish>> {
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
                gone.extend(wish.asked.take());
            }
            stays
        });
        for (far_end, rate) in wanted {
            let new = Wish { rate, asked: None, renew_at: Timestamp(0) };
            wishes.entry(far_end).or_insert(new).rate = rate;
        }
        drop(wishes);
        gone.iter().for_each(|asked| self.release(asked));
    }

    /// A tunnel has another key: its far end, which may have been restarted, is asked soon.
    pub(super) fn reserve_anew(&self, far_end: FarEnd) {
        if let Some(wish) = self.reservations.wishes().get_mut(&far_end) {
            wish.renew_at = Timestamp(0);
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
        let before = wish.asked.as_ref();
        let moved = before.is_some_and(|asked| asked.way.route_id != way.route_id);
        match before.map(|asked| asked.state).filter(|_| !moved) {
            Some(State::Waiting(_, until)) if now < until => return Some(until),
            Some(State::Waiting(asks, _)) if asks >= ASKS_MAX => {
                let sequence = before.map_or(0, |asked| asked.sequence);
                drop(wishes);
                self.settled(far_end, sequence, Err(None));
                return None;
            }
            Some(State::Waiting(asks, _)) => {
                let until = now + PATIENCE;
                if let Some(asked) = &mut wish.asked {
                    asked.state = State::Waiting(asks + 1, until);
                    self.send_reserve(&asked.way, asked.sequence, wish.rate);
                }
                return Some(until);
            }
            Some(_) if now < wish.renew_at => return Some(wish.renew_at),
            _ => {}
        }
        let until = now + PATIENCE;
        // Names the request; time goes on, so no two of a route are the same.
        let (rate, sequence) = (wish.rate, now.0);
        let asked = Asked { way: way.clone(), sequence, state: State::Waiting(1, until) };
        let left = wish.asked.replace(asked).filter(|_| moved);
        wish.renew_at = now + RENEW_EVERY;
        drop(wishes);
        match self.set_aside(&way.route, 0, way.tunnel, way.route_id, rate, now) {
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
        let asked = wishes.get_mut(&far_end).and_then(|wish| wish.asked.as_mut());
        let Some(asked) = asked.filter(|asked| asked.sequence == sequence) else { return };
        if result.is_err() {
            self.release(asked);
        }
        asked.state = if result.is_ok() { State::Granted } else { State::Refused };
        let (tunnel, route_id) = (far_end.tunnel, asked.way.route_id);
        drop(wishes);
        let input = Input::ReserveAnswered { tunnel, route_id, result };
        if self.events.try_send(input).is_err() {
            self.counters.count("event-queue-full");
        }
    }

    /// Gives up what was asked for.
    fn release(&self, asked: &Asked) {
        if asked.state == State::Refused {
            return;
        }
        let Way { tunnel, route, route_id, .. } = &asked.way;
        let _ = self.set_aside(route, 0, *tunnel, *route_id, 0, self.flows.now());
        self.send_reserve(&asked.way, asked.sequence, 0);
    }

    fn send_reserve(&self, way: &Way, sequence: u64, rate: u64) {
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
        let Asked { way, sequence, state } = wishes.get(&far_end)?.asked.as_ref()?;
        let nodes = header.route.nodes();
        let came_back = nodes.iter().rev().eq(way.route.nodes().iter().take(nodes.len()));
        let is_it = (header.route_id, header.sequence) == (way.route_id, *sequence);
        let is_proved = match answer {
            Answer::Granted { .. } => header.verifies(&way.key, payload),
            Answer::Refused { .. } => true,
        };
        let waits = matches!(state, State::Waiting(..));
        if !(header.reply && waits && is_it && came_back && is_proved) {
            return None;
        }
        Some((far_end, answer.resolve(&way.route, header.route.source())?))
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
        match self.set_aside(&header.route, at, header.tunnel, route_id, rate, now) {
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
        let so_far = asked.route.nodes()[..=usize::from(asked.position)].iter().rev();
        let Ok(route) = Route::new(so_far.copied().collect::<Vec<_>>()) else { return };
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

    /// Sets a rate aside on the links to the node after and the one before index `at` of a route, or
    /// on neither. Rate 0 gives up what is set aside.
    ///
    /// # Errors
    /// Which link has not so much left, and what it has (bytes/s).
    fn set_aside(
        &self,
        route: &Route,
        at: usize,
        tunnel: TunnelId,
        route_id: u32,
        rate: u64,
        now: Timestamp,
    ) -> Result<(), (Side, u64)> {
        let next = route.nodes().get(at + 1).copied();
        let previous = at.checked_sub(1).and_then(|before| route.nodes().get(before)).copied();
        let (source, target) = (route.source(), route.destination());
        let flow = |ingress: Option<NodeId>, source, target| {
            let ingress = ingress.unwrap_or(self.me);
            FlowKey { ingress, source, target, tunnel }
        };
        let sides = [
            (Side::Next, next, flow(previous, source, target)),
            (Side::Previous, previous, flow(next, target, source)),
        ];
        let snapshot = self.snapshot.load();
        let mut ledger = self.reservations.ledger();
        // Under the lock of the ledger, so that nothing is promised on a link that is forgotten.
        let links = self.links.load();
        let mut given = Vec::new();
        for (side, neighbour, flow) in sides {
            let Some(neighbour) = neighbour else { continue };
            let link = links.get(&neighbour);
            let claim = Claim { flow, route_id, rate };
            let capacity = link.and_then(|_| snapshot.capacity.get(&neighbour).copied());
            let asked = match link {
                Some(_) => ledger.ask(neighbour, &claim, capacity.unwrap_or(0.0), now),
                // A link that is gone has nothing, and holds nothing.
                None if rate > 0 => Err(Refusal { available: 0 }),
                None => Ok(now),
            };
            let grant = |rate, duration| link.iter().for_each(|l| l.grant(flow, rate, duration));
            match asked {
                Ok(until) if rate == 0 && until <= now => grant(0, Duration::ZERO),
                Ok(until) if rate > 0 && until == now + LIFETIME => {
                    grant(rate, LIFETIME);
                    given.push((neighbour, flow));
                }
                // Another request, over a newer route, holds it.
                Ok(_) => {}
                Err(refusal) => {
                    grant(0, Duration::ZERO);
                    for (neighbour, flow) in given {
                        let release = Claim { flow, route_id, rate: 0 };
                        let _ = ledger.ask(neighbour, &release, 0.0, now);
                        if let Some(link) = links.get(&neighbour) {
                            link.grant(flow, 0, Duration::ZERO);
                        }
                    }
                    return Err((side, refusal.available));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
