//! Gossip that defends itself: how much is heard of whom, and what a peer's gossip is worth.
//!
//! - **Who forwards** has a token bucket of messages, charged before anything is verified: this bounds
//!   what a peer can make this node compute. What is beyond is neither read nor passed on.
//! - **Whose news it is** has a bucket for advertisements of links, one for service records and one
//!   for heartbeats, charged when the signature was found right and the message is new: nobody can use up another's with
//!   forgeries or replays. Of advertisements beyond, the newest is held until there is a token again,
//!   and then taken and passed on: however quick a member changes its links, the mesh hears the last
//!   state, and at most [`LINK_STATES_PER_S`]. A record or heartbeat beyond ends here; it comes again.
//! - **A peer's score** is 0 and falls with each message that no honest node passes on
//!   ([`REJECT_COST`]) or that is beyond what it may forward ([`EXCESS_COST`]); what was is forgotten by
//!   half in each [`HALF_LIFE`]. It is gossipsub's application score: below -10 the peer gets no
//!   gossip, below -80 it is not heard. At [`SCORE_MIN`] it is disconnected, and neither dialled nor
//!   let in for [`SHUN_FOR`].
//! - **Synchronisation** is asked of a peer, and answered to it, [`SYNCS_BURST`] times and then once in
//!   ten seconds.

use std::collections::BTreeMap;
use std::time::Duration;

use super::checked::OpenedLinkState;
use crate::engine::traffic::bucket::Bucket;
use crate::engine::types::{NodeId, Timestamp};

/// Messages that a peer may forward (1/s): a mesh of a thousand nodes says 30 to 300 a second, over all
/// peers. A guess.
pub const FORWARDED_PER_S: f64 = 500.0;
/// Those that it may forward at once, as when two parts of a large mesh meet.
pub const FORWARDED_BURST: f64 = 5_000.0;
/// Advertisements of one origin that are taken (1/s): twice what it says while its links change in quality.
pub const LINK_STATES_PER_S: f64 = 2.0;
/// Those that are taken at once: a node that starts says so much while its links come up.
pub const LINK_STATES_BURST: f64 = 30.0;
/// Service records of one provider that are taken (1/s).
pub const RECORDS_PER_S: f64 = 10.0;
/// Those that are taken at once: all that a node may publish, twice.
pub const RECORDS_BURST: f64 = 512.0;
/// Heartbeats of one provider that are taken (1/s): as many as an honest one says at most.
pub const HEARTBEATS_PER_S: f64 = 1.0;
/// Those that are taken at once.
pub const HEARTBEATS_BURST: f64 = 10.0;
/// Synchronisations with one peer (1/s).
pub const SYNCS_PER_S: f64 = 0.1;
/// Those that may follow each other at once.
pub const SYNCS_BURST: f64 = 8.0;
/// Nodes whose buckets are kept; more than there can be origins.
pub const BUCKETS_MAX: usize = 16_384;
/// Origins whose newest advertisement is held; of further ones it is dropped, and comes again.
pub const HELD_MAX: usize = 256;
/// What a message costs that is malformed or forged.
pub const REJECT_COST: f64 = 4.0;
/// What a message costs that is more than a peer may forward.
pub const EXCESS_COST: f64 = 0.02;
/// In this time half of what a peer did is forgotten.
pub const HALF_LIFE: Duration = Duration::from_secs(60);
/// A peer of this score is disconnected: 25 forged messages, or 5,000 too many, within a minute.
pub const SCORE_MIN: f64 = -100.0;
/// How long it is neither dialled nor let in.
pub const SHUN_FOR: Duration = Duration::from_secs(300);
/// Peers that are judged, and those that are shunned; the first, and the one shunned longest, makes room.
pub const JUDGED_MAX: usize = 1_024;
/// A score is told when it differs so much from what was told.
const SCORE_STEP: f64 = 1.0;
/// A score this near to 0 is 0 when nothing was added to it for [`QUIET`].
const SCORE_NONE: f64 = -0.5;
/// See [`SCORE_NONE`].
const QUIET: Duration = Duration::from_secs(10);

/// An advertisement that came too soon.
#[derive(Clone, Debug)]
pub struct Held {
    /// The advertisement, verified.
    pub opened: OpenedLinkState,
    /// Hands the verdict back to the right message; `None` when it came by synchronisation.
    pub token: Option<u64>,
}

/// What is thought of a peer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Judgement {
    /// What was told.
    AsBefore,
    /// Another score: 0, or less.
    Score(f64),
    /// It is to be disconnected.
    Shun,
}

/// See the module documentation.
#[derive(Debug)]
pub struct GossipManager {
    forwarders: Buckets,
    links: Buckets,
    records: Buckets,
    heartbeats: Buckets,
    asked: Buckets,
    answered: Buckets,
    /// By origin, and when there is a token again.
    held: BTreeMap<NodeId, (Held, Timestamp)>,
    scores: BTreeMap<NodeId, Score>,
    /// Until when.
    shunned: BTreeMap<NodeId, Timestamp>,
}

impl Default for GossipManager {
    fn default() -> Self {
        Self {
            forwarders: Buckets::new(FORWARDED_PER_S, FORWARDED_BURST),
            links: Buckets::new(LINK_STATES_PER_S, LINK_STATES_BURST),
            records: Buckets::new(RECORDS_PER_S, RECORDS_BURST),
            heartbeats: Buckets::new(HEARTBEATS_PER_S, HEARTBEATS_BURST),
            asked: Buckets::new(SYNCS_PER_S, SYNCS_BURST),
            answered: Buckets::new(SYNCS_PER_S, SYNCS_BURST),
            held: BTreeMap::new(),
            scores: BTreeMap::new(),
            shunned: BTreeMap::new(),
        }
    }
}

impl GossipManager {
    /// Whether another message of this peer is read.
    pub fn hears(&mut self, from: NodeId, now: Timestamp) -> bool {
        let hears = self.forwarders.take(from, now);
        if !hears {
            self.cost(from, EXCESS_COST, now);
        }
        hears
    }

    /// Whether an origin may say something new of its links.
    pub fn may_change_links(&mut self, origin: NodeId, now: Timestamp) -> bool {
        self.links.take(origin, now)
    }

    /// Whether a provider may change one of its records.
    pub fn may_change_records(&mut self, provider: NodeId, now: Timestamp) -> bool {
        self.records.take(provider, now)
    }

    /// Whether a provider may say how its services are.
    pub fn may_beat(&mut self, provider: NodeId, now: Timestamp) -> bool {
        self.heartbeats.take(provider, now)
    }

    /// Whether a peer is asked for what it knows.
    pub fn asks(&mut self, peer: NodeId, now: Timestamp) -> bool {
        self.asked.take(peer, now)
    }

    /// Whether a peer that asks is answered.
    pub fn answers(&mut self, peer: NodeId, now: Timestamp) -> bool {
        let answers = self.answered.take(peer, now);
        if !answers {
            self.cost(peer, EXCESS_COST, now);
        }
        answers
    }

    /// What is thought of a peer that comes (back): 0, or less.
    pub fn score(&self, node: NodeId, now: Timestamp) -> f64 {
        self.scores.get(&node).map_or(0.0, |score| score.at(now))
    }

    /// Holds an advertisement that came too soon. Returns the one that is dropped for it, or itself
    /// when it is not held.
    pub fn hold(&mut self, origin: NodeId, held: Held, now: Timestamp) -> Option<Held> {
        let has_room = self.held.len() < HELD_MAX;
        match self.held.get_mut(&origin) {
            Some((known, _)) if known.opened.sequence >= held.opened.sequence => Some(held),
            Some((known, _)) => Some(std::mem::replace(known, held)),
            None if has_room => {
                self.held.insert(origin, (held, now + self.links.wait(origin)));
                None
            }
            None => Some(held),
        }
    }

    /// What was held and may be taken now.
    pub fn take_due(&mut self, now: Timestamp) -> Vec<Held> {
        let due = self.held.iter().filter(|(_, (_, at))| *at <= now);
        let due: Vec<NodeId> = due.map(|(origin, _)| *origin).collect();
        let mut taken = Vec::new();
        for origin in due {
            if self.links.take(origin, now) {
                taken.extend(self.held.remove(&origin).map(|(held, _)| held));
            } else if let Some((_, at)) = self.held.get_mut(&origin) {
                *at = now + self.links.wait(origin);
            }
        }
        taken
    }

    /// When [`GossipManager::take_due`] wants to be called next.
    pub fn next_timeout(&self) -> Option<Timestamp> {
        self.held.values().map(|(_, at)| *at).min()
    }

    /// An origin was put out: returns what was held of it.
    pub fn forget(&mut self, origin: NodeId) -> Option<Held> {
        self.held.remove(&origin).map(|(held, _)| held)
    }

    /// A peer sent what no honest node passes on.
    pub fn rejected(&mut self, from: NodeId, now: Timestamp) {
        self.cost(from, REJECT_COST, now);
    }

    /// Peers that are not simply well thought of.
    pub fn judged(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.scores.keys().copied()
    }

    /// What is to be told of a peer. Says each thing once.
    pub fn judge(&mut self, node: NodeId, now: Timestamp) -> Judgement {
        let Some(score) = self.scores.get_mut(&node) else { return Judgement::AsBefore };
        let value = score.at(now);
        if value <= SCORE_MIN {
            // What is told next is that it begins anew.
            *score = Score { value: 0.0, since: now, told: SCORE_MIN };
            if self.shunned.len() >= JUDGED_MAX
                && let Some(first) = self.shunned.iter().min_by_key(|(_, until)| **until)
            {
                let first = *first.0;
                self.shunned.remove(&first);
            }
            self.shunned.insert(node, now + SHUN_FOR);
            return Judgement::Shun;
        }
        let is_news =
            (value - score.told).abs() >= SCORE_STEP || (value == 0.0) != (score.told == 0.0);
        if value == 0.0 {
            self.scores.remove(&node);
        } else if is_news {
            score.told = value;
        }
        if is_news { Judgement::Score(value) } else { Judgement::AsBefore }
    }

    /// Whether nobody here wants to do with this node.
    pub fn is_shunned(&self, node: NodeId, now: Timestamp) -> bool {
        self.shunned.get(&node).is_some_and(|until| *until > now)
    }

    /// Forgets what makes no difference any more.
    pub fn expire(&mut self, now: Timestamp) {
        self.shunned.retain(|_, until| *until > now);
        let Self { forwarders, links, records, heartbeats, asked, answered, .. } = self;
        for buckets in [forwarders, links, records, heartbeats, asked, answered] {
            buckets.of.retain(|_, bucket| !bucket.is_full(now));
        }
    }

    fn cost(&mut self, node: NodeId, cost: f64, now: Timestamp) {
        if self.scores.len() >= JUDGED_MAX && !self.scores.contains_key(&node) {
            self.scores.pop_first();
        }
        let none = Score { value: 0.0, since: now, told: 0.0 };
        let score = self.scores.entry(node).or_insert(none);
        *score = Score { value: score.at(now) - cost, since: now, ..*score };
    }
}

#[derive(Clone, Copy, Debug)]
struct Score {
    value: f64,
    since: Timestamp,
    told: f64,
}

impl Score {
    fn at(&self, now: Timestamp) -> f64 {
        let halves = now.since(self.since).as_secs_f64() / HALF_LIFE.as_secs_f64();
        let value = self.value * 0.5_f64.powf(halves);
        if value > SCORE_NONE && now.since(self.since) >= QUIET { 0.0 } else { value }
    }
}

/// A bucket for each node; one without has a full one.
#[derive(Debug)]
struct Buckets {
    rate: f64,
    burst: f64,
    of: BTreeMap<NodeId, Bucket>,
}

impl Buckets {
    fn new(rate: f64, burst: f64) -> Self {
        Self { rate, burst, of: BTreeMap::new() }
    }

    fn take(&mut self, node: NodeId, now: Timestamp) -> bool {
        if self.of.len() >= BUCKETS_MAX && !self.of.contains_key(&node) {
            self.of.pop_first();
        }
        let full = || Bucket::with_burst(self.rate, self.burst, now);
        self.of.entry(node).or_insert_with(full).take(1, now)
    }

    /// How long until there is a token.
    fn wait(&self, node: NodeId) -> Duration {
        self.of.get(&node).map_or(Duration::ZERO, Bucket::wait)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use ed25519_dalek::SigningKey;

    use super::super::membership::Author;
    use super::super::wire::{LinkStateAdvertisement, Signed};
    use super::*;

    const NOW: Timestamp = Timestamp(1_000_000_000);
    const A: NodeId = NodeId([1; 8]);
    const B: NodeId = NodeId([2; 8]);
    const NONE: [u64; 0] = [];

    fn after(ms: u64) -> Timestamp {
        NOW + Duration::from_millis(ms)
    }

    fn held(sequence: u64) -> Held {
        let key = Author::root(SigningKey::from_bytes(&[1; 32]));
        let links = BTreeMap::new();
        let signed = Arc::new(Signed::seal(&key, &LinkStateAdvertisement { sequence, links }));
        let links = Arc::default();
        Held { opened: OpenedLinkState { signed, sequence, links }, token: Some(sequence) }
    }

    fn sequences(held: impl IntoIterator<Item = Held>) -> Vec<u64> {
        held.into_iter().map(|held| held.opened.sequence).collect()
    }

    #[test]
    fn who_forwards_much_is_heard_up_to_a_rate_and_others_as_before() {
        let mut gossip = GossipManager::default();
        let mut heard = |from, now| (0..20_000).filter(|_| gossip.hears(from, now)).count();
        assert_eq!(heard(A, NOW), FORWARDED_BURST as usize);
        assert_eq!(heard(A, after(1_000)), FORWARDED_PER_S as usize);
        assert!(gossip.hears(B, NOW));
        assert_eq!(gossip.judge(B, after(1_000)), Judgement::AsBefore);
        assert_eq!(gossip.judge(A, after(1_000)), Judgement::Shun, "35,000 were too many");
    }

    #[test]
    fn of_what_comes_too_often_the_newest_is_taken_when_there_is_room_again() {
        let mut gossip = GossipManager::default();
        while gossip.may_change_links(A, NOW) {}
        assert!(gossip.may_change_links(B, NOW), "others are not concerned");
        assert_eq!(sequences(gossip.hold(A, held(1), NOW)), NONE);
        assert_eq!(sequences(gossip.hold(A, held(3), NOW)), [1]);
        assert_eq!(sequences(gossip.hold(A, held(2), NOW)), [2], "older than what is held");
        let due = gossip.next_timeout().unwrap();
        assert_eq!(due, after((1_000.0 / LINK_STATES_PER_S) as u64));
        assert_eq!(sequences(gossip.take_due(after(1))), NONE);
        assert_eq!(sequences(gossip.take_due(due)), [3]);
        assert_eq!(gossip.next_timeout(), None);
        assert_eq!(sequences(gossip.hold(A, held(4), due)), NONE);
        assert_eq!(sequences(gossip.forget(A)), [4]);
        assert_eq!(sequences(gossip.take_due(after(60_000))), NONE);
    }

    #[test]
    fn who_forges_loses_its_score_is_shunned_and_may_come_back() {
        let mut gossip = GossipManager::default();
        assert_eq!(gossip.judge(A, NOW), Judgement::AsBefore);
        gossip.rejected(A, NOW);
        assert_eq!(gossip.judge(A, NOW), Judgement::Score(-REJECT_COST));
        assert_eq!(gossip.judge(A, after(1)), Judgement::AsBefore, "said once");
        assert_eq!(gossip.judge(A, after(60_000)), Judgement::Score(-REJECT_COST / 2.0));
        assert_eq!(gossip.judge(A, after(600_000)), Judgement::Score(0.0));
        assert_eq!(gossip.judged().count(), 0);
        let (begun, now) = (after(600_000), after(601_000));
        let times = (0..100).take_while(|_| {
            gossip.rejected(A, begun);
            gossip.judge(A, begun) != Judgement::Shun
        });
        assert_eq!(times.count(), (SCORE_MIN / -REJECT_COST) as usize - 1);
        assert!(gossip.is_shunned(A, now) && !gossip.is_shunned(B, now));
        assert_eq!(gossip.judge(A, now), Judgement::Score(0.0), "it begins anew");
        assert!(!gossip.is_shunned(A, begun + SHUN_FOR));
    }

    #[test]
    fn what_was_long_ago_is_forgotten() {
        let mut gossip = GossipManager::default();
        for byte in 0..200 {
            let node = NodeId([byte; 8]);
            gossip.hears(node, NOW);
            gossip.asks(node, NOW);
            gossip.may_change_links(node, NOW);
        }
        gossip.expire(after(1));
        assert_eq!(gossip.asked.of.len(), 200);
        gossip.expire(after(60_000));
        assert!(gossip.asked.of.is_empty() && gossip.links.of.is_empty());
    }
}
