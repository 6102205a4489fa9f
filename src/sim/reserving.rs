//! Reservations in a world: requests travel their route as datagrams, and each node asks its ledger.
//! When to ask is decided by [`Asking`]. A queue here has one class: what is promised is counted,
//! and does not go first.

use super::World;
use crate::engine::event::Input;
use crate::engine::forward::{DatagramKind, ForwardingSnapshot, Header};
use crate::engine::traffic::message::{Answer, Bottleneck, Side, decode_reserve, encode_reserve};
use crate::engine::traffic::{Asked, Asking, RENEW_EVERY, Request, State, Step, Way};
use crate::engine::types::{NodeId, Timestamp, TunnelId};

impl World {
    /// What a node has promised on the link to a neighbour (bytes/s).
    pub fn promised(&self, node: usize, neighbour: usize) -> u64 {
        self.nodes[node].plane.ledger.promised(self.id(neighbour), self.now)
    }

    /// Takes what a new snapshot wants; what it no longer wants is released, and tunnels that are
    /// closed are forgotten.
    pub(super) fn follow_reservations(&mut self, node: usize, snapshot: &ForwardingSnapshot) {
        let flows = &mut self.nodes[node].plane.flows;
        let mut gone = Vec::new();
        flows.retain(|tunnel, flow| {
            let binding = snapshot.tunnels.get(tunnel);
            if binding.is_none_or(|binding| binding.reserved.is_none()) {
                gone.extend(flow.asking.take().and_then(|asking| asking.asked().cloned()));
            }
            binding.is_some()
        });
        for (tunnel, binding) in &snapshot.tunnels {
            if let Some(rate) = binding.reserved {
                let flow = flows.entry(*tunnel).or_default();
                flow.asking.get_or_insert_with(|| Asking::new(rate)).rate = rate;
            }
        }
        gone.iter().for_each(|asked| self.release(node, asked));
    }

    /// Does what is due for one tunnel; returns when to come again.
    pub(super) fn reserve(&mut self, node: usize, tunnel: TunnelId) -> Option<Timestamp> {
        let (now, me) = (self.now, self.id(node));
        let flow = self.nodes[node].plane.flows.get_mut(&tunnel)?;
        let (route, route_id) = flow.route.clone()?;
        let asking = flow.asking.as_mut()?;
        let (way, rate) = (Way { tunnel, route, route_id, key: () }, asking.rate);
        let (sequence, until, left) = match asking.step(&way, now) {
            Step::Wait(until) => return Some(until),
            Step::Again(until) => {
                if let Some(Asked { way, sequence, .. }) = asking.asked().cloned() {
                    self.send_reserve(node, &way, sequence, rate);
                }
                return Some(until);
            }
            Step::GiveUp => {
                let sequence = asking.asked().map_or(0, |asked| asked.sequence);
                self.settled(node, tunnel, sequence, Err(None));
                return Some(now + RENEW_EVERY);
            }
            Step::Ask { sequence, until, left } => (sequence, until, left),
        };
        match self.set_aside(node, &request(&way, rate)) {
            Ok(()) => self.send_reserve(node, &way, sequence, rate),
            Err((_, available)) => {
                let to = way.route.nodes()[1];
                let full = Bottleneck { from: me, to, available };
                self.settled(node, tunnel, sequence, Err(Some(full)));
            }
        }
        if let Some(left) = left {
            self.release(node, &left);
        }
        Some(until)
    }

    fn settled(
        &mut self,
        node: usize,
        tunnel: TunnelId,
        sequence: u64,
        result: Result<(), Option<Bottleneck>>,
    ) {
        let flow = self.nodes[node].plane.flows.get_mut(&tunnel);
        let asking = flow.and_then(|flow| flow.asking.as_mut());
        let asked = asking.and_then(|asking| asking.settle(sequence, result.is_ok()));
        let Some(asked) = asked else { return };
        if result.is_err() {
            self.release(node, &asked);
        }
        let input = Input::ReserveAnswered { tunnel, route_id: asked.way.route_id, result };
        self.plan(self.now, super::Event::Input(node, Box::new(input)));
    }

    /// Gives up what was asked for.
    fn release(&mut self, node: usize, asked: &Asked<()>) {
        if asked.state != State::Refused {
            let _ = self.set_aside(node, &request(&asked.way, 0));
            self.send_reserve(node, &asked.way, asked.sequence, 0);
        }
    }

    fn send_reserve(&mut self, node: usize, way: &Way<()>, sequence: u64, rate: u64) {
        let (kind, route) = (DatagramKind::Reserve, way.route.clone());
        let header = Header::new(kind, way.tunnel, way.route_id, sequence, route);
        self.leave_source(node, &header, &encode_reserve(rate), 0);
    }

    pub(super) fn reserve_answered(&mut self, node: usize, header: &Header, payload: &[u8]) {
        let flow = self.nodes[node].plane.flows.get(&header.tunnel);
        let asking = flow.and_then(|flow| flow.asking.as_ref());
        let (Some(asking), Ok(answer)) = (asking, Answer::decode(payload)) else { return };
        if let Some(result) = asking.believe(header, answer) {
            self.settled(node, header.tunnel, header.sequence, result.map_err(Some));
        }
    }

    /// A request that is to be passed on. Returns whether it may be.
    pub(super) fn relays_reserve(&mut self, node: usize, datagram: &[u8]) -> bool {
        let Ok((header, payload)) = Header::decode(datagram) else { return false };
        self.may_reserve(node, &header, payload).is_some()
    }

    /// A request that has come to its end.
    pub(super) fn reserve_arrived(&mut self, node: usize, header: &Header, payload: &[u8]) {
        if self.may_reserve(node, header, payload).is_some_and(|rate| rate > 0) {
            let answer = Answer::Granted { position: header.position };
            self.answer_reserve(node, header, answer);
        }
    }

    /// Sets aside what a request wants, or tells its source why not. Returns the rate.
    fn may_reserve(&mut self, node: usize, header: &Header, payload: &[u8]) -> Option<u64> {
        let rate = decode_reserve(payload).ok().filter(|_| !header.reply)?;
        let Header { position, ref route, tunnel, route_id, .. } = *header;
        let request = Request { route, at: usize::from(position), tunnel, route_id, rate };
        match self.set_aside(node, &request) {
            Ok(()) => Some(rate),
            Err((side, available)) => {
                self.answer_reserve(node, header, Answer::Refused { position, side, available });
                None
            }
        }
    }

    /// Answers over the way that a request took so far.
    fn answer_reserve(&mut self, node: usize, asked: &Header, answer: Answer) {
        let Some(route) = asked.way_back() else { return };
        let kind = DatagramKind::ReserveAnswer;
        let header = Header::new(kind, asked.tunnel, asked.route_id, asked.sequence, route);
        self.leave_source(node, &Header { reply: true, ..header }, &answer.encode(), 0);
    }

    fn set_aside(&mut self, node: usize, request: &Request<'_>) -> Result<(), (Side, u64)> {
        let (now, me) = (self.now, self.id(node));
        let here = &mut self.nodes[node];
        let (connected, known, by_id) = (&here.connected, &here.forwarding.capacity, &self.by_id);
        let capacity = |neighbour: NodeId| {
            let is_link = by_id.get(&neighbour).is_some_and(|to| connected.contains(to));
            is_link.then(|| known.get(&neighbour).copied().unwrap_or(0.0))
        };
        let mut grants = Vec::new();
        let result = here.plane.ledger.set_aside(me, request, capacity, now, &mut grants);
        for (neighbour, _, rate) in grants {
            if rate > 0 {
                self.check_promises(node, neighbour);
            }
        }
        result
    }
}

/// What the source of a way asks itself for.
fn request(way: &Way<()>, rate: u64) -> Request<'_> {
    let Way { route, tunnel, route_id, .. } = way;
    Request { route, at: 0, tunnel: *tunnel, route_id: *route_id, rate }
}
