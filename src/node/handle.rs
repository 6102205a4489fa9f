//! How the control API and tests talk to the driver of a running node.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use super::View;
use super::published::Published;
use crate::config::EmulatedLink;
use crate::engine::event::{Answer, Command, CommandError, RequestId, ServiceSpec};
use crate::engine::overlay::{Objective, ServiceRecord};
use crate::engine::route::router::TUNNELS_MAX;
use crate::engine::types::{NodeId, ParseError, PublicKey, Route, ServiceName, TunnelId};
use crate::learn::ModelRegistry;
use crate::net::tunnel::{Export, GOODBYE, TunnelError, TunnelInfo, Tunnels};

/// How often, and after how long each, a node that starts looks whether it has joined before it
/// publishes again: 3 s in all.
const PUBLISH_AGAIN_TRIES: u32 = 30;
/// See [`PUBLISH_AGAIN_TRIES`].
const PUBLISH_AGAIN_WAIT: Duration = Duration::from_millis(100);
/// How long a tunnel waits for a first route: a new neighbour's advertisement is on its way.
const ROUTE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the DHT may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Why a request to a running node failed.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// The node is stopping.
    #[error("the node is stopping")]
    Stopped,
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
    /// A node that nobody advertises.
    #[error("{0} is not known here; see 'meshwise peer list' for the nodes that are connected")]
    UnknownNode(NodeId),
    /// A path that is none.
    #[error("the path is wrong: {0}")]
    Path(#[from] ParseError),
    /// The service is on this node.
    #[error("{0} is provided by this node itself; connect to its target directly")]
    OwnService(ServiceName),
    /// Every tunnel id is taken.
    #[error("{TUNNELS_MAX} tunnels are open; close one with 'meshwise tunnel close'")]
    TooManyTunnels,
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
        reply: oneshot::Sender<Option<TunnelId>>,
    },
    Unbind(TunnelId),
    ReloadModel(oneshot::Sender<Result<Option<String>, String>>),
    Stop,
}

/// How a tunnel is to travel; by default as its service wants.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TunnelOptions {
    /// The relays of a fixed path; otherwise routes are chosen.
    pub via: Option<Vec<NodeId>>,
    /// What it wants from its routes, instead of what the service's record says.
    pub objective: Option<Objective>,
}

/// A tunnel that is bound but not open yet. Unbinds it when opening fails, or when whoever asked
/// goes away.
struct Bound {
    tunnel: Option<TunnelId>,
    requests: mpsc::Sender<Request>,
}

impl Drop for Bound {
    fn drop(&mut self) {
        if let Some(tunnel) = self.tunnel {
            let requests = self.requests.clone();
            tokio::spawn(async move {
                let _ = requests.send(Request::Unbind(tunnel)).await;
            });
        }
    }
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
        let export = Export { target, allowed: service.allowed.clone() };
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

    /// Opens a tunnel to a service and accepts TCP connections for it on `listen`.
    ///
    /// # Errors
    /// [`RequestError`]; nothing stays open.
    pub async fn open_tunnel(
        &self,
        name: ServiceName,
        listen: SocketAddr,
        options: TunnelOptions,
    ) -> Result<(TunnelId, SocketAddr), RequestError> {
        let (providers, _) = self.resolve(name.clone(), false).await?;
        let first = providers.into_iter().next();
        let (provider, record) = first.ok_or_else(|| CommandError::UnknownName(name.clone()))?;
        let destination = provider.node_id();
        if provider == self.me {
            return Err(RequestError::OwnService(name));
        }
        let objective = options.objective.unwrap_or(record.objective);
        let forced = match options.via {
            Some(relays) => {
                for relay in &relays {
                    let relay = *relay;
                    if !self.inspect(move |view| view.knows(relay)).await? {
                        return Err(RequestError::UnknownNode(relay));
                    }
                }
                let ends = (self.me.node_id(), destination);
                let nodes = std::iter::once(ends.0).chain(relays).chain([ends.1]);
                Some(Route::new(nodes.collect::<Vec<_>>())?)
            }
            None => None,
        };
        let (reply, answer) = oneshot::channel();
        self.send(Request::Bind { destination, forced, objective, reply }).await?;
        let tunnel = answer.await.map_err(|_| RequestError::Stopped)?;
        let tunnel = tunnel.ok_or(RequestError::TooManyTunnels)?;
        let mut bound = Bound { tunnel: Some(tunnel), requests: self.requests.clone() };
        self.wait_for_route(tunnel, destination).await?;
        let listen = self.tunnels.open(tunnel, provider, name, record.kind, listen).await?;
        bound.tunnel = None;
        Ok((tunnel, listen))
    }

    async fn wait_for_route(&self, tunnel: TunnelId, to: NodeId) -> Result<(), RequestError> {
        let deadline = tokio::time::Instant::now() + ROUTE_TIMEOUT;
        loop {
            let routed = move |view: &mut View<'_>| {
                let mut tunnels = view.engine.tunnels();
                tunnels.any(|(id, destination)| id == tunnel && destination.current.is_some())
            };
            if self.inspect(routed).await? {
                return Ok(());
            }
            if tokio::time::Instant::now() >= deadline {
                return Err(RequestError::NoRoute(to));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Closes a tunnel. Returns whether it was open.
    ///
    /// # Errors
    /// [`RequestError::Stopped`].
    pub async fn close_tunnel(&self, tunnel: TunnelId) -> Result<bool, RequestError> {
        if !self.tunnels.close_one(tunnel) {
            return Ok(false);
        }
        // The good-bye still needs the route.
        tokio::time::sleep(GOODBYE).await;
        self.send(Request::Unbind(tunnel)).await?;
        Ok(true)
    }

    /// The tunnels of this node.
    pub fn tunnels(&self) -> Vec<TunnelInfo> {
        self.tunnels.list()
    }

    /// Where the connections of a service of this node go.
    pub fn target(&self, name: &ServiceName) -> Option<SocketAddr> {
        self.tunnels.exported(name).map(|export| export.target)
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

    async fn ask(
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

    async fn send(&self, request: Request) -> Result<(), RequestError> {
        self.requests.send(request).await.map_err(|_| RequestError::Stopped)
    }
}
