//! Peers: who is admitted, who has said where it listens, and who is put out again.

use libp2p::swarm::ConnectionId;
use libp2p::{Multiaddr, PeerId, identify, request_response};
use tokio_util::sync::CancellationToken;

use super::Task;
use super::ways::RELAYS_MAX;
use crate::engine::event::Input;
use crate::engine::overlay::wire::{self, ADDRESSES_MAX, JoinResponse, PeerAddresses};
use crate::engine::overlay::{Credential, NotLetIn};
use crate::engine::types::{NodeId, PublicKey};
use crate::net::address::{is_relayed, is_usable};
use crate::net::admission::{self, exchange::Failure};
use crate::net::{identity, lanes, now};

/// Requests to join that may wait for the engine; the oldest makes room.
const JOINS_MAX: usize = 64;

/// A peer that belongs to the network.
pub(super) struct Peer {
    key: PublicKey,
    /// What it showed last.
    credential: Credential,
    /// Ends the link, which there is while a direct connection is.
    link: Option<CancellationToken>,
    /// Addresses that Kademlia knows.
    located: Vec<Multiaddr>,
    pub(super) sync_failures: u32,
}

impl Peer {
    /// Its key.
    pub(super) fn key(&self) -> PublicKey {
        self.key
    }

    /// Whether it says so.
    pub(super) fn is_reached_over_others(&self) -> bool {
        self.located.iter().any(is_relayed)
    }
}

impl Task {
    pub(super) fn admission_event(&mut self, event: admission::Event) -> Vec<Input> {
        match event {
            admission::Event::Admitted { connection, peer, key, credential } => {
                let inputs = self.admitted(peer, key, credential);
                self.way_admitted(peer, connection);
                inputs
            }
            admission::Event::Crowded { peer, why } => {
                self.plane.counters().count(why.as_str());
                tracing::debug!(%peer, "not admitted: {why}");
                Vec::new()
            }
            admission::Event::Failed { peer, why } => {
                let times = self.plane.counters().count_nth(why.as_str());
                if matches!(why, Failure::Refused(_)) && times.is_power_of_two() {
                    tracing::warn!(%peer, times, "not admitted: {why}");
                } else {
                    tracing::debug!(%peer, "not admitted: {why}");
                }
                match why {
                    Failure::Foreign => {
                        self.foreign(&peer);
                        Vec::new()
                    }
                    Failure::Revoked(signed) => vec![Input::RevocationShown(signed)],
                    _ => Vec::new(),
                }
            }
        }
    }

    fn admitted(&mut self, peer: PeerId, key: PublicKey, credential: Credential) -> Vec<Input> {
        // It may have been revoked since it was judged.
        if self.members.load().check(&key, &credential, now()).is_err() {
            let _ = self.swarm.disconnect_peer_id(peer);
            return Vec::new();
        }
        if let Some(known) = self.peers.get_mut(&peer) {
            if credential.expires_at > known.credential.expires_at {
                known.credential = credential;
            }
            return Vec::new();
        }
        let known = Peer { key, credential, link: None, located: Vec::new(), sync_failures: 0 };
        self.peers.insert(peer, known);
        self.by_node.insert(key.node_id(), peer);
        let mut inputs = vec![Input::PeerConnected(key)];
        let addresses = self.heard_early.remove(&peer);
        inputs.extend(addresses.and_then(|addresses| self.listens(peer, addresses)));
        inputs
    }

    /// Keeps a link to a peer that is connected directly.
    pub(super) fn link(&mut self, peer: PeerId) {
        let Some(known) = self.peers.get_mut(&peer).filter(|known| known.link.is_none()) else {
            return;
        };
        let (node, link) = (known.key.node_id(), self.stop.child_token());
        known.link = Some(link.clone());
        if self.plane.may_link(node) {
            tokio::spawn(lanes::maintain(
                self.swarm.behaviour().inside.stream.new_control(),
                self.protocols.link.clone(),
                peer,
                node,
                self.plane.clone(),
                self.events.clone(),
                link,
            ));
        }
    }

    /// Ends the link to a peer.
    pub(super) fn unlink(&mut self, peer: &PeerId) {
        if let Some(link) = self.peers.get_mut(peer).and_then(|known| known.link.take()) {
            link.cancel();
        }
    }

    /// A peer said where it listens.
    pub(super) fn identified(&mut self, peer: PeerId, info: &identify::Info) -> Vec<Input> {
        let usable = info.listen_addrs.iter().filter(|address| is_usable(address));
        // Those over relays come last; without them, some peers cannot be reached at all.
        let (relayed, direct): (Vec<_>, Vec<_>) = usable.cloned().partition(is_relayed);
        let direct = direct.into_iter().take(ADDRESSES_MAX - RELAYS_MAX.min(relayed.len()));
        let addresses: Vec<Multiaddr> =
            direct.chain(relayed.into_iter().take(RELAYS_MAX)).collect();
        if self.peers.contains_key(&peer) {
            return self.listens(peer, addresses).into_iter().collect();
        }
        // As many as there are connections.
        if self.swarm.is_connected(&peer) {
            self.heard_early.insert(peer, addresses);
        }
        Vec::new()
    }

    fn listens(&mut self, peer: PeerId, addresses: Vec<Multiaddr>) -> Option<Input> {
        let known = self.peers.get_mut(&peer)?;
        let kad = &mut self.swarm.behaviour_mut().inside.kad;
        for gone in known.located.iter().filter(|address| !addresses.contains(address)) {
            kad.remove_address(&peer, gone);
        }
        for new in addresses.iter().filter(|address| !known.located.contains(address)) {
            kad.add_address(&peer, new.clone());
        }
        known.located.clone_from(&addresses);
        let key = known.key;
        let addresses = addresses.into_iter().filter_map(|address| address.with_p2p(peer).ok());
        let addresses = addresses.map(|address| address.to_string()).collect();
        Some(Input::PeerHeardOf(PeerAddresses { key, addresses }))
    }

    /// The last connection to a peer closed.
    pub(super) fn disconnected(&mut self, peer: &PeerId) -> Option<Input> {
        self.heard_early.remove(peer);
        let known = self.peers.remove(peer)?;
        if let Some(link) = known.link {
            link.cancel();
        }
        let node = known.key.node_id();
        self.by_node.remove(&node);
        Some(Input::PeerDisconnected(node))
    }

    /// Closes the connections to peers that no longer belong to the network: their time is over, or
    /// the root has revoked them.
    pub(super) fn put_out_strangers(&mut self) {
        let (roster, now) = (self.members.load_full(), now());
        let judge = |known: &Peer| roster.check(&known.key, &known.credential, now).err();
        let out: Vec<_> =
            self.peers.iter().filter_map(|(peer, known)| Some((*peer, judge(known)?))).collect();
        for (peer, why) in out {
            self.plane.counters().count("member-put-out");
            tracing::info!(%peer, "put out: {why}");
            self.put_out(peer);
        }
    }

    /// The engine wants a peer gone.
    pub(super) fn disconnect(&mut self, node: NodeId) {
        if let Some(peer) = self.by_node.get(&node) {
            self.put_out(*peer);
        }
    }

    fn put_out(&mut self, peer: PeerId) {
        // At once, however long the peer takes to agree to the end of the connection.
        self.unlink(&peer);
        self.swarm.behaviour_mut().inside.kad.remove_peer(&peer);
        let _ = self.swarm.disconnect_peer_id(peer);
    }

    /// Somebody asks to join, or answers this node's own request for a new credential.
    pub(super) fn join_message(
        &mut self,
        peer: PeerId,
        connection: ConnectionId,
        message: request_response::Message<Vec<u8>, Vec<u8>>,
    ) -> Option<Input> {
        let from = identity::public_key(&peer)?;
        match message {
            request_response::Message::Request { request, channel, .. } => {
                let behaviour = self.swarm.behaviour_mut();
                if !behaviour.admission.may_join(connection) {
                    self.plane.counters().count("join-too-often");
                    let busy: JoinResponse = Err(NotLetIn::Busy);
                    let _ = behaviour.join.send_response(channel, wire::encode(&busy));
                    return None;
                }
                self.next_token += 1;
                let token = self.next_token;
                if self.joins.len() >= JOINS_MAX {
                    self.joins.pop_first();
                }
                self.joins.insert(token, channel);
                Some(Input::JoinAsked { token, from, bytes: request })
            }
            request_response::Message::Response { response, .. } => {
                Some(Input::RenewalReceived { from: from.node_id(), bytes: response })
            }
        }
    }
}
