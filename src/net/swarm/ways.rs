//! Ways to peers and to this node: what came of dials, which connections lead over a relay, and what
//! is done about NAT.
//!
//! - Members test which addresses of this node can be reached (AutoNAT v2). When they tried and none
//!   could, the node asks up to [`RELAYS_MAX`] members that it has dialled to be reached over them
//!   (circuit relay v2). Such connections are for control messages: links between nodes exist over
//!   direct connections only, since the mesh's own routes carry data better than a circuit does.
//! - A peer is dialled at its own addresses first, and over a relay when none answers. Over the relay
//!   both then try to open a direct connection at the same time (DCUtR); once that is admitted, the
//!   circuit is given up.
//! - Gateways that speak UPnP are asked to map the listening ports.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use libp2p::core::ConnectedPoint;
use libp2p::core::transport::ListenerId;
use libp2p::multiaddr::Protocol;
use libp2p::swarm::dial_opts::DialOpts;
use libp2p::swarm::{
    ConnectionId, DialError, FromSwarm, NetworkBehaviour, NewExternalAddrCandidate,
};
use libp2p::{Multiaddr, PeerId, autonat, dcutr, upnp};

use super::Task;
use crate::net::address::{check_dial, innermost, ip_of, is_relayed, peer_of, without_peer};
use crate::net::reach::{FOREIGN, Gateway};

/// Members over which a node that cannot be reached can be reached.
pub(super) const RELAYS_MAX: usize = 2;

/// Addresses of other networks that the log names.
const FOREIGN_MAX: usize = 64;

/// How an open connection leads to its peer.
enum Way {
    /// Over another member.
    Relayed,
    /// Directly, to this address.
    Dialled(Multiaddr),
    /// Directly, opened by the peer.
    Accepted,
}

/// What is known of ways.
#[derive(Default)]
pub(super) struct Ways {
    open: BTreeMap<PeerId, BTreeMap<ConnectionId, Way>>,
    /// Who answered at an address that was dialled.
    answered: BTreeMap<Multiaddr, PeerId>,
    /// Addresses over relays, for when the direct ones that are being dialled fail.
    instead: BTreeMap<PeerId, Vec<Multiaddr>>,
    /// Listeners at relays.
    relays: HashMap<ListenerId, PeerId>,
    /// Relays that refused while they were connected.
    refused: BTreeSet<PeerId>,
    /// Addresses of other networks that the log has named.
    foreign: BTreeSet<Multiaddr>,
}

impl Ways {
    /// Whether a connection to the peer is direct.
    pub(super) fn is_direct(&self, peer: &PeerId) -> bool {
        let ways = self.open.get(peer).into_iter().flat_map(BTreeMap::values);
        ways.into_iter().any(|way| !matches!(way, Way::Relayed))
    }

    /// Whether this connection is direct.
    pub(super) fn leads_directly(&self, peer: &PeerId, connection: ConnectionId) -> bool {
        let way = self.open.get(peer).and_then(|ways| ways.get(&connection));
        way.is_some_and(|way| !matches!(way, Way::Relayed))
    }

    fn relayed(&self, peer: &PeerId) -> Vec<ConnectionId> {
        let ways = self.open.get(peer).into_iter().flatten();
        let relayed = ways.filter(|(_, way)| matches!(way, Way::Relayed));
        relayed.map(|(connection, _)| *connection).collect()
    }

    /// Where this node has dialled the peer.
    fn dialled(&self, peer: &PeerId) -> Option<&Multiaddr> {
        self.open.get(peer)?.values().find_map(|way| match way {
            Way::Dialled(address) => Some(address),
            _ => None,
        })
    }
}

impl Task {
    /// Dials one peer at all its direct addresses together; over relays when there are no others, or
    /// none of them answers.
    pub(super) fn dial(&mut self, texts: &[String]) {
        let mut addresses: Vec<Multiaddr> = texts.iter().filter_map(|t| t.parse().ok()).collect();
        addresses.retain(|address| check_dial(address).is_ok());
        let options = match (addresses.iter().find_map(peer_of), addresses.first()) {
            (Some(peer), _) if self.swarm.is_connected(&peer) => return,
            (Some(peer), _) => {
                let (relayed, direct): (Vec<_>, Vec<_>) =
                    addresses.into_iter().partition(is_relayed);
                let first = if direct.is_empty() {
                    relayed
                } else {
                    if !relayed.is_empty() {
                        self.ways.instead.insert(peer, relayed);
                    }
                    direct
                };
                DialOpts::peer_id(peer).addresses(first).build()
            }
            (None, Some(address)) => {
                let answered = self.ways.answered.get(address);
                if answered.is_some_and(|peer| self.swarm.is_connected(peer)) {
                    return;
                }
                DialOpts::from(address.clone())
            }
            (None, None) => return self.plane.counters().count("dial-wrong-address"),
        };
        let peer = options.get_peer_id();
        if let Err(error) = self.swarm.dial(options) {
            self.plane.counters().count("dial-refused");
            if let (DialError::Denied { .. }, Some(peer)) = (error, peer) {
                self.dial_instead(peer);
            }
        }
    }

    /// No direct address of a peer answers: tries those over relays.
    fn dial_instead(&mut self, peer: PeerId) {
        if let Some(relayed) = self.ways.instead.remove(&peer)
            && !self.swarm.is_connected(&peer)
        {
            let _ = self.swarm.dial(DialOpts::peer_id(peer).addresses(relayed).build());
        }
    }

    /// A dial failed.
    pub(super) fn not_connected(&mut self, peer: Option<PeerId>, error: &DialError) {
        self.plane.counters().count("dial-failed");
        match error {
            DialError::Transport(tried) => {
                for (address, error) in tried {
                    let why = innermost(error);
                    if self.peers.is_empty() {
                        tracing::warn!("nobody answers at {address} ({why}); trying again later");
                    }
                    self.bootstrapped(address, Err(why));
                }
            }
            DialError::WrongPeerId { address, .. } => {
                self.bootstrapped(address, Err("another node answers there".into()));
            }
            _ => tracing::debug!(?peer, %error, "could not connect"),
        }
        if let Some(peer) = peer {
            self.dial_instead(peer);
        }
    }

    /// Notes what came of a dial, when it was to a configured address.
    fn bootstrapped(&self, address: &Multiaddr, result: Result<(), String>) {
        let address = without_peer(address.clone());
        let mut reach = self.reach.lock();
        for (text, known) in &mut reach.bootstrap {
            let configured = text.parse::<Multiaddr>().map(without_peer);
            if configured.is_ok_and(|configured| configured == address) {
                *known = Some(result.clone());
            }
        }
    }

    /// The node that was dialled is of another network. The log names each address once.
    pub(super) fn foreign(&mut self, peer: &PeerId) {
        let Some(address) = self.ways.dialled(peer).cloned() else { return };
        self.bootstrapped(&address, Err(FOREIGN.into()));
        let named = &mut self.ways.foreign;
        if named.len() < FOREIGN_MAX && named.insert(address.clone()) {
            tracing::warn!(
                "{address} is of another network; join it with 'meshwise node --join TOKEN', with a \
                 token of 'meshwise network invite' there"
            );
        }
    }

    /// A connection is there, not admitted yet.
    pub(super) fn connected(
        &mut self,
        peer: PeerId,
        connection: ConnectionId,
        endpoint: &ConnectedPoint,
    ) {
        self.ways.instead.remove(&peer);
        let way = match endpoint {
            _ if endpoint.is_relayed() => Way::Relayed,
            ConnectedPoint::Listener { .. } => Way::Accepted,
            ConnectedPoint::Dialer { address, .. } => {
                self.bootstrapped(address, Ok(()));
                let address = without_peer(address.clone());
                self.ways.answered.insert(address.clone(), peer);
                Way::Dialled(address)
            }
        };
        self.ways.open.entry(peer).or_default().insert(connection, way);
    }

    /// A connection is gone.
    pub(super) fn closed(&mut self, peer: &PeerId, connection: ConnectionId) {
        if let Some(ways) = self.ways.open.get_mut(peer) {
            ways.remove(&connection);
            if ways.is_empty() {
                self.ways.open.remove(peer);
                self.ways.answered.retain(|_, answered| answered != peer);
                self.ways.refused.remove(peer);
            }
        }
        if !self.ways.is_direct(peer) {
            self.unlink(peer);
        }
        self.note_relayed();
    }

    /// A connection is admitted. A direct one takes the place of those over relays.
    pub(super) fn way_admitted(&mut self, peer: PeerId, connection: ConnectionId) {
        if self.ways.leads_directly(&peer, connection) {
            for relayed in self.ways.relayed(&peer) {
                self.swarm.close_connection(relayed);
            }
            self.link(peer);
            self.seek_relays();
        }
        self.note_relayed();
    }

    fn note_relayed(&self) {
        let only = self.peers.keys().filter(|peer| !self.ways.is_direct(peer));
        self.reach.lock().relayed = only.map(ToString::to_string).collect();
    }

    /// Has a listening address tested by members, and names it to whom a hole is punched with.
    pub(super) fn offer(&mut self, address: &Multiaddr) {
        let loopback = ip_of(address).is_some_and(|ip| ip.is_loopback());
        if is_relayed(address) || (loopback && !self.emulated) {
            return;
        }
        // The swarm offers only addresses that it does not hold for external already.
        let offer = || NewExternalAddrCandidate { addr: address };
        let inside = &mut self.swarm.behaviour_mut().inside;
        if let Some(tests) = inside.tests.as_mut() {
            tests.on_swarm_event(FromSwarm::NewExternalAddrCandidate(offer()));
        }
        if let Some(punch) = inside.punch.as_mut() {
            punch.on_swarm_event(FromSwarm::NewExternalAddrCandidate(offer()));
        }
    }

    /// A member tried to reach an address of this node. Those over relays, and what peers see of
    /// connections over relays, say nothing.
    pub(super) fn tested(&mut self, event: autonat::v2::client::Event) {
        if is_relayed(&event.tested_addr) || ip_of(&event.tested_addr).is_none() {
            return;
        }
        let result = event.result.map_err(|error| error.to_string());
        tracing::debug!(address = %event.tested_addr, ?result, "tested by {}", event.server);
        self.reach.lock().tested(event.tested_addr.to_string(), result);
        self.seek_relays();
    }

    /// When nobody can reach this node, asks members to be reached over them.
    pub(super) fn seek_relays(&mut self) {
        if !self.reach.lock().is_unreachable() {
            return;
        }
        let taken: BTreeSet<PeerId> = self.ways.relays.values().copied().collect();
        let free = |peer: &&PeerId| !taken.contains(peer) && !self.ways.refused.contains(peer);
        // Who is reached over others itself is no help.
        let open = self.peers.iter().filter(|(_, known)| !known.is_reached_over_others());
        let candidates = open.map(|(peer, _)| peer).filter(free);
        let candidates = candidates.filter_map(|peer| Some((*peer, self.ways.dialled(peer)?)));
        let wanted = RELAYS_MAX.saturating_sub(taken.len());
        let chosen: Vec<_> = candidates.take(wanted).map(|(p, at)| (p, at.clone())).collect();
        for (peer, at) in chosen {
            let at = at.with(Protocol::P2p(peer)).with(Protocol::P2pCircuit);
            match self.swarm.listen_on(at) {
                Ok(listener) => {
                    tracing::info!(%peer, "nobody can reach this node; asking to be reached over");
                    self.ways.relays.insert(listener, peer);
                }
                Err(_) => {
                    self.ways.refused.insert(peer);
                }
            }
        }
    }

    /// A listener is gone; when it was one at a relay, another relay is sought.
    pub(super) fn listener_closed(&mut self, listener: ListenerId) {
        if let Some(peer) = self.ways.relays.remove(&listener) {
            self.plane.counters().count("relay-lost");
            if self.swarm.is_connected(&peer) {
                self.ways.refused.insert(peer);
            }
            self.seek_relays();
        }
    }

    pub(super) fn punched(&mut self, event: &dcutr::Event) {
        let what = if event.result.is_ok() { "hole-punched" } else { "hole-punch-failed" };
        tracing::debug!(peer = %event.remote_peer_id, result = ?event.result, what);
        self.plane.counters().count(what);
    }

    pub(super) fn gateway(&mut self, event: upnp::Event) {
        let mut reach = self.reach.lock();
        match event {
            upnp::Event::NewExternalAddr { external_addr, .. } => {
                tracing::info!("the gateway maps {external_addr} to this node");
                if !matches!(reach.gateway, Gateway::Maps(_)) {
                    reach.gateway = Gateway::Maps(BTreeSet::new());
                }
                if let Gateway::Maps(addresses) = &mut reach.gateway {
                    addresses.insert(external_addr.to_string());
                }
            }
            upnp::Event::ExpiredExternalAddr { external_addr, .. } => {
                if let Gateway::Maps(addresses) = &mut reach.gateway {
                    addresses.remove(&external_addr.to_string());
                }
            }
            upnp::Event::GatewayNotFound => reach.gateway = Gateway::NotFound,
            upnp::Event::NonRoutableGateway => reach.gateway = Gateway::NotRoutable,
        }
    }
}
