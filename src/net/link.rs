//! The sending side of a link: the fair queue in front of its lanes, and its counters.
//!
//! Who has something to send puts it into the queue; the writers of the lanes take from it what
//! the queue's rule gives them, as much as one write takes. On an emulated link the emulator
//! stands between: it takes from the queue at the link's rate, and what has made the way comes
//! to the lanes' outboxes.
//!
//! One flow stays on one lane, so that it stays in order; several lanes, so that one lost packet
//! of the transport does not stall all flows.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::emulation::Emulator;
use crate::engine::forward::Header;
use crate::engine::measure::LinkReport;
use crate::engine::traffic::{Class, FairQueue, FlowKey, RecentWaits, WaitQuantiles, classify};
use crate::engine::types::{NodeId, Timestamp};

pub use crate::engine::traffic::LANES;

/// What a lane writes at once (bytes).
pub(super) const WRITE_BYTES: usize = 48 * 1024;
/// What may wait in the outbox of a lane before its emulated link takes nothing more for it.
const OUTBOX_BYTES_MAX: usize = 64 * 1024;

/// Counters of a link since it exists, and its newest waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkCounters {
    /// How long datagrams waited in the last 10 to 20 s; `None` when there were none.
    pub waits: Option<WaitQuantiles>,
    /// Datagrams that left the queue.
    pub sent: u64,
    /// Datagrams marked because they waited.
    pub marked: u64,
    /// Datagrams dropped because too much waited.
    pub dropped: u64,
}

/// The sending side of a link.
pub struct Link {
    neighbour: NodeId,
    emulator: Option<Arc<Emulator>>,
    started: Instant,
    queues: Mutex<Queues>,
    /// Wakes the writer of each lane.
    ready: [Notify; LANES],
    busy_us: AtomicU64,
}

/// What waits, under one lock.
pub(super) struct Queues {
    waiting: FairQueue<Vec<u8>>,
    /// What an emulated link has let through, by lane.
    outboxes: [Outbox; LANES],
    /// The emulator takes from the queue, and not the writers.
    pub(super) is_emulated: bool,
    /// The emulator will look again by itself.
    pub(super) will_wake: bool,
    waits: RecentWaits,
    /// Datagrams that left the queue since the link is up.
    sent_ever: u64,
    marked: u64,
    /// Datagrams and bytes since the last report.
    sent: (u64, u64),
    reported_dropped: u64,
    slice_from: Timestamp,
}

#[derive(Default)]
struct Outbox {
    datagrams: VecDeque<Vec<u8>>,
    bytes: usize,
}

impl Queues {
    /// Takes the next datagram for one of the lanes that are `open`, with that lane.
    fn pop(&mut self, now: Timestamp, open: impl Fn(usize) -> bool) -> Option<(usize, Vec<u8>)> {
        let popped = self.waiting.pop(now, open)?;
        let mut bytes = popped.item;
        if popped.marked {
            Header::mark_congestion(&mut bytes);
            self.marked += 1;
        }
        self.waits.record(popped.waited);
        self.sent_ever += 1;
        self.sent = (self.sent.0 + 1, self.sent.1 + bytes.len() as u64);
        Some((popped.lane, bytes))
    }

    /// Whether something waits for its turn.
    pub(super) fn is_waiting(&self) -> bool {
        self.waiting.bytes() > 0
    }

    /// Takes the next datagram for a lane whose outbox has room.
    pub(super) fn pop_emulated(&mut self, now: Timestamp) -> Option<(usize, Vec<u8>)> {
        let open: [bool; LANES] =
            std::array::from_fn(|lane| self.outboxes[lane].bytes < OUTBOX_BYTES_MAX);
        self.pop(now, |lane| open[lane])
    }
}

impl Link {
    pub(super) fn new(neighbour: NodeId, emulator: Option<Arc<Emulator>>) -> Self {
        Self {
            neighbour,
            emulator,
            started: Instant::now(),
            queues: Mutex::new(Queues {
                waiting: FairQueue::default(),
                outboxes: Default::default(),
                is_emulated: false,
                will_wake: false,
                waits: RecentWaits::default(),
                marked: 0,
                sent_ever: 0,
                sent: (0, 0),
                reported_dropped: 0,
                slice_from: Timestamp(0),
            }),
            ready: std::array::from_fn(|_| Notify::new()),
            busy_us: AtomicU64::new(0),
        }
    }

    /// The other end.
    pub fn neighbour(&self) -> NodeId {
        self.neighbour
    }

    /// Lets a datagram wait for its turn.
    pub fn enqueue(self: &Arc<Self>, bytes: Vec<u8>) {
        self.enqueue_batch(std::iter::once(bytes));
    }

    /// Lets datagrams wait for their turn; cheaper than one by one.
    pub fn enqueue_batch(self: &Arc<Self>, datagrams: impl IntoIterator<Item = Vec<u8>>) {
        let mut touched = [false; LANES];
        let mut queues = self.queues();
        let now = self.now();
        for bytes in datagrams {
            // Whoever sends has checked or made the header.
            let Some((flow, class)) = classify(&bytes) else { continue };
            let lane = lane_of(flow, class, &bytes);
            touched[lane] = true;
            queues.waiting.push(flow, lane, class, bytes.len(), bytes, now);
        }
        self.emulate(&mut queues);
        if queues.is_emulated {
            return;
        }
        drop(queues);
        for (ready, _) in self.ready.iter().zip(touched).filter(|(_, touched)| *touched) {
            ready.notify_one();
        }
    }

    /// Lets a flow go before others at `rate` (bytes/s) for a time; 0 ends that.
    pub fn grant(&self, flow: FlowKey, rate: u64, duration: Duration) {
        let mut queues = self.queues();
        let now = self.now();
        queues.waiting.grant(flow, rate, now + duration, now);
    }

    /// Resolves when there may be something to write on a lane.
    pub(super) async fn ready(&self, lane: usize) {
        self.ready[lane].notified().await;
    }

    /// Appends to `buffer` as frames what is next for a lane, about as much as one write takes.
    pub(super) fn take(self: &Arc<Self>, lane: usize, buffer: &mut Vec<u8>) {
        let mut queues = self.queues();
        let now = self.now();
        while buffer.len() < WRITE_BYTES {
            let outbox = &mut queues.outboxes[lane];
            let next = match outbox.datagrams.pop_front() {
                Some(bytes) => {
                    outbox.bytes -= bytes.len();
                    Some(bytes)
                }
                None if queues.is_emulated => None,
                None => queues.pop(now, |open| open == lane).map(|(_, bytes)| bytes),
            };
            let Some(bytes) = next else { break };
            buffer.extend((bytes.len() as u16).to_be_bytes());
            buffer.extend(&bytes);
        }
        if queues.is_emulated {
            // The outbox has room again.
            self.emulate(&mut queues);
        }
    }

    /// The emulator's timer: what has made the way comes to the outbox of its lane.
    pub(super) fn arrived(&self, lane: usize, bytes: Vec<u8>) {
        let mut queues = self.queues();
        let outbox = &mut queues.outboxes[lane];
        outbox.bytes += bytes.len();
        outbox.datagrams.push_back(bytes);
        drop(queues);
        self.ready[lane].notify_one();
    }

    /// The emulator's timer: the link may take more.
    pub(super) fn wake(self: &Arc<Self>) {
        let mut queues = self.queues();
        self.emulate(&mut queues);
        queues.will_wake = false;
        // In case it still waits for the link to be free.
        self.emulate(&mut queues);
    }

    fn emulate(self: &Arc<Self>, queues: &mut Queues) {
        let Some(emulator) = &self.emulator else { return };
        let was_emulated = queues.is_emulated;
        emulator.take_from(self, queues);
        if was_emulated && !queues.is_emulated {
            self.ready.iter().for_each(Notify::notify_one);
        }
    }

    pub(super) fn note_busy(&self, busy: Duration) {
        self.busy_us.fetch_add(busy.as_micros() as u64, Ordering::Relaxed);
    }

    /// Time as the queue counts it: since this link exists.
    pub(super) fn now(&self) -> Timestamp {
        Timestamp(self.started.elapsed().as_micros() as u64)
    }

    /// What was counted so far.
    pub(super) fn counters(&self) -> LinkCounters {
        let queues = self.queues();
        LinkCounters {
            waits: queues.waits.quantiles(),
            sent: queues.sent_ever,
            marked: queues.marked,
            dropped: queues.waiting.dropped(),
        }
    }

    /// The counters since the last call, which start anew.
    pub(super) fn take_report(&self) -> LinkReport {
        let mut queues = self.queues();
        queues.waits.turn();
        let now = self.now();
        let duration = now.since(std::mem::replace(&mut queues.slice_from, now));
        let dropped = queues.waiting.dropped();
        let before = std::mem::replace(&mut queues.reported_dropped, dropped);
        let (sent_datagrams, sent_bytes) = std::mem::take(&mut queues.sent);
        LinkReport {
            sent_bytes,
            sent_datagrams,
            dropped_datagrams: dropped - before,
            busy_us: self.busy_us.swap(0, Ordering::Relaxed),
            duration_us: duration.as_micros() as u64,
        }
    }

    fn queues(&self) -> MutexGuard<'_, Queues> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The lane of a datagram: the flow's, or by id for probes, which are to see all lanes.
fn lane_of(flow: FlowKey, class: Class, bytes: &[u8]) -> usize {
    let is_probe = class == Class::Control && flow.tunnel.0 == 0;
    let tunnel = flow.tunnel.0.to_be_bytes();
    let name = if is_probe { [&bytes[11..19], &[]] } else { [&tunnel[..], &flow.source.0] };
    let name = name.into_iter().flatten();
    name.fold(0usize, |sum, byte| sum.wrapping_mul(31).wrapping_add(usize::from(*byte))) % LANES
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{EmulatedLink, EmulationConfig};
    use crate::engine::forward::DatagramKind;
    use crate::engine::traffic::STANDING;
    use crate::engine::types::{Route, TunnelId};

    const PEER: NodeId = NodeId([99; 8]);

    fn datagram(kind: DatagramKind, source: u8, sequence: u64, payload: usize) -> Vec<u8> {
        let route = Route::new([NodeId([source; 8]), PEER]).unwrap();
        Header::new(kind, TunnelId(3), 1, sequence, route).encode(&vec![0; payload])
    }

    /// Datagrams in a lane's write.
    fn frames(buffer: &[u8]) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        let mut rest = buffer;
        while let Some((length, after)) = rest.split_first_chunk::<2>() {
            let (frame, after) = after.split_at(usize::from(u16::from_be_bytes(*length)));
            frames.push(frame.to_vec());
            rest = after;
        }
        frames
    }

    fn take_all(link: &Arc<Link>) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        for lane in 0..LANES {
            loop {
                let mut buffer = Vec::new();
                link.take(lane, &mut buffer);
                assert!(buffer.len() < WRITE_BYTES + 2 + super::super::lanes::FRAME_BYTES_MAX);
                if buffer.is_empty() {
                    break;
                }
                all.extend(frames(&buffer));
            }
        }
        all
    }

    #[test]
    fn the_kinds_of_a_tunnel_stay_on_one_lane_and_probes_use_all() {
        let lane = |kind, source: u8, sequence| {
            let bytes = datagram(kind, source, sequence, 1);
            let (flow, class) = classify(&bytes).unwrap();
            lane_of(flow, class, &bytes)
        };
        for source in 0..9 {
            let kinds = [DatagramKind::Data, DatagramKind::Beat, DatagramKind::Receipt];
            let lanes = (0..20).flat_map(|n| kinds.map(|kind| lane(kind, source, n)));
            let lanes: Vec<usize> = lanes.collect();
            assert!(lanes.iter().all(|lane| *lane == lanes[0]), "{lanes:?}");
        }
        let probe = |id| {
            let route = Route::new([NodeId([1; 8]), PEER]).unwrap();
            let bytes = Header::new(DatagramKind::Probe, TunnelId(0), 0, id, route).encode(b"");
            let (flow, class) = classify(&bytes).unwrap();
            lane_of(flow, class, &bytes)
        };
        let probes: std::collections::BTreeSet<usize> = (0..20).map(probe).collect();
        assert_eq!(probes.len(), LANES);
    }

    #[test]
    fn a_link_sends_what_fits_and_counts() {
        let link = Arc::new(Link::new(PEER, None));
        let data = |n| datagram(DatagramKind::Data, 1, n, 4_000);
        link.enqueue_batch((0..600).map(data));
        let sent = take_all(&link);
        assert!(link.counters().waits.is_some());
        let report = link.take_report();
        assert_eq!(report.sent_datagrams, sent.len() as u64);
        assert_eq!(report.sent_bytes, sent.iter().map(|bytes| bytes.len() as u64).sum::<u64>());
        assert_eq!(report.sent_datagrams + report.dropped_datagrams, 600);
        assert!(report.dropped_datagrams > 100, "two megabytes fit: {report:?}");
        assert_eq!(link.take_report().dropped_datagrams, 0, "counters start anew");
        assert_eq!(link.counters().dropped, report.dropped_datagrams);
        // The oldest are dropped, the rest is in order.
        let numbers = sent.iter().map(|bytes| Header::decode(bytes).unwrap().0.sequence);
        assert!(numbers.eq(600 - report.sent_datagrams..600));
    }

    #[test]
    fn what_waited_is_marked() {
        let link = Arc::new(Link::new(PEER, None));
        let much = WRITE_BYTES / 4_000 + 1;
        let data = |n| datagram(DatagramKind::Data, 1, n, 4_000);
        link.enqueue_batch((0..3 * much as u64).map(data));
        std::thread::sleep(Duration::from_millis(12));
        link.enqueue(datagram(DatagramKind::Beat, 1, 1, 10));
        let lane = lane_of(classify(&data(0)).unwrap().0, Class::Data, &data(0));
        let once = || {
            let mut buffer = Vec::new();
            link.take(lane, &mut buffer);
            frames(&buffer)
        };
        let first = once();
        assert_eq!(first[0], datagram(DatagramKind::Beat, 1, 1, 10), "control goes first");
        std::thread::sleep(STANDING);
        let is_marked = |bytes: &Vec<u8>| Header::decode(bytes).unwrap().0.congestion;
        assert!(!first.iter().any(is_marked), "a short stall");
        let second = once();
        assert!(second.iter().all(is_marked), "it goes on");
        assert_eq!(link.counters().marked, second.len() as u64);
    }

    #[test]
    fn an_emulated_link_queues_at_its_rate_and_a_free_one_bypasses_the_emulator() {
        let conditions =
            |rate| EmulatedLink { neighbour: PEER.to_string(), rate, ..EmulatedLink::default() };
        let config =
            EmulationConfig { enabled: true, links: vec![conditions(0.0)], ..Default::default() };
        let emulator = Emulator::start(&config).unwrap().unwrap();
        let link = Arc::new(Link::new(PEER, Some(emulator.clone())));
        link.enqueue(datagram(DatagramKind::Data, 1, 0, 1_000));
        assert_eq!(take_all(&link).len(), 1, "at once");
        emulator.set(PEER, conditions(100_000.0));
        let begun = Instant::now();
        link.enqueue_batch((0..12).map(|n| datagram(DatagramKind::Data, 1, n, 957)));
        let dropped = || link.counters().dropped as usize;
        let mut received = 0;
        while received + dropped() < 12 && begun.elapsed() < Duration::from_secs(20) {
            std::thread::sleep(Duration::from_millis(1));
            received += take_all(&link).len();
        }
        assert_eq!(received + dropped(), 12);
        assert!(begun.elapsed() >= Duration::from_millis(10) * received as u32, "10 ms each");
        assert!(link.counters().marked > 0);
    }
}
