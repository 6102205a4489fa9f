//! Joining: dial the configured addresses and the peers of an earlier run, learn of more peers,
//! stay connected to at least three.
//!
//! All dials of a round are made together; the first peer that answers supplies its peer list and
//! the state of the mesh, and nobody waits for the rest. Round `n` without enough peers is followed
//! by the next one after [`backoff`]. After `attempts_max` rounds the node gives up for now and
//! tries once every [`RETRY`]; losing a connection that lasted or hearing of a peer starts the rounds anew.

use std::collections::BTreeMap;
use std::time::Duration;

use super::wire::{ADDRESS_BYTES_MAX, ADDRESSES_MAX, PeerAddresses};
use crate::engine::types::{NodeId, Timestamp};

/// Peers that a node wants to be connected to, when there are so many.
pub const CONNECTIONS_MIN: usize = 3;
/// Most peers remembered as candidates for a connection; the one least recently heard of makes
/// room.
pub const KNOWN_MAX: usize = 1_024;
/// Most peers dialled in one round; half of them configured addresses, when there are so many of
/// both kinds.
pub const DIALS_MAX: usize = 16;

/// Between two tries after the rounds were used up, before jitter.
pub const RETRY: Duration = Duration::from_secs(60);
/// Longest pause between two rounds, before jitter: a node that was offline for hours is back soon
/// after its network is.
pub const BACKOFF_MAX: Duration = Duration::from_secs(32);
/// A connection that lasts less did not last.
pub const BRIEF: Duration = Duration::from_secs(5);

/// A peer that was connected, as it is kept over a restart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnownPeer {
    /// Who, and where it listened.
    pub peer: PeerAddresses,
    /// When it was connected last.
    pub seen_at: Timestamp,
}

/// How to join.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootstrapPolicy {
    /// Addresses to start from, as multiaddress text.
    pub addresses: Vec<String>,
    /// Peers of an earlier run, to start from as well.
    pub known: Vec<KnownPeer>,
    /// Rounds before giving up.
    pub attempts_max: u32,
}

impl Default for BootstrapPolicy {
    fn default() -> Self {
        Self { addresses: Vec::new(), known: Vec::new(), attempts_max: 8 }
    }
}

/// Half of the pause is certain and half is drawn ("equal jitter", M. Brooker, "Exponential Backoff
/// And Jitter", AWS Architecture Blog 2015): nodes that were restarted together come apart, and no
/// node dials again at once. `jitter` is drawn uniformly from 0 to 1.
fn equal_jitter(pause: Duration, jitter: f64) -> Duration {
    pause.mul_f64(0.5 + 0.5 * jitter.clamp(0.0, 1.0))
}

/// The pause after round `n`, counted from 1: 2^n seconds, at most [`BACKOFF_MAX`], with equal
/// jitter.
pub fn backoff(n: u32, jitter: f64) -> Duration {
    equal_jitter(Duration::from_secs(1 << n.min(16)).min(BACKOFF_MAX), jitter)
}

/// Keeps a node connected.
#[derive(Clone, Debug)]
pub struct NetworkBootstrapper {
    addresses: Vec<String>,
    attempts_max: u32,
    /// Where peers listen, and when they were heard of.
    known: BTreeMap<NodeId, (Vec<String>, Timestamp)>,
    started_at: Timestamp,
    attempt: u32,
    /// Rounds since the start: each looks at another part of who is known.
    round: usize,
    gave_up: bool,
    next_at: Option<Timestamp>,
}

impl NetworkBootstrapper {
    /// Starts its first round at `now`.
    pub fn new(policy: BootstrapPolicy, now: Timestamp) -> Self {
        let BootstrapPolicy { addresses, known: mut before, attempts_max } = policy;
        before.sort_by_key(|known| std::cmp::Reverse(known.seen_at));
        before.truncate(KNOWN_MAX);
        let long_ago = Timestamp(now.as_micros().saturating_sub(1));
        let known = before.into_iter().map(|KnownPeer { mut peer, seen_at }| {
            peer.addresses.truncate(ADDRESSES_MAX);
            peer.addresses.retain(|address| address.len() <= ADDRESS_BYTES_MAX);
            (peer.key.node_id(), (peer.addresses, seen_at.min(long_ago)))
        });
        Self {
            addresses,
            attempts_max,
            known: known.filter(|(_, (addresses, _))| !addresses.is_empty()).collect(),
            started_at: now,
            attempt: 0,
            round: 0,
            gave_up: false,
            next_at: Some(now),
        }
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

    /// Peers whose addresses were heard of since the start. Those of an earlier run are dialled, but
    /// may be gone for good.
    pub fn known(&self) -> impl Iterator<Item = NodeId> + '_ {
        let fresh = self.known.iter().filter(|(_, (_, at))| *at >= self.started_at);
        fresh.map(|(node, _)| *node)
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

    /// A connection was lost that did not last: whoever is there may not want this node. Goes on where
    /// the rounds were. `jitter` is drawn uniformly from 0 to 1.
    pub fn resume(&mut self, jitter: f64, now: Timestamp) {
        let at = now + backoff(self.attempt.max(1), jitter);
        self.next_at.get_or_insert(at);
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
        let waiting = self.known.iter().filter(|(node, _)| !connected(**node));
        let mut waiting: Vec<(Timestamp, &Vec<String>)> =
            waiting.map(|(_, (addresses, at))| (*at, addresses)).collect();
        let nobody_left = waiting.is_empty() && self.addresses.is_empty();
        if connected_count >= CONNECTIONS_MIN || nobody_left {
            return Vec::new();
        }
        if self.attempt < self.attempts_max {
            self.attempt += 1;
            self.next_at = Some(now + backoff(self.attempt, jitter));
        } else {
            self.gave_up = true;
            self.next_at = Some(now + equal_jitter(RETRY, jitter));
        }
        // Who was heard of last is the likeliest to be there.
        waiting.sort_by_key(|(at, _)| std::cmp::Reverse(*at));
        let of_known = DIALS_MAX - self.addresses.len().min(DIALS_MAX / 2);
        let of_configured = DIALS_MAX - waiting.len().min(of_known);
        let configured = window(&self.addresses, of_configured, self.round);
        let mut dials: Vec<Vec<String>> = configured.map(|address| vec![address.clone()]).collect();
        let known = window(&waiting, of_known, self.round);
        dials.extend(known.map(|(_, addresses)| (*addresses).clone()));
        self.round = self.round.wrapping_add(1);
        dials
    }

    /// Whether every round was used up without success. Says so once.
    pub fn take_given_up(&mut self) -> bool {
        std::mem::take(&mut self.gave_up)
    }
}

/// At most `room` of the items, others in each round until all had their turn, so that dead ones do
/// not fill it.
fn window<T>(items: &[T], room: usize, round: usize) -> impl Iterator<Item = &T> {
    let offset = round.wrapping_mul(room) % items.len().max(1);
    items.iter().cycle().skip(offset).take(items.len().min(room))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::types::PublicKey;

    fn bootstrapper() -> NetworkBootstrapper {
        let policy = BootstrapPolicy {
            addresses: vec!["/a".into()],
            attempts_max: 4,
            ..BootstrapPolicy::default()
        };
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
            assert_eq!(bootstrapper.poll(|_| false, 0, 1.0, at), [["/a"]]);
        }
        assert_eq!(rounds, [0, 2, 6, 14, 30]);
        assert_eq!(bootstrapper.next_timeout(), Some(seconds(30) + RETRY), "now and then");
        bootstrapper.restart(seconds(100));
        assert_eq!(bootstrapper.poll(|_| false, 0, 0.0, seconds(100)), [["/a"]]);
        assert_eq!(bootstrapper.next_timeout(), Some(seconds(101)), "half of it is drawn");
    }

    #[test]
    fn who_is_disconnected_at_once_does_not_dial_again_at_once() {
        let mut bootstrapper = bootstrapper();
        let mut now = seconds(0);
        for round in 1..=4 {
            assert_eq!(bootstrapper.poll(|_| false, 0, 1.0, now), [["/a"]]);
            bootstrapper.resume(1.0, now);
            now = bootstrapper.next_timeout().unwrap();
            assert!(now >= seconds((1 << round) - 2), "round {round}");
        }
        bootstrapper.poll(|_| true, 3, 1.0, now);
        assert_eq!(bootstrapper.next_timeout(), None, "there are enough");
        bootstrapper.resume(1.0, now);
        assert!(bootstrapper.next_timeout() > Some(now + Duration::from_secs(10)));
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

    fn known(byte: u8, at: u64) -> KnownPeer {
        KnownPeer { peer: peer(byte), seen_at: seconds(at) }
    }

    #[test]
    fn peers_of_an_earlier_run_are_dialled_newest_first_and_all_have_their_turn() {
        let policy = BootstrapPolicy {
            addresses: (0..20).map(|index| format!("/dead/{index}")).collect(),
            known: (1..=40).map(|byte| known(byte, u64::from(byte))).collect(),
            ..BootstrapPolicy::default()
        };
        let mut bootstrapper = NetworkBootstrapper::new(policy, seconds(1_000));
        assert_eq!(bootstrapper.known().count(), 0, "they may be gone");
        let (mut dialled, mut at) = (std::collections::BTreeSet::new(), seconds(1_000));
        for round in 0..5 {
            let dials = bootstrapper.poll(|_| false, 0, 1.0, at);
            assert_eq!(dials.len(), DIALS_MAX);
            if round == 0 {
                let newest: Vec<String> = (33..=40).rev().map(|byte| format!("/{byte}")).collect();
                assert_eq!(dials[8..].concat(), newest);
            }
            dialled.extend(dials.concat());
            at = bootstrapper.next_timeout().unwrap();
        }
        assert_eq!(dialled.len(), 60);
    }

    #[test]
    fn who_is_heard_of_makes_those_of_an_earlier_run_leave() {
        let many = (0..KNOWN_MAX + 5).map(|index| {
            let mut key = [0; 32];
            key[..8].copy_from_slice(&(index as u64).to_le_bytes());
            let peer = PeerAddresses { key: PublicKey(key), addresses: vec!["/a".into()] };
            KnownPeer { peer, seen_at: seconds(5_000 + index as u64) }
        });
        let policy = BootstrapPolicy { known: many.collect(), ..BootstrapPolicy::default() };
        let mut bootstrapper = NetworkBootstrapper::new(policy, seconds(1_000));
        assert_eq!(bootstrapper.known.len(), KNOWN_MAX);
        bootstrapper.heard_of(&peer(9), seconds(1_000));
        assert_eq!(bootstrapper.known.len(), KNOWN_MAX);
        let node = peer(9).key.node_id();
        assert_eq!(bootstrapper.known().collect::<Vec<_>>(), [node], "whatever the clock was");
    }
}
