//! The gate: protocols that are for members only, and connections that are not a member's yet.
//!
//! [`Gated`] wraps a behaviour. On each connection it offers none of the behaviour's protocols and
//! asks for none of them until [`Admission`](super::admission::Admission) has opened the connection's
//! [`Gate`]. The two halves open apart: what the other side opens to us is served as soon as we know
//! that it is a member; we open something to it only when it is sure to serve us, because gossip and
//! Kademlia give up on a peer that refuses their stream once.

use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use futures::task::AtomicWaker;
use libp2p::PeerId;
use libp2p::core::transport::PortUse;
use libp2p::core::upgrade::{InboundUpgrade, UpgradeInfo};
use libp2p::core::{Endpoint, Multiaddr};
use libp2p::swarm::handler::{
    ConnectionEvent, FullyNegotiatedInbound, InboundUpgradeSend, ListenUpgradeError,
    UpgradeInfoSend,
};
use libp2p::swarm::{
    ConnectionDenied, ConnectionHandler, ConnectionHandlerEvent, ConnectionId, FromSwarm,
    NetworkBehaviour, Stream, SubstreamProtocol, THandler, THandlerInEvent, THandlerOutEvent,
    ToSwarm,
};

/// What may be spoken on one connection. Closed at first, and never closed again.
#[derive(Debug, Default)]
pub struct Gate {
    inbound: AtomicBool,
    outbound: AtomicBool,
    waker: AtomicWaker,
}

impl Gate {
    /// The other side may open streams.
    pub fn open_inbound(&self) {
        self.inbound.store(true, Ordering::Release);
        self.waker.wake();
    }

    /// This side may open streams, too.
    pub fn open_outbound(&self) {
        self.outbound.store(true, Ordering::Release);
        self.waker.wake();
    }
}

/// The gates of all connections.
#[derive(Clone, Default)]
pub struct Gates(Arc<Mutex<BTreeMap<ConnectionId, Arc<Gate>>>>);

impl Gates {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<ConnectionId, Arc<Gate>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The gate of a connection, closed when nobody asked for it before.
    pub fn of(&self, connection: ConnectionId) -> Arc<Gate> {
        self.lock().entry(connection).or_default().clone()
    }

    /// The connection is gone.
    pub fn forget(&self, connection: ConnectionId) {
        self.lock().remove(&connection);
    }
}

/// A behaviour behind the gate.
pub struct Gated<B> {
    gates: Gates,
    inner: B,
}

impl<B> Gated<B> {
    /// Lets `inner` speak where `gates` are open.
    pub fn new(gates: Gates, inner: B) -> Self {
        Self { gates, inner }
    }
}

impl<B> Deref for Gated<B> {
    type Target = B;

    fn deref(&self) -> &B {
        &self.inner
    }
}

impl<B> DerefMut for Gated<B> {
    fn deref_mut(&mut self) -> &mut B {
        &mut self.inner
    }
}

impl<B: NetworkBehaviour> NetworkBehaviour for Gated<B> {
    type ConnectionHandler = GatedHandler<THandler<B>>;
    type ToSwarm = B::ToSwarm;

    fn handle_pending_inbound_connection(
        &mut self,
        connection: ConnectionId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<(), ConnectionDenied> {
        self.inner.handle_pending_inbound_connection(connection, local, remote)
    }

    fn handle_established_inbound_connection(
        &mut self,
        connection: ConnectionId,
        peer: PeerId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        let inner =
            self.inner.handle_established_inbound_connection(connection, peer, local, remote)?;
        Ok(GatedHandler { gate: self.gates.of(connection), inner })
    }

    fn handle_pending_outbound_connection(
        &mut self,
        connection: ConnectionId,
        peer: Option<PeerId>,
        addresses: &[Multiaddr],
        role: Endpoint,
    ) -> Result<Vec<Multiaddr>, ConnectionDenied> {
        self.inner.handle_pending_outbound_connection(connection, peer, addresses, role)
    }

    fn handle_established_outbound_connection(
        &mut self,
        connection: ConnectionId,
        peer: PeerId,
        address: &Multiaddr,
        role: Endpoint,
        port_use: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        let inner = self
            .inner
            .handle_established_outbound_connection(connection, peer, address, role, port_use)?;
        Ok(GatedHandler { gate: self.gates.of(connection), inner })
    }

    fn on_swarm_event(&mut self, event: FromSwarm) {
        self.inner.on_swarm_event(event);
    }

    fn on_connection_handler_event(
        &mut self,
        peer: PeerId,
        connection: ConnectionId,
        event: THandlerOutEvent<Self>,
    ) {
        self.inner.on_connection_handler_event(peer, connection, event);
    }

    fn poll(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        self.inner.poll(context)
    }
}

/// One connection's part of [`Gated`].
pub struct GatedHandler<H> {
    gate: Arc<Gate>,
    inner: H,
}

impl<H: ConnectionHandler> ConnectionHandler for GatedHandler<H> {
    type FromBehaviour = H::FromBehaviour;
    type ToBehaviour = H::ToBehaviour;
    type InboundProtocol = Offered<H::InboundProtocol>;
    type OutboundProtocol = H::OutboundProtocol;
    type InboundOpenInfo = H::InboundOpenInfo;
    type OutboundOpenInfo = H::OutboundOpenInfo;

    fn listen_protocol(&self) -> SubstreamProtocol<Self::InboundProtocol, Self::InboundOpenInfo> {
        let open = self.gate.inbound.load(Ordering::Acquire);
        self.inner.listen_protocol().map_upgrade(|upgrade| Offered { open, upgrade })
    }

    fn connection_keep_alive(&self) -> bool {
        self.gate.outbound.load(Ordering::Acquire) && self.inner.connection_keep_alive()
    }

    /// Until the gate is open, what the behaviour wants from the handler waits in the handler.
    fn poll(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<
        ConnectionHandlerEvent<Self::OutboundProtocol, Self::OutboundOpenInfo, Self::ToBehaviour>,
    > {
        if !self.gate.outbound.load(Ordering::Acquire) {
            self.gate.waker.register(context.waker());
            // It may have been opened meanwhile.
            if !self.gate.outbound.load(Ordering::Acquire) {
                return Poll::Pending;
            }
        }
        self.inner.poll(context)
    }

    fn poll_close(&mut self, context: &mut Context<'_>) -> Poll<Option<Self::ToBehaviour>> {
        self.inner.poll_close(context)
    }

    fn on_behaviour_event(&mut self, event: Self::FromBehaviour) {
        self.inner.on_behaviour_event(event);
    }

    fn on_connection_event(
        &mut self,
        event: ConnectionEvent<
            Self::InboundProtocol,
            Self::OutboundProtocol,
            Self::InboundOpenInfo,
            Self::OutboundOpenInfo,
        >,
    ) {
        // The same events, but for the type of the inbound protocol.
        let event = match event {
            ConnectionEvent::FullyNegotiatedInbound(it) => {
                ConnectionEvent::FullyNegotiatedInbound(FullyNegotiatedInbound {
                    protocol: it.protocol,
                    info: it.info,
                })
            }
            ConnectionEvent::ListenUpgradeError(it) => {
                ConnectionEvent::ListenUpgradeError(ListenUpgradeError {
                    info: it.info,
                    error: it.error,
                })
            }
            ConnectionEvent::FullyNegotiatedOutbound(it) => {
                ConnectionEvent::FullyNegotiatedOutbound(it)
            }
            ConnectionEvent::DialUpgradeError(it) => ConnectionEvent::DialUpgradeError(it),
            ConnectionEvent::AddressChange(it) => ConnectionEvent::AddressChange(it),
            ConnectionEvent::LocalProtocolsChange(it) => ConnectionEvent::LocalProtocolsChange(it),
            ConnectionEvent::RemoteProtocolsChange(it) => {
                ConnectionEvent::RemoteProtocolsChange(it)
            }
            _ => return,
        };
        self.inner.on_connection_event(event);
    }
}

/// A protocol that is offered only while the gate is open.
pub struct Offered<U> {
    open: bool,
    upgrade: U,
}

impl<U: UpgradeInfoSend> UpgradeInfo for Offered<U> {
    type Info = U::Info;
    type InfoIter = std::iter::Flatten<std::option::IntoIter<U::InfoIter>>;

    fn protocol_info(&self) -> Self::InfoIter {
        self.open.then(|| self.upgrade.protocol_info()).into_iter().flatten()
    }
}

impl<U: InboundUpgradeSend> InboundUpgrade<Stream> for Offered<U> {
    type Output = U::Output;
    type Error = U::Error;
    type Future = U::Future;

    fn upgrade_inbound(self, stream: Stream, info: Self::Info) -> Self::Future {
        self.upgrade.upgrade_inbound(stream, info)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use futures::task::noop_waker_ref;
    use libp2p::StreamProtocol;
    use libp2p::core::upgrade::ReadyUpgrade;

    use super::*;

    const PROTOCOL: StreamProtocol = StreamProtocol::new("/test/1");

    /// Which halves are open: inbound, outbound.
    pub(crate) fn openings(gate: &Gate) -> [bool; 2] {
        [&gate.inbound, &gate.outbound].map(|half| half.load(Ordering::Acquire))
    }

    /// Wants a stream at once and always.
    struct Eager;

    impl ConnectionHandler for Eager {
        type FromBehaviour = ();
        type ToBehaviour = ();
        type InboundProtocol = ReadyUpgrade<StreamProtocol>;
        type OutboundProtocol = ReadyUpgrade<StreamProtocol>;
        type InboundOpenInfo = ();
        type OutboundOpenInfo = ();

        fn listen_protocol(&self) -> SubstreamProtocol<Self::InboundProtocol> {
            SubstreamProtocol::new(ReadyUpgrade::new(PROTOCOL), ())
        }

        fn connection_keep_alive(&self) -> bool {
            true
        }

        fn poll(
            &mut self,
            _: &mut Context<'_>,
        ) -> Poll<ConnectionHandlerEvent<Self::OutboundProtocol, (), ()>> {
            let protocol = SubstreamProtocol::new(ReadyUpgrade::new(PROTOCOL), ());
            Poll::Ready(ConnectionHandlerEvent::OutboundSubstreamRequest { protocol })
        }

        fn on_behaviour_event(&mut self, (): ()) {}

        fn on_connection_event(
            &mut self,
            _: ConnectionEvent<Self::InboundProtocol, Self::OutboundProtocol>,
        ) {
        }
    }

    #[test]
    fn a_closed_gate_offers_nothing_and_asks_for_nothing() {
        let gates = Gates::default();
        let connection = ConnectionId::new_unchecked(1);
        let mut handler = GatedHandler { gate: gates.of(connection), inner: Eager };
        let mut context = Context::from_waker(noop_waker_ref());
        let offered = |handler: &GatedHandler<Eager>| {
            UpgradeInfo::protocol_info(handler.listen_protocol().upgrade()).count()
        };
        assert_eq!(offered(&handler), 0);
        assert!(handler.poll(&mut context).is_pending());
        assert!(!handler.connection_keep_alive());

        gates.of(connection).open_inbound();
        assert_eq!(offered(&handler), 1);
        assert!(handler.poll(&mut context).is_pending(), "the other side may not be open yet");

        gates.of(connection).open_outbound();
        assert!(handler.poll(&mut context).is_ready());
        assert!(handler.connection_keep_alive());

        gates.forget(connection);
        assert_eq!(openings(&gates.of(connection)), [false, false], "of another connection");
    }
}
