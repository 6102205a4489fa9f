//! Connections between nodes, and which of them are links.

use std::collections::BTreeSet;

use super::{Event, World, address};
use crate::engine::event::Input;
use crate::engine::overlay::wire::PeerAddresses;
use crate::engine::types::NodeId;

impl World {
    pub(super) fn dial(&mut self, from: usize, text: &str) {
        let Some(to) = text.strip_prefix("sim/").and_then(|t| t.parse::<usize>().ok()) else {
            return;
        };
        if to >= self.nodes.len() || to == from || !self.is_running(to) {
            return;
        }
        if self.link(from, to).is_none() || self.is_parted(from, to) {
            return;
        }
        if !self.nodes[from].connected.insert(to) {
            return;
        }
        self.nodes[to].connected.insert(from);
        for (here, there) in [(from, to), (to, from)] {
            let key = self.keys[there];
            let heard = PeerAddresses { key, addresses: vec![address(there)] };
            for input in
                [Input::PeerConnected(key), Input::PeerHeardOf(heard), Input::LinkUp(key.node_id())]
            {
                self.tell(there, here, input);
            }
        }
    }

    /// A node forwards by a new snapshot: links that it gave up end at both ends, those that it takes
    /// again begin where the other end wants them too.
    pub(super) fn follow_shape(&mut self, index: usize, before: &BTreeSet<NodeId>) {
        let after = self.nodes[index].forwarding.unlinked.clone();
        for node in before.symmetric_difference(&after) {
            let there = self.by_id[node];
            if !self.is_connected(index, there) {
                continue;
            }
            for (here, other) in [(index, *node), (there, self.id(index))] {
                let given_up = after.contains(node);
                let input = if given_up { Input::LinkDown(other) } else { Input::LinkUp(other) };
                self.plan(self.now, Event::Input(here, Box::new(input)));
            }
        }
    }

    /// Whether one of the two keeps no link to the other.
    pub(super) fn is_given_up(&self, a: usize, b: usize) -> bool {
        let gives_up = |one: usize, other: usize| {
            self.nodes[one].forwarding.unlinked.contains(&self.id(other))
        };
        gives_up(a, b) || gives_up(b, a)
    }

    /// Whether a node is connected with this peer.
    pub(super) fn is_there(&self, index: usize, peer: NodeId) -> bool {
        self.by_id.get(&peer).is_some_and(|peer| self.is_connected(index, *peer))
    }
}
