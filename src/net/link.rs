//! The sending side of a link: bounded queues in front of its lanes, and its counters.
//!
//! One flow stays on one lane, so that it stays in order; several lanes, so that one lost packet
//! of the transport does not stall all flows.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use crate::engine::forward::Header;
use crate::engine::measure::LinkReport;
use crate::engine::types::NodeId;

/// Streams to each neighbour in each direction.
pub const LANES: usize = 2;
/// Datagrams waiting in one lane; beyond, they are dropped. At 4 kB each, a second of 1 MB/s.
pub const LANE_QUEUE_MAX: usize = 256;
/// Datagrams waiting in one lane beyond which they are marked.
const LANE_QUEUE_MARK: usize = LANE_QUEUE_MAX / 4;

/// The sending side of a link.
pub struct Link {
    neighbour: NodeId,
    lanes: Vec<mpsc::Sender<Vec<u8>>>,
    sent_bytes: AtomicU64,
    sent_datagrams: AtomicU64,
    dropped: AtomicU64,
    busy_us: AtomicU64,
    slice_from: Mutex<Instant>,
}

impl Link {
    pub(super) fn new(neighbour: NodeId) -> (Self, Vec<mpsc::Receiver<Vec<u8>>>) {
        let (lanes, receivers) = (0..LANES).map(|_| mpsc::channel(LANE_QUEUE_MAX)).unzip();
        let link = Self {
            neighbour,
            lanes,
            sent_bytes: AtomicU64::new(0),
            sent_datagrams: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            busy_us: AtomicU64::new(0),
            slice_from: Mutex::new(Instant::now()),
        };
        (link, receivers)
    }

    /// The other end.
    pub fn neighbour(&self) -> NodeId {
        self.neighbour
    }

    /// Puts a datagram into its lane: marks it when the lane is filling up, drops it when full.
    pub fn enqueue(&self, mut bytes: Vec<u8>) {
        let lane = &self.lanes[lane_of(&bytes)];
        if LANE_QUEUE_MAX - lane.capacity() > LANE_QUEUE_MARK {
            Header::mark_congestion(&mut bytes);
        }
        let length = bytes.len() as u64;
        if lane.try_send(bytes).is_ok() {
            self.sent_bytes.fetch_add(length, Ordering::Relaxed);
            self.sent_datagrams.fetch_add(1, Ordering::Relaxed);
        } else {
            self.note_dropped();
        }
    }

    pub(super) fn note_dropped(&self) {
        self.dropped.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn note_busy(&self, busy: Duration) {
        self.busy_us.fetch_add(busy.as_micros() as u64, Ordering::Relaxed);
    }

    /// The counters since the last call, which start anew.
    pub(super) fn take_report(&self) -> LinkReport {
        let take = |counter: &AtomicU64| counter.swap(0, Ordering::Relaxed);
        let mut from = self.slice_from.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let duration = now.duration_since(std::mem::replace(&mut *from, now));
        LinkReport {
            sent_bytes: take(&self.sent_bytes),
            sent_datagrams: take(&self.sent_datagrams),
            dropped_datagrams: take(&self.dropped),
            busy_us: take(&self.busy_us),
            duration_us: duration.as_micros() as u64,
        }
    }
}

/// The lane of a datagram: by tunnel and source for data, by id for probes.
fn lane_of(bytes: &[u8]) -> usize {
    const DATA: Option<&u8> = Some(&0);
    let (tunnel, sequence, source) = (bytes.get(5..7), bytes.get(11..19), bytes.get(27..35));
    let flow = if bytes.get(1) == DATA { [tunnel, source] } else { [sequence, None] };
    let flow = flow.into_iter().flatten().flatten();
    flow.fold(0usize, |sum, byte| sum.wrapping_mul(31).wrapping_add(usize::from(*byte))) % LANES
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::forward::DatagramKind;
    use crate::engine::types::{Route, TunnelId};

    #[test]
    fn a_flow_stays_on_one_lane_and_probes_use_all() {
        let lane = |kind, source: u8, sequence| {
            let route = Route::new([NodeId([source; 8]), NodeId([99; 8])]).unwrap();
            let header = Header::new(kind, TunnelId(3), 1, sequence, route);
            lane_of(&header.encode(b"x"))
        };
        for source in 0..9 {
            let lanes: Vec<usize> =
                (0..20).map(|sequence| lane(DatagramKind::Data, source, sequence)).collect();
            assert!(lanes.iter().all(|lane| *lane == lanes[0]), "{lanes:?}");
        }
        let probes: std::collections::BTreeSet<usize> =
            (0..20).map(|sequence| lane(DatagramKind::Probe, 1, sequence)).collect();
        assert_eq!(probes.len(), LANES);
    }

    #[tokio::test]
    async fn a_full_lane_marks_then_drops_and_counts() {
        let (link, mut receivers) = Link::new(NodeId([1; 8]));
        for _ in 0..LANE_QUEUE_MAX + 10 {
            link.enqueue(vec![0; 100]);
        }
        let report = link.take_report();
        assert_eq!(report.sent_datagrams, LANE_QUEUE_MAX as u64);
        assert_eq!(report.dropped_datagrams, 10);
        assert_eq!(link.take_report().sent_datagrams, 0, "counters start anew");
        let mut marked = 0;
        for receiver in &mut receivers {
            while let Ok(bytes) = receiver.try_recv() {
                marked += usize::from(bytes[2] == 1);
            }
        }
        assert_eq!(marked, LANE_QUEUE_MAX - LANE_QUEUE_MARK - 1);
    }
}
