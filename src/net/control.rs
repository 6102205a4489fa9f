//! What a node says and hears by gossip and synchronisation, counted. What the libraries, encryption and
//! the network add is not in it, nor are Kademlia and probes.

use std::sync::atomic::{AtomicU64, Ordering};

/// Messages and bytes.
#[derive(Debug, Default)]
pub struct Told {
    messages: AtomicU64,
    bytes: AtomicU64,
}

impl Told {
    /// So many messages of so many bytes each.
    pub(super) fn count(&self, messages: usize, bytes: usize) {
        self.messages.fetch_add(messages as u64, Ordering::Relaxed);
        self.bytes.fetch_add((messages * bytes) as u64, Ordering::Relaxed);
    }

    /// Messages and bytes so far.
    pub fn so_far(&self) -> (u64, u64) {
        (self.messages.load(Ordering::Relaxed), self.bytes.load(Ordering::Relaxed))
    }
}

/// Since the node started.
#[derive(Debug, Default)]
pub struct Control {
    /// Gossip that arrived, each message once: the library drops duplicates before they are counted.
    pub gossip_heard: Told,
    /// Gossip sent, a copy for each receiver: by the number of peers when it was this node's own, by that
    /// of mesh peers when it was passed on.
    pub gossip_said: Told,
    /// Questions and answers of synchronisation that arrived.
    pub sync_heard: Told,
    /// Those sent.
    pub sync_said: Told,
}
