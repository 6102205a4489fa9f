//! What the control plane of a world sends: messages and bytes by kind.
//!
//! The world itself delivers each message of gossip once to each node. What is counted is what gossipsub
//! (as `net` configures it) would send for it: the author tells all its peers, who passes it on tells
//! its mesh peers but the one it came from, duplicates included, and names it to others three times.
//! Probes, Kademlia and what TCP, QUIC and encryption add are not in it.

use std::collections::BTreeMap;

use super::World;
use crate::engine::overlay::wire::{self, GOSSIP_BYTES_MAX, GossipMessage};

/// Mesh peers of a node (gossipsub's D, the default of `libp2p-gossipsub`).
const MESH_PEERS: usize = 6;
/// Peers beside the mesh to which each heartbeat names what came lately (D_lazy), and in how many
/// heartbeats.
const LAZY_PEERS: usize = 6;
/// See [`LAZY_PEERS`].
const LAZY_HEARTBEATS: usize = 3;
/// What gossipsub adds to a message: the topic, and lengths (bytes).
const ENVELOPE_BYTES: usize = 27 + 10;
/// Name of a message in an announcement, a SHA-256 (bytes).
const NAME_BYTES: usize = 34;

/// Messages and bytes of one kind; of announcements, the names of messages, many of which travel together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Told {
    /// Messages, a copy for each receiver.
    pub messages: u64,
    /// Bytes.
    pub bytes: u64,
}

/// What all nodes have sent together, by kind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Control(BTreeMap<&'static str, Told>);

impl Control {
    /// Each kind.
    pub fn kinds(&self) -> impl Iterator<Item = (&'static str, Told)> + '_ {
        self.0.iter().map(|(kind, told)| (*kind, *told))
    }

    /// What was sent since an earlier look.
    pub fn since(&self, before: &Self) -> Self {
        let less = |(kind, told): (&'static str, Told)| {
            let earlier = before.0.get(kind).copied().unwrap_or_default();
            let messages = told.messages - earlier.messages;
            (kind, Told { messages, bytes: told.bytes - earlier.bytes })
        };
        Self(self.kinds().map(less).collect())
    }

    fn count(&mut self, kind: &'static str, messages: usize, bytes: usize) {
        let told = self.0.entry(kind).or_default();
        told.messages += messages as u64;
        told.bytes += (messages * bytes) as u64;
    }
}

impl World {
    /// What all nodes have sent so far.
    pub fn control(&self) -> &Control {
        &self.control
    }

    pub(super) fn count_published(&mut self, from: usize, bytes: &[u8]) {
        let peers = self.nodes[from].connected.len();
        self.control.count(kind(bytes), peers, bytes.len() + ENVELOPE_BYTES);
        self.count_named(peers);
    }

    pub(super) fn count_passed_on(&mut self, node: usize, bytes: &[u8]) {
        let peers = self.nodes[node].connected.len();
        let told = peers.min(MESH_PEERS).saturating_sub(1);
        self.control.count(kind(bytes), told, bytes.len() + ENVELOPE_BYTES);
        self.count_named(peers);
    }

    pub(super) fn count_sync(&mut self, bytes: &[u8]) {
        self.control.count("sync", 1, bytes.len());
    }

    fn count_named(&mut self, peers: usize) {
        let named = peers.saturating_sub(MESH_PEERS).min(LAZY_PEERS);
        self.control.count("announcement", named * LAZY_HEARTBEATS, NAME_BYTES);
    }
}

fn kind(bytes: &[u8]) -> &'static str {
    match wire::decode(bytes, GOSSIP_BYTES_MAX) {
        Ok(GossipMessage::LinkState(_)) => "link-state",
        Ok(GossipMessage::Service(_)) => "service",
        Ok(GossipMessage::Revocation(_)) => "revocation",
        Ok(GossipMessage::Grant(_)) => "grant",
        Ok(GossipMessage::Heartbeat(_)) => "heartbeat",
        Err(_) => "noise",
    }
}
