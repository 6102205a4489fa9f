//! The sending side of one direction of a tunnel: it numbers packets, and keeps those that may still
//! be lost with the route, to send them again over the next one.
//!
//! QUIC would send them again too, but only after a time-out that doubles, and with a smaller window;
//! it drops what it gets twice. What is sent again leaves before anything new and in order, because
//! QUIC takes a packet for lost, or for a duplicate, that many later ones have overtaken.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::copies::{BUSY_PACKETS, BUSY_WITHIN};
use crate::engine::types::{Route, Timestamp};

/// How long a packet is kept: QUIC has sent it again by then.
pub const KEPT_FOR: Duration = Duration::from_secs(2);
/// Bytes kept for one direction of one tunnel: 80 ms of 50 MB/s.
pub const KEPT_BYTES_MAX: usize = 4 << 20;
/// Bytes kept for all tunnels of a node.
pub const KEPT_BYTES_TOTAL_MAX: usize = 64 << 20;
/// Bytes sent again in one go, each [`RESEND_EVERY`]: about 64 MB/s.
pub const RESEND_BYTES: usize = 64 * 1024;
/// See [`RESEND_BYTES`].
pub const RESEND_EVERY: Duration = Duration::from_millis(1);

struct Kept {
    packet: Vec<u8>,
    /// When it was handed over first.
    at: Timestamp,
    /// Route number and sequence number that it travelled with.
    sent_as: (u32, u64),
}

/// See the module documentation.
pub(super) struct Outgoing {
    route: Option<(Route, u32)>,
    sequence: u64,
    /// Sent and not known to have arrived, oldest first.
    flight: VecDeque<Kept>,
    /// To be sent, oldest first.
    waiting: VecDeque<Kept>,
    bytes: usize,
    total: Arc<AtomicUsize>,
}

impl Outgoing {
    /// Without a route; `total` counts the bytes that all tunnels keep.
    pub(super) fn new(total: Arc<AtomicUsize>) -> Self {
        let (flight, waiting) = (VecDeque::new(), VecDeque::new());
        Self { route: None, sequence: 0, flight, waiting, bytes: 0, total }
    }

    /// The route in use and its number.
    pub(super) fn route(&self) -> Option<(&Route, u32)> {
        self.route.as_ref().map(|(route, route_id)| (route, *route_id))
    }

    /// Number of the route in use; 0 without one.
    pub(super) fn route_id(&self) -> u32 {
        self.route.as_ref().map_or(0, |(_, route_id)| *route_id)
    }

    /// Takes another route, or the same under another number; sequence numbers begin anew.
    pub(super) fn move_to(&mut self, route: Route, route_id: u32) {
        if self.route_id() != route_id {
            self.sequence = 0;
        }
        self.route = Some((route, route_id));
    }

    /// The next sequence number on the route in use, 1 or more.
    pub(super) fn next_sequence(&mut self) -> u64 {
        self.sequence += 1;
        self.sequence
    }

    /// A packet to be sent after those that wait. When more than [`KEPT_BYTES_MAX`] is kept, the
    /// oldest is forgotten. Returns whether it was one that still waited, and now is lost.
    pub(super) fn push(&mut self, packet: Vec<u8>, now: Timestamp) -> bool {
        self.forget_older_than(now);
        self.count(packet.len() as isize);
        self.waiting.push_back(Kept { packet, at: now, sent_as: (0, 0) });
        let mut lost = false;
        while self.waiting.len() > 1 && self.is_over() {
            let oldest = self.flight.pop_front();
            lost |= oldest.is_none();
            let oldest = oldest.or_else(|| self.waiting.pop_front());
            self.count(-(oldest.map_or(0, |kept| kept.packet.len()) as isize));
        }
        while self.is_over()
            && let Some(oldest) = self.flight.pop_front()
        {
            self.count(-(oldest.packet.len() as isize));
        }
        lost
    }

    /// Takes the next packet to be sent: its sequence number on the route in use, and its bytes.
    pub(super) fn take(&mut self) -> Option<(u64, &[u8])> {
        let mut kept = self.waiting.pop_front()?;
        let sequence = self.next_sequence();
        kept.sent_as = (self.route_id(), sequence);
        self.flight.push_back(kept);
        self.flight.back().map(|kept| (sequence, &kept.packet[..]))
    }

    /// Packets that wait.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Whether so much is under way that nothing is copied.
    pub(super) fn is_busy(&self, now: Timestamp) -> bool {
        let before = self.flight.len().checked_sub(BUSY_PACKETS);
        let before = before.and_then(|index| self.flight.get(index));
        !self.waiting.is_empty() || before.is_some_and(|kept| now.since(kept.at) < BUSY_WITHIN)
    }

    /// When the oldest packet that is kept was handed over.
    pub(super) fn oldest(&self) -> Option<Timestamp> {
        self.flight.front().map(|kept| kept.at)
    }

    /// Everything sent over this route up to this sequence number, and over older ones, needs no
    /// keeping.
    pub(super) fn arrived(&mut self, route_id: u32, highest: u64) {
        while self.flight.front().is_some_and(|kept| kept.sent_as <= (route_id, highest)) {
            let kept = self.flight.pop_front();
            self.count(-(kept.map_or(0, |kept| kept.packet.len()) as isize));
        }
    }

    /// Whether this sequence number on the route in use is of something that may still be under way.
    pub(super) fn is_under_way(&self, sequence: u64) -> bool {
        let first = self.flight.front().map_or((self.route_id(), self.sequence), |k| k.sent_as);
        (first..=(self.route_id(), self.sequence)).contains(&(self.route_id(), sequence))
    }

    /// Everything that may be lost waits to be sent again, before what waits already.
    pub(super) fn resend(&mut self, now: Timestamp) {
        self.forget_older_than(now);
        self.flight.append(&mut self.waiting);
        std::mem::swap(&mut self.flight, &mut self.waiting);
    }

    /// Forgets what is older than [`KEPT_FOR`].
    pub(super) fn forget_older_than(&mut self, now: Timestamp) {
        while self.flight.front().is_some_and(|kept| now.since(kept.at) > KEPT_FOR) {
            let kept = self.flight.pop_front();
            self.count(-(kept.map_or(0, |kept| kept.packet.len()) as isize));
        }
    }

    fn is_over(&self) -> bool {
        self.bytes > KEPT_BYTES_MAX || self.total.load(Ordering::Relaxed) > KEPT_BYTES_TOTAL_MAX
    }

    fn count(&mut self, change: isize) {
        self.bytes = self.bytes.saturating_add_signed(change);
        let size = change.unsigned_abs();
        if change >= 0 {
            self.total.fetch_add(size, Ordering::Relaxed);
        } else {
            self.total.fetch_sub(size, Ordering::Relaxed);
        }
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        self.total.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::types::NodeId;

    fn route(relay: u8) -> Route {
        Route::new([NodeId([0; 8]), NodeId([relay; 8]), NodeId([9; 8])]).unwrap()
    }

    fn at(ms: u64) -> Timestamp {
        Timestamp(ms * 1_000)
    }

    fn outgoing() -> Outgoing {
        let mut out = Outgoing::new(Arc::default());
        out.move_to(route(1), 1);
        out
    }

    fn taken(out: &mut Outgoing) -> Vec<(u64, u8)> {
        std::iter::from_fn(|| out.take().map(|(sequence, packet)| (sequence, packet[0]))).collect()
    }

    #[test]
    fn what_may_be_lost_leaves_again_in_order_and_before_anything_new() {
        let mut out = outgoing();
        for packet in 0..6 {
            out.push(vec![packet], at(0));
            assert_eq!(taken(&mut out), [(u64::from(packet) + 1, packet)]);
        }
        out.arrived(1, 2);
        out.move_to(route(2), 5);
        out.resend(at(1));
        out.push(vec![6], at(1));
        assert_eq!(taken(&mut out), [(1, 2), (2, 3), (3, 4), (4, 5), (5, 6)]);
        assert!(out.is_under_way(1) && out.is_under_way(5));
        assert!(!out.is_under_way(0) && !out.is_under_way(6));
        out.arrived(1, 6);
        assert_eq!(out.flight.len(), 5, "what the route before brought is no news");
        out.arrived(5, 5);
        assert_eq!((out.flight.len(), out.bytes), (0, 0));
    }

    #[test]
    fn a_second_move_in_the_middle_of_sending_again_keeps_the_order() {
        let mut out = outgoing();
        for packet in 0..4 {
            out.push(vec![packet], at(0));
            out.take();
        }
        out.move_to(route(2), 2);
        out.resend(at(0));
        out.take();
        out.push(vec![4], at(0));
        out.move_to(route(3), 3);
        out.resend(at(0));
        assert_eq!(taken(&mut out), [(1, 0), (2, 1), (3, 2), (4, 3), (5, 4)]);
    }

    #[test]
    fn what_is_kept_is_bounded_in_time_and_size() {
        let total = Arc::new(AtomicUsize::new(0));
        let mut out = Outgoing::new(total.clone());
        out.move_to(route(1), 1);
        for packet in 0..5_000u64 {
            assert!(!out.push(vec![0; 4_096], at(packet / 10)));
            out.take();
        }
        assert_eq!(out.bytes, KEPT_BYTES_MAX);
        assert_eq!(total.load(Ordering::Relaxed), KEPT_BYTES_MAX);
        out.forget_older_than(at(500) + KEPT_FOR);
        assert_eq!((out.bytes, out.flight.len()), (0, 0));
        for _ in 0..KEPT_BYTES_MAX / 4_096 {
            assert!(!out.push(vec![0; 4_096], at(9_000)));
        }
        assert!(out.push(vec![0; 4_096], at(9_000)), "it still waited");
        drop(out);
        assert_eq!(total.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_node_keeps_no_more_than_all_tunnels_may() {
        let total = Arc::new(AtomicUsize::new(KEPT_BYTES_TOTAL_MAX));
        let mut out = Outgoing::new(total);
        out.move_to(route(1), 1);
        for _ in 0..3 {
            out.push(vec![0; 100], at(0));
            assert!(out.take().is_some(), "it is sent, but not kept for long");
        }
        assert_eq!(out.flight.len(), 1);
    }
}
