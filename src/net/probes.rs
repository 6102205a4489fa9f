//! Probes of this node that are under way, answers to those of others, and what neighbours may have this
//! node do for them. The rule of the latter is [`Allowance`].
//!
//! A route is traced by probes over its first link, its first two, and so on: each is answered by the
//! last node that it reaches. What they take is the node's own, and no sample.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::plane::DataPlane;
use crate::engine::event::Input;
use crate::engine::forward::{DatagramKind, Header};
use crate::engine::measure::link::NEIGHBOURS_MAX;
use crate::engine::measure::prober::OUTSTANDING_MAX;
use crate::engine::traffic::{Allowance, Passing};
use crate::engine::types::{NodeId, Route, Timestamp, TunnelId};

/// Probes of each node of a route that is traced.
const TRACE_PROBES: usize = 5;
/// Time between two of them.
const TRACE_EVERY: Duration = Duration::from_millis(50);
/// How long the last one may take.
const TRACE_PATIENCE: Duration = Duration::from_secs(2);

/// A probe that is under way.
/// Nobody waits longer for the answer to a probe: twice what the engine does at most.
const LOST_AFTER: Duration = Duration::from_secs(4);

struct UnderWay {
    sent: Instant,
    route: Route,
    /// Who is told of its round trip, when it is not the engine.
    told: Option<oneshot::Sender<Duration>>,
}

/// Probes that are under way, at most [`OUTSTANDING_MAX`].
#[derive(Default)]
pub(super) struct Probes(Mutex<BTreeMap<u64, UnderWay>>);

impl Probes {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, UnderWay>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A probe leaves.
    fn sent(&self, id: u64, route: Route, told: Option<oneshot::Sender<Duration>>) {
        let mut probes = self.lock();
        if probes.len() >= OUTSTANDING_MAX {
            probes.retain(|_, probe| probe.sent.elapsed() < LOST_AFTER);
        }
        while probes.len() >= OUTSTANDING_MAX {
            probes.pop_first();
        }
        probes.insert(id, UnderWay { sent: Instant::now(), route, told });
    }

    /// An answer arrived. Returns its probe; `None` when nobody asked, or over another route.
    fn answered(&self, answer: &Header) -> Option<UnderWay> {
        let mut probes = self.lock();
        let asked =
            |probe: &&UnderWay| probe.route.nodes().iter().eq(answer.route.nodes().iter().rev());
        probes.get(&answer.sequence).filter(asked)?;
        probes.remove(&answer.sequence)
    }
}

/// What a trace found of one node of a route.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Traced {
    /// Probes that were sent to it.
    pub probes: usize,
    /// Round trips of those that came back, in the order in which they left.
    pub round_trips: Vec<Duration>,
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
        self.probe(id, route, None);
    }

    fn probe(&self, id: u64, route: &Route, told: Option<oneshot::Sender<Duration>>) {
        self.probes.sent(id, route.clone(), told);
        let header = Header::new(DatagramKind::Probe, TunnelId(0), 0, id, route.clone());
        self.send(route.nodes()[1], header.encode(&[]));
    }

    /// Measures how far away each node of a route is, in its order, the source left out. Takes some 2 s
    /// at most.
    pub async fn trace(&self, route: &Route) -> Vec<Traced> {
        let ends = 2..=route.nodes().len();
        let parts = ends.filter_map(|end| Route::new(&route.nodes()[..end]).ok());
        let parts: Vec<Route> = parts.collect();
        // Ids that nobody guesses, and that no other probe has.
        let ids = RandomState::new();
        let mut nodes = vec![Traced::default(); parts.len()];
        let mut asked = Vec::new();
        for round in 0..TRACE_PROBES {
            if round > 0 {
                tokio::time::sleep(TRACE_EVERY).await;
            }
            for (index, part) in parts.iter().enumerate() {
                let (told, heard) = oneshot::channel();
                self.probe(ids.hash_one((round, index)), part, Some(told));
                nodes[index].probes += 1;
                asked.push((index, heard));
            }
        }
        let deadline = tokio::time::Instant::now() + TRACE_PATIENCE;
        for (index, heard) in asked {
            if let Ok(Ok(round_trip)) = tokio::time::timeout_at(deadline, heard).await {
                nodes[index].round_trips.push(round_trip);
            }
        }
        nodes
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
        let Some(probe) = self.probes.answered(answer) else {
            return self.counters.count("unasked-probe-answer");
        };
        let round_trip = probe.sent.elapsed();
        if let Some(told) = probe.told {
            let _ = told.send(round_trip);
            return;
        }
        let (id, rtt_us) = (answer.sequence, round_trip.as_micros() as u64);
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

    #[tokio::test]
    async fn a_trace_names_the_node_from_which_on_nothing_comes_back() {
        let (events, mut receiver) = mpsc::channel(8);
        let plane = DataPlane::new(node(1), events);
        let route = Route::new([1, 2, 3, 4].map(node)).unwrap();
        let answering = async {
            // Node 2 answers three times, node 3 once, node 4 never.
            for (nodes, answers) in [(2, 3), (3, 1)] {
                for _ in 0..answers {
                    tokio::time::sleep(Duration::from_millis(60)).await;
                    let way = Route::new(&route.nodes()[..nodes]).unwrap().reversed();
                    let asked = plane.probes.lock();
                    let mut under_way = asked.iter();
                    let (id, _) = under_way.find(|(_, p)| p.route.nodes().len() == nodes).unwrap();
                    let kind = DatagramKind::ProbeAnswer;
                    let answer = Header::new(kind, TunnelId(0), 0, *id, way);
                    drop(asked);
                    plane.probe_answered(&answer);
                }
            }
        };
        let (traced, ()) = tokio::join!(plane.trace(&route), answering);
        let found: Vec<_> = traced.iter().map(|node| node.round_trips.len()).collect();
        assert_eq!(found, [3, 1, 0]);
        assert!(traced.iter().all(|node| node.probes == TRACE_PROBES));
        assert!(receiver.try_recv().is_err(), "they are no samples");
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
