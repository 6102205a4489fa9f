//! How the control API and tests talk to the driver of a running node.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use super::View;
use super::doors::Doors;
use super::published::Published;
use crate::config::{EmulatedLink, PATHS_MAX};
use crate::engine::event::{Answer, Command, CommandError, RequestId, ServiceSpec};
use crate::engine::overlay::{Objective, ServiceRecord};
use crate::engine::route::router::TUNNELS_MAX;
use crate::engine::traffic::message::{Bottleneck, RATE_MAX};
use crate::engine::types::{NodeId, ParseError, PublicKey, Route, ServiceName, TunnelId};
use crate::learn::ModelRegistry;
use crate::net::tunnel::{Export, TunnelError, Tunnels};

/// How often, and after how long each, a node that starts looks whether it has joined before it
/// publishes again: 3 s in all.
const PUBLISH_AGAIN_TRIES: u32 = 30;
/// See [`PUBLISH_AGAIN_TRIES`].
const PUBLISH_AGAIN_WAIT: Duration = Duration::from_millis(100);
/// How long the DHT may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Why a request to a running node failed.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// The node is stopping.
    #[error("the node is stopping")]
    Stopped,
    /// This node is no member any more.
    #[error("the root of the network has revoked this node: nobody there talks to it any more")]
    Revoked,
    /// The DHT took too long.
    #[error("no answer within {} s; see 'meshwise peer list' for the connections", ANSWER_TIMEOUT.as_secs())]
    TimedOut,
    /// The engine said no.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// The tunnel did not come up.
    #[error(transparent)]
    Tunnel(#[from] TunnelError),
    /// No route to the provider.
    #[error("no route to {0}; see 'meshwise peer list' and 'meshwise route explain {0}'")]
    NoRoute(NodeId),
    /// A fixed path over a link that nobody has.
    #[error(
        "the path that --via fixes is broken: no link joins {from} and {to}; leave out --via, or see \
         'meshwise route list'"
    )]
    BrokenPath {
        /// The end of it that is nearer.
        from: NodeId,
        /// The other one.
        to: NodeId,
    },
    /// A node that nobody advertises.
    #[error("{0} is not known here; see 'meshwise peer list' for the nodes that are connected")]
    UnknownNode(NodeId),
    /// A fixed path that names one of its ends.
    #[error(
        "{0} is an end of the path; --via names only the relays in between, and --via \"\" means the \
         direct link"
    )]
    NoRelay(NodeId),
    /// A path that is none.
    #[error("the path is wrong: {0}")]
    Path(#[from] ParseError),
    /// The service is on this node.
    #[error("{0} is provided by this node itself; connect to its target directly")]
    OwnService(ServiceName),
    /// A number of paths that no tunnel has.
    #[error("a tunnel uses 1 to {PATHS_MAX} paths, not {0}")]
    Paths(usize),
    /// Several paths, one of which is fixed.
    #[error("a tunnel over a fixed path has one path; leave out --paths or --via")]
    FixedPaths,
    /// A rate that cannot be set aside.
    #[error("a reservation is of 1 bit/s to {} Gbit/s", RATE_MAX / 125_000_000)]
    Rate,
    /// Several paths and a reservation.
    #[error("a tunnel with a reservation has one path; leave out --paths or --reserve")]
    ReservedPaths,
    /// None of the routes that were asked has so much left.
    #[error(
        "no route to {to} that was asked has {:.1} Mbit/s free for this node: at most {:.1}, over the \
         link {}-{}; ask for less, choose another route with --via, or see 'meshwise route explain {to}'",
        mbit(*.rate), mbit(.bottleneck.available), .bottleneck.from, .bottleneck.to
    )]
    InsufficientBandwidth {
        /// The provider.
        to: NodeId,
        /// What was asked for (bytes/s).
        rate: u64,
        /// Of the links that have not so much, the one that has most left.
        bottleneck: Bottleneck,
    },
    /// Not all nodes of the route answered.
    #[error(
        "a node of the route to {0} did not answer the reservation; try again, or see \
         'meshwise route explain {0}'"
    )]
    ReservationUnanswered(NodeId),
    /// A node id whose key nobody has told.
    #[error(
        "the key of node {0} is not known here; write its peer id, which begins with 12D3KooW and is \
         shown there by 'meshwise network show'"
    )]
    UnknownKey(NodeId),
    /// Every tunnel id is taken.
    #[error("{TUNNELS_MAX} tunnels are open; close one with 'meshwise tunnel close'")]
    TooManyTunnels,
}

impl RequestError {
    /// Whether another provider of the same service may do better.
    pub(super) fn is_of_the_provider(&self) -> bool {
        matches!(
            self,
            Self::NoRoute(_)
                | Self::BrokenPath { .. }
                | Self::Tunnel(TunnelError::Unreachable { .. })
                | Self::InsufficientBandwidth { .. }
                | Self::ReservationUnanswered(_)
        )
    }
}

/// A rate (bytes/s) in Mbit/s.
fn mbit(rate: u64) -> f64 {
    rate as f64 * 8.0 / 1e6
}

type Inspection = Box<dyn FnOnce(&mut View<'_>) + Send>;
pub(super) type AnswerSender = oneshot::Sender<Result<Answer, CommandError>>;

pub(super) enum Request {
    Inspect(Inspection),
    Ask(Box<dyn FnOnce(RequestId) -> Command + Send>, AnswerSender),
    Bind {
        destination: NodeId,
        forced: Option<Route>,
        objective: Objective,
        beside: Option<TunnelId>,
        reserve: Option<u64>,
        reply: oneshot::Sender<Option<TunnelId>>,
    },
    Unbind(TunnelId),
    Doubt(ServiceName, NodeId),
    ReloadModel(oneshot::Sender<Result<Option<String>, String>>),
    Stop,
}

/// Talks to a running node. Cheap to clone.
#[derive(Clone)]
pub struct NodeHandle {
    pub(super) me: PublicKey,
    pub(super) requests: mpsc::Sender<Request>,
    pub(super) tunnels: Arc<Tunnels>,
    pub(super) models: Arc<ModelRegistry>,
    pub(super) published: Arc<Published>,
    pub(super) data_dir: PathBuf,
    /// Paths of a tunnel that does not say how many.
    pub(super) paths: usize,
    /// The local addresses of tunnels.
    pub(super) doors: Arc<Doors>,
    /// Where the proxy listens.
    pub(super) socks: Option<SocketAddr>,
}

impl NodeHandle {
    /// Who this is.
    pub fn key(&self) -> PublicKey {
        self.me
    }

    /// Where it keeps its things.
    pub fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    /// Where its SOCKS5 proxy listens, if it does.
    pub fn socks(&self) -> Option<SocketAddr> {
        self.socks
    }

    /// Looks at the node's state from within the driver, and returns what `look` makes of it.
    ///
    /// # Errors
    /// [`RequestError::Stopped`].
    pub async fn inspect<T: Send + 'static>(
        &self,
        look: impl FnOnce(&mut View<'_>) -> T + Send + 'static,
    ) -> Result<T, RequestError> {
        let (reply, answer) = oneshot::channel();
        let inspection: Inspection = Box::new(move |view| {
            let _ = reply.send(look(view));
        });
        self.send(Request::Inspect(inspection)).await?;
        answer.await.map_err(|_| RequestError::Stopped)
    }

    /// How this node publishes a name and where its connections go, if it does.
    pub fn published(&self, name: &ServiceName) -> Option<(ServiceSpec, SocketAddr)> {
        self.published.service(name)
    }

    /// Publishes a service whose connections go to `target`.
    ///
    /// # Errors
    /// [`RequestError::Command`] and others; after an error of storing in the DHT the service is
    /// nevertheless served and known by gossip.
    pub async fn publish(
        &self,
        service: ServiceSpec,
        target: SocketAddr,
    ) -> Result<u64, RequestError> {
        let kept = service.clone();
        let name = service.name.clone();
        let export = Export { kind: service.kind, target, allowed: service.allowed.clone() };
        let before = self.tunnels.exported(&name);
        self.tunnels.export(name.clone(), export);
        let answer = self.ask(move |request| Command::Publish { request, service }).await;
        match answer {
            Ok(Answer::Published { sequence }) => {
                self.published.insert(&kept, target);
                Ok(sequence)
            }
            Ok(_) => Err(RequestError::Stopped),
            Err(error) => {
                // Gossip has announced it all the same when only the DHT failed or is late.
                let announced = matches!(
                    &error,
                    RequestError::TimedOut | RequestError::Command(CommandError::NotStored { .. })
                );
                match before {
                    _ if announced => self.published.insert(&kept, target),
                    Some(before) => self.tunnels.export(name, before),
                    None => self.tunnels.unexport(&name),
                }
                Err(error)
            }
        }
    }

    /// Withdraws a service.
    ///
    /// # Errors
    /// [`RequestError::Command`], when this node does not publish it.
    pub async fn withdraw(&self, name: ServiceName) -> Result<(), RequestError> {
        // Also what is only kept for the next start, because publishing it again was refused.
        let kept = self.published.remove(&name);
        self.tunnels.unexport(&name);
        let asked = name.clone();
        match self.ask(move |request| Command::Withdraw { request, name: asked }).await {
            Err(RequestError::Command(CommandError::NotPublishedHere(_))) if kept => Ok(()),
            answer => answer.map(|_| ()),
        }
    }

    /// Publishes what was published when the node ran last, as soon as there is somebody to tell.
    pub(super) fn publish_again(&self) {
        for name in self.published.names() {
            let handle = self.clone();
            tokio::spawn(async move {
                let joined = |view: &mut View<'_>| view.engine.joined_after().is_some();
                for _ in 0..PUBLISH_AGAIN_TRIES {
                    if handle.inspect(joined).await.unwrap_or(true) {
                        break;
                    }
                    tokio::time::sleep(PUBLISH_AGAIN_WAIT).await;
                }
                // What is kept now counts: somebody may have changed it meanwhile.
                let Some((service, target)) = handle.published.service(&name) else { return };
                let asked = name.clone();
                let own = move |view: &mut View<'_>| {
                    view.engine.services().own().any(|service| service.name == asked)
                };
                if handle.inspect(own).await.unwrap_or(true) {
                    return;
                }
                match handle.publish(service, target).await {
                    Ok(_) => tracing::info!(%name, "published again"),
                    Err(error) => tracing::warn!("{name} was not published again: {error}"),
                }
            });
        }
    }

    /// The providers of a name, and whether gossip had brought them already.
    ///
    /// # Errors
    /// [`RequestError::Command`], when nobody provides it.
    pub async fn resolve(
        &self,
        name: ServiceName,
        from_dht: bool,
    ) -> Result<(Vec<(PublicKey, ServiceRecord)>, bool), RequestError> {
        match self.ask(move |request| Command::Resolve { request, name, from_dht }).await? {
            Answer::Resolved { providers, from_gossip } => Ok((providers, from_gossip)),
            _ => Err(RequestError::Stopped),
        }
    }

    /// Sends a probe over the route that a tunnel to this node would take. Returns the route, and the round
    /// trip (µs) when it came back in time.
    ///
    /// # Errors
    /// [`RequestError::Command`], when there is no route.
    pub async fn ping(&self, node: NodeId) -> Result<(Route, Option<u64>), RequestError> {
        match self.ask(move |request| Command::Ping { request, node }).await? {
            Answer::Pinged { route, rtt_us } => Ok((route, rtt_us)),
            _ => Err(RequestError::Stopped),
        }
    }

    /// Where the connections of a service of this node go.
    pub fn target(&self, name: &ServiceName) -> Option<SocketAddr> {
        let me = self.key().node_id();
        let export = self.tunnels.exported(name)?;
        let may = export.allowed.is_empty() || export.allowed.contains(&me);
        may.then_some(export.target)
    }

    /// Loads the champion from disk again. Returns its version.
    ///
    /// # Errors
    /// The text of what is wrong with it; the model in use stays.
    pub async fn reload_model(&self) -> Result<Result<Option<String>, String>, RequestError> {
        let (reply, answer) = oneshot::channel();
        self.send(Request::ReloadModel(reply)).await?;
        answer.await.map_err(|_| RequestError::Stopped)
    }

    /// Changes the emulated conditions of a link. Returns false when this node does not emulate.
    ///
    /// # Errors
    /// [`RequestError::Stopped`].
    pub async fn emulate(
        &self,
        neighbour: NodeId,
        link: EmulatedLink,
    ) -> Result<bool, RequestError> {
        self.inspect(move |view| view.net.plane().emulate(neighbour, link)).await
    }

    /// A stream to a provider's service failed: the engine looks at it soon.
    pub(super) fn doubt(&self, name: ServiceName, provider: NodeId) {
        // A driver that is that busy hears of the next failure.
        let _ = self.requests.try_send(Request::Doubt(name, provider));
    }

    pub(super) async fn ask(
        &self,
        command: impl FnOnce(RequestId) -> Command + Send + 'static,
    ) -> Result<Answer, RequestError> {
        let (reply, answer) = oneshot::channel();
        self.send(Request::Ask(Box::new(command), reply)).await?;
        match tokio::time::timeout(ANSWER_TIMEOUT, answer).await {
            Ok(Ok(answer)) => Ok(answer?),
            Ok(Err(_)) => Err(RequestError::Stopped),
            Err(_) => Err(RequestError::TimedOut),
        }
    }

    pub(super) async fn send(&self, request: Request) -> Result<(), RequestError> {
        self.requests.send(request).await.map_err(|_| RequestError::Stopped)
    }
}
