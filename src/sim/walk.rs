//! A datagram that goes its whole way at once, for those who want to know its fate and not its time.

use rand::RngExt;

use super::World;
use crate::engine::forward::{self, DatagramKind, Header, HeaderView, decide};
use crate::engine::types::{NodeId, TunnelId};

/// What became of a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It arrived.
    Delivered,
    /// A link or a relay lost it.
    Lost,
    /// The next node was gone, or no neighbour any more.
    NoLink,
}

impl World {
    /// A relay that throws away this share (0 to 1) of the tunnels' data that it should pass on, and
    /// lets all else pass.
    pub fn set_dropper(&mut self, relay: usize, share: f64) {
        self.droppers.insert(relay, share);
    }

    /// Whether a relay throws away a packet that it should pass on.
    pub(super) fn drops(&mut self, relay: usize) -> bool {
        let share = self.droppers.get(&relay).copied().unwrap_or(0.0);
        share > 0.0 && self.random.random::<f64>() < share
    }

    /// Sends a datagram of a tunnel as the forwarding parts of the nodes would: the source route
    /// of its binding, hop by hop, each relay deciding by itself. Returns the nodes that had it, the
    /// source first, and what became of it at the last one; `None` when the tunnel has no route.
    ///
    /// # Panics
    /// When the engine bound a route that no datagram can carry.
    pub fn forward(&mut self, source: usize, tunnel: TunnelId) -> Option<(Vec<usize>, Fate)> {
        let route = self.nodes[source].forwarding.tunnels.get(&tunnel)?.route.clone()?;
        let mut header = Header::new(DatagramKind::Data, tunnel, 0, 0, route.clone());
        let mut at = vec![source];
        loop {
            let (here, next) = (at[at.len() - 1], route.nodes().get(at.len()).copied()?);
            let next = *self.by_id.get(&next)?;
            let link = self.link(here, next);
            let connected = self.nodes[here].connected.contains(&next);
            if !connected || !self.is_running(next) {
                return Some((at, Fate::NoLink));
            }
            if self.random.random::<f64>() < link.map_or(1.0, |link| link.loss) {
                return Some((at, Fate::Lost));
            }
            let bytes = header.encode(&[]);
            let view = HeaderView::parse(&bytes).expect("what was encoded parses");
            let neighbours = &self.nodes[next].connected;
            let is_neighbour =
                |id: NodeId| self.by_id.get(&id).is_some_and(|n| neighbours.contains(n));
            let verdict = decide(&view, self.id(next), self.id(here), is_neighbour);
            at.push(next);
            match verdict {
                forward::Verdict::Deliver => return Some((at, Fate::Delivered)),
                forward::Verdict::Drop(_) => return Some((at, Fate::NoLink)),
                forward::Verdict::Forward(_) => header.position += 1,
            }
            if self.drops(next) {
                return Some((at, Fate::Lost));
            }
        }
    }
}
