//! Connections that carry much for a few streams, and nothing for the rest.
//!
//! libp2p polls a connection whenever anything of it moves, and then asks every protocol's handler whether
//! it has something to do, and for the names that it listens to. On a link that is every read and write of
//! the lanes: at a relay a sixth of all its time. [`Quiet`] wraps a behaviour, asks its handler when that
//! was woken or told something, and gives the names as they were then.

use std::ops::{Deref, DerefMut};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use futures::task::AtomicWaker;
use libp2p::PeerId;
use libp2p::core::transport::PortUse;
use libp2p::core::upgrade::{InboundUpgrade, UpgradeInfo};
use libp2p::core::{Endpoint, Multiaddr};
use libp2p::swarm::handler::{
    ConnectionEvent, FullyNegotiatedInbound, InboundUpgradeSend, ListenUpgradeError,
    OutboundUpgradeSend, UpgradeInfoSend,
};
use libp2p::swarm::{
    ConnectionDenied, ConnectionHandler, ConnectionHandlerEvent, ConnectionId, FromSwarm,
    NetworkBehaviour, Stream, SubstreamProtocol, THandler, THandlerInEvent, THandlerOutEvent,
    ToSwarm,
};
use tokio::time::Sleep;

/// A handler is passed over only for so long after it was asked: what is polled seldom costs little.
const PASSED_OVER_FOR: Duration = Duration::from_millis(100);
/// One that was passed over is asked after this time in any case. Some forget to ask for their waking, and count on
/// the polls of others: they are late by this at most, and not stuck.
const ASKED_AFTER: Duration = Duration::from_secs(1);

/// See the module documentation.
pub(super) struct Quiet<B>(B);

impl<B> Quiet<B> {
    pub(super) fn new(inner: B) -> Self {
        Self(inner)
    }
}

impl<B> Deref for Quiet<B> {
    type Target = B;

    fn deref(&self) -> &B {
        &self.0
    }
}

impl<B> DerefMut for Quiet<B> {
    fn deref_mut(&mut self) -> &mut B {
        &mut self.0
    }
}

type Inbound<H> = <H as ConnectionHandler>::InboundProtocol;
type Name<H> = <Inbound<H> as UpgradeInfoSend>::Info;

impl<B: NetworkBehaviour> NetworkBehaviour for Quiet<B>
where
    Name<THandler<B>>: Sync,
{
    type ConnectionHandler = QuietHandler<THandler<B>>;
    type ToSwarm = B::ToSwarm;

    fn handle_pending_inbound_connection(
        &mut self,
        connection: ConnectionId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<(), ConnectionDenied> {
        self.0.handle_pending_inbound_connection(connection, local, remote)
    }

    fn handle_established_inbound_connection(
        &mut self,
        connection: ConnectionId,
        peer: PeerId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        let inner =
            self.0.handle_established_inbound_connection(connection, peer, local, remote)?;
        Ok(QuietHandler::new(inner))
    }

    fn handle_pending_outbound_connection(
        &mut self,
        connection: ConnectionId,
        peer: Option<PeerId>,
        addresses: &[Multiaddr],
        role: Endpoint,
    ) -> Result<Vec<Multiaddr>, ConnectionDenied> {
        self.0.handle_pending_outbound_connection(connection, peer, addresses, role)
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
            .0
            .handle_established_outbound_connection(connection, peer, address, role, port_use)?;
        Ok(QuietHandler::new(inner))
    }

    fn on_swarm_event(&mut self, event: FromSwarm) {
        self.0.on_swarm_event(event);
    }

    fn on_connection_handler_event(
        &mut self,
        peer: PeerId,
        connection: ConnectionId,
        event: THandlerOutEvent<Self>,
    ) {
        self.0.on_connection_handler_event(peer, connection, event);
    }

    fn poll(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        self.0.poll(context)
    }
}

/// Remembers that the handler was woken, and wakes the connection.
#[derive(Default)]
struct Bell {
    rang: AtomicBool,
    connection: AtomicWaker,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.rang.store(true, Ordering::Release);
        self.connection.wake();
    }
}

/// One connection's part of [`Quiet`].
pub(super) struct QuietHandler<H: ConnectionHandler> {
    inner: H,
    bell: Arc<Bell>,
    waker: Waker,
    asked_at: Instant,
    /// Rings when `inner` was passed over for long.
    later: Option<Pin<Box<Sleep>>>,
    /// What `inner` listened to when it was asked last. It is told, and then asked, before libp2p takes a
    /// stream for one of them, so that the upgrade is of the same kind as the name.
    names: Arc<[Name<H>]>,
}

impl<H: ConnectionHandler> QuietHandler<H> {
    fn new(inner: H) -> Self {
        let bell = Arc::new(Bell::default());
        bell.rang.store(true, Ordering::Release);
        let (waker, names) = (Waker::from(bell.clone()), names(&inner));
        Self { inner, bell, waker, asked_at: Instant::now(), later: None, names }
    }

    /// It was told something, and is asked at the next poll, which follows.
    fn told(&self) {
        self.bell.rang.store(true, Ordering::Release);
    }

    fn pass_over(&mut self) {
        if self.later.is_none() {
            let later = self.later.insert(Box::pin(tokio::time::sleep(ASKED_AFTER)));
            // Asked once: it rings by itself.
            if later.as_mut().poll(&mut Context::from_waker(&self.waker)).is_ready() {
                self.waker.wake_by_ref();
            }
        }
    }
}

fn names<H: ConnectionHandler>(handler: &H) -> Arc<[Name<H>]> {
    handler.listen_protocol().upgrade().protocol_info().collect()
}

impl<H: ConnectionHandler> ConnectionHandler for QuietHandler<H>
where
    Name<H>: Sync,
{
    type FromBehaviour = H::FromBehaviour;
    type ToBehaviour = H::ToBehaviour;
    type InboundProtocol = Listed<Inbound<H>>;
    type OutboundProtocol = H::OutboundProtocol;
    type InboundOpenInfo = H::InboundOpenInfo;
    type OutboundOpenInfo = H::OutboundOpenInfo;

    fn listen_protocol(&self) -> SubstreamProtocol<Self::InboundProtocol, Self::InboundOpenInfo> {
        let names = self.names.clone();
        self.inner.listen_protocol().map_upgrade(|upgrade| Listed { names, upgrade })
    }

    fn connection_keep_alive(&self) -> bool {
        self.inner.connection_keep_alive()
    }

    fn poll(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<
        ConnectionHandlerEvent<Self::OutboundProtocol, Self::OutboundOpenInfo, Self::ToBehaviour>,
    > {
        self.bell.connection.register(context.waker());
        let now = Instant::now();
        let rang = self.bell.rang.swap(false, Ordering::AcqRel);
        if !rang && now.saturating_duration_since(self.asked_at) < PASSED_OVER_FOR {
            self.pass_over();
            return Poll::Pending;
        }
        (self.asked_at, self.later) = (now, None);
        let polled = self.inner.poll(&mut Context::from_waker(&self.waker));
        if polled.is_ready() {
            // Polled until it has nothing more.
            self.told();
        } else {
            self.names = names(&self.inner);
        }
        polled
    }

    fn poll_close(&mut self, context: &mut Context<'_>) -> Poll<Option<Self::ToBehaviour>> {
        self.inner.poll_close(context)
    }

    fn on_behaviour_event(&mut self, event: Self::FromBehaviour) {
        self.told();
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
        self.told();
        if let Some(event) = retyped(event) {
            self.inner.on_connection_event(event);
        }
    }
}

/// The same event, but for the type of the inbound protocol.
pub(super) fn retyped<From, To, Out, InInfo, OutInfo>(
    event: ConnectionEvent<'_, From, Out, InInfo, OutInfo>,
) -> Option<ConnectionEvent<'_, To, Out, InInfo, OutInfo>>
where
    From: InboundUpgradeSend,
    To: InboundUpgradeSend<Output = From::Output, Error = From::Error>,
    Out: OutboundUpgradeSend,
{
    Some(match event {
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
        ConnectionEvent::RemoteProtocolsChange(it) => ConnectionEvent::RemoteProtocolsChange(it),
        // There is none; the type may get more.
        _ => return None,
    })
}

/// A protocol whose names are known.
pub(super) struct Listed<U: UpgradeInfoSend> {
    names: Arc<[U::Info]>,
    upgrade: U,
}

/// Gives the known names one by one.
pub(super) struct Names<I> {
    names: Arc<[I]>,
    next: usize,
}

impl<I: Clone> Iterator for Names<I> {
    type Item = I;

    fn next(&mut self) -> Option<I> {
        let name = self.names.get(self.next).cloned();
        self.next += 1;
        name
    }
}

impl<U: UpgradeInfoSend> UpgradeInfo for Listed<U>
where
    U::Info: Sync,
{
    type Info = U::Info;
    type InfoIter = Names<U::Info>;

    fn protocol_info(&self) -> Self::InfoIter {
        Names { names: self.names.clone(), next: 0 }
    }
}

impl<U: InboundUpgradeSend> InboundUpgrade<Stream> for Listed<U>
where
    U::Info: Sync,
{
    type Output = U::Output;
    type Error = U::Error;
    type Future = U::Future;

    fn upgrade_inbound(self, stream: Stream, info: Self::Info) -> Self::Future {
        self.upgrade.upgrade_inbound(stream, info)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use libp2p::StreamProtocol;
    use libp2p::core::upgrade::ReadyUpgrade;

    use super::*;
    use crate::net::gate::{Gate, GatedHandler};

    const NAMES: [StreamProtocol; 2] =
        [StreamProtocol::new("/test/1"), StreamProtocol::new("/test/2")];

    /// Counts how often it is polled, keeps its waker, and says what it has to say.
    #[derive(Default)]
    struct Counting {
        polls: usize,
        to_say: usize,
        waker: Option<Waker>,
        name: usize,
    }

    impl ConnectionHandler for Counting {
        type FromBehaviour = usize;
        type ToBehaviour = ();
        type InboundProtocol = ReadyUpgrade<StreamProtocol>;
        type OutboundProtocol = ReadyUpgrade<StreamProtocol>;
        type InboundOpenInfo = ();
        type OutboundOpenInfo = ();

        fn listen_protocol(&self) -> SubstreamProtocol<Self::InboundProtocol> {
            SubstreamProtocol::new(ReadyUpgrade::new(NAMES[self.name].clone()), ())
        }

        fn poll(
            &mut self,
            context: &mut Context<'_>,
        ) -> Poll<ConnectionHandlerEvent<Self::OutboundProtocol, (), ()>> {
            self.polls += 1;
            self.waker = Some(context.waker().clone());
            if self.to_say == 0 {
                return Poll::Pending;
            }
            self.to_say -= 1;
            Poll::Ready(ConnectionHandlerEvent::NotifyBehaviour(()))
        }

        fn on_behaviour_event(&mut self, to_say: usize) {
            self.to_say = to_say;
        }

        fn on_connection_event(
            &mut self,
            _: ConnectionEvent<Self::InboundProtocol, Self::OutboundProtocol>,
        ) {
        }
    }

    #[derive(Default)]
    struct Wakings(AtomicUsize);

    impl Wake for Wakings {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Polls as libp2p does, until there is nothing more. Returns how much there was, and how often the
    /// handler was asked for it.
    fn poll(quiet: &mut QuietHandler<Counting>, waker: &Arc<Wakings>) -> (usize, usize) {
        let before = quiet.inner.polls;
        let mut said = 0;
        while quiet.poll(&mut Context::from_waker(&Waker::from(waker.clone()))).is_ready() {
            said += 1;
        }
        (said, quiet.inner.polls - before)
    }

    #[tokio::test]
    async fn a_handler_is_asked_when_it_was_woken_or_told_something_or_passed_over_for_long() {
        let waker = Arc::new(Wakings::default());
        let mut quiet = QuietHandler::new(Counting::default());
        assert_eq!(poll(&mut quiet, &waker), (0, 1), "it is new");
        for _ in 0..3 {
            quiet.asked_at = Instant::now() + Duration::from_secs(3_600);
            assert_eq!(poll(&mut quiet, &waker), (0, 0), "nothing has happened to it");
        }
        quiet.asked_at = Instant::now().checked_sub(PASSED_OVER_FOR).unwrap();
        assert_eq!(poll(&mut quiet, &waker), (0, 1), "it was not asked for long");
        assert_eq!(waker.0.load(Ordering::Relaxed), 0);
        quiet.inner.waker.take().unwrap().wake();
        assert_eq!(waker.0.load(Ordering::Relaxed), 1, "the connection wakes with it");
        assert_eq!(poll(&mut quiet, &waker), (0, 1), "it was woken");
        quiet.on_behaviour_event(2);
        assert_eq!(poll(&mut quiet, &waker), (2, 3), "its behaviour has told it something");
        let change = libp2p::swarm::handler::AddressChange { new_address: &Multiaddr::empty() };
        quiet.on_connection_event(ConnectionEvent::AddressChange(change));
        assert_eq!(poll(&mut quiet, &waker), (0, 1), "its connection has");
        tokio::time::sleep(ASKED_AFTER + PASSED_OVER_FOR).await;
        assert_eq!(waker.0.load(Ordering::Relaxed), 1, "nobody has passed it over");
        quiet.asked_at = Instant::now() + Duration::from_secs(3_600);
        assert_eq!(poll(&mut quiet, &waker), (0, 0));
        let rings = async {
            while waker.0.load(Ordering::Relaxed) < 2 {
                tokio::time::sleep(PASSED_OVER_FOR / 10).await;
            }
        };
        let rang = tokio::time::timeout(Duration::from_secs(20), rings).await;
        assert!(rang.is_ok(), "the connection wakes by itself");
        assert_eq!(poll(&mut quiet, &waker), (0, 1), "it may have forgotten to ask for its waking");
    }

    #[tokio::test]
    async fn names_are_those_of_when_the_handler_was_asked_last() {
        let (mut quiet, waker) = (QuietHandler::new(Counting::default()), Arc::default());
        let names = |quiet: &QuietHandler<Counting>| -> Vec<StreamProtocol> {
            UpgradeInfo::protocol_info(quiet.listen_protocol().upgrade()).collect()
        };
        poll(&mut quiet, &waker);
        assert_eq!(names(&quiet), NAMES[..1]);
        quiet.inner.name = 1;
        quiet.asked_at = Instant::now() + Duration::from_secs(3_600);
        poll(&mut quiet, &waker);
        assert_eq!(names(&quiet), NAMES[..1], "it was not asked");
        quiet.on_behaviour_event(1);
        poll(&mut quiet, &waker);
        assert_eq!(names(&quiet), NAMES[1..]);
    }

    #[tokio::test]
    async fn what_a_gate_opens_is_offered_at_the_next_poll() {
        let gate = Arc::new(Gate::default());
        let gated = GatedHandler::new(gate.clone(), Counting::default());
        let mut quiet = QuietHandler::new(gated);
        let offered = |quiet: &mut QuietHandler<GatedHandler<Counting>>| {
            let waker = Waker::from(Arc::new(Wakings::default()));
            assert!(quiet.poll(&mut Context::from_waker(&waker)).is_pending());
            UpgradeInfo::protocol_info(quiet.listen_protocol().upgrade()).count()
        };
        assert_eq!((offered(&mut quiet), offered(&mut quiet)), (0, 0));
        gate.open_inbound();
        assert_eq!(offered(&mut quiet), 1);
    }
}
