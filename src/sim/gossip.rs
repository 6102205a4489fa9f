//! Gossip under way: every message once, however many copies of it travel, and who has had it.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Event, World, ms};
use crate::engine::event::Input;

/// One message.
#[derive(Debug)]
struct Message {
    bytes: Arc<[u8]>,
    /// A bit for each node that has had it.
    seen: Vec<u64>,
    /// Copies under way.
    copies: usize,
}

impl Message {
    /// Whether a node has had it.
    fn was_at(&self, node: usize) -> bool {
        self.seen.get(node / 64).is_some_and(|word| word >> (node % 64) & 1 == 1)
    }

    /// Whether this is the first copy for a node.
    fn is_first(&mut self, node: usize) -> bool {
        let first = !self.was_at(node);
        let word = node / 64;
        self.seen.resize(self.seen.len().max(word + 1), 0);
        self.seen[word] |= 1 << (node % 64);
        first
    }
}

/// All messages under way.
#[derive(Debug, Default)]
pub(super) struct Gossip {
    messages: BTreeMap<u64, Message>,
    published: u64,
}

impl World {
    /// A node tells everybody, whatever its engine thinks of it.
    pub fn gossip(&mut self, from: usize, bytes: Vec<u8>) {
        self.gossip.published += 1;
        let number = self.gossip.published;
        let mut message = Message { bytes: bytes.into(), seen: Vec::new(), copies: 1 };
        message.is_first(from);
        self.gossip.messages.insert(number, message);
        self.spread(from, number);
        self.gossip_ended(number);
    }

    /// A node passes a message on to all its neighbours. Copies for those that have had it would be
    /// dropped there, and are left out.
    pub(super) fn spread(&mut self, from: usize, number: u64) {
        let Some(message) = self.gossip.messages.get(&number) else { return };
        let neighbours = self.nodes[from].connected.iter().copied();
        // What is sent over a connection that carries nothing is lost.
        let carries = |to: &usize| self.is_running(*to) && !self.is_parted(from, *to);
        let neighbours = neighbours.filter(|to| !message.was_at(*to)).filter(carries);
        let neighbours: Vec<usize> = neighbours.collect();
        let Some(message) = self.gossip.messages.get_mut(&number) else { return };
        message.copies += neighbours.len();
        for to in neighbours {
            let delay = self.control_delay_ms(from, to);
            self.plan(self.now + ms(delay), Event::Gossip { to, number });
        }
    }

    /// A copy reaches a node.
    pub(super) fn gossip_arrived(&mut self, to: usize, number: u64) {
        if self.nodes[to].engine.is_some()
            && let Some(message) = self.gossip.messages.get_mut(&number)
            && message.is_first(to)
        {
            let bytes = message.bytes.to_vec();
            let token = self.draw_token(super::Token::Gossip(number));
            self.input(to, Input::Gossip { token, bytes });
        }
        self.gossip_ended(number);
    }

    /// A copy is no longer under way.
    fn gossip_ended(&mut self, number: u64) {
        if let Some(message) = self.gossip.messages.get_mut(&number) {
            message.copies -= 1;
            if message.copies == 0 {
                self.gossip.messages.remove(&number);
            }
        }
    }
}
