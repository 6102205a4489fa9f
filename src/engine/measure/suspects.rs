//! Nodes that may be gone, by what traffic to them meets, seconds before probes of their links say so.
//!
//! A tunnel's direct route that falls silent, or two of its routes one after the other, say more about
//! the far end than about relays: whatever leads over that node is avoided, while there is another way,
//! until something of it arrives or [`LASTS`] is over. Routes *to* it are not concerned: if it is gone,
//! nothing is lost by trying. A node killed under a QUIC connection leaves no trace but this silence.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::engine::types::{NodeId, Route, Timestamp};

/// Losses that follow each other within this are one silence.
pub const WITHIN: Duration = Duration::from_secs(2);
/// How long a suspicion lasts: by then probes have found out whether links are down.
pub const LASTS: Duration = Duration::from_secs(5);
/// Share that a suspect is believed to deliver as a relay: so little that any other way is better.
pub const DELIVERS: f64 = 0.05;
/// Weight of losses from which on a far end is suspected; a direct route weighs as much alone.
const SUSPECT_FROM: u32 = 2;
/// Nodes that are remembered; the one that was silent longest ago makes room.
const NODES_MAX: usize = 256;

/// See the module documentation.
#[derive(Clone, Debug, Default)]
pub struct Suspects {
    /// Weight of the losses of the newest silence, and when the last was.
    silent: BTreeMap<NodeId, (u32, Timestamp)>,
}

impl Suspects {
    /// A route of a tunnel fell silent. Returns whether its far end is suspected by that.
    pub fn silent(&mut self, route: &Route, now: Timestamp) -> bool {
        let node = route.destination();
        if self.silent.len() >= NODES_MAX && !self.silent.contains_key(&node) {
            let first = self.silent.iter().min_by_key(|(_, (_, at))| *at).map(|(node, _)| *node);
            first.map(|first| self.silent.remove(&first));
        }
        let (weight, last) = self.silent.entry(node).or_insert((0, now));
        if now.since(*last) > WITHIN {
            *weight = 0;
        }
        *weight = weight.saturating_add(if route.hop_count() == 1 { SUSPECT_FROM } else { 1 });
        *last = now;
        *weight >= SUSPECT_FROM
    }

    /// Something of a node arrived. Returns whether it was suspected.
    pub fn answered(&mut self, node: NodeId) -> bool {
        self.silent.remove(&node).is_some_and(|(weight, _)| weight >= SUSPECT_FROM)
    }

    /// The nodes that are suspected.
    pub fn suspected(&self, now: Timestamp) -> impl Iterator<Item = NodeId> + '_ {
        let suspected = self
            .silent
            .iter()
            .filter(move |(_, (weight, last))| *weight >= SUSPECT_FROM && now.since(*last) < LASTS);
        suspected.map(|(node, _)| *node)
    }

    /// Forgets what makes no difference any more.
    pub fn expire(&mut self, now: Timestamp) {
        self.silent.retain(|_, (_, last)| now.since(*last) < LASTS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(nodes: &[u8]) -> Route {
        Route::new(nodes.iter().map(|byte| NodeId([*byte; 8])).collect::<Vec<_>>()).unwrap()
    }

    fn at(ms: u64) -> Timestamp {
        Timestamp(ms * 1_000)
    }

    #[test]
    fn a_silent_direct_route_or_two_others_make_the_far_end_suspect_until_it_answers() {
        let mut suspects = Suspects::default();
        let suspected = |suspects: &Suspects, ms| suspects.suspected(at(ms)).count();
        assert!(suspects.silent(&route(&[0, 9]), at(0)));
        assert_eq!(suspects.suspected(at(1)).next(), Some(NodeId([9; 8])));
        assert!(suspects.answered(NodeId([9; 8])));
        assert_eq!(suspected(&suspects, 1), 0);
        assert!(!suspects.silent(&route(&[0, 1, 9]), at(10)), "it may be the relay");
        assert_eq!(suspected(&suspects, 10), 0);
        assert!(suspects.silent(&route(&[0, 2, 9]), at(300)));
        assert_eq!(suspected(&suspects, 5_299), 1);
        assert_eq!(suspected(&suspects, 5_300), 0, "the probes know by now");
        assert!(!suspects.silent(&route(&[0, 1, 9]), at(9_000)), "long ago");
        suspects.expire(at(20_000));
        assert!(suspects.silent.is_empty());
    }

    #[test]
    fn suspects_are_bounded() {
        let mut suspects = Suspects::default();
        for index in 0..2 * NODES_MAX as u64 {
            let mut id = [7; 8];
            id[..2].copy_from_slice(&(index as u16).to_be_bytes());
            let route = Route::new(vec![NodeId([255; 8]), NodeId(id)]).unwrap();
            suspects.silent(&route, at(index));
        }
        assert_eq!(suspects.silent.len(), NODES_MAX);
    }
}
