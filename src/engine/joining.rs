//! Peers come and go, tell what they know, and gossip arrives: how the engine's view of the mesh
//! is brought up to date. The rules themselves are in [`super::overlay`].

use std::collections::BTreeSet;
use std::time::Duration;

use rand::RngExt;

use super::event::{CLOCK, Notice, Output, Verdict};
use super::measure::{EventKind, Sample};
use super::overlay::bootstrap::BRIEF;
use super::overlay::gossip::{Held, Judgement};
use super::overlay::registry::CLOCK_SKEW;
use super::overlay::wire::{
    self, Fingerprint, GOSSIP_BYTES_MAX, GossipMessage, PeerAddresses, Signed, SyncRequest,
    SyncResponse, WireError,
};
use super::overlay::{NotMember, OpenedLinkState, RecordError};
use super::route::graph::{Refused, is_news};
use super::types::{NodeId, PublicKey, Timestamp};
use super::{Engine, PEERS_MAX, Peer, RESYNC};

/// How soon a node asks what it may have missed after it has dropped gossip unread; while a peer goes on
/// sending too much, it asks as often as that.
const RESYNC_SOON: Duration = Duration::from_secs(10);
/// Room for the lengths of the two lists in a synchronisation answer (bytes).
const SYNC_LENGTHS_BYTES: usize = 8;

/// A node that was alone publishes its services again so long after its first peer came: by then it
/// knows more of those who shall hold them.
const AFTER_FIRST_PEER: Duration = Duration::from_secs(1);

/// All items, beginning at a random one; `at` is drawn uniformly from 0 to 1.
pub(super) fn random_start<T>(items: impl Iterator<Item = T>, at: f64) -> impl Iterator<Item = T> {
    let mut items: Vec<T> = items.collect();
    let start = ((items.len() as f64 * at) as usize).min(items.len());
    items.rotate_left(start);
    items.into_iter()
}

impl Engine {
    pub(super) fn peer_connected(&mut self, key: PublicKey, now: Timestamp) {
        let node = key.node_id();
        match self.peers.get(&node) {
            Some(known) if known.key != key => {
                self.dropped("connection", format!("{node} is already the id of another key"));
                return;
            }
            Some(_) => return,
            None if self.peers.len() >= PEERS_MAX => {
                self.dropped("connection", format!("{PEERS_MAX} peers are connected already"));
                return;
            }
            None => {}
        }
        // The network refuses who was revoked; a revocation may have come in between.
        if self.gossip.is_shunned(node, now) || self.membership.roster().is_revoked(&key) {
            self.outputs.push_back(Output::Disconnect(node));
            return;
        }
        self.peers.insert(node, Peer { key, addresses: Vec::new(), since: now });
        // What gossipsub was told of it when it was here before may no longer hold.
        let score = self.gossip.score(node, now);
        self.outputs.push_back(Output::PeerScore(node, score));
        if self.gossip.asks(node, now) {
            let bytes = self.sync_request(now);
            self.outputs.push_back(Output::RequestSync { node, bytes });
        }
        if self.peers.len() == 1 {
            // What was published meanwhile, nobody heard.
            self.services.renew_by(now + AFTER_FIRST_PEER);
        }
        self.welcome(node, now);
        self.renew_if_due(now);
    }

    pub(super) fn peer_disconnected(&mut self, node: NodeId, now: Timestamp) {
        if let Some(peer) = self.peers.remove(&node) {
            self.link_down(node, now);
            self.farewell(node, now);
            if now.since(peer.since) < BRIEF {
                let jitter = self.random.random();
                self.bootstrapper.resume(jitter, now);
            } else {
                self.bootstrapper.restart(now);
            }
        }
    }

    pub(super) fn peer_heard_of(&mut self, peer: &PeerAddresses, now: Timestamp) {
        let node = peer.key.node_id();
        let is_revoked = self.membership.roster().is_revoked(&peer.key);
        if node == self.me || is_revoked || self.gossip.is_shunned(node, now) {
            return;
        }
        let mut peer = peer.clone();
        peer.addresses.truncate(wire::ADDRESSES_MAX);
        peer.addresses.retain(|address| address.len() <= wire::ADDRESS_BYTES_MAX);
        if let Some(connected) = self.peers.get_mut(&node) {
            connected.addresses.clone_from(&peer.addresses);
        }
        self.bootstrapper.heard_of(&peer, now);
    }

    pub(super) fn bootstrap(&mut self, now: Timestamp) {
        let jitter = self.random.random();
        let connected = |node| self.peers.contains_key(&node);
        let dials = self.bootstrapper.poll(connected, self.peers.len(), jitter, now);
        if self.bootstrapper.take_given_up() && self.peers.is_empty() {
            let done_at = self.stamp(now);
            self.record(Sample::Event {
                kind: EventKind::Join,
                subject: "bootstrap".into(),
                started_at: self.started_at,
                done_at,
                succeeded: false,
            });
            self.notice(Notice::BootstrapGaveUp);
        }
        self.outputs.extend(dials.into_iter().map(Output::Dial));
    }

    /// Asks one of the peers for what this node may have missed; not who made it miss that, if there are others.
    pub(super) fn resync(&mut self, now: Timestamp) {
        self.resync_at = now + RESYNC.mul_f64(0.5 + self.random.random::<f64>());
        let flooders = std::mem::take(&mut self.flooders);
        let is_calm = |node: &NodeId| !flooders.contains(node);
        let mut peers: Vec<NodeId> = self.peers.keys().copied().collect();
        if peers.iter().any(is_calm) {
            peers.retain(is_calm);
        }
        let at = (peers.len() as f64 * self.random.random::<f64>()) as usize;
        if let Some(node) = peers.get(at).copied()
            && self.gossip.asks(node, now)
        {
            let bytes = self.sync_request(now);
            self.outputs.push_back(Output::RequestSync { node, bytes });
        }
    }

    /// What this node says that it has.
    fn sync_request(&mut self, now: Timestamp) -> Vec<u8> {
        let start = self.random.random();
        let roster = self.membership.roster();
        let links = self.advertisements.values().map(|signed| signed.fingerprint());
        let others = self.services.signed().chain(self.services.registry().grants());
        let others = others.chain(self.services.heartbeats(now));
        let others = others.chain(roster.revocations()).map(Signed::fingerprint);
        let have = random_start(links.chain(others), start).take(wire::SYNC_HAVE_MAX).collect();
        wire::encode(&SyncRequest { have })
    }

    pub(super) fn sync_requested(
        &mut self,
        token: u64,
        from: NodeId,
        bytes: &[u8],
        now: Timestamp,
    ) {
        let asked = match self.gossip.answers(from, now) {
            true => SyncRequest::from_bytes(bytes).map_err(|error| error.to_string()),
            false => Err("it asks too often".into()),
        };
        match asked {
            Ok(SyncRequest { have }) => {
                let bytes = self.sync_response(&have.into_iter().collect(), now);
                self.outputs.push_back(Output::SyncResponse { token, bytes });
            }
            Err(why) => {
                self.dropped("sync-request", format!("from {from}: {why}"));
                self.outputs.push_back(Output::SyncRefused { token });
            }
        }
    }

    fn sync_response(&mut self, have: &BTreeSet<Fingerprint>, now: Timestamp) -> Vec<u8> {
        let jitter = self.random.random();
        let peers = self.peers.values().filter(|peer| !peer.addresses.is_empty());
        let peers = peers.take(wire::SYNC_PEERS_MAX);
        let peers = peers.map(|p| PeerAddresses { key: p.key, addresses: p.addresses.clone() });
        let peers: Vec<PeerAddresses> = peers.collect();
        let lacks = |signed: &&Signed| !have.contains(&signed.fingerprint());
        // Nobody would take those that are too old.
        let links = self.advertisements.iter().filter(|(origin, _)| {
            self.graph.sequence(**origin).is_some_and(|said_at| is_news(Timestamp(said_at), now))
        });
        let links = links.map(|(_, signed)| &**signed).filter(lacks);
        let links = links.cloned().map(GossipMessage::LinkState);
        let services = self.services.signed().filter(lacks).cloned().map(GossipMessage::Service);
        let revocations = self.membership.roster().revocations().filter(lacks);
        let revocations = revocations.cloned().map(GossipMessage::Revocation);
        let grants = self.services.registry().grants().filter(lacks);
        let grants = grants.cloned().map(GossipMessage::Grant);
        let heartbeats = self.services.heartbeats(now).filter(lacks);
        let heartbeats = heartbeats.cloned().map(GossipMessage::Heartbeat);
        // What the root says comes first, up to half of the room; then links and records in turn, so that neither
        // kind starves the other; then heartbeats, which come again within a minute. From a random place on,
        // so that what does not fit is not always the same.
        let mut messages: Vec<GossipMessage> = random_start(revocations, jitter)
            .chain(random_start(grants, jitter))
            .take(wire::SYNC_MESSAGES_MAX / 2)
            .collect();
        let of_root: usize = messages.iter().map(|message| wire::encode(message).len()).sum();
        let mut bytes = SYNC_LENGTHS_BYTES + wire::encode(&peers).len() + of_root;
        let (mut links, mut services, mut heartbeats) = (
            random_start(links, jitter),
            random_start(services, jitter),
            random_start(heartbeats, jitter),
        );
        let mut turn = false;
        while messages.len() < wire::SYNC_MESSAGES_MAX {
            turn = !turn;
            let next = if turn {
                links.next().or_else(|| services.next())
            } else {
                services.next().or_else(|| links.next())
            };
            let Some(message) = next.or_else(|| heartbeats.next()) else { break };
            bytes += wire::encode(&message).len();
            if bytes > wire::SYNC_BYTES_MAX {
                break;
            }
            messages.push(message);
        }
        wire::encode(&SyncResponse { peers, messages })
    }

    pub(super) fn sync_received(&mut self, from: NodeId, bytes: &[u8], now: Timestamp) {
        let response = match SyncResponse::from_bytes(bytes) {
            Ok(response) => response,
            Err(error) => return self.dropped("sync", format!("from {from}: {error}")),
        };
        for peer in &response.peers {
            self.peer_heard_of(peer, now);
        }
        // Who was here before passes on what nobody around may know, as when two parts of a mesh
        // meet; a newcomer only catches up.
        let was_here = self.joined_at.is_some();
        for message in response.messages {
            let news = was_here.then(|| wire::encode(&message));
            if self.message(message, None, now) == Some(Verdict::Accept)
                && let Some(bytes) = news
            {
                self.outputs.push_back(Output::Publish(bytes));
            }
        }
        if self.joined_at.is_none() {
            let done_at = self.stamp(now);
            self.joined_at = Some(done_at);
            self.record(Sample::Event {
                kind: EventKind::Join,
                subject: from.to_string(),
                started_at: self.started_at,
                done_at,
                succeeded: true,
            });
            self.notice(Notice::Joined);
        }
    }

    pub(super) fn gossip_received(
        &mut self,
        token: u64,
        from: NodeId,
        bytes: &[u8],
        now: Timestamp,
    ) {
        let verdict = if !self.gossip.hears(from, now) {
            self.dropped("gossip-too-much", format!("{from} sends more than a peer may"));
            self.resync_at = self.resync_at.min(now + RESYNC_SOON);
            self.flooders.insert(from);
            Some(Verdict::Ignore)
        } else {
            match wire::decode(bytes, GOSSIP_BYTES_MAX) {
                Ok(message) => self.message(message, Some(token), now),
                Err(error) => {
                    self.dropped("gossip", error.to_string());
                    Some(Verdict::Reject)
                }
            }
        };
        if verdict == Some(Verdict::Reject) {
            self.gossip.rejected(from, now);
        }
        if let Some(verdict) = verdict {
            self.outputs.push_back(Output::GossipVerdict { token, verdict });
        }
        self.judge(from, now);
    }

    /// Takes what may be taken by now of what origins said too soon.
    pub(super) fn release_held(&mut self, now: Timestamp) {
        for Held { opened, token } in self.gossip.take_due(now) {
            let verdict = self.take_link_state(opened, now);
            if let Some(token) = token {
                self.outputs.push_back(Output::GossipVerdict { token, verdict });
            }
        }
    }

    /// Says what is thought of a peer when that has changed, and parts with it when it is too little.
    fn judge(&mut self, node: NodeId, now: Timestamp) {
        match self.gossip.judge(node, now) {
            Judgement::AsBefore => {}
            Judgement::Score(score) => self.outputs.push_back(Output::PeerScore(node, score)),
            Judgement::Shun => {
                self.dropped("peer-shunned", format!("{node} sent too much that is wrong"));
                self.bootstrapper.forget(node);
                if self.peers.contains_key(&node) {
                    self.outputs.push_back(Output::Disconnect(node));
                    self.peer_disconnected(node, now);
                }
            }
        }
    }

    pub(super) fn judge_all(&mut self, now: Timestamp) {
        self.gossip.expire(now);
        let judged: Vec<NodeId> = self.gossip.judged().collect();
        judged.into_iter().for_each(|node| self.judge(node, now));
    }

    /// `None` when the verdict has to wait: it is said with this token.
    fn message(
        &mut self,
        message: GossipMessage,
        token: Option<u64>,
        now: Timestamp,
    ) -> Option<Verdict> {
        Some(match message {
            GossipMessage::LinkState(signed) => {
                return self.link_state_received(signed, token, now);
            }
            GossipMessage::Service(signed) => {
                let (membership, graph) = (&mut self.membership, &self.graph);
                let outputs = &mut self.outputs;
                let (gossip, origin) = (&mut self.gossip, signed.key.node_id());
                let may = || gossip.may_change_records(origin, now);
                let accepted = self.services.accept(&signed, membership, graph, may, now, outputs);
                if let Some(error) = accepted.1 {
                    let too_often = matches!(error, RecordError::TooOften(_));
                    let what =
                        if too_often { "service-record-too-often" } else { "service-record" };
                    self.dropped(what, error.to_string());
                }
                accepted.0
            }
            GossipMessage::Revocation(signed) => self.revocation_received(&signed, now),
            GossipMessage::Grant(signed) => self.grant_received(&signed, now),
            GossipMessage::Heartbeat(signed) => self.heartbeat_received(&signed, now),
        })
    }

    /// An advertisement whose time cannot be; it may be this node's clock that is wrong.
    pub(super) fn other_clock(&mut self, origin: NodeId, by: Duration, side: &str) -> Verdict {
        let minutes = by.as_secs() / 60;
        let why = format!("{origin} is {minutes} min {side} our clock; compare the two clocks");
        self.dropped(CLOCK, why);
        Verdict::Ignore
    }

    fn link_state_received(
        &mut self,
        signed: Signed,
        token: Option<u64>,
        now: Timestamp,
    ) -> Option<Verdict> {
        let origin = signed.key.node_id();
        let opened = match self.membership.open_link_state(signed, now) {
            Ok(opened) if origin == self.me => {
                self.said_before(opened.sequence, now);
                return Some(Verdict::Ignore);
            }
            Ok(opened) => opened,
            Err(error) => {
                self.dropped("link-state", error.to_string());
                return Some(verdict_on(&error));
            }
        };
        let said_at = Timestamp(opened.sequence);
        if !is_news(said_at, now) {
            return Some(self.other_clock(origin, now.since(said_at), "behind"));
        }
        // Otherwise it could be replayed for as long.
        if said_at > now + CLOCK_SKEW {
            return Some(self.other_clock(origin, said_at.since(now), "ahead of"));
        }
        if self.graph.sequence(origin).is_some_and(|known| known >= opened.sequence) {
            return Some(Verdict::Ignore);
        }
        if self.gossip.may_change_links(origin, now) {
            return Some(self.take_link_state(opened, now));
        }
        let left = self.gossip.hold(origin, Held { opened, token }, now)?;
        self.dropped("link-state-too-often", format!("{origin} advertises its links too often"));
        match left.token {
            left if left == token => Some(Verdict::Ignore),
            left => {
                let verdict = Verdict::Ignore;
                let ignored = left.map(|token| Output::GossipVerdict { token, verdict });
                self.outputs.extend(ignored);
                None
            }
        }
    }

    /// Whether this node may say something newer than what it said itself and what came back. Of a time far
    /// ahead others would not take the next one either; and it could be an old one that was replayed.
    pub(super) fn may_outdo(&mut self, sequence: u64, now: Timestamp) -> bool {
        let may = Timestamp(sequence) <= now + CLOCK_SKEW;
        if !may {
            let minutes = Timestamp(sequence).since(now).as_secs() / 60;
            let why = format!(
                "this node said something by a clock that was {minutes} min ahead of what it shows now: it was set back, and until it is there again others may not hear this node"
            );
            self.dropped(CLOCK, why);
        }
        may
    }

    /// An advertisement of this node itself came back. One that is newer than what it has said since it
    /// started was made before its clock was set back: until it says something newer still, nobody hears it.
    fn said_before(&mut self, sequence: u64, now: Timestamp) {
        if self.may_outdo(sequence, now) && self.advertiser.outdone(sequence) {
            let links = self.links.up().collect();
            self.advertise_at.1 = self.advertiser.due_at(&links, now);
        }
    }

    fn take_link_state(&mut self, opened: OpenedLinkState, now: Timestamp) -> Verdict {
        let OpenedLinkState { signed, sequence, links } = opened;
        let (origin, accepted_at) = (signed.key.node_id(), self.stamp(now));
        match self.graph.accept(origin, sequence, links, accepted_at) {
            Ok(changes) => {
                self.advertisements.insert(origin, signed);
                self.links_changed(changes, accepted_at);
                Verdict::Accept
            }
            Err(Refused::Stale) => Verdict::Ignore,
            Err(Refused::Full) => {
                self.dropped("link-state", "the graph is full".into());
                Verdict::Ignore
            }
        }
    }
}

/// Whose time is over, or who was put out, may be believed still by whoever passed it on.
pub(super) fn verdict_on(error: &WireError) -> Verdict {
    match error {
        WireError::NotMember(NotMember::Expired | NotMember::NotYet | NotMember::Revoked) => {
            Verdict::Ignore
        }
        _ => Verdict::Reject,
    }
}

#[cfg(test)]
mod tests;
