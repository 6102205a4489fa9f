//! The ways back: over which route this node answers each caller.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::engine::forward::Header;
use crate::engine::types::{NodeId, Route, TunnelId};

/// Callers whose way back is remembered; the one heard of longest ago makes room.
pub const REPLIES_MAX: usize = 4_096;
/// How long after the newest route was heard an older one is taken for overtaken datagrams, and
/// not for a caller that was restarted and counts from 1 again.
const OVERTAKEN_MAX: Duration = Duration::from_secs(1);

struct Reply {
    route: Route,
    route_id: u32,
    heard_at: Instant,
}

/// The way back to every caller: its newest route, reversed.
#[derive(Default)]
pub(super) struct WaysBack {
    replies: Mutex<BTreeMap<(NodeId, TunnelId), Reply>>,
}

impl WaysBack {
    /// The route to a caller and its number.
    pub(super) fn route(&self, caller: NodeId, tunnel: TunnelId) -> Option<(Route, u32)> {
        let replies = self.replies.lock().unwrap_or_else(PoisonError::into_inner);
        let reply = replies.get(&(caller, tunnel));
        reply.map(|reply| (reply.route.clone(), reply.route_id))
    }

    /// A datagram of a caller arrived at `heard_at`.
    pub(super) fn heard(&self, header: &Header, heard_at: Instant) {
        let mut replies = self.replies.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (header.route.source(), header.tunnel);
        match replies.get_mut(&key) {
            Some(reply) => {
                let older = header.route_id < reply.route_id;
                if older && heard_at.duration_since(reply.heard_at) < OVERTAKEN_MAX {
                    return;
                }
                reply.heard_at = heard_at;
                let same = reply.route.nodes().iter().eq(header.route.nodes().iter().rev());
                if !same || older {
                    reply.route = header.route.reversed();
                }
                reply.route_id = header.route_id;
            }
            None => {
                if replies.len() >= REPLIES_MAX {
                    let oldest = replies.iter().min_by_key(|(_, reply)| reply.heard_at);
                    if let Some(oldest) = oldest.map(|(key, _)| *key) {
                        replies.remove(&oldest);
                    }
                }
                let route = header.route.reversed();
                replies.insert(key, Reply { route, route_id: header.route_id, heard_at });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::forward::DatagramKind;

    fn node(byte: u8) -> NodeId {
        NodeId([byte; 8])
    }

    #[test]
    fn the_way_back_follows_the_caller_and_not_what_was_overtaken() {
        let ways = WaysBack::default();
        let start = Instant::now();
        let heard = |relay: u8, route_id, at| {
            let route = Route::new([node(0), node(relay), node(9)]).unwrap();
            let header = Header::new(DatagramKind::Data, TunnelId(1), route_id, 0, route);
            ways.heard(&header, at);
            ways.route(node(0), TunnelId(1)).unwrap().0.relays()[0]
        };
        assert_eq!(heard(1, 1, start), node(1));
        assert_eq!(heard(2, 2, start), node(2), "a newer route");
        assert_eq!(heard(1, 1, start), node(2), "an overtaken datagram");
        let later = start + 2 * OVERTAKEN_MAX;
        assert_eq!(heard(1, 1, later), node(1), "a caller that was restarted");
    }

    #[test]
    fn the_caller_heard_of_longest_ago_makes_room() {
        let ways = WaysBack::default();
        let start = Instant::now();
        let route = Route::new([node(0), node(9)]).unwrap();
        for index in 0..=REPLIES_MAX as u16 {
            let tunnel = TunnelId(index + 1);
            let header = Header::new(DatagramKind::Data, tunnel, 1, 0, route.clone());
            ways.heard(&header, start + Duration::from_micros(u64::from(index)));
        }
        assert!(ways.route(node(0), TunnelId(1)).is_none());
        assert!(ways.route(node(0), TunnelId(2)).is_some());
    }
}
