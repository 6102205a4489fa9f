//! The tunnels as the data plane sees them: for each far end a key, the packets that are under way,
//! what arrived, and over which route it is sent to.
//!
//! The way back to a caller is not its business to claim: with the key of the tunnel's TLS handshake
//! each datagram proves itself, and only those move the way that packets take. Before the handshake,
//! and for the packets of a handshake, the way is what the newest datagram claims; a stranger who
//! forges one disturbs a handshake at most.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::copies::Copies;
use super::pace::Pace;
use super::plane::FarEnd;
use super::sending::Outgoing;
use super::tries::Tries;
use crate::engine::forward::{Arrivals, DatagramKind, Header, Heard, OwnEnd, RouteKey};
use crate::engine::types::{NodeId, Route, Timestamp};

/// Callers without a proof that are remembered; the one known longest makes room. Those with a proof
/// live as long as their connections, of which there is a limit too.
pub const UNPROVED_MAX: usize = 1_024;
/// How long after the newest claim an older one is taken for overtaken datagrams, and not for a
/// caller that was restarted and counts from 1 again.
const OVERTAKEN_MAX: Duration = Duration::from_secs(1);
/// Set in the first byte of the packets of a QUIC handshake (RFC 9000, section 17.2).
const LONG_HEADER: u8 = 0x80;

/// Whether a packet belongs to a handshake.
pub(super) fn is_handshake(packet: &[u8]) -> bool {
    packet.first().is_some_and(|first| first & LONG_HEADER != 0)
}

/// What a datagram of a tunnel is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Proof {
    /// The far end sent it, and it is here for the first time, or not.
    Proved(Heard),
    /// Nobody can know yet: there is no key, or it carries no tag.
    Unknown,
    /// Its tag is wrong.
    Forged,
}

/// A way back that a datagram claims.
struct Claim {
    route: Route,
    route_id: u32,
    is_copy: bool,
    heard_at: Timestamp,
}

/// The end of a tunnel that provides: what it knows of the caller.
#[derive(Default)]
pub(super) struct TheirEnd {
    claimed: Option<Claim>,
    /// Highest route number for which packets were sent again.
    pub(super) resumed: u32,
}

impl TheirEnd {
    /// A datagram that proves nothing arrived. What came over the route in use goes before a copy,
    /// whichever was quicker.
    fn claim(&mut self, header: &Header, now: Timestamp) {
        let (route_id, is_copy) = (header.route_id, header.copy);
        if let Some(claim) = &self.claimed {
            let is_less = match (is_copy, claim.is_copy) {
                (false, true) => false,
                (true, false) => true,
                _ => route_id < claim.route_id,
            };
            if is_less && now.since(claim.heard_at) < OVERTAKEN_MAX {
                return;
            }
        }
        let route = header.route.reversed();
        self.claimed = Some(Claim { route, route_id, is_copy, heard_at: now });
    }
}

/// Which end of the tunnel this node is.
pub(super) enum End {
    /// It opened it.
    Own(Box<OwnEnd>),
    /// It provides.
    Their(TheirEnd),
}

/// One tunnel.
pub(super) struct Flow {
    pub(super) far_end: FarEnd,
    pub(super) end: End,
    pub(super) out: Outgoing,
    pub(super) arrivals: Arrivals,
    pub(super) copies: Copies,
    pub(super) pace: Pace,
    /// What its connection has tried and was not let pass.
    pub(super) tries: Arc<Tries>,
    /// When the watch looks at it next; `None` while nothing is due.
    pub(super) due_at: Option<Timestamp>,
    key: Option<(RouteKey, u64)>,
}

impl Flow {
    /// The key of the two ends; `None` before the handshake.
    pub(super) fn key(&self) -> Option<&RouteKey> {
        self.key.as_ref().map(|(key, _)| key)
    }

    /// What a datagram of the far end is worth. Data and beats that prove themselves are counted
    /// as arrived.
    pub(super) fn judge(&mut self, header: &Header, payload: &[u8]) -> Proof {
        let Some((key, _)) = &self.key else { return Proof::Unknown };
        if header.tag == 0 {
            return Proof::Unknown;
        }
        if !header.verifies(key, payload) {
            return Proof::Forged;
        }
        if !matches!(header.kind, DatagramKind::Data | DatagramKind::Beat) {
            return Proof::Proved(Heard::New);
        }
        let arrivals = if header.copy { &mut self.copies.arrivals } else { &mut self.arrivals };
        Proof::Proved(arrivals.heard(header))
    }

    /// Takes note of the way that a caller's datagram took. A proof moves the way back to a newer
    /// route, or if it is a copy, the way of copies; a claim moves only what handshakes take.
    pub(super) fn came_over(
        &mut self,
        header: &Header,
        proof: Proof,
        handshake: bool,
        now: Timestamp,
    ) {
        let End::Their(their) = &mut self.end else { return };
        match proof {
            Proof::Proved(Heard::New) if !header.copy => {
                if header.receipt {
                    self.copies.answered(now);
                }
                if header.route_id > self.out.route_id() {
                    self.out.move_to(header.route.reversed(), header.route_id);
                }
            }
            Proof::Proved(Heard::New) => self.copies.heard(header, now),
            Proof::Proved(_) => {}
            Proof::Unknown | Proof::Forged => {
                if self.key.is_none() || handshake {
                    their.claim(header, now);
                }
            }
        }
    }

    /// A datagram whose tag is wrong came to the end that opened the tunnel. Returns whether the route
    /// in use starves it. Only who is on that route can bring one over it.
    pub(super) fn is_starved_by(&mut self, header: &Header, now: Timestamp) -> bool {
        let came_back = |(route, id): (&Route, u32)| {
            id == header.route_id && header.route.leads_back_over(route)
        };
        let over_it = self.out.route().is_some_and(came_back) && !header.copy;
        let End::Own(own) = &mut self.end else { return false };
        over_it && own.forged(now)
    }

    /// The next packet as a datagram, and the neighbour that it goes to; `None` when nothing waits or
    /// there is no route.
    pub(super) fn next_datagram(&mut self, now: Timestamp) -> Option<(NodeId, Vec<u8>)> {
        let (route, route_id) = self.out.route()?;
        let (next, route) = (route.nodes()[1], route.clone());
        let (sequence, packet) = self.out.take()?;
        let kind = DatagramKind::Data;
        let header = Header::new(kind, self.far_end.tunnel, route_id, sequence, route);
        let mut header = Header { reply: !self.far_end.ours, ..header };
        match (&self.key, &mut self.end) {
            (Some(_), End::Own(own)) => {
                header.receipt = own.sent(sequence, header.length() + packet.len(), now);
            }
            (None, End::Own(own)) => own.shakes_hands(),
            (_, End::Their(_)) => {}
        }
        if let Some((key, _)) = &self.key {
            header.seal(key, packet);
        }
        Some((next, header.encode(packet)))
    }

    /// The way for a packet when it is not the one that is proved: of a handshake, or before.
    pub(super) fn claimed_way(&self, packet: &[u8]) -> Option<(Route, u32)> {
        let End::Their(their) = &self.end else { return None };
        let proved = self.out.route().is_some();
        let claim = their.claimed.as_ref().filter(|_| !proved || is_handshake(packet))?;
        Some((claim.route.clone(), claim.route_id))
    }
}

#[derive(Default)]
struct Known {
    flows: BTreeMap<FarEnd, Arc<Mutex<Flow>>>,
    /// Callers in the order in which they became known; some have proved themselves or are gone.
    unproved: VecDeque<FarEnd>,
}

/// All tunnels of a node, in both directions.
pub(super) struct Flows {
    known: Mutex<Known>,
    kept: Arc<AtomicUsize>,
    keys: AtomicU64,
    started: Instant,
}

impl Default for Flows {
    fn default() -> Self {
        let (known, kept, keys) = Default::default();
        Self { known, kept, keys, started: Instant::now() }
    }
}

impl Flows {
    /// Time of this node's data plane.
    pub(super) fn now(&self) -> Timestamp {
        Timestamp(self.started.elapsed().as_micros() as u64)
    }

    /// The instant of such a time.
    pub(super) fn instant(&self, at: Timestamp) -> Instant {
        self.started + Duration::from_micros(at.0)
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A tunnel that is known.
    pub(super) fn of(&self, far_end: FarEnd) -> Option<Arc<Mutex<Flow>>> {
        self.lock().flows.get(&far_end).cloned()
    }

    /// A tunnel, which becomes known. For a caller that has proved nothing, another such one may have
    /// to make room.
    pub(super) fn of_or_new(&self, far_end: FarEnd) -> Arc<Mutex<Flow>> {
        let mut known = self.lock();
        if let Some(flow) = known.flows.get(&far_end) {
            return flow.clone();
        }
        if !far_end.ours {
            while known.unproved.len() >= UNPROVED_MAX
                && let Some(oldest) = known.unproved.pop_front()
            {
                let flow = known.flows.get(&oldest);
                if flow.is_some_and(|flow| hold(flow).key.is_none()) {
                    known.flows.remove(&oldest);
                }
            }
            known.unproved.push_back(far_end);
        }
        let end = match far_end.ours {
            true => End::Own(Box::default()),
            false => End::Their(TheirEnd::default()),
        };
        let out = Outgoing::new(self.kept.clone());
        let (arrivals, copies) = Default::default();
        let (pace, tries) = Default::default();
        let (due_at, key) = (None, None);
        let flow = Flow { far_end, end, out, arrivals, copies, pace, tries, due_at, key };
        let flow = Arc::new(Mutex::new(flow));
        known.flows.insert(far_end, flow.clone());
        flow
    }

    /// What is not let pass of a connection that is being made, which tries larger packets as soon as its
    /// handshake is done and before it has a [key](Self::set_key), is noted there, unless the two ends have
    /// another connection with a key.
    pub(super) fn note_tries(&self, far_end: FarEnd, tries: &Arc<Tries>) {
        let flow = self.of_or_new(far_end);
        let mut flow = hold(&flow);
        if flow.key.is_none() {
            flow.tries = tries.clone();
        }
    }

    /// All tunnels, as they are now.
    pub(super) fn all(&self) -> Vec<Arc<Mutex<Flow>>> {
        self.lock().flows.values().cloned().collect()
    }

    /// Forgets the tunnels of this node that `is_open` does not name.
    pub(super) fn close(&self, is_open: impl Fn(FarEnd) -> bool) {
        self.lock().flows.retain(|far_end, _| !far_end.ours || is_open(*far_end));
    }

    /// The two ends of a tunnel have a key from now on. Returns a number that takes it away again.
    pub(super) fn set_key(&self, far_end: FarEnd, key: RouteKey, tries: &Arc<Tries>) -> u64 {
        let number = self.keys.fetch_add(1, Ordering::Relaxed);
        loop {
            let known = self.of_or_new(far_end);
            let mut flow = hold(&known);
            flow.key = Some((key.clone(), number));
            (flow.pace, flow.tries) = (Pace::default(), tries.clone());
            (flow.arrivals, flow.copies) = Default::default();
            if let End::Their(their) = &mut flow.end {
                their.resumed = 0;
                flow.out = Outgoing::new(self.kept.clone());
            }
            drop(flow);
            // Until it had a key, it may have had to make room for another caller.
            if self.of(far_end).is_some_and(|now| Arc::ptr_eq(&now, &known)) {
                return number;
            }
        }
    }

    /// The connection that gave this key is closed, by whichever end: the route is watched no more,
    /// and the key stays for the good-byes.
    pub(super) fn closed(&self, far_end: FarEnd, number: u64) {
        let Some(flow) = self.of(far_end) else { return };
        let mut flow = hold(&flow);
        if flow.key.as_ref().is_some_and(|(_, held)| *held == number)
            && let End::Own(own) = &mut flow.end
        {
            own.close();
        }
    }

    /// The connection that gave the key is gone; with a `number`, only when the key is that one. A
    /// caller is forgotten with it.
    pub(super) fn take_key(&self, far_end: FarEnd, number: Option<u64>) {
        let mut known = self.lock();
        let Some(flow) = known.flows.get(&far_end).cloned() else { return };
        let mut flow = hold(&flow);
        let held = flow.key.as_ref().map(|(_, number)| *number);
        if held.is_none() || number.is_some_and(|number| held != Some(number)) {
            return;
        }
        flow.key = None;
        (flow.arrivals, flow.copies) = Default::default();
        match &mut flow.end {
            End::Own(own) => own.forget(),
            End::Their(_) => {
                known.flows.remove(&far_end);
            }
        }
    }
}

/// Locks one tunnel.
pub(super) fn hold(flow: &Mutex<Flow>) -> MutexGuard<'_, Flow> {
    flow.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::engine::types::TunnelId;

    const KEY: [u8; 32] = [7; 32];

    fn node(byte: u8) -> NodeId {
        NodeId([byte; 8])
    }

    fn caller(tunnel: u16) -> FarEnd {
        FarEnd { node: node(0), tunnel: TunnelId(tunnel), ours: false }
    }

    fn at(ms: u64) -> Timestamp {
        Timestamp(ms * 1_000)
    }

    fn header(relay: u8, route_id: u32, sequence: u64) -> Header {
        let route = Route::new([node(0), node(relay), node(9)]).unwrap();
        Header::new(DatagramKind::Data, TunnelId(1), route_id, sequence, route)
    }

    fn sealed(relay: u8, route_id: u32, sequence: u64) -> Header {
        let mut header = header(relay, route_id, sequence);
        header.seal(&RouteKey::new(&KEY), b"");
        header
    }

    /// The relay of the way back for a packet of the handshake or another one.
    fn way(flow: &Flow, handshake: bool) -> Option<NodeId> {
        let packet = [if handshake { LONG_HEADER } else { 0 }];
        let claimed = flow.claimed_way(&packet).map(|(route, _)| route);
        let route = claimed.or_else(|| flow.out.route().map(|(route, _)| route.clone()));
        route.map(|route| route.relays()[0])
    }

    fn heard(flow: &mut Flow, header: &Header, at_ms: u64) -> Proof {
        let proof = flow.judge(header, b"");
        flow.came_over(header, proof, false, at(at_ms));
        proof
    }

    #[test]
    fn before_the_handshake_the_way_back_follows_the_caller_and_not_what_was_overtaken() {
        let flows = Flows::default();
        let flow = flows.of_or_new(caller(1));
        let mut flow = hold(&flow);
        for (relay, route_id, at_ms, expected, what) in [
            (1, 1, 0, 1, "the first"),
            (2, 2, 0, 2, "a newer route"),
            (1, 1, 0, 2, "an overtaken datagram"),
            (1, 1, 2_000, 1, "a caller that was restarted"),
        ] {
            assert_eq!(heard(&mut flow, &header(relay, route_id, 1), at_ms), Proof::Unknown);
            assert_eq!(way(&flow, false), Some(node(expected)), "{what}");
        }
    }

    #[test]
    fn with_a_key_the_way_back_cannot_be_stolen() {
        let flows = Flows::default();
        flows.set_key(caller(1), RouteKey::new(&KEY), &Arc::default());
        let flow = flows.of(caller(1)).unwrap();
        let mut flow = hold(&flow);
        assert_eq!(heard(&mut flow, &sealed(1, 3, 1), 0), Proof::Proved(Heard::New));
        assert_eq!(way(&flow, false), Some(node(1)));
        assert_eq!(heard(&mut flow, &header(6, 9, 1), 0), Proof::Unknown, "without a tag");
        let forged = Header { tag: 5, ..header(6, 9, 2) };
        assert_eq!(heard(&mut flow, &forged, 0), Proof::Forged);
        let moved = Header { route: header(6, 3, 1).route, ..sealed(1, 3, 2) };
        assert_eq!(heard(&mut flow, &moved, 0), Proof::Forged, "another route under a true tag");
        assert_eq!(heard(&mut flow, &sealed(1, 3, 1), 0), Proof::Proved(Heard::Replayed));
        let mut copy = Header { copy: true, ..header(6, 4, 1) };
        copy.seal(&RouteKey::new(&KEY), b"");
        assert_eq!(heard(&mut flow, &copy, 0), Proof::Proved(Heard::New));
        assert_eq!(way(&flow, false), Some(node(1)), "none of these moved it");
        heard(&mut flow, &sealed(2, 5, 1), 0);
        heard(&mut flow, &sealed(1, 3, 3), 0);
        assert_eq!(way(&flow, false), Some(node(2)), "the caller moved; the rest was overtaken");
    }

    #[test]
    fn a_handshake_takes_the_way_that_is_claimed() {
        let flows = Flows::default();
        flows.set_key(caller(1), RouteKey::new(&KEY), &Arc::default());
        let flow = flows.of(caller(1)).unwrap();
        let mut flow = hold(&flow);
        heard(&mut flow, &sealed(1, 3, 1), 0);
        let restarted = header(2, 1, 1);
        flow.came_over(&restarted, Proof::Unknown, true, at(1));
        assert_eq!((way(&flow, true), way(&flow, false)), (Some(node(2)), Some(node(1))));
    }

    #[test]
    fn a_key_is_taken_away_by_who_gave_it() {
        let flows = Flows::default();
        let old = flows.set_key(caller(1), RouteKey::new(&KEY), &Arc::default());
        let new = flows.set_key(caller(1), RouteKey::new(&[8; 32]), &Arc::default());
        flows.take_key(caller(1), Some(old));
        assert!(hold(&flows.of(caller(1)).unwrap()).key().is_some(), "another connection's key");
        flows.take_key(caller(1), Some(new));
        assert!(flows.of(caller(1)).is_none());
    }

    #[test]
    fn callers_without_a_proof_make_room_for_each_other_only() {
        let flows = Flows::default();
        flows.set_key(caller(1), RouteKey::new(&KEY), &Arc::default());
        for tunnel in 2..=UNPROVED_MAX as u16 + 2 {
            flows.of_or_new(caller(tunnel));
        }
        assert!(flows.of(caller(1)).is_some() && flows.of(caller(3)).is_some());
        assert!(flows.of(caller(2)).is_none());
        assert_eq!(flows.all().len(), UNPROVED_MAX + 1);
    }

    proptest! {
        #[test]
        fn a_wrong_tag_never_changes_what_is_proved(
            kind in 0usize..3,
            relay in 1u8..9,
            route_id: u32,
            sequence: u64,
            tag: u64,
            flags in 0u8..16,
            payload in proptest::collection::vec(any::<u8>(), 0..30),
        ) {
            let flows = Flows::default();
            flows.set_key(caller(1), RouteKey::new(&KEY), &Arc::default());
            let flow = flows.of(caller(1)).unwrap();
            let mut flow = hold(&flow);
            heard(&mut flow, &sealed(1, 3, 1), 0);
            let has = |flag: u8| flags & flag != 0;
            let kind = [DatagramKind::Data, DatagramKind::Beat, DatagramKind::Receipt][kind];
            let forged = Header {
                kind,
                tag,
                congestion: has(1),
                receipt: has(2),
                copy: has(4),
                resumed: has(8),
                ..header(relay, route_id, sequence)
            };
            let before = (way(&flow, false), flow.out.route_id(), flow.arrivals.over(3));
            let proof = flow.judge(&forged, &payload);
            prop_assert!(matches!(proof, Proof::Forged | Proof::Unknown));
            flow.came_over(&forged, proof, is_handshake(&payload), at(1));
            let after = (way(&flow, false), flow.out.route_id(), flow.arrivals.over(3));
            prop_assert_eq!(before, after);
            prop_assert_eq!(flow.arrivals.over(route_id).received, u64::from(route_id == 3));
        }
    }
}
