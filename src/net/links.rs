//! Links: a few long-lived libp2p streams to each neighbour (lanes) that carry framed datagrams.
//!
//! Each node opens the lanes that it sends on. A frame is two bytes of length (big endian) and
//! the datagram. The receiver acknowledges a new lane with one byte, because an accepted stream
//! may still be refused by a busy peer. One flow stays on one lane, so that it stays in order;
//! several lanes, so that one lost packet of the transport does not stall all flows.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::{AsyncReadExt, AsyncWriteExt, StreamExt};
use libp2p::{PeerId, Stream, StreamProtocol};
use libp2p_stream::{Control, IncomingStreams};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::plane::DataPlane;
use crate::engine::event::Input;
use crate::engine::forward::{Header, PAYLOAD_BYTES_MAX};
use crate::engine::measure::LinkReport;
use crate::engine::types::{MAX_ROUTE_HOPS, NodeId};

/// Streams to each neighbour in each direction.
pub const LANES: usize = 2;
/// Datagrams waiting in one lane; beyond, they are dropped. At 4 kB each, a second of 1 MB/s.
pub const LANE_QUEUE_MAX: usize = 256;
/// Datagrams waiting in one lane beyond which they are marked.
const LANE_QUEUE_MARK: usize = LANE_QUEUE_MAX / 4;
/// Longest frame (bytes): the longest header and payload.
pub const FRAME_BYTES_MAX: usize = 19 + 8 * (MAX_ROUTE_HOPS + 1) + PAYLOAD_BYTES_MAX;
/// Lanes that one neighbour may open to us: twice ours, for those that are being replaced.
const INCOMING_MAX: usize = 2 * LANES;
/// A write that takes as long as this had to wait for the neighbour.
const BUSY_MIN: Duration = Duration::from_millis(1);
/// How long a lane may take to open.
const OPEN_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest wait between two tries to open the lanes.
const RETRY_MAX: Duration = Duration::from_secs(30);
const ACKNOWLEDGED: u8 = 1;

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
    fn new(neighbour: NodeId) -> (Self, Vec<mpsc::Receiver<Vec<u8>>>) {
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
    let (tunnel, sequence, source) = (bytes.get(5..7), bytes.get(11..19), bytes.get(19..27));
    let flow = if bytes.get(1) == DATA { [tunnel, source] } else { [sequence, None] };
    let flow = flow.into_iter().flatten().flatten();
    flow.fold(0usize, |sum, byte| sum.wrapping_mul(31).wrapping_add(usize::from(*byte))) % LANES
}

/// Keeps the lanes to a connected peer open until `stop`.
pub async fn maintain(
    mut control: Control,
    protocol: StreamProtocol,
    peer: PeerId,
    neighbour: NodeId,
    plane: Arc<DataPlane>,
    events: mpsc::Sender<Input>,
    stop: CancellationToken,
) {
    let mut retry = Duration::from_millis(250);
    while !stop.is_cancelled() {
        let opened = tokio::select! {
            () = stop.cancelled() => return,
            opened = open_lanes(&mut control, &protocol, peer) => opened,
        };
        let Some(streams) = opened else {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(retry) => {}
            }
            retry = (retry * 2).min(RETRY_MAX);
            continue;
        };
        retry = Duration::from_millis(250);
        let (link, receivers) = Link::new(neighbour);
        let link = Arc::new(link);
        if !plane.add_link(link.clone()) {
            // As many neighbours as there may be; perhaps one of them leaves.
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(RETRY_MAX) => continue,
            }
        }
        if events.send(Input::LinkUp(neighbour)).await.is_err() {
            return;
        }
        let writers = streams.into_iter().zip(receivers);
        let writers =
            writers.map(|(stream, queue)| Box::pin(write_lane(stream, queue, link.clone())));
        tokio::select! {
            () = stop.cancelled() => {}
            _ = futures::future::select_all(writers) => {}
        }
        if plane.remove_link(&link) {
            let _ = events.send(Input::LinkDown(neighbour)).await;
        }
    }
}

async fn open_lanes(
    control: &mut Control,
    protocol: &StreamProtocol,
    peer: PeerId,
) -> Option<Vec<Stream>> {
    let mut streams = Vec::with_capacity(LANES);
    for _ in 0..LANES {
        let opening = async {
            let mut stream = control.open_stream(peer, protocol.clone()).await.ok()?;
            let mut answer = [0];
            stream.read_exact(&mut answer).await.ok()?;
            (answer[0] == ACKNOWLEDGED).then_some(stream)
        };
        streams.push(tokio::time::timeout(OPEN_TIMEOUT, opening).await.ok()??);
    }
    Some(streams)
}

/// Writes frames until the stream fails or the link is gone; flushes when nothing waits.
async fn write_lane(mut stream: Stream, mut queue: mpsc::Receiver<Vec<u8>>, link: Arc<Link>) {
    let mut buffer = Vec::with_capacity(64 * 1024);
    while let Some(first) = queue.recv().await {
        buffer.clear();
        let mut next = Some(first);
        while let Some(bytes) = next {
            buffer.extend((bytes.len() as u16).to_be_bytes());
            buffer.extend(&bytes);
            next = if buffer.len() < 48 * 1024 { queue.try_recv().ok() } else { None };
        }
        let begun = Instant::now();
        let written = async {
            stream.write_all(&buffer).await?;
            stream.flush().await
        };
        if written.await.is_err() {
            return;
        }
        // A write that returns at once says nothing about capacity; one that had to wait does.
        let waited = begun.elapsed();
        if waited >= BUSY_MIN {
            link.note_busy(waited / LANES as u32);
        }
    }
}

/// Accepts lanes from peers and hands their datagrams to the data plane.
pub async fn accept(mut incoming: IncomingStreams, plane: Arc<DataPlane>, stop: CancellationToken) {
    let open: Arc<Mutex<BTreeMap<PeerId, Arc<AtomicUsize>>>> = Arc::default();
    loop {
        let (peer, stream) = tokio::select! {
            () = stop.cancelled() => return,
            next = incoming.next() => match next {
                Some(next) => next,
                None => return,
            },
        };
        let Some(neighbour) = super::identity::public_key(&peer).map(|key| key.node_id()) else {
            continue;
        };
        if !plane.may_link(neighbour) {
            continue;
        }
        let count = {
            let mut open = open.lock().unwrap_or_else(PoisonError::into_inner);
            open.retain(|_, count| count.load(Ordering::Relaxed) > 0);
            open.entry(peer).or_default().clone()
        };
        if count.fetch_add(1, Ordering::Relaxed) >= INCOMING_MAX {
            count.fetch_sub(1, Ordering::Relaxed);
            plane.counters().count("too-many-lanes");
            continue;
        }
        let (plane, stop) = (plane.clone(), stop.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = read_lane(stream, neighbour, &plane) => {}
            }
            count.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

async fn read_lane(mut stream: Stream, neighbour: NodeId, plane: &DataPlane) {
    let acknowledged = async {
        stream.write_all(&[ACKNOWLEDGED]).await?;
        stream.flush().await
    };
    if acknowledged.await.is_err() {
        return;
    }
    let mut stream = futures::io::BufReader::with_capacity(64 * 1024, stream);
    loop {
        let mut length = [0; 2];
        if stream.read_exact(&mut length).await.is_err() {
            return;
        }
        let length = usize::from(u16::from_be_bytes(length));
        if length > FRAME_BYTES_MAX {
            plane.counters().count("oversized-frame");
            return;
        }
        let mut bytes = vec![0; length];
        if stream.read_exact(&mut bytes).await.is_err() {
            return;
        }
        plane.received(neighbour, bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::forward::DatagramKind;
    use crate::engine::types::{Route, TunnelId};

    #[test]
    fn a_flow_stays_on_one_lane_and_probes_use_all() {
        let lane = |kind, source: u8, sequence| {
            let header = Header {
                kind,
                congestion: false,
                reply: false,
                position: 1,
                tunnel: TunnelId(3),
                route_id: 1,
                sequence,
                route: Route::new([NodeId([source; 8]), NodeId([99; 8])]).unwrap(),
            };
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
