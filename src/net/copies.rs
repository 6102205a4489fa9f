//! Copies of packets over a second route, for tunnels that want reliability above all, and for every
//! tunnel while it opens.
//!
//! A packet of at most [`COPIED_BYTES_MAX`] leaves over the route in use and over the backup too;
//! QUIC drops what it gets twice. Copies are marked as such and have sequence numbers of their own:
//! receipts still say what the route in use delivered, and the way back does not move. The provider
//! copies its small packets in turn, over the way that the newest proved copy took.
//!
//! A route is watched by datagrams that prove themselves, and before the two ends have a key there are
//! none: whether the first route of a new tunnel delivers is not known before its handshake is done. If a
//! relay of it has just died, QUIC would send the handshake again over the same route, after ever longer
//! pauses. So the caller's handshakes are copied whatever their size, and its small packets up to the first receipt;
//! the provider copies its small packets until `OPENS_FOR` after. Where copies go on to come, the caller always wants
//! them, and the provider copies for half a minute after each.
//!
//! Nothing is copied while much is under way, because it is no message then, and because QUIC knows
//! duplicates of the newest 128 packets only: it would drop what a quicker copy has overtaken by more.

use std::time::Duration;

use super::flows::{End, Flow, is_handshake};
use crate::engine::forward::{Arrivals, Binding, DatagramKind, Header};
use crate::engine::types::{NodeId, Route, Timestamp};

/// Largest packet that is copied (bytes): a message or an acknowledgement, not a part of a transfer,
/// whose packets are as large as they may be.
pub const COPIED_BYTES_MAX: usize = 1_200;
/// With so many packets under way that left within [`BUSY_WITHIN`], nothing is copied: half of what
/// QUIC knows duplicates of.
pub const BUSY_PACKETS: usize = 64;
/// See [`BUSY_PACKETS`]. A backup that is quicker by more than this would be the route in use.
pub const BUSY_WITHIN: Duration = Duration::from_millis(100);
/// How long after the newest copy of the caller the provider copies too: longer than the caller of
/// an idle tunnel lets pass without a packet.
const HEARD_FOR: Duration = Duration::from_secs(30);

/// How long after its first receipt the provider takes a copy for one of the opening, which the caller sends until
/// it has a receipt; and how long after such a copy it copies itself. A guess: more than the slowest round trip.
const OPENS_FOR: Duration = Duration::from_secs(2);

/// The second route of one tunnel.
struct Way {
    route: Route,
    route_id: u32,
    until: Timestamp,
}

/// What one end of a tunnel copies and has received as copies.
#[derive(Default)]
pub(super) struct Copies {
    way: Option<Way>,
    /// The tunnel of this node wants them all the time.
    always: bool,
    /// When the end that provides sent its first receipt.
    answered_at: Option<Timestamp>,
    sequence: u64,
    /// Copies that proved themselves; the route's own datagrams have the same numbers.
    pub(super) arrivals: Arrivals,
}

impl Copies {
    /// The end that opened the tunnel copies over the backup of the snapshot from now on, if it has one.
    pub(super) fn follow(&mut self, binding: &Binding) {
        self.always = binding.copies;
        let backup = binding.backup.as_ref();
        let in_use = self.way.as_ref().map(|way| way.route_id);
        if in_use != backup.map(|backup| backup.route_id) {
            self.way = backup.map(|backup| Way {
                route: backup.route.clone(),
                route_id: backup.route_id,
                until: Timestamp(u64::MAX),
            });
        }
    }

    /// The end that provides sends a receipt.
    pub(super) fn answered(&mut self, now: Timestamp) {
        self.answered_at.get_or_insert(now);
    }

    /// The end that provides has received a copy that proved itself.
    pub(super) fn heard(&mut self, header: &Header, now: Timestamp) {
        let opens = self.answered_at.is_none_or(|at| now.since(at) <= OPENS_FOR);
        let until = now + if opens { OPENS_FOR } else { HEARD_FOR };
        match &mut self.way {
            Some(way) if way.route_id == header.route_id => way.until = until,
            Some(way) if way.route_id > header.route_id && now <= way.until => {}
            way => {
                let (route, route_id) = (header.route.reversed(), header.route_id);
                *way = Some(Way { route, route_id, until });
            }
        }
    }
}

impl Flow {
    /// A copy of a packet that has just left, and the neighbour that it goes to; `None` when it is
    /// not to be copied.
    pub(super) fn copy_of(&mut self, packet: &[u8], now: Timestamp) -> Option<(NodeId, Vec<u8>)> {
        let opens = match &self.end {
            End::Own(own) => own.opens(),
            End::Their(_) => false,
        };
        let is_wanted = match &self.end {
            End::Own(_) => opens || self.copies.always,
            // Who provides has a way for copies only where copies came.
            End::Their(_) => true,
        };
        let is_right = match is_handshake(packet) {
            true => opens,
            false => packet.len() <= COPIED_BYTES_MAX && (opens || self.key().is_some()),
        };
        if !is_wanted || !is_right || self.out.is_busy(now) {
            return None;
        }
        let key = self.key().cloned();
        // A backup that has been taken into use has the number of the route in use.
        let in_use = self.out.route_id();
        let way =
            self.copies.way.as_ref().filter(|way| way.route_id > in_use && now <= way.until)?;
        self.copies.sequence += 1;
        let (sequence, route) = (self.copies.sequence, way.route.clone());
        let tunnel = self.far_end.tunnel;
        let header = Header::new(DatagramKind::Data, tunnel, way.route_id, sequence, route);
        let mut header = Header { reply: !self.far_end.ours, copy: true, ..header };
        if let Some(key) = &key {
            header.seal(key, packet);
        }
        Some((header.route.nodes()[1], header.encode(packet)))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::engine::forward::RouteKey;
    use crate::engine::types::TunnelId;
    use crate::net::flows::{Flows, hold};
    use crate::net::plane::FarEnd;

    #[test]
    fn who_provides_goes_on_with_copies_where_the_caller_does() {
        let (key, tunnel) = (RouteKey::new(&[7; 32]), TunnelId(1));
        let caller = FarEnd { node: NodeId([0; 8]), tunnel, ours: false };
        let flows = Flows::default();
        flows.set_key(caller, key.clone(), &Arc::default());
        let flow = flows.of(caller).unwrap();
        let mut flow = hold(&flow);
        let at = |ms: u64| Timestamp(ms * 1_000);
        let mut sequence = 0;
        let mut came = |flow: &mut Flow, copy: bool, at_ms| {
            sequence += 1;
            let number = if copy { 2 } else { 1 };
            let route = Route::new([0, number, 9].map(|byte| NodeId([byte; 8]))).unwrap();
            let header =
                Header::new(DatagramKind::Data, tunnel, u32::from(number), sequence, route);
            let mut header = Header { copy, receipt: !copy, ..header };
            header.seal(&key, b"");
            let proof = flow.judge(&header, b"");
            flow.came_over(&header, proof, false, at(at_ms));
        };
        let copies = |flow: &mut Flow, at_ms| flow.copy_of(&[0; 100], at(at_ms)).is_some();
        // The tunnel opens: the newest copy left before the caller had its first receipt.
        came(&mut flow, false, 0);
        came(&mut flow, true, 100);
        assert!(copies(&mut flow, 2_000) && !copies(&mut flow, 2_200), "it is open");
        // Copies that come later are those of a caller that always wants them.
        came(&mut flow, true, 5_000);
        assert!(copies(&mut flow, 5_000) && copies(&mut flow, 35_000));
        assert!(!copies(&mut flow, 35_100), "it has another backup, or none");
    }
}
