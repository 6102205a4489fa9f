//! Lanes: a few long-lived libp2p streams to each neighbour that carry framed datagrams.
//!
//! Each node opens the lanes that it sends on. A frame is two bytes of length (big endian) and
//! the datagram. The receiver acknowledges a new lane with one byte, because an accepted stream
//! may still be refused by a busy peer.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::{AsyncReadExt, AsyncWriteExt, StreamExt};
use libp2p::{PeerId, Stream, StreamProtocol};
use libp2p_stream::{Control, IncomingStreams};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::link::{LANES, Link, WRITE_BYTES};
use super::plane::DataPlane;
use crate::engine::event::Input;
use crate::engine::forward::{FIXED_BYTES, PAYLOAD_BYTES_MAX};
use crate::engine::types::{MAX_ROUTE_HOPS, NodeId};

/// Longest frame (bytes): the longest header and payload.
pub const FRAME_BYTES_MAX: usize = FIXED_BYTES + 8 * (MAX_ROUTE_HOPS + 1) + PAYLOAD_BYTES_MAX;
/// Lanes that one neighbour may open to us: twice ours, for those that are being replaced.
const INCOMING_MAX: usize = 2 * LANES;
/// A write that takes as long as this had to wait for the neighbour.
const BUSY_MIN: Duration = Duration::from_millis(1);
/// How long a lane may take to open.
const OPEN_TIMEOUT: Duration = Duration::from_secs(5);
/// What is read from a busy lane at once (bytes).
const READ_BYTES: usize = 64 * 1024;
/// The same at first: most lanes carry probes only, and a node has dozens.
const READ_BYTES_FIRST: usize = 4 * 1024;
/// Longest wait between two tries to open the lanes.
const RETRY_MAX: Duration = Duration::from_secs(30);
const ACKNOWLEDGED: u8 = 1;

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
            () = plane.until_link(neighbour, false) => {
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = plane.until_link(neighbour, true) => continue,
                }
            }
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
        let link = Arc::new(Link::new(neighbour, plane.emulator()));
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
        let writers = streams.into_iter().enumerate();
        let writers =
            writers.map(|(lane, stream)| Box::pin(write_lane(stream, lane, link.clone())));
        tokio::select! {
            () = stop.cancelled() => {}
            () = plane.until_link(neighbour, false) => {}
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

/// Writes frames, as many at once as wait, until the stream fails.
async fn write_lane(mut stream: Stream, lane: usize, link: Arc<Link>) {
    let mut buffer = Vec::with_capacity(WRITE_BYTES + FRAME_BYTES_MAX);
    loop {
        buffer.clear();
        link.take(lane, &mut buffer);
        if buffer.is_empty() {
            link.ready(lane).await;
            continue;
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
                () = plane.until_link(neighbour, false) => {}
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
    let mut frames = Frames::default();
    let mut datagrams = Vec::new();
    loop {
        match stream.read(frames.space()).await {
            Ok(0) | Err(_) => return,
            Ok(read) => frames.read(read),
        }
        let fits = frames.take(&mut datagrams);
        plane.received_all(neighbour, datagrams.drain(..));
        if !fits {
            return plane.counters().count("oversized-frame");
        }
    }
}

/// What a lane brought, until it is a whole frame.
struct Frames {
    buffer: Vec<u8>,
    begin: usize,
    end: usize,
    /// What is read at once.
    room: usize,
}

impl Default for Frames {
    fn default() -> Self {
        Self { buffer: Vec::new(), begin: 0, end: 0, room: READ_BYTES_FIRST }
    }
}

impl Frames {
    /// Where to read to, behind what is left: no more than a part of a frame.
    fn space(&mut self) -> &mut [u8] {
        self.buffer.copy_within(self.begin..self.end, 0);
        (self.begin, self.end) = (0, self.end - self.begin);
        let needed = self.end + self.room;
        if self.buffer.len() < needed {
            self.buffer.resize(needed, 0);
        }
        &mut self.buffer[self.end..needed]
    }

    /// So many bytes were read; a lane that fills its room gets more.
    fn read(&mut self, bytes: usize) {
        self.end += bytes;
        if bytes >= self.room {
            self.room = (2 * self.room).min(READ_BYTES);
        }
    }

    /// Takes all whole frames. Returns false at one that is too long.
    fn take(&mut self, datagrams: &mut Vec<Vec<u8>>) -> bool {
        while let Some((length, rest)) = self.buffer[self.begin..self.end].split_first_chunk() {
            let length = usize::from(u16::from_be_bytes(*length));
            if length > FRAME_BYTES_MAX {
                return false;
            }
            let Some(datagram) = rest.get(..length) else { break };
            datagrams.push(datagram.to_vec());
            self.begin += 2 + length;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads `bytes` in pieces of this size: the datagrams, and whether all fit.
    fn read(mut bytes: &[u8], piece: usize) -> (Vec<Vec<u8>>, bool) {
        let (mut frames, mut datagrams) = (Frames::default(), Vec::new());
        while !bytes.is_empty() {
            let space = frames.space();
            assert!((READ_BYTES_FIRST..=READ_BYTES).contains(&space.len()));
            let (now, later) = bytes.split_at(piece.min(bytes.len()).min(space.len()));
            space[..now.len()].copy_from_slice(now);
            frames.read(now.len());
            bytes = later;
            if !frames.take(&mut datagrams) {
                return (datagrams, false);
            }
        }
        (datagrams, true)
    }

    #[test]
    fn frames_are_whole_whatever_the_pieces() {
        let lengths = (0..60).map(|n| n * 97 % 4_200).chain([FRAME_BYTES_MAX, 0, 1]);
        let sent: Vec<Vec<u8>> = lengths.map(|length| vec![length as u8; length]).collect();
        let mut bytes = Vec::new();
        for datagram in &sent {
            bytes.extend((datagram.len() as u16).to_be_bytes());
            bytes.extend(datagram);
        }
        for piece in [1, 2, 7, 4_096, READ_BYTES] {
            assert_eq!(read(&bytes, piece), (sent.clone(), true), "in pieces of {piece}");
        }
        bytes.extend((FRAME_BYTES_MAX as u16 + 1).to_be_bytes());
        assert_eq!(read(&bytes, READ_BYTES), (sent, false), "at once, not when it is there");
    }
}
