//! Joining: dial the configured addresses, learn of more peers, stay connected to at least three.
//!
//! Round `n` without enough peers is followed by the next one after 2^n seconds, stretched by up
//! to a tenth at random so that nodes restarted together do not dial together. After
//! `attempts_max` rounds the node gives up for now and tries once every [`RETRY`]; losing a
//! connection or hearing of a peer starts the rounds anew. A peer list from the first peer that answers supplies the rest.

use std::collections::BTreeMap;
use std::time::Duration;

use super::wire::PeerAddresses;
use crate::engine::types::{NodeId, Timestamp};

/// Peers that a node wants to be connected to, when there are so many.
pub const CONNECTIONS_MIN: usize = 3;
/// Most peers remembered as candidates for a connection; the one least recently heard of makes
/// room.
pub const KNOWN_MAX: usize = 1_024;
/// Most peers dialled in one round.
pub const DIALS_MAX: usize = 16;

/// Between two tries after the rounds were used up.
pub const RETRY: Duration = Duration::from_secs(300);

/// How to join.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootstrapPolicy {
    /// Addresses to start from, as multiaddress text.
    pub addresses: Vec<String>,
    /// Rounds before giving up.
    pub attempts_max: u32,
}

impl Default for BootstrapPolicy {
    fn default() -> Self {
        Self { addresses: Vec::new(), attempts_max: 8 }
    }
}

/// Keeps a node connected.
#[derive(Clone, Debug)]
pub struct NetworkBootstrapper {
    policy: BootstrapPolicy,
    known: BTreeMap<NodeId, (Vec<String>, Timestamp)>,
    attempt: u32,
    gave_up: bool,
    next_at: Option<Timestamp>,
}

impl NetworkBootstrapper {
    /// Starts its first round at `now`.
    pub fn new(policy: BootstrapPolicy, now: Timestamp) -> Self {
        Self { policy, known: BTreeMap::new(), attempt: 0, gave_up: false, next_at: Some(now) }
    }

    /// Heard of a peer and where it listens.
    pub fn heard_of(&mut self, peer: &PeerAddresses, now: Timestamp) {
        let node = peer.key.node_id();
        if peer.addresses.is_empty() {
            return;
        }
        if !self.known.contains_key(&node) {
            if self.known.len() >= KNOWN_MAX {
                let oldest = self.known.iter().min_by_key(|(_, (_, at))| *at);
                if let Some(oldest) = oldest.map(|(node, _)| *node) {
                    self.known.remove(&oldest);
                }
            }
            self.restart(now);
        }
        self.known.insert(node, (peer.addresses.clone(), now));
    }

    /// Peers whose addresses are known.
    pub fn known(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.known.keys().copied()
    }

    /// Where a peer listens.
    pub fn addresses(&self, node: NodeId) -> Option<&[String]> {
        self.known.get(&node).map(|(addresses, _)| addresses.as_slice())
    }

    /// Never dials this peer again.
    pub fn forget(&mut self, node: NodeId) {
        self.known.remove(&node);
    }

    /// A connection was lost: start over.
    pub fn restart(&mut self, now: Timestamp) {
        self.attempt = 0;
        self.next_at = Some(now);
    }

    /// When the next round begins.
    pub fn next_timeout(&self) -> Option<Timestamp> {
        self.next_at
    }

    /// The peers to dial now, each by all its addresses. `connected` are the peers that are there; `jitter` is drawn
    /// uniformly from 0 to 1.
    pub fn poll(
        &mut self,
        connected: impl Fn(NodeId) -> bool,
        connected_count: usize,
        jitter: f64,
        now: Timestamp,
    ) -> Vec<Vec<String>> {
        if self.next_at.is_none_or(|at| at > now) {
            return Vec::new();
        }
        self.next_at = None;
        let waiting: Vec<&Vec<String>> = self
            .known
            .iter()
            .filter(|(node, _)| !connected(**node))
            .map(|(_, (addresses, _))| addresses)
            .collect();
        let nobody_left = waiting.is_empty() && self.policy.addresses.is_empty();
        if connected_count >= CONNECTIONS_MIN || nobody_left {
            return Vec::new();
        }
        if self.attempt < self.policy.attempts_max {
            self.attempt += 1;
            let wait = Duration::from_secs(1 << self.attempt.min(16));
            self.next_at = Some(now + wait.mul_f64(1.0 + 0.1 * jitter.clamp(0.0, 1.0)));
        } else {
            self.gave_up = true;
            self.next_at = Some(now + RETRY);
        }
        // A different window of the known peers each round, so that dead ones do not fill it.
        let offset = (self.attempt as usize * CONNECTIONS_MIN) % waiting.len().max(1);
        let known = waiting.iter().cycle().skip(offset).take(waiting.len());
        let configured = self.policy.addresses.iter().map(|address| vec![address.clone()]);
        let mut dials: Vec<Vec<String>> = configured.collect();
        dials.extend(known.map(|addresses| (*addresses).clone()));
        dials.truncate(DIALS_MAX);
        dials
    }

    /// Whether every round was used up without success. Says so once.
    pub fn take_given_up(&mut self) -> bool {
        std::mem::take(&mut self.gave_up)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::types::PublicKey;

    fn bootstrapper() -> NetworkBootstrapper {
        let policy = BootstrapPolicy { addresses: vec!["/a".into()], attempts_max: 4 };
        NetworkBootstrapper::new(policy, Timestamp(0))
    }

    fn seconds(s: u64) -> Timestamp {
        Timestamp(s * 1_000_000)
    }

    fn peer(byte: u8) -> PeerAddresses {
        PeerAddresses { key: PublicKey([byte; 32]), addresses: vec![format!("/{byte}")] }
    }

    #[test]
    fn rounds_back_off_exponentially_and_end() {
        let mut bootstrapper = bootstrapper();
        let mut rounds = Vec::new();
        while !bootstrapper.take_given_up() {
            let at = bootstrapper.next_timeout().unwrap();
            rounds.push(at.as_micros() / 1_000_000);
            assert_eq!(bootstrapper.poll(|_| false, 0, 0.0, at), [["/a"]]);
        }
        assert_eq!(rounds, [0, 2, 6, 14, 30]);
        assert_eq!(bootstrapper.next_timeout(), Some(seconds(30) + RETRY), "now and then");
        bootstrapper.restart(seconds(100));
        assert_eq!(bootstrapper.poll(|_| false, 0, 0.0, seconds(100)), [["/a"]]);
        assert_eq!(bootstrapper.next_timeout(), Some(seconds(102)));
    }

    #[test]
    fn a_peer_list_supplies_the_rest_until_three_are_connected() {
        let mut bootstrapper = bootstrapper();
        bootstrapper.poll(|_| false, 0, 0.0, seconds(0));
        for byte in 1..=3 {
            bootstrapper.heard_of(&peer(byte), seconds(1));
        }
        let mut dials = bootstrapper.poll(|_| false, 1, 0.0, seconds(1));
        dials.sort();
        assert_eq!(dials, [["/1"], ["/2"], ["/3"], ["/a"]]);
        bootstrapper.restart(seconds(2));
        assert!(bootstrapper.poll(|_| true, 3, 0.0, seconds(2)).is_empty());
        assert_eq!(bootstrapper.next_timeout(), None);
    }

    #[test]
    fn the_first_node_of_a_network_has_nobody_to_dial() {
        let policy = BootstrapPolicy::default();
        let mut bootstrapper = NetworkBootstrapper::new(policy, seconds(0));
        assert!(bootstrapper.poll(|_| false, 0, 0.0, seconds(0)).is_empty());
        assert_eq!(bootstrapper.next_timeout(), None);
    }
}
