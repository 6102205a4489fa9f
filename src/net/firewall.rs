//! Connections that are refused because the emulation says so, as a network in between would.
//!
//! As with a NAT, who is dialled meanwhile comes through: that is a hole.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::task::{Context, Poll};

use libp2p::PeerId;
use libp2p::core::transport::PortUse;
use libp2p::core::{Endpoint, Multiaddr};
use libp2p::swarm::{
    ConnectionDenied, ConnectionId, FromSwarm, NetworkBehaviour, THandler, THandlerInEvent,
    THandlerOutEvent, ToSwarm, dummy,
};

use super::address::is_relayed;

/// Refuses direct connections. Those over a relay pass.
#[derive(Clone, Debug, Default)]
pub struct Firewall {
    /// Peers that cannot be reached and cannot reach this node.
    unreachable: BTreeSet<PeerId>,
    /// Nobody can open a connection to this node.
    behind_nat: bool,
    /// Peers to which this node punches a hole, which then may.
    holes: BTreeSet<PeerId>,
}

impl Firewall {
    /// See the fields of the emulation's settings.
    pub fn new(unreachable: BTreeSet<PeerId>, behind_nat: bool) -> Self {
        Self { unreachable, behind_nat, holes: BTreeSet::new() }
    }

    fn check(
        &self,
        peer: &PeerId,
        address: &Multiaddr,
        inbound: bool,
    ) -> Result<(), ConnectionDenied> {
        let comes_in = !self.behind_nat || self.holes.contains(peer);
        let closed = self.unreachable.contains(peer) || (inbound && !comes_in);
        match closed && !is_relayed(address) {
            true => Err(ConnectionDenied::new("unreachable, as emulated")),
            false => Ok(()),
        }
    }
}

impl NetworkBehaviour for Firewall {
    type ConnectionHandler = dummy::ConnectionHandler;
    type ToSwarm = Infallible;

    /// Before the handshake, as whoever dials would find it. Who it is is not known yet.
    fn handle_pending_inbound_connection(
        &mut self,
        _: ConnectionId,
        local: &Multiaddr,
        _: &Multiaddr,
    ) -> Result<(), ConnectionDenied> {
        match self.behind_nat && self.holes.is_empty() && !is_relayed(local) {
            true => Err(ConnectionDenied::new("behind a NAT, as emulated")),
            false => Ok(()),
        }
    }

    fn handle_pending_outbound_connection(
        &mut self,
        _: ConnectionId,
        peer: Option<PeerId>,
        addresses: &[Multiaddr],
        role: Endpoint,
    ) -> Result<Vec<Multiaddr>, ConnectionDenied> {
        // It dials as the one that is dialled.
        if role == Endpoint::Listener && self.behind_nat {
            self.holes.extend(peer);
        }
        match (peer, addresses.iter().find(|address| is_relayed(address))) {
            (Some(peer), None) => {
                self.check(&peer, &Multiaddr::empty(), false).map(|()| Vec::new())
            }
            _ => Ok(Vec::new()),
        }
    }

    fn handle_established_inbound_connection(
        &mut self,
        _: ConnectionId,
        peer: PeerId,
        local: &Multiaddr,
        _: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.check(&peer, local, true).map(|()| dummy::ConnectionHandler)
    }

    fn handle_established_outbound_connection(
        &mut self,
        _: ConnectionId,
        peer: PeerId,
        address: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.check(&peer, address, false).map(|()| dummy::ConnectionHandler)
    }

    fn on_swarm_event(&mut self, event: FromSwarm) {
        if let FromSwarm::ConnectionClosed(closed) = event
            && closed.remaining_established == 0
        {
            self.holes.remove(&closed.peer_id);
        }
    }

    fn on_connection_handler_event(
        &mut self,
        _: PeerId,
        _: ConnectionId,
        event: THandlerOutEvent<Self>,
    ) {
        match event {}
    }

    fn poll(&mut self, _: &mut Context<'_>) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        Poll::Pending
    }
}
