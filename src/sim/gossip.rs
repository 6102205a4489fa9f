//! Gossip under way: every message once, however many copies of it travel, and who has had it.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Event, Token, World, ms};
use crate::engine::event::{Input, Verdict};

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
    /// How many messages of others each node passed on.
    passed_on: BTreeMap<usize, u64>,
}

impl World {
    /// A node tells everybody, whatever its engine thinks of it.
    pub fn gossip(&mut self, from: usize, bytes: Vec<u8>) {
        self.gossip.published += 1;
        let number = self.gossip.published;
        self.count_published(from, &bytes);
        let mut message = Message { bytes: bytes.into(), seen: Vec::new(), copies: 1 };
        message.is_first(from);
        self.gossip.messages.insert(number, message);
        self.spread(from, number);
        self.gossip_ended(number);
    }

    /// How many messages of others a node has passed on.
    pub fn passed_on(&self, node: usize) -> u64 {
        self.gossip.passed_on.get(&node).copied().unwrap_or_default()
    }

    /// A node's engine has said what becomes of a message.
    pub(super) fn judged(&mut self, node: usize, number: u64, verdict: Verdict) {
        if verdict == Verdict::Accept
            && let Some(message) = self.gossip.messages.get(&number)
        {
            let bytes = message.bytes.clone();
            self.count_passed_on(node, &bytes);
            *self.gossip.passed_on.entry(node).or_default() += 1;
            self.spread(node, number);
        }
        self.gossip_ended(number);
    }

    /// A node passes a message on to all its neighbours. Copies for those that have had it would be
    /// dropped there, and are left out.
    fn spread(&mut self, from: usize, number: u64) {
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
            self.plan(self.now + ms(delay), Event::Gossip { from, to, number });
        }
    }

    /// A copy reaches a node. It is under way until the node has said what becomes of it.
    pub(super) fn gossip_arrived(&mut self, from: usize, to: usize, number: u64) {
        if self.nodes[to].engine.is_some()
            && let Some(message) = self.gossip.messages.get_mut(&number)
            && message.is_first(to)
        {
            let bytes = message.bytes.to_vec();
            let token = self.draw_token(Token::Gossip { number, at: to });
            let from = self.id(from);
            self.input(to, Input::Gossip { token, from, bytes });
        } else {
            self.gossip_ended(number);
        }
    }

    /// A node stops: what it has not judged ends there.
    pub(super) fn gossip_stops(&mut self, node: usize) {
        let unjudged = self.tokens.iter().filter_map(|(token, what)| match what {
            Token::Gossip { number, at } if *at == node => Some((*token, *number)),
            _ => None,
        });
        for (token, number) in unjudged.collect::<Vec<_>>() {
            self.tokens.remove(&token);
            self.gossip_ended(number);
        }
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
