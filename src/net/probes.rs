//! Probes of this node that are under way, answers to those of others, and what neighbours may have this
//! node do for them. The rule of the latter is [`Allowance`].

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::plane::DataPlane;
use crate::engine::event::Input;
use crate::engine::forward::{DatagramKind, Header};
use crate::engine::measure::link::NEIGHBOURS_MAX;
use crate::engine::measure::prober::OUTSTANDING_MAX;
use crate::engine::traffic::{Allowance, Passing};
use crate::engine::types::{NodeId, Route, Timestamp, TunnelId};

/// Probes that are under way, at most [`OUTSTANDING_MAX`]: when each left, and over which route.
#[derive(Default)]
pub(super) struct Probes(Mutex<BTreeMap<u64, (Instant, Route)>>);

impl Probes {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, (Instant, Route)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A probe leaves.
    fn sent(&self, id: u64, route: Route) {
        let mut probes = self.lock();
        while probes.len() >= OUTSTANDING_MAX {
            probes.pop_first();
        }
        probes.insert(id, (Instant::now(), route));
    }

    /// An answer arrived. Returns when its probe left; `None` when nobody asked, or over another route.
    fn answered(&self, answer: &Header) -> Option<Instant> {
        let mut probes = self.lock();
        let asked = |(_, route): &(Instant, Route)| {
            route.nodes().iter().eq(answer.route.nodes().iter().rev())
        };
        probes.get(&answer.sequence).filter(|probe| asked(probe))?;
        probes.remove(&answer.sequence).map(|(sent, _)| sent)
    }
}

/// What neighbours may still have this node do, at most [`NEIGHBOURS_MAX`] of them.
#[derive(Default)]
pub(super) struct Allowances {
    known: Mutex<BTreeMap<NodeId, Allowance>>,
    /// What is passed on for each neighbour (bytes/s); 0 is unlimited.
    relay_rate: u64,
}

impl Allowances {
    /// So much is passed on for each neighbour (bytes/s); 0 is unlimited.
    pub(super) fn with_relay_rate(relay_rate: u64) -> Self {
        Self { relay_rate, ..Self::default() }
    }

    /// What becomes of so many bytes that a neighbour wants passed on.
    pub(super) fn passes(
        &self,
        from: NodeId,
        bytes: usize,
        now: impl FnOnce() -> Timestamp,
    ) -> Passing {
        match self.relay_rate {
            0 => Passing::Freely,
            _ => {
                let now = now();
                self.of(from, now, |allowance| allowance.passes(bytes, now))
            }
        }
    }

    /// Whether a probe that a neighbour brought is answered by so many bytes.
    fn answers(&self, from: NodeId, probe: &Header, now: Timestamp) -> bool {
        let source = Some(probe.route.source()).filter(|source| *source != from);
        self.of(from, now, |allowance| allowance.answers(source, probe.length(), now))
    }

    fn of<T>(&self, from: NodeId, now: Timestamp, ask: impl FnOnce(&mut Allowance) -> T) -> T {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= NEIGHBOURS_MAX && !known.contains_key(&from) {
            known.pop_first();
        }
        let new = || Allowance::new(self.relay_rate, now);
        ask(known.entry(from).or_insert_with(new))
    }
}

impl DataPlane {
    /// Sends a probe over a route; its answer becomes an event with the round-trip time.
    pub(super) fn send_probe(&self, id: u64, route: &Route) {
        self.probes.sent(id, route.clone());
        let header = Header::new(DatagramKind::Probe, TunnelId(0), 0, id, route.clone());
        self.send(route.nodes()[1], header.encode(&[]));
    }

    /// A probe has reached its last node, this one.
    pub(super) fn answer_probe(&self, from: NodeId, probe: &Header) {
        if !self.allowances.answers(from, probe, self.flows.now()) {
            return self.counters.count("probe-rate");
        }
        let route = probe.route.reversed();
        let next = route.nodes()[1];
        let id = probe.sequence;
        let answer = Header::new(DatagramKind::ProbeAnswer, TunnelId(0), 0, id, route);
        self.send(next, answer.encode(&[]));
    }

    /// An answer counts when it came back over the route that was asked.
    pub(super) fn probe_answered(&self, answer: &Header) {
        let Some(sent) = self.probes.answered(answer) else {
            return self.counters.count("unasked-probe-answer");
        };
        let (id, rtt_us) = (answer.sequence, sent.elapsed().as_micros() as u64);
        if self.events.try_send(Input::ProbeAnswered { id, rtt_us }).is_err() {
            self.counters.count("event-queue-full");
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;

    fn node(byte: u8) -> NodeId {
        NodeId([byte; 8])
    }

    #[test]
    fn a_probe_answer_over_another_route_is_not_believed() {
        let (events, mut receiver) = mpsc::channel(8);
        let plane = DataPlane::new(node(1), events);
        let route =
            |nodes: &[u8]| Route::new(nodes.iter().map(|n| node(*n)).collect::<Vec<_>>()).unwrap();
        plane.send_probe(7, &route(&[1, 2, 3]));
        let answer = |nodes: &[u8], position| Header {
            position,
            ..Header::new(DatagramKind::ProbeAnswer, TunnelId(0), 0, 7, route(nodes))
        };
        plane.received(node(2), answer(&[2, 1], 1).encode(b""));
        assert!(receiver.try_recv().is_err());
        assert_eq!(plane.counters().dropped()["unasked-probe-answer"], 1);
        plane.received(node(2), answer(&[3, 2, 1], 2).encode(b""));
        assert!(matches!(receiver.try_recv(), Ok(Input::ProbeAnswered { id: 7, .. })));
    }
}
