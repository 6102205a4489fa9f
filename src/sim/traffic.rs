//! What tunnels send, what became of it, and what that does to links with a rate.

use std::time::Duration;

use rand::RngExt;

use super::{Event, World};
use crate::engine::event::Input;
use crate::engine::forward::Header;
use crate::engine::measure::LinkReport;
use crate::engine::traffic::{DROP_AFTER, MARK_AFTER};
use crate::engine::types::{Timestamp, TunnelId};

/// How often engines are told what their links carried.
const SLICE: Duration = Duration::from_secs(10);

/// What a tunnel sends from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traffic {
    /// Between two datagrams; above 0.
    pub every: Duration,
    /// What each carries (bytes). It is counted on links and not held.
    pub bytes: usize,
}

/// What became of the traffic of a tunnel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Travelled {
    /// Datagrams that were to be sent.
    pub sent: u64,
    /// Those that arrived.
    pub arrived: u64,
    /// When the newest did.
    pub arrived_at: Option<Timestamp>,
    /// Longest time between two arrivals.
    pub longest_gap: Duration,
    /// How often the data plane changed the route.
    pub moves: u64,
    /// How often the route in use was lost: silent, or said to be broken.
    pub losses: u64,
}

/// One direction of a link with a rate: first in, first out.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Queue {
    /// When everything that is in it has left.
    free_at: Timestamp,
    counted: LinkReport,
}

impl Queue {
    /// A datagram of so many bytes joins a queue that leaves at `rate` (bytes/s). Returns when it has
    /// left and whether it is marked; `None` when it is dropped.
    fn push(&mut self, bytes: usize, rate: f64, now: Timestamp) -> Option<(Timestamp, bool)> {
        let waits = self.free_at.since(now);
        if waits > DROP_AFTER {
            self.counted.dropped_datagrams += 1;
            return None;
        }
        let takes = Duration::from_secs_f64(bytes as f64 / rate.max(1.0));
        self.free_at = self.free_at.max(now) + takes;
        self.counted.sent_bytes += bytes as u64;
        self.counted.sent_datagrams += 1;
        self.counted.busy_us += takes.as_micros() as u64;
        Some((self.free_at, waits > MARK_AFTER))
    }
}

impl World {
    /// A tunnel of a node sends this from now on, for as long as it is open. Before, it has shaken
    /// hands with its far end.
    pub fn send(&mut self, node: usize, tunnel: TunnelId, traffic: Traffic) {
        let (me, phase) = (self.id(node), self.random.random::<f64>());
        let binding = self.nodes[node].forwarding.tunnels.get(&tunnel);
        let target = binding.and_then(|b| self.by_id.get(&b.destination)).copied();
        if let Some(target) = target {
            self.nodes[target].plane.forget_caller(me, tunnel);
        }
        let flow = self.nodes[node].plane.flows.entry(tunnel).or_default();
        flow.traffic = Some(traffic);
        flow.turn += 1;
        let event = Event::Send(node, tunnel, flow.turn);
        self.plan(self.now + traffic.every.mul_f64(phase), event);
    }

    /// What became of the traffic of a tunnel.
    pub fn travelled(&self, node: usize, tunnel: TunnelId) -> Travelled {
        let flow = self.nodes[node].plane.flows.get(&tunnel);
        flow.map_or_else(Travelled::default, |flow| flow.travelled)
    }

    /// A tunnel sends its next datagram.
    pub(super) fn send_next(&mut self, node: usize, tunnel: TunnelId, turn: u32) {
        let flow = self.nodes[node].plane.flows.get(&tunnel).filter(|flow| flow.turn == turn);
        let Some(every) = flow.and_then(|flow| flow.traffic).map(|traffic| traffic.every) else {
            return;
        };
        self.plan(self.now + every, Event::Send(node, tunnel, turn));
        self.send_packet(node, tunnel);
    }

    /// A datagram with data has arrived at the far end of its tunnel.
    pub(super) fn delivered(&mut self, node: usize, header: &Header) {
        let (now, tunnel) = (self.now, header.tunnel);
        let Some(&source) = self.by_id.get(&header.route.source()) else { return };
        self.check_destination(source, tunnel, node);
        let flow = self.nodes[source].plane.flows.get_mut(&tunnel);
        if let Some(travelled) = flow.map(|flow| &mut flow.travelled) {
            travelled.arrived += 1;
            let gap = travelled.arrived_at.map_or(Duration::ZERO, |at| now.since(at));
            travelled.longest_gap = travelled.longest_gap.max(gap);
            travelled.arrived_at = Some(now);
        }
    }

    /// A datagram of so many bytes joins the queue of a link. Returns how long it takes to leave, and
    /// whether it is marked; `None` when it is dropped.
    pub(super) fn queue(
        &mut self,
        from: usize,
        to: usize,
        bytes: usize,
        rate: Option<f64>,
    ) -> Option<(Duration, bool)> {
        let Some(rate) = rate else { return Some((Duration::ZERO, false)) };
        let queue = self.queues.entry((from, to)).or_default();
        let (left_at, marked) = queue.push(bytes, rate, self.now)?;
        Some((left_at.since(self.now), marked))
    }

    /// From now on engines are told what their links with a rate carried.
    pub(super) fn begin_slices(&mut self) {
        if !self.sliced {
            self.sliced = true;
            self.plan(self.now + SLICE, Event::Slice);
        }
    }

    pub(super) fn slice_over(&mut self) {
        self.plan(self.now + SLICE, Event::Slice);
        for node in 0..self.nodes.len() {
            let mut reports = Vec::new();
            for &to in &self.nodes[node].connected {
                if self.link(node, to).is_some_and(|link| link.rate.is_some()) {
                    let queue = self.queues.entry((node, to)).or_default();
                    let counted = std::mem::take(&mut queue.counted);
                    let duration_us = SLICE.as_micros() as u64;
                    reports.push((self.keys[to].node_id(), LinkReport { duration_us, ..counted }));
                }
            }
            if !reports.is_empty() {
                self.input(node, Input::Slice(reports));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_delays_marks_and_drops() {
        let mut queue = Queue::default();
        let now = Timestamp(1_000_000);
        // 1,000 bytes take a millisecond.
        let results: Vec<_> = (0..63).map(|_| queue.push(1_000, 1e6, now)).collect();
        let after = |ms: u64| now + Duration::from_millis(ms);
        assert_eq!(results[0], Some((after(1), false)));
        assert_eq!(results[8], Some((after(9), false)), "it waits for 8 ms");
        assert_eq!(results[9], Some((after(10), true)));
        assert_eq!(results[60], Some((after(61), true)), "it waits for 60 ms");
        assert_eq!((results[61], results[62]), (None, None));
        let counted = queue.counted;
        assert_eq!((counted.sent_bytes, counted.busy_us), (61_000, 61_000));
        assert_eq!((counted.sent_datagrams, counted.dropped_datagrams), (61, 2));
        assert_eq!(queue.push(1_000, 1e6, after(100)), Some((after(101), false)));
    }
}
