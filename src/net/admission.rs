//! Admission: the first thing that two nodes do on a connection is to show each other why they belong
//! to the network. Until both have, nothing else is spoken but identify, ping and requests to join.
//!
//! The steps are in [`exchange`]; what a connection may do before and after is its
//! [`Gate`]; what strangers may cost is in `strangers`. A connection without a verdict after
//! [`ADMISSION_TIMEOUT`], or with a bad one, is closed.

pub mod exchange;
mod strangers;

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures::FutureExt;
use futures::future::BoxFuture;
use libp2p::core::transport::PortUse;
use libp2p::core::upgrade::ReadyUpgrade;
use libp2p::core::{Endpoint, Multiaddr};
use libp2p::swarm::handler::{
    ConnectionEvent, DialUpgradeError, FullyNegotiatedInbound, FullyNegotiatedOutbound,
};
use libp2p::swarm::{
    CloseConnection, ConnectionDenied, ConnectionHandler, ConnectionHandlerEvent, ConnectionId,
    FromSwarm, NetworkBehaviour, Stream, StreamUpgradeError, SubstreamProtocol, THandler,
    THandlerInEvent, THandlerOutEvent, ToSwarm,
};
use libp2p::{PeerId, StreamProtocol};

use super::address::ip_of;
use super::gate::{Gate, Gates};
use super::{Members, identity};
use crate::engine::overlay::Credential;
use crate::engine::types::PublicKey;
use exchange::Failure;
pub use strangers::Crowded;
use strangers::Strangers;

/// How long a connection may take until it is admitted.
pub const ADMISSION_TIMEOUT: Duration = Duration::from_secs(5);

/// What became of a connection.
#[derive(Debug)]
pub enum Event {
    /// The peer belongs to the network; the connection's gate is open.
    Admitted {
        /// Which connection.
        connection: ConnectionId,
        /// Who.
        peer: PeerId,
        /// Its key.
        key: PublicKey,
        /// What it showed.
        credential: Credential,
    },
    /// It does, but there is no room; the connection is closed.
    Crowded {
        /// Who.
        peer: PeerId,
        /// Why.
        why: Crowded,
    },
    /// It does not, or nobody can know; the connection is closed.
    Failed {
        /// Who.
        peer: PeerId,
        /// Why.
        why: Failure,
    },
}

/// See the module documentation.
pub struct Admission {
    protocol: StreamProtocol,
    members: Members,
    gates: Gates,
    strangers: Strangers,
    events: VecDeque<ToSwarm<Event, std::convert::Infallible>>,
}

impl Admission {
    /// Judges by `members` and opens `gates`.
    pub fn new(protocol: StreamProtocol, members: Members, gates: Gates) -> Self {
        let (strangers, events) = Default::default();
        Self { protocol, members, gates, strangers, events }
    }

    /// Whether a connection may ask to join, or for a new credential, just now.
    pub fn may_join(&mut self, connection: ConnectionId) -> bool {
        self.strangers.may_join(connection, Instant::now())
    }

    fn handler(
        &self,
        connection: ConnectionId,
        peer: &PeerId,
        role: Endpoint,
    ) -> Result<Handler, ConnectionDenied> {
        let key = identity::public_key(peer)
            .ok_or_else(|| ConnectionDenied::new("the peer's identity is not an Ed25519 key"))?;
        Ok(Handler {
            protocol: self.protocol.clone(),
            members: self.members.clone(),
            gate: self.gates.of(connection),
            key,
            asks: role == Endpoint::Dialer,
            talk: Talk::NotBegun,
            deadline: Box::pin(tokio::time::sleep(ADMISSION_TIMEOUT)),
        })
    }

    fn close(&mut self, leaves: Option<(PeerId, ConnectionId)>) {
        self.events.extend(leaves.map(|(peer_id, leaves)| {
            let connection = CloseConnection::One(leaves);
            ToSwarm::CloseConnection { peer_id, connection }
        }));
    }

    fn gone(&mut self, connection: ConnectionId) {
        self.gates.forget(connection);
        self.strangers.leave(connection);
    }
}

impl NetworkBehaviour for Admission {
    type ConnectionHandler = Handler;
    type ToSwarm = Event;

    fn handle_pending_inbound_connection(
        &mut self,
        connection: ConnectionId,
        _: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<(), ConnectionDenied> {
        let entered = self.strangers.enter(connection, ip_of(remote), Instant::now());
        self.close(entered.map_err(ConnectionDenied::new)?);
        Ok(())
    }

    fn handle_established_inbound_connection(
        &mut self,
        connection: ConnectionId,
        peer: PeerId,
        _: &Multiaddr,
        _: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        let proved = self.strangers.proved(connection, peer, Instant::now());
        self.close(proved.map_err(ConnectionDenied::new)?);
        self.handler(connection, &peer, Endpoint::Listener)
    }

    fn handle_established_outbound_connection(
        &mut self,
        connection: ConnectionId,
        peer: PeerId,
        _: &Multiaddr,
        role: Endpoint,
        _: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.handler(connection, &peer, role)
    }

    fn on_swarm_event(&mut self, event: FromSwarm) {
        match event {
            FromSwarm::ConnectionClosed(closed) => self.gone(closed.connection_id),
            FromSwarm::ListenFailure(failed) => self.gone(failed.connection_id),
            FromSwarm::DialFailure(failed) => self.gone(failed.connection_id),
            _ => {}
        }
    }

    fn on_connection_handler_event(
        &mut self,
        peer: PeerId,
        connection: ConnectionId,
        verdict: THandlerOutEvent<Self>,
    ) {
        let event = match verdict {
            Verdict::Admitted(key, credential) => match self.strangers.admitted(connection) {
                Ok(()) => {
                    ToSwarm::GenerateEvent(Event::Admitted { connection, peer, key, credential })
                }
                Err(why) => {
                    self.close(Some((peer, connection)));
                    ToSwarm::GenerateEvent(Event::Crowded { peer, why })
                }
            },
            Verdict::Failed(why) => ToSwarm::GenerateEvent(Event::Failed { peer, why }),
            Verdict::Told => ToSwarm::CloseConnection {
                peer_id: peer,
                connection: CloseConnection::One(connection),
            },
        };
        self.events.push_back(event);
    }

    fn poll(&mut self, _: &mut Context<'_>) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        // Whatever adds to the queue is called by the swarm, which polls again afterwards.
        self.events.pop_front().map_or(Poll::Pending, Poll::Ready)
    }
}

/// The outcome for one connection.
#[derive(Debug)]
pub enum Verdict {
    /// The gate is open.
    Admitted(PublicKey, Credential),
    /// It stays closed. Said before the peer is told, who may be gone the moment that it hears it.
    Failed(Failure),
    /// The peer has been told why: the connection can be closed.
    Told,
}

/// What an exchange came to, and the stream on which the other side is to be told.
type Said = (Result<Credential, Failure>, Option<Stream>);

/// The state of the exchange.
enum Talk {
    NotBegun,
    /// The stream is asked for.
    Opening,
    Running(BoxFuture<'static, Said>),
    Telling(BoxFuture<'static, ()>),
    Over,
}

/// One connection's part of [`Admission`].
pub struct Handler {
    protocol: StreamProtocol,
    members: Members,
    gate: Arc<Gate>,
    key: PublicKey,
    /// Whether this side begins.
    asks: bool,
    talk: Talk,
    deadline: Pin<Box<tokio::time::Sleep>>,
}

impl Handler {
    fn poll_said(&mut self, context: &mut Context<'_>) -> Poll<Said> {
        if let Talk::Running(talk) = &mut self.talk
            && let Poll::Ready(said) = talk.poll_unpin(context)
        {
            return Poll::Ready(said);
        }
        self.deadline.as_mut().poll(context).map(|()| (Err(Failure::TimedOut), None))
    }

    fn poll_verdict(&mut self, context: &mut Context<'_>) -> Poll<Verdict> {
        if let Talk::Telling(telling) = &mut self.talk {
            return telling.poll_unpin(context).map(|()| {
                self.talk = Talk::Over;
                Verdict::Told
            });
        }
        self.poll_said(context).map(|(said, stream)| match said {
            Ok(credential) => {
                self.talk = Talk::Over;
                Verdict::Admitted(self.key, credential)
            }
            Err(why) => {
                let (key, members) = (self.key, self.members.clone());
                self.talk = Talk::Telling(match (&why, stream) {
                    (Failure::Stranger(why), Some(stream)) => {
                        let why = *why;
                        async move { exchange::tell(stream, key, &members, why).await }.boxed()
                    }
                    _ => std::future::ready(()).boxed(),
                });
                Verdict::Failed(why)
            }
        })
    }
}

impl ConnectionHandler for Handler {
    type FromBehaviour = std::convert::Infallible;
    type ToBehaviour = Verdict;
    type InboundProtocol = ReadyUpgrade<StreamProtocol>;
    type OutboundProtocol = ReadyUpgrade<StreamProtocol>;
    type InboundOpenInfo = ();
    type OutboundOpenInfo = ();

    fn listen_protocol(&self) -> SubstreamProtocol<Self::InboundProtocol> {
        SubstreamProtocol::new(ReadyUpgrade::new(self.protocol.clone()), ())
    }

    /// The deadline ends it.
    fn connection_keep_alive(&self) -> bool {
        !matches!(self.talk, Talk::Over)
    }

    fn poll(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<ConnectionHandlerEvent<Self::OutboundProtocol, (), Self::ToBehaviour>> {
        if matches!(self.talk, Talk::Over) {
            return Poll::Pending;
        }
        if self.asks && matches!(self.talk, Talk::NotBegun) {
            self.talk = Talk::Opening;
            let protocol = SubstreamProtocol::new(ReadyUpgrade::new(self.protocol.clone()), ());
            return Poll::Ready(ConnectionHandlerEvent::OutboundSubstreamRequest { protocol });
        }
        self.poll_verdict(context).map(ConnectionHandlerEvent::NotifyBehaviour)
    }

    fn on_behaviour_event(&mut self, event: Self::FromBehaviour) {
        match event {}
    }

    fn on_connection_event(
        &mut self,
        event: ConnectionEvent<Self::InboundProtocol, Self::OutboundProtocol>,
    ) {
        let (key, members, gate) = (self.key, self.members.clone(), self.gate.clone());
        match event {
            // One for a connection, and only from whoever dialled.
            ConnectionEvent::FullyNegotiatedInbound(FullyNegotiatedInbound {
                protocol: mut stream,
                ..
            }) if !self.asks && matches!(self.talk, Talk::NotBegun) => {
                let talk = async move {
                    let said = exchange::answer(&mut stream, key, &members, &gate).await;
                    (said, Some(stream))
                };
                self.talk = Talk::Running(talk.boxed());
            }
            ConnectionEvent::FullyNegotiatedOutbound(FullyNegotiatedOutbound {
                protocol: mut stream,
                ..
            }) if matches!(self.talk, Talk::Opening) => {
                let talk = async move {
                    let said = exchange::ask(&mut stream, key, &members, &gate).await;
                    (said, Some(stream))
                };
                self.talk = Talk::Running(talk.boxed());
            }
            ConnectionEvent::DialUpgradeError(DialUpgradeError { error, .. })
                if matches!(self.talk, Talk::Opening) =>
            {
                let why = match error {
                    StreamUpgradeError::NegotiationFailed => Failure::Foreign,
                    _ => Failure::Broken,
                };
                self.talk = Talk::Running(std::future::ready((Err(why), None)).boxed());
            }
            _ => {}
        }
    }
}
