//! Peers come and go, tell what they know, and gossip arrives: how the engine's view of the mesh
//! is brought up to date. The rules themselves are in [`super::overlay`].

use std::time::Duration;

use rand::RngExt;

use super::event::{CLOCK, Notice, Output, Verdict};
use super::measure::{EventKind, Sample};
use super::overlay::registry::CLOCK_SKEW;
use super::overlay::wire::{
    self, GOSSIP_BYTES_MAX, GossipMessage, PeerAddresses, Signed, SyncResponse, WireError,
};
use super::overlay::{NotMember, OpenedLinkState};
use super::route::graph::{LIFETIME, Refused};
use super::types::{NodeId, PublicKey, Timestamp};
use super::{Engine, PEERS_MAX, Peer};

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
        self.peers.insert(node, Peer { key, addresses: Vec::new() });
        self.outputs.push_back(Output::RequestSync(node));
        if self.peers.len() == 1 {
            // What was published meanwhile, nobody heard.
            self.services.renew_by(now + AFTER_FIRST_PEER);
        }
        self.welcome(node, now);
        self.renew_if_due(now);
    }

    pub(super) fn peer_disconnected(&mut self, node: NodeId, now: Timestamp) {
        if self.peers.remove(&node).is_some() {
            self.link_down(node, now);
            self.farewell(node, now);
            self.bootstrapper.restart(now);
        }
    }

    pub(super) fn peer_heard_of(&mut self, peer: &PeerAddresses, now: Timestamp) {
        let node = peer.key.node_id();
        if node == self.me || self.membership.roster().is_revoked(&peer.key) {
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

    pub(super) fn sync_response(&mut self) -> Vec<u8> {
        let jitter = self.random.random();
        let peers = self.peers.values().filter(|peer| !peer.addresses.is_empty());
        let peers = peers.take(wire::SYNC_PEERS_MAX);
        let peers = peers.map(|p| PeerAddresses { key: p.key, addresses: p.addresses.clone() });
        let peers: Vec<PeerAddresses> = peers.collect();
        let links = self.advertisements.values();
        let links = links.map(|signed| GossipMessage::LinkState(Signed::clone(signed)));
        let services = self.services.signed().cloned().map(GossipMessage::Service);
        let unwell = self.services.heartbeats().cloned().map(GossipMessage::Heartbeat);
        let services = services.chain(unwell);
        let roster = self.membership.roster();
        let revocations = roster.revocations().cloned().map(GossipMessage::Revocation);
        let grants = self.services.registry().grants().cloned().map(GossipMessage::Grant);
        // What the root says comes first, up to half of the room; the rest in turn, so that neither kind starves the other; from a random place on, so that what
        // does not fit is not always the same.
        let mut messages: Vec<GossipMessage> = random_start(revocations, jitter)
            .chain(random_start(grants, jitter))
            .take(wire::SYNC_MESSAGES_MAX / 2)
            .collect();
        let of_root: usize = messages.iter().map(|message| wire::encode(message).len()).sum();
        let (mut bytes, mut links, mut services) = (
            SYNC_LENGTHS_BYTES + wire::encode(&peers).len() + of_root,
            random_start(links, jitter),
            random_start(services, jitter),
        );
        let mut turn = false;
        while messages.len() < wire::SYNC_MESSAGES_MAX {
            turn = !turn;
            let next = if turn {
                links.next().or_else(|| services.next())
            } else {
                services.next().or_else(|| links.next())
            };
            let Some(message) = next else { break };
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
            let news = (was_here && self.may_be_news(&message)).then(|| wire::encode(&message));
            if self.message(message, now) == Verdict::Accept
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

    /// Whether a message, if it is valid, may be unknown all around: links of a node that is known
    /// will be heard of again soon anyway.
    fn may_be_news(&self, message: &GossipMessage) -> bool {
        match message {
            GossipMessage::LinkState(signed) => !self.graph.is_origin(signed.key.node_id()),
            _ => true,
        }
    }

    pub(super) fn gossip_received(&mut self, bytes: &[u8], now: Timestamp) -> Verdict {
        match wire::decode(bytes, GOSSIP_BYTES_MAX) {
            Ok(message) => self.message(message, now),
            Err(error) => {
                self.dropped("gossip", error.to_string());
                Verdict::Reject
            }
        }
    }

    fn message(&mut self, message: GossipMessage, now: Timestamp) -> Verdict {
        match message {
            GossipMessage::LinkState(signed) => self.link_state_received(signed, now),
            GossipMessage::Service(signed) => {
                let (membership, graph) = (&mut self.membership, &self.graph);
                let outputs = &mut self.outputs;
                let (verdict, refused) =
                    self.services.accept(&signed, membership, graph, now, outputs);
                if let Some(error) = refused {
                    self.dropped("service-record", error.to_string());
                }
                verdict
            }
            GossipMessage::Revocation(signed) => self.revocation_received(&signed, now),
            GossipMessage::Grant(signed) => self.grant_received(&signed),
            GossipMessage::Heartbeat(signed) => self.heartbeat_received(&signed, now),
        }
    }

    /// An advertisement whose time cannot be; it may be this node's clock that is wrong.
    pub(super) fn other_clock(&mut self, origin: NodeId, by: Duration, side: &str) -> Verdict {
        let minutes = by.as_secs() / 60;
        let why = format!("{origin} is {minutes} min {side} our clock; compare the two clocks");
        self.dropped(CLOCK, why);
        Verdict::Ignore
    }

    fn link_state_received(&mut self, signed: Signed, now: Timestamp) -> Verdict {
        let origin = signed.key.node_id();
        if origin == self.me {
            return Verdict::Ignore;
        }
        match self.membership.open_link_state(signed, now) {
            Ok(OpenedLinkState { signed, sequence, links }) => {
                let said_at = Timestamp(sequence);
                if said_at + LIFETIME + CLOCK_SKEW <= now {
                    return self.other_clock(origin, now.since(said_at), "behind");
                }
                // Otherwise it could be replayed for as long.
                if said_at > now + CLOCK_SKEW {
                    return self.other_clock(origin, said_at.since(now), "ahead of");
                }
                let accepted_at = self.stamp(now);
                let changes = match self.graph.accept(origin, sequence, links, accepted_at) {
                    Ok(changes) => changes,
                    Err(Refused::Stale) => return Verdict::Ignore,
                    Err(Refused::Full) => {
                        self.dropped("link-state", "the graph is full".into());
                        return Verdict::Ignore;
                    }
                };
                self.advertisements.insert(origin, signed);
                self.links_changed(changes, accepted_at);
                Verdict::Accept
            }
            Err(error) => {
                self.dropped("link-state", error.to_string());
                verdict_on(&error)
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
